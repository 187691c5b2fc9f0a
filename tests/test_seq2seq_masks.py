"""seq2seq.py: what padding, later tokens and caches may change, which is nothing."""

import pytest
import torch
import torch.nn.functional as F
from test_seq2seq import LENGTHS, B, S, T, V, assert_near, batch, gradients, small, without

from model import KVCache

# ---- padding and causality -----------------------------------------------------------------------


def other(tokens: torch.Tensor) -> torch.Tensor:
    return (tokens + 1) % V


def test_padding_of_the_source_changes_nothing():
    model, given = small(), without(batch(), "targets")
    keep, source = given["source_keep"], given["source"]
    before, memory = model(**given), model.encode(source, keep)
    changed = torch.where(keep, source, other(source))
    assert torch.equal(model(**{**given, "source": changed}), before)
    assert torch.equal(model.encode(changed, keep)[keep], memory[keep])
    more = torch.cat([source, torch.randint(V, (B, 4))], 1), F.pad(keep, (0, 4))
    after = model(more[0], given["tokens"], source_keep=more[1])
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    for row in range(B):  # and each sentence alone, without any padding
        alone = model(source[row : row + 1, : LENGTHS[row]], given["tokens"][row : row + 1])
        torch.testing.assert_close(alone, before[row : row + 1], atol=1e-5, rtol=1e-5)


def test_no_mask_is_a_mask_that_keeps_all():
    model, given = small(), without(batch(), "targets", "source_keep")
    keep = torch.ones(B, S, dtype=torch.bool)
    torch.testing.assert_close(model(**given, source_keep=keep), model(**given))


def test_every_real_source_token_changes_every_logit_row():
    model, given = small(), without(batch(), "targets")
    before = model(**given)
    for s in range(S):
        changed = given["source"].clone()
        changed[:, s] = other(changed[:, s])
        moved = (model(**{**given, "source": changed}) != before).any(-1)  # (B, T)
        assert torch.equal(moved, given["source_keep"][:, s, None].expand(B, T))


def test_a_target_token_changes_no_earlier_logit():
    model, given = small(), without(batch(), "targets")
    before = model(**given)
    for t in range(T):
        changed = given["tokens"].clone()
        changed[:, t] = other(changed[:, t])
        after = model(**{**given, "tokens": changed})
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(-1).all()


def test_padding_of_the_target_changes_neither_loss_nor_gradient():
    model, given = small(), batch()
    before = model(**given)
    wanted = gradients(model, before["loss"])
    padding = given["targets"] == -100
    changed = torch.where(padding, other(given["tokens"]), given["tokens"])
    assert not torch.equal(changed, given["tokens"])
    after = model(**{**given, "tokens": changed})
    for name in ("loss", "nll"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-6, atol=0)
    got = gradients(model, after["loss"])
    # Only the sum over tokens of the embedding's gradient may round otherwise.
    assert_near(got, wanted, 1e-6)
    changed = given["tokens"].clone()
    changed[:, 0] = other(changed[:, 0])
    moved = model(**{**given, "tokens": changed})["loss"]
    assert abs(moved - before["loss"]) > 1e-3 * before["loss"]


def test_a_source_of_padding_only_stays_finite():
    """The softmax of nothing is NaN, and NaN in one row of a batch spreads to all weights."""
    model, given = small(), batch()
    given["source_keep"][1] = False
    losses = model(**given)
    found = gradients(model, losses["loss"])
    assert losses["loss"].isfinite() and all(g.isfinite().all() for g in found.values())
    logits = model(**without(given, "targets"))
    given["source"][1] = other(given["source"][1])
    assert torch.equal(model(**without(given, "targets")), logits)  # and it says nothing


# ---- caches --------------------------------------------------------------------------------------


def in_parts(model, tokens, memory, keep, cuts: list[int]) -> torch.Tensor:
    caches = model.make_caches(memory.size(1), tokens.size(1))
    parts = [
        model.decode(tokens[:, a:b], memory, keep, caches)
        for a, b in zip([0, *cuts], [*cuts, tokens.size(1)], strict=True)
    ]
    assert [(own.length, across.length) for own, across in caches] == [(T, S)] * 3
    return torch.cat(parts, 1)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("K", [1, 3])
@torch.no_grad()
def test_cached_equals_uncached_for_every_cut(K, padded):
    """K hypotheses of each sentence share its memory, and equal K copies of the memory."""
    model, given = small(), batch()
    tokens = torch.randint(V, (K * B, T))
    keep = given["source_keep"] if padded else None
    memory = model.encode(given["source"], keep)
    copies = memory.repeat_interleave(K, 0), keep.repeat_interleave(K, 0) if padded else None
    want = model.decode(tokens, *copies)
    near = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(model.decode(tokens, memory, keep), want, **near)
    for cut in range(1, T):
        got = in_parts(model, tokens, memory, keep, list(range(cut, T)))
        torch.testing.assert_close(got, want, **near)
        torch.testing.assert_close(in_parts(model, tokens, memory, keep, [cut]), want, **near)


@torch.no_grad()
def test_a_filled_cross_cache_is_not_filled_again():
    """Keys and values of the memory would be computed at every token, half of the work."""
    model, given = small(), batch()
    memory, caches = model.encode(given["source"]), model.make_caches(S, T)
    model.decode(given["tokens"][:, :1], memory, caches=caches)
    before = [across.k.clone() for _, across in caches]
    model.decode(given["tokens"][:, 1:2], torch.full_like(memory, torch.nan), caches=caches)
    assert all(torch.equal(c.k, k) for (_, c), k in zip(caches, before, strict=True))


@pytest.mark.parametrize(
    "rows",
    [[0, 1, 2], [2, 0, 1], [1], [2, 0], [0, 0, 1, 1, 2, 2], [2, 2, 2, 0], [1, 1, 0], []],
    ids=str,
)
def test_select_is_indexing(rows):
    k, v, more = (torch.randn(3, 2, n, 5) for n in (4, 4, 2))
    cache, rows = KVCache(6), torch.tensor(rows, dtype=torch.long)
    cache.append(k, v)
    cache.select(rows)
    assert cache.length == 4
    assert torch.equal(cache.filled()[0], k[rows]) and torch.equal(cache.filled()[1], v[rows])
    got_k, got_v = cache.append(more[rows], -more[rows])  # goes on from there
    assert torch.equal(got_k, torch.cat([k, more], 2)[rows])
    assert torch.equal(got_v, torch.cat([v, -more], 2)[rows])


def test_select_again_and_again_and_of_an_empty_cache():
    empty = KVCache(3)
    empty.select(torch.tensor([5, 5]))  # nothing seen yet: any number of rows may begin
    assert empty.length == 0 and empty.append(*torch.ones(2, 4, 2, 1, 5))[0].shape == (4, 2, 1, 5)
    cache, want = KVCache(9), torch.randn(2, 3, 1, 5)
    cache.append(want, -want)
    for step in range(1, 9):
        rows = torch.randint(len(want), (1 + step % 4,))
        new = torch.randn(len(rows), 3, 1, 5)
        cache.select(rows)
        cache.append(new, -new)
        want = torch.cat([want[rows], new], 2)
        assert torch.equal(cache.filled()[0], want) and torch.equal(cache.filled()[1], -want)

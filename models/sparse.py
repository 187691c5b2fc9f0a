"""Sparse attention: each query looks at some of the keys, so that long texts cost less.

Full attention compares every query with every key: twice the text is four times the work. Here a
mask is a function of positions, mask(t, s) = "may query t look at key s?". Functions are composed
by `and_masks` and `or_masks`, and draw themselves:

    window          the keys next to the query (Longformer, Mistral)
    dilated         a window with holes, which reaches further with as many keys
    global_tokens   some positions that see all and are seen by all (Longformer)
    random_blocks   blocks of keys that were drawn once (BigBird)

Stacked windows see further than one: after L layers of w - 1 keys before the query, a token has
heard of the L · (w - 1) before it.

`BlockAttention` is one form of attention for all of them. It cuts queries and keys into blocks and
computes a block of scores only where the mask allows something in it. With windows the work and the
memory grow linearly with the length. The whole matrix, which `matrix` makes, is its oracle.

Linformer is another way: a learned matrix makes k keys and values of all T of them. Each of the k
is a mixture of the whole text, what comes later too, and no mask could take that out again: it is
for encoders only.

    SparseGPT    GPT with a pattern; the weights are GPT's, so a GPT may go on as one (--init)
    SparseBERT   BERT with a pattern, likewise
    Linformer    BERT with Linformer's projection

The file needs torch, numpy, model.py and bert.py. `python -m models.sparse` draws the patterns.

Left out: other patterns for other heads or layers, projections of their own for global tokens
(Longformer), captured steps of a GPU, fine-tuning, kernels that skip inside a block: a block of
scores is computed whole, so a window should be longer than a block, and a dilated window costs what
it spans.

Papers: Sparse Transformer (Child et al. 2019, arXiv:1904.10509); Longformer (Beltagy et al. 2020,
arXiv:2004.05150), section 3; BigBird (Zaheer et al. 2020, arXiv:2007.14062), section 2 and
appendix D; Linformer (Wang et al. 2020, arXiv:2006.04768), section 4; Mistral (Jiang et al. 2023,
arXiv:2310.06825), section 2. What "a window of w" means differs: w keys in Mistral (and here),
w + 1 in Longformer, 2r + 1 for the radius r of LongT5 (Guo et al. 2021, arXiv:2112.07916), three
blocks of keys in BigBird.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bert import BERT, BERTConfig
from model import GPT, GPTConfig, KVCache, Mask, attend

# ---- masks as functions --------------------------------------------------------------------------

# Positions of queries and of keys, integers that broadcast -> bool, True = may look. They are numpy
# arrays: what a mask allows is found out on the host, whatever computes the attention.
MaskFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]


def causal(t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """draw(causal, 4):

    x . . .
    x x . .
    x x x .
    x x x x
    """
    return s <= t


def window(before: int, after: int) -> MaskFunction:
    """So many keys before the query, so many behind it, and its own.

    draw(window(2, 1), 6):

        x x . . . .
        x x x . . .
        x x x x . .
        . x x x x .
        . . x x x x
        . . . x x x
    """
    return lambda t, s: (s >= t - before) & (s <= t + after)


def dilated(before: int, after: int, step: int) -> MaskFunction:
    """As many keys as `window` has, but only each step-th.

    draw(dilated(2, 0, 3), 8):

        x . . . . . . .
        . x . . . . . .
        . . x . . . . .
        x . . x . . . .
        . x . . x . . .
        . . x . . x . .
        x . . x . . x .
        . x . . x . . x
    """
    return and_masks(window(step * before, step * after), lambda t, s: (t - s) % step == 0)


def global_tokens(n: int) -> MaskFunction:
    """The first n positions see all and are seen by all.

    draw(global_tokens(1), 4):

        x x x x
        x . . .
        x . . .
        x . . .
    """
    return lambda t, s: (t < n) | (s < n)


def random_blocks(table: np.ndarray, block: int) -> MaskFunction:
    """The queries of block i see the blocks of keys table[i], for a table (n_blocks, r). Positions
    beyond the table are an error.

    draw(random_blocks(np.array([[2], [0], [1]]), 2), 6):

        . . . . x x
        . . . . x x
        x x . . . .
        x x . . . .
        . . x x . .
        . . x x . .
    """
    return lambda t, s: (table[t // block] == (s // block)[..., None]).any(-1)


def and_masks(*masks: MaskFunction) -> MaskFunction:
    """What all of them allow. draw(and_masks(causal, window(1, 1)), 4):

    x . . .
    x x . .
    . x x .
    . . x x
    """
    return lambda t, s: np.logical_and.reduce(np.broadcast_arrays(*(m(t, s) for m in masks)))


def or_masks(*masks: MaskFunction) -> MaskFunction:
    """What one of them allows. draw(or_masks(global_tokens(1), window(1, 1)), 6):

    x x x x x x
    x x x . . .
    x x x x . .
    x . x x x .
    x . . x x x
    x . . . x x
    """
    return lambda t, s: np.logical_or.reduce(np.broadcast_arrays(*(m(t, s) for m in masks)))


def matrix(mask: MaskFunction, T: int, S: int, device: torch.device | str | None = None) -> Tensor:
    """(T, S) bool for the LAST T of S positions, as causal_mask of model.py has them."""
    allowed = mask(np.arange(S - T, S)[:, None], np.arange(S)[None])
    return torch.tensor(np.broadcast_to(allowed, (T, S)), device=device)


def draw(mask: MaskFunction, n: int) -> str:
    """The matrix of n positions in x (may look) and dots, a line for each query."""
    return "\n".join(" ".join("x" if may else "." for may in row) for row in matrix(mask, n, n))


def random_table(n_blocks: int, r: int, near: int, *, causal: bool, seed: int = 0) -> np.ndarray:
    """(n_blocks, r) for random_blocks: r blocks for each, drawn among those more than `near` away,
    where causal among the earlier ones of these; its own block in place of those that are missing.

    A causal row depends on its number alone, and not on how many blocks there are.
    """
    table = np.repeat(np.arange(n_blocks)[:, None], r, 1)
    for i in range(n_blocks):
        earlier, later = np.arange(i - near), np.arange(i + near + 1, 0 if causal else n_blocks)
        far = np.concatenate([earlier, later])
        drawn = np.random.default_rng((seed, i)).permutation(far)[:r]
        table[i, : len(drawn)] = drawn
    return table


# ---- attention by blocks -------------------------------------------------------------------------


class BlockAttention:
    """Attention that looks only where the mask allows something: the callable mask of `attend`.

    Query blocks that look at equally many key blocks are attended to together, so that a window
    needs few calls, and global positions, which see all, need one more. Which these are is found
    out once for each (T, S) and kept: the mask is asked for all T · S pairs, a row of blocks at a
    time, in half a second for 16,384 positions.
    """

    def __init__(self, mask: MaskFunction, block: int):
        self.mask, self.block = mask, block
        self.layout, self.seen = lru_cache(64)(self._layout), lru_cache(4)(self._seen)
        # A compiler would follow the mask, which is data, into numpy.
        self.by_blocks = torch.compiler.disable(self._by_blocks)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, keep: Tensor | None = None
    ) -> Tensor:
        """q (B, H, T, D), the last T of S positions, k and v (B, H, S, D) -> (B, H, T, D), the same
        as attend with `matrix`. keep (B, S), nonzero at real tokens; None: all are.

        A query that may look at nothing yields zeros.
        """
        return self.by_blocks(q, k, v, dropout, keep)

    def _seen(self, S: int, device: torch.device) -> Tensor:
        """The keys that the last of S positions looks at."""
        allowed = np.broadcast_to(self.mask(np.array([S - 1]), np.arange(S)), S)
        return torch.tensor(np.flatnonzero(allowed), device=device)

    def _layout(self, T: int, S: int, device: torch.device) -> tuple[list, Tensor]:
        """([(query blocks (n,), their key blocks (n · count,), what is allowed in these
        (n, block, count · block))], the place in this order of each query block)"""
        n_keys, s = math.ceil(S / self.block), np.arange(S)
        groups: dict[int, list] = {}
        for i, start in enumerate(range(S - T, S, self.block)):
            t = np.arange(start, min(start + self.block, S))
            allowed = np.zeros((self.block, n_keys * self.block), dtype=bool)
            allowed[: len(t), :S] = self.mask(t[:, None], s[None])
            allowed = allowed.reshape(self.block, n_keys, self.block)
            keys = np.flatnonzero(allowed.any((0, 2)))
            keys = keys if len(keys) else np.array([0])  # nothing is seen: attend makes it zeros
            group = groups.setdefault(len(keys), [])
            group.append((i, keys, allowed[:, keys].reshape(self.block, -1)))
        to_tensor = partial(torch.tensor, device=device)
        layout = []
        for group in groups.values():
            queries, keys, allowed = zip(*group, strict=True)
            keys, allowed = np.concatenate(keys), np.stack(allowed)
            layout.append((to_tensor(queries), to_tensor(keys), to_tensor(allowed)))
        order = np.concatenate([[i for i, _, _ in group] for group in groups.values()])
        return layout, to_tensor(order.argsort())

    def _by_blocks(
        self, q: Tensor, k: Tensor, v: Tensor, dropout: float, keep: Tensor | None
    ) -> Tensor:
        (B, H, T, D), S, block = q.shape, k.size(2), self.block
        if T == 1:  # decoding: the keys that one query looks at, and no more
            at = self.seen(S, q.device)
            if not len(at):
                return 0 * q
            mask = None if keep is None else keep.bool().index_select(1, at)[:, None, None]
            return attend(q, k.index_select(2, at), v.index_select(2, at), mask, dropout)
        layout, order = self.layout(T, S, q.device)
        q, k, v = (in_blocks(x.transpose(1, 2), block) for x in (q, k, v))  # (B, n, block, H, D)
        kept = None if keep is None else in_blocks(keep.bool(), block)
        parts = []
        for queries, keys, allowed in layout:
            n = len(queries)
            mask = allowed.expand(B, *allowed.shape)
            if kept is not None:
                mask = mask & kept.index_select(1, keys).view(B, n, 1, -1)
            chosen = (x.index_select(1, at) for x, at in ((q, queries), (k, keys), (v, keys)))
            chosen = (x.reshape(B * n, -1, H, D).transpose(1, 2) for x in chosen)
            y = attend(*chosen, mask.reshape(B * n, 1, block, -1), dropout)  # (B · n, H, block, D)
            parts.append(y.transpose(1, 2).reshape(B, n, block, H, D))
        y = torch.cat(parts, 1).index_select(1, order)
        return y.flatten(1, 2)[:, :T].transpose(1, 2)


def in_blocks(x: Tensor, block: int) -> Tensor:
    """x (B, T, …) -> (B, ceil(T / block), block, …), filled up with zeros"""
    padding = [0, 0] * (x.dim() - 2) + [0, -x.size(1) % block]
    return F.pad(x, padding).unflatten(1, (-1, block))


# ---- Linformer -----------------------------------------------------------------------------------


def project_keys(
    projection: Tensor, keep: Tensor | None, q: Tensor, k: Tensor, v: Tensor, dropout: float
) -> Tensor:
    """Linformer's attention: softmax(q (E k)ᵀ / sqrt(D)) (E v), for projection E (n, block_size).
    q, k, v (B, H, T, D) -> (B, H, T, D). A shorter text has the first T columns of E. Keys and
    values where keep (B, T) is False become zeros, so that padding changes nothing."""
    if keep is not None:
        k, v = (x * keep.to(x.dtype)[:, None, :, None] for x in (k, v))
    E = projection[:, : k.size(2)].to(q.dtype)
    return attend(q, E @ k, E @ v, None, dropout)


# ---- the models ----------------------------------------------------------------------------------

LONGEST = 2**16  # positions: beyond it, asking the mask for all pairs takes minutes


@dataclass
class SparseConfig:
    """The settings of a pattern, on which no weight's shape depends."""

    # tokens that each sees in a layer, itself included
    window: int = field(default=128, metadata={"free": True})
    # step from each token of the window to the next one: it spans window x dilation
    dilation: int = field(default=1, metadata={"free": True})
    # tokens at the beginning that are seen by all, and, in an encoder, see all
    n_global: int = field(default=0, metadata={"free": True})
    # far blocks that each block sees too, drawn once for all (BigBird)
    n_random: int = field(default=0, metadata={"free": True})
    # tokens of a block, in which attention is computed
    sparse_block: int = field(default=64, metadata={"free": True})

    def __post_init__(self):
        super().__post_init__()
        for name, least in {"window": 1, "dilation": 1, "n_global": 0, "n_random": 0}.items():
            if not least <= (value := getattr(self, name)) <= LONGEST:
                raise ValueError(f"{name}={value} is out of range: choose {least} to {LONGEST:,}")
        if not 1 <= self.sparse_block <= 1024:
            raise ValueError(f"sparse_block={self.sparse_block} is out of range: choose 1 to 1,024")
        if self.block_size > LONGEST:
            raise ValueError(
                f"block_size={self.block_size} is too large for masks by functions: choose "
                f"{LONGEST:,} or less"
            )


def pattern(config: SparseConfig, before: int, after: int, *, causal_only: bool) -> MaskFunction:
    """The mask of a network whose windows have so many tokens before and behind each."""
    c, masks = config, [dilated(before, after, config.dilation)]
    if c.n_global:
        masks.append(global_tokens(c.n_global))
    if c.n_random:
        near = c.dilation * before // c.sparse_block + 1  # blocks of which a window may see a part
        n = math.ceil(c.block_size / c.sparse_block)
        table = random_table(n, c.n_random, near, causal=causal_only)
        masks.append(random_blocks(table, c.sparse_block))
    return and_masks(causal, or_masks(*masks)) if causal_only else or_masks(*masks)


def spared(network: nn.Module, mask: MaskFunction) -> int:
    """The FLOPs of training by which attention with this mask costs less than full attention, for
    each token: 12·L·C for each key that is not looked at. Of a long text 512 queries count."""
    c, T = network.config, network.config.block_size
    t = np.unique(np.linspace(0, T - 1, min(T, 512)).round().astype(np.int64))
    looked_at = sum(np.broadcast_to(mask(i, np.arange(T)), T).sum() for i in t) / len(t)
    return round(12 * c.n_layer * c.n_embd * (T - looked_at))


@dataclass
class SparseGPTConfig(SparseConfig, GPTConfig):
    pass


class SparseGPT(GPT):
    """GPT whose tokens see a window, and perhaps global tokens and random blocks: the same ones in
    training, evaluation and writing, whatever the length of a text."""

    Config = SparseGPTConfig
    begins_from = (GPT,)

    def __init__(self, config: SparseGPTConfig):
        super().__init__(config)
        mask = pattern(config, config.window - 1, 0, causal_only=True)
        self.sparse = BlockAttention(mask, config.sparse_block)

    def features(
        self, tokens: Tensor, mask: Mask = "causal", caches: list[KVCache] | None = None
    ) -> Tensor:
        """tokens (B, T) -> features (B, T, C), as in GPT.

        A bool mask takes away what the pattern allows; this is computed with the whole matrix.
        Raises ValueError for any other mask, since full attention would not be this network.
        """
        if isinstance(mask, Tensor):
            past = caches[0].length if caches else 0
            T = tokens.size(1)
            mask = mask & matrix(self.sparse.mask, T, past + T, tokens.device)
        elif mask == "causal":
            mask = self.sparse
        else:
            raise ValueError(
                f'mask={mask!r} does not go with a sparse pattern: pass "causal" or a bool tensor'
            )
        return super().features(tokens, mask, caches)

    def flops_per_token(self) -> int:
        """As GPT's, with the keys that a token looks at."""
        return super().flops_per_token() - spared(self, self.sparse.mask)


@dataclass
class SparseBERTConfig(SparseConfig, BERTConfig):
    # tokens that each sees in a layer, itself and as many on both sides: an odd number
    window: int = field(default=129, metadata={"free": True})

    def __post_init__(self):
        super().__post_init__()
        if self.window % 2 == 0:
            raise ValueError(
                f"window={self.window} is even, but an encoder sees as many tokens on both sides: "
                f"choose {self.window - 1} or {self.window + 1}"
            )


class SparseBERT(BERT):
    """BERT whose tokens see a window on both sides, and perhaps global tokens and random blocks."""

    Config = SparseBERTConfig
    begins_from = (BERT,)

    def __init__(self, config: SparseBERTConfig):
        super().__init__(config)
        side = config.window // 2
        mask = pattern(config, side, side, causal_only=False)
        self.sparse = BlockAttention(mask, config.sparse_block)

    def attention_mask(self, keep: Tensor | None) -> Mask:
        return partial(self.sparse, keep=keep)

    def flops_per_token(self) -> int:
        """As BERT's, with the keys that a token looks at."""
        return super().flops_per_token() - spared(self, self.sparse.mask)


@dataclass
class LinformerConfig(BERTConfig):
    n_keys: int = 64  # keys and values that are made of all those of a text

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.n_keys <= self.block_size:
            raise ValueError(
                f"n_keys={self.n_keys} is out of range: choose 1 to block_size={self.block_size}"
            )


class Linformer(BERT):
    """BERT with Linformer's attention; keys and values, heads and layers share one projection.

    It is initialised as BERT is, `projection` by N(0, 1 / sqrt(block_size)), which keeps the size
    of independent keys.
    """

    Config = LinformerConfig
    begins_from = ()  # a BERT has no projection

    def __init__(self, config: LinformerConfig):
        super().__init__(config)
        self.projection = nn.Parameter(torch.empty(config.n_keys, config.block_size))
        nn.init.normal_(self.projection, std=config.block_size**-0.5)

    def attention_mask(self, keep: Tensor | None) -> Mask:
        return partial(project_keys, self.projection, keep)

    def flops_per_token(self) -> int:
        """As BERT's, where each token has n_keys keys and is projected into as many, twice."""
        c = self.config
        other = 2 * c.n_keys - c.block_size
        return super().flops_per_token() + 12 * c.n_layer * c.n_embd * other


if __name__ == "__main__":  # three patterns, and a verse learnt by heart through windows
    near = or_masks(window(1, 1), global_tokens(1))
    far = random_blocks(random_table(6, 1, 1, causal=False), 2)
    three = {"dilated": dilated(2, 2, 3), "Longformer": near, "BigBird": or_masks(near, far)}
    drawn = [[f"{name:23}", *draw(mask, 12).splitlines()] for name, mask in three.items()]
    print("\n".join("   ".join(lines).rstrip() for lines in zip(*drawn, strict=True)))
    torch.manual_seed(1)
    text = "Tyger Tyger, burning bright,\nIn the forests of the night;\nWhat immortal hand or eye"
    letters = sorted(set(text))
    tokens = torch.tensor([[letters.index(c) for c in text]])
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 64, "window": 8, "sparse_block": 8}
    gpt = SparseGPT(SparseGPTConfig(len(letters), block_size=len(text), **sizes))
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3)
    for step in range(81):
        loss = gpt(tokens[:, :-1], tokens[:, 1:])["loss"] / (len(text) - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step:2}   loss {loss.item():.3f}")
    optimizer.zero_grad()
    gpt(tokens)[0, -1].sum().backward()
    seen = gpt.position_embedding.weight.grad.any(-1).sum()
    print(f"two layers with windows of 8: the last prediction depends on {seen} letters, 2 x 7 + 1")
    caches, written = gpt.make_caches(), tokens[:, :5]
    new = written
    with torch.no_grad():
        while written.size(1) < len(text):
            new = gpt(new, caches=caches)[:, -1:].argmax(-1)  # only the new token is read
            written = torch.cat([written, new], 1)
    print("\n" + "".join(letters[i] for i in written[0].tolist()))

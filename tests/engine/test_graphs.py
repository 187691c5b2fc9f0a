"""graphs.py: the steps that a GPU captures, here uncaptured, beside the caches that grow."""

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from bpe import GPT2_PATTERN, Tokenizer
from data.tokens import END_OF_TEXT
from decoding import beam_search, generate, generate_targets
from engine import graphs, kernels
from engine.graphs import (
    AHEAD,
    CapturedSteps,
    Seq2SeqSteps,
    StaticAdvance,
    StaticCache,
    TextSteps,
    adds,
    empty_cache,
)
from finetune import add_adapters
from model import GPT, Attention, GPTConfig, KVCache, attend, padding_mask
from seq2seq import Seq2Seq, Seq2SeqConfig
from tasks import text, translation
from tasks.text import Pick, SampleFlags
from tasks.translation import make_advance, pad, translate_ids

WORDS = Tokenizer.train(["to be or not to be that is the question " * 20], 300)
BYTES = Tokenizer({bytes([i]): i for i in range(256)}, GPT2_PATTERN, {END_OF_TEXT: 256})
GREEDY = SampleFlags(temperature=0)
DRAWN = SampleFlags(temperature=1.3, top_p=0.95, seed=7)
FILTERED = SampleFlags(temperature=2.0, top_k=30, min_p=0.01, top_p=1.0)

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, on_gpu])]


@pytest.fixture(autouse=True)
def sizes_from_4(monkeypatch):
    """Texts of a few tokens see caches of 4, 8, 16, ... positions: a graph each."""
    monkeypatch.setattr(CapturedSteps, "least", 4)
    monkeypatch.setattr(Seq2SeqSteps, "least", 4)


@pytest.fixture
def recorded(monkeypatch):
    """As on a GPU: a step is recorded once, and what runs from then on are the operations of that
    time, on the same tensors and with the same Python numbers, into the same result."""

    def record(step, changed, pool):
        graphs.warm_up(step, changed)
        before = [x.clone() for x in changed]
        graph = make_fx(step)()
        result = graph().clone()
        for x, old in zip(changed, before, strict=True):
            x.copy_(old)
        return lambda: result.copy_(graph())

    monkeypatch.setattr("engine.graphs.captured", record)


def gpt(block_size=13, pre_ln=True, device="cpu") -> GPT:
    """Untrained, with weights large enough that its choices depend on all of the context."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 24, "pre_ln": pre_ln}
    model = GPT(GPTConfig(vocab_size=320, block_size=block_size, **sizes)).eval()
    for name, p in model.named_parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.1 if name.startswith("token") else 0.5)
    with torch.no_grad():
        model.token_embedding.weight[WORDS.vocab_size :] = 5.0  # padding that would always win
    return model.to(device)


def prompts_of(*lengths: int) -> list[list[int]]:
    return [torch.randint(9, (n,)).tolist() for n in lengths]


def write_both(model, prompts, config, count, leads=None, size=None):
    """What the caches that grow give, and what the steps give."""
    leads = leads or [b""] * len(prompts)
    grown = generate(model, prompts, Pick(WORDS, config, leads), count)
    pick = Pick(WORDS, config, leads)
    steps = TextSteps(model, len(prompts), size or model.config.block_size, pick.choose)
    return list(grown), list(generate(model, prompts, pick, count, steps=steps))


# ---- GPT: as the caches that grow ----------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [GREEDY, DRAWN, FILTERED], ids=["greedy", "drawn", "filtered"])
@pytest.mark.parametrize("lengths", [(1,), (9,), (40,), (3, 1, 17, 9), (5, 5), (2, 30)])
def test_texts_equal_those_of_the_caches_that_grow(lengths, config, device):
    """Past the context of 13 too, where half a block is dropped and read again."""
    model = gpt(device=device)
    want, got = write_both(model, prompts_of(*lengths), config, 23)
    assert got == want
    written = [[t for t in row if t is not None] for row in zip(*got, strict=True)]
    assert all(len(row) == 23 and len(set(row)) > 3 for row in written)
    assert max(map(max, written)) < WORDS.vocab_size


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [GREEDY, DRAWN, FILTERED], ids=["greedy", "drawn", "filtered"])
def test_logits_of_nan_end_in_one_sentence_and_in_no_assertion_of_the_device(config, device):
    """A step that is not waited for looked up the embedding of token V."""
    model = gpt(device=device)
    nn.init.constant_(model.norm.weight, torch.nan)
    pick = Pick(WORDS, config, [b"", b""])
    for steps in (None, TextSteps(model, 2, 13, pick.choose)):
        with pytest.raises(ValueError, match=r"not numbers \(NaN\): use a checkpoint from before"):
            list(generate(model, prompts_of(3, 7), pick, 9, steps=steps))


@pytest.mark.parametrize(("block_size", "pre_ln"), [(1, True), (2, True), (37, True), (13, False)])
def test_texts_are_equal_for_other_contexts_and_norms(block_size, pre_ln):
    want, got = write_both(gpt(block_size, pre_ln), prompts_of(7, 2), DRAWN, 45)
    assert got == want


def test_caches_need_no_more_room_than_the_text():
    want, got = write_both(gpt(37), prompts_of(6, 4), DRAWN, 9, size=15)
    assert got == want


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 12), st.integers(1, 9))
def test_any_prompts_and_any_lengths(lengths, count, block_size):
    """A row may end before another begins, and begin again behind a drop."""
    want, got = write_both(gpt(block_size), prompts_of(*lengths), DRAWN, count)
    assert got == want


@pytest.mark.parametrize("lengths", [(5, 5, 5), (2, 9, 2)])
def test_the_first_token_begins_with_the_space_of_its_prompt(lengths):
    leads = [b" ", b"", b" "]
    want, got = write_both(gpt(), prompts_of(*lengths), DRAWN, 20, leads)
    assert got == want
    first = [next(t for t in row if t is not None) for row in zip(*got, strict=True)]
    assert [WORDS.decode_bytes([t])[:1] == b" " for t in first][::2] == [True, True]


def test_texts_are_equal_when_steps_are_recorded(recorded):
    """Two graphs, in the midst of texts of unequal length, and drops."""
    want, got = write_both(gpt(8), prompts_of(3, 1, 6), DRAWN, 12)
    assert got == want


def test_rows_do_not_depend_on_their_neighbours():
    model, prompts = gpt(), prompts_of(3, 17, 8)
    together, _ = write_both(model, prompts, DRAWN, 15)
    alone = [write_both(model, [p], DRAWN, 15)[1] for p in prompts]
    for r, one in enumerate(alone):
        assert [s[r] for s in together if s[r] is not None] == [t for (t,) in one]


@torch.no_grad()
@pytest.mark.parametrize("pre_ln", [True, False])
def test_logits_equal_those_of_the_whole_text_at_every_position(pre_ln):
    model, tokens = gpt(37, pre_ln).double(), torch.randint(256, (3, 38))
    steps = TextSteps(model, 3, 37, lambda logits, u: tokens[:, steps.length])
    steps.read(tokens[:, :2])
    for n in range(2, 37):
        want = model(tokens[:, :n])[:, -1]
        torch.testing.assert_close(steps.decode(steps.limit()), want, atol=1e-9, rtol=1e-9)
        steps.step()
    with pytest.raises(ValueError, match="hold 37 positions and are full"):
        for _ in range(3):
            steps.step()


def test_steps_may_be_used_again_and_forget_what_was_before():
    model, long, short = gpt(), prompts_of(11, 2), prompts_of(3, 1)
    pick = Pick(WORDS, GREEDY, [b"", b""])
    steps = TextSteps(model, 2, 13, pick.choose)
    for prompts in (long, short):
        want = list(generate(model, prompts, pick, 20))
        assert list(generate(model, prompts, pick, 20, steps=steps)) == want
    prompt = torch.tensor([short[0]] * 2)
    steps.read(prompt, given=torch.tensor([[5, -1]]))
    steps.step()
    assert steps.tokens.tolist() == [5, want[2][0]]
    steps.read(prompt)
    steps.step()
    assert steps.tokens.tolist() == [want[2][0]] * 2


@torch.no_grad()
def test_positions_that_are_not_filled_are_not_seen():
    model = gpt()
    steps = TextSteps(model, 2, 13, Pick(WORDS, GREEDY, [b""] * 2).choose)
    steps.read(torch.tensor(prompts_of(6, 6)))
    before = steps.decode(8).clone()
    for cache in steps.caches:
        cache.k[:, :, 6:], cache.v[:, :, 6:] = 1e4, -1e4
    torch.testing.assert_close(steps.decode(8), before, atol=0, rtol=0)
    steps.caches[0].v[:, :, 4] += 1
    assert not torch.allclose(steps.decode(8), before, atol=1e-3)


def test_memory_begins_as_zeros():
    """0 times the NaN that may lie in new memory is NaN, mask or no mask."""
    cache = empty_cache(2, 3, 7, 4, torch.full((5, 12), torch.nan))
    assert cache.k.shape == (2, 3, 7, 4) and not cache.k.any() and not cache.v.any()
    assert cache.k.data_ptr() != cache.v.data_ptr()


def test_the_caller_may_stop_and_few_steps_were_for_nothing():
    model, prompts, count = gpt(64), prompts_of(5, 5), 0
    pick = Pick(WORDS, DRAWN, [b"", b""])
    steps = TextSteps(model, 2, 64, pick.choose)
    original = steps.step

    def counted(*args):
        nonlocal count
        count += 1
        original(*args)

    steps.step = counted
    texts = generate(model, prompts, pick, 50, steps=steps)
    first = [next(texts) for _ in range(6)]
    texts.close()
    assert count == 6 + AHEAD
    assert first == list(generate(model, prompts, Pick(WORDS, DRAWN, [b"", b""]), 6))


@torch.no_grad()
def test_weights_in_bf16():
    model = gpt(37)
    tokens, choose = torch.randint(256, (3, 20)), Pick(WORDS, DRAWN, [b""] * 3).choose
    want = model(tokens)[:, -1]
    steps = TextSteps(model.bfloat16(), 3, 37, choose)
    steps.read(tokens)
    logits = steps.decode(32)
    assert logits.dtype == steps.caches[0].k.dtype == torch.bfloat16
    assert (logits - want).norm() < 0.05 * want.norm()
    u, logits = torch.rand(500, dtype=torch.double), logits[:1].expand(500, -1)
    assert choose(logits, u).tolist() == choose(logits.float(), u).tolist()
    for _ in range(5):
        steps.step()
    assert steps.tokens.max() < WORDS.vocab_size


@pytest.mark.parametrize("config", [GREEDY, DRAWN, FILTERED], ids=["greedy", "drawn", "filtered"])
def test_a_step_asks_the_device_for_no_value(config):
    """Which would stop a GPU, and cannot be captured. On the meta device there are no values."""
    with torch.device("meta"):
        model = GPT(GPTConfig(320, 16, 2, 2, 24)).eval()
        steps = TextSteps(model, 3, 16, Pick(WORDS, config, [b""] * 3).choose)
        steps.read(torch.zeros(3, 5, dtype=torch.long))
        for _ in range(9):
            steps.step()
    assert steps.tokens.device.type == "meta" and sorted(steps.captured) == [8, 16]
    with pytest.raises(RuntimeError):
        steps.tokens.tolist()


def test_uniform_numbers_are_the_same_one_by_one_and_many_at_once():
    one, many = (Pick(WORDS, DRAWN, [b""] * 2) for _ in range(2))
    for count in (1, 2, 40, 1000):
        assert many.draw(1, count).tolist() == [float(one.draw(1)) for _ in range(count)]


# ---- parts ---------------------------------------------------------------------------------------


def test_a_static_cache_is_the_beginning_of_one_that_grows():
    grown, whole, position = (
        KVCache(9),
        empty_cache(3, 2, 9, 4, torch.zeros(1, 8)),
        torch.tensor([0]),
    )
    for t in range(7):
        k, v = torch.randn(2, 3, 2, 1, 4)
        want = grown.append(k, v)
        got = StaticCache(whole, position, 8).append(k, v)
        assert all(x.shape == (3, 2, 8, 4) for x in got)
        assert all(torch.equal(x[:, :, : t + 1], y) for x, y in zip(got, want, strict=True))
        position += 1
    rows = torch.tensor([2, 0, 2])
    grown.select(rows)
    static = StaticCache(whole, position, 8)
    static.select(rows)
    for x, y in zip(static.seen, grown.filled(), strict=True):
        assert torch.equal(x[:, :, :7], y)


@pytest.mark.parametrize("kernels_of_a_cpu", [False, True])
def test_an_additive_mask_says_what_a_bool_one_says(kernels_of_a_cpu):
    if kernels_of_a_cpu:
        kernels.install(torch.device("cpu"))
    q, (k, v) = torch.randn(2, 3, 1, 4), torch.randn(2, 2, 3, 7, 4)
    keep = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0, 0]])
    scores = padding_mask(keep).float().log()
    want = attend(q, k, v, padding_mask(keep), 0.0)
    torch.testing.assert_close(attend(q, k, v, adds(scores), 0.0), want)
    with pytest.raises(ValueError, match=r"must be torch\.bool"):
        attend(q, k, v, scores, 0.0)


# ---- the encoder-decoder: as make_advance --------------------------------------------------------


def translator(device="cpu", **sizes) -> Seq2Seq:
    """With weights large enough that its choices depend on all of the context, a lively end, and
    ids beyond the tokenizer's vocabulary that would always win."""
    torch.manual_seed(3)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 24, "n_ff": 37} | sizes
    model = Seq2Seq(Seq2SeqConfig(vocab_size=320, block_size=40, **sizes)).eval()
    for p in model.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.45)
    with torch.no_grad():
        model.token_embedding.weight[256] += 0.5 * torch.randn(24)
        model.token_embedding.weight[257:] = 9.0
    return model.to(device)


BATCHES = [("a cat", "two dogs sleep", "x"), ("the red house",), ("a b", "cd e", "7 x 8", "abc")]


def read(lines, device="cpu"):
    return (x.to(device) for x in pad([BYTES.encode(line) for line in lines], 256))


@torch.no_grad()
def search_both(batches, beam, start, device) -> set[int]:
    """Compares every logit, then what is found; -> how many sentences were being written."""
    model, alive, atol = translator(device), set(), 1e-5 if device == "cpu" else 1e-3
    static = StaticAdvance(model, beam, 257)
    for lines in batches:
        source, keep = read(lines, device)
        limits = [10, 7, 12, 3][: len(lines)]
        ours, theirs = static(source, keep, 13), make_advance(model, source, keep, 13, 257)

        def both(tokens, rows, sentences, ours=ours, theirs=theirs):
            alive.add(len(sentences))
            want = theirs(tokens, rows, sentences)
            torch.testing.assert_close(ours(tokens, rows, sentences), want, atol=atol, rtol=atol)
            return want

        ends = {"beam": beam, "start": start, "end": 256, "device": device}
        want = beam_search(both, limits, **ends)
        found = beam_search(static(source, keep, 13), limits, **ends)
        assert [tokens for _, tokens in found] == [tokens for _, tokens in want]
    return alive


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("start", [256, 31])
@pytest.mark.parametrize("beam", [1, 2, 5])
def test_beam_search_finds_the_same_and_every_logit_is_equal(beam, start, device):
    """Three batches by the same static steps, whose rows stay where they are when a sentence is
    done."""
    assert search_both(BATCHES, beam, start, device) >= {1, 2, 3, 4}


@pytest.mark.slow
def test_the_search_is_the_same_when_steps_are_recorded(recorded):
    """Where a step that is tried before it is recorded must move no cache."""
    search_both(BATCHES[::2], 2, 256, "cpu")


@torch.no_grad()
def test_as_many_rows_may_be_those_of_fewer_sentences():
    model, (source, keep) = translator(), read(BATCHES[0])
    advances = (
        StaticAdvance(model, 3, 257)(source, keep, 9),
        make_advance(model, source, keep, 9, 257),
    )
    for tokens, rows, sentences in (([256] * 3, [0, 1, 2], [0, 1, 2]), ([5, 6, 7], [1] * 3, [1])):
        ours, want = (a(torch.tensor(tokens), torch.tensor(rows), sentences) for a in advances)
        torch.testing.assert_close(ours, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_greedy_writing_is_the_same():
    model = translator(output_bias=True)
    model.output_bias += torch.randn(320)
    static = StaticAdvance(model, 1, 257)
    for lines in BATCHES:
        source, keep = read(lines)
        limits = [10, 7, 12, 3][: len(lines)]
        advances = static(source, keep, 13), make_advance(model, source, keep, 13, 257)
        ours, want = (
            generate_targets(a, limits, lambda x, _: x.argmax(-1), start=256, end=256)
            for a in advances
        )
        assert ours == want


@pytest.mark.parametrize("search", [{"beam": 4}, {"beam": 1}, {"temperature": 1.0, "top_k": 9}])
def test_translations_are_the_same(search):
    model, config = translator(), translation.SampleFlags(max_new_tokens=14, **search)
    static = StaticAdvance(model, config.beam if config.temperature == 0 else 1, 257)
    for lines in BATCHES:
        sources = [BYTES.encode(line) for line in lines]
        want = translate_ids(model, BYTES, sources, config)
        assert translate_ids(model, BYTES, sources, config, static) == want


@torch.no_grad()
def test_steps_of_the_same_sizes_serve_the_next_batch():
    static = StaticAdvance(translator(), 2, 257)
    seen = []
    for shape in ((3, 7), (4, 16), (3, 5), (2, 5), (2, 17)):
        source = torch.randint(256, shape)
        static(source, torch.ones(shape, dtype=torch.bool), 13)
        seen.append(static.steps)
    assert seen[0] is seen[1] is seen[2] and len(set(seen)) == 3
    assert seen[0].memory.shape == (4, 16, 24) and seen[0].size == 16


@torch.no_grad()
def test_a_step_of_the_translator_asks_for_no_value():
    with torch.device("meta"):
        model = Seq2Seq(Seq2SeqConfig(320, 40, 2, 2, 24, 37)).eval()
        steps = Seq2SeqSteps(model, 2, 3, 8, 16, 257)
        for across in steps.across:
            across.length = 8
        assert steps.decode(8).shape == (6, 257)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_queries_keys_and_values_are_joined_without_a_second_copy(bias):
    model = GPT(GPTConfig(40, 8, 1, 2, 12, bias=bias)).eval()
    attention, x = model.blocks[0].attention, torch.randn(2, 3, 12)
    if bias:
        for each in (attention.q, attention.k, attention.v):
            nn.init.normal_(each.bias)
    wanted, logits = attention.project(x), model(torch.arange(6)[None])
    before = {name: p.clone() for name, p in model.named_parameters()}
    TextSteps(model, 1, 8, lambda logits, u: logits.argmax(-1))
    for got, want in zip(attention.project(x), wanted, strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(model(torch.arange(6)[None]), logits)
    storages = {each.weight.untyped_storage().data_ptr() for each in attention.children()}
    assert len(storages) == 2  # q, k and v are one matrix, the projection of the output another
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    project = attention.project
    TextSteps(model, 1, 8, lambda logits, u: logits.argmax(-1))
    assert attention.project is project  # one joint copy is enough
    for p in model.parameters():  # and it is the parameters themselves
        p.mul_(2)
    wanted = attention.q(x), attention.k(x), attention.v(x)
    for got, want in zip(attention.project(x), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_an_attention_of_another_kind_is_left_alone():
    class Grouped(Attention):
        def __init__(self, config):
            super().__init__(config)
            self.k = self.v = nn.Linear(config.n_embd, config.n_embd // 2)

    model = GPT(GPTConfig(40, 8, 1, 2, 12)).eval()
    model.blocks[0].attention = Grouped(model.config)
    TextSteps(model, 1, 8, lambda logits, u: logits.argmax(-1))
    assert model.blocks[0].attention.k.weight.shape == (6, 12)
    model.blocks[0].attention = nn.Identity()
    TextSteps(model, 1, 8, lambda logits, u: logits.argmax(-1))


@torch.no_grad()
def test_projections_with_adapters_are_left_alone():
    model = GPT(GPTConfig(40, 8, 1, 2, 12)).eval()
    add_adapters(model, 2)
    for name, p in model.named_parameters():
        if "q." in name:
            nn.init.normal_(p)
    logits = model(torch.arange(6)[None])
    TextSteps(model, 1, 8, lambda logits, u: logits.argmax(-1))
    torch.testing.assert_close(model(torch.arange(6)[None]), logits)


# ---- only on a GPU -------------------------------------------------------------------------------


@pytest.fixture
def no_waiting():
    """Whatever waits for the device raises."""

    def forbid():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    yield forbid
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("config", [GREEDY, DRAWN, FILTERED], ids=["greedy", "drawn", "filtered"])
def test_gpu_a_replayed_step_never_waits(config, no_waiting):
    model = gpt(37, device="cuda")
    steps = TextSteps(model, 2, 37, Pick(WORDS, config, [b"", b""]).choose)
    steps.read(torch.tensor(prompts_of(5, 5)))
    steps.step()
    no_waiting()
    steps.step()
    steps.step()


@pytest.mark.gpu
@on_gpu
@torch.no_grad()
def test_gpu_a_replayed_step_of_the_translator_never_waits(no_waiting):
    static = StaticAdvance(translator("cuda"), 3, 257)
    advance = static(*read(BATCHES[0], "cuda"), 13)
    rows = torch.arange(3, device="cuda")
    advance(torch.full((3,), 256, device="cuda"), rows, [0, 1, 2])
    rows = rows.repeat_interleave(3)
    advance(rows, rows, [0, 1, 2])
    rows = torch.arange(9, device="cuda")
    no_waiting()
    advance(rows, rows, [0, 1, 2])


@pytest.mark.gpu
@on_gpu
def test_gpu_bf16_texts_and_prompts_with_spaces():
    """Through `complete`, as users call it: equal seeds, equal texts, and no padding among them."""
    kernels.install(torch.device("cuda"))
    model = gpt(device="cuda").bfloat16()
    config = SampleFlags(max_new_tokens=30, num_samples=3)
    texts = text.complete(model, WORDS, ["to be ", "or", ""], config)
    assert texts == text.complete(model, WORDS, ["to be ", "or", ""], config)
    assert len(set(texts)) == 9

"""Writing with GPT and Llama, translating with the encoder-decoder, beside Hugging Face's generate.

Two times are measured: that of the prefill, which reads the prompt at once, and that of decoding,
token by token. The time of decoding is what `count` more tokens take. At batch 1 memory limits it,
because every weight is read for every token: so on a CPU the bare products of all matrices with one
row are measured beside it, on a GPU how fast its memory is copied.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bpe import Tokenizer
from data.text import open_corpus
from data.tokens import END_OF_TEXT
from decoding import generate
from engine.checkpoint import load_model
from engine.cpu import lay_out_for_decoding
from engine.graphs import StaticAdvance, TextSteps, heads_and_width
from engine.hub.peers import hugging_face_gpt2, hugging_face_llama, hugging_face_marian, peer
from engine.presets import PRESETS
from lab.turns import BenchConfig, peer_turns, print_table, take_turns, time_copies
from model import GPT, GPTConfig
from models.llama import Llama, LlamaConfig
from seq2seq import Seq2Seq, Seq2SeqConfig
from tasks import translation
from tasks.text import Pick, SampleFlags
from tasks.translation import eval_pairs, pad, start_and_end, translate_ids

GENERATE = "Hugging Face generate"
# Every id below 256 is a byte, so that a model of GPT-2's size can be asked for words.
BYTES = Tokenizer({bytes([i]): i for i in range(256)}, "(?s:.)", {END_OF_TEXT: 50256})


def bench_sample(config: BenchConfig, device: torch.device) -> list[dict]:
    """GPT-2 124M; on a GPU in bf16, with 1 and with 64 rows."""
    if config.small:
        sizes = GPTConfig(50257, 64, 2, 2, 32)
        return bench_decoding(config, device, sizes, config.dtype or "fp32", [1, 2])
    if device.type != "cuda":
        dtypes = [config.dtype] if config.dtype else ["fp32", "bf16"]
        return [r for d in dtypes for r in bench_decoding(config, device, GPTConfig(), d, [1])]
    return bench_decoding(config, device, GPTConfig(), config.dtype or "bf16", [1, 64])


def bench_llama(config: BenchConfig, device: torch.device) -> list[dict]:
    """A model of SmolLM2-135M's sizes, likewise."""
    if config.small:
        sizes = LlamaConfig(50304, 64, 2, 4, 2, 32)
        return bench_decoding(config, device, sizes, config.dtype or "fp32", [1])
    fields = LlamaConfig.__dataclass_fields__
    sizes = LlamaConfig(**{k: v for k, v in PRESETS["smollm2-135m"].items() if k in fields})
    dtypes = ["bf16"] if device.type == "cuda" else ["fp32", "bf16"]
    dtypes = [config.dtype] if config.dtype else dtypes
    return [r for d in dtypes for r in bench_decoding(config, device, sizes, d, [1])]


@torch.no_grad()
def bench_decoding(
    config: BenchConfig,
    device: torch.device,
    sizes: GPTConfig | LlamaConfig,
    dtype: str,
    rows: list[int],
) -> list[dict]:
    cuda, results = device.type == "cuda", []
    rate = copy_rate(device) if cuda else math.inf
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    length, count = (8, 4) if config.small else (512, 256) if cuda else (128, 24)
    with device:
        is_gpt = isinstance(sizes, GPTConfig)
        ours, theirs = (GPT(sizes) if is_gpt else Llama(sizes)).eval(), None
        if transformers := peer("transformers"):
            theirs = hugging_face_gpt2(transformers, sizes) if is_gpt else None
            theirs = theirs or hugging_face_llama(transformers, ours)
            theirs = theirs.to(device, kind).eval()
        ours.to(kind)
    bare = bare_products([m.weight.detach() for m in matrices(ours)], count)
    if not cuda:
        lay_out_for_decoding(ours)
    name = f"{type(ours).__name__} {sizes.n_layer} layers, width {sizes.n_embd}, {dtype}"
    for B in rows:
        prompt = torch.randint(49152, (B, length), device=device)
        found = {"ours": lambda prompt=prompt: ours.head(ours.features(prompt)[:, -1])}
        if theirs:

            def their_prefill(prompt=prompt) -> None:
                theirs(prompt, logits_to_keep=1)

            found |= peer_turns(GENERATE, their_prefill, device)
        times = take_turns(found, config.repeats, device)
        results.append(
            print_table(f"prefill, {name}, {B} x {length} tokens", times, B * length, "tokens")
        )
        torch._dynamo.reset()  # each compiled step counts for its limit
        found = our_decoders(ours, prompt, count, captured=cuda or config.small)
        if B == 1 and not cuda:
            found["the bare products"] = bare
        if theirs:
            found |= their_decoders(theirs, prompt, count)
        times = take_turns(found, config.repeats, device)
        title = f"decoding, {name}, {B} row{'s' * (B > 1)}, behind {length} tokens, greedy"
        # On a CPU a matrix may be laid out so that nobody can ask for its size.
        least = count * bytes_read(ours, B, length + count // 2) / rate if cuda else 0.0
        results.append(
            print_table(title, times, B * count, "tokens", least, "of what memory allows")
        )
    return results


def bytes_read(model: GPT | Llama, rows: int, positions: int) -> int:
    """What a step must read at least: every weight, and the keys and values of all rows."""
    weights = sum(m.weight.nbytes for m in matrices(model))
    heads, width = heads_and_width(model.config)
    item = model.token_embedding.weight.element_size()
    return weights + 2 * model.config.n_layer * heads * width * item * rows * positions


def copy_rate(device: torch.device) -> float:
    """Bytes that a copy within the device's memory reads and writes per second."""
    copies, moved = time_copies(2**28, 9, device)
    return moved / statistics.median(copies)


def matrices(model: nn.Module) -> list[nn.Module]:
    """The modules whose weight multiplies; the token embedding is the output matrix too."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)] + [model.token_embedding]


def bare_products(weights: list[Tensor], count: int) -> Callable[[], None]:
    """A function that multiplies one row with every matrix, `count` times."""
    inputs = {w.size(1): torch.randn_like(w[:1]) for w in weights}

    def run() -> None:
        for _ in range(count):
            for w in weights:
                F.linear(inputs[w.size(1)], w)

    return run


def more(write: Callable[[int], None], count: int, device: torch.device) -> Callable[[], float]:
    """A function that returns the seconds of `count` more tokens: those of write(1 + count) minus
    those of write(1), the prefill."""

    def seconds(n: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        write(n)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return lambda: seconds(1 + count) - seconds(1)


def our_decoders(
    model: GPT, prompt: Tensor, count: int, captured: bool
) -> dict[str, Callable[[], float]]:
    """Decoding by `generate`, as sample.py does it; with `captured` also by the steps that a GPU
    captures, compiled or not, and with tokens drawn by sample.py's defaults."""
    device, rows = prompt.device, prompt.tolist()
    joined = copy.deepcopy(model)  # its projections, by the steps

    def writer(compiled: bool | None, greedy: bool = True) -> Callable[[int], None]:
        flags = SampleFlags(temperature=0) if greedy else SampleFlags()
        pick, steps = Pick(BYTES, flags, [b""] * len(rows)), None
        if compiled is not None:
            size = prompt.size(1) + count + 1
            steps = TextSteps(joined, len(rows), size, pick.choose, compiled)

        def write(n: int) -> None:
            for _ in generate(joined if steps else model, rows, pick, n, steps=steps):
                pass

        return write

    if not captured:
        return {"ours": more(writer(None), count, device)}
    ways = {"ours": False, "ours, compiled too": True, "ours, kernel by kernel": None}
    if device.type != "cuda" and len(rows) > 1:
        del ways["ours, compiled too"]  # seen with one row; a CPU's compiler takes long
    found = {name: more(writer(way), count, device) for name, way in ways.items()}
    return found | {"ours, drawn": more(writer(False, greedy=False), count, device)}


def their_decoders(model: nn.Module, prompt: Tensor, count: int) -> dict[str, Callable[[], float]]:
    device = prompt.device

    def writer(**cache) -> Callable[[], float]:
        def write(n: int) -> None:
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=False,
                pad_token_id=0,
                **cache,
            )

        return more(write, count, device)

    if device.type == "cuda":  # with a static cache, transformers compiles the step
        static = writer(cache_implementation="static")
        found = peer_turns(f"{GENERATE}, static", static, device)
        return found | peer_turns(GENERATE, writer(), device)
    return peer_turns(GENERATE, writer(), device)


# ---- translating ---------------------------------------------------------------------------------


@torch.no_grad()
def bench_translate(config: BenchConfig, device: torch.device) -> list[dict]:
    """Beam search with 5 beams, on the same batches for both: the test sentences of --checkpoint's
    data, or random ones with a model that never ends a sentence by itself."""
    batch_size, limit = 64, 24
    if config.checkpoint:
        model, tokenizer, checkpoint = load_model(Path(config.checkpoint), device)
        trained = checkpoint["train_config"]
        settings = translation.SampleFlags(eval=trained["data"], cache_dir=config.cache_dir)
        pairs = eval_pairs(settings, trained).pairs("test")
        ids = [tokenizer.encode(source) for source, _ in pairs]
    else:
        texts = [t for t, _ in open_corpus("stdlib", Path(config.cache_dir)).pieces("train")]
        tokenizer = Tokenizer.train(texts[:300], 6000, special_tokens=(END_OF_TEXT,))
        sizes = Seq2SeqConfig(6016, 128, 4, 4, 128, 256)
        if config.small:
            sizes, batch_size = Seq2SeqConfig(6016, 64, 2, 2, 32), 2
        elif device.type == "cuda":
            sizes = Seq2SeqConfig(vocab_size=6016)
        model = Seq2Seq(sizes).to(device).eval()
        settings = translation.SampleFlags(max_new_tokens=limit, batch_size=batch_size)
        lengths = torch.randint(5, 25, (4 * batch_size,)).tolist()
        ids = [torch.randint(6000, (n,)).tolist() for n in lengths]
    ids.sort(key=len)
    batches = [ids[i : i + batch_size] for i in range(0, len(ids), batch_size)]

    def search(static: StaticAdvance | None) -> None:
        for b in batches:
            translate_ids(model, tokenizer, b, settings, static)

    found = {"ours": lambda: search(None)}
    if device.type == "cuda":
        static = StaticAdvance(copy.deepcopy(model), settings.beam, tokenizer.vocab_size)
        found = {"ours": lambda: search(static), "ours, kernel by kernel": found["ours"]}
    if transformers := peer("transformers"):
        start, end = start_and_end(tokenizer)
        theirs = hugging_face_marian(transformers, model, start, end).to(device).eval()
        most = model.config.block_size - 1

        def their_search() -> None:
            for b in batches:
                source, keep = pad(b, end)
                theirs.generate(
                    source.to(device),
                    attention_mask=keep.long().to(device),
                    num_beams=5,
                    length_penalty=1.0,
                    max_new_tokens=min(len(b[-1]) + 50 if config.checkpoint else limit, most),
                    do_sample=False,
                )

        found |= peer_turns(GENERATE, their_search, device)
    times = take_turns(found, config.repeats, device)
    title = f"translating {len(ids):,} sentences, beam 5, batches of {batch_size}, fp32"
    return [print_table(title, times, len(ids), "sentences")]

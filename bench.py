"""Speed beside the peers that are installed, in one interleaved run.

    python bench.py                    everything, about five minutes on two cores
    python bench.py --only train       bpe, encode, optim, train, sample, bert, seq2seq or translate

All contestants are warmed up, then they take turns, so that what else the machine does hits all of
them. The table shows median time, spread (the middle half) and the ratio to the last contestant.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import cli
import optim
from bert import BERT, BERTConfig
from bpe import Tokenizer
from data.download import GPT2_MERGES, GPT2_VOCABULARY, SHAKESPEARE, fetch
from data.pairs import pad, start_and_end
from data.text import open_corpus
from data.tokens import END_OF_TEXT
from execution import compiled
from model import GPT, GPTConfig
from peers import hugging_face_encoder, hugging_face_gpt2, hugging_face_marian, peer
from plan import least_seconds
from processes import Processes, pick_device
from sample import Pick, SampleConfig, generate, lay_out_for_decoding, load_model
from seq2seq import Seq2Seq, Seq2SeqConfig
from train import gradients
from translate import TranslateConfig, eval_pairs, translate_ids


@dataclass
class BenchConfig:
    only: str = ""  # one of bpe, encode, optim, train, sample, bert, seq2seq, translate; empty: all
    checkpoint: str = ""  # a trained seq2seq for translate; empty: random weights
    repeats: int = 7  # turns of each contestant
    device: str = "cpu"  # cpu, cuda or mps
    dtype: str = "fp32"  # fp32 or bf16 (autocast in training, bf16 weights in sampling)
    compile: bool = False  # torch.compile ours and the peer's model for the training step
    out: str = "out/bench.json"  # where the figures go, beside the table
    cache_dir: str = "data/cache"  # GPT-2's vocabulary is taken from here or downloaded


def take_turns(
    contestants: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """{name: seconds of each turn}; one untimed round first."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def show(title: str, times: dict[str, list[float]], work: float, unit: str, least=0.0) -> dict:
    """Prints the table; `work` is how many `unit` one turn does, and `least` how long that takes at
    the GPU's peak rate, the share of which is the MFU. Returns the figures."""
    print(f"\n{title}")
    names = list(times)
    base = statistics.median(times[names[-1]])
    figures = {}
    for name in names:
        middle = statistics.median(times[name])
        low, _, high = statistics.quantiles(times[name], n=4)
        figures[name] = {"seconds": middle, "rate": work / middle, "ratio": base / middle}
        figures[name] |= {"mfu": least / middle} if least else {}
        print(
            f"  {name:<28}{middle:>9.3f} s  ({low:.3f} to {high:.3f}){work / middle:>14,.1f} "
            f"{unit}/s{base / middle:>8.2f} x" + f"{least / middle:>8.1%} MFU" * (least > 0)
        )
    return {"title": title, "unit": unit, "contestants": figures}


# ---- the comparisons: the last contestant is the one that ratios refer to ------------------------


def stdlib_texts(config: BenchConfig) -> list[str]:
    return [text for text, _ in open_corpus("stdlib", Path(config.cache_dir)).pieces("train")]


def bench_bpe(config: BenchConfig, device: torch.device) -> list[dict]:
    results, tokenizers = [], peer("tokenizers")
    works = [("Python source", stdlib_texts(config), 32768)]
    try:
        path = fetch(SHAKESPEARE, Path(config.cache_dir))
        works.insert(0, ("Shakespeare", [path.read_text(encoding="utf-8")], 1024))
    except ValueError as error:
        print(f"(no Shakespeare: {error})")
    for name, chosen, vocab_size in works:
        megabytes = sum(len(t.encode()) for t in chosen) / 1e6

        def ours(chosen=chosen, vocab_size=vocab_size):
            Tokenizer.train(chosen, vocab_size)

        def theirs(chosen=chosen, vocab_size=vocab_size):
            trainer = tokenizers.trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=["<|endoftext|>"],
                initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
            tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.train_from_iterator(chosen, trainer)

        contestants = {"ours (Python)": ours}
        if tokenizers:
            contestants["tokenizers (Rust)"] = theirs
        times = take_turns(contestants, min(config.repeats, 3), device)
        title = f"BPE training, {megabytes:.1f} MB of {name} to {vocab_size:,} tokens"
        results.append(show(title, times, megabytes, "MB"))
    return results


def bench_encode(config: BenchConfig, device: torch.device) -> list[dict]:
    import tiktoken

    texts = stdlib_texts(config)
    text = "".join(texts)[:4_000_000]
    ours = Tokenizer.train(texts, 32768)
    contestants = {
        "ours, Python": lambda: ours.encode_python(text),
        "ours, tiktoken's core": lambda: ours.encode(text),
    }
    try:
        cache = Path(config.cache_dir)
        gpt2 = Tokenizer.from_gpt2_files(fetch(GPT2_MERGES, cache), fetch(GPT2_VOCABULARY, cache))
    except ValueError as error:
        print(f"(no GPT-2 vocabulary to compare with: {error})")
    else:
        theirs = tiktoken.Encoding(
            "gpt2",
            pat_str=gpt2.pattern,
            mergeable_ranks=gpt2.ranks,
            special_tokens=gpt2.special_tokens,
        )
        contestants["tiktoken, gpt2"] = lambda: theirs.encode_ordinary(text)
    times = take_turns(contestants, config.repeats, device)
    return [show("encoding Python source", times, len(text.encode()) / 1e6, "MB")]


def bench_optim(config: BenchConfig, device: torch.device) -> list[dict]:
    """What reading AdamW in optim.py costs beside torch's kernel, which the loop uses."""
    shapes = [(384, 384)] * 24 + [(1536, 384), (384, 1536)] * 6 + [(8192, 384)]
    contestants = {}
    for name, make in (
        ("ours, written out", optim.AdamW),
        ("ours, Muon", optim.Muon),
        ("torch AdamW, foreach", lambda p: torch.optim.AdamW(p, foreach=True)),
        ("torch AdamW, fused", lambda p: torch.optim.AdamW(p, fused=True)),
    ):
        parameters = [nn.Parameter(torch.randn(s, device=device)) for s in shapes]
        for p in parameters:
            p.grad = torch.randn_like(p)
        contestants[name] = make(parameters).step
    work = sum(a * b for a, b in shapes) / 1e6
    times = take_turns(contestants, 3 * config.repeats, device)
    return [show("optimizer step, 13.8 million parameters", times, work, "M parameters")]


def bench_train(config: BenchConfig, device: torch.device) -> list[dict]:
    """A whole step of each: forward, loss, backward, clipping, AdamW (torch's fused for both)."""
    results = []
    for dropout in (0.0, 0.1):  # 0.1 is what Hugging Face's configuration has unless it is told
        results += bench_train_step(config, device, dropout)
    return results


def training_steps(
    ours: nn.Module,
    theirs: nn.Module | None,
    batch: dict[str, Tensor],
    their_loss: Callable[[nn.Module], Tensor],
    config: BenchConfig,
) -> dict[str, Callable[[], None]]:
    """{contestant: its step}, with the same optimizer; their_loss is the peer's on the batch."""
    device, bf16 = batch["tokens"].device, config.dtype == "bf16"
    group = Processes(0, 1, device)

    def autocast():
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)

    def step_of(model: nn.Module, backward: Callable[[nn.Module], None], fast: nn.Module):
        optimizer = optim.make_optimizer(model, "adamw", lr=1e-4)

        def step() -> None:
            backward(fast)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def their_backward(model: nn.Module) -> None:
        with autocast():
            loss = their_loss(model)
        loss.backward()

    fast = compiled(ours, [batch], autocast) if config.compile else ours
    steps = {"ours": step_of(ours, lambda m: gradients(m, [batch], group, autocast), fast)}
    if theirs:
        fast = torch.compile(theirs) if config.compile else theirs
        steps["Hugging Face"] = step_of(theirs, their_backward, fast)
    return steps


def bench_train_step(config: BenchConfig, device: torch.device, dropout: float) -> list[dict]:
    if device.type == "cuda":
        sizes, batch_size = GPTConfig(vocab_size=50304, dropout=dropout), 32
    else:
        sizes, batch_size = GPTConfig(8192, 256, 6, 6, 384, dropout=dropout), 8
    tokens = torch.randint(sizes.vocab_size, (batch_size, sizes.block_size + 1), device=device)
    batch = {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
    transformers = peer("transformers")
    theirs = hugging_face_gpt2(transformers, sizes).to(device).train() if transformers else None
    ours = GPT(sizes).to(device)
    steps = training_steps(
        ours,
        theirs,
        batch,
        lambda model: model(batch["tokens"], labels=batch["tokens"]).loss,
        config,
    )
    times = take_turns(steps, config.repeats, device)
    title = (
        f"training step, GPT {sizes.n_layer} layers, width {sizes.n_embd}, vocabulary "
        f"{sizes.vocab_size:,}, T {sizes.block_size}, batch {batch_size}, dropout {dropout}, "
        f"{config.dtype}"
    )
    work = batch_size * sizes.block_size
    least = least_seconds(ours.flops_per_token() * work, device)
    return [show(title, times, work, "tokens", least)]


def bench_bert(config: BenchConfig, device: torch.device) -> list[dict]:
    """A pretraining step, 15% of the tokens masked, pairs of sentences; base on a GPU."""
    shapes = [(128, 256), (512, 64)] if device.type == "cuda" else [(128, 16)]
    return [bench_bert_step(config, device, *shape) for shape in shapes]


def bench_bert_step(config: BenchConfig, device: torch.device, T: int, B: int) -> dict:
    sizes = BERTConfig(30528, T) if device.type == "cuda" else BERTConfig(8192, T, 4, 4, 256)
    ours = BERT(sizes).to(device)
    tokens = torch.randint(sizes.vocab_size, (B, T), device=device)
    segments = (torch.arange(T, device=device) > T // 2).long().repeat(B, 1)
    positions = torch.randperm(B * T, device=device)[: round(0.15 * B * T)]
    targets = torch.randint(sizes.vocab_size, positions.shape, device=device)
    follows = torch.randint(2, (B,), device=device)
    batch = {"tokens": tokens, "segments": segments, "nsp_targets": follows}
    batch |= {"mlm_positions": positions, "mlm_targets": targets}
    labels = torch.full_like(tokens, -100)
    labels.view(-1)[positions] = targets

    def their_loss(model: nn.Module) -> Tensor:
        inputs = {"input_ids": tokens, "token_type_ids": segments}
        return model(**inputs, labels=labels, next_sentence_label=follows).loss

    transformers = peer("transformers")
    theirs = hugging_face_encoder(transformers, ours).to(device).train() if transformers else None
    steps = training_steps(ours, theirs, batch, their_loss, config)
    times = take_turns(steps, config.repeats, device)
    title = (
        f"pretraining step, BERT {sizes.n_layer} layers, width {sizes.n_embd}, vocabulary "
        f"{sizes.vocab_size:,}, T {T}, batch {B}, dropout {sizes.dropout}, {config.dtype}"
    )
    least = least_seconds(ours.flops_per_token() * B * T, device)
    return show(title, times, B * T, "tokens", least)


def bench_seq2seq(config: BenchConfig, device: torch.device) -> list[dict]:
    """A training step of transformer-tiny (base on a GPU), label smoothing and padding included."""
    if device.type == "cuda":
        sizes, (B, S) = Seq2SeqConfig(vocab_size=37056), (768, 32)
    else:
        sizes, (B, S) = Seq2SeqConfig(6016, 128, 4, 4, 128, 256, dropout=0.3), (240, 17)
    ours = Seq2Seq(sizes).to(device)
    source, target = torch.randint(sizes.vocab_size - 1, (2, B, S), device=device)
    keep = torch.arange(S, device=device) < torch.randint(S - 3, S + 1, (B, 1), device=device)
    batch = {"source": source, "tokens": target, "targets": target, "source_keep": keep}

    def their_loss(model: nn.Module) -> Tensor:
        inputs = {"input_ids": source, "attention_mask": keep.long(), "decoder_input_ids": target}
        logits = model(**inputs).logits.flatten(0, 1).float()
        return F.cross_entropy(logits, target.flatten(), label_smoothing=sizes.label_smoothing)

    transformers = peer("transformers")
    theirs = None
    if transformers:
        theirs = hugging_face_marian(transformers, ours, start=0, end=0).to(device).train()
    steps = training_steps(ours, theirs, batch, their_loss, config)
    times = take_turns(steps, config.repeats, device)
    title = (
        f"training step, encoder-decoder {sizes.n_layer} + {sizes.n_layer} layers, width "
        f"{sizes.n_embd}, vocabulary {sizes.vocab_size:,}, {B} pairs of {S} tokens, dropout "
        f"{sizes.dropout}, {config.dtype}"
    )
    return [show(title, times, B * S, "target tokens")]


@torch.no_grad()
def bench_translate(config: BenchConfig, device: torch.device) -> list[dict]:
    """Beam search of 5, the same batches for both: the test sentences of --checkpoint, or random
    ones and a model that never ends of itself."""
    batch_size, limit = 64, 24
    if config.checkpoint:
        model, tokenizer, checkpoint = load_model(Path(config.checkpoint), device)
        trained = checkpoint["train_config"]
        settings = TranslateConfig(eval=trained["data"], cache_dir=config.cache_dir)
        pairs = eval_pairs(settings, trained).pairs("test")
        ids = [tokenizer.encode(source) for source, _ in pairs]
    else:
        tokenizer = Tokenizer.train(stdlib_texts(config), 6000, special_tokens=(END_OF_TEXT,))
        model = Seq2Seq(Seq2SeqConfig(6016, 128, 4, 4, 128, 256)).to(device).eval()
        settings = TranslateConfig(max_new_tokens=limit, batch_size=batch_size)
        lengths = torch.randint(5, 25, (4 * batch_size,)).tolist()
        ids = [torch.randint(6000, (n,)).tolist() for n in lengths]
    ids.sort(key=len)
    batches = [ids[i : i + batch_size] for i in range(0, len(ids), batch_size)]

    def our_search() -> list[list[int]]:
        return [t for b in batches for t in translate_ids(model, tokenizer, b, settings)]

    contestants = {"ours": our_search}
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

        contestants["Hugging Face generate"] = their_search
    times = take_turns(contestants, config.repeats, device)
    title = f"translating {len(ids):,} sentences, beam 5, batches of {batch_size}, fp32"
    return [show(title, times, len(ids), "sentences")]


@torch.no_grad()
def bench_sample(config: BenchConfig, device: torch.device) -> list[dict]:
    """Greedy, one sequence, GPT-2's smallest size, and the bare products of its weights: the bound
    of a model whose matrices lie in memory as torch makes them, and of one laid out as ours."""
    sizes, prompt, count = GPTConfig(), torch.randint(50257, (1, 32), device=device), 32
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    ours = GPT(sizes).to(device, dtype).eval()
    if device.type == "cpu":
        lay_out_for_decoding(ours)
    tokenizer = Tokenizer({bytes([i]): i for i in range(256)}, "(?s:.)", {"<|endoftext|>": 50256})
    settings = SampleConfig(temperature=0)

    def our_sample():
        pick = Pick(tokenizer, settings, [b""])
        for _ in generate(ours, prompt.tolist(), pick, count):
            pass

    def bare_products(model: GPT) -> Callable[[], None]:
        weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
        weights.append(model.token_embedding.weight)
        inputs = {w.size(1): torch.randn(1, w.size(1), device=device, dtype=dtype) for w in weights}

        def run() -> None:
            for _ in range(count):
                for w in weights:
                    F.linear(inputs[w.size(1)], w)

        return run

    contestants = {
        "ours": our_sample,
        "bare products": bare_products(GPT(sizes).to(device, dtype)),
        "bare products, our layout": bare_products(ours),
    }
    if transformers := peer("transformers"):
        theirs = hugging_face_gpt2(transformers, sizes).to(device, dtype).eval()

        def their_sample():
            theirs.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )

        contestants["Hugging Face generate"] = their_sample
    times = take_turns(contestants, config.repeats, device)
    return [show(f"sampling, GPT-2 124M, batch 1, {config.dtype}", times, count, "tokens")]


BENCHES = {
    "bpe": bench_bpe,
    "encode": bench_encode,
    "optim": bench_optim,
    "train": bench_train,
    "sample": bench_sample,
    "bert": bench_bert,
    "seq2seq": bench_seq2seq,
    "translate": bench_translate,
}


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("Measure speed beside the peers that are installed.")
    cli.add_flags(parser, BenchConfig, "benchmark")
    config = BenchConfig(**parser.parse(sys.argv[1:] if argv is None else argv))
    if config.only and config.only not in BENCHES:
        raise ValueError(f"--only {config.only} is not known: choose {', '.join(BENCHES)}")
    if config.dtype not in ("fp32", "bf16"):
        raise ValueError(f"--dtype {config.dtype} is not known: choose fp32 or bf16")
    cli.check_ranges(config, {"repeats": (2, 1000)})
    if (path := Path(config.out)).parent.is_dir():  # which is made in the end
        cli.new_file("out", config.out, lambda p: p.read_bytes().startswith(b'{\n "torch": "'))
    device = pick_device(config.device)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads")
    keys = [config.only] if config.only else BENCHES
    results = [result for key in keys for result in BENCHES[key](config, device)]
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"torch": torch.__version__, "device": name, "results": results}
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"\nthe same as JSON: {path}")


if __name__ == "__main__":
    cli.run(main)

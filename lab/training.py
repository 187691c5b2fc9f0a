"""Training steps and evaluations beside Hugging Face's models, and of recurrent networks beside
torch.nn's.

A step is a whole training step: forward, loss, backward, clipping, AdamW (torch's fused one for
both). Tokens are random, so the loss does not fall, but no gradient is zero.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import optim
from bert import BERT, BERTConfig
from engine.hub.peers import hugging_face_encoder, hugging_face_gpt2, hugging_face_marian, peer
from engine.kernels import prefer_cudnn
from engine.plan import least_seconds
from engine.processes import Processes
from engine.setup import compiled
from engine.steps import update
from lab.turns import BenchConfig, peer_turns, print_table, take_turns, time_copies
from model import GPT, GPTConfig
from models.recurrent import GRU, LSTM, RecurrentConfig
from seq2seq import Seq2Seq, Seq2SeqConfig
from train import gradients

THEIRS = "Hugging Face"


def bench_ceilings(config: BenchConfig, device: torch.device) -> list[dict]:
    """What this device does at most: a large product, and a copy of its memory, which reads and
    writes. Every other figure is to be seen beside these two."""
    n = 256 if config.small else 8192 if device.type == "cuda" else 2048
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = torch.randn(2, n, n, device=device, dtype=kind)
    name = str(kind).removeprefix("torch.")
    times = take_turns({"one of torch's": lambda: a @ b}, 3 * config.repeats, device)
    product = print_table(f"product of {n} x {n} matrices, {name}", times, 2e-12 * n**3, "TFLOP")
    copies, moved = time_copies(16 * n * n, 3 * config.repeats, device)
    title = f"copy of {moved / 2e9:.2f} GB"
    return [product, print_table(title, {"torch's copy": copies}, moved / 1e9, "GB")]


def bench_optim(config: BenchConfig, device: torch.device) -> list[dict]:
    """The readable AdamW of optim.py beside torch's kernels; the loop uses the fused one."""
    shapes = [(384, 384)] * 24 + [(1536, 384), (384, 1536)] * 6 + [(8192, 384)]
    shapes = shapes[:2] if config.small else shapes
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
    return [print_table(f"optimizer step, {work:.2f}M parameters", times, work, "M parameters")]


# ---- a step of both ------------------------------------------------------------------------------


def autocast_of(config: BenchConfig, device: torch.device) -> Callable:
    bf16 = (config.dtype or ("bf16" if device.type == "cuda" else "fp32")) == "bf16"
    return functools.partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=bf16)


def named(autocast: Callable, device: torch.device, config: BenchConfig) -> str:
    precision = "bf16" if autocast.keywords["enabled"] else "fp32"
    return precision + ", compiled" * compiles(config, device)


def compiles(config: BenchConfig, device: torch.device) -> bool:
    return device.type == "cuda" if config.compile is None else config.compile


def training_steps(
    ours: nn.Module,
    theirs: nn.Module | None,
    batch: dict[str, Tensor],
    their_loss: Callable[[nn.Module], Tensor],
    config: BenchConfig,
    they: str = THEIRS,
) -> dict[str, Callable[[], None]]:
    """{contestant: its step}, all with the same optimizer. their_loss(model) is the peer's loss on
    the batch."""
    device = next(iter(batch.values())).device
    group, autocast = Processes(0, 1, device), autocast_of(config, device)
    # As in train.py, a batch comes from pinned memory of the host.
    here = {k: v.cpu().pin_memory() if v.is_cuda else v for k, v in batch.items()}

    def step_of(model: nn.Module, backward: Callable[[], None]) -> Callable[[], None]:
        optimizer = optim.make_optimizer(model, "adamw", lr=1e-4)

        def step() -> None:
            backward()
            update(optimizer, nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.zero_grad(set_to_none=True)

        return step

    if device.type == "cuda":
        prefer_cudnn(ours, [batch])
    fast = compiled(ours, [batch], autocast) if compiles(config, device) else ours
    our_step = step_of(ours, lambda: gradients(fast, [here], group, autocast))
    if theirs is None:
        return {"ours": our_step}
    their_model = torch.compile(theirs) if compiles(config, device) else theirs

    def their_backward() -> None:
        with autocast():
            loss = their_loss(their_model)
        loss.backward()

    their_step = step_of(theirs, their_backward)
    return {"ours": our_step, **peer_turns(they, their_step, device)}


def bench_family(
    what: str,
    ours: nn.Module,
    theirs: nn.Module | None,
    batch: dict[str, Tensor],
    their_loss: Callable[[nn.Module], Tensor],
    work: int,
    config: BenchConfig,
    flops: float = 0.0,
    they: str = THEIRS,
) -> list[dict]:
    """Compares a training step, then an evaluation, which is the loss alone. `work` is the tokens
    of a step, `flops` its floating-point operations."""
    device = next(ours.parameters()).device
    steps = training_steps(ours, theirs, batch, their_loss, config, they)
    times = take_turns(steps, config.repeats, device)
    autocast = autocast_of(config, device)
    how = named(autocast, device, config)
    least = least_seconds(flops, device)
    results = [print_table(f"training step, {what}, {how}", times, work, "tokens", least)]
    if compiles(config, device):  # an evaluation would need graphs of its own
        return results
    ours.eval()

    def our_evaluation() -> None:
        with torch.no_grad(), autocast():
            ours(**batch)

    def their_evaluation() -> None:
        with torch.no_grad(), autocast():
            their_loss(theirs.eval())

    found = {"ours": our_evaluation}
    if theirs:
        found |= peer_turns(they, their_evaluation, device)
    times = take_turns(found, config.repeats, device)
    return [*results, print_table(f"evaluation, {what}, {how}", times, work, "tokens")]


# ---- the three families --------------------------------------------------------------------------


def bench_train(config: BenchConfig, device: torch.device) -> list[dict]:
    """GPT without dropout; on a CPU also with 0.1, Hugging Face's default."""
    rates = (0.0,) if device.type == "cuda" else (0.0, 0.1)
    return [result for rate in rates for result in bench_gpt(config, device, rate)]


def bench_gpt(config: BenchConfig, device: torch.device, dropout: float) -> list[dict]:
    if config.small:
        sizes, B = GPTConfig(320, 16, 2, 2, 32, dropout=dropout), 2
    elif device.type == "cuda":
        sizes, B = GPTConfig(vocab_size=50304, dropout=dropout), 64
    else:
        sizes, B = GPTConfig(8192, 256, 6, 6, 384, dropout=dropout), 8
    tokens = torch.randint(sizes.vocab_size, (B, sizes.block_size + 1), device=device)
    batch = {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
    transformers = peer("transformers")
    theirs = hugging_face_gpt2(transformers, sizes).to(device).train() if transformers else None
    ours, work = GPT(sizes).to(device), B * sizes.block_size
    what = (
        f"GPT {sizes.n_layer} layers, width {sizes.n_embd}, vocabulary {sizes.vocab_size:,}, "
        f"T {sizes.block_size}, batch {B}, dropout {dropout}"
    )

    def their_loss(model: nn.Module) -> Tensor:
        return model(batch["tokens"], labels=batch["tokens"]).loss

    flops = ours.flops_per_token() * work
    return bench_family(what, ours, theirs, batch, their_loss, work, config, flops)


def bench_bert(config: BenchConfig, device: torch.device) -> list[dict]:
    """BERT's pretraining: 15% of the tokens masked, pairs of sentences. BERT base on a GPU."""
    shapes = [(128, 256), (512, 64)] if device.type == "cuda" else [(128, 16)]
    shapes = [(16, 4)] if config.small else shapes
    return [result for T, B in shapes for result in bench_bert_shape(config, device, T, B)]


def bench_bert_shape(config: BenchConfig, device: torch.device, T: int, B: int) -> list[dict]:
    sizes = BERTConfig(30528, T) if device.type == "cuda" else BERTConfig(8192, T, 4, 4, 256)
    sizes = BERTConfig(320, T, 2, 2, 32) if config.small else sizes
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
    what = (
        f"BERT {sizes.n_layer} layers, width {sizes.n_embd}, vocabulary {sizes.vocab_size:,}, "
        f"T {T}, batch {B}, dropout {sizes.dropout}"
    )
    flops = ours.flops_per_token() * B * T
    return bench_family(what, ours, theirs, batch, their_loss, B * T, config, flops)


def bench_seq2seq(config: BenchConfig, device: torch.device) -> list[dict]:
    """transformer-tiny, or on a GPU transformer-base with 24,576 target tokens in a step; both with
    label smoothing and padding."""
    if config.small:
        sizes, (B, S) = Seq2SeqConfig(320, 64, 2, 2, 32), (4, 8)
    elif device.type == "cuda":
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
    what = (
        f"encoder-decoder {sizes.n_layer} + {sizes.n_layer} layers, width {sizes.n_embd}, "
        f"vocabulary {sizes.vocab_size:,}, {B} pairs of {S} tokens, dropout {sizes.dropout}"
    )
    return bench_family(what, ours, theirs, batch, their_loss, B * S, config)


class TorchRecurrent(nn.Module):
    """The network of torch's own example, word_language_model in pytorch/examples, with tied
    embeddings: torch.nn's layers, dropout before, between and behind them."""

    def __init__(self, kind: str, V: int, C: int, layers: int, dropout: float):
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(V, C), nn.Dropout(dropout)
        self.layers = getattr(nn, kind)(C, C, layers, dropout=dropout)
        self.output = nn.Linear(C, V)
        self.output.weight = self.embedding.weight
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (T, B) -> log p (T, B, V)"""
        y = self.layers(self.dropout(self.embedding(tokens)))[0]
        return self.output(self.dropout(y)).log_softmax(-1)


def bench_recurrent(config: BenchConfig, device: torch.device) -> list[dict]:
    """LSTM and GRU at the sizes of torch's example."""
    V, C, L, B, T = (320, 16, 2, 4, 8) if config.small else (33_278, 200, 2, 20, 35)
    (tokens, targets), results = torch.randint(V, (2, B, T), device=device), []
    batch = {"tokens": tokens, "targets": targets}

    def their_loss(model: nn.Module) -> Tensor:
        log_p = model(tokens.t())
        return F.nll_loss(log_p.flatten(0, 1), targets.t().flatten())

    for Model in (LSTM, GRU):
        kind = Model.__name__
        ours = Model(RecurrentConfig(V, T, L, C, dropout=0.2, tied=True)).to(device)
        theirs = TorchRecurrent(kind, V, C, L, 0.2).to(device)
        what = f"{kind}, {L} layers, width {C}, vocabulary {V:,}, T {T}, batch {B}, dropout 0.2"
        flops = ours.flops_per_token() * B * T
        they = "torch's example"
        results += bench_family(what, ours, theirs, batch, their_loss, B * T, config, flops, they)
    return results

"""memory.py and plan.py: the memory planned for a step against what a step takes, as measured by
torch's profiler, which knows nothing of the ledger; on a GPU by max_memory_allocated."""

import math
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from conftest import TOY, TOY_BERT, TOY_PAIRS
from finetuning import TASKS as FINE_TASKS
from finetuning import flags as fine_flags
from finetuning import write_files
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import model
import tasks
import train
from engine import config as configs
from engine import kernels, memory, plan
from engine.evaluation import loss_name
from engine.memory import (
    FlashAttention,
    Ledger,
    full_batch_shape,
    make_batch,
    make_model,
    plan_memory,
)
from engine.processes import Processes
from model import Dropout, attend


def begin(flags: list[str], device: str = "cpu") -> train.Run:
    config, sizes, _ = configs.resolve(flags)
    config.out = "run"
    kernels.install(torch.device(device))
    return train.Run(config, sizes, None, Processes(0, 1, torch.device(device)))


def planned(run: train.Run, **changes) -> memory.Memory:
    for name, value in changes.items():
        setattr(run.config, name, value)
    return plan_memory(run.config, asdict(run.model.config), run.group.device.type, run.dtype)


def bytes_in(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def state_of(optimizer) -> list[torch.Tensor]:
    optimizers = getattr(optimizer, "optimizers", [optimizer])
    return [t for one in optimizers for state in one.state.values() for t in state.values()]


def allocated(work) -> list[int]:
    """The balance after each allocation and release of the CPU's memory while `work()` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    balance = [0]
    for event in sorted(events, key=lambda event: event.start_ns()):
        balance.append(balance[-1] + event.nbytes())
    return balance


def measured(run: train.Run) -> int:
    """The most bytes that a step of a run has, after a first one that makes the state."""
    run.train_step(0.0)
    before = bytes_in([*run.model.parameters(), *run.model.buffers(), *state_of(run.optimizer)])
    run.step = 1
    return before + max(allocated(lambda: run.train_step(0.0)))


# ---- against a real step -------------------------------------------------------------------------

# Rows of which each is as long as the plan assumes: 15 characters and an end, or running text.
PAIRS = [*TOY_PAIRS, "--pattern=char"]
BERT = [*TOY_BERT, "--nsp=false"]
WIDE = ["--n_embd=128", "--batch_size=1", "--tokens_per_step=16"]  # weights dominate
DEEP = ["--n_embd=36", "--n_layer=3", "--batch_size=13", "--tokens_per_step=208"]  # activations do
SEVERAL = ["--n_embd=36", "--batch_size=13", "--tokens_per_step=624"]  # micro-batches
FP32, BF16 = ["--dtype=fp32"], ["--dtype=bf16"]


@pytest.fixture(autouse=True)
def one_thread():
    """Kernels that share their work among threads have copies for them, which no plan knows of."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def even_pairs(toy) -> Path:
    """The toy folder, in which all targets are of 15 characters and sources of up to so many."""
    numbers = [(n, m) for n in range(20) for m in range(12)]
    lines = [f"{n:04} plus {m:04}{'.' * (n % 3)}\tis the sum {n + m:04}\n" for n, m in numbers]
    (toy / "toy.tsv").write_text("".join(lines), encoding="utf-8")
    return toy


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([*TOY, *DEEP, "--optimizer=adamw", *FP32], id="activations"),
        pytest.param([*TOY, *DEEP, "--optimizer=adamw", *BF16], id="activations-bf16"),
        pytest.param([*TOY, *WIDE, "--optimizer=adamw", *FP32], id="weights"),
        pytest.param([*TOY, *WIDE, "--n_layer=3", "--optimizer=muon", *BF16], id="muon-bf16"),
        pytest.param([*TOY, *SEVERAL, "--optimizer=adam", *FP32], id="accumulation"),
        pytest.param([*BERT, *DEEP, *FP32], id="bert"),
        pytest.param([*BERT, *WIDE, *BF16], id="wide-bert-bf16"),
        pytest.param([*PAIRS, *WIDE, *FP32], id="wide-seq2seq"),
        pytest.param([*PAIRS, *DEEP, *BF16], id="seq2seq-bf16"),
    ],
)
def test_a_step_takes_what_was_planned(even_pairs, flags, recompute):
    """Some kernels for CPUs have copies of their own, in bf16 most of them in fp32."""
    run = begin([*flags, "--recompute"] if recompute else flags)
    want, got = measured(run), planned(run).total
    assert got == pytest.approx(want, rel=0.04 if run.dtype == torch.float32 else 0.15)


@pytest.mark.parametrize("task", ["gpt", "bert", "masked", "seq2seq", *FINE_TASKS])
def test_the_planned_batch_is_as_large_as_any_of_the_data(even_pairs, task):
    write_files(even_pairs)
    toys = {"gpt": TOY, "bert": TOY_BERT, "masked": BERT, "seq2seq": PAIRS}
    flags = toys[task] if task in toys else fine_flags(task, "--row_length=20")
    flags = [*flags, "--class_weights"] if task == "classify" else flags
    run = begin(flags)
    B, T = full_batch_shape(run.config, run.model.config.block_size, run.micro_batch)
    assert (16 if task in toys else 20) == T and run.data.tokens_per_batch // T == B
    made = make_batch(run.config, run.model, B, T)
    found = [run.data.batch(i) for i in range(30)]
    spared = {"keep", "source_keep", "segments"}  # where there is no padding, or no second text
    assert made.keys() - spared <= {name for batch in found for name in batch} <= made.keys()
    for name, tensor in made.items():
        parts = [batch[name] for batch in found if name in batch]
        assert all(part.dtype == tensor.dtype for part in parts)
        assert all(part.dim() == tensor.dim() for part in parts)
        most = max((part.numel() for part in parts), default=tensor.numel())
        # Shorter rows make more of them; of masked places, some have one more than on average.
        spare = 1.3 if tensor.dim() == 1 else 1.0
        least = 0.2 if task == "similar" else 0.6  # its texts are short, but as many as there fit
        assert least * tensor.numel() <= most <= spare * tensor.numel() + 2 * B


@pytest.mark.parametrize("more", [["--lora_rank=3"], ["--freeze=1"]])
def test_what_does_not_learn_has_no_gradient_and_no_state(even_pairs, more):
    write_files(even_pairs)
    run = begin(fine_flags("classify", "--optimizer=adamw", *more))
    got, learns = planned(run), [p for p in run.model.parameters() if p.requires_grad]
    assert got.weights == bytes_in(run.model.parameters())
    assert got.gradients == bytes_in(learns) < got.weights / 1.5
    run.train_step(0.0)
    assert got.optimizer == bytes_in(state_of(run.optimizer))


# ---- many processes ------------------------------------------------------------------------------


def gpt(*flags: str) -> tuple:
    config, sizes, _ = configs.resolve(["--preset=gpt2", "--dry_run", *flags])
    return config, sizes


def on_gpu(config, sizes, shard: str = "", dtype=torch.bfloat16) -> memory.Memory:
    return plan_memory(config, sizes, "cuda", dtype, shard)


def test_ddp_has_buckets_as_large_as_the_gradients(tmp_path):
    """In the plan, and in torch: in an exchange, with the same weights, there is as much again."""
    small = ["--n_layer=2", "--n_embd=48", "--n_head=3", "--batch_size=2"]
    alone, two = (on_gpu(*gpt(*small, f"--world={world}")) for world in (1, 2))
    assert two.gradients == 2 * alone.gradients
    assert (two.weights, two.optimizer) == (alone.weights, alone.optimizer)

    model = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 300))
    ends = []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:

        def wrap() -> None:
            ends.append(nn.parallel.DistributedDataParallel(model))

        assert allocated(wrap)[-1] == pytest.approx(bytes_in(model.parameters()), rel=0.01)
    finally:
        dist.destroy_process_group()


def test_an_optimizer_is_divided_by_whole_parameters():
    """GPT-2's embedding is more than a 64th of it: its owner has that and nothing else."""
    config, sizes = gpt("--world=64", "--batch_size=1", "--n_layer=3")
    whole, divided = on_gpu(config, sizes), on_gpu(config, sizes, "optimizer")
    assert divided.optimizer == pytest.approx(2 * 4 * 50304 * 768, abs=100)
    assert whole.optimizer == pytest.approx(2 * whole.weights, rel=1e-5)
    assert (divided.weights, divided.gradients) == (whole.weights, whole.gradients)
    assert divided.activations <= whole.activations
    parameters = [nn.Parameter(torch.empty(n)) for n in (20, 50, 10, 20)]
    others = memory.others_parameters(parameters, 2)
    assert [p.numel() for p in others] == [20, 20, 10]


def test_a_divided_model_has_its_share_and_the_blocks_in_use():
    config, sizes = gpt("--world=4", "--batch_size=1", "--n_layer=3")
    L, C, rest = 3, 768, (50304 + 1024) * 768 + 2 * 768
    matrices, norms = 12 * C * C + 9 * C, 4 * C  # of a block
    N = L * (matrices + norms) + rest
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        whole, got = on_gpu(config, sizes, dtype=dtype), on_gpu(config, sizes, "model", dtype)
        assert got.weights == 4 * N / 4 + 4 * (rest + L * norms) + 2 * size * matrices
        assert got.gradients == 4 * N / 4 + (size + 4) * matrices
        assert got.optimizer == pytest.approx(whole.optimizer / 4)
        # No bf16 copies of the blocks wait for the backward pass. Biases' never do.
        copies = 0 if size == 4 else 2 * L * 12 * C * C
        assert whole.activations - got.activations == pytest.approx(copies, rel=0.01, abs=1e5)


def test_one_process_divides_nothing():
    config, sizes = gpt("--n_layer=1", "--batch_size=1")
    assert on_gpu(config, sizes, "model") == on_gpu(config, sizes)


def test_a_divided_model_divides_each_gradient_as_it_comes():
    few = ["--tokenizer=", "--vocab_size=64", "--block_size=16", "--batch_size=1", "--n_layer=3"]
    got = on_gpu(*gpt(*few, "--tokens_per_step=64", "--world=4"), shard="model")
    assert got.activations < 0.3 * 4 * 3 * 12 * 768 * 768


# ---- as on a GPU ---------------------------------------------------------------------------------


def test_a_block_of_gpt_keeps_on_a_gpu_what_a_count_by_hand_says():
    """In bytes of a token: both LayerNorms keep their fp32 input and two numbers; q, k and v their
    own bf16 copy of one and the same input; attention q, k, v, its output and a number for each
    head; fc its input; gelu and the last matrix what they get. And bf16 copies of the weights."""
    C, H, T, B = 96, 4, 128, 8
    sizes = [f"--n_embd={C}", f"--n_head={H}", f"--block_size={T}", f"--batch_size={B}"]
    two, three = (on_gpu(*gpt(*sizes, f"--n_layer={n}")).activations for n in (2, 3))
    token = 2 * (4 * C + 8) + 3 * 2 * C + (4 * 2 * C + 4 * H) + 2 * C + 2 * 2 * 4 * C
    assert three - two == pytest.approx(B * T * token + 2 * 12 * C * C, rel=0.002)


def test_no_scores_are_kept_on_a_gpu():
    """Four times as long rows, as many tokens: a matrix of scores would be four times as large."""
    few = ["--tokenizer=", "--vocab_size=64", "--n_layer=2", "--n_embd=96", "--n_head=4"]
    long, short = (
        on_gpu(*gpt(*few, f"--block_size={T}", f"--batch_size={2048 // T}")).activations
        for T in (1024, 256)
    )
    assert long == pytest.approx(short, rel=0.02)


def kept_by(forward, *args) -> list[torch.Tensor]:
    """What autograd keeps for the backward pass."""
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(*args)
    return kept


@pytest.mark.parametrize("gpu", [False, True])
def test_on_a_gpu_dropout_keeps_bytes_and_attention_stays_in_bf16(gpu):
    x = torch.randn(13, 7, dtype=torch.bfloat16, requires_grad=True)
    q = torch.randn(2, 3, 7, 4, dtype=torch.bfloat16, requires_grad=True)
    with memory.kernels_of("cuda" if gpu else "cpu"):
        masks = [t for t in kept_by(Dropout(0.4), x) if t.shape == x.shape]
        kept = kept_by(attend, q, q, q, "causal", 0.0)
    assert [t.element_size() for t in masks] == [1 if gpu else 2]
    if gpu:
        assert [t.dtype for t in kept if t.shape == q.shape] == [torch.bfloat16] * 4
    else:  # the formula, written out in fp32: both products and the softmax keep what they need
        assert {t.dtype for t in kept if t.is_floating_point()} == {torch.float32}
        assert sum(t.numel() for t in kept) >= 3 * q.numel() + 2 * 3 * 7 * 7


def test_a_gpu_has_longer_chunks_of_logits():
    """1,024 tokens and 8,192 words: in one on a GPU, in two on a CPU."""
    flags = ["--model=seq2seq", "--vocab_size=8192", "--block_size=64", "--n_embd=48", "--n_head=3"]
    flags += ["--n_layer=1", "--batch_size=16", "--tokens_per_step=1024", "--tokenizer="]
    config, sizes, _ = configs.resolve([*flags, "--dry_run"])
    gpu, cpu = (plan_memory(config, sizes, d, torch.float32) for d in ("cuda", "cpu"))
    assert gpu.activations - cpu.activations > 0.8 * 4 * 1024 * 8192 / 2


def test_flash_attention_has_the_shapes_and_strides_of_the_real_one():
    with FakeTensorMode():
        q = torch.empty(2, 7, 3, 5).transpose(1, 2).requires_grad_()
        k, v = (torch.empty(2, 13, 3, 5).transpose(1, 2).requires_grad_() for _ in "kv")
        real, ours = F.scaled_dot_product_attention(q, k, v), FlashAttention.apply(q, k, v)
        assert (real.shape, real.stride()) == (ours.shape, ours.stride())
        ours.sum().backward()
        assert (k.grad.shape, k.grad.stride()) == (k.shape, k.stride())


def test_without_a_gpu_nothing_is_left_behind():
    run = gpt("--n_layer=1", "--recompute")  # which installs the kernels of this machine
    names = ("attention_kernel", "dropout_kernel", "cross_entropy")
    before = dict(memory.losses.CHUNK), F.layer_norm, [getattr(model, name) for name in names]
    on_gpu(*run)
    after = memory.losses.CHUNK, F.layer_norm, [getattr(model, name) for name in names]
    assert before == after and not torch.is_autocast_enabled("cpu")


# ---- the ledger ----------------------------------------------------------------------------------


def test_the_ledger_counts_each_storage_as_long_as_it_lives():
    with FakeTensorMode():
        known = torch.empty(7, 13)
        with Ledger([known], cast=[]) as ledger:
            views = [known.t(), known.view(-1), known.add_(1)]
            assert ledger.live == 0
            a = known + 1
            b = a[3:]
            views.append(b.t())
            assert ledger.live == 4 * 7 * 13
            del a
            c = b.double()  # the whole storage is held by a view of a part of it
            assert ledger.live == 4 * 7 * 13 + 8 * 4 * 13 == ledger.peak
            del b, views
            assert ledger.live == 8 * 4 * 13
            ledger.share = 0.5
            d = torch.empty(37)
            assert ledger.live == 8 * 4 * 13 + 2 * 37
            ledger.divide(c, 0.25)
            assert ledger.live == 2 * 4 * 13 + 2 * 37
            del c, d
        assert ledger.live == 0 and ledger.peak == 4 * 7 * 13 + 8 * 4 * 13


def test_the_ledger_leaves_out_copies_that_are_gathered():
    with FakeTensorMode():
        one, other = torch.empty(7, 13), torch.empty(7, 13)
        with Ledger([one, other], cast=[one]) as ledger:
            copies = [one.bfloat16(), one.t().bfloat16().t()]
            assert ledger.live == 0
            copies.append(other.bfloat16())
            assert ledger.live == 2 * 7 * 13


# ---- what is printed -----------------------------------------------------------------------------


def lines_for(*flags: str, shard: str = "") -> list[str]:
    config, sizes, _ = configs.resolve(["--dry_run", *flags])
    config.shard = shard
    return plan.describe_memory(config, sizes).splitlines()


def test_gpt2_on_64_gpus():
    """855.2M operations for each of 2^19 tokens at 989e12 a second; 497.8 MB of gradients, of which
    2 · 63 / 64 go through 8 adapters of 50 GB/s."""
    first, *parts = lines_for("--preset=gpt2", "--world=64")
    assert "each of 64 processes, cuda, bfloat16" in first and "1 micro-batch of 8 x 1,024" in first
    sizes = [float(re.search(r"([\d,.]+) GB", line)[1]) for line in parts[:5]]
    assert sizes[:3] == [0.498, 0.996, 0.996] and "half of them in DDP's buckets" in parts[1]
    assert sum(sizes[:4]) == pytest.approx(sizes[4], abs=0.003)
    h100 = next(line for line in parts if line.startswith("H100 with 80 GB: "))
    assert "fits; a step takes at least 0.0071 s of arithmetic and 0.0025 s of sending" in h100


def test_a_divided_model_sends_more_and_recomputation_takes_a_third_more():
    def seconds(*flags: str, shard: str = "") -> tuple[float, float]:
        few = ["--preset=gpt2", "--world=8", "--n_layer=4", "--batch_size=8"]
        found = re.search(
            r"([\d.]+) s of arithmetic and ([\d.]+) s", lines_for(*few, *flags, shard=shard)[-1]
        )
        return float(found[1]), float(found[2])

    arithmetic, sending = seconds()
    assert seconds("--recompute") == (pytest.approx(4 / 3 * arithmetic, rel=0.05), sending)
    # 8 micro-batches: each gathers bf16 weights twice and adds up fp32 gradients.
    assert seconds(shard="model") == (arithmetic, pytest.approx(8 * sending, rel=0.05))


def test_what_does_not_fit_has_a_remedy():
    config, _ = gpt()
    much = memory.Memory(1, 1, 1, 9)
    assert plan.remedy(config, much, 16) == "--recompute"
    config.recompute = True
    assert plan.remedy(config, much, 16) == "--batch_size 8"
    assert plan.remedy(config, much, 1) == "a smaller --block_size"
    heavy = memory.Memory(9, 9, 9, 1)
    assert plan.remedy(config, heavy, 16) == "--shard model --world 8"
    config.world = 4
    assert plan.remedy(config, heavy, 16) == "--shard model"
    config.shard = "model"
    assert plan.remedy(config, heavy, 16) == "--world 8"


def test_a_plan_for_a_cpu_names_no_gpu():
    lines = lines_for("--device=cpu", "--preset=toy", "--dtype=fp32", "--n_layer=1")
    assert "the process, cpu, float32" in lines[0] and len(lines) == 6


@pytest.mark.slow
@pytest.mark.parametrize("task", [t for t in tasks.TABLE if not tasks.counts(t)])
def test_every_task_has_a_plan(task, capsys):
    small = {"n_layer": 1, "n_embd": 48, "n_head": 3, "vocab_size": 300, "block_size": 32}
    sizes = fields(tasks.network(task).Config)
    there = {field.name for field in sizes if field.metadata.get("flag", True)}
    flags = [f"--{name}={value}" for name, value in small.items() if name in there]
    train.main([f"--model={task}", "--dry_run", *flags, "--world=2", "--tokens_per_step=8192"])
    assert "A100 with 40 GB: fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--world=2"], "--world 2 is for a plan alone: add --dry_run"),
        (["--world=0", "--dry_run"], "--world 0 is out of range: choose between 1 and 1000000"),
        (["--world=3", "--dry_run", "--preset=gpt2"], "for each of 3 processes: choose 525312"),
    ],
)
def test_refusals(flags, message):
    with pytest.raises(ValueError, match=message):
        plan.dry_run(*configs.resolve(flags)[:2])


# ---- a real GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recompute", ["--recompute=false", "--recompute=true"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "flags",
    [
        "--model=gpt --block_size=1024 --batch_size=8 --tokens_per_step=16384 --n_head=12",
        "--model=gpt --block_size=64 --batch_size=1 --tokens_per_step=64 --n_head=12 --n_layer=16",
        "--model=bert --block_size=512 --batch_size=16 --tokens_per_step=8192 --n_head=12",
        "--model=seq2seq --block_size=256 --batch_size=24 --tokens_per_step=6144 --n_head=12",
    ],
    ids=["gpt", "weights", "bert", "seq2seq"],
)
def test_gpu_needs_what_was_planned(flags, dtype, recompute):
    more = ["--device=cuda", f"--dtype={dtype}", recompute, "--dry_run", "--optimizer=adamw"]
    small = ["--n_embd=768", "--vocab_size=30522", "--n_layer=6"]
    config, sizes, _ = configs.resolve([*small, *flags.split(), *more])
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    got = plan_memory(config, sizes, "cuda", kind)

    kernels.install(torch.device("cuda"))
    before = torch.cuda.memory_allocated()
    model = make_model(config, sizes).to_empty(device="cuda")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.normal_(std=0.02)
    optimizer = train.optim.make_optimizer(model, config.optimizer, lr=1e-3, dtype=kind)
    batch_size, accumulate = configs.divide_step(config, sizes["block_size"], 1)
    shape = full_batch_shape(config, sizes["block_size"], batch_size)
    for _ in range(2):  # in the first step, the state is made
        torch.cuda.reset_peak_memory_stats()
        for _ in range(accumulate):
            batch = make_batch(config, model, *shape)
            batch = {k: torch.ones_like(v, device="cuda") for k, v in batch.items()}
            with torch.autocast("cuda", torch.bfloat16, enabled=dtype == "bf16"):
                sums = model(**batch)
            sum(sums[loss_name(k)] for k in batch if k.endswith("targets")).backward()
        nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        optimizer.step()
        optimizer.zero_grad()
    want = torch.cuda.max_memory_allocated() - before
    print(f"{flags} {dtype} {recompute}: planned {got.total:,.0f}, measured {want:,}")
    assert got.total == pytest.approx(want, rel=0.1)

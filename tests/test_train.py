"""train.py: exact resumption, invariance to batch split and processes, faults, bad input."""

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn as nn
from conftest import ROOT, TOY, TOY_BERT, TOY_PAIRS, write_texts

import sample
import tasks
import train
from bert import BERT, BERTConfig
from bpe import Tokenizer
from engine import checkpoint as checkpoints
from engine import kernels
from engine.config import divide_step, resolve
from engine.logs import read_log
from engine.processes import Processes
from engine.saving import prepare_folder
from engine.setup import compiled, recompute_blocks
from model import GPT, GPTConfig
from tasks import masked
from tasks.flags import TrainConfig

ALL_TASKS = pytest.mark.parametrize(
    "small", [TOY, TOY_PAIRS, TOY_BERT], ids=["gpt", "seq2seq", "bert"]
)
ALONE = Processes(0, 1, torch.device("cpu"))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(path)["model"]


def assert_equal(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def no_autocast():
    return torch.autocast("cpu", enabled=False)


def losses(folder: str, split: str = "train") -> list[float]:
    return [r["loss"] for r in read_log(Path(folder) / "log.jsonl") if r["split"] == split]


# ---- one run -------------------------------------------------------------------------------------


def test_a_run_shows_its_plan_learns_and_leaves_what_it_promised(toy, capsys, curves):
    train.main([*TOY, "--steps=60", "--eval_interval=30", "--lr=0.01"])
    out = capsys.readouterr().out
    for promised in (
        "training  ",
        "tokenizer  ",
        "parameters",
        "128 tokens = 64 in a micro-batch x 2",
    ):
        assert promised in out
    assert "evaluation and checkpoint after step 30" in out
    assert "python sample.py --checkpoint" in out and "tokens/s" in out
    assert {p.name for p in Path("out/gpt").iterdir()} == {
        "latest.pt",
        "previous.pt",
        "best.pt",
        "log.jsonl",
        "curves.png",
        "config.json",
    }
    got = losses("out/gpt")
    assert len(got) == 60 and got[0] == pytest.approx(math.log(320), abs=0.3)  # 300, padded
    assert got[-1] < 0.6 * got[0]
    record = read_log(Path("out/gpt/log.jsonl"))[0]
    assert {"step", "split", "loss", "lr", "grad_norm", "tokens_per_s", "skipped"} <= set(record)
    evaluations = [r for r in read_log(Path("out/gpt/log.jsonl")) if r["split"] == "validation"]
    assert [r["step"] for r in evaluations] == [30, 60]
    assert evaluations[-1]["bits_per_byte"] < evaluations[0]["bits_per_byte"]
    settings = json.loads(Path("out/gpt/config.json").read_text(encoding="utf-8"))
    assert settings["n_embd"] == 24 and settings["lr"] == 0.01


@pytest.mark.slow
@ALL_TASKS
@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adam"])
def test_four_steps_are_two_and_two_bit_for_bit(toy_pairs, capsys, optimizer, small):
    """Partial resumption (no optimizer state, data from the start) goes unnoticed for days."""
    flags = [*small, "--steps=4", "--dropout=0.2", f"--optimizer={optimizer}"]
    train.main([*flags, "--out=whole"])
    train.main([*flags, "--out=parts", "--stop_after=2"])
    assert "python train.py --resume --out parts" in capsys.readouterr().out
    train.main(["--resume", "--out=parts"])
    one, two = (checkpoints.load(Path(f"{name}/latest.pt")) for name in ("whole", "parts"))
    assert_equal(one["model"], two["model"])
    assert one["best"] == two["best"] and two["step"] == 4
    for a, b in zip(flatten(one["optimizer"]), flatten(two["optimizer"]), strict=True):
        assert torch.equal(a, b)
    assert losses("whole") == losses("parts")
    assert losses("whole", "validation") == losses("parts", "validation")


def flatten(value) -> list[torch.Tensor]:
    if isinstance(value, dict):
        return [t for v in value.values() for t in flatten(v)]
    return [value] if isinstance(value, torch.Tensor) else []


@pytest.mark.slow
def test_resuming_across_an_epoch_and_off_the_log_interval(toy):
    flags = [*TOY, "--steps=90", "--eval_interval=100", "--log_interval=7", "--block_size=64"]
    flags += ["--tokens_per_step=512"]
    train.main([*flags, "--out=whole"])
    train.main([*flags, "--out=parts", "--stop_after=23"])
    train.main(["--resume", "--out=parts", "--stop_after=34"])
    train.main(["--resume", "--out=parts"])
    assert_equal(weights(Path("whole/latest.pt")), weights(Path("parts/latest.pt")))
    assert losses("whole") == losses("parts")


def test_log_of_a_resumed_run_drops_what_lies_behind_its_checkpoint(toy):
    train.main([*TOY, "--steps=4", "--stop_after=2"])
    with Path("out/gpt/log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "split": "train", "loss": 99.0}\n{"step": 4, "spl')
    train.main(["--resume"])
    steps = [r["step"] for r in read_log(Path("out/gpt/log.jsonl")) if r["split"] == "train"]
    assert steps == [1, 2, 3, 4] and 99.0 not in losses("out/gpt")


def test_a_run_without_an_input_to_show_ends_all_the_same(toy, capsys, monkeypatch):
    """No sentence of a text may fit into the model; asking for the first one was an IndexError."""
    monkeypatch.setattr(masked.Data, "describe", lambda self: self.prompts.clear() or "nothing")
    train.main([*TOY_BERT, "--steps=2"])
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("go on with: python sample.py --checkpoint") and "--prompt" not in said


def test_interrupt_saves_and_says_how_to_go_on(toy, capsys, monkeypatch):
    real, before = train.Run.train_step, signal.getsignal(signal.SIGINT)

    def interrupted(self, *args):
        if self.step == 3:
            signal.raise_signal(signal.SIGINT)
        return real(self, *args)

    monkeypatch.setattr(train.Run, "train_step", interrupted)
    train.main([*TOY, "--steps=8", "--eval_interval=100", "--out=parts"])
    out = capsys.readouterr().out
    assert "stopped after step 4 and saved; go on with: python train.py --resume --out parts" in out
    monkeypatch.setattr(train.Run, "train_step", real)
    train.main(["--resume", "--out=parts"])
    train.main([*TOY, "--steps=8", "--eval_interval=100", "--out=whole"])
    assert_equal(weights(Path("whole/latest.pt")), weights(Path("parts/latest.pt")))
    assert signal.getsignal(signal.SIGINT) is before  # a shell may have it ignored


def test_a_checkpoint_keeps_the_flag_and_a_resumed_run_notes_other_micro_batches(toy, capsys):
    """Eight processes shrank --batch_size to their share, and a run resumed by one kept that."""
    train.main([*TOY, "--steps=4", "--stop_after=2", "--batch_size=100"])
    saved = checkpoints.load(Path("out/gpt/latest.pt"))
    assert saved["train_config"]["batch_size"] == 100 and saved["micro_batch"] == 128 // 16
    capsys.readouterr()
    train.main(["--resume", "--stop_after=1"])
    assert "micro-batches" not in capsys.readouterr().out
    train.main(["--resume", "--batch_size=3"])
    said = capsys.readouterr().out
    assert "note: micro-batches have 2 sequences now, 8 before: with dropout" in said
    saved = checkpoints.load(Path("out/gpt/latest.pt"))
    assert saved["train_config"]["batch_size"] == 3 and saved["micro_batch"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("before", [["--steps=4"], ["--steps=8", "--stop_after=4"]])
def test_a_resumed_run_goes_on_to_more_steps(toy, capsys, before):
    """Finished or not: the rates from there on are those of a run of that length."""
    flags = [*TOY, "--schedule=cosine", "--warmup=0", "--lr=0.01"]
    train.main([*flags, "--steps=12", "--out=long"])
    train.main([*flags, *before, "--out=run"])
    capsys.readouterr()
    train.main(["--resume", "--out=run", "--steps=12"])
    said = capsys.readouterr().out
    assert f"--steps 12 instead of {before[0][8:]}: the cosine schedule is drawn anew" in said
    assert "the next step has the rate 7.50e-03, not" in said and "step 12/12" in said
    records = [read_log(Path(name) / "log.jsonl") for name in ("run", "long")]
    rates = [[r["lr"] for r in some if r["split"] == "train"] for some in records]
    assert len(rates[0]) == 12 and rates[0][4:] == rates[1][4:]
    with pytest.raises(ValueError, match=r"--steps 7 are no more than the 12 that .* has done"):
        train.main(["--resume", "--out=run", "--steps=7"])


def test_recompute_changes_memory_and_no_number(toy):
    train.main([*TOY, "--steps=3", "--dropout=0.2", "--out=plain"])
    train.main([*TOY, "--steps=3", "--dropout=0.2", "--out=again", "--recompute"])
    assert_equal(weights(Path("plain/latest.pt")), weights(Path("again/latest.pt")))


def test_recompute_keeps_fewer_activations():
    def saved_bytes(recompute: bool) -> int:
        model = GPT(GPTConfig(vocab_size=37, block_size=64, n_layer=4, n_head=2, n_embd=32))
        if recompute:
            recompute_blocks(model)
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t
        ):
            model(torch.zeros(4, 64, dtype=torch.long), torch.zeros(4, 64, dtype=torch.long))
        return sum(seen.values())

    assert saved_bytes(True) < 0.4 * saved_bytes(False)


@pytest.mark.slow
def test_minutes_fixes_a_number_of_steps_that_repeats_the_run(toy, capsys):
    train.main([*TOY, "--minutes=0.03", "--dropout=0.1", "--out=timed", "--eval_interval=1000"])
    steps = checkpoints.load(Path("timed/latest.pt"))["step"]
    assert f"--steps {steps} fit into the time" in capsys.readouterr().out
    train.main([*TOY, f"--steps={steps}", "--dropout=0.1", "--out=again", "--eval_interval=1000"])
    assert_equal(weights(Path("timed/latest.pt")), weights(Path("again/latest.pt")))
    with pytest.raises(ValueError, match="--minutes 1e-06 is too short"):
        train.main([*TOY, "--minutes=1e-6", "--out=short"])


def test_init_takes_weights_sizes_and_tokenizer(toy):
    train.main([*TOY, "--steps=2"])
    other = ["--init=out/gpt/best.pt", "--data=toy.txt", "--batch_size=4", "--tokens_per_step=64"]
    train.main([*other, "--steps=1", "--lr=1e-30", "--out=second", "--device=cpu"])
    one, two = (checkpoints.load(Path(p)) for p in ("out/gpt/best.pt", "second/latest.pt"))
    assert one["tokenizer"] == two["tokenizer"] and one["model_config"] == two["model_config"]
    assert_equal(one["model"], two["model"])
    with pytest.raises(ValueError, match=r"--n_embd 32 differs from the 24 of out.gpt.best\.pt"):
        train.main([*other, "--n_embd=32"])
    with pytest.raises(ValueError, match="--pattern has no effect"):
        train.main([*other, "--pattern=char"])
    with pytest.raises(
        ValueError, match=r"--model seq2seq cannot begin from the gpt of out.gpt.best\.pt"
    ):
        train.main([*other, "--model=seq2seq"])


def test_runs_without_out_get_folders_of_their_own(toy):
    for _ in range(2):
        train.main([*TOY, "--steps=1"])
    assert Path("out/gpt/latest.pt").exists() and Path("out/gpt-2/latest.pt").exists()
    assert checkpoints.newest() == Path("out/gpt-2/best.pt")


def test_bf16_trains(toy):
    train.main([*TOY, "--steps=20", "--lr=0.01", "--dtype=bf16"])
    got = losses("out/gpt")
    assert got[-1] < 0.85 * got[0]
    assert all(t.dtype == torch.float32 for t in weights(Path("out/gpt/latest.pt")).values())


def test_compile_that_fails_falls_back_to_eager_in_one_line(toy, capsys, monkeypatch):
    def broken(model, dynamic):
        raise RuntimeError("no compiler here\nand a long story")

    monkeypatch.setattr(torch, "compile", broken)
    train.main([*TOY, "--steps=2", "--compile"])
    out = capsys.readouterr().out
    assert "torch.compile failed (RuntimeError: no compiler here): going on without it" in out
    assert "eager" in out and "long story" not in out


@pytest.mark.slow
def test_batches_of_many_lengths_compile_to_a_few_graphs(toy, monkeypatch):
    """A graph for each length, and after eight of them torch would go on without compiling."""
    random, real, graphs = Random(0), torch.compile, []
    lengths = [[random.randint(1, 12) for _ in range(random.randint(2, 30))] for _ in range(60)]
    text = "\n\n".join("\n".join("word " * n + "." for n in document) for document in lengths)
    Path("long.txt").write_text(text, encoding="utf-8")

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(
        torch, "compile", lambda model, dynamic: real(model, dynamic=dynamic, backend=backend)
    )
    kernels.install(torch.device("cuda"))
    torch._dynamo.reset()
    sizes = {"vocab_size": 320, "block_size": 16, "nsp": True}
    settings = {"data": "long.txt", "layout": "lines", "batch_size": 4, "tokens_per_step": 64}
    data, _ = masked.Data.splits(masked.Flags(**settings), sizes)
    model = BERT(BERTConfig(**sizes, n_layer=1, n_head=2, n_embd=16, dropout=0))
    first = [data.batch(i) for i in range(8)]
    fast, late = compiled(model, first, no_autocast), set()
    assert graphs and fast is not model
    for i in range(8, 80):
        known = len(graphs)
        fast(**data.batch(i))
        late |= {i} if len(graphs) > known else set()
    assert len(late) <= 1  # the first batch with padding, or without


@pytest.mark.slow
def test_compiled_weights_keep_their_names(toy, monkeypatch):
    """A prefix that compile adds once made checkpoints load as random weights, without a word."""

    class Compiled(nn.Module):
        def __init__(self, model, dynamic):
            super().__init__()
            self._orig_mod = model

        def forward(self, **batch):
            return self._orig_mod(**batch)

    monkeypatch.setattr(torch, "compile", Compiled)
    train.main([*TOY, "--steps=2", "--compile=true", "--out=compiled"])
    monkeypatch.undo()
    os.chdir(toy)
    train.main([*TOY, "--steps=2", "--no-compile", "--out=eager"])
    assert_equal(weights(Path("compiled/latest.pt")), weights(Path("eager/latest.pt")))


# ---- invariance ----------------------------------------------------------------------------------


def ragged_batches() -> list[dict[str, torch.Tensor]]:
    """Four micro-batches with very unequal numbers of targets, one with none at all."""
    random = torch.Generator().manual_seed(3)
    batches = []
    for kept in (13, 2, 0, 7):
        tokens = torch.randint(37, (3, 13), generator=random)
        targets = torch.randint(37, (3, 13), generator=random)
        targets[:, kept:] = -100
        batches.append({"tokens": tokens, "targets": targets})
    return batches


def test_accumulation_weighs_every_target_alike():
    """A mean of the micro-batches' means was wrong by tens of percent on padded batches."""
    model = GPT(GPTConfig(vocab_size=37, block_size=13, n_layer=2, n_head=2, n_embd=24))
    batches = ragged_batches()
    whole = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
    found = []
    for split in (batches, [whole]):
        model.zero_grad()
        sums, counts = train.gradients(model, split, ALONE, no_autocast)
        assert counts == {"loss": 3 * (13 + 2 + 0 + 7)}
        found.append((sums["loss"], [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_gradients_are_exchanged_once_and_the_switch_covers_forward():
    """DDP decides in forward whether backward exchanges: a switch around backward is too late."""
    seen = []

    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.in_no_sync = nn.Parameter(torch.ones(())), False

        @contextlib.contextmanager
        def no_sync(self):
            self.in_no_sync = True
            yield
            self.in_no_sync = False

        def forward(self, targets):
            seen.append(("forward", self.in_no_sync))
            self.w.register_hook(lambda g: seen.append(("backward", self.in_no_sync)))
            return {"loss": self.w * targets.sum()}

    class Two(Processes):
        def all_reduce(self, numbers, dtype=torch.float64):
            return [2 * n for n in numbers]

    batches = [{"targets": torch.tensor([1, 2])}] * 3
    train.gradients(Parallel(), batches, Two(0, 2, torch.device("cpu")), no_autocast)
    assert [in_no_sync for kind, in_no_sync in seen if kind == "forward"] == [True, True, False]
    assert ("backward", False) in seen and ("backward", True) in seen


def test_a_step_without_any_target_is_zero_and_not_nan():
    model = GPT(GPTConfig(vocab_size=37, block_size=13, n_layer=1, n_head=2, n_embd=8))
    sums, counts = train.gradients(model, [ragged_batches()[2]], ALONE, no_autocast)
    assert sums["loss"].item() == 0 and counts["loss"] == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_several_losses_are_each_divided_by_their_own_count():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 1.0]))

        def forward(self, mlm_targets, nsp_targets):
            return {
                "mlm": self.w[0] * mlm_targets.clamp(min=0).sum(),
                "nsp": self.w[1] * nsp_targets.clamp(min=0).sum(),
                "mlm_correct": torch.tensor(1.0),  # a statistic, no loss: it has no targets
            }

    model = Two()
    batch = {"mlm_targets": torch.tensor([6, -100, 3]), "nsp_targets": torch.tensor([5])}
    sums, counts = train.gradients(model, [batch, batch], ALONE, no_autocast)
    assert counts == {"mlm": 4, "nsp": 2} and sums["mlm_correct"] == 2
    assert model.w.grad.tolist() == [18 / 4, 10 / 2]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_does_not_depend_on_the_batch_size(toy, batch_size):
    config, sizes, _ = resolve([*TOY, f"--batch_size={batch_size}", "--tokens_per_step=384"])
    torch.manual_seed(0)
    _, validation = tasks.task("gpt").Data.splits(config, sizes)
    model = GPT(GPTConfig(**{**sizes, "vocab_size": 320}))
    nn.init.normal_(model.token_embedding.weight)
    report = train.evaluate(model, validation, ALONE, no_autocast)
    rows = [
        r
        for i in range(validation.n_batches)
        for r in zip(*validation.batch(i).values(), strict=True)
    ]
    with torch.no_grad():
        want = sum(model(x[None], y[None])["loss"].double() for x, y in rows)
    assert report["loss"] == pytest.approx(want.item() / (len(validation.ids) - 1), rel=1e-6)


# ---- faults --------------------------------------------------------------------------------------


def poisoned(monkeypatch, bad_steps) -> None:
    """In the bad steps one gradient and the loss are NaN."""
    real = train.gradients

    def gradients(model, *args, **kwargs):
        found = real(model, *args, **kwargs)
        if found and next(numbers) in bad_steps:
            sums, _ = found
            next(model.parameters()).grad.view(-1)[0] = math.nan
            for name in sums:
                sums[name] = sums[name] * math.nan
        return found

    numbers = iter(range(10_000))
    monkeypatch.setattr(train, "gradients", gradients)


def test_a_step_with_a_bad_gradient_is_skipped_counted_and_reported(toy, capsys, monkeypatch):
    poisoned(monkeypatch, {1})
    train.main([*TOY, "--steps=3"])
    out = capsys.readouterr().out
    assert "step 2 skipped: its gradient is not finite" in out and "loss nan" not in out
    assert "NaN" not in Path("out/gpt/log.jsonl").read_text(encoding="utf-8")
    records = [r for r in read_log(Path("out/gpt/log.jsonl")) if r["split"] == "train"]
    assert [r["skipped"] for r in records] == [0, 1, 1]
    state = checkpoints.load(Path("out/gpt/latest.pt"))
    assert state["skipped"] == 1
    assert all(t.isfinite().all() for t in state["model"].values())


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(toy, monkeypatch):
    poisoned(monkeypatch, range(4, 100))
    with pytest.raises(ValueError, match=r"5 steps in a row, up to 9,.*lower --lr"):
        train.main([*TOY, "--steps=50", "--eval_interval=4"])
    state = checkpoints.load(Path("out/gpt/latest.pt"))
    assert state["step"] in (4, 8) and all(t.isfinite().all() for t in state["model"].values())


def test_a_crash_during_a_save_keeps_the_old_checkpoint(toy, monkeypatch):
    train.main([*TOY, "--steps=2"])
    before = Path("out/gpt/latest.pt").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(Path("out/gpt/latest.pt"), {"format": 1})
    assert Path("out/gpt/latest.pt").read_bytes() == before
    assert not list(Path("out/gpt").glob("*.part"))


def test_best_is_for_use_and_not_for_resuming(toy):
    train.main([*TOY, "--steps=4", "--stop_after=2", "--eval_interval=1"])
    Path("out/gpt/best.pt").replace("out/gpt/latest.pt")
    with pytest.raises(ValueError, match=r"has no optimizer state.*--init"):
        train.main(["--resume"])


def test_the_command_of_the_run_goes_on_with_it(toy, capsys):
    flags = [*TOY, "--steps=4", "--out=a run"]
    train.main([*flags, "--stop_after=2"])
    line = capsys.readouterr().out.partition("go on with: ")[2].strip()
    assert shlex.split(line)[:3] == ["python", "train.py", "--resume"]
    train.main(shlex.split(line)[2:])
    line = capsys.readouterr().out.rpartition("go on with: ")[2].strip()
    assert shlex.split(line)[:2] == ["python", "sample.py"]
    sample.main([*shlex.split(line)[2:], "--max_new_tokens=3", "--device=cpu"])
    train.main([*TOY, "--steps=4", "--out=again", "--stop_after=2"])
    train.main([*TOY, "--steps=4", "--out=again", "--resume"])  # the first command, and --resume


def test_two_runs_that_start_at_once_get_two_folders(toy):
    assert prepare_folder(TrainConfig()) != prepare_folder(TrainConfig())


def test_a_run_that_cannot_start_leaves_no_folder(toy):
    with pytest.raises(ValueError, match="is no file or folder"):
        train.main([*TOY, "--data=nowhere.txt"])
    assert not list(Path("out").iterdir())


def test_tokenizers_must_know_where_documents_end(toy):
    Tokenizer.train(["some text"], 260, special_tokens=()).save("plain.json")
    flags = [f for f in TOY if not f.startswith("--vocab_size")]
    with pytest.raises(ValueError, match=r"plain\.json lacks the special token <\|endoftext\|>"):
        train.main([*flags, "--tokenizer=plain.json"])
    with pytest.raises(ValueError, match=r"--tokenizer nowhere\.json is no file here"):
        train.main([*flags, "--tokenizer=nowhere.json"])


def test_data_that_changed_under_a_run_is_refused(toy):
    train.main([*TOY, "--steps=4", "--stop_after=2"])
    with (toy / "toy.txt").open("a", encoding="utf-8") as file:
        file.write("one more line\n")
    with pytest.raises(ValueError, match=r"is not the one that .* was trained on"):
        train.main(["--resume"])


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """The working folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("two")
    write_texts(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main([*TOY, "--steps=2"])
    return folder


class Payload:
    def __reduce__(self):
        return os.system, ("echo owned > owned.txt",)


@pytest.mark.parametrize(
    "damage,message",
    [
        ("truncated", "is truncated, or no checkpoint"),
        ("empty", "is truncated, or no checkpoint"),
        ("text", "is truncated, or no checkpoint"),
        ("pickle", "is no checkpoint of this project"),
        ("foreign", "no format number"),
        ("newer", "has checkpoint format 2, this code reads 1"),
        ("keys", "is damaged: tokenizer_hash"),
        ("task", "holds the task 'poem'"),
        ("weights", "does not fit the model.*Missing key.*norm.weight"),
        ("shape", "does not fit the model.*size mismatch"),
        ("tokenizer", "does not have the hash"),
    ],
)
def test_checkpoints_that_cannot_be_used_are_refused(two_steps, toy, damage, message):
    path = Path("out/gpt/latest.pt")
    path.parent.mkdir(parents=True)
    path.write_bytes((two_steps / path).read_bytes())
    state = checkpoints.load(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage in ("empty", "text"):
        path.write_text("" if damage == "empty" else "no checkpoint at all", encoding="utf-8")
    elif damage == "pickle":
        torch.save({"format": 1, "model": Payload()}, path)
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        if damage == "newer":
            state["format"] = 2
        elif damage == "keys":
            del state["tokenizer_hash"]
        elif damage == "task":
            state["task"] = "poem"
        elif damage == "weights":
            del state["model"]["norm.weight"]
        elif damage == "shape":
            state["model"]["norm.weight"] = torch.zeros(7)
        elif damage == "tokenizer":
            state["tokenizer_hash"] = "0" * 64
        torch.save(state, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message) as error:
        train.main(["--resume"])
    assert "\n" not in str(error.value) and "latest.pt" in str(error.value)
    assert path.read_bytes() == before and not Path("owned.txt").exists()


# ---- the command line ----------------------------------------------------------------------------


def run_script(*arguments: str, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / arguments[0]), *arguments[1:]],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        cwd=cwd,
    )


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--n_layers=3"], "there is no flag --n_layers: here it is --n_layer"),
        (["--steps=many"], "argument --steps: invalid int value: 'many'"),
        (["--compile=perhaps"], "'perhaps' is neither true nor false"),
        (["extra"], "'extra' belongs to no flag"),
        (["--block_size=0"], "block_size=0 is too small: it must be 1 or more"),
        (["--block_size=-4"], "block_size=-4 is too small: it must be 1 or more"),
        (["--n_head=5"], "n_head=5 does not divide n_embd=24: choose 4 or 6"),
        (["--steps=0"], "--steps 0 is out of range"),
        (["--lr=nan"], "--lr nan is out of range"),
        (["--dropout=1.5"], "dropout=1.5 is out of range"),
        (["--cooldown=2"], "--cooldown 2.0 is out of range: choose between 0 and 1"),
        (["--beta1=1"], "--beta1 1.0 is out of range: choose 0 or more, but less than 1"),
        (["--tokenizer=gpt2"], "--vocab_size has no effect, because the tokenizer is that of gpt2"),
        (["--optimizer=sgd"], "--optimizer sgd is not known: choose adamw"),
        (["--schedule=step"], "--schedule step is not known"),
        (["--dtype=fp16"], "--dtype fp16 is not known"),
        (["--device=meta"], "--device meta is not known: choose auto, cpu"),
        (["--device=tpu9"], "--device tpu9 is not known"),
        (["--preset=gpt5"], "--preset gpt5 is not known"),
        (["--model=elmo"], "--model elmo is not known: choose gpt"),
        (["--pattern=words"], "--pattern words is not one of gpt2, gpt4, char"),
        (["--n_head=5"], "n_head=5 does not divide n_embd=24: choose 4 or 6"),
        (["--tokens_per_step=100"], "is no multiple of 16.*choose 96"),
        (
            ["--block_size=5000", "--tokens_per_step=20000"],
            "fewer than the 5,001 of one window: choose --block_size",
        ),
        (["--vocab_size=100"], "vocab_size"),
        (["--data="], "--data is empty"),
        (["--data=nowhere.txt"], "nowhere.txt is no file or folder here"),
        (["--resume"], "there is no run below out"),
        (["--resume", "--out=empty"], "there is no checkpoint empty.latest.pt"),
        (["--init=."], "is a folder: name a checkpoint in it"),
        (["--init=nowhere.pt"], "there is no checkpoint nowhere.pt"),
        (["--resume", "--init=a.pt"], "give one of them"),
        (["--out=toy.txt"], "cannot write to toy.txt"),
    ],
)
def test_bad_input_is_one_sentence(toy, flags, message):
    with pytest.raises((ValueError, OSError), match=message) as error:
        train.main([*TOY, *flags])
    assert "\n" not in str(error.value)
    assert not list(toy.glob("out/*/*.pt"))


@pytest.mark.slow
def test_scripts_end_without_a_traceback(toy):
    for script in ("train.py", "sample.py"):
        done = run_script(script, "--sede=3", cwd=toy)
        assert done.returncode == 1
        assert done.stderr == "error: there is no flag --sede: did you mean --seed?\n"


@pytest.mark.parametrize("name", ["config.json", "writable", "notes.txt"])
def test_a_folder_with_something_in_it_is_no_folder_for_a_run(toy, name):
    """A config.json in it was written over, and a file that was called writable removed."""
    Path("mine").mkdir()
    Path("mine", name).write_text("my own", encoding="utf-8")
    with pytest.raises(ValueError, match="mine is not empty, and a run writes nothing over"):
        train.main([*TOY, "--steps=1", "--out=mine"])
    assert [p.name for p in Path("mine").iterdir()] == [name]
    assert Path("mine", name).read_text(encoding="utf-8") == "my own"


def test_a_vocabulary_without_room_is_refused_before_the_data_is_read(toy):
    for small, least in ((TOY, 257), (TOY_BERT, 260)):
        with pytest.raises(ValueError, match=rf"vocab_size=256 .* choose at least {least}"):
            train.main([*small, "--data=nowhere.txt", "--vocab_size=256"])


def test_a_finished_run_is_not_written_over(toy):
    train.main([*TOY, "--steps=1", "--out=run"])
    before = Path("run/latest.pt").read_bytes()
    with pytest.raises(ValueError, match="run already holds a run: add --resume"):
        train.main([*TOY, "--steps=1", "--out=run"])
    with pytest.raises(ValueError, match=r"--lr 0.5 differs from the 0.007 of run.latest.pt"):
        train.main(["--resume", "--out=run", "--lr=0.5"])
    assert Path("run/latest.pt").read_bytes() == before


def test_flags_win_over_preset_and_preset_over_default(toy):
    config, sizes, _ = resolve(["--preset=gpt2-medium", "--n-head=8", "--lr=0.5", "--no-compile"])
    assert (sizes["n_layer"], sizes["n_head"], sizes["n_embd"], sizes["n_ff"]) == (24, 8, 1024, 0)
    assert (config.lr, config.optimizer, config.compile) == (0.5, "adamw", False)
    assert config.beta2 == TrainConfig().beta2 and config.preset == "gpt2-medium"


@pytest.mark.slow
def test_dry_run_prints_the_size_of_gpt3_without_allocating_it(toy, capsys):
    before = set(toy.iterdir())
    train.main(["--preset=gpt3-175b", "--dry_run"])
    out = capsys.readouterr().out
    assert "174,604,259,328" in out and "blocks.*.mlp" in out and "n_embd" not in out
    assert "weights   698.419 GB" in out and "try --shard model --world 8" in out
    assert set(toy.iterdir()) == before


@pytest.mark.slow
def test_help_names_every_flag_with_its_comment():
    done = run_script("train.py", "--help")
    assert done.returncode == 0
    for text in ("--tokens_per_step", "tokens of one optimizer step", "--n_layer", "blocks"):
        assert text in done.stdout
    flags = [f.name for f in fields(TrainConfig) if f.metadata.get("flag", True)]
    missing = [name for name in flags if f"--{name}" not in done.stdout]
    assert not missing


@pytest.mark.parametrize(
    "tokens,batch_size,world,want",
    [(2048, 16, 1, (16, 1)), (2048, 16, 2, (8, 1)), (4096, 8, 2, (8, 2)), (640, 4, 1, (1, 5))],
)
def test_a_step_is_divided_evenly(tokens, batch_size, world, want):
    config = TrainConfig(tokens_per_step=tokens, batch_size=batch_size)
    assert divide_step(config, 128, world) == want


def test_a_step_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"no multiple of 384, .* of 3 processes: choose 1152"):
        divide_step(TrainConfig(tokens_per_step=1024), 128, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@ALL_TASKS
def test_gpu_trains_compiled_in_bf16_and_resumes(toy_pairs, capsys, small):
    flags = [f for f in small if not f.startswith(("--device", "--dtype"))]
    flags += ["--dtype=auto", "--steps=20", "--device=cuda", "--lr=0.01", "--out=out/run"]
    train.main([*flags, "--stop_after=10"])
    train.main(["--resume"])
    assert "bfloat16, compiled" in capsys.readouterr().out
    flags = ["--prompt=1 plus 2 [MASK]", "--prompt=22 [MASK] 3", "--device=cuda"]
    sample.main(flags if small is TOY_BERT else [*flags, "--max_new_tokens=9"])
    lines = capsys.readouterr().out.splitlines()
    assert "--- prompt 2, sample 1" in lines if small is TOY else len(lines) == 2
    assert losses("out/run")[-1] < 0.85 * losses("out/run")[0]

"""sharding.py and parts.py: the same numbers whatever is divided, one format of checkpoints, less
memory. All runs on two processes are those of one launch (tests/sharded_runs.py)."""

import io
import json
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace

import finetuning
import pytest
import sharded_runs
import torch
from conftest import TOY, torchrun, write_pairs, write_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded_runs import DIVIDES_ON_CPU, FAMILIES, GPT_RUN, HALF
from test_train import Payload, assert_equal, flatten, losses, no_autocast

import convert
import sample
import train
from engine import checkpoint as checkpoints
from engine import parts, sharding
from engine.config import resolve
from engine.evaluation import evaluate
from engine.logs import read_log
from engine.processes import Processes
from model import GPT, GPTConfig
from tasks.flags import TrainConfig

pytestmark = pytest.mark.slow

divides = pytest.mark.skipif(not DIVIDES_ON_CPU, reason="--shard model needs torch 2.7 on CPUs")


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> SimpleNamespace:
    """.folder of all the runs, .reports {job: what each process reported}."""
    folder = tmp_path_factory.mktemp("launched")
    write_texts(folder)
    write_pairs(folder)
    finetuning.write_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main([*HALF, "--out=one-then-optimizer"])
    done = torchrun(2, script="tests/sharded_runs.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    files = [(folder / f"report-{i}.jsonl").read_text(encoding="utf-8") for i in range(2)]
    reports = zip(
        *([json.loads(line) for line in text.splitlines()] for text in files), strict=True
    )
    return SimpleNamespace(
        folder=folder, reports=dict(zip(sharded_runs.jobs(), reports, strict=True)), out=done.stdout
    )


@pytest.fixture
def runs(launched, monkeypatch) -> SimpleNamespace:
    monkeypatch.chdir(launched.folder)
    return launched


def state_of(run: str) -> dict:
    return checkpoints.load(Path(run) / "latest.pt")


def named(value, name: str = "") -> dict[str, object]:
    """{path in the nested dicts: what is not a dict}"""
    if not isinstance(value, dict):
        return {name: value}
    return {
        path: v for key, inner in value.items() for path, v in named(inner, f"{name}/{key}").items()
    }


def norms(run: str) -> list[float]:
    return [r["grad_norm"] for r in read_log(Path(run) / "log.jsonl") if r["split"] == "train"]


def assert_near(one: dict, two: dict, near: float = 1e-5) -> None:
    """Two checkpoints: the same names, numbers that are near, all else equal."""
    one, two = ({k: c[k] for k in ("model", "optimizer", "step", "task")} for c in (one, two))
    one, two = named(one), named(two)
    assert one.keys() == two.keys()
    for name, value in one.items():
        # Softmax ignores the keys' bias: its gradient is rounding noise, which Adam makes large.
        if not isinstance(value, torch.Tensor):
            assert value == two[name], name
        elif not name.endswith("k.bias"):
            assert value.dtype == two[name].dtype and two[name].device.type == "cpu"
            torch.testing.assert_close(value, two[name], atol=near, rtol=0, msg=name)


# ---- the same numbers ----------------------------------------------------------------------------


@divides
@pytest.mark.parametrize("family", FAMILIES)
def test_a_divided_model_trains_like_a_whole_one(runs, family):
    one, two = state_of(family), state_of(f"{family}-model")
    assert_near(one, two)
    assert one["step"] == 6
    for split in ("train", "validation"):
        assert losses(family, split) == pytest.approx(losses(f"{family}-model", split), abs=1e-5)
    assert losses(family)[-1] < losses(family)[0]
    assert norms(family) == pytest.approx(norms(f"{family}-model"), abs=1e-5)
    best = [
        checkpoints.load(Path(f"{name}/best.pt"))["model"] for name in (family, f"{family}-model")
    ]
    assert best[0].keys() == best[1].keys()  # adapters are merged


@pytest.mark.parametrize("family", ["gpt", "adamw"])
def test_a_divided_optimizer_trains_like_a_whole_one(runs, family):
    """Bit for bit with AdamW; Muon's batched products depend in the last bits on the batch."""
    assert_near(
        state_of(family), state_of(f"{family}-optimizer"), 0.0 if family == "adamw" else 1e-5
    )
    near = 0.0 if family == "adamw" else 1e-5
    assert losses(family) == pytest.approx(losses(f"{family}-optimizer"), abs=near, rel=0)


@divides
def test_bf16_is_what_autocast_makes_of_it(runs):
    """LayerNorms and embeddings stay in fp32, and so do sums of gradients: the first step is the
    same to the last bits of fp32. In later ones a bit of bf16 may differ here and there."""
    assert losses("bf16")[0] == pytest.approx(losses("bf16-model")[0], rel=1e-6)
    assert norms("bf16")[0] == pytest.approx(norms("bf16-model")[0], rel=1e-5)
    assert losses("bf16") == pytest.approx(losses("bf16-model"), abs=1e-3)
    assert losses("bf16") != pytest.approx(losses("gpt"), abs=1e-5)
    assert {t.dtype for t in state_of("bf16-model")["model"].values()} == {torch.float32}


def test_each_process_holds_its_part(runs):
    for name, (first, second) in runs.reports.items():
        whole = runs.reports["adamw" if name.startswith("adamw") else "gpt"][0]
        if name in ("gpt-model", "adamw-model"):
            assert first["weights"] + second["weights"] == whole["weights"]
            assert first["weights"] < 0.51 * whole["weights"]
        # minutes: the optimizer is made anew behind an evaluation.
        if name in ("gpt-model", "adamw-model", "gpt-optimizer", "adamw-optimizer", "minutes"):
            assert max(first["moments"], second["moments"]) < 0.51 * whole["moments"]
            assert first["moments"] + second["moments"] >= whole["moments"]
    assert runs.reports["adamw-optimizer"][1]["weights"] == runs.reports["adamw"][1]["weights"]


def test_alone_there_is_nothing_to_divide(toy):
    flags = [*TOY, "--steps=9", "--stop_after=2"]
    train.main([*flags, "--out=plain"])
    for shard in ("model", "optimizer"):
        train.main([*flags, f"--out={shard}", f"--shard={shard}"])
        assert_equal(state_of("plain")["model"], state_of(shard)["model"])


# ---- checkpoints ---------------------------------------------------------------------------------


def test_runs_go_on_whatever_was_divided_before(runs):
    """Also from one process to two, and through checkpoints in parts."""
    names = ["one-then-optimizer", "model-then-optimizer", "model-then-none"]
    for name in names if DIVIDES_ON_CPU else names[:1]:
        assert_near(state_of("gpt"), state_of(name))
        assert losses("gpt") == pytest.approx(losses(name), abs=1e-5)
    if DIVIDES_ON_CPU:
        assert_near(state_of("lora"), state_of("model-lora"))


@pytest.mark.parametrize("name", ["gpt-optimizer", "parts"])
def test_one_process_goes_on_with_a_divided_run(runs, name, tmp_path):
    steps = state_of(name)["step"]
    shutil.copytree(name, tmp_path / "on")
    train.main(["--resume", f"--out={tmp_path / 'on'}", "--stop_after=3", "--keep=0"])
    if steps == 6:
        shutil.copytree("gpt", tmp_path / "whole")
        train.main(["--resume", f"--out={tmp_path / 'whole'}", "--stop_after=3"])
    assert_near(state_of("gpt" if steps == 3 else tmp_path / "whole"), state_of(tmp_path / "on"))
    assert state_of(tmp_path / "on")["step"] == steps + 3


@divides
def test_parts_are_one_checkpoint_for_every_reader(runs, capsys):
    raw = torch.load("parts/latest.pt", weights_only=True)
    assert not flatten(raw["model"]) and not flatten(raw["optimizer"]) and raw["step"] == 3
    folders = sorted(p.name.partition("-0.")[0] for p in Path("parts").glob("*.parts"))
    assert folders == [  # latest.pt and previous.pt are of the same step; nothing is left of others
        "best.0000003",
        "latest.0000003",
        "latest.0000003-1.parts",
        "step-0000002.0000002",
        "step-0000003.0000003",
    ]
    whole = state_of("parts")
    assert "parts" not in whole
    assert_equal(checkpoints.load(Path("parts/previous.pt"))["model"], whole["model"])
    model, _, _ = checkpoints.load_model(Path("parts/best.pt"), torch.device("cpu"))
    assert_equal(model.state_dict(), whole["model"])  # the last evaluation was the best one
    convert.main(["average", "--run=parts"])
    mean = checkpoints.load(Path("parts/average.pt"))["model"]
    two, three = (checkpoints.load(Path(f"parts/step-000000{n}.pt"))["model"] for n in (2, 3))
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (two[name] + three[name]) / 2)
    sample.main(["--checkpoint=parts/best.pt", "--prompt=1", "--max_new_tokens=3", "--device=cpu"])
    assert capsys.readouterr().out


def test_a_full_disk_leaves_the_checkpoint_before(runs):
    for report in runs.reports["parts+full"]:
        assert "stopped after step 6, which is not saved: make room" in report["error"]
        assert "\n" not in report["error"]
    assert state_of("parts")["step"] == 3 and not list(Path("parts").glob("latest.0000004*"))


@divides
def test_parts_are_gone_with_the_file_that_they_belong_to(runs, tmp_path):
    assert not list(Path("model-then-none").glob("latest.*.parts"))  # it is one file again
    shutil.copytree("parts", tmp_path / "run")
    checkpoints.remove(tmp_path / "run" / "step-0000002.pt")
    assert not list((tmp_path / "run").glob("step-0000002*"))
    assert len(list((tmp_path / "run").glob("*.parts"))) == 4


@pytest.mark.parametrize(
    "damage,message",
    [
        ("a bit", r"__\d_0\.distcp is damaged: use an older checkpoint"),
        ("a file", "do not fit together .*No such file"),
        ("the folder", "do not fit together .*No such file"),
        ("an end", "is damaged"),
        ("a chunk", "do not fit together .*rows are missing"),
        ("a way out", r"cannot hold '\.\./other\.distcp'"),
        ("a pickle", "do not fit together .*[Ww]eights"),
        ("a name", "is damaged: its list of parts has no place for '7'"),
        ("a type", "do not fit together .*no attribute"),
        ("a key", "do not fit together .*length"),
    ],
)
def test_damaged_parts_are_refused(runs, tmp_path, damage, message):
    shutil.copytree("parts", tmp_path / "run")
    path = tmp_path / "run" / "latest.pt"
    checkpoint = torch.load(path, weights_only=True)
    folder = path.with_name(checkpoint["parts"]["folder"])
    about = checkpoint["parts"]["tensors"]["model/token_embedding.weight"]
    chunk = about["chunks"][0]
    file = folder / chunk["file"]
    if damage == "a bit":
        content = bytearray(file.read_bytes())
        content[chunk["offset"] + chunk["length"] // 2] ^= 1
        file.write_bytes(content)
    elif damage == "a file":
        file.unlink()
    elif damage == "the folder":
        shutil.rmtree(folder)
    elif damage == "an end":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "a chunk":
        about["chunks"].pop()
    elif damage == "a way out":
        chunk["file"] = "../other.distcp"
    elif damage == "a pickle":
        torch.save(Payload(), file)
        content = file.read_bytes()
        chunk |= {"offset": 0, "length": len(content), "crc32": zlib.crc32(content)}
    elif damage == "a name":
        checkpoint["parts"]["tensors"]["optimizer/7/0/step"] = about
    elif damage == "a type":
        about["dtype"] = "float31"
    elif damage == "a key":
        del chunk["length"]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=message) as error:
        checkpoints.load(path)
    assert "\n" not in str(error.value) and not Path("owned.txt").exists()


@divides
def test_parts_that_do_not_fit_the_model_are_refused(runs, tmp_path):
    shutil.copytree("parts", tmp_path / "run")
    path = tmp_path / "run" / "latest.pt"
    for name, message in (("model/norm.weight", "norm.weight"), ("model/more", "more")):
        checkpoint = torch.load(Path("parts/latest.pt"), weights_only=True)
        tensors = checkpoint["parts"]["tensors"]
        moved = tensors["model/norm.weight"]
        if name in tensors:
            moved["size"] = [3]
        else:
            tensors[name] = moved
        torch.save(checkpoint, path)
        with pytest.raises(ValueError, match=rf"does not fit the model that it names: {message}"):
            train.main(["--resume", f"--out={tmp_path / 'run'}"])


@st.composite
def divided_tensors(draw):
    """(a tensor, heights of its pieces, first and last row of a reader)"""
    heights = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
    width = draw(st.sampled_from([(), (3,), (2, 5)]))
    tensor = torch.arange(sum(heights) * torch.Size(width).numel()).view(-1, *width).float()
    first = draw(st.integers(0, sum(heights)))
    return tensor, heights, first, draw(st.integers(first, sum(heights)))


@settings(max_examples=60, deadline=None)
@given(divided_tensors())
def test_any_rows_can_be_read_from_any_pieces(tmp_path_factory, case):
    tensor, heights, first, last = case
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "of.parts").mkdir()
    chunks, content, begin = [], b"", 0
    for piece in tensor.split(heights):
        buffer = io.BytesIO()
        torch.save(piece.clone(), buffer)
        data = buffer.getvalue()
        where = {"file": "__0_0.distcp", "offset": len(content), "length": len(data)}
        sizes = {"offsets": [begin] + [0] * (piece.dim() - 1), "sizes": list(piece.shape)}
        chunks.insert(0, {**sizes, **where, "crc32": zlib.crc32(data)})
        content, begin = content + data, begin + len(piece)
    (folder / "of.parts" / "__0_0.distcp").write_bytes(content)
    about = {"dtype": "float32", "size": list(tensor.shape), "chunks": chunks}
    held = {"folder": "of.parts", "tensors": {"x": about}}
    stored = parts.Stored(folder / "latest.pt", held, "x")
    assert stored.shape == tensor.shape
    assert torch.equal(stored[first:last], tensor[first:last])
    assert torch.equal(stored[...], tensor)


# ---- the pieces ----------------------------------------------------------------------------------


@given(height=st.integers(0, 40), world=st.integers(1, 9))
def test_rows_are_divided_as_torch_divides_them(height, world):
    want = list(torch.arange(height).chunk(world)) if height else []
    want += [torch.arange(0)] * (world - len(want))
    for rank in range(world):
        mesh = SimpleNamespace(size=lambda: world, get_local_rank=lambda rank=rank: rank)
        first, count = sharding.my_rows(height, mesh)
        assert torch.equal(torch.arange(first, first + count), want[rank])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_owner_and_all_own_about_the_same(name):
    model = GPT(GPTConfig(vocab_size=37, block_size=13, n_layer=3, n_head=2, n_embd=28))
    world, owned = 3, []
    for rank in range(world):
        group = Processes(rank, world, torch.device("cpu"), cpu_group="gloo's")
        divided = sharding.make_sharded_optimizer("optimizer", group, model, name, lr=0.1)
        owned.append([p for p in model.parameters() if sharding.holds(divided, p)])
    assert sorted(id(p) for some in owned for p in some) == sorted(map(id, model.parameters()))
    hidden = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    costs = [
        sum(p.numel() * (1 if name == "muon" and id(p) in hidden else 2) for p in some)
        for some in owned
    ]
    assert max(costs) < 1.1 * min(costs)


@pytest.mark.parametrize("batches,world", [(1, 1), (5, 2), (4, 2), (1, 3), (7, 4)])
def test_all_processes_evaluate_as_many_batches(batches, world):
    """A divided model is computed by all at once: one batch less, and the others would wait."""

    class Data:
        n_batches = batches

        def batch(self, i: int) -> dict:
            return {"targets": torch.tensor([i, 100 * i])}

        def report(self, sums, counts) -> dict:
            return {**sums, "counted": counts["loss"]}

    class Group(Processes):
        def all_reduce(self, numbers, dtype=torch.float64):
            sent.append(numbers)
            return numbers

    class Model(torch.nn.Module):
        def forward(self, targets):
            calls[-1] += 1
            return {"loss": targets.sum()}

    calls, sent = [], []
    for rank in range(world):
        calls.append(0)
        evaluate(Model(), Data(), Group(rank, world, torch.device("cpu")), no_autocast)
    assert len(set(calls)) == 1
    assert [sum(n) for n in zip(*sent, strict=True)] == [101 * sum(range(batches)), 2 * batches]


@pytest.mark.parametrize(
    "flags,want",
    [
        ([], ""),
        (["--shard"], "model"),
        (["--shard", "--recompute"], "model"),
        (["--shard", "optimizer"], "optimizer"),
        (["--shard=model"], "model"),
        (["--shard="], ""),
    ],
)
def test_shard_alone_means_the_model(flags, want):
    assert resolve(flags)[0].shard == want


def test_other_things_cannot_be_divided(monkeypatch):
    with pytest.raises(ValueError, match=r"--shard data is not known: choose model, optimizer$"):
        TrainConfig(shard="data")
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)
    two = Processes(0, 2, torch.device("cpu"), cpu_group="gloo's")
    with pytest.raises(ValueError, match=r"on CPUs needs torch 2\.7.*choose --shard optimizer"):
        sharding.divide_model("model", two, torch.nn.Linear(2, 2), torch.float32)


def test_the_exchange_is_put_off_only_where_that_costs_no_memory():
    """FSDP2 would keep the whole gradient; DDP has it anyway."""
    model = torch.nn.Linear(2, 2)
    with sharding.no_sync(model) as found:
        assert found is None
    model.no_sync = lambda: pytest.MonkeyPatch.context()
    assert sharding.no_sync(model) is not None


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("shard", ["model", "optimizer"])
def test_gpus_divide_as_cpus_do(toy, shard):
    flags = [f for f in [*GPT_RUN, "--device=cuda", "--no-compile"] if f != "--device=cpu"]
    assert torchrun(2, *flags, "--out=whole").returncode == 0
    done = torchrun(2, *flags, "--out=divided", f"--shard={shard}")
    assert done.returncode == 0, done.stderr
    assert losses("whole") == pytest.approx(losses("divided"), abs=1e-4)
    assert torchrun(2, "--resume", "--out=divided", "--shard=").returncode == 0
    done = torchrun(2, *flags, "--dtype=bf16", "--compile", "--out=bf16", f"--shard={shard}")
    assert done.returncode == 0 and "going on without it" not in done.stdout, done.stderr

"""1 process with 4 micro-batches, 2 with 2 and 4 with 1 do the same: gradients, runs, evaluations,
and runs that change from one to the other. invariance_ranks.py is what the processes compute."""

import json
from pathlib import Path
from random import Random

import invariance_ranks as ranks
import pytest
import torch
from conftest import torchrun
from finetuning import FILLERS, flags, write_files
from test_train import losses, weights

import train
from engine import cpu, processes
from engine.config import resolve
from engine.evaluation import count_targets
from engine.processes import Processes

pytestmark = pytest.mark.slow

EACH_TASK = pytest.mark.parametrize("task", ranks.TASKS)
PRETRAINED = pytest.mark.parametrize("task", ranks.TOYS)
# Softmax ignores the keys' bias: its gradient is rounding noise, which Adam makes large.
NOISE = ".k.bias"


def text_files(folder: Path) -> None:
    """Sentences and pairs of very unequal lengths, so that every batch has padding."""
    random = Random(3)

    def sentence(most: int) -> str:
        return " ".join(random.choices(FILLERS, k=random.randint(1, most)))

    documents = [[sentence(9) + "." for _ in range(random.randint(2, 9))] for _ in range(57)]
    text = "\n\n".join("\n".join(document) for document in documents)
    (folder / "toy.txt").write_text(text, encoding="utf-8")
    (folder / "toy-docs.txt").write_text(text, encoding="utf-8")
    for name, number in (("toy.tsv", 220), ("valid-toy.tsv", 37)):
        pairs = [f"{sentence(7)}\t{sentence(7)}\n" for _ in range(number)]
        (folder / name).write_text("".join(pairs), encoding="utf-8")
    for start in ("", "valid-"):
        text = (folder / f"{start}toy.tsv").read_text(encoding="utf-8")
        (folder / f"{start}pairs.tsv").write_text(f"text\ttext_b\n{text}", encoding="utf-8")


@pytest.fixture(scope="module")
def computed(tmp_path_factory) -> dict[int, dict]:
    """{number of processes: what they have computed}; the tests begin in the folder of it all."""
    folder = tmp_path_factory.mktemp("invariance")
    text_files(write_files(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ranks.compute(processes.start("cpu"))  # with the kernels that the others have
        for world in (2, 4):
            done = torchrun(world, script=ranks.__file__)
            assert done.returncode == 0, done.stderr
        yield {n: torch.load(f"world-{n}.pt", weights_only=True) for n in (1, 2, 4)}


# ---- gradients -----------------------------------------------------------------------------------


def assert_same_gradients(found: dict, want: dict) -> None:
    """To a millionth of each parameter's largest; what has none but rounding noise, as a bias that
    softmax ignores, still has none."""
    assert found.keys() == want.keys()
    largest = {name: float(one.abs().max()) for name, one in want.items()}
    noise = 1e-6 * max(largest.values())
    for name, one in want.items():
        limit = 1e-6 * largest[name] if largest[name] > noise else 2 * noise
        assert float((found[name] - one).abs().max()) <= limit, name


@EACH_TASK
def test_gradients_are_those_of_all_targets_weighed_alike(computed, installed, task):
    """Σ losses / counts by plain autograd, over the four micro-batches at once."""
    cpu.use_onednn()  # as in the processes: who multiplies decides which kernel attends
    run = ranks.alone(task, batch_size=4, tokens_per_step=ranks.MICRO * 4 * ranks.T)
    run.model.train()
    batches = ranks.step_batches(run)
    counts = [count_targets(batch) for batch in batches]
    total = {name: sum(count[name] for count in counts) for name in counts[0]}
    assert not any(counts[ranks.EMPTY].values()) and all(total.values())
    loss = sum(
        value / total[name]
        for batch in batches
        for name, value in run.model(**batch).items()
        if name in total
    )
    loss.backward()
    found = computed[1]["gradients"][task]
    assert found["counts"] == total
    assert_same_gradients(found["gradients"], {n: p.grad for n, p in run.model.named_parameters()})


def test_pairs_are_padded_on_both_sides_and_smoothed(computed):
    run = ranks.alone("seq2seq", batch_size=4, tokens_per_step=ranks.MICRO * 4 * ranks.T)
    assert run.model.config.label_smoothing == 0.1
    for batch in (b for i, b in enumerate(ranks.step_batches(run)) if i != ranks.EMPTY):
        assert not batch["source_keep"].all() and (batch["targets"] == -100).any()


@pytest.mark.parametrize("world", [2, 4])
@EACH_TASK
def test_gradients_do_not_depend_on_the_number_of_processes(computed, task, world):
    one, other = (computed[n]["gradients"][task] for n in (1, world))
    assert other["counts"] == one["counts"]
    assert other["sums"] == pytest.approx(one["sums"], rel=1e-6)
    assert_same_gradients(other["gradients"], one["gradients"])


def test_one_batch_of_similar_texts_is_not_divided_between_processes(computed):
    """Each would have negatives of its own: another loss. (Above, its batches are four steps.)"""
    with pytest.raises(ValueError, match=r"would be no negatives: choose .* a single process"):
        train.Run(*resolve(flags("similar")), Processes(0, 2, torch.device("cpu")))


# ---- evaluations ---------------------------------------------------------------------------------


@EACH_TASK
def test_an_evaluation_does_not_depend_on_processes_nor_batches(computed, task):
    want, most = computed[1]["evaluations"][task][1]
    for world in computed:
        reports = computed[world]["evaluations"][task]
        assert [n for _, n in reports.values()] == sorted({n for _, n in reports.values()})[::-1]
        for batch_size, (report, _) in reports.items():
            same = want
            if task == "similar":  # its loss is among the texts of a batch
                same = computed[1]["evaluations"][task][batch_size][0]
                assert {k: report[k] for k in ("recall_at_1", "mrr")} == {
                    k: want[k] for k in ("recall_at_1", "mrr")
                }
            assert report == pytest.approx(same, rel=1e-6), (world, batch_size)
    assert most > 8


def test_there_were_less_batches_than_processes(computed):
    fewest = [min(n for _, n in found.values()) for found in computed[4]["evaluations"].values()]
    assert min(fewest) < 4


# ---- whole runs ----------------------------------------------------------------------------------


@PRETRAINED
@pytest.mark.parametrize("other", ["whole-{}-2", "whole-{}-4", "chain-{}"])
def test_twenty_steps_with_dropout_are_the_same(computed, task, other):
    """Of two and of four processes, and of a run that one process begins, two go on with and four
    end. Dropout too: each micro-batch has its own, whoever computes it."""
    one, other = f"whole-{task}-1", other.format(task)
    for split in ("train", "validation"):
        assert losses(other, split) == pytest.approx(losses(one, split), abs=1e-4)
    assert len(losses(other)) == 20 and losses(one)[-1] < losses(one)[0] - 0.5
    want, found = (weights(Path(f"{name}/latest.pt")) for name in (one, other))
    for name in (n for n in want if not n.endswith(NOISE)):
        torch.testing.assert_close(found[name], want[name], atol=1e-4, rtol=1e-4, msg=name)


def shown(task: str, *parts: tuple[str, int]) -> list[list[tuple[int, ...]]]:
    """The examples of each step, of the processes of all parts of a run."""
    steps = [[] for _ in range(20)]
    for name, world in parts:
        for rank in range(world):
            path = Path(f"seen-{name}-{task}-{world}-{rank}.json")
            for step, rows in json.loads(path.read_text(encoding="utf-8")).items():
                steps[int(step)] += map(tuple, rows)
    return steps


@PRETRAINED
def test_every_step_has_the_same_examples_however_many_processes_there_are(computed, task):
    want = [sorted(rows) for rows in shown(task, ("whole", 1))]
    assert all(want)
    chain = [("chain", 1), ("chain", 2), ("chain", 4)]
    for parts in ([("whole", 2)], [("whole", 4)], chain):
        assert [sorted(rows) for rows in shown(task, *parts)] == want


def test_every_window_comes_once_an_epoch(computed):
    """The first epoch ends within a step, and that one in the part of two processes."""
    data, T = ranks.alone("gpt", 4, ranks.MICRO * 4 * ranks.T).data, ranks.T
    rows, n = [row for step in shown("gpt", ("whole", 1)) for row in step], data.n_windows
    steps, rest = divmod(n, ranks.MICRO * 4)
    assert 7 <= steps < 13 and rest
    ids = tuple(data.ids[:].tolist())
    for epoch in (0, 1):
        begin, _ = data.permutation(epoch)
        windows = [ids[k : k + T] + ids[k + 1 : k + T + 1] for k in range(begin, begin + n * T, T)]
        found = rows[epoch * n : (epoch + 1) * n]
        assert sorted(found) == sorted(windows) if epoch == 0 else set(found) <= set(windows)
        assert len(set(found)) == len(found)


def test_every_pair_comes_once_an_epoch(computed):
    data = ranks.alone("seq2seq", 4, ranks.MICRO * 4 * ranks.T).data
    rows = [row for step in shown("seq2seq", ("whole", 1)) for row in step]
    pairs = map(data.ids_of, data.chosen)
    every = sorted((*a.tolist(), data.end, *b.tolist(), data.end) for a, b in pairs)
    assert len(rows) > 1.2 * len(every)
    assert sorted(rows[: len(every)]) == every

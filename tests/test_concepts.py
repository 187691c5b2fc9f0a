"""Each concept is a file that can be copied: in an empty folder, with nothing of ours but the files
it names, it runs and shows what its text says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# In an isolated interpreter the folder of a script is no place to import from: it is added, alone.
RUN = "import runpy, sys; sys.path.insert(0, '.'); runpy.run_path(sys.argv[1], run_name='__main__')"


def run_alone(file: str, needed: tuple[str, ...], folder: Path) -> str:
    """What the file prints in a folder that holds it and `needed`."""
    for name in (file, *needed):
        to = folder / name if name in needed else folder / Path(name).name
        to.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, to)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", RUN, Path(file).name],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses_in(said: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", said)]


def says_the_verse(said: str) -> None:
    losses = losses_in(said)
    assert losses[-1] < 0.05 * losses[0]
    assert said.endswith("What immortal hand or eye\n")


def fills_the_holes(said: str) -> None:
    losses = losses_in(said)
    assert losses[-1] < 0.1 * losses[0]
    holes, filled = said.splitlines()[-2:]
    assert holes.count("_") > 20 and filled.startswith("every position sees all others")


def fills_more_holes(said: str) -> None:
    losses = losses_in(said)
    assert losses[-1] < 0.1 * losses[0]
    holes, filled = said.splitlines()[-2:]
    assert holes.count("_") > 8
    assert filled == "every position receives from all others, those before it and those behind it"


def reverses(said: str) -> None:
    losses = losses_in(said)
    assert losses[-1] < 0.05 * losses[0]
    pairs = re.findall(r"(\d{6}) -> (\d{6})", said)
    assert len(pairs) == 3 and all(wrote == read[::-1] for read, wrote in pairs)


def draws_the_schedules(said: str) -> None:
    drawn = dict(re.findall(r"(\w+) \|(.{64})\|", said))
    assert list(drawn) == ["cosine", "linear", "inverse_sqrt", "constant"]
    assert all(line[0] == "." and line[7] == "@" for line in drawn.values())
    gradient, update = (
        [float(x) for x in re.findall(r"\d\.\d+", line)] for line in said.splitlines()[-2:]
    )
    assert max(gradient) > 100 * min(gradient) and 0.6 < min(update) < max(update) < 1.3


def shows_the_settings(said: str) -> None:
    rows = {row[0]: row[1:] for row in map(str.split, said.splitlines()[2:10])}
    assert {"mat", "moon"} < set(rows) and all(len(row) == 5 for row in rows.values())
    for column, kept in enumerate([8, 8, 8, 3, 4]):  # as it is, two temperatures, top_k, top_p
        shares = [float(row[column].strip("%")) for row in rows.values() if row[column] != "-"]
        assert len(shares) == kept and sum(shares) == pytest.approx(100, abs=0.5)


def adapts_and_merges(said: str) -> None:
    losses = losses_in(said)
    assert losses[-1] < 0.8 * losses[0]
    learning, every = re.search(r"([\d,]+) of ([\d,]+) parameters learn", said).groups()
    assert int(learning.replace(",", "")) < 0.1 * int(every.replace(",", ""))
    assert float(re.search(r"more than (\S+)$", said)[1]) < 1e-5


def counts_a_verse(said: str) -> None:
    written = dict(re.findall(r"order (\d)   '(.*)'", said))
    assert list(written) == list("12345") and all(len(text) > 60 for text in written.values())


def three_learn_the_verse(said: str) -> None:
    """The first and the last loss of each of three networks, and what they write."""
    verses = re.findall(r"(\w+) +(loss .*)\n'(.*)'", said)
    assert len(verses) == 3
    for name, losses, verse in verses:
        first, *_, last = losses_in(losses)
        assert last < (0.6 if name == "CBOW" else 0.05) * first, name
        assert name == "CBOW" or verse.endswith("What immortal hand or eye"), name


def shows_the_distance_and_says_the_verse(said: str) -> None:
    """A score depends on the distance, and not on the places."""
    rows = [re.findall(r"-?\d+\.\d+", line) for line in said.splitlines() if "key at" in line]
    assert len(rows) == 3 and all(len(row) == 5 for row in rows)
    for scores in zip(*rows, strict=True):
        values = [float(score) for score in scores]
        assert max(values) - min(values) < 2e-4
    assert len(set(rows[0])) == 5
    says_the_verse(said)


def evens_the_experts_out_and_says_the_verse(said: str) -> None:
    """With the balance loss no expert has more than half, without it one has."""
    shares = [re.findall(r"(\d+)%", line) for line in said.splitlines() if "step 80" in line]
    alone, balanced = (max(int(share) for share in row) for row in shares)
    assert balanced < 45 < 50 < alone
    losses = losses_in(said.partition("balance 0.1")[2])
    assert losses[-1] < 0.05 * losses[0]
    assert said.endswith("What immortal hand or eye\n")


def scores_places_and_distances(said: str) -> None:
    """The scores of two queries at other places: the same where only the distance counts."""
    rows = {}
    for name, scores in re.findall(r"^(\w+) +[36]0((?: +-?\d+\.\d{3}){6})$", said, re.MULTILINE):
        rows.setdefault(name, []).append([float(score) for score in scores.split()])
    assert len(rows) == 8 and all(len(both) == 2 for both in rows.values())
    assert rows.pop("none") == [[0.0] * 6] * 2
    assert rows["learned_sinusoidal"] == rows["sinusoidal"]  # before anything is learned
    assert rows["alibi"][0] == pytest.approx([-d / 4 for d in (0, 1, 2, 5, 10, 20)], abs=2e-3)
    for name, (left, right) in rows.items():
        apart = max(abs(a - b) for a, b in zip(left, right, strict=True))
        added = name in ("learned", "sinusoidal", "learned_sinusoidal")
        assert (apart > 0.5 if added else apart < 3e-3) and len(set(left)) == 6, name


def all_learn_but_those_that_never_look_back(said: str) -> None:
    """What has no attention knows one letter, and no more."""
    found = dict(re.findall(r"^(\S.*?) +loss (\d\.\d+)$", said, re.MULTILINE))
    assert len(found) == 6
    losses = {name: float(loss) for name, loss in found.items()}
    blind = losses.pop("order ffff, positions none")
    assert max(losses.values()) < 0.2 and blind > 0.8


def draws_patterns_and_says_the_verse(said: str) -> None:
    """BigBird's rows are those of Longformer and more; two layers with windows of 8 see 15."""
    rows = [line.split("   ") for line in said.splitlines()[1:13]]
    _, longformer, bigbird = (["".join(row[i].split()) for row in rows] for i in range(3))
    more = zip("".join(longformer), "".join(bigbird), strict=True)
    assert all(b == "x" for a, b in more if a == "x")
    assert (
        "".join(bigbird).count("x") > "".join(longformer).count("x") == 34 + 20
    )  # a band, a row and a column
    assert "depends on 15 letters" in said
    says_the_verse(said)


# file: (the others of ours that it needs, what its output must show)
CONCEPTS = {
    "model.py": ((), says_the_verse),
    "bert.py": (("model.py",), fills_the_holes),
    "seq2seq.py": (("model.py",), reverses),
    "optim.py": ((), draws_the_schedules),
    "decoding.py": ((), shows_the_settings),
    "finetune.py": ((), adapts_and_merges),
    "models/ngram.py": ((), counts_a_verse),
    "models/feedforward.py": (("model.py",), three_learn_the_verse),
    "models/recurrent.py": (("model.py",), three_learn_the_verse),
    "models/moe.py": (("model.py", "models/llama.py"), evens_the_experts_out_and_says_the_verse),
    "models/positions.py": (("model.py", "models/llama.py"), scores_places_and_distances),
    "models/variants.py": (
        ("model.py", "seq2seq.py", "models/llama.py", "models/positions.py"),
        all_learn_but_those_that_never_look_back,
    ),
    "models/fnet.py": (("model.py", "bert.py"), fills_more_holes),
    "models/sparse.py": (("model.py", "bert.py"), draws_patterns_and_says_the_verse),
    "models/llama.py": (("model.py",), shows_the_distance_and_says_the_verse),
}


def marked(file: str):
    quick = file in ("model.py", "optim.py", "decoding.py")
    return pytest.param(file, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize("file", map(marked, CONCEPTS))
def test_a_copy_runs_in_an_empty_folder(file, tmp_path):
    needed, check = CONCEPTS[file]
    check(run_alone(file, needed, tmp_path))

"""lab/sweep.py: runs are made once and gone on with; the arithmetic and the files of its table."""

import csv
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOY, TOY_NGRAM, TOYS, alive, write_labelled

import train
from lab import sweep
from lab.sweep import Record, SweepConfig

BASE = " ".join([*TOY, "--steps=2"])
ROWS = {"as it is": "", "wide": "--n_embd=48"}


@pytest.fixture
def trained(toy, monkeypatch) -> list[list[str]]:
    """In the toy folder; the flags of each call of train.py from here on."""
    calls = []
    real = train.main
    monkeypatch.setattr(train, "main", lambda flags: calls.append(flags) or real(flags))
    return calls


def config(**changes) -> SweepConfig:
    return SweepConfig(**{"seeds": 2, "out": "new/s.png", "runs": "new/runs", **changes})


def folders(toy: Path) -> set[str]:
    return {path.name for path in (toy / "new/runs").iterdir() if path.is_dir()}


# ---- runs ----------------------------------------------------------------------------------------


def test_rows_are_trained_with_each_seed_in_this_process(toy, trained, capsys):
    results = sweep.run_rows(ROWS, BASE, config())
    assert len(trained) == 4 and list(results) == ["as it is", "wide"]
    said = capsys.readouterr()
    assert not said.out  # what the runs print is in their files
    assert re.search(r"^4 of 4: wide, seed 1338, loss [\d.]+, 0:00 left$", said.err, re.M)
    losses = [record.final for records in results.values() for record in records]
    assert len(set(losses)) == 4
    for row, records in results.items():
        assert [record.seed for record in records] == [1337, 1338]
        for record in records:
            assert record.steps == 2 and record.tokens_per_step == 128 and not record.diverged
            assert record.threads == torch.get_num_threads() and record.steps_per_s > 0
            assert [step for step, _ in record.curve] == [1, 2] and record.early is None
        assert (records[0].parameters > 60_000) == (row == "wide")
        assert records[0].flops_per_token > 5 * records[0].parameters
    for name in folders(toy):
        kept = {path.name for path in (toy / "new/runs" / name).iterdir()}
        assert {"best.pt", "log.jsonl", "config.json", "sweep.json"} <= kept
        assert not kept & {"latest.pt", "previous.pt", "run.lock"}
        assert "validation" in (toy / f"new/runs/{name}.txt").read_text(encoding="utf-8")
    assert sweep.run_rows(ROWS, BASE, config()) == results and len(trained) == 4


def test_equal_settings_under_two_names_are_trained_once(trained):
    rows = {"one": "", "two": "--n-embd 24 --dropout=0.0 --log_interval 2 --cache_dir=data/cache"}
    results = sweep.run_rows(rows, BASE, config(seeds=1))
    (one,), (two,) = results.values()
    assert len(trained) == 1 and replace(one, flags=two.flags) == two
    assert "--n-embd" in two.flags and "--n-embd" not in one.flags


def test_what_changes_the_result_changes_the_folder_and_nothing_else_does(toy):
    def name(flags: str, **changes) -> str:
        return sweep.plan_jobs({"row": flags}, BASE, config(seeds=1, **changes))[0].folder.name

    same = ("--log_interval=7", "--keep=2", "--cache_dir=elsewhere", "--timeout=3")
    other = ("--steps=3", "--batch_size=8", "--eval_interval=1", "--dtype=bf16", "--lr=1e-4")
    assert {name(flags) for flags in same} == {name("")} == {name("", out="b.png", workers=2)}
    assert len({name(flags) for flags in ("", *other)}) == 6


def test_an_edited_text_is_trained_with_anew(toy, trained):
    sweep.run_rows({"row": ""}, BASE, config(seeds=1))
    with (toy / "toy.txt").open("a", encoding="utf-8") as file:
        file.write("one more line\n")
    sweep.run_rows({"row": ""}, BASE, config(seeds=1))
    assert len(trained) == len(folders(toy)) == 2


def test_files_of_other_flags_count_too(toy):
    write_labelled(toy)
    (toy / "valid.csv").write_text("text,label\nthe cat,good\n", encoding="utf-8")
    base = " ".join([*TOYS["classify"], "--valid=valid.csv"])
    before = sweep.plan_jobs({"row": ""}, base, config(seeds=1))[0].folder
    (toy / "valid.csv").write_text("text,label\nthe dog,good\n", encoding="utf-8")
    assert sweep.plan_jobs({"row": ""}, base, config(seeds=1))[0].folder != before


# ---- interruptions -------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_sweep_repeats_nothing(toy, trained, monkeypatch, capsys):
    logged, real = train.main, train.Run.train_step
    begun = []

    def press(flags):
        begun.append(flags)
        if len(begun) == 2:
            raise KeyboardInterrupt
        logged(flags)

    monkeypatch.setattr(train, "main", press)
    with pytest.raises(KeyboardInterrupt):
        sweep.run_rows(ROWS, BASE, config())
    assert "the same command goes on" in capsys.readouterr().err
    assert len(trained) == 1
    # Ctrl-C inside of the loop: train.py saves, and returns as if nothing had been.
    monkeypatch.setattr(train, "main", logged)

    def step(run, factor, stop=False):
        if run.step == 0:
            signal.raise_signal(signal.SIGINT)
        return real(run, factor, stop)

    monkeypatch.setattr(train.Run, "train_step", step)
    with pytest.raises(KeyboardInterrupt):
        sweep.run_rows(ROWS, BASE, config())
    assert len(trained) == 2
    monkeypatch.setattr(train.Run, "train_step", real)
    results = sweep.run_rows(ROWS, BASE, config())
    assert [flags[0] for flags in trained[2:]].count("--resume") == 1 and len(trained) == 5
    assert "1 of 4 runs are there already" in capsys.readouterr().err
    whole = sweep.run_rows(ROWS, BASE, config(runs="new/others"))
    for row, records in results.items():  # to go on is to have gone through
        assert [r.final for r in records] == pytest.approx([r.final for r in whole[row]], abs=1e-6)


def test_a_run_without_a_record_goes_on_from_its_checkpoint(toy, trained):
    job = sweep.plan_jobs({"row": ""}, BASE, config(seeds=1))[0]
    train.main([*job.flags, f"--seed={job.seed}", f"--out={job.folder}", "--stop_after=1"])
    assert (job.folder / "latest.pt").is_file() and not (job.folder / "best.pt").exists()
    record = sweep.run_rows({"row": ""}, BASE, config(seeds=1))["row"][0]
    assert trained[-1][0] == "--resume" and [step for step, _ in record.curve] == [1, 2]


def test_a_folder_without_a_sound_checkpoint_is_trained_in_anew(toy, trained):
    job = sweep.plan_jobs({"row": ""}, BASE, config(seeds=1))[0]
    job.folder.mkdir(parents=True)
    (job.folder / "latest.pt").write_bytes(b"cut")
    (job.folder / "log.jsonl").write_bytes(b"{}\n")
    (record,) = sweep.run_rows({"row": ""}, BASE, config(seeds=1))["row"]
    assert "--resume" not in trained[0] and record.best["step"] == 2


@pytest.mark.slow
def test_processes_find_what_one_finds(toy):
    one = sweep.run_rows(ROWS, BASE, config())
    before = os.environ.get("OMP_NUM_THREADS")
    two = sweep.run_rows(ROWS, BASE, config(workers=2, runs="new/two"))
    assert os.environ.get("OMP_NUM_THREADS") == before
    for row, records in two.items():
        assert [record.threads for record in records] == [1, 1]
        assert [r.final for r in records] == pytest.approx([r.final for r in one[row]], abs=1e-5)


@pytest.mark.slow
def test_an_error_in_a_process_names_the_row(toy):
    rows = {"sound": "", "empty": "--data=empty.txt"}
    (toy / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"row empty, seed 1337: .*empty"):
        sweep.run_rows(rows, BASE, config(seeds=1, workers=2))


def two_at_work(toy: Path) -> subprocess.Popen:
    """A sweep whose two processes have begun to train, for longer than any test takes."""
    (toy / "rows.txt").write_text("as it is:\nwide: --n_embd 48\n", encoding="utf-8")
    base = " ".join([*TOY, "--steps=100000", "--eval_interval=100000"])
    command = [sys.executable, "-m", "lab.sweep", "--rows=rows.txt", f"--base={base}"]
    run = subprocess.Popen(
        [*command, "--seeds=2", "--workers=2"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        encoding="utf-8",
        # In the background a shell has it ignored, and what it starts inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 120
    while len(list(toy.glob("out/sweep/*/log.jsonl"))) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    return run


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there a process is ended at once")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_processes_save_when_the_sweep_is_interrupted(toy, number):
    run = two_at_work(toy)
    try:
        run.send_signal(number)
        said = run.communicate(timeout=60)[1]
    finally:
        run.kill()
    assert run.returncode == 1 and "Traceback" not in said, said
    assert len(list(toy.glob("out/sweep/*/latest.pt"))) == 2  # and the third was not begun
    for path in toy.glob("out/sweep/*.txt"):
        assert "stopped after step" in path.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc of Linux")
def test_no_process_outlives_a_sweep_that_is_killed(toy):
    run = two_at_work(toy)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text(encoding="ascii")
    children = [int(child) for child in children.split()]
    assert len(children) >= 2
    run.kill()
    run.communicate(timeout=60)
    end = time.monotonic() + 30
    while any(map(alive, children)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(alive, children))


# ---- runs that cannot be compared ----------------------------------------------------------------


def test_a_run_that_diverges_is_a_row(toy, trained, capsys):
    wild = "--lr=1000 --optimizer=adamw --weight_decay=1000 --clip=0 --steps=60"
    results = sweep.run_rows({"as it is": "", "wild": wild}, BASE, config(seeds=1))
    assert "wild, seed 1337, diverged" in capsys.readouterr().err
    (record,) = results["wild"]
    assert record.diverged and record.final is None and record.parameters > 0
    assert "| wild | 22,560 |" in sweep.table(results) and "1 of 1 diverged" in sweep.table(results)
    assert sweep.run_rows({"wild": wild}, BASE, config(seeds=1)) == {"wild": [record]}
    assert len(trained) == 2


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--n_embed=24", "row last: there is no flag --n_embed: here it is --n_embd"),
        ("--n_embd=25", r"row last: .*25"),
        ("--tokens_per_step=100", "row last: --tokens_per_step 100 is no multiple"),
        ("--out=here", "row last: --out is not for a row to say"),
        ("--dry-run", "row last: --dry_run is not for a row to say"),
        ("-h", "row last: -h is not for a row to say"),
        ("--data='a", "row last: No closing quotation"),
    ],
)
def test_a_row_that_cannot_be_trained_is_refused_before_any_is(trained, flags, said):
    with pytest.raises(ValueError, match=said):
        sweep.run_rows({**ROWS, "last": flags}, BASE, config())
    assert not trained


def test_a_network_that_counts_is_refused(toy):
    with pytest.raises(ValueError, match="row a: --model ngram counts its text"):
        sweep.run_rows({"a": ""}, " ".join(TOY_NGRAM), config())


def test_rows_with_unlike_goals_are_refused(toy, trained):
    write_labelled(toy)
    other = "--model=classify --data=toy.csv"
    with pytest.raises(ValueError, match="row b is scored by accuracy and row a by loss"):
        sweep.run_rows({"a": "", "b": other}, BASE, config())
    assert not trained


# ---- the table -----------------------------------------------------------------------------------


def record(*figures: float, seed: int = 1337, goal: str = "loss", **changes) -> Record:
    """Of 100 steps, with an evaluation every 10."""
    rows = [{"step": 10 * i, goal: figure, "size": i} for i, figure in enumerate(figures, 1)]
    made = Record(
        ["--lr=1"],
        seed,
        goal,
        goal == "loss",
        1000,
        6_543_210,
        128,
        100,
        1.5,
        1,
        4.0,
        False,
        [],
        [],
    )
    return replace(made, evaluations=rows, **changes)


def last(*figures: float, **changes) -> list[Record]:
    return [record(9.0, 8.0, 7.0, f, seed=1337 + i, **changes) for i, f in enumerate(figures)]


def lines(results) -> dict[str, list[str]]:
    """{row: the cells behind its name}"""
    rows = [line.strip("|").split(" | ") for line in sweep.table(results).split("\n")[2:]]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}


def test_the_figures_of_a_run():
    r = record(5.0, 4.0, 3.5, 3.0, 3.2)
    assert r.final == 3.0 and r.best["step"] == 40  # the best, not the last
    assert r.early == 4.0  # 20 and 30 are as far from 25: the earlier one
    assert record(5.0, None, 3.5).points == [(10, 5.0), (30, 3.5)]
    assert replace(record(5.0), steps=10).early is None
    assert replace(record(5.0, 3.0), steps=20).early == 5.0
    accuracy = record(0.5, 0.9, 0.7, goal="accuracy")
    assert accuracy.final == 0.9  # more is better
    assert record(3.0, 3.0).best["step"] == 20  # as train.py keeps the later one


def test_the_arithmetic_of_the_table():
    base, near, far = (1.0, 1.1, 1.2), (1.15, 1.25, 1.35), (2.0, 2.2, 2.4)
    found = lines({name: last(*v) for name, v in zip("abc", (base, near, far), strict=True)})
    assert found["a"] == ["1,000", "6.54 M", "4", "8.000", "1.100 ± 0.100", "-", "-"]
    assert found["b"][4:] == ["1.250 ± 0.100", "+0.150", "no"]  # 2·sqrt(0.01 + 0.01) is 0.28
    assert found["c"][4:] == ["2.200 ± 0.200", "+1.100", "yes"]
    assert sweep.chance([*base], [*far]) == pytest.approx(2 * math.sqrt(0.01 + 0.04))


def test_the_spread_is_where_95_of_100_differences_of_equal_runs_are():
    torch.manual_seed(0)
    pairs = torch.randn(2, 10_000).double() * 0.3 + 4
    limit = sweep.chance(*pairs.tolist())
    share = ((pairs[0] - pairs[1]).abs() < limit).double().mean().item()
    assert share == pytest.approx(0.954, abs=0.01)
    assert limit == pytest.approx(2 * math.sqrt(2) * statistics.stdev(pairs[0].tolist()), rel=0.05)


def test_a_single_seed_has_no_spread():
    found = lines({"a": last(1.0), "b": last(3.0)})
    assert found["b"][4:] == ["3.000", "+2.000", "-"] and found["a"][4:] == ["1.000", "-", "-"]


def test_runs_that_diverged_are_counted_and_left_out_of_the_mean():
    gone = record(diverged=True, steps_per_s=None)
    found = lines({"a": last(1.0, 1.1), "b": [*last(2.0, 2.2), gone], "c": [gone, gone]})
    assert found["b"][4:] == ["2.100 ± 0.141, 1 of 3 diverged", "+1.050", "yes"]
    assert found["c"][2:] == ["-", "-", "2 of 2 diverged", "-", "-"]
    assert lines({"c": [gone], "a": last(1.0)})["a"][5:] == ["-", "-"]


def test_far_values_are_not_drawn_where_they_are():
    assert sweep.usual([1.0, 1.1, 1.2, 1.3, 9.0]) == (1.0, 1.3)
    assert sweep.usual([1.0, 1.1, 1.2, 1.3]) == (1.0, 1.3)
    assert sweep.usual([1.0, 2.0]) == (1.0, 2.0) and sweep.usual([2.0, 2.0, 2.0]) == (2.0, 2.0)


# ---- what is written -----------------------------------------------------------------------------


def test_the_csv_reads_back(tmp_path):
    gone = record(diverged=True)
    results = {'a, "quoted"': last(1.0, 1.1), "ünï": [gone]}
    sweep.write_csv(results, tmp_path / "s.csv")
    with (tmp_path / "s.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [(line["row"], line["seed"]) for line in found] == [
        ('a, "quoted"', "1337"),
        ('a, "quoted"', "1338"),
        ("ünï", "1337"),
    ]
    assert [line["final"] for line in found] == ["1.0", "1.1", ""]
    assert [line["best size"] for line in found] == ["4", "4", ""]
    assert found[0]["flags"] == "--lr=1" and found[2]["diverged"] == "True"


@pytest.mark.parametrize("count", [1, 60])
def test_a_picture_of_few_rows_and_of_many(tmp_path, count):
    pytest.importorskip("matplotlib")
    results = {f"row {i}: $x^{{": last(1 + i / 100, 1.1, 1.2) for i in range(count)}
    results["far away"] = [*last(50.0), record(diverged=True)]
    sweep.draw(results, "a caption with $ and _", tmp_path / "s.png")
    content = (tmp_path / "s.png").read_bytes()
    assert content.startswith(b"\x89PNG") and sweep.OURS.encode() in content
    assert int.from_bytes(content[20:24], "big") == pytest.approx(
        90 * (1.6 + 0.24 * (count + 1)), abs=2
    )


@pytest.mark.slow
def test_the_command(toy, trained, capsys):
    pytest.importorskip("matplotlib")
    (toy / "rows.txt").write_text("# two\nas it is:\n\nwide : --n_embd 48 \n", encoding="utf-8")
    argv = ["--rows=rows.txt", "--base", BASE, "--seeds=2", "--out=new/s.png", "--runs=new/runs"]
    sweep.main(argv)
    said = capsys.readouterr().out
    assert re.search(r"^\| wide \| 72,768 \| .* ± .* \| (yes|no) \|$", said, re.M)
    assert "| wide |" in (toy / "new/s.md").read_text(encoding="utf-8")
    assert (toy / "new/s.png").read_bytes().startswith(b"\x89PNG")
    sweep.main(argv)  # over its own files, from the runs that are there
    assert len(trained) == 4
    (toy / "new/s.csv").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"s\.csv is there already"):
        sweep.main(argv)
    assert (toy / "new/s.csv").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    "text, said",
    [
        ("a:\nb --lr 1\n", "rows.txt, line 2, has no name with a colon behind it"),
        (": --lr=1\n", "rows.txt, line 1, has no name"),
        ("a:\n\n# b\na: --lr=1\n", "rows.txt, line 4, is a second row a: give each its name"),
        ("# nothing\n", "--rows rows.txt has no rows"),
        (None, "--rows rows.txt is no file here"),
    ],
)
def test_what_is_no_file_of_rows_is_refused(toy, text, said):
    if text is not None:
        (toy / "rows.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        sweep.main(["--rows=rows.txt"])


def test_a_folder_of_runs_that_cannot_be_made_is_refused(toy):
    with pytest.raises(ValueError, match=r"cannot write to --runs toy.txt"):
        sweep.run_rows(ROWS, BASE, config(runs="toy.txt"))

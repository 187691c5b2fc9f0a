"""train.py and sample.py with the tasks of fine-tuning: what is learnt, resumed and printed."""

import io
import re
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import torchrun
from finetuning import FILES, RUN, TASKS, flags, of, squad, write_files
from test_train import assert_equal, flatten, losses, weights

import sample
import tasks
import train
from engine import checkpoint as checkpoints
from engine.logs import read_log
from finetune import adapter_rank
from tasks.answer import SampleFlags, answer

pytestmark = pytest.mark.slow

# Found by trying: each learns its problem in well under a second.
LEARN = ["--beta2=0.95", "--weight_decay=0", "--pre_ln"]
STEPS = {"classify": (40, 0.02), "tag": (20, 0.02), "answer": (40, 0.02), "similar": (10, 0.01)}
STEPS["complete"] = (60, 0.02)
ALL = pytest.mark.parametrize("task", TASKS)


@pytest.fixture
def files(toy) -> Path:
    return write_files(toy)


def learnt(task: str, *more: str) -> Path:
    steps, rate = STEPS[task]
    train.main(flags(task, *LEARN, f"--lr={rate}", f"--steps={steps}", "--eval_interval=10", *more))
    return Path(f"out/{task}")


def evaluations(folder: Path) -> list[dict]:
    return [r for r in read_log(folder / "log.jsonl") if r["split"] == "validation"]


def say(capsys, path: Path | str, *more: str) -> str:
    capsys.readouterr()
    sample.main([f"--checkpoint={path}", "--device=cpu", *more])
    return capsys.readouterr().out


def pretrained(task: str = "bert") -> str:
    """The path of a toy BERT, or GPT, that has seen two steps."""
    more = (
        ["--data=toy-docs.txt", "--attention_dropout=0"] if task == "bert" else ["--data=toy.txt"]
    )
    other = ("--data", "--valid", "--model", "--attention")
    given = [f for f in flags("classify") if not f.startswith(other)]
    train.main([f"--model={task}", *given, *more, "--steps=2", f"--out=old-{task}"])
    return f"old-{task}/best.pt"


# ---- learning ------------------------------------------------------------------------------------


@ALL
def test_a_small_problem_is_learnt_shown_and_scored_again(files, capsys, curves, task):
    """By chance: a third of the labels, and of the others next to nothing."""
    folder = learnt(task)
    out = capsys.readouterr().out
    goal, lower = tasks.task(task).GOAL, tasks.task(task).LOWER_IS_BETTER
    last_first = evaluations(folder)[::-1]  # of two equal ones the later is the best
    best = (min if lower else max)(last_first, key=lambda r: r[goal])
    if task == "complete":
        assert best["loss"] < 0.2
        assert best["perplexity"] == pytest.approx(torch.tensor(best["loss"]).exp().item())
    else:
        assert best[goal] > (90 if task == "answer" else 0.95)
    assert f"best validation {goal} {best[goal]:.4f}" in out and "(best)" in out
    state = checkpoints.load(folder / "best.pt")
    assert state["step"] == best["step"]
    assert abs(state["best"]) == pytest.approx(best[goal])
    shown, closing = out.partition("curves: ")[2].split("go on with: ")
    assert shown.count("-" * 80) >= 4 and f"--checkpoint {folder / 'best.pt'}" in closing
    if task == "classify":
        assert "true label in rows" in shown and (folder / "confusion.png").is_file()

    scored = say(capsys, folder / "best.pt", f"--eval=valid-{FILES[task]}")
    wanted = [f"{k} {v:.4f}" for k, v in best.items() if k not in ("step", "split")]
    assert "  ".join(wanted) in scored.splitlines()
    assert scored.startswith(f"valid-{FILES[task]}: 37" if task != "answer" else "valid-squad")
    assert ("true label in rows" in scored) == (task == "classify")


def test_pairs_of_texts_are_told_apart(files, capsys, monkeypatch):
    """The second text decides: its words are the first's too, so the segments must be right."""
    some = ["hat", "key", "cup"]
    rows = [f"{a}\t{b}\t{b}" for a in some for b in some]
    for name, times in (("labels.tsv", 20), ("valid-labels.tsv", 2)):
        Path(name).write_text("text\ttext_b\tlabel\n" + "\n".join(rows * times), encoding="utf-8")
    folder = learnt("classify", "--class_weights")
    assert max(r["accuracy"] for r in evaluations(folder)) == 1
    best = folder / "best.pt"
    assert checkpoints.load(best)["model_config"]["pairs"] is True
    got = say(capsys, best, "--prompt=hat\tkey", "--prompt=key\that").splitlines()
    assert [line.split()[0] for line in got] == ["key", "hat"]
    with pytest.raises(ValueError, match="prompt 'cup' is one text, but this model labels pairs"):
        say(capsys, best, "--prompt=hat\tcup", "--prompt=cup")
    # A line of a text that cannot be answered costs the others nothing.
    monkeypatch.setattr("sys.stdin", io.StringIO("hat\tkey\n\ncup\nkey\that\n"))
    sample.main(["--checkpoint", str(best), "--device=cpu"])
    out, err = capsys.readouterr()
    assert [line[:3] for line in out.split("\n")] == ["key", "", "", "hat", ""]
    assert "note: line 3 is one text, but this model labels pairs" in err
    long = "hat " * 50 + "\tkey"
    assert say(capsys, best, f"--prompt={long}").startswith("key")


# ---- resuming ------------------------------------------------------------------------------------

RESUMED = [(task, ()) for task in TASKS]
RESUMED += [("classify", ("--class_weights", "--layer_decay=0.7", "--optimizer=muon"))]
RESUMED += [("tag", ("--freeze=1", "--layer_decay=0.5")), ("complete", ("--freeze=embeddings",))]
RESUMED += [(task, ("--lora_rank=3",)) for task in TASKS]


@pytest.mark.parametrize(
    "task,more", RESUMED, ids=lambda x: x if isinstance(x, str) else str(x[:1])
)
def test_four_steps_are_two_and_two_bit_for_bit(files, task, more):
    given = [f for f in flags(task) if "dropout" not in f]
    given += ["--dropout=0.2", "--steps=4", "--eval_interval=2", *more]
    train.main([*given, "--out=whole"])
    train.main([*given, "--out=parts", "--stop_after=2"])
    train.main(["--resume", "--out=parts"])
    one, two = (checkpoints.load(Path(f"{name}/latest.pt")) for name in ("whole", "parts"))
    assert_equal(one["model"], two["model"])
    assert one["best"] == two["best"] and two["step"] == 4
    for a, b in zip(flatten(one["optimizer"]), flatten(two["optimizer"]), strict=True):
        assert torch.equal(a, b)
    assert losses("whole") == losses("parts")
    assert evaluations(Path("whole")) == evaluations(Path("parts"))
    assert len(evaluations(Path("whole"))) == 2


@ALL
def test_best_has_ordinary_weights_and_latest_the_adapters(files, capsys, task):
    first = pretrained("gpt" if task == "complete" else "bert")
    common = [f for f in RUN if not f.startswith("--lr")]
    rates = ["--lr=0.05", "--steps=6", "--eval_interval=1", "--lora_rank=2", "--schedule=constant"]
    train.main([f"--model={task}", f"--init={first}", *of(task), *common, *rates, "--out=run"])
    best, latest = (weights(Path(f"run/{name}.pt")) for name in ("best", "latest"))
    assert adapter_rank(latest) == 2 and adapter_rank(best) == 0
    assert not any("down" in name or "linear" in name for name in best)
    before, heads = weights(Path(first)), ("head.", "pooler.")
    changed = {n for n in best if not n.startswith(heads) and not torch.equal(best[n], before[n])}
    matrices = {f"blocks.{i}.attention.{x}.weight" for i in (0, 1) for x in "qv"}
    assert changed <= matrices
    state = checkpoints.load(Path("run/latest.pt"))
    merged, _ = checkpoints.restore(Path("run/latest.pt"), state)
    changed = {
        name
        for name, tensor in merged.state_dict().items()
        if name.startswith("blocks.") and not torch.equal(tensor, before[name])
    }
    assert changed == matrices
    checkpoints.save(
        Path("run/merged.pt"),
        {**state, "model": merged.state_dict(), "optimizer": {}},
    )
    file = f"--eval=valid-{FILES[task]}"
    assert say(capsys, "run/latest.pt", file) == say(capsys, "run/merged.pt", file)
    # And from the adapters of one task another begins: they are part of its weights.
    if task == "tag":
        other = ["--model=classify", "--init=run/latest.pt", *of("classify"), *common]
        train.main([*other, "--steps=1", "--lr=1e-30", "--out=other", "--weight_decay=0"])
        then = weights(Path("other/latest.pt"))
        assert all(torch.equal(then[name], merged.state_dict()[name]) for name in matrices)


def test_lower_layers_take_smaller_steps(files):
    """Adam's first step has a size that the rate alone decides."""
    first, common = weights(Path(pretrained())), [*of("tag"), *RUN, "--weight_decay=0", "--steps=1"]
    moved = []
    for decay in ("1", "0.5"):
        given = ["--model=tag", "--init=old-bert/best.pt", f"--layer_decay={decay}"]
        train.main([*given, *common, f"--out=by-{decay}"])
        found = weights(Path(f"by-{decay}/latest.pt"))
        moved.append({name: found[name] - first[name] for name in found.keys() & first.keys()})
    for part, scale in (("blocks.1.mlp.fc", 0.5), ("blocks.0.mlp.fc", 0.25), ("token", 0.125)):
        name = next(name for name in moved[0] if name.startswith(part))
        torch.testing.assert_close(moved[1][name], moved[0][name] * scale, atol=1e-7, rtol=1e-3)
        assert moved[0][name].abs().max() > 1e-3


# ---- how long, and from what ---------------------------------------------------------------------


def steps_in(folder: str) -> tuple[int, float]:
    config = checkpoints.load(Path(folder) / "latest.pt")["train_config"]
    return config["steps"], config["epochs"]


def test_epochs_give_steps_unless_steps_or_minutes_are_given(files):
    given = flags("similar", "--log_interval=1")
    train.main([*given, "--epochs=2", "--out=whole"])
    steps, epochs = steps_in("whole")
    found = [r["step"] for r in evaluations(Path("whole"))]
    assert epochs == 2 and found == [steps // 2, steps] and len(losses("whole")) == steps
    train.main([*given, "--epochs=2", "--out=parts", "--stop_after=3"])
    train.main(["--resume", "--out=parts"])
    assert steps_in("parts") == (steps, 2)
    assert_equal(weights(Path("whole/latest.pt")), weights(Path("parts/latest.pt")))
    train.main([*given, "--epochs=0.5", "--out=half"])
    assert steps_in("half")[0] == steps // 4
    train.main([*given, "--steps=3", "--out=three"])
    assert steps_in("three") == (3, 0)
    train.main([*given, "--minutes=0.02", "--out=timed"])
    assert steps_in("timed")[1] == 0
    for name in ("steps=3", "minutes=1"):
        with pytest.raises(ValueError, match=rf"--epochs and --{name[:5]}.* both say how long"):
            train.main([*given, "--epochs=2", f"--{name}"])


def test_another_task_and_its_own_labels(files, capsys):
    """A tagger's labels were once asked of the texts that a classifier began with."""
    first = pretrained()
    begin = [f"--init={first}", *RUN, "--steps=1"]
    train.main(["--model=tag", *begin, *of("tag"), "--out=tag"])
    assert "freshly initialised: head.bias, head.weight" in capsys.readouterr().out
    begin[0] = "--init=tag/best.pt"
    train.main(["--model=classify", *begin, *of("classify"), "--out=classify"])
    out = capsys.readouterr().out
    assert "from tag/best.pt; freshly initialised: head.bias, head.weight, pooler.bias" in out
    state = checkpoints.load(Path("classify/best.pt"))
    assert state["model_config"]["labels"] == ("minus", "other", "plus")
    begin[0] = "--init=classify/best.pt"
    train.main([*begin, "--out=again", *of("classify"), "--lr=1e-30", "--weight_decay=0"])
    assert_equal(state["model"], weights(Path("again/best.pt")))  # the same task: its head too
    Path("labels.tsv").write_text("text\tlabel\ngood\tplus\nodd\tstrange\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"labels\.tsv, line 3: the label 'strange' is none of the"
    ):
        train.main([*begin, *of("classify")])
    train.main(["--model=answer", *begin, *of("answer"), "--out=answer"])
    train.main(["--model=bert", *begin[:1], "--data=toy-docs.txt", *RUN, "--steps=1"])
    Path("tags.conll").write_text("cat B-animal\nsat O\n\ndog B-animal\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1: B-animal is none of the labels"):
        train.main(["--init=tag/best.pt", *RUN, *of("tag")])


def test_kinds_that_do_not_fit_are_refused(files):
    bert, gpt = pretrained(), pretrained("gpt")
    for task, path in (("classify", gpt), ("similar", gpt), ("complete", bert), ("tag", gpt)):
        with pytest.raises(
            ValueError, match=rf"--model {task} cannot begin from the (gpt|bert) of"
        ):
            train.main([f"--model={task}", f"--init={path}", *of(task), *RUN])
        given = [f for f in flags(task) if not f.startswith("--vocab_size")]
        with pytest.raises(ValueError, match=r"--tokenizer old-.* lacks the special token [\[<]"):
            train.main([*given, f"--tokenizer={path}"])
    given = [f for f in flags("classify", "--steps=1") if not f.startswith("--vocab_size")]
    train.main([*given, f"--tokenizer={bert}", "--out=run"])
    one, two = (checkpoints.load(Path(p)) for p in (bert, "run/best.pt"))
    assert one["tokenizer"] == two["tokenizer"]


@pytest.mark.parametrize(
    "task,more,message",
    [
        ("classify", ["--freeze=head"], "--freeze head is not known: choose embeddings, or 1 to 2"),
        ("similar", ["--freeze=2"], "--freeze 2 leaves nothing that learns"),
        ("tag", ["--lora_rank=-1"], "--lora_rank -1 is out of range"),
        (
            "tag",
            ["--layer_decay=0"],
            "--layer_decay 0.0 is out of range: choose between",
        ),
        ("tag", ["--seeds=2", "--resume"], "there is no run|--seeds repeats"),
        ("tag", ["--class_weights"], "--class_weights is for --model classify"),
        ("classify", ["--data="], "--model classify learns from labelled examples"),
        ("answer", ["--data=labels.tsv"], "labels.tsv is no JSON"),
        ("tag", ["--data=labels.tsv"], r"labels.tsv, line 1: 'label' is no tag"),
        ("complete", ["--data=squad.json"], r"squad.json is no .csv, .tsv or .jsonl"),
        ("similar", ["--batch_size=4"], "choose --batch_size 32 and a single process"),
        ("classify", ["--valid=odd.tsv"], r"odd\.tsv, line 2: the label 'new' is none of"),
        ("classify", ["--data=odd.tsv"], r"all examples of odd\.tsv have the label new"),
    ],
)
def test_bad_input_is_one_sentence(files, task, more, message):
    Path("odd.tsv").write_text("text\tlabel\na\tnew\nb\tnew\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        train.main(flags(task, *more))
    assert "\n" not in str(error.value) and not list(files.glob("out/*/*.pt"))


def test_several_seeds_are_summarised_and_can_be_resumed(files, capsys):
    given = flags("tag", "--steps=4", "--eval_interval=2")
    train.main([*given, "--seeds=2", "--seed=5"])
    assert re.search(r"2 seeds: best validation f1 0\.\d{4} ± ", capsys.readouterr().out)
    train.main([*given, "--seed=6", "--out=alone"])
    assert_equal(weights(Path("alone/best.pt")), weights(Path("out/tag-seed-6/best.pt")))
    train.main([*given, "--seeds=2", "--seed=5", "--out=parts", "--stop_after=2"])
    train.main(["--resume", "--out=parts-seed-5"])
    assert_equal(weights(Path("parts-seed-5/best.pt")), weights(Path("out/tag-seed-5/best.pt")))


def test_two_processes_train_like_one(files):
    given = flags("classify", "--steps=6", "--eval_interval=3", "--batch_size=8", "--class_weights")
    train.main([*given, "--out=one"])
    done = torchrun(2, *given, "--out=two")
    assert done.returncode == 0, done.stderr
    one, two = (weights(Path(f"{name}/latest.pt")) for name in ("one", "two"))
    # Softmax ignores the keys' bias: its gradient is rounding noise, which Adam makes large.
    for name in (n for n in one if not n.endswith(".k.bias")):
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-4, msg=name)
    assert losses("one") == pytest.approx(losses("two"), abs=1e-4)
    for a, b in zip(evaluations(Path("one")), evaluations(Path("two")), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


# ---- what is said --------------------------------------------------------------------------------


def test_a_classifier_answers_prompts_and_lines_alike(files, capsys, monkeypatch):
    best = learnt("classify") / "best.pt"
    lines = ["cat sat good", "", "poor " + "red " * 40, "odd dog"]
    got = say(capsys, best, *(f"--prompt={line}" for line in lines)).splitlines()
    assert got[0].split()[0] == "plus"
    assert got[2].startswith("minus") and got[3].startswith("other") and len(got) == 4
    shares = [float(x) for x in re.findall(r"([\d.]+)%", got[0])]
    assert sum(shares) == pytest.approx(100, abs=0.3) and shares == sorted(shares, reverse=True)
    for line, want in zip(lines, got, strict=True):
        assert say(capsys, best, f"--prompt={line}").splitlines() == [want]
    text = "".join(f"{line}\n" for line in lines)
    for more in ([], ["--batch_size=1"]):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert say(capsys, best, *more).splitlines() == got
    Path("one.tsv").write_text("text\tlabel\nvery good\tplus\n", encoding="utf-8")
    assert "accuracy 1.0000" in say(capsys, best, "--eval=one.tsv")  # of one label alone
    for more, message in (
        (["--eval=one.tsv", "--prompt=x"], "--eval and --prompt are two things to do"),
        (["--eval=nowhere.tsv"], r"--eval nowhere\.tsv is no file here"),
        (["--context=one.tsv"], "--context is for checkpoints of answer"),
        (["--batch_size=0"], "--batch_size 0 is out of range"),
    ):
        with pytest.raises(ValueError, match=message):
            say(capsys, best, *more)


def test_a_tagger_marks_long_texts_and_keeps_empty_lines(files, capsys, monkeypatch):
    best = learnt("tag") / "best.pt"
    assert say(capsys, best, "--prompt=dog Anna ran, New  Rome") == (
        "dog [Anna]person ran, [New  Rome]place\n"
    )
    text = "cat Emil sat\n\n" + "Dora ran on New Oslo " * 15 + "\n"  # several windows of 24 tokens
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    first, empty, long = say(capsys, best).split("\n")[:3]
    assert first == "cat [Emil]person sat" and empty == ""
    assert long == "[Dora]person ran on [New Oslo]place " * 15


def test_an_answer_is_found_in_any_window(files, capsys, monkeypatch):
    best = learnt("answer") / "best.pt"
    Path("text.txt").write_text("dog Carl has the cup today\n", encoding="utf-8")
    asked = ["who has the cup?", "who has the pen?"]
    got = say(capsys, best, "--context=text.txt", *(f"--prompt={q}" for q in asked)).splitlines()
    for line in got:
        assert re.fullmatch(r"Carl \d+\.\d%: dog \[Carl\] has the cup today", line)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(asked) + "\n"))
    assert say(capsys, best, "--context=text.txt").splitlines() == got
    filler = "very slow old mat park " * 9
    Path("long.txt").write_text(f"{filler}Carl has the cup today {filler}", encoding="utf-8")
    long = say(capsys, best, "--context=long.txt", f"--prompt={asked[0]}")
    assert long.startswith("Carl ") and "[Carl]" in long and long.count("…") == 2
    model, tokenizer, _ = checkpoints.load_model(best, torch.device("cpu"))
    model.register_forward_pre_hook(lambda model, args, given: seen.append(given), with_kwargs=True)
    text, seen = Path("long.txt").read_text(encoding="utf-8"), []
    answer(model, tokenizer, [f"{asked[0]}\n{text}"], SampleFlags())
    tokens, segments, keep = (seen[0][k] for k in ("tokens", "segments", "keep"))
    ends = tokenizer.special_tokens["[SEP]"]
    first = (tokens == ends).int().argmax(1, keepdim=True)  # of the question
    assert torch.equal(segments == 1, (torch.arange(tokens.size(1)) > first) & keep)
    Path("empty.txt").write_text("", encoding="utf-8")
    Path("latin.txt").write_bytes(b"caf\xe9")
    for more, message in (
        ([], r"^--context is missing: name the text"),
        (["--context=nowhere.txt"], r"^--context nowhere\.txt is no file here: name the text"),
        (["--context=empty.txt"], r"^the context '' has no words in it"),
        (["--context=latin.txt"], r"^latin\.txt is not UTF-8 in line 1"),
    ):
        with pytest.raises(ValueError, match=message):
            say(capsys, best, "--prompt=who has it?", *more)


def test_a_model_that_may_abstain_says_so(files, capsys):
    for seed, name in enumerate(("squad.json", "valid-squad.json")):
        Path(name).write_text(squad(Random(seed), 150, nobody=0.5), encoding="utf-8")
    folder = learnt("answer")
    assert checkpoints.load(folder / "best.pt")["model_config"]["may_abstain"] is True
    report = evaluations(folder)[-1]
    assert min(report["unanswerable_exact_match"], report["answerable_f1"]) > 95
    for name in ("nobody", "Emil"):
        Path(f"{name}.txt").write_text(f"dog sat {name} has the map", encoding="utf-8")
    given = [folder / "best.pt", "--prompt=who has the map?"]
    assert re.fullmatch(r"no answer \d+\.\d%\n", say(capsys, *given, "--context=nobody.txt"))
    assert say(capsys, *given, "--context=Emil.txt").startswith("Emil ")


def test_similar_lines_are_found(files, capsys):
    best = learnt("similar") / "best.pt"
    Path("a.txt").write_text("cat ran today\nold mat park\n", encoding="utf-8")
    Path("b.txt").write_text("slow red dog\npark old mat\ntoday cat ran\n", encoding="utf-8")
    lines = say(capsys, best, "--similar", "a.txt", "b.txt", "--top=1").splitlines()
    assert [line.split("  ")[-1] for line in lines] == [
        *("cat ran today", "line 3: today cat ran"),
        *("old mat park", "line 2: park old mat"),
    ]
    assert "2 embeddings of 28 numbers" in say(capsys, best, "--embed=a.txt")
    for more in ([], ["--embed=a.txt", "--eval=pairs.tsv"]):
        with pytest.raises(ValueError, match=r"give one of --embed, --similar and --eval, not"):
            say(capsys, best, *more)


def test_a_completion_ends_where_it_learnt_to(files, capsys):
    best = learnt("complete") / "best.pt"
    got = say(capsys, best, "--prompt=dog key of", "--prompt=slow pen of", "--temperature=0")
    lines = got.splitlines()
    assert lines[1::2] == ["dog key of Berta key", "slow pen of Dora pen"]
    assert say(capsys, best, "--prompt=dog key of ", "--temperature=0") == "dog key of Berta key\n"
    with pytest.raises(ValueError, match="--eval and --prompt are two things to do"):
        say(capsys, best, "--eval=prompts.jsonl", "--prompt=x")

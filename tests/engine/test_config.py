"""config.py: defaults that belong to what they are for, and flags that would have no effect."""

from dataclasses import fields

import pytest

import optim
import tasks
from engine import synonyms
from engine.config import resolve
from engine.presets import PRESETS


def resolved(*flags: str) -> tuple:
    config, sizes, _ = resolve([*flags, "--device=cpu"])
    return config, sizes


# ---- defaults ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,decay",
    [
        ((), 0.1),
        (("--optimizer=adamw",), 0.1),
        (("--optimizer=adam",), 0.0),
        (("--optimizer=adam", "--weight_decay=0.1"), 0.1),
        (("--model=seq2seq", "--data=pairs.tsv", "--optimizer=adam"), 0.0),
        (("--model=classify", "--data=a.csv"), 0.01),
        (("--model=classify", "--data=a.csv", "--optimizer=adam"), 0.0),
        (("--preset=bert-base", "--optimizer=adamw"), 0.01),
        (("--preset=bert-base", "--optimizer=adam"), 0.0),
        (("--preset=transformer-base",), 0.0),
        (("--preset=transformer-base", "--optimizer=adamw"), 0.1),
        (("--preset=transformer-base", "--optimizer=muon"), 0.1),
    ],
)
def test_the_decay_by_default_is_the_optimizers_own(flags, decay):
    """Adam had the 0.1 that AdamW is meant to have, and the copy task stayed at 1.92 nats."""
    assert resolved(*flags)[0].weight_decay == decay


@pytest.mark.parametrize(
    "flags,rate",
    [
        (("--preset=shakespeare",), 7e-3),
        (("--preset=shakespeare", "--optimizer=adamw"), 3e-3),
        (("--preset=shakespeare", "--optimizer=adam", "--lr=1e-3"), 1e-3),
        (("--preset=shakespeare", "--optimizer=muon"), 7e-3),
        (("--preset=gpt2", "--optimizer=muon"), 6e-4),
    ],
)
def test_muons_rate_is_for_muon_alone(flags, rate):
    assert resolved(*flags)[0].lr == rate


@pytest.mark.parametrize("preset", ["dates", "transformer-tiny"])
def test_the_width_of_a_preset_has_its_own_mlp(preset):
    """512 wide with an MLP of 256, which was chosen for a width of 96 or 128."""
    assert resolved(f"--preset={preset}")[1]["n_ff"] == PRESETS[preset]["n_ff"] == 256
    assert resolved(f"--preset={preset}", "--n_embd=512")[1]["n_ff"] == 0  # 4 x n_embd
    assert resolved(f"--preset={preset}", "--n_embd=512", "--n_ff=70")[1]["n_ff"] == 70


# ---- flags without effect, and names of others ---------------------------------------------------


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--schedule=constant --floor=0.1", "--floor has no effect with the schedule constant"),
        ("--schedule=inverse_sqrt --floor=0.1", "choose --schedule cosine or linear"),
        ("--schedule=inverse_sqrt --cooldown=0.1", "choose --schedule linear"),
        ("--preset=gpt2 --cooldown=0.2", "--cooldown has no effect with the schedule cosine"),
        ("--preset=transformer-base --floor=0", "has no effect with the schedule inverse_sqrt"),
        ("--cooldown=0 --floor=0.1", "--floor 0.1 has no effect with --cooldown 0"),
    ],
)
def test_what_the_schedule_does_not_heed_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        resolved(*flags.split())
    heeded = resolved("--schedule=cosine", "--floor=0.2", "--warmup=7")[0]
    assert (heeded.floor, heeded.warmup) == (0.2, 7)


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_a_schedule_heeds_what_its_table_says(name):
    plain = {"steps": 40, "warmup_steps": 4, "cooldown_steps": 9, "floor": 0.1}
    changes = {"warmup": {"warmup_steps": 8}, "cooldown": {"cooldown_steps": 20}}
    changes["floor"] = {"floor": 0.5}
    heeds = []
    for setting, change in changes.items():
        both = [plain, {**plain, **change}]
        rates = [[optim.schedule(name, step, **each) for step in range(40)] for each in both]
        heeds += [setting] * (rates[0] != rates[1])
    assert tuple(heeds) == optim.SCHEDULES[name]


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--model=gpt2", "--model gpt2 is not known: .*--preset gpt2$"),
        ("--model=openai-community/gpt2-medium", "--preset gpt2-medium$"),
        ("--model=bert-base-uncased", "--preset bert-base$"),
        ("--model=xyzzy", "choose gpt, .*complete, complete_llama, complete_moe$"),
        ("--preset=gpt2-small", "--preset gpt2-small is not known: did you mean gpt2[?] There are"),
        ("--preset=gtp2-xl", "did you mean gpt2-xl[?]"),
        ("--preset=GPT2", "did you mean gpt2[?]"),
        ("--preset=gpt3", "did you mean gpt3-6.7b[?]"),
        ("--preset=xyzzy", "is not known: choose toy, "),
        ("config/train_shakespeare_char.py", "settings are flags here, or --preset NAME"),
        ("batch_size=4", "belongs to no flag: did you mean --batch_size=4[?]"),
    ],
)
def test_names_of_sizes_are_answered_with_presets(flags, message):
    with pytest.raises(ValueError, match=message):
        resolved(flags)


@pytest.mark.parametrize(
    "theirs,ours",
    [
        ("learning_rate", "lr"),
        ("learning-rate", "lr"),
        ("max_iters", "steps"),
        ("n_layers", "n_layer"),
        ("gradient_accumulation_steps", "tokens_per_step, from which accumulation follows"),
        ("num_train_epochs", "epochs"),
        ("per_device_train_batch_size", "batch_size"),
        ("model_name_or_path", "init, a checkpoint"),
        ("max_length", "block_size"),
        ("lr_scheduler_type", "schedule"),
        ("context_length", "block_size"),
        ("hidden_size", "n_embd"),
        ("d_model", "n_embd"),
        ("bs", "batch_size"),
        ("warmup_ratio", "warmup, in steps"),
        ("min_lr", "floor, a share of --lr"),
        ("out_dir", "out"),
        ("fp16", "dtype"),
    ],
)
def test_what_others_call_a_flag_is_answered_with_ours(theirs, ours):
    """--learning_rate was answered with --eval_interval."""
    for flags in ([f"--{theirs}", "1"], [f"--{theirs}=1"]):
        with pytest.raises(
            ValueError, match=f"^there is no flag --.*: here it is --{ours}([,;]|$)"
        ):
            resolved(*flags)


def test_what_has_no_flag_is_answered_with_what_there_is():
    with pytest.raises(ValueError, match="--wandb_project: the figures of a run are in its folder"):
        resolved("--wandb_project=x")
    with pytest.raises(ValueError, match="here it is --row_length"):
        resolved("--model=classify", "--data=a.csv", "--max_length=128")
    with pytest.raises(ValueError, match=r"there is no flag --step: did you mean --steps\?"):
        resolved("--step=3")


def test_the_names_of_others_are_no_flags_of_ours():
    """Every answer is a flag of some script, and no name of ours is answered with another."""
    classes = [c for n in tasks.TABLE for c in (tasks.network(n).Config, tasks.task(n).Flags)]
    classes += [tasks.task(n).SampleFlags for n in tasks.TABLE]
    flags = {field.name for each in classes for field in fields(each)}
    answers = {flag.partition(",")[0].partition(" ")[0] for flag in synonyms.NAMES}
    assert answers <= flags
    assert "here it is --max_new_tokens" in synonyms.ours("max_length", ["--max_new_tokens"])
    for names in (*synonyms.NAMES.values(), *synonyms.INSTEAD):
        assert all(name == name.lower() and name not in ("lr", "steps") for name in names.split())

"""config.py: defaults that belong to what they are for, and flags that would have no effect."""

import pytest

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


@pytest.mark.parametrize("preset", ["dates", "transformer-tiny"])
def test_the_width_of_a_preset_has_its_own_mlp(preset):
    """512 wide with an MLP of 256, which was chosen for a width of 96 or 128."""
    assert resolved(f"--preset={preset}")[1]["n_ff"] == PRESETS[preset]["n_ff"] == 256
    assert resolved(f"--preset={preset}", "--n_embd=512")[1]["n_ff"] == 0  # 4 x n_embd
    assert resolved(f"--preset={preset}", "--n_embd=512", "--n_ff=70")[1]["n_ff"] == 70

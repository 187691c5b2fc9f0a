"""lab/variants.py: all rows can be trained, those that promise equal parameters have them, the rank
falls as in the paper, and the tables come out at toy size."""

import re
import shlex
from dataclasses import asdict

import pytest
import torch
from conftest import write_texts

import tasks
from engine.config import resolve
from lab import sweep, variants
from lab.variants import DECODER, DECODERS, ENCODER, ENCODERS, VariantsConfig
from model import GPT, count_parameters

TOY = "--data toy.txt --n_embd 32 --block_size 16 --tokens_per_step 64 --batch_size 4"


def network(base: str, flags: str) -> torch.nn.Module:
    config, sizes, _ = resolve([*shlex.split(base), *shlex.split(flags)])
    Network = tasks.network(config.model)
    return Network(Network.Config(**{**sizes, "vocab_size": 320}))


@pytest.mark.slow
@pytest.mark.parametrize("base, rows", [(DECODER, DECODERS), (ENCODER, ENCODERS)])
def test_every_row_can_be_trained_and_is_another_one(base, rows):
    jobs = sweep.plan_jobs(rows, base, VariantsConfig(seeds=1))
    assert len({job.folder for job in jobs}) == len(rows)


def test_the_recipe_is_that_of_the_preset():
    ours, sizes, _ = resolve(shlex.split(DECODER))
    preset, expected, _ = resolve(["--preset=gpt-shakespeare"])
    differ = {k for k, v in asdict(preset).items() if v != getattr(ours, k)}
    assert differ == {"model", "preset", "steps", "eval_interval", "eval_tokens", "dtype", "device"}
    assert all(sizes[name] == value for name, value in expected.items())


def test_the_base_is_gpt():
    ours, gpt = network(DECODER, ""), network(DECODER, "--model gpt")
    assert type(gpt) is GPT and count_parameters(ours) == count_parameters(gpt)
    assert ours.flops_per_token() == gpt.flops_per_token()


def test_rows_that_promise_equal_parameters_have_them():
    expected = count_parameters(network(DECODER, "").blocks)
    found = {
        name: count_parameters(network(DECODER, flags).blocks)
        for name, flags in DECODERS.items()
        if "alone" in name or "layer" in name or "sandwich" in name
        if name != "no skip connections"
    }
    assert len(found) == 8
    for name, count in found.items():
        assert count == pytest.approx(expected, rel=0.04), name


@pytest.mark.parametrize("act", ["glu", "swiglu", "bilinear"])
def test_gates_have_about_the_weights_of_a_layer_without(act):
    gated, plain = (network(DECODER, f"--act {name}").blocks for name in (act, "gelu"))
    assert count_parameters(gated) == pytest.approx(count_parameters(plain), rel=0.04)


def test_rank_falls_doubly_exponentially_without_skip_connections_alone():
    found = variants.ranks()
    alone = [value for value, _ in found["attention alone, no skip connections"]]
    assert alone[2] < alone[1] ** 2 and alone[3] < alone[2] ** 2 and alone[3] < 1e-5
    kept = [value for value, _ in found["attention and feed-forward"]]
    assert len(kept) == 25 and min(kept) > 0.5
    assert found["attention alone, no skip connections"][-1][1] == pytest.approx(1, abs=1e-6)
    assert found["attention and feed-forward"][-1][1] > 3


def test_difference_and_rank_by_hand():
    same = torch.ones(2, 5, 3)
    assert variants.difference(same) == 0 and variants.effective_rank(same) == pytest.approx(1)
    one = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    assert variants.difference(one) == pytest.approx(1)
    assert variants.effective_rank(torch.eye(4)[None]) == pytest.approx(4)
    shares = torch.tensor([0.75, 0.25])
    expected = torch.exp(-(shares * shares.log()).sum()).item()
    assert variants.effective_rank(torch.diag(torch.tensor([3.0, 1.0]))[None]) == pytest.approx(
        expected
    )


def test_rows_are_chosen_with_what_they_are_compared_with():
    config = VariantsConfig(only="swiglu,rank")
    assert list(config.wanted(DECODERS)) == ["GPT", "swiglu"] and not config.wanted(ENCODERS)
    assert config.seeds == 3 and config.steps == 300
    for rows in (DECODERS, ENCODERS):
        assert all(name in VariantsConfig(only=f"GPT, {name}").chosen for name in rows)
    assert VariantsConfig(quick=True).seeds == 1
    with pytest.raises(ValueError, match="--only swigloo is no row: choose GPT, relu, "):
        VariantsConfig(only="swigloo")


@pytest.mark.slow
def test_all_tables_and_pictures_at_toy_size(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path)
    flags = ["--quick", "--steps=2", "--workers=1", f"--flags={TOY}"]
    variants.main(flags)
    said = capsys.readouterr().out
    rows = re.findall(
        r"^\| ([^|]+) \| [\d,]+ \| \S+ M \| [\d.e+]+ \| \S+ \| (\d\.\d+) \|", said, re.M
    )
    assert [name for name, _ in rows] == [*DECODERS, *ENCODERS]
    assert len({loss for _, loss in rows}) > 10
    assert "attention alone, no skip connections" in said
    for name in ("variants", "variants-encoders", "variants-rank"):
        picture = tmp_path / f"out/{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.with_suffix(".md").read_text(encoding="utf-8").startswith("Measured by")
    variants.main(flags)  # all is there
    assert capsys.readouterr().out == said

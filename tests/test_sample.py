"""sample.py: cached beside uncached, batched beside one by one, bad input."""

import io
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import ROOT, TOY, write_texts

import sample
import train
from data.tokens import END_OF_TEXT
from decoding import choose, context_start, distribution, generate
from engine import checkpoint as checkpoints
from engine.cpu import lay_out_for_decoding
from model import GPT, GPTConfig


def gpt(block_size=13, vocab_size=320) -> GPT:
    """Untrained, with weights large enough that its choices depend on all of the context."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 24}
    model = GPT(GPTConfig(vocab_size=vocab_size, block_size=block_size, **sizes)).eval()
    for name, p in model.named_parameters():
        if p.dim() == 2:  # the head is tied to the token embeddings: large ones repeat themselves
            nn.init.normal_(p, std=0.1 if name.startswith("token") else 0.5)
    return model


def greedy(logits, writing):
    return logits.argmax(-1)


def tokens_of(steps) -> list[list[int]]:
    return [[t for t in row if t is not None] for row in zip(*steps, strict=True)]


# ---- the loop over tokens ------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(1, 14))
def test_cached_equals_uncached_for_every_cut_and_past_the_context(cut):
    """Caches that are wrong still print fluent text."""
    model, prompt = gpt(), torch.randint(256, (40,)).tolist()[:cut]
    cached = tokens_of(generate(model, [prompt], greedy, 40))
    uncached = tokens_of(generate(model, [prompt], greedy, 40, use_cache=False))
    assert cached == uncached and len(cached[0]) == 40
    assert len(set(cached[0])) > 3


def test_a_prompt_longer_than_the_context_is_seen_from_its_end():
    model, prompt = gpt(), torch.randint(256, (31,)).tolist()
    cached = tokens_of(generate(model, [prompt], greedy, 9))
    assert cached == tokens_of(generate(model, [prompt], greedy, 9, use_cache=False))
    start = context_start(31, 13)
    with torch.no_grad():
        assert cached[0][0] == model(torch.tensor([prompt[start:]]))[0, -1].argmax().item()


def test_what_no_row_looks_at_again_is_not_read():
    """100,000 tokens beside a prompt of one were read one by one, each step for nothing."""
    model, calls = gpt(), []
    features, prompts = model.features, [[1], torch.randint(256, (2000,)).tolist()]
    model.features = lambda *args, **more: calls.append(1) or features(*args, **more)
    together = tokens_of(generate(model, prompts, greedy, 20))
    assert len(calls) <= 13 + 20
    assert together == [tokens_of(generate(model, [p], greedy, 20))[0] for p in prompts]


def test_context_drops_half_a_block_at_a_time():
    starts = [context_start(n, 8) for n in range(1, 21)]
    assert starts == [0] * 8 + [4] * 4 + [8] * 4 + [12] * 4
    for block_size in (1, 2, 3, 7, 8):
        for n in range(1, 50):
            assert 1 <= n - context_start(n, block_size) <= block_size


def test_unequal_prompts_in_one_batch_equal_one_by_one():
    model = gpt()
    prompts = [torch.randint(256, (n,)).tolist() for n in (3, 1, 17, 9)]
    together = tokens_of(generate(model, prompts, greedy, 20))
    assert together == [tokens_of(generate(model, [p], greedy, 20))[0] for p in prompts]


def test_the_layout_for_decoding_changes_no_value():
    model, prompt = gpt(), torch.randint(256, (1, 9))
    before, weights = model(prompt), {k: v.clone() for k, v in model.state_dict().items()}
    lay_out_for_decoding(model)
    torch.testing.assert_close(model(prompt), before)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert model.blocks[0].mlp.fc.weight.stride() == (1, 96)


def test_empty_prompts_are_refused_by_the_loop():
    with pytest.raises(ValueError, match="has no tokens"):
        list(generate(gpt(), [[1], []], greedy, 3))


# ---- logits -> token -----------------------------------------------------------------------------

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 3.0, -9.0]])


def test_distribution_without_filters_is_softmax():
    torch.testing.assert_close(distribution(LOGITS), LOGITS.softmax(-1))
    torch.testing.assert_close(distribution(LOGITS, 0.5), (LOGITS / 0.5).softmax(-1))


def test_temperature_zero_is_argmax_and_a_tiny_one_is_finite():
    assert distribution(LOGITS, 0.0).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    for temperature in (1e-30, 1e-45, 1e-320):  # float32 has the last one as 0
        assert distribution(LOGITS, temperature)[0].tolist() == [1, 0, 0, 0]


def test_top_k_keeps_k_and_renormalises():
    p = distribution(LOGITS, top_k=2)
    torch.testing.assert_close(p[0, :2], LOGITS[0, :2].softmax(-1))
    assert p[0, 2:].tolist() == [0, 0] and p[1].tolist() == [0, 0.5, 0.5, 0]
    torch.testing.assert_close(distribution(LOGITS, top_k=99), LOGITS.softmax(-1))


def test_top_p_keeps_the_fewest_that_reach_it():
    p = LOGITS.softmax(-1)[0]  # 0.644, 0.237, 0.087, 0.032
    for top_p, kept in ((0.6, 1), (0.65, 2), (0.88, 2), (0.9, 3), (0.99, 4), (0.0, 1)):
        got = distribution(LOGITS, top_p=top_p)[0]
        assert int((got > 0).sum()) == kept, top_p
        torch.testing.assert_close(got[:kept], p[:kept] / p[:kept].sum())


def test_min_p_is_a_share_of_the_likeliest():
    p = LOGITS.softmax(-1)[0]
    got = distribution(LOGITS, min_p=float(p[1] / p[0]) - 1e-4)[0]
    assert int((got > 0).sum()) == 2 and got.sum().item() == pytest.approx(1)


def test_choose_inverts_the_cumulated_distribution():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75]])
    for u, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (1 - 1e-12, 3)):
        assert choose(p, torch.tensor([u], dtype=torch.double)).tolist() == [token]
    u = torch.rand(40_000, dtype=torch.double)
    share = (choose(p.expand(40_000, -1), u) == 1).double().mean().item()
    assert share == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 40_000))


# ---- the script ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    write_texts(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main([*TOY, "--steps=30", "--lr=0.01", "--eval_interval=15"])
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch) -> Path:
    """A working folder of the test's own, with that run in it."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_sample_finds_the_newest_checkpoint_and_streams(run, capsys):
    sample.main(["--prompt=3 times", "--max_new_tokens=30", "--device=cpu"])
    out = capsys.readouterr()
    assert out.out.startswith("3 times") and len(out.out) > 20
    assert "out/gpt/best.pt: gpt, step" in out.err.replace("\\", "/")
    assert "may reach 3" in out.err and "sees 16: the oldest are dropped" in out.err
    second = io.StringIO()
    sys.stdout, old = second, sys.stdout
    try:
        sample.main(["--prompt=3 times", "--max_new_tokens=30", "--device=cpu"])
    finally:
        sys.stdout = old
    assert second.getvalue() == out.out


def test_several_prompts_and_samples_are_printed_in_order(run, capsys):
    flags = ["--prompt=1 times", "--prompt=22 times 3 is", "--num_samples=2", "--device=cpu"]
    sample.main([*flags, "--max_new_tokens=12", "--stop=."])
    out = capsys.readouterr().out
    heads = [line for line in out.splitlines() if line.startswith("---")]
    assert heads == [f"--- prompt {p}, sample {s}" for p in (1, 2) for s in (1, 2)]
    assert out.count("22 times 3 is") >= 2 and ".\n" not in out


def test_a_shown_sample_is_the_one_that_a_single_call_gives(run, capsys):
    sample.main(["--prompt=1 times", "--prompt=2 times", "--max_new_tokens=9", "--device=cpu"])
    both = capsys.readouterr().out
    sample.main(["--prompt=2 times", "--max_new_tokens=9", "--device=cpu"])
    assert both.endswith(capsys.readouterr().out)


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--temperature=-1"], "--temperature -1.0 is out of range: choose 0 or more"),
        (["--temperature=nan"], "--temperature nan is out of range"),
        (["--temperature=inf"], "--temperature inf is out of range"),
        (["--top_p=1.5"], "--top_p 1.5 is out of range: choose between 0 and 1"),
        (["--max_new_tokens=0"], "--max_new_tokens 0 is out of range: choose between 1 and"),
        (["--prompt=<|user|>"], "is no special token here"),
        (["--checkpoint=missing.pt"], "there is no checkpoint missing.pt"),
        (["--checkpoint=toy.txt"], "is truncated, or no checkpoint"),
        (["--eval=missing"], "missing is no file or folder here, nor one of stdlib"),
        (["--eval=toy.txt", "--prompt=1"], "--eval and --prompt are two things to do"),
        (["--promt=x"], "there is no flag --promt: did you mean --prompt?"),
    ],
)
def test_bad_input_is_one_sentence(run, flags, message):
    with pytest.raises(ValueError) as error:
        sample.main(flags)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_any_text_is_scored_whole(run, capsys):
    """Beside the sum over windows written out: each token predicted once, from its window."""
    folder, text = Path("texts"), "3 times 4 is 12.\n\nAnd so on, ünd sö weiter."
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(text + name, encoding="utf-8")
    sample.main(["--eval=texts", "--device=cpu", "--batch_size=2"])
    figures = capsys.readouterr().out.split("\n")[-2].split()
    model, tokenizer, _ = checkpoints.load_model(Path("out/gpt/best.pt"), torch.device("cpu"))
    end, T = tokenizer.special_tokens[END_OF_TEXT], model.config.block_size
    ids = torch.tensor([i for x in "ab" for i in (end, *tokenizer.encode(text + x))])
    nll = 0.0
    for start in range(0, len(ids) - 1, T):
        window = ids[start : start + T + 1]
        log_p = model(window[None, :-1])[0].log_softmax(-1)
        nll -= log_p.gather(1, window[1:, None]).sum().item()
    count, size = len(ids) - 1, len(f"{text}a{text}b".encode())
    wanted = [nll / count, math.exp(nll / count), nll / math.log(2) / size]
    assert figures[::2] == ["loss", "perplexity", "bits_per_byte"]
    assert [float(x) for x in figures[1::2]] == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_a_figure_does_not_depend_on_what_the_device_prefers(run, capsys, monkeypatch):
    """A GPU prefers bf16, a CPU does not, and the same checkpoint had two figures."""

    def figures(*flags: str) -> str:
        sample.main(["--eval=toy.txt", "--device=cpu", *flags])
        return capsys.readouterr().out.split("\n")[-2]

    here = figures()
    prefers = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}
    monkeypatch.setattr("sample.precision", lambda dtype, device: prefers[dtype])
    assert figures() == figures("--dtype=fp32") == here
    loss, rounded = (float(line.split()[1]) for line in (here, figures("--dtype=bf16")))
    assert loss != rounded and loss == pytest.approx(rounded, rel=0.01)


def test_a_folder_is_answered_with_a_checkpoint_that_is_there(run):
    for name in ("best.pt", "latest.pt"):
        with pytest.raises(ValueError, match=rf"is a folder: name a checkpoint in it, .*{name}"):
            sample.main(["--checkpoint=out/gpt"])
        Path("out/gpt", name).unlink()


def test_without_any_run_the_remedy_is_named(toy):
    done = subprocess.run(
        [sys.executable, str(ROOT / "sample.py")], capture_output=True, encoding="utf-8", cwd=toy
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no checkpoint below out: run python train.py")

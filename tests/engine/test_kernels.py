"""kernels.py: what is installed on which device, that runs use it, and that it changes no result.

Each kernel by itself stands beside its plain form in test_cpu.py, test_losses.py, test_graphs.py.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import PLACES, TOY, TOY_BERT, TOY_PAIRS, write_pairs

import decoding
import model
import train
from bert import BERT, BERTConfig
from bpe import Tokenizer
from engine import checkpoint as checkpoints
from engine import cpu, graphs, kernels, losses
from engine.processes import pick_device
from model import GPT, GPTConfig
from seq2seq import Seq2Seq, Seq2SeqConfig
from tasks import text


def test_the_concept_files_begin_with_the_plain_forms():
    assert [getattr(model, name) for name in PLACES[model]] == [
        F.scaled_dot_product_attention,
        F.dropout,
        model.plain_cross_entropy,
    ]
    assert decoding.text_steps is decoding.pair_steps is None


def test_each_device_gets_its_own_and_loses_those_of_another():
    kernels.install(torch.device("cpu"))
    assert (model.attention_kernel, model.dropout_kernel) == (cpu.attention, cpu.dropout)
    assert decoding.text_steps is decoding.pair_steps is None
    kernels.install(torch.device("cuda"))
    plain = F.scaled_dot_product_attention, F.dropout
    assert (model.attention_kernel, model.dropout_kernel) == plain
    steps = decoding.text_steps, decoding.pair_steps
    assert steps == (graphs.TextSteps, graphs.StaticAdvance)
    kernels.install(torch.device("mps"))
    assert (model.attention_kernel, model.dropout_kernel) == plain
    assert decoding.text_steps is decoding.pair_steps is None
    assert model.cross_entropy is losses.linear_cross_entropy


def test_a_picked_device_has_its_kernels():
    pick_device("cpu")
    found = model.attention_kernel, model.dropout_kernel, model.cross_entropy
    assert found == (cpu.attention, cpu.dropout, losses.linear_cross_entropy)


@pytest.mark.parametrize("flags", [TOY, TOY_BERT, TOY_PAIRS], ids=["gpt", "bert", "seq2seq"])
def test_a_run_uses_them(toy, monkeypatch, flags):
    write_pairs(toy)
    used = set()

    def watched(name, function):
        return lambda *args, **more: used.add(name) or function(*args, **more)

    for module, name in ((cpu, "attention"), (cpu, "dropout"), (losses, "linear_cross_entropy")):
        monkeypatch.setattr(module, name, watched(name, getattr(module, name)))
    for name in PLACES[model]:  # what is replaced is called by nobody
        monkeypatch.setattr(model, name, None)
    train.main([*flags, "--dropout=0.1", "--steps=1", "--out=run"])
    assert used == {"attention", "dropout", "linear_cross_entropy"}


def test_writing_takes_the_steps_that_are_installed(toy, monkeypatch):
    """As on a GPU, where they are captured: the same steps run on a CPU too."""
    train.main([*TOY, "--steps=2", "--out=run"])
    net, tokenizer, _ = checkpoints.load_model(toy / "run/latest.pt", torch.device("cpu"))
    config = text.SampleFlags(max_new_tokens=20, num_samples=2)
    want, made = text.complete(net, tokenizer, ["1 times"], config), []

    def steps(*args):
        made.append(graphs.TextSteps(*args))
        return made[-1]

    monkeypatch.setattr(decoding, "text_steps", steps)
    assert text.complete(net, tokenizer, ["1 times"], config) == want
    assert len(made) == 1


@pytest.fixture
def cudnn_as_before():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_cudnns_attention_is_for_one_shape_without_mask_and_dropout(cudnn_as_before):
    def allowed(network, *batches) -> bool:
        kernels.install(torch.device("cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        kernels.prefer_cudnn(network, [*batches])
        return torch.backends.cuda.cudnn_sdp_enabled()

    def windows(T: int, **more) -> dict:
        return {"tokens": torch.zeros(2, T, dtype=torch.long), **more}

    gpt = GPT(GPTConfig(20, 8, 1, 2, 8))
    assert allowed(gpt, windows(8), windows(8))
    assert not allowed(gpt, windows(8), windows(7))
    assert not allowed(gpt, windows(8), windows(8, keep=torch.ones(2, 8, dtype=torch.bool)))
    assert not allowed(GPT(GPTConfig(20, 8, 1, 2, 8, dropout=0.1)), windows(8))
    sizes = {"vocab_size": 20, "block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 8}
    bert = BERT(BERTConfig(**sizes, dropout=0.1, attention_dropout=0.0))
    assert allowed(bert, windows(8, mlm_positions=torch.zeros(3)), windows(8))


def test_the_steps_of_gpt_are_for_gpt_alone(monkeypatch):
    """A network of another kind, trained by the same task, would end in an error on a GPU."""

    class Constant(torch.nn.Module):
        config = GPTConfig(vocab_size=320, block_size=16, n_layer=1, n_head=1, n_embd=4)

        def features(self, tokens, caches=None):
            return tokens[..., None].float()

        def head(self, features):
            return torch.nn.functional.one_hot(torch.full(features.shape[:-1], 65), 320).float()

        def make_caches(self):
            return [model.KVCache(16)]

    tokenizer = Tokenizer.train(["a"], 257)
    monkeypatch.setattr(decoding, "text_steps", lambda *args: pytest.fail("they were asked for"))
    flags = text.SampleFlags(max_new_tokens=3, temperature=0.0)
    net = Constant()
    net.register_parameter("weight", torch.nn.Parameter(torch.zeros(())))
    assert text.complete(net, tokenizer, ["x"], flags) == ["AAA"]


MODELS = {
    "gpt": (GPT, GPTConfig(37, 13, 2, 4, 28, 44)),
    "bert": (BERT, BERTConfig(37, 13, 2, 4, 28, 44, dropout=0, attention_dropout=0)),
    "seq2seq": (Seq2Seq, Seq2SeqConfig(37, 13, 2, 4, 28, 44, dropout=0)),
}


def batch_for(name: str) -> dict[str, torch.Tensor]:
    tokens, keep = torch.randint(37, (3, 13)), torch.arange(13) < torch.tensor([[13], [5], [0]])
    targets = torch.randint(37, (3, 13)).masked_fill(~keep, -100)
    if name == "bert":
        places = {"mlm_positions": torch.arange(39), "mlm_targets": targets.flatten()}
        return {"tokens": tokens, "keep": keep, **places, "nsp_targets": torch.tensor([0, 1, 1])}
    source = {"source": tokens.flip(1), "source_keep": keep} if name == "seq2seq" else {}
    return {"tokens": tokens, "targets": targets, **source}


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_of_each_model_are_those_of_the_plain_forms(name):
    Model, config = MODELS[name]
    net, batch, found = Model(config).double(), batch_for(name), []
    for install in (False, True):
        if install:
            kernels.install(torch.device("cpu"))
        sums = net(**batch)
        loss = sum(value for key, value in sums.items() if value.requires_grad)
        found.append([*sums.values(), *torch.autograd.grad(loss, list(net.parameters()))])
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)

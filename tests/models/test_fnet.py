"""models/fnet.py beside transformers' FNet and a transform written out."""

import cmath

import pytest
import torch
from conftest import TOYS, peer
from torch.utils.flop_counter import FlopCounterMode

import sample
import train
from models.fnet import FNet, FNetBlock, FNetConfig

SIZES = {"vocab_size": 29, "block_size": 16, "n_layer": 2, "n_embd": 12, "dropout": 0.0}


def test_the_transform_by_its_formula():
    """The real part of Σ x[s, c] exp(-2πi (ts / T + dc / C)) over places s and channels c."""
    block, x = FNetBlock(FNetConfig(**SIZES)), torch.randn(1, 5, 12)
    block.fourier_norm, block.mlp_norm = torch.nn.Identity(), torch.nn.Identity()
    for p in block.mlp.proj.parameters():
        torch.nn.init.zeros_(p)
    expected = torch.zeros(5, 12)
    for t in range(5):
        for d in range(12):
            expected[t, d] = sum(
                x[0, s, c].item() * cmath.exp(-2j * cmath.pi * (t * s / 5 + d * c / 12)).real
                for s in range(5)
                for c in range(12)
            )
    torch.testing.assert_close(block(x)[0] - x[0], expected, atol=1e-4, rtol=1e-4)


def test_fnet_of_transformers():
    """Encoder and both heads, values and gradients. Theirs has one matrix more behind the
    embeddings, which is the identity here."""
    transformers = peer("transformers")
    config = transformers.FNetConfig(
        vocab_size=29,
        hidden_size=12,
        num_hidden_layers=2,
        intermediate_size=48,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        max_position_embeddings=16,
        type_vocab_size=2,
        pad_token_id=0,
    )
    theirs, ours = transformers.FNetForPreTraining(config).eval(), FNet(FNetConfig(**SIZES)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.2 * torch.randn_like(p))
        theirs.fnet.embeddings.projection.weight.copy_(torch.eye(12))
        theirs.fnet.embeddings.projection.bias.zero_()
    embeddings, head = theirs.fnet.embeddings, theirs.cls.predictions
    modules = {
        "token_embedding": embeddings.word_embeddings,
        "position_embedding": embeddings.position_embeddings,
        "segment_embedding": embeddings.token_type_embeddings,
        "embedding_norm": embeddings.LayerNorm,
        "mlm_dense": head.transform.dense,
        "mlm_norm": head.transform.LayerNorm,
        "pooler": theirs.fnet.pooler.dense,
        "nsp_head": theirs.cls.seq_relationship,
    }
    for i, layer in enumerate(theirs.fnet.encoder.layer):
        modules[f"blocks.{i}.fourier_norm"] = layer.fourier.output.LayerNorm
        modules[f"blocks.{i}.mlp.fc"] = layer.intermediate.dense
        modules[f"blocks.{i}.mlp.proj"] = layer.output.dense
        modules[f"blocks.{i}.mlp_norm"] = layer.output.LayerNorm
    for name, module in modules.items():
        ours.get_submodule(name).load_state_dict(module.state_dict(), strict=False)
    ours.mlm_bias.data.copy_(head.decoder.bias)
    assert {n.rpartition(".")[0] or n for n, _ in ours.named_parameters()} == {
        *modules,
        "mlm_bias",
    }
    tokens, segments = torch.randint(29, (3, 11)), torch.randint(2, (3, 11))
    expected = theirs(input_ids=tokens, token_type_ids=segments)
    words, follows = ours(tokens, segments)
    torch.testing.assert_close(words, expected.prediction_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(follows, expected.seq_relationship_logits, atol=1e-4, rtol=1e-4)
    for logits in (words, expected.prediction_logits):
        logits.square().mean().backward()
    mine, other = (
        m.weight.grad for m in (ours.segment_embedding, embeddings.token_type_embeddings)
    )
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-3)


def test_it_has_no_weights_of_attention_and_its_flops_are_those_of_products():
    sizes = {**SIZES, "n_embd": 128, "block_size": 64}
    fnet, tokens = FNet(FNetConfig(**sizes, nsp=False)), torch.randint(29, (2, 64))
    assert not any("attention" in name for name, _ in fnet.named_parameters())
    positions, targets = torch.arange(0, 128, 20), torch.randint(29, (7,))
    with FlopCounterMode(display=False) as counter:
        fnet(tokens, mlm_positions=positions, mlm_targets=targets)["mlm"].backward()
    products = counter.get_total_flops() / 128
    transforms = 2 * 10 * 128 * 13  # two layers, 128 channels, 2^13 numbers of a row
    assert fnet.flops_per_token() - transforms == pytest.approx(products, rel=0.03)


@pytest.mark.slow
def test_it_trains_and_fills_in(toy, capsys):
    others = ("--model", "--n_head", "--attention_dropout")
    flags = [flag for flag in TOYS["bert"] if not flag.startswith(others)]
    train.main([*flags, "--model=fnet", "--out=f", "--steps=4", "--stop_after=2"])
    train.main(["--resume", "--out=f"])
    capsys.readouterr()
    sample.main(["--checkpoint=f/best.pt", "--prompt=2 times [MASK] is 6"])
    assert capsys.readouterr().out.count("%") == 5

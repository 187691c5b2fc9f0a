"""Our models as Hugging Face has them, for benchmarks and tests to compare with."""

import torch
import torch.nn as nn

from model import GPTConfig
from seq2seq import Seq2Seq


def peer(name: str):
    """The module, or None and a line that says what is missing."""
    try:
        return __import__(name)
    except ImportError:
        print(f"({name} is not installed: its column is missing; pip install {name})")
        return None


def hugging_face_gpt2(transformers, sizes: GPTConfig) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=sizes.vocab_size,
            n_positions=sizes.block_size,
            n_embd=sizes.n_embd,
            n_layer=sizes.n_layer,
            n_head=sizes.n_head,
            n_inner=sizes.n_ff,
            resid_pdrop=sizes.dropout,
            embd_pdrop=sizes.dropout,
            attn_pdrop=sizes.dropout,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


# What Marian's layers call the parts of ours.
MARIAN_NAMES = {
    **{f"attention.{x}": f"self_attn.{x}_proj" for x in "qkv"},
    "attention.proj": "self_attn.out_proj",
    **{f"cross.{x}": f"encoder_attn.{x}_proj" for x in "qkv"},
    "cross.proj": "encoder_attn.out_proj",
    "mlp.fc": "fc1",
    "mlp.proj": "fc2",
    "attention_norm": "self_attn_layer_norm",
    "cross_norm": "encoder_attn_layer_norm",
    "mlp_norm": "final_layer_norm",
}


def marian_name(name: str) -> str:
    """What Marian calls our parameter of that name."""
    if name == "token_embedding.weight":
        return "model.shared.weight"
    side, layer, rest = name.split(".", 2)
    part, kind = rest.rsplit(".", 1)
    return f"model.{side}.layers.{layer}.{MARIAN_NAMES[part]}.{kind}"


def hugging_face_marian(transformers, ours: Seq2Seq, end: int) -> nn.Module:
    """Marian with our sizes, weights and positions: the same function of the tokens."""
    c = ours.config
    both = {}
    for side in ("encoder", "decoder"):
        both |= {f"{side}_layers": c.n_layer, f"{side}_attention_heads": c.n_head}
        both[f"{side}_ffn_dim"] = c.n_ff
    theirs = transformers.MarianMTModel(
        transformers.MarianConfig(
            vocab_size=c.vocab_size,
            d_model=c.n_embd,
            max_position_embeddings=c.block_size,
            activation_function="relu",
            scale_embedding=True,
            dropout=c.dropout,
            attention_dropout=c.attention_dropout,
            share_encoder_decoder_embeddings=True,
            tie_word_embeddings=True,
            pad_token_id=c.vocab_size - 1,
            eos_token_id=end,
            decoder_start_token_id=end,
            forced_eos_token_id=None,
            **both,
        )
    )
    weights = {marian_name(name): weight for name, weight in ours.named_parameters()}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # Theirs has all sines before all cosines; the order is without effect.
            parameter.copy_(ours.positions if "embed_positions" in name else weights.pop(name))
    assert not weights, f"not taken over: {', '.join(weights)}"
    return theirs

"""Our models as Hugging Face has them, for benchmarks and tests to compare with."""

import torch
import torch.nn as nn

from bert import BERT, SEGMENTS
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


# What Hugging Face's BERT calls the parts of ours.
BERT_NAMES = {
    "token_embedding": "bert.embeddings.word_embeddings",
    "position_embedding": "bert.embeddings.position_embeddings",
    "segment_embedding": "bert.embeddings.token_type_embeddings",
    "embedding_norm": "bert.embeddings.LayerNorm",
    "attention.q": "attention.self.query",
    "attention.k": "attention.self.key",
    "attention.v": "attention.self.value",
    "attention.proj": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.fc": "intermediate.dense",
    "mlp.proj": "output.dense",
    "mlp_norm": "output.LayerNorm",
    "mlm_dense": "cls.predictions.transform.dense",
    "mlm_norm": "cls.predictions.transform.LayerNorm",
    "pooler": "bert.pooler.dense",
    "nsp_head": "cls.seq_relationship",
}


def bert_name(name: str) -> str:
    """What Hugging Face's BERT calls our parameter of that name."""
    if name == "mlm_bias":
        return "cls.predictions.bias"
    module, kind = name.rsplit(".", 1)
    if not module.startswith("blocks."):
        return f"{BERT_NAMES[module]}.{kind}"
    _, layer, part = module.split(".", 2)
    return f"bert.encoder.layer.{layer}.{BERT_NAMES[part]}.{kind}"


def hugging_face_bert(transformers, ours: BERT) -> nn.Module:
    """BertForPreTraining, or without NSP BertForMaskedLM, with our sizes and weights. They have
    neither a pre-LN BERT nor one without biases: ValueError."""
    c = ours.config
    if c.pre_ln or not c.bias:
        raise ValueError(f"Hugging Face has no BERT with pre_ln={c.pre_ln} and bias={c.bias}")
    Model = transformers.BertForPreTraining if c.nsp else transformers.BertForMaskedLM
    theirs = Model(
        transformers.BertConfig(
            vocab_size=c.vocab_size,
            max_position_embeddings=c.block_size,
            type_vocab_size=SEGMENTS,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            hidden_size=c.n_embd,
            intermediate_size=c.n_ff,
            hidden_act="gelu",
            hidden_dropout_prob=c.dropout,
            attention_probs_dropout_prob=c.attention_dropout,
            layer_norm_eps=c.ln_eps,
            tie_word_embeddings=True,
            pad_token_id=None,  # its embedding would get no gradient from the input
        )
    )
    weights = {bert_name(name): weight for name, weight in ours.named_parameters()}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(weights.pop(name))
    assert not weights, f"not taken over: {', '.join(weights)}"
    return theirs

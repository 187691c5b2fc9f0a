"""How Hugging Face writes our models: for each task, one table of settings and one of tensors.

Import and export read the same rows. What is not in a table is refused: a setting that we do not
have must have the value that we compute with, and tensors that are missing, surplus or of another
shape are listed in one error. The networks are those of tasks.TABLE.

Two differences are more than names. GPT-2 stores its matrices transposed, and q, k and v in one
matrix. Marian has all sines before all cosines, while Seq2Seq alternates them; so the residual
stream of a trained model is in another order, and every weight that reads, writes or scales it is
reordered.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Get = Callable[[str], Tensor]  # a tensor by Hugging Face's name

# Kinds of modules, with what is done to their weight and their bias to make ours.
KINDS = {
    "weight": {"weight": ""},
    "plain": {"weight": "", "bias": ""},
    "conv1d": {"weight": "transposed", "bias": ""},
    "lone": {"": ""},  # a parameter that is in none of our modules
    "row": {"": "row"},  # such a parameter that is a matrix of one row there
    # Marian's, where the residual stream is in another order:
    "stream_table": {"weight": "columns"},
    "reads_stream": {"weight": "columns", "bias": ""},
    "writes_stream": {"weight": "rows", "bias": "rows"},
}


class Derived(NamedTuple):
    """A tensor that others determine. If a file has it, it is checked and not loaded."""

    what: str
    holds: Callable[[Tensor, Get, Any], bool]  # (tensor, get, our config) -> whether it is right
    make: Callable[[Any], Tensor] | None = None  # our config -> the tensor, if it must be written


class Family(NamedTuple):
    title: str
    model_type: str
    architecture: str
    pipeline: str  # what the hub's search calls the task
    settings: dict[str, tuple[str, Any]]  # theirs -> (ours, their default; None: not set)
    fixed: dict[str, tuple[Any, tuple]]  # theirs -> (their default, what we compute with)
    own: dict[str, Any]  # settings of ours for which they have no other value
    prefix: str  # of all tensors except the heads'; files without heads leave it out
    heads: tuple[str, ...]  # the beginnings of the names that do not have the prefix
    modules: tuple[tuple[str, str, str], ...]  # (theirs, ours, kind); {} is the layer's number
    derived: dict[str, Derived]
    others: tuple[str, ...] = ()  # fields of ours that mapping.py writes, or that only train


def stream_order(C: int) -> Tensor:
    """(C,) indices: theirs[stream_order(C)] is ours. Our order is sine 0, cosine 0, sine 1, …;
    theirs is all sines, then all cosines."""
    return torch.arange(C).view(2, -1).t().flatten()


def same_as(name: str) -> Derived:
    return Derived(name, lambda tensor, get, config: torch.equal(tensor, get(name)))


def is_causal_mask(tensor: Tensor, get: Get, config: Any) -> bool:
    from model import causal_mask

    T = config.block_size
    return tensor.shape == (1, 1, T, T) and torch.equal(tensor[0, 0].bool(), causal_mask(T, T))


def is_masked_bias(tensor: Tensor, get: Get, config: Any) -> bool:
    return tensor.numel() == 1 and tensor.item() <= -1e4


def counts_up(tensor: Tensor, get: Get, config: Any) -> bool:
    T = config.block_size
    return tensor.shape == (1, T) and torch.equal(tensor[0].long(), torch.arange(T))


def is_sinusoids(tensor: Tensor, get: Get, config: Any) -> bool:
    from seq2seq import sinusoids

    T, C = config.block_size, config.n_embd
    if tensor.shape != (T, C):
        return False
    apart = (tensor.float()[:, stream_order(C)] - sinusoids(T, C)).abs().max()
    return apart.item() <= max(1e-6, torch.finfo(tensor.dtype).eps)


def is_one_row(tensor: Tensor, get: Get, config: Any) -> bool:
    return tensor.shape == (1, config.vocab_size)


GPT2 = Family(
    "GPT-2",
    "gpt2",
    "GPT2LMHeadModel",
    "text-generation",
    settings={
        "vocab_size": ("vocab_size", 50257),
        "n_positions": ("block_size", 1024),
        "n_ctx": ("block_size", None),
        "n_layer": ("n_layer", 12),
        "n_head": ("n_head", 12),
        "n_embd": ("n_embd", 768),
        "n_inner": ("n_ff", None),
        "embd_pdrop": ("dropout", 0.1),
        "attn_pdrop": ("dropout", 0.1),
        "resid_pdrop": ("dropout", 0.1),
        "layer_norm_epsilon": ("ln_eps", 1e-5),
    },
    fixed={
        "activation_function": ("gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
        "scale_attn_weights": (True, (True,)),
        "scale_attn_by_inverse_layer_idx": (False, (False,)),
        "reorder_and_upcast_attn": (False, (False,)),
        "add_cross_attention": (False, (False,)),
        "tie_word_embeddings": (True, (True,)),
    },
    own={"pre_ln": True, "bias": True},
    prefix="transformer.",
    heads=("lm_head.",),
    modules=(
        ("transformer.wte", "token_embedding", "weight"),
        ("transformer.wpe", "position_embedding", "weight"),
        ("transformer.h.{}.ln_1", "blocks.{}.attention_norm", "plain"),
        (
            "transformer.h.{}.attn.c_attn",
            "blocks.{}.attention.q blocks.{}.attention.k blocks.{}.attention.v",
            "conv1d",
        ),
        ("transformer.h.{}.attn.c_proj", "blocks.{}.attention.proj", "conv1d"),
        ("transformer.h.{}.ln_2", "blocks.{}.mlp_norm", "plain"),
        ("transformer.h.{}.mlp.c_fc", "blocks.{}.mlp.fc", "conv1d"),
        ("transformer.h.{}.mlp.c_proj", "blocks.{}.mlp.proj", "conv1d"),
        ("transformer.ln_f", "norm", "plain"),
    ),
    derived={
        "lm_head.weight": same_as("transformer.wte.weight"),
        "transformer.h.{}.attn.bias": Derived("the causal mask", is_causal_mask),
        "transformer.h.{}.attn.masked_bias": Derived("-10000 or less", is_masked_bias),
    },
)

ENCODER_MODULES = (
    ("bert.embeddings.word_embeddings", "token_embedding", "weight"),
    ("bert.embeddings.position_embeddings", "position_embedding", "weight"),
    ("bert.embeddings.token_type_embeddings", "segment_embedding", "weight"),
    ("bert.embeddings.LayerNorm", "embedding_norm", "plain"),
    ("bert.encoder.layer.{}.attention.self.query", "blocks.{}.attention.q", "plain"),
    ("bert.encoder.layer.{}.attention.self.key", "blocks.{}.attention.k", "plain"),
    ("bert.encoder.layer.{}.attention.self.value", "blocks.{}.attention.v", "plain"),
    ("bert.encoder.layer.{}.attention.output.dense", "blocks.{}.attention.proj", "plain"),
    ("bert.encoder.layer.{}.attention.output.LayerNorm", "blocks.{}.attention_norm", "plain"),
    ("bert.encoder.layer.{}.intermediate.dense", "blocks.{}.mlp.fc", "plain"),
    ("bert.encoder.layer.{}.output.dense", "blocks.{}.mlp.proj", "plain"),
    ("bert.encoder.layer.{}.output.LayerNorm", "blocks.{}.mlp_norm", "plain"),
)
POOLER = ("bert.pooler.dense", "pooler", "plain")
POSITION_IDS = {"bert.embeddings.position_ids": Derived("0, 1, 2, …", counts_up)}

BERT_FAMILY = Family(
    "BERT",
    "bert",
    "BertForPreTraining",
    "fill-mask",
    settings={
        "vocab_size": ("vocab_size", 30522),
        "max_position_embeddings": ("block_size", 512),
        "num_hidden_layers": ("n_layer", 12),
        "num_attention_heads": ("n_head", 12),
        "hidden_size": ("n_embd", 768),
        "intermediate_size": ("n_ff", 3072),
        "hidden_dropout_prob": ("dropout", 0.1),
        "attention_probs_dropout_prob": ("attention_dropout", 0.1),
        "layer_norm_eps": ("ln_eps", 1e-12),
    },
    fixed={
        "hidden_act": ("gelu", ("gelu",)),
        "type_vocab_size": (2, (2,)),
        "position_embedding_type": ("absolute", ("absolute",)),
        "is_decoder": (False, (False,)),
        "add_cross_attention": (False, (False,)),
        "tie_word_embeddings": (True, (True,)),
    },
    own={"pre_ln": False, "bias": True},
    prefix="bert.",
    heads=("cls.",),
    modules=(
        *ENCODER_MODULES,
        POOLER,
        ("cls.predictions.bias", "mlm_bias", "lone"),
        ("cls.predictions.transform.dense", "mlm_dense", "plain"),
        ("cls.predictions.transform.LayerNorm", "mlm_norm", "plain"),
        ("cls.seq_relationship", "nsp_head", "plain"),
    ),
    derived={
        **POSITION_IDS,
        "cls.predictions.decoder.weight": same_as("bert.embeddings.word_embeddings.weight"),
        "cls.predictions.decoder.bias": same_as("cls.predictions.bias"),
    },
    others=("nsp",),
)


def marian_layer(side: str, attentions: dict[str, str]) -> tuple[tuple[str, str, str], ...]:
    """The modules of one layer. attentions: their names -> ours, from which its norm's follow."""
    there, here, rows = f"model.{side}.layers.{{}}.", f"{side}.{{}}.", []
    for theirs, ours in attentions.items():
        rows += [(f"{theirs}.{x}_proj", f"{ours}.{x}", "reads_stream") for x in "qkv"]
        rows += [(f"{theirs}.out_proj", f"{ours}.proj", "writes_stream")]
        rows += [(f"{theirs}_layer_norm", f"{ours}_norm", "writes_stream")]
    rows += [("fc1", "mlp.fc", "reads_stream"), ("fc2", "mlp.proj", "writes_stream")]
    rows += [("final_layer_norm", "mlp_norm", "writes_stream")]
    return tuple((there + theirs, here + ours, kind) for theirs, ours, kind in rows)


MARIAN = Family(
    "Marian",
    "marian",
    "MarianMTModel",
    "translation",
    settings={
        "vocab_size": ("vocab_size", 58101),
        "decoder_vocab_size": ("vocab_size", None),
        "max_position_embeddings": ("block_size", 1024),
        "encoder_layers": ("n_layer", 12),
        "decoder_layers": ("n_layer", 12),
        "encoder_attention_heads": ("n_head", 16),
        "decoder_attention_heads": ("n_head", 16),
        "d_model": ("n_embd", 1024),
        "encoder_ffn_dim": ("n_ff", 4096),
        "decoder_ffn_dim": ("n_ff", 4096),
        "dropout": ("dropout", 0.1),
        "attention_dropout": ("attention_dropout", 0.0),
        "activation_function": ("activation", "gelu"),
    },
    fixed={
        "activation_dropout": (0.0, (0.0,)),
        "encoder_layerdrop": (0.0, (0.0,)),
        "decoder_layerdrop": (0.0, (0.0,)),
        "scale_embedding": (False, (True,)),
        "normalize_before": (False, (False,)),
        "normalize_embedding": (False, (False,)),
        "add_final_layer_norm": (False, (False,)),
        "static_position_embeddings": (True, (True,)),
        "share_encoder_decoder_embeddings": (True, (True,)),
        "tie_word_embeddings": (True, (True,)),
        "is_encoder_decoder": (True, (True,)),
    },
    own={"bias": True, "ln_eps": 1e-5},
    prefix="model.",
    heads=("lm_head.", "final_logits_bias"),
    modules=(
        ("model.shared", "token_embedding", "stream_table"),
        *marian_layer("encoder", {"self_attn": "attention"}),
        *marian_layer("decoder", {"self_attn": "attention", "encoder_attn": "cross"}),
        ("final_logits_bias", "output_bias", "row"),
    ),
    derived={
        "lm_head.weight": same_as("model.shared.weight"),
        "model.encoder.embed_tokens.weight": same_as("model.shared.weight"),
        "model.decoder.embed_tokens.weight": same_as("model.shared.weight"),
        "model.encoder.embed_positions.weight": Derived("the sinusoids", is_sinusoids),
        "model.decoder.embed_positions.weight": Derived("the sinusoids", is_sinusoids),
        "final_logits_bias": Derived(
            "one row, a number for each token", is_one_row, lambda c: torch.zeros(1, c.vocab_size)
        ),
    },
    others=("output_bias", "label_smoothing"),
)


# ---- Llama and its relatives ---------------------------------------------------------------------


def is_rotation(tensor: Tensor, get: Get, config: Any) -> bool:
    """Old files have the angle by which each pair of channels turns from place to place."""
    from models.llama import rotation_rates

    rates = rotation_rates(config)
    return tensor.shape == rates.shape and torch.allclose(tensor.float(), rates, rtol=1e-2)


LLAMA_MODULES = (
    ("model.embed_tokens", "token_embedding", "weight"),
    ("model.layers.{}.input_layernorm", "blocks.{}.attention_norm", "weight"),
    *(
        (f"model.layers.{{}}.self_attn.{x}_proj", f"blocks.{{}}.attention.{x}", "weight")
        for x in "qkv"
    ),
    ("model.layers.{}.self_attn.o_proj", "blocks.{}.attention.proj", "weight"),
    ("model.layers.{}.post_attention_layernorm", "blocks.{}.mlp_norm", "weight"),
    ("model.layers.{}.mlp.gate_proj", "blocks.{}.mlp.gate", "weight"),
    ("model.layers.{}.mlp.up_proj", "blocks.{}.mlp.fc", "weight"),
    ("model.layers.{}.mlp.down_proj", "blocks.{}.mlp.proj", "weight"),
    ("model.norm", "norm", "weight"),
    ("lm_head", "lm_head", "weight"),
)

LLAMA = Family(
    "Llama",
    "llama",
    "LlamaForCausalLM",
    "text-generation",
    settings={
        "vocab_size": ("vocab_size", 32000),
        "max_position_embeddings": ("block_size", 2048),
        "num_hidden_layers": ("n_layer", 32),
        "num_attention_heads": ("n_head", 32),
        "num_key_value_heads": ("n_kv_head", None),
        "hidden_size": ("n_embd", 4096),
        "head_dim": ("head_dim", None),
        "intermediate_size": ("n_ff", 11008),
        "rms_norm_eps": ("ln_eps", 1e-6),
        "tie_word_embeddings": ("tied", False),
        # Of rotary positions: mapping.py takes them out of the dict that they are in there.
        "rope_theta": ("rope_theta", 10000.0),
        "factor": ("rope_factor", None),
        "original_max_position_embeddings": ("rope_original", None),
    },
    fixed={
        "hidden_act": ("silu", ("silu", "swish")),
        "attention_bias": (False, (False,)),
        "mlp_bias": (False, (False,)),
        "attention_dropout": (0.0, (0.0,)),
        "rope_type": ("default", ("default", "llama3")),
        "low_freq_factor": (1.0, (1.0,)),
        "high_freq_factor": (4.0, (4.0,)),
        "partial_rotary_factor": (1.0, (1.0,)),
    },
    own={"window": 0, "qk_norm": False},
    prefix="model.",
    heads=("lm_head.",),
    modules=LLAMA_MODULES,
    derived={
        "lm_head.weight": same_as("model.embed_tokens.weight"),  # where it is tied
        "model.layers.{}.self_attn.rotary_emb.inv_freq": Derived("the rotation", is_rotation),
    },
    others=("dropout",),
)

MISTRAL = LLAMA._replace(
    title="Mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    settings=LLAMA.settings
    | {
        "max_position_embeddings": ("block_size", 4096 * 32),
        "num_key_value_heads": ("n_kv_head", 8),
        "intermediate_size": ("n_ff", 14336),
        "sliding_window": ("window", 4096),
    },
    own={"qk_norm": False},
)

QWEN3 = LLAMA._replace(
    title="Qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    settings=LLAMA.settings
    | {
        "vocab_size": ("vocab_size", 151936),
        "max_position_embeddings": ("block_size", 32768),
        "num_key_value_heads": ("n_kv_head", 32),
        "head_dim": ("head_dim", 128),
        "intermediate_size": ("n_ff", 22016),
    },
    fixed=LLAMA.fixed | {"use_sliding_window": (False, (False,))},
    own={"window": 0, "qk_norm": True},
    modules=(
        *LLAMA_MODULES,
        ("model.layers.{}.self_attn.q_norm", "blocks.{}.attention.q_norm", "weight"),
        ("model.layers.{}.self_attn.k_norm", "blocks.{}.attention.k_norm", "weight"),
    ),
)

MIXTRAL = MISTRAL._replace(
    title="Mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    settings=MISTRAL.settings
    | {
        "rms_norm_eps": ("ln_eps", 1e-5),
        "sliding_window": ("window", None),
        "rope_theta": ("rope_theta", 1e6),
        "num_local_experts": ("n_expert", 8),
        "num_experts_per_tok": ("n_active", 2),
        "router_aux_loss_coef": ("balance", 0.001),
    },
    fixed=LLAMA.fixed | {"router_jitter_noise": (0.0, (0.0,))},
    modules=(
        *(row for row in LLAMA_MODULES if ".mlp." not in row[0]),
        ("model.layers.{}.block_sparse_moe.gate", "blocks.{}.mlp.router", "weight"),
        *(
            (
                f"model.layers.{{}}.block_sparse_moe.experts.{{expert}}.{theirs}",
                f"blocks.{{}}.mlp.experts.{{expert}}.{ours}",
                "weight",
            )
            for theirs, ours in (("w1", "gate"), ("w3", "fc"), ("w2", "proj"))
        ),
    ),
    others=("dropout", "capacity"),  # which are for training
)


# ---- all of them ---------------------------------------------------------------------------------


def is_pooler(tensor: Tensor, get: Get, config: Any) -> bool:
    return set(tensor.shape) == {config.n_embd}


def with_head(
    architecture: str,
    pipeline: str,
    *own: tuple[str, str, str],
    **fixed: tuple,
) -> Family:
    """A fine-tuned encoder; `own` are the modules of its head. Files of older versions have a
    pooler even if nothing uses it."""
    pooler = Derived("a pooler, which nothing uses", is_pooler)
    unused = {f"{POOLER[0]}.{part}": pooler for part in ("weight", "bias")}
    return BERT_FAMILY._replace(
        title=architecture,
        architecture=architecture,
        pipeline=pipeline,
        fixed=BERT_FAMILY.fixed | fixed,
        heads=("classifier.", "qa_outputs."),
        modules=(*ENCODER_MODULES, *own),
        derived=POSITION_IDS if POOLER in own else POSITION_IDS | unused,
        others=("labels", "pairs", "may_abstain"),
    )


HEAD = ("classifier", "head", "plain")
FAMILIES = {
    "gpt": GPT2,
    "llama": LLAMA,
    "moe": MIXTRAL,
    "bert": BERT_FAMILY,
    "seq2seq": MARIAN,
    "classify": with_head(
        "BertForSequenceClassification",
        "text-classification",
        POOLER,
        HEAD,
        problem_type=(None, (None, "single_label_classification")),
    ),
    "tag": with_head(
        "BertForTokenClassification",
        "token-classification",
        HEAD,
    ),
    "answer": with_head(
        "BertForQuestionAnswering",
        "question-answering",
        ("qa_outputs", "head", "plain"),
    ),
    "similar": with_head("BertModel", "feature-extraction"),
    "complete": GPT2,
    "complete_llama": LLAMA,
    "complete_moe": MIXTRAL,
}
LLAMAS = tuple(task for task, family in FAMILIES.items() if family is LLAMA)
ROTARY = (*LLAMAS, *(task for task, family in FAMILIES.items() if family is MIXTRAL))
WITH_HEAD = ("classify", "tag", "answer")  # tasks for which their BERT has a class with a head
# model_type -> the pretraining task, which is also that of a file without one of the other heads.
BASES = {"gpt2": "gpt", "bert": "bert", "marian": "seq2seq"}
RELATIVES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN3)}
BASES |= dict.fromkeys(RELATIVES, "llama") | {"mixtral": "moe"}


def tokenized_as(family: Family) -> str:
    """The pretraining task whose tokenizer files the family has."""
    base = BASES[family.model_type]
    return "llama" if base in ROTARY else base


def family_of(task: str, config: Any = None) -> Family:
    """The family of a task, which for Llama's relatives depends on our config too. Raises
    ValueError if Hugging Face has no format for it that we know."""
    if task in LLAMAS and config is not None:
        return QWEN3 if config.qk_norm else MISTRAL if config.window else LLAMA
    if task not in FAMILIES:
        raise ValueError(
            f"the task {task!r} is not known to Hugging Face's formats: only "
            f"{', '.join(FAMILIES)} are"
        )
    return FAMILIES[task]

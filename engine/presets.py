"""Named sizes and recipes: `python train.py --preset NAME`. Flags given beside it win over it.

A preset is a dict of flags; flags that it does not name have the default that --help shows. The
sizes of GPT-2 and GPT-3 are those of their papers (Brown et al. 2020, table 2.1).
"""

# The recipe of GPT-3's paper, appendix B, with GPT-2's batch of half a million tokens.
GPT_RECIPE = {
    "model": "gpt",
    "tokenizer": "gpt2",
    "vocab_size": 50257,
    "optimizer": "adamw",
    "lr": 6e-4,
    "warmup": 700,
    "schedule": "cosine",
    "floor": 0.1,
    "tokens_per_step": 2**19,
    "steps": 19_000,  # 10 billion tokens
    "eval_interval": 500,
    "eval_tokens": 2**20,
}

# The recipe of Llama 2 (section 2.2 of its paper), with the batch of GPT_RECIPE where a model is
# small. Its tokenizer is learnt here, at the size of theirs: a published one comes with a
# published model (docs/checkpoints.md).
LLAMA_RECIPE = {
    **GPT_RECIPE,
    "model": "llama",
    "tokenizer": "",
    "pattern": "gpt4",
    "vocab_size": 32000,
    "warmup": 2000,
}
LLAMA2 = {
    **LLAMA_RECIPE,
    "block_size": 4096,
    "tied": False,
    "lr": 3e-4,
    "batch_size": 1,
    "tokens_per_step": 2**22,
    "steps": 500_000,  # 2 trillion tokens
}
LLAMA3 = {**LLAMA2, "vocab_size": 128256, "block_size": 8192, "n_kv_head": 8, "rope_theta": 5e5}
MIXTRAL = {**LLAMA2, "model": "moe", "n_kv_head": 8, "rope_theta": 1e6, "balance": 0.02}
LARGE_LLAMA = {"n_layer": 80, "n_head": 64, "n_kv_head": 8, "n_embd": 8192, "n_ff": 28672}

SHAKESPEARE = {
    "model": "gpt",
    "data": "shakespeare",
    "vocab_size": 1024,
    "block_size": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "batch_size": 32,
    "tokens_per_step": 2048,
    "steps": 640,
    "optimizer": "muon",
    "lr": 7e-3,
    "eval_interval": 320,
    "eval_tokens": 0,
}

# The rungs of lab/ladder.py: the same single characters for all, and a minute and a half.
LADDER = {
    "data": "shakespeare",
    "pattern": "char",
    "vocab_size": 257,
    "block_size": 64,
    "batch_size": 32,
    "tokens_per_step": 2048,
    "optimizer": "muon",
    "cooldown": 1.0,
    "eval_interval": 500,
    "eval_tokens": 0,
}
RECURRENT = {**LADDER, "n_layer": 1, "n_embd": 256}
NGRAM = {
    "model": "ngram",
    "data": "shakespeare",
    "pattern": "char",
    "vocab_size": 257,
    "order": 7,
    "eval_tokens": 0,
}

# The recipe of the 2017 paper (section 5): Adam, warmup, then the inverse square root of the step,
# in batches of about 25,000 tokens; the peak rate is (512 · 4000)^-0.5.
TRANSFORMER = {
    "model": "seq2seq",
    "data": "wmt14",
    "vocab_size": 37000,
    "block_size": 256,
    "n_layer": 6,
    "n_head": 8,
    "n_embd": 512,
    "batch_size": 96,
    "tokens_per_step": 96 * 256,
    "steps": 100_000,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "beta2": 0.98,
    "lr": 7e-4,
    "warmup": 4000,
    "schedule": "inverse_sqrt",
    "clip": 0.0,
    "eval_interval": 1000,
}

TINY = {
    "model": "seq2seq",
    "data": "multi30k",
    "vocab_size": 6000,
    "block_size": 128,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "n_ff": 256,
    "dropout": 0.3,
    "batch_size": 32,
    "tokens_per_step": 4096,
    "steps": 3800,
    "warmup": 100,
    "beta2": 0.98,
    "lr": 5e-3,
    "cooldown": 0.6,
    "eval_interval": 250,
    "eval_tokens": 0,
    "dtype": "bf16",  # where the processor has instructions for it, else fp32
}

# Devlin et al. 2019, appendix A.2: the first nine tenths of their steps, in rows of 128. The rest
# goes on from there (Adam's averages begin anew): --preset bert-base --init FILE --row_length 512
# --tokens_per_step 131072 --steps 100000 --lr 1e-5 --warmup 0 --floor 0
BERT_RECIPE = {
    "model": "bert",
    "data": "wikitext103",
    "vocab_size": 30522,
    "block_size": 512,
    "row_length": 128,
    "batch_size": 32,
    "tokens_per_step": 256 * 128,
    "steps": 900_000,
    "optimizer": "adamw",
    "beta2": 0.999,
    "weight_decay": 0.01,
    "lr": 1e-4,
    "warmup": 10_000,
    "cooldown": 1.0,
    "floor": 0.1,
    "eval_interval": 5000,
}

# Three minutes on two cores. No dropout, because nothing is memorised in so short a time. Steps of
# 512 or 1,024 tokens, or a rate of 1e-2, teach it no more than how frequent each word is.
PYDOCS = {
    "model": "bert",
    "data": "pydocs",
    "vocab_size": 2048,
    "block_size": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 128,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "batch_size": 32,
    "tokens_per_step": 2048,
    "steps": 4000,
    "lr": 3e-3,
    "eval_interval": 500,
    "eval_tokens": 0,
    "dtype": "bf16",  # where the processor has instructions for it, else fp32
}

# The first hour: a minute on two cores, or a few on one GPU.
TOY = {
    "model": "gpt",
    "vocab_size": 4096,
    "block_size": 128,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "batch_size": 16,
    "tokens_per_step": 2048,
    "steps": 500,
    "lr": 7e-3,
    "eval_interval": 250,
}
TOY_GPU = {
    "model": "gpt",
    "vocab_size": 8192,
    "block_size": 512,
    "n_layer": 8,
    "n_head": 8,
    "n_embd": 512,
    "dropout": 0.1,
    "batch_size": 64,
    "tokens_per_step": 2**16,
    "steps": 1500,
    "eval_interval": 250,
}

WINDOWS = {"window": 17, "sparse_block": 16}

PRESETS = {
    "toy": TOY,
    "toy-gpu": TOY_GPU,
    "llama-toy": {**TOY, "model": "llama"},
    "llama-toy-gpu": {**TOY_GPU, "model": "llama"},
    # Two experts of half the width: a token pays what it pays in llama-toy.
    "moe-toy": {**TOY, "model": "moe", "n_ff": 176},
    "variant-toy": {**TOY, "model": "variant"},
    "sparse-toy": {**TOY, "model": "sparse_gpt", **WINDOWS},
    # Tiny Shakespeare on two cores, in 98 seconds and in ten minutes. Short windows win: for equal
    # tokens, windows of 128 instead of 64 cost 0.025 nats per character, half the vocabulary 0.03.
    "shakespeare": SHAKESPEARE,
    "llama-shakespeare": {**SHAKESPEARE, "model": "llama"},
    "moe-shakespeare": {**SHAKESPEARE, "model": "moe", "n_ff": 176},
    "ngram-shakespeare": NGRAM,
    "addk-shakespeare": {**NGRAM, "order": 4, "smoothing": "add_k", "added": 0.1},
    "backoff-shakespeare": {**NGRAM, "smoothing": "stupid_backoff"},
    "cbow-shakespeare": {
        **LADDER,
        "model": "cbow",
        "context": 3,
        "optimizer": "adamw",
        "lr": 1e-2,
        "steps": 8000,
    },
    "nnlm-shakespeare": {
        **LADDER,
        "model": "nnlm",
        "n_embd": 32,
        "n_hidden": 512,
        "lr": 1e-2,
        "steps": 1600,
    },
    "cnn-shakespeare": {
        **LADDER,
        "model": "cnn",
        "n_layer": 4,
        "n_embd": 128,
        "lr": 1e-2,
        "steps": 1100,
    },
    "rnn-shakespeare": {**RECURRENT, "model": "rnn", "lr": 7e-3, "steps": 2200},
    "gru-shakespeare": {**RECURRENT, "model": "gru", "lr": 2e-2, "steps": 1200},
    "lstm-shakespeare": {**RECURRENT, "model": "lstm", "lr": 3e-2, "steps": 1400},
    "gpt-shakespeare": {
        **LADDER,
        "model": "gpt",
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "lr": 7e-3,
        "steps": 1000,
    },
    "shakespeare-10min": {
        **SHAKESPEARE,
        "n_head": 3,
        "n_embd": 192,
        "dropout": 0.15,
        "steps": 2250,
        "warmup": 30,
        "cooldown": 0.6,
        "eval_interval": 250,
        "dtype": "bf16",  # where the processor has instructions for it, else fp32
    },
    # Dates in many spellings to ISO 8601, in 90 seconds on two cores. Small steps win: at width
    # 128, 500 steps of 4,096 tokens reach 98.9%, 900 of 2,048 in the same time 99.6%.
    "dates": {
        "model": "seq2seq",
        "data": "dates",
        "pattern": "char",
        "vocab_size": 320,
        "block_size": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 96,
        "n_ff": 256,
        "dropout": 0.0,
        "batch_size": 16,
        "tokens_per_step": 1024,
        "steps": 1750,
        "lr": 4e-3,
        "cooldown": 0.7,
        "eval_interval": 500,
    },
    # Multi30k with a small model, in 25 to 30 minutes on two cores; the sizes are those of
    # Wu et al. 2021 (arXiv:2105.14462).
    "transformer-tiny": TINY,
    # The same on one GPU, with the vocabulary and the length of training of that paper.
    "multi30k-gpu": {
        **TINY,
        "vocab_size": 10000,
        "steps": 12_000,
        "warmup": 500,
        "eval_interval": 500,
        "dtype": "auto",
    },
    # The sizes of the papers.
    "transformer-base": TRANSFORMER,
    "transformer-big": {
        **TRANSFORMER,
        "n_head": 16,
        "n_embd": 1024,
        "dropout": 0.3,
        "steps": 300_000,
        "lr": 5e-4,
        "batch_size": 48,
    },
    "bert-base": {**BERT_RECIPE, "n_layer": 12, "n_head": 12, "n_embd": 768},
    "bert-large": {**BERT_RECIPE, "n_layer": 24, "n_head": 16, "n_embd": 1024},
    # Turc et al. 2019 (arXiv:1908.08962).
    "bert-tiny": {**BERT_RECIPE, "n_layer": 2, "n_head": 2, "n_embd": 128},
    "bert-mini": {**BERT_RECIPE, "n_layer": 4, "n_head": 4, "n_embd": 256},
    "bert-small": {**BERT_RECIPE, "n_layer": 4, "n_head": 8, "n_embd": 512},
    "bert-medium": {**BERT_RECIPE, "n_layer": 8, "n_head": 8, "n_embd": 512},
    "pydocs": PYDOCS,
    "fnet-pydocs": {**PYDOCS, "model": "fnet"},
    # As in Longformer, [CLS] is global.
    "sparse-pydocs": {**PYDOCS, "model": "sparse_bert", **WINDOWS, "n_global": 1},
    "linformer-pydocs": {**PYDOCS, "model": "linformer", "n_keys": 16},
    # The lowest loss of masked words in the same three minutes, after Geiping and Goldstein 2022
    # (arXiv:2212.14034): LayerNorm first, no pairs of sentences, more masks (Wettig et al. 2022,
    # arXiv:2202.08005).
    "crammed": {**PYDOCS, "pre_ln": True, "nsp": False, "mlm_rate": 0.3, "steps": 4200},
    # Memorises a text of some thirty lines: give it as --data and as --valid. The seed is that of
    # the validation, so that both cut the text at the same places.
    "few-lines": {
        **PYDOCS,
        "vocab_size": 1024,
        "block_size": 72,
        "n_layer": 3,
        "n_embd": 256,
        "mlm_rate": 0.4,
        "tokens_per_step": 72 * 64,
        "batch_size": 64,
        "steps": 1000,
        "lr": 2e-3,
        "eval_interval": 250,
        "seed": 0,
    },
    "gpt1": {
        **GPT_RECIPE,
        "tokenizer": "",  # one of the same size from the data: GPT-1's was not byte-level
        "vocab_size": 40478,
        "block_size": 512,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "pre_ln": False,
        "lr": 2.5e-4,
        "warmup": 2000,
        "batch_size": 64,
    },
    "gpt2": {**GPT_RECIPE, "n_layer": 12, "n_head": 12, "n_embd": 768, "batch_size": 32},
    "gpt2-medium": {
        **GPT_RECIPE,
        "n_layer": 24,
        "n_head": 16,
        "n_embd": 1024,
        "lr": 3e-4,
        "batch_size": 16,
    },
    "gpt2-large": {
        **GPT_RECIPE,
        "n_layer": 36,
        "n_head": 20,
        "n_embd": 1280,
        "lr": 2.5e-4,
        "batch_size": 8,
    },
    "gpt2-xl": {
        **GPT_RECIPE,
        "n_layer": 48,
        "n_head": 25,
        "n_embd": 1600,
        "lr": 2e-4,
        "batch_size": 4,
    },
    "gpt3-6.7b": {
        **GPT_RECIPE,
        "block_size": 2048,
        "n_layer": 32,
        "n_head": 32,
        "n_embd": 4096,
        "lr": 1.2e-4,
        "batch_size": 1,
    },
    # The sizes of llama2.c's stories, of SmolLM2, Llama 2 and Llama 3.
    "llama-15m": {
        **LLAMA_RECIPE,
        "block_size": 256,
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 288,
        "n_ff": 768,
        "batch_size": 128,
    },
    "llama-110m": {
        **LLAMA_RECIPE,
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "n_ff": 2048,
        "block_size": 1024,
        "batch_size": 32,
    },
    "smollm2-135m": {
        **LLAMA_RECIPE,
        "vocab_size": 49152,
        "block_size": 2048,
        "n_layer": 30,
        "n_head": 9,
        "n_kv_head": 3,
        "n_embd": 576,
        "n_ff": 1536,
        "rope_theta": 1e5,
        "lr": 3e-3,
        "schedule": "linear",
        "cooldown": 0.2,
        "floor": 0.0,
        "batch_size": 16,
        "tokens_per_step": 2**20,
        "steps": 2_000_000,  # 2 trillion tokens
    },
    "llama2-7b": {**LLAMA2, "n_layer": 32, "n_head": 32, "n_embd": 4096, "n_ff": 11008},
    "llama2-13b": {**LLAMA2, "n_layer": 40, "n_head": 40, "n_embd": 5120, "n_ff": 13824},
    "llama2-70b": {**LLAMA2, **LARGE_LLAMA, "lr": 1.5e-4},
    "mixtral-8x7b": {**MIXTRAL, "n_layer": 32, "n_head": 32, "n_embd": 4096, "n_ff": 14336},
    "llama3-8b": {**LLAMA3, "n_layer": 32, "n_head": 32, "n_embd": 4096, "n_ff": 14336},
    "llama3-70b": {**LLAMA3, **LARGE_LLAMA, "lr": 1.5e-4},
    "gpt3-175b": {
        **GPT_RECIPE,
        "block_size": 2048,
        "n_layer": 96,
        "n_head": 96,
        "n_embd": 12288,
        "lr": 0.6e-4,
        "batch_size": 1,
    },
}


FIRST_HOUR = {
    "gpt": "toy",
    "llama": "llama-toy",
    "moe": "moe-toy",
    "variant": "variant-toy",
    "sparse_gpt": "sparse-toy",
    "bert": "pydocs",
    "fnet": "fnet-pydocs",
    "sparse_bert": "sparse-pydocs",
    "linformer": "linformer-pydocs",
}


def first_hour(task: str, device: str, data: str) -> str:
    """The preset of a run that names none; "" for none. "dates" is the recipe for its data only."""
    if task == "seq2seq":
        return "dates" if data in ("", "dates") else "transformer-tiny"
    name = FIRST_HOUR.get(task, "")  # else the defaults
    return f"{name}-gpu" if f"{name}-gpu" in PRESETS and device == "cuda" else name

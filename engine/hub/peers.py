"""Hugging Face's versions of our models, for benchmarks and tests to compare with."""

import torch.nn as nn

from bert import Encoder
from engine.hub.families import family_of
from engine.hub.mapping import their_settings, to_theirs
from model import GPTConfig
from models.llama import Llama
from seq2seq import Seq2Seq


def peer(name: str):
    """The module of this name; if it is not installed, None, and a line is printed that says so."""
    try:
        return __import__(name)
    except ImportError:
        print(f"({name} is not installed: its column is missing; pip install {name})")
        return None


def hugging_face_gpt2(transformers, sizes: GPTConfig) -> nn.Module:
    """Their GPT-2 with our sizes, but weights of its own."""
    settings = their_settings("gpt", sizes)
    ids = {"bos_token_id": None, "eos_token_id": None}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config.from_dict({**settings, **ids}))


def hugging_face_llama(transformers, ours: Llama, task: str = "llama") -> nn.Module:
    """Their Llama, Mistral, Qwen3 or, with the task "moe", Mixtral with our sizes and weights."""
    settings = their_settings(task, ours.config)
    kind = settings["architectures"][0].removesuffix("ForCausalLM")
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = getattr(transformers, f"{kind}Config").from_dict({**settings, **ids})
    theirs = getattr(transformers, f"{kind}ForCausalLM")
    if task == "moe":  # whose experts are one tensor there: only loading puts them together
        state = to_theirs(task, ours.config, ours.state_dict())
        return theirs.from_pretrained(None, config=config, state_dict=state)
    return with_our_weights(theirs(config), task, ours)


def hugging_face_marian(transformers, ours: Seq2Seq, start: int, end: int) -> nn.Module:
    """Their Marian with our sizes and weights, so the same function of the tokens."""
    ids = {"eos_token_id": end, "decoder_start_token_id": start, "forced_eos_token_id": None}
    ids |= {"pad_token_id": ours.config.vocab_size - 1}
    settings = {**their_settings("seq2seq", ours.config), **ids}
    theirs = transformers.MarianMTModel(transformers.MarianConfig.from_dict(settings))
    return with_our_weights(theirs, "seq2seq", ours)


def hugging_face_encoder(transformers, ours: Encoder, task: str = "bert") -> nn.Module:
    """BertForPreTraining (without NSP, BertForMaskedLM) or the class of a fine-tuning task, with
    our sizes and weights. Raises ValueError if ours is pre-LN or has no biases, as theirs has no
    such forms."""
    # If padding had an id, that token's embedding would get no gradient from the input.
    settings = {**their_settings(task, ours.config), "pad_token_id": None}
    Model = getattr(transformers, settings["architectures"][0])
    return with_our_weights(Model(transformers.BertConfig.from_dict(settings)), task, ours)


def with_our_weights(theirs: nn.Module, task: str, ours: nn.Module) -> nn.Module:
    tensors = to_theirs(task, ours.config, ours.state_dict())
    missing, surplus = theirs.load_state_dict(tensors, strict=False)
    derived = family_of(task, ours.config).derived.keys()
    assert not surplus and set(missing) <= derived, (missing, surplus)
    return theirs

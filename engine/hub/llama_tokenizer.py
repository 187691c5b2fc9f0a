"""The tokenizers of Llama and its relatives, from tokenizer.json or tokenizer.model: byte-level BPE
(Llama 3, Qwen, SmolLM2), or SentencePiece's BPE with byte fallback (Llama 2, Mistral).

A tokenizer.json is followed as it is written, and a tokenizer.model as SentencePiece does: so the
models were trained. Version 5 of transformers takes the vocabulary alone where
tokenizer_config.json names a class of its own. With GPT2Tokenizer, as SmolLM2 has it, the ids are
others then where several spaces stand before a digit; with LlamaTokenizer, for a text that begins
with a space.
"""

from pathlib import Path

from bpe import Tokenizer
from data.byte_fallback import ByteFallbackBPE
from data.tokens import BEGINS, ENDS, AnyTokenizer, ending
from engine.hub.declared import ADDED, MAP, SETTINGS
from engine.hub.tokenizer_files import (
    QWEN_PATTERN,
    acts_on_ids,
    check_class,
    check_settings,
    declared_in,
    from_tokenizer_json,
    read_json,
    read_whole,
)

MODEL = "tokenizer.model"
QWEN_CLASS = "Qwen2Tokenizer"


def read_llama_tokenizer(folder: Path) -> AnyTokenizer:
    """The tokenizer of a folder. Raises ValueError for one that ours cannot equal."""
    settings, special_map, added = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in (SETTINGS, MAP, ADDED)
    )
    path, listed = folder / "tokenizer.json", []
    check_class(folder, "llama", settings)
    check_settings({"split_special_tokens": False}, settings, folder / SETTINGS)
    if path.is_file():
        state = read_json(path)
        tokenizer = from_contents(state, settings, path)
        listed = state.get("added_tokens") or []
    elif (folder / MODEL).is_file():
        path = folder / MODEL
        try:
            tokenizer = ByteFallbackBPE.from_sentencepiece(read_whole(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        check_settings({"add_bos_token": True, "add_eos_token": False}, settings, folder / SETTINGS)
    else:
        raise ValueError(f"{folder} holds neither tokenizer.json nor {MODEL}")
    if settings.get("added_tokens_decoder") is not None:  # which replaces the two older files
        special_map, added = {}, {}
    for name, token in declared_in(folder, settings, special_map, added, listed, {}).items():
        known = tokenizer.special_tokens.get(name)
        if known is None or token.id not in (None, known):
            raise ValueError(
                f"{folder}: {token.where}: the added token {name[:80]!r} is not in {path.name}, or "
                "has another id there: not supported"
            )
    return with_an_end(tokenizer, path)


def from_contents(state: dict, settings: dict, path: Path) -> Tokenizer | ByteFallbackBPE:
    """The tokenizer of tokenizer.json's content, beside tokenizer_config.json's."""
    model, where = state.get("model"), path.with_name(SETTINGS)
    if isinstance(model, dict) and model.get("byte_fallback"):
        try:
            tokenizer = ByteFallbackBPE.from_tokenizer_json(state)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        adds_first = tokenizer.adds_bos
    else:
        tokenizer = from_tokenizer_json(state, path, "llama")
        adds_first = acts_on_ids(state.get("post_processor")) is not None
        check_settings({"add_prefix_space": False}, settings, where)
        is_qwen = tokenizer.nfc and tokenizer.pattern == QWEN_PATTERN
        if str(settings.get("tokenizer_class")).startswith(QWEN_CLASS) and not is_qwen:
            raise ValueError(f"{path} splits texts otherwise than {QWEN_CLASS} does")
    check_settings({"add_bos_token": adds_first, "add_eos_token": False}, settings, where)
    first = next((name for name in BEGINS if name in tokenizer.special_tokens), None)
    if adds_first != (first is not None):
        raise ValueError(
            f"{path} has the token {first}, but does not put it before a text: not supported"
        )
    return with_an_end(tokenizer, path)


def with_an_end(tokenizer: AnyTokenizer, path: Path) -> AnyTokenizer:
    """The tokenizer, if it has a token that ends a text; else ValueError."""
    if ending(tokenizer) not in tokenizer.special_tokens:
        raise ValueError(f"{path} has none of {', '.join(ENDS)}, which end a text: not supported")
    return tokenizer

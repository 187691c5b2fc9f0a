"""The tokenizer files of Hugging Face, in and out: tokenizer.json, or vocab.json and merges.txt,
or vocab.txt, or vocab.json and the two *.spm of a translator; and the settings beside them.

These files can describe more than we have: byte-level BPE split by one of our patterns, BERT's
WordPiece and Marian's SentencePiece. Every field that changes ids is checked, and a value that we
do not support is refused, with the name of its field.

`llama_tokenizer.py` reads what Llama's relatives have. Left out: Unigram in a tokenizer.json;
settings for padding and truncation.
"""

import json
import re
from pathlib import Path
from typing import Any

from bpe import CHAR_PATTERN, GPT2_PATTERN, GPT4_PATTERN, Tokenizer, unique_keys
from data.byte_fallback import ByteFallbackBPE
from data.encoding import CLS, MASK, PAD, SEP, SPECIAL
from data.gpt2_files import byte_characters
from data.sentencepieces import (
    END_PIECE,
    FILES,
    SPECIAL_PIECES,
    START_PIECE,
    UNK_PIECE,
    SentencePieces,
)
from data.tokens import BEGINS, END_OF_TEXT, AnyTokenizer
from engine.hub.declared import (
    ADDED,
    BY_CLASS,
    MAP,
    SETTINGS,
    Declared,
    declared_tokens,
    new_tokens,
)
from engine.hub.wordpiece_json import wordpiece_from_json, wordpiece_to_json
from wordpiece import UNK, WordPiece

TEMPLATE = "chat_template.jinja"
# vocab.txt is BERT's, *.spm are Marian's.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    SETTINGS,
    MAP,
    ADDED,
    "source.spm",
    "target.spm",
    TEMPLATE,
)
MOST_JSON = 100_000_000  # bytes of a file; GPT-2's tokenizer.json has 1.4 million, a .spm 0.8


def parse_object(text: bytes, path: Path) -> dict:
    try:
        found = json.loads(text.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: no JSON ({str(error)[:100]})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: its JSON is no object")
    return found


def read_whole(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"there is no {path}")
    if path.stat().st_size > MOST_JSON:
        raise ValueError(f"{path} has more than {MOST_JSON:,} bytes: that is no {path.name}")
    return path.read_bytes()


def read_json(path: Path) -> dict:
    return parse_object(read_whole(path), path)


# ---- out -----------------------------------------------------------------------------------------

# Our patterns in the syntax of Oniguruma, the engine of Hugging Face's tokenizers. There, {1,3}+ is
# not possessive but repeats the repetition, and (?m) means what (?s) means here. ($ matches at the
# end of a line there, but where we use it, all newlines have been matched already.)
SPLITS = {
    GPT2_PATTERN: GPT2_PATTERN,
    GPT4_PATTERN: GPT4_PATTERN.replace("{1,3}+", "{1,3}"),
    CHAR_PATTERN: "(?m:.)",
}
# Two that mean the same in all engines, of Llama 3, and of Qwen2 and Qwen3.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
SPLITS |= {pattern: pattern for pattern in (LLAMA3_PATTERN, QWEN_PATTERN)}
# SmolLM2's: single digits first, then GPT-2's pattern in each piece between them.
DIGITS_PATTERN = (
    r"'(?:[dmst]|ll|re|ve)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s++$|\s++(?=\p{N})|\s+(?!\S)|\s"
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def pre_tokenizer(pattern: str) -> dict:
    """How tokenizer.json says that text is split by one of our patterns."""
    if pattern == DIGITS_PATTERN:
        steps = [DIGITS, {**BYTE_LEVEL, "use_regex": True}]
    else:
        split = {"Regex": SPLITS[pattern]}
        steps = [{"type": "Split", "pattern": split, "behavior": "Isolated", "invert": False}]
        steps.append({**BYTE_LEVEL, "use_regex": False})
    return {"type": "Sequence", "pretokenizers": steps}


SPACES = "".join(c for c in map(chr, range(0x3001)) if c.isspace())  # as in str.split


def framing(task: str, special: dict[str, int]) -> tuple[dict | None, dict | None]:
    """(normalizer, post_processor): what a task does to a text before and after it is split.

    BERT collapses white space, puts one space in front and places the tokens between [CLS] and
    [SEP]; the encoder-decoder strips white space and appends the end token; GPT does nothing, and
    Llama puts its first token in front, if its tokenizer has one.
    """
    first = next((name for name in BEGINS if name in special), "")
    if task == "gpt" or (task == "llama" and not first):
        return None, None

    def place(pieces: list[tuple[str, int]]) -> list[dict]:
        return [
            {"SpecialToken" if name in special else "Sequence": {"id": name, "type_id": segment}}
            for name, segment in pieces
        ]

    def replaced(pattern: str, content: str) -> dict:
        return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}

    if task == "bert":
        used, single = (CLS, SEP), [(CLS, 0), ("A", 0), (SEP, 0)]
        pair = [*single, ("B", 1), (SEP, 1)]
        steps = [replaced(f"[{SPACES}]+", " "), replaced(r"\A | \z", "")]
        steps.append({"type": "Prepend", "prepend": " "})
    elif task == "llama":
        used, single, steps = (first,), [(first, 0), ("A", 0)], []
        pair = [*single, (first, 1), ("B", 1)]
    else:
        used, single = (END_OF_TEXT,), [("A", 0), (END_OF_TEXT, 0)]
        pair = [*single, ("B", 1), (END_OF_TEXT, 1)]
        steps = [replaced(rf"\A[{SPACES}]+|[{SPACES}]+\z", "")]
    template = {"type": "TemplateProcessing", "single": place(single), "pair": place(pair)}
    ids = {name: {"id": name, "ids": [special[name]], "tokens": [name]} for name in used}
    normalizer = {"type": "Sequence", "normalizers": steps} if steps else None
    return normalizer, {**template, "special_tokens": ids}


def tokenizer_json(tokenizer: AnyTokenizer, task: str) -> dict:
    """The content of tokenizer.json. Raises ValueError for a pattern that cannot be written there.

    Their tokenizer finds the names of special tokens in every text, ours only if they are allowed.
    """
    if isinstance(tokenizer, WordPiece):
        return wordpiece_to_json(tokenizer)
    if isinstance(tokenizer, ByteFallbackBPE):
        return tokenizer.to_tokenizer_json()
    if tokenizer.pattern not in (*SPLITS, DIGITS_PATTERN):
        raise ValueError(
            f"the pattern {tokenizer.pattern!r} has no known wording in tokenizer.json"
        )
    character = {byte: c for c, byte in byte_characters().items()}

    def text(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    special = sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    normalizer, post_processor = framing(task, tokenizer.special_tokens)
    if tokenizer.nfc:
        normalizer = {"type": "NFC"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for name, i in special
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer(tokenizer.pattern),
        "post_processor": post_processor,
        "decoder": {**BYTE_LEVEL, "use_regex": True},
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token"), None),
            **dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"), ""),
            **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
            "vocab": {text(token): i for token, i in tokenizer.ranks.items()} | dict(special),
            "merges": [[text(a), text(b)] for a, b in tokenizer.merges()],
        },
    }


# The classes of transformers' tokenizers that compute what we do, and what they call their tokens.
# Only those of ANY use a tokenizer.json as it is: the others take its vocabulary and merges alone.
ANY = ("PreTrainedTokenizer", "TokenizersBackend")
CLASSES = {
    "gpt": ("GPT2Tokenizer",),
    "llama": ("LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer"),
    "bert": ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer"),
    "seq2seq": ("MarianTokenizer",),
}
DEFAULTS = {
    "gpt": dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    "bert": {"unk_token": UNK, "sep_token": SEP, "pad_token": PAD, "cls_token": CLS}
    | {"mask_token": MASK},
    "seq2seq": {"eos_token": END_PIECE, "unk_token": UNK_PIECE, "pad_token": START_PIECE},
}
# What a tokenizer of bytes must say in tokenizer_config.json, if it says it.
BYTES_SETTINGS = dict.fromkeys(("add_prefix_space", "add_bos_token", "add_eos_token"), False)


def read_tokenizer(folder: Path, task: str) -> AnyTokenizer:
    """The tokenizer of a folder, from the first that is there: a translator's *.spm,
    tokenizer.json, vocab.json and merges.txt, vocab.txt. What the settings beside it say must be
    what we do. Raises ValueError for a tokenizer that ours cannot equal."""
    settings, special_map, added = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in (SETTINGS, MAP, ADDED)
    )
    if settings.get("added_tokens_decoder") is not None:  # which replaces the two older files
        special_map, added = {}, {}
    path, listed = folder / "tokenizer.json", []
    as_it_is = check_class(folder, task, settings)
    check_settings({"split_special_tokens": False}, settings, folder / SETTINGS)
    if task == "seq2seq" and any((folder / name).is_file() for name in FILES[:2]):
        declared = declared_in(folder, settings, special_map, added, [], DEFAULTS[task])
        return read_sentencepieces(folder, settings, declared)
    if path.is_file():
        state = read_json(path)
        if is_wordpiece(state):
            try:
                tokenizer = wordpiece_from_json(state)
            except ValueError as error:
                raise ValueError(f"{path.parent}: {error}") from None
        else:
            tokenizer = from_tokenizer_json(state, path, task)
        listed = state.get("added_tokens") or []
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        path = folder / "merges.txt"
        vocab = read_json(folder / "vocab.json")
        try:
            lines = read_whole(path).decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        pairs = [line.split(" ") for line in lines if line]
        pairs = pairs[1:] if pairs and pairs[0][0] == "#version:" else pairs
        made = {"".join(pair) for pair in pairs} | byte_characters().keys()
        # The files do not say which tokens are special: we take those that look like it and that no
        # merge makes.
        named = re.compile(r"<.+>|\[.+\]").fullmatch
        special = {name: i for name, i in vocab.items() if name not in made and named(name)}
        tokenizer = from_merges(vocab, pairs, GPT2_PATTERN, special, path)
    elif (folder / "vocab.txt").is_file():
        path, lowercase = folder / "vocab.txt", settings.get("do_lower_case", True)
        tokenizer = WordPiece.from_vocab(path, lowercase=lowercase)
    elif any(folder.glob("*.spm")) or any(folder.glob("*.model")):
        raise ValueError(
            f"{folder} has a SentencePiece tokenizer: only a translator's is read, from "
            f"{', '.join(FILES)}"
        )
    else:
        raise ValueError(f"{folder} holds no tokenizer.json, vocab.txt, or vocab.json, merges.txt")
    if isinstance(tokenizer, WordPiece):
        if not as_it_is and not tokenizer.lowercase and settings.get("do_lower_case") is None:
            raise ValueError(
                f"{folder}: tokenizer.json keeps capitals, but transformers lower-cases where "
                f"{SETTINGS} has no do_lower_case: write it there"
            )
        ours = {"do_lower_case": tokenizer.lowercase, "tokenize_chinese_chars": True}
        ours |= {"do_basic_tokenize": True, "strip_accents": tokenizer.lowercase}
        ours |= {"never_split": [], "clean_text": True, **DEFAULTS["bert"]}
        check_settings(ours, settings, folder / SETTINGS)
        check_settings(DEFAULTS["bert"], special_map, folder / MAP)
    else:
        check_settings(BYTES_SETTINGS, settings, folder / SETTINGS)
        if task == "gpt" and tokenizer.pattern != GPT2_PATTERN and not as_it_is:
            raise ValueError(
                f"{path} splits texts otherwise than GPT2Tokenizer does: write "
                f'"tokenizer_class": "PreTrainedTokenizerFast" in {SETTINGS} if it is right'
            )
    defaults = {} if as_it_is else DEFAULTS[task]
    declared = declared_in(folder, settings, special_map, added, listed, defaults)
    needed = SPECIAL if task == "bert" else (END_OF_TEXT,)
    there = {name for name, token in declared.items() if not token.where.startswith(BY_CLASS)}
    if missing := [n for n in needed if n not in there | tokenizer.special_tokens.keys()]:
        raise ValueError(f"{path} has no token {', '.join(missing)}, which a {task} needs here")
    try:
        new = new_tokens(tokenizer, declared)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    if new:
        special = tokenizer.special_tokens | new
        tokenizer = Tokenizer(tokenizer.ranks, tokenizer.pattern, special, foreign=True)
    return tokenizer


def check_class(folder: Path, task: str, settings: dict) -> bool:
    """Whether transformers uses a tokenizer.json as it is. Raises ValueError for a class of
    tokenizers that does something else than ours."""
    if settings.get("auto_map"):
        raise ValueError(f"{folder / SETTINGS}: auto_map: the tokenizer is code, which is not run")
    path, name = folder / SETTINGS, settings.get("tokenizer_class")
    if name is None and (folder / "config.json").is_file():
        path = folder / "config.json"
        name = read_json(path).get("tokenizer_class")
    known = str(name).removesuffix("Fast")
    if name is not None and known not in (*CLASSES[task], *ANY):
        raise ValueError(
            f"{path}: tokenizer_class={str(name)[:80]} is not supported, only "
            f"{', '.join(CLASSES[task])} and PreTrainedTokenizerFast are"
        )
    return known in ANY


def declared_in(folder: Path, *contents) -> dict[str, Declared]:
    try:
        return declared_tokens(*contents)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def note_on_case(folder: Path, tokenizer: AnyTokenizer) -> str:
    """What to say of a vocabulary with capitals if nothing says whether texts are lower-cased: then
    they are, here as in transformers, and such tokens are never used. "" if all is well."""
    if not isinstance(tokenizer, WordPiece) or not tokenizer.lowercase:
        return ""
    ordinary = (token for token in tokenizer.tokens if token[0] + token[-1] not in ("[]", "<>"))
    token = next((token for token in ordinary if token != token.lower()), None)
    path = folder / SETTINGS
    if token is None or (path.is_file() and read_json(path).get("do_lower_case") is not None):
        return ""
    return (
        f"texts are lower-cased, as transformers does it, because no {SETTINGS} says "
        f"do_lower_case; but the vocabulary has capitals ({token!r}). If the model is cased, write "
        f'{{"do_lower_case": false}} there and import it again'
    )


def is_wordpiece(state: dict) -> bool:
    """Whether a tokenizer.json is of WordPiece. Files of 2020 leave out the type of the model, but
    only WordPiece limits the length of a word."""
    model = state.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    return kind == "WordPiece" or (kind is None and "max_input_chars_per_word" in (model or {}))


# Settings of MarianTokenizer, with the only value that we support.
MARIAN_SETTINGS = {"separate_vocabs": False, "sp_model_kwargs": {}, "eos_token": END_PIECE}
MARIAN_SETTINGS |= {"unk_token": UNK_PIECE, "pad_token": START_PIECE}
MARIAN_SETTINGS |= {"additional_special_tokens": [], "extra_special_tokens": []}


def read_sentencepieces(
    folder: Path, settings: dict, declared: dict[str, Declared]
) -> SentencePieces:
    check_settings(MARIAN_SETTINGS, settings, folder / SETTINGS)
    for name, token in declared.items():
        if name not in SPECIAL_PIECES:
            raise ValueError(
                f"{folder}: {token.where}: the added token {name[:80]!r} is not supported, only "
                f"{', '.join(SPECIAL_PIECES)} are"
            )
    source, target = (read_whole(folder / name) for name in FILES[:2])
    path = folder / FILES[2]
    vocab = read_json(path)
    if any(type(i) is not int for i in vocab.values()) or {*vocab.values()} != {*range(len(vocab))}:
        raise ValueError(f"{path}: the ids of {len(vocab):,} pieces do not count from 0")
    try:
        return SentencePieces(source, target, sorted(vocab, key=vocab.get))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def check_settings(ours: dict, settings: dict, path: Path) -> None:
    """tokenizer_config.json can override what the other files say. Raises ValueError if it has
    other values than ours."""
    for name, value in ours.items():
        found = settings.get(name)
        if isinstance(found, dict):  # an added token and how it is found in a text
            found = found.get("content", found)
        if found not in (None, value):
            raise ValueError(f"{path}: {name}={str(found)[:80]} is not supported, only {value} is")


def from_tokenizer_json(state: dict, path: Path, task: str) -> Tokenizer:
    """Every field that changes ids is checked: ValueError names the one that is not supported."""
    model, added = state.get("model"), state.get("added_tokens") or []
    if not isinstance(model, dict):
        raise ValueError(f"{path} has no model")
    kind = model.get("type", "BPE")
    if kind != "BPE" or model.get("byte_fallback"):  # byte_fallback: SentencePiece's BPE
        raise ValueError(f"{path.parent} has a {kind} tokenizer: not supported in a {path.name}")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise ValueError(f"{path}: {field}={model[field]!r} is not supported")
    special = {}
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise ValueError(f"{path}: the added token {str(token)[:80]} is wrong")
        if any(token.get(field) for field in ("single_word", "lstrip", "rstrip")):
            raise ValueError(f"{path}: {token['content']!r} takes its surroundings: not supported")
        special[token["content"]] = token.get("id")
    try:
        normalizer, post_processor = framing(task, special)
    except KeyError as error:
        raise ValueError(f"{path} has no token {error}, which a {task} needs here") from None
    nfc = task == "llama" and state.get("normalizer") == {"type": "NFC"}
    if not nfc and state.get("normalizer") != normalizer:
        raise ValueError(f"{path}: normalizer={str(state['normalizer'])[:100]} is not supported")
    found = acts_on_ids(state.get("post_processor"))
    if task == "llama":  # of pairs it knows nothing
        found, post_processor = (
            {k: v for k, v in what.items() if k != "pair"} if isinstance(what, dict) else what
            for what in (found, post_processor)
        )
    if found != post_processor:
        raise ValueError(f"{path}: post_processor={str(found)[:100]} is not supported")
    vocab, merges, pattern = model.get("vocab"), model.get("merges"), split_pattern(state, path)
    return from_merges(vocab, merges, pattern, special, path, nfc, bool(model.get("ignore_merges")))


def acts_on_ids(post_processor: Any) -> Any:
    """The post_processor, or None where it does nothing to ids."""
    if not isinstance(post_processor, dict):
        return post_processor
    steps = post_processor.get("processors")
    if post_processor.get("type") == "Sequence" and steps and isinstance(steps, list):
        steps = [step for step in map(acts_on_ids, steps) if step]
        return steps[0] if len(steps) == 1 else steps or None
    alone = post_processor.get("single") == [{"Sequence": {"id": "A", "type_id": 0}}]
    return None if alone or post_processor.get("type") == "ByteLevel" else post_processor


def split_pattern(state: dict, path: Path) -> str:
    """The pattern of ours by which the pre_tokenizer splits. Raises ValueError if there is none."""
    whole = state.get("pre_tokenizer")
    steps = whole.get("pretokenizers") if isinstance(whole, dict) else None
    steps = steps if isinstance(steps, list) and steps else [whole]
    *splits, last = [step if isinstance(step, dict) else {} for step in steps]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if last.get("use_regex", True) and splits in ([], [DIGITS]):
            return DIGITS_PATTERN if splits else GPT2_PATTERN
        for ours, theirs in SPLITS.items():
            wanted = {"type": "Split", "pattern": {"Regex": theirs}, "behavior": "Isolated"}
            if splits == [{**wanted, "invert": False}] and not last.get("use_regex", True):
                return ours
    raise ValueError(f"{path}: pre_tokenizer={str(whole)[:200]} is not supported")


def from_merges(
    vocab: Any,
    merges: Any,
    pattern: str,
    special: dict[str, int],
    path: Path,
    nfc: bool = False,
    ignore_merges: bool = False,
) -> Tokenizer:
    """vocab: token -> id; merges: pairs in order, or pairs joined by a space. Raises ValueError
    unless the ids alone imply the same pairs, because our Tokenizer keeps nothing but the ids.
    ignore_merges: a chunk that is a token becomes it whatever the merges, as our Tokenizer has it.
    """
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError(f"{path} has no vocab or no merges")
    byte_of, tokens, pairs = byte_characters(), {}, []
    for name, i in vocab.items():
        if special.get(name, i) != i:
            raise ValueError(f"{path}: {name!r} has the ids {i} and {special[name]}")
        if name not in special:
            tokens[name] = bytes([byte_of[c] for c in name]) if byte_of.keys() >= set(name) else b""
    if len({*special.values()}) < len(special):
        raise ValueError(f"{path}: two of the added tokens have the same id")
    new = [name for name in special if name not in vocab]
    for i, name in enumerate(new, len(vocab)):
        if special[name] != i:
            raise ValueError(
                f"{path}: {name!r} has the id {special[name]}, but transformers gives it {i}"
            )
    for number, merge in enumerate(merges, 1):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        try:
            first, second = pair if isinstance(pair, list) else ()
            known = tokens[first + second] and tokens[first] and tokens[second]
        except (KeyError, TypeError, ValueError):
            known = b""
        if not known:
            raise ValueError(f"{path}: merge {number:,}, {str(merge)[:80]!r}, is not of its tokens")
        pairs.append((tokens[first], tokens[second]))
    if ignore_merges:
        check_all_pairs(tokens, vocab, pairs, path)
        try:
            ranks = {tokens[name]: vocab[name] for name in tokens}
            return Tokenizer(ranks, pattern, special, foreign=True, nfc=nfc)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    n_bytes = sum(len(token) == 1 for token in tokens.values())
    if unreached := len(tokens) - n_bytes - len(pairs):
        raise ValueError(
            f"{path}: {len(tokens):,} tokens are not {n_bytes} bytes and {len(pairs):,} merges, by "
            f"{unreached:+,}"
        )
    try:
        ranks = {tokens[name]: vocab[name] for name in tokens}
        tokenizer = Tokenizer(ranks, pattern, special, foreign=True, nfc=nfc)
        implied = tokenizer.merges()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for number, (pair, wanted) in enumerate(zip(pairs, implied, strict=True), 1):
        if pair != wanted:
            raise ValueError(f"{path}: merge {number:,}, {pair}, should be {wanted} by the ids")
    return tokenizer


def check_all_pairs(
    tokens: dict, vocab: dict, pairs: list[tuple[bytes, bytes]], path: Path
) -> None:
    """Raises ValueError unless the merges are, by rising id of the token made, all the pairs of
    tokens that make one: as a file of tiktoken's is written, which has ids alone."""
    id_of = {token: vocab[name] for name, token in tokens.items()}
    made = [id_of[a + b] for a, b in pairs]
    wanted = {
        (token[:cut], token[cut:])
        for token in id_of
        for cut in range(1, len(token))
        if token[:cut] in id_of and token[cut:] in id_of
    }
    if made != sorted(made) or len(pairs) != len(wanted) or set(pairs) != wanted:
        raise ValueError(
            f"{path}: ignore_merges is only supported where the {len(pairs):,} merges are all "
            f"{len(wanted):,} pairs of tokens that make one, in the order of their ids"
        )

"""Text -> token ids, made once, in parallel, and reused as long as nothing changes.

`data/shards.py` says how they lie on disk. Every document begins with a border token. GPT's is
<|endoftext|>, so that the first word is predicted from something, the end is learnt, and a sample
that starts from that token is a document.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np
from tqdm import tqdm

from bpe import END_OF_TEXT, PATTERNS, Tokenizer
from data.cores import batched, on_all_cores
from data.download import GPT2_MERGES, GPT2_VOCABULARY, fetch, prepare_cache
from data.gpt2_files import read_gpt2_files
from data.shards import Origin, TokenFile, open_shards, write_shards
from data.text import Corpus

if TYPE_CHECKING:  # a script loads only those that it needs
    from data.byte_fallback import ByteFallbackBPE
    from data.sentencepieces import SentencePieces
    from wordpiece import WordPiece

AnyTokenizer = Union[Tokenizer, "WordPiece", "SentencePieces", "ByteFallbackBPE"]
SPLITS = ("train", "validation")
# What Llama's tokenizers put before a text, and what ends one: of ours, END_OF_TEXT does both.
BEGINS = ("<|begin_of_text|>", "<s>")
ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>")
TOKENIZER_CHARACTERS = 100_000_000  # of training text from which a new tokenizer is learnt


def tokenizer_from_json(text: str) -> AnyTokenizer:
    """The tokenizer, of any kind, whose to_json() wrote this. Raises ValueError, in one sentence,
    for other text."""
    try:
        state = json.loads(text)
        kind = state.get("type") if isinstance(state, dict) else None
    except (ValueError, RecursionError):
        kind = None  # then Tokenizer says what is wrong
    if kind == "WordPiece":
        from wordpiece import WordPiece

        return WordPiece.from_json(text)
    if kind == "SentencePiece":
        from data.sentencepieces import SentencePieces

        return SentencePieces.from_json(text)
    if kind == "ByteFallbackBPE":
        from data.byte_fallback import ByteFallbackBPE

        return ByteFallbackBPE.from_json(text)
    return Tokenizer.from_json(text)


def load_tokenizer(path: Path) -> AnyTokenizer:
    """The tokenizer in a file that save() of the byte-level one or to_json() of any one wrote.
    Raises ValueError, which names the path, for other files."""
    try:
        return tokenizer_from_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def opening(tokenizer: AnyTokenizer) -> str:
    """The special token that a text begins with; where there is none, the one that ends texts."""
    return next((name for name in BEGINS if name in tokenizer.special_tokens), ending(tokenizer))


def ending(tokenizer: AnyTokenizer) -> str:
    """The special token that ends a text."""
    return next((name for name in ENDS if name in tokenizer.special_tokens), END_OF_TEXT)


def tokenize(
    corpus: Corpus, split: str, tokenizer: AnyTokenizer, cache: Path, border: str = ""
) -> TokenFile:
    """The token file of one split, from `cache` or made now, in parallel. `border` is the special
    token that stands before each document; "": the tokenizer's opening."""
    border = border or opening(tokenizer)
    path = cache / f"{corpus.name}-{split}-{corpus.hash[:12]}-{tokenizer.hash[:12]}.tokens"
    origin = Origin(tokenizer.hash, corpus.hash, split)
    if path.is_file():
        try:
            return open_shards(path, origin)
        except ValueError as error:
            tqdm.write(f"making the tokens again: {error}")
    prepare_cache(cache)
    width = 2 if tokenizer.vocab_size <= 1 << 16 else 4
    with closing(encode_pieces(corpus, split, tokenizer, width, border)) as pieces:
        write_shards(path, origin, width, pieces)
    return open_shards(path, origin)


def encode_pieces(
    corpus: Corpus, split: str, tokenizer: AnyTokenizer, width: int, border: str
) -> Iterator[tuple[bytes, int]]:
    """Yields (ids of `width` bytes, bytes of their text) for each batch of pieces, in order."""
    encoder = CorpusEncoder(tokenizer, width, tokenizer.special_tokens[border])
    batches = batched(number_documents(corpus.pieces(split)), lambda piece: len(piece[0]))
    with tqdm(desc=f"tokenizing {split}", unit="B", unit_scale=True, disable=None) as bar:
        for ids, size in on_all_cores(encoder, batches):
            bar.update(size)
            yield ids, size


def number_documents(pieces: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool, int]]:
    """Each piece with the number of its document."""
    document = -1
    for text, begins in pieces:
        document += begins
        yield text, begins, document


class CorpusEncoder:
    """Pieces of a corpus -> their ids as bytes. WordPiece remembers the ids of stretches of text;
    byte-level BPE does not, because tiktoken's core merges as fast as Python would look them up."""

    def __init__(self, tokenizer: AnyTokenizer, width: int, border: int):
        self.dtype = np.dtype(f"<u{width}")
        self.mark = np.array([border], self.dtype).tobytes()
        self.encoders = [tokenizer.encode_numpy]
        if hasattr(tokenizer, "encode_target"):  # the documents of pairs: source, target, source…
            self.encoders.append(tokenizer.encode_target)

    def __call__(self, pieces: list[tuple[str, bool, int]]) -> tuple[bytes, int]:
        """(ids, with the border token before each document; bytes of the texts)."""
        found, size = [], 0
        for text, begins, document in pieces:
            encode = self.encoders[document % len(self.encoders)]
            found += [self.mark] * begins + [encode(text).astype(self.dtype).tobytes()]
            size += len(text.encode("utf-8", "surrogatepass"))
        return b"".join(found), size


# ---- the splits of a data class ------------------------------------------------------------------


def both_splits(
    Data,
    corpus,
    config,
    sizes: dict,
    tokenizer: AnyTokenizer | None,
    *,
    special_tokens: tuple[str, ...] = (END_OF_TEXT,),
    border: str = "",
    **more,
):
    """(train, validation) of a data class that reads token files. The tokenizer and the files are
    made if they are not there yet.

    special_tokens are those that the task needs; `border` is as in `tokenize`.
    """
    tokenizer = tokenizer or get_tokenizer(config, sizes, corpus, special_tokens)
    cache, more = Path(config.cache_dir), {**settings(config, sizes), **more}
    return tuple(
        Data(tokenize(corpus, split, tokenizer, cache, border), corpus, split, tokenizer, **more)
        for split in SPLITS
    )


def settings(config, sizes: dict, *names: str) -> dict:
    """{argument: value} for a data class: what all of them take, and the flags `names`."""
    values = {name: getattr(config, name) for name in ("batch_size", "seed", *names)}
    return {"block_size": sizes["block_size"], "max_tokens": config.eval_tokens, **values}


def get_tokenizer(
    config, sizes: dict, corpus: Corpus, special_tokens: tuple[str, ...]
) -> AnyTokenizer:
    """GPT-2's own tokenizer, one from a file, or (cached) one learnt from the training split of the
    corpus. Raises ValueError for flags that cannot be followed."""
    cache, vocab_size = Path(config.cache_dir), sizes["vocab_size"]
    if config.tokenizer:
        if config.tokenizer == "gpt2":
            files = fetch(GPT2_MERGES, cache), fetch(GPT2_VOCABULARY, cache)
            tokenizer = read_gpt2_files(*files)
        elif Path(config.tokenizer).is_file():
            tokenizer = load_tokenizer(Path(config.tokenizer))
        else:
            raise ValueError(f"--tokenizer {config.tokenizer} is no file here, and not gpt2")
        check_special(tokenizer, special_tokens, config.tokenizer)
        return tokenizer
    if config.pattern not in PATTERNS:
        raise ValueError(f"--pattern {config.pattern} is not one of {', '.join(PATTERNS)}")
    path = cache / f"{corpus.name}-{corpus.hash[:12]}-{config.pattern}-{vocab_size}.json"
    if path.is_file():
        try:
            return Tokenizer.load(path)
        except ValueError:
            path.unlink()
    prepare_cache(cache)
    tokenizer = Tokenizer.train(
        first_characters(corpus, TOKENIZER_CHARACTERS),
        vocab_size,
        PATTERNS[config.pattern],
        special_tokens,
        progress=True,
    )
    tokenizer.save(path)
    return tokenizer


def lacking(tokenizer: AnyTokenizer, special_tokens: tuple[str, ...]) -> str:
    """Which of these, the tokens that a task needs, the tokenizer does not have."""
    needed = (ending(tokenizer) if name == END_OF_TEXT else name for name in special_tokens)
    return ", ".join(name for name in needed if name not in tokenizer.special_tokens)


def check_special(tokenizer: AnyTokenizer, special_tokens: tuple[str, ...], given: str) -> None:
    """Raises ValueError if the tokenizer of --tokenizer lacks a token that the task needs."""
    if missing := lacking(tokenizer, special_tokens):
        raise ValueError(
            f"--tokenizer {given} lacks the special token {missing}: "
            "choose another, or leave the flag out to train one"
        )


def first_characters(corpus: Corpus, characters: int) -> Iterator[str]:
    """The training text up to so many characters, in pieces."""
    for text, _ in corpus.pieces("train"):
        if characters <= 0:
            return
        yield text[:characters]
        characters -= len(text)

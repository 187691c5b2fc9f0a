"""Text -> token ids, made once, in parallel, and reused as long as nothing changed.

How they lie on disk: `data/shards.py`. Every document begins with a border token. GPT's is
<|endoftext|>: so the first word is predicted from something, the end is learnt, and a sample that
starts from that token is a document.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bpe import END_OF_TEXT, Tokenizer
from data.cores import batched, on_all_cores
from data.sentencepieces import SentencePieces
from data.shards import Origin, TokenFile, open_shards, write_shards
from data.text import Corpus
from wordpiece import WordPiece

AnyTokenizer = Tokenizer | WordPiece | SentencePieces


def tokenizer_from_json(text: str) -> AnyTokenizer:
    """What to_json() of any of the tokenizers wrote; ValueError, in one sentence, otherwise."""
    try:
        state = json.loads(text)
        kind = state.get("type") if isinstance(state, dict) else None
    except (ValueError, RecursionError):
        kind = None  # then Tokenizer says what is wrong
    kinds = {"WordPiece": WordPiece, "SentencePiece": SentencePieces}
    return kinds.get(str(kind), Tokenizer).from_json(text)


def load_tokenizer(path: Path) -> AnyTokenizer:
    """What save() of the byte-level one wrote, or to_json() of any; ValueError names the path."""
    try:
        return tokenizer_from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def tokenize(
    corpus: Corpus, split: str, tokenizer: AnyTokenizer, cache: Path, border: str = END_OF_TEXT
) -> TokenFile:
    """The token file of one split, from `cache` or made now, in parallel. `border` is the special
    token that stands before each document."""
    path = cache / f"{corpus.name}-{split}-{corpus.hash[:12]}-{tokenizer.hash[:12]}.tokens"
    origin = Origin(tokenizer.hash, corpus.hash, split)
    if path.is_file():
        try:
            return open_shards(path, origin)
        except ValueError as error:
            tqdm.write(f"making the tokens again: {error}")
    cache.mkdir(parents=True, exist_ok=True)
    width = 2 if tokenizer.vocab_size <= 1 << 16 else 4
    with closing(encoded(corpus, split, tokenizer, width, border)) as pieces:
        write_shards(path, origin, width, pieces)
    return open_shards(path, origin)


def encoded(
    corpus: Corpus, split: str, tokenizer: AnyTokenizer, width: int, border: str
) -> Iterator[tuple[bytes, int]]:
    """(ids of `width` bytes each, bytes of their text) of each batch of pieces, in order."""
    encoder = Encoder(tokenizer, width, tokenizer.special_tokens[border])
    batches = batched(numbered(corpus.pieces(split)), lambda piece: len(piece[0]))
    with tqdm(desc=f"tokenizing {split}", unit="B", unit_scale=True, disable=None) as bar:
        for ids, size in on_all_cores(encoder, batches):
            bar.update(size)
            yield ids, size


def numbered(pieces: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool, int]]:
    """Each piece with the number of its document."""
    document = -1
    for text, begins in pieces:
        document += begins
        yield text, begins, document


class Encoder:
    """Pieces of a corpus -> their ids in bytes. WordPiece remembers those of each stretch of text;
    byte-level BPE does not, for tiktoken's core merges as fast as Python would look them up."""

    def __init__(self, tokenizer: AnyTokenizer, width: int, border: int):
        self.dtype = np.dtype(f"<u{width}")
        self.mark = np.array([border], self.dtype).tobytes()
        self.encoders = [tokenizer.encode_numpy]
        if isinstance(tokenizer, SentencePieces):  # the documents of pairs: source, target, source…
            self.encoders.append(tokenizer.encode_target)

    def __call__(self, pieces: list[tuple[str, bool, int]]) -> tuple[bytes, int]:
        """(ids, each document's behind the border token; bytes of the texts)."""
        found, size = [], 0
        for text, begins, document in pieces:
            encode = self.encoders[document % len(self.encoders)]
            found += [self.mark] * begins + [encode(text).astype(self.dtype).tobytes()]
            size += len(text.encode("utf-8", "surrogatepass"))
        return b"".join(found), size

"""Text -> token ids, made once, in parallel, and reused as long as nothing changed.

How they lie on disk: `data/shards.py`. Every document begins with a border token. GPT's is
<|endoftext|>: so the first word is predicted from something, the end is learnt, and a sample that
starts from that token is a document.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bpe import END_OF_TEXT, Tokenizer
from data.shards import Origin, TokenFile, open_shards, write_shards
from data.text import Corpus
from sentencepieces import SentencePieces
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
    """(ids of `width` bytes each, bytes of their text) of each piece of the corpus, in order.

    Threads are enough: tiktoken's core lets go of Python's lock while it works. (WordPiece, in
    Python, gains nothing by them, and is fast enough for the texts of fine-tuning.)
    """
    encoders = [tokenizer.encode_numpy]
    if isinstance(tokenizer, SentencePieces):  # the documents of pairs: source, target, source, …
        encoders.append(tokenizer.encode_target)
    mark = np.array([tokenizer.special_tokens[border]], dtype=f"<u{width}").tobytes()
    workers, documents = os.cpu_count() or 1, 0
    bar = tqdm(desc=f"tokenizing {split}", unit="B", unit_scale=True, disable=None)

    def encode(text: str, begins: bool, encoder: Callable) -> tuple[bytes, int]:
        ids = encoder(text).astype(f"<u{width}").tobytes()
        return (mark if begins else b"") + ids, len(text.encode("utf-8"))

    with ThreadPoolExecutor(workers) as pool, bar:
        waiting: deque = deque()  # in order, and few: memory stays flat however long the text is
        for text, begins in corpus.pieces(split):
            documents += begins
            encoder = encoders[(documents - 1) % len(encoders)]
            waiting.append(pool.submit(encode, text, begins, encoder))
            if len(waiting) > 4 * workers:
                ids, size = waiting.popleft().result()
                bar.update(size)
                yield ids, size
        for future in waiting:
            ids, size = future.result()
            bar.update(size)
            yield ids, size

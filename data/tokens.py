"""Text -> a memory-mapped file of token ids, made once and reused as long as nothing changed.

The file is a header of 128 bytes, then the ids, little-endian, 2 bytes each where the vocabulary
allows it, else 4:

    8 bytes   magic "TOKENS\\0\\1"      8 bytes   number of tokens
    4 bytes   version                 32 bytes   SHA-256 of the tokenizer
    4 bytes   bytes per token         32 bytes   SHA-256 of the corpus
    8 bytes   bytes of the text       the rest   zeros

Every document begins with a border token. GPT's is <|endoftext|>: so the first word is predicted
from something, the end is learnt, and a sample that starts from that token is a document.
"""

import json
import os
import struct
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bpe import END_OF_TEXT, Tokenizer
from data.text import Corpus
from sentencepieces import SentencePieces
from wordpiece import WordPiece

MAGIC = b"TOKENS\0\1"
VERSION = 1
HEADER = struct.Struct("<8sIIQQ32s32s")
HEADER_SIZE = 128

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


@dataclass
class TokenFile:
    path: Path
    ids: np.ndarray  # memory-mapped, uint16 or uint32
    text_bytes: int


def open_tokens(path: Path, tokenizer: AnyTokenizer, corpus_hash: str) -> TokenFile:
    """Raises ValueError where the file is truncated, foreign, or made from something else."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER_SIZE)
    if len(head) < HEADER_SIZE or not head.startswith(MAGIC):
        raise ValueError(f"{path} is no token file of this project: delete it")
    _, version, width, text_bytes, count, tokenizer_hash, corpus = HEADER.unpack_from(head)
    if version != VERSION:
        raise ValueError(f"{path} has version {version}, this code reads {VERSION}: delete it")
    if tokenizer_hash.hex() != tokenizer.hash or corpus.hex() != corpus_hash:
        raise ValueError(f"{path} was made from another text or tokenizer: delete it")
    if width not in (2, 4) or size != HEADER_SIZE + count * width:
        raise ValueError(f"{path} is truncated or damaged ({size:,} bytes): delete it")
    ids = np.memmap(path, np.dtype(f"<u{width}"), "r", HEADER_SIZE, (count,)) if count else None
    return TokenFile(path, np.empty(0, np.uint16) if ids is None else ids, text_bytes)


def tokenize(
    corpus: Corpus, split: str, tokenizer: AnyTokenizer, cache: Path, border: str = END_OF_TEXT
) -> TokenFile:
    """The token file of one split, from `cache` or made now, in parallel. `border` is the special
    token that stands before each document."""
    path = cache / f"{corpus.name}-{split}-{corpus.hash[:12]}-{tokenizer.hash[:12]}.tokens"
    if path.is_file():
        try:
            return open_tokens(path, tokenizer, corpus.hash)
        except ValueError as error:
            tqdm.write(f"making the tokens again: {error}")
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write_tokens(temporary, corpus, split, tokenizer, border)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return open_tokens(path, tokenizer, corpus.hash)


def write_tokens(
    path: Path, corpus: Corpus, split: str, tokenizer: AnyTokenizer, border: str
) -> None:
    """Threads are enough: tiktoken's core lets go of Python's lock while it works. (WordPiece, in
    Python, gains nothing by them, and is fast enough for the texts of fine-tuning.)"""
    width = 2 if tokenizer.vocab_size <= 1 << 16 else 4
    encoders = [tokenizer.encode_numpy]
    if isinstance(tokenizer, SentencePieces):  # the documents of pairs: source, target, source, …
        encoders.append(tokenizer.encode_target)
    mark = np.array([tokenizer.special_tokens[border]], dtype=f"<u{width}").tobytes()
    count = text_bytes = documents = 0
    workers = os.cpu_count() or 1
    bar = tqdm(desc=f"tokenizing {split}", unit="B", unit_scale=True, disable=None)

    def encode(text: str, begins: bool, encoder: Callable) -> tuple[bytes, int]:
        ids = encoder(text).astype(f"<u{width}").tobytes()
        return (mark if begins else b"") + ids, len(text.encode("utf-8"))

    with path.open("wb") as file, ThreadPoolExecutor(workers) as pool, bar:
        file.write(bytes(HEADER_SIZE))
        waiting: deque = deque()  # in order, and few: memory stays flat however long the text is

        def write_first() -> None:
            nonlocal count, text_bytes
            ids, size = waiting.popleft().result()
            file.write(ids)
            count += len(ids) // width
            text_bytes += size
            bar.update(size)

        for text, begins in corpus.pieces(split):
            documents += begins
            encoder = encoders[(documents - 1) % len(encoders)]
            waiting.append(pool.submit(encode, text, begins, encoder))
            if len(waiting) > 4 * workers:
                write_first()
        while waiting:
            write_first()
        hashes = bytes.fromhex(tokenizer.hash), bytes.fromhex(corpus.hash)
        file.seek(0)
        file.write(HEADER.pack(MAGIC, VERSION, width, text_bytes, count, *hashes))
        file.flush()
        os.fsync(file.fileno())

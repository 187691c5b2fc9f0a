"""Tagged sentences -> rows of sub-tokens, in which the first of every word is asked for its label.

The class fulfils what `data/windows.py` says of every data class. A word may be several
sub-tokens: its first carries the tag, the others are context (Devlin et al. 2019,
arXiv:1810.04805, section 5.3). Sentences come from `data/conll.py`; the functions below the class
also serve words without tags.

Left out: context from neighbouring sentences of a document, and a CRF on top.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.buckets import Buckets, evenly_within, pad_rows
from data.conll import TaggedText, open_tagged
from data.encoding import CLS, MASK, PAD, SEP, SPECIAL, encode_text
from data.tokens import SPLITS, AnyTokenizer, get_tokenizer, settings
from entities import entities, entity_scores
from wordpiece import UNK


class TaggedSentences:
    """Steps of at most tokens_per_step tokens, padding included, each dealt out to micro-batches
    of about tokens_per_batch = batch_size · block_size, by `Buckets`: each row once an epoch.

    Validation: in order; if max_tokens is less than the text, evenly spaced sentences of it.
    """

    def __init__(
        self,
        text: TaggedText,
        split: str,
        tokenizer: AnyTokenizer,
        labels: tuple[str, ...],
        *,
        block_size: int,
        batch_size: int,
        row_length: int = 0,
        tokens_per_step: int = 0,
        seed: int = 0,
        max_tokens: int = 0,
    ):
        training = split == "train"
        self.tokenizer, self.split, self.labels = tokenizer, split, tuple(labels)
        self.fingerprint, self.rule, self.prompts = text.hash, text.rule, text.prompts
        self.scheme, self.sentences = text.schemes[split], text.splits[split]
        index = {label: i for i, label in enumerate(self.labels)}
        self.answers = [np.array([index[tag] for tag in s.tags]) for s in self.sentences]
        shown = {"desc": f"tokenizing {split}", "unit": " sentences", "disable": None}
        words = tqdm((s.words for s in self.sentences), total=len(self.sentences), **shown)
        self.rows = sentence_rows(words, tokenizer, min(row_length or block_size, block_size))
        tokens, limit = sum(len(row.ids) for row in self.rows), 0 if training else max_tokens
        self.chosen = evenly_within(len(self.sentences), tokens, limit)
        kept = set(self.chosen.tolist())
        self.rows = [row for row in self.rows if row.sentence in kept]
        self.tokens_per_batch = batch_size * block_size
        lengths = np.array([len(row.ids) for row in self.rows])
        self.buckets = Buckets(
            lengths, self.tokens_per_batch, tokens_per_step, seed=seed, training=training
        )
        self.n_batches = self.buckets.n_batches
        self.tokens_per_epoch = self.n_batches * self.tokens_per_batch

    @classmethod
    def splits(cls, config, sizes: dict, tokenizer: AnyTokenizer | None = None):
        """(train, validation). sizes["labels"] are a checkpoint's; where it is empty, the types of
        the training file make them. ValueError for a tag that is none of them."""
        text = open_tagged(config.data, config.valid)
        tokenizer = tokenizer or get_tokenizer(config, sizes, text, SPECIAL)
        labels = tuple(sizes.get("labels") or text.labels)
        text.check(labels)
        more = settings(config, sizes, "row_length", "tokens_per_step")
        return tuple(cls(text, s, tokenizer, labels, **more) for s in SPLITS)

    def batch(self, i: int) -> dict[str, Tensor]:
        """{"tokens": (B, T), "targets": (B, T)}, a target at the first sub-token of each word that
        its row asks for; if some rows are shorter than others, "keep": (B, T), False at padding."""
        _, numbers, empty = self.buckets.batch(i)
        rows = [self.rows[k] for k in numbers]
        tokens, keep = pad_rows([row.ids for row in rows], self.tokenizer.special_tokens[PAD])
        targets = torch.full_like(tokens, -100)
        if not empty:
            for into, row in zip(targets.numpy(), rows, strict=True):
                behind = row.first + len(row.places)
                into[row.places] = self.answers[row.sentence][row.first : behind]
        batch = {"tokens": tokens, "targets": targets}
        return batch if keep.all() else {**batch, "keep": keep}

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """Per word: the loss in nats, and the share of right labels, O among them."""
        return {name: total / max(counts["loss"], 1) for name, total in sums.items()}

    def measure(self, predicted: dict[int, np.ndarray]) -> dict[str, float]:
        """{"precision", "recall", "f1"} over the entities of all sentences, rows joined again.
        predicted[i] is (B, T), the label (its index) at each place of batch i."""
        rows, answers = [], []
        for i in range(self.n_batches):
            numbers = self.buckets.batch(i)[1]
            rows += [self.rows[k] for k in numbers]
            answers += list(predicted[i])
        joined = join_rows(rows, answers)
        gold = [self.sentences[k].tags for k in self.chosen]
        tags = [[self.labels[label] for label in joined[k]] for k in self.chosen]
        return {name: round(value, 6) for name, value in entity_scores(gold, tags).items()}

    def describe(self) -> str:
        sentences = [self.sentences[k] for k in self.chosen]
        text = f"{len(sentences):,} sentences"
        if len(sentences) < len(self.sentences):
            text += f", evenly spaced among {len(self.sentences):,}"
        found = [entity[0] for s in sentences for entity in entities(s.tags)]
        scheme = (
            f"in {self.scheme}" if self.scheme else "in no single scheme, read as conlleval does"
        )
        text += f", {sum(len(s.words) for s in sentences):,} words, {len(found):,} entities of "
        text += f"{len(set(found))} types ({scheme}), {len(self.rows):,} rows"
        text += self.buckets.describe()
        return text


# ---- words -> rows -> labels of words ------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """[CLS], the sub-tokens of consecutive words of a sentence, [SEP]."""

    ids: np.ndarray  # (L,)
    places: np.ndarray  # (W,) in ids, of the first sub-tokens of those words that are asked for
    sentence: int  # its number
    first: int  # the first word that is asked for; the others follow it


def sentence_rows(sentences: Iterable[list[str]], tokenizer: AnyTokenizer, T: int) -> list[Row]:
    """Rows of at most T tokens, in which every word is asked for once; see `windows`.

    Each word is encoded by itself. One of which nothing is left (a zero-width space under
    WordPiece) is [UNK], or [MASK] where there is none, so that every word has a place. Of a word
    of more than T - 2 sub-tokens the first T - 2 are shown. ValueError where T has room for none.
    """
    if T < 3:
        raise ValueError(
            f"rows of {T} tokens hold no word between [CLS] and [SEP]: choose 3 or more"
        )
    special, known, rows = tokenizer.special_tokens, {}, []
    nothing = next(special[name] for name in (UNK, MASK, PAD) if name in special)
    for number, words in enumerate(sentences):
        for word in words:
            if word not in known:
                known[word] = (encode_text(tokenizer, word) or [nothing])[: T - 2]
        pieces = [known[word] for word in words]
        for start, end, first, behind in windows([len(ids) for ids in pieces], T - 2):
            ids = [special[CLS], *(i for word in pieces[start:end] for i in word), special[SEP]]
            places = np.cumsum([1, *map(len, pieces[start : end - 1])])
            asked = places[first - start : behind - start]
            rows.append(Row(np.array(ids), asked, number, first))
    return rows


def windows(sizes: list[int], room: int) -> list[tuple[int, int, int, int]]:
    """Words of these sizes (none above room) -> [(start, end, first, behind)]: a window shows the
    words start to end - 1, of at most `room` sub-tokens, and asks for first to behind - 1.

    A sentence that fits is one window. Otherwise each takes as many words as fit, and the next
    begins so that up to half of them are shown again: the earlier window asks for the first half
    of what both show, the later one for the second. So a word at a border has context on both
    sides, and every word is asked for once. No tag has a say in where the borders are.
    """
    assert max(sizes, default=0) <= room, "a word does not fit into a window"
    found, start, first, n = [], 0, 0, len(sizes)
    while first < n:
        end, used = start, 0
        while end < n and used + sizes[end] <= room:
            used += sizes[end]
            end += 1
        # The next window needs room for the first word that this one lacks: it begins further on.
        after, shared, most = end, 0, 0 if end == n else min(room // 2, room - sizes[end])
        while shared + sizes[after - 1] <= most:
            after -= 1
            shared += sizes[after]
        behind = n if end == n else (after + end) // 2
        found.append((start, end, first, behind))
        start, first = after, behind
    return found


def join_rows(rows: Iterable[Row], predicted: Iterable[np.ndarray]) -> dict[int, list[int]]:
    """{number of a sentence: label of each of its words}, from rows in any order and what was
    predicted at each of their places, (L,) or longer."""
    parts: dict[int, dict[int, np.ndarray]] = defaultdict(dict)
    for row, answers in zip(rows, predicted, strict=True):
        parts[row.sentence][row.first] = answers[row.places]
    return {
        number: np.concatenate([found[first] for first in sorted(found)]).tolist()
        for number, found in parts.items()
    }

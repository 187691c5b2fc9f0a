"""Tagging: named entities in a text, as one label for each word.

A word may be more than one sub-token: the first carries the tag, the others are context, and the
head is one matrix on the features of each position (Devlin et al. 2019, arXiv:1810.04805, section
5.3). The files, and what tags mean: `data/conll.py`.

Left out: context from neighbouring sentences of a document, a CRF on top, partial credit for a
wrong border.

The score is that of CoNLL-2003 (Tjong Kim Sang and De Meulder 2003, arXiv:cs/0306050). Axes as in
`model.py`; k counts labels.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bert import Encoder, EncoderConfig, init_bert
from data.buckets import InBuckets, evenly_within
from data.conll import Entity, TaggedText, entities, open_tagged
from data.encoding import CLS, MASK, PAD, SEP, SPECIAL, encode_text
from data.tokens import SPLITS, AnyTokenizer, get_tokenizer, settings
from tasks.encoders import (
    TextFlags,
    answer_texts,
    answered,
    label_sums,
    outputs,
    pad_batch,
    similar_lengths,
)
from tasks.flags import FinetuneConfig
from tasks.whole import whole_file
from wordpiece import UNK


@dataclass
class Flags(FinetuneConfig):
    # of the word and of its tag, from 1, as in 2,5; empty: what the file shows
    columns: str = ""


GOAL, LOWER_IS_BETTER = "f1", False

# ---- the network ---------------------------------------------------------------------------------


@dataclass
class TagConfig(EncoderConfig):
    # a label's place is its id
    labels: tuple[str, ...] = field(default=(), metadata={"flag": False, "from_data": True})


class Tagger(Encoder):
    """One of the labels for each position."""

    Config = TagConfig

    def __init__(self, config: TagConfig):
        super().__init__(config)
        self.head = nn.Linear(config.n_embd, max(1, len(config.labels)))
        init_bert(self)

    def forward(
        self, tokens: Tensor, keep: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """tokens (B, T) -> logits (B, T, k); or, given targets (B, T), {"loss": summed loss,
        "accuracy": number of right labels}, and in evaluation also "predicted" (B, T)."""
        logits = self.head(self.dropout(self.features(tokens, keep=keep)))
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        return label_sums(loss, logits, targets, self.training)


# ---- words -> rows -> labels of words ------------------------------------------------------------


@dataclass(frozen=True)
class SentenceRow:
    """[CLS], the sub-tokens of consecutive words of a sentence, [SEP]. Some of the words are asked
    for: their tags are targets."""

    ids: np.ndarray  # (L,)
    places: np.ndarray  # (W,), where in ids the first sub-tokens of the words asked for are
    sentence: int  # its index
    first_word: int  # the index of the first word asked for; the others follow it


def sentence_rows(
    sentences: Iterable[list[str]], tokenizer: AnyTokenizer, T: int
) -> list[SentenceRow]:
    """Rows of at most T tokens, in which every word is asked for once; see `word_windows`.

    Each word is encoded by itself. A word without sub-tokens (a zero-width space in WordPiece)
    becomes [UNK], or [MASK] where there is none, so that every word has a place. A word of more
    than T - 2 sub-tokens is cut to T - 2. Raises ValueError where T < 3.
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
        for start, end, first, behind in word_windows([len(ids) for ids in pieces], T - 2):
            ids = [special[CLS], *(i for word in pieces[start:end] for i in word), special[SEP]]
            places = np.cumsum([1, *map(len, pieces[start : end - 1])])
            asked = places[first - start : behind - start]
            rows.append(SentenceRow(np.array(ids), asked, number, first))
    return rows


def word_windows(sizes: list[int], limit: int) -> list[tuple[int, int, int, int]]:
    """Words of these sizes (none above limit) -> [(start, end, first, behind)]: a window shows the
    words start to end - 1, of at most `limit` sub-tokens, and asks for first to behind - 1.

    A sentence that fits is one window. Otherwise each window takes as many words as fit, and the
    next one shows up to half of them again: the earlier window asks for the first half of what both
    show, the later one for the second. So a word at a border has context on both sides, and every
    word is asked for once. The borders do not depend on tags.
    """
    assert max(sizes, default=0) <= limit, "a word does not fit into a window"
    found, start, first, n = [], 0, 0, len(sizes)
    while first < n:
        end, used = start, 0
        while end < n and used + sizes[end] <= limit:
            used += sizes[end]
            end += 1
        # The next window must also hold the first word behind this one, so it may show less again.
        after, shared, most = end, 0, 0 if end == n else min(limit // 2, limit - sizes[end])
        while shared + sizes[after - 1] <= most:
            after -= 1
            shared += sizes[after]
        behind = n if end == n else (after + end) // 2
        found.append((start, end, first, behind))
        start, first = after, behind
    return found


def join_rows(rows: Iterable[SentenceRow], predicted: Iterable[np.ndarray]) -> dict[int, list[int]]:
    """{index of a sentence: label of each of its words}, from rows in any order and the labels
    predicted at the positions of each, (L,) or longer."""
    parts: dict[int, dict[int, np.ndarray]] = defaultdict(dict)
    for row, answers in zip(rows, predicted, strict=True):
        parts[row.sentence][row.first_word] = answers[row.places]
    return {
        number: np.concatenate([found[first] for first in sorted(found)]).tolist()
        for number, found in parts.items()
    }


# ---- batches -------------------------------------------------------------------------------------


class Data(InBuckets):
    """Tagged sentences. Validation: in order; if max_tokens is less than the text, evenly spaced
    sentences of it."""

    special_tokens = SPECIAL

    def __init__(
        self,
        text: TaggedText,
        split: str,
        tokenizer: AnyTokenizer,
        labels: tuple[str, ...],
        *,
        block_size: int,
        row_length: int = 0,
        max_tokens: int = 0,
        **buckets,
    ):
        """buckets: see InBuckets.make_buckets."""
        self.tokenizer, self.split, self.labels = tokenizer, split, tuple(labels)
        self.fingerprint, self.rule, self.prompts = text.hash, text.rule, text.prompts
        self.columns = text.columns[split]
        self.scheme, self.sentences = text.schemes[split], text.splits[split]
        index = {label: i for i, label in enumerate(self.labels)}
        self.answers = [np.array([index[tag] for tag in s.tags]) for s in self.sentences]
        shown = {"desc": f"tokenizing {split}", "unit": " sentences", "disable": None}
        words = tqdm((s.words for s in self.sentences), total=len(self.sentences), **shown)
        self.rows = sentence_rows(words, tokenizer, min(row_length or block_size, block_size))
        tokens = sum(len(row.ids) for row in self.rows)
        limit = 0 if split == "train" else max_tokens
        self.chosen = evenly_within(len(self.sentences), tokens, limit)
        kept = set(self.chosen.tolist())
        self.rows = [row for row in self.rows if row.sentence in kept]
        lengths = np.array([len(row.ids) for row in self.rows])
        self.make_buckets(lengths, split, block_size=block_size, **buckets)

    @classmethod
    def splits(cls, flags: Flags, sizes: dict, tokenizer: AnyTokenizer | None = None):
        """(train, validation). sizes["labels"] are those of a checkpoint; where empty, labels are
        made of the types in the training file. Raises ValueError for a tag that is none of them."""
        text = open_tagged(flags.data, flags.valid, flags.columns)
        tokenizer = tokenizer or get_tokenizer(flags, sizes, text, cls.special_tokens)
        labels = tuple(sizes.get("labels") or text.labels)
        text.check(labels)
        more = settings(flags, sizes, "row_length", "tokens_per_step")
        return tuple(cls(text, s, tokenizer, labels, **more) for s in SPLITS)

    def batch(self, i: int) -> dict[str, Tensor]:
        """{"tokens": (B, T), "targets": (B, T)}, with a target at the first sub-token of each word
        that a row asks for; if some rows are shorter than others, also "keep": (B, T), False at
        padding."""
        _, numbers, empty = self.buckets.batch(i)
        rows = [self.rows[k] for k in numbers]
        batch = pad_batch([row.ids for row in rows], self.tokenizer)
        batch["targets"] = targets = torch.full_like(batch["tokens"], -100)
        if not empty:
            for into, row in zip(targets.numpy(), rows, strict=True):
                behind = row.first_word + len(row.places)
                into[row.places] = self.answers[row.sentence][row.first_word : behind]
        return batch

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """The loss in nats per word, and the share of words with the right label, O included."""
        return {name: total / max(counts["loss"], 1) for name, total in sums.items()}

    def measure(self, predicted: dict[int, np.ndarray]) -> dict[str, float]:
        """{"precision", "recall", "f1"} over the entities of all sentences, joined from their rows.
        predicted[i] (B, T) are the indices of the labels at each position of batch i."""
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
        text += f"{len(set(found))} types ({scheme}, {self.columns}), "
        text += f"{len(self.rows):,} rows{self.buckets.describe()}"
        return text


def batch_shapes(flags: Flags, config: TagConfig, B: int, T: int) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(("tokens", "keep", "targets"), (B, T))


# ---- scores --------------------------------------------------------------------------------------


def entity_scores(gold: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """{"precision", "recall", "f1"}, shares from 0 to 1 over the entities of all sentences (micro).

    Counted as conlleval does: an entity is right if its type and both borders are; where nothing
    could be right, the share is 0. gold and predicted are the tags of the same sentences. Raises
    ValueError if they differ in number.
    """
    asked, found = both_placed(gold, predicted)
    return rates(asked, found)


def entity_scores_by_type(
    gold: list[list[str]], predicted: list[list[str]]
) -> dict[str, dict[str, float]]:
    """{type: its scores}, in alphabetical order; "entities" is their number in the gold tags."""
    asked, found = both_placed(gold, predicted)
    scores = {}
    for type_ in sorted({entity[0] for _, entity in asked | found}):
        a, b = ({place for place in places if place[1][0] == type_} for places in (asked, found))
        scores[type_] = {**rates(a, b), "entities": len(a)}
    return scores


def both_placed(gold: list[list[str]], predicted: list[list[str]]) -> list[set]:
    """[gold entities, predicted entities], each with the index of its sentence."""
    if len(gold) != len(predicted):
        raise ValueError(f"{len(predicted):,} sentences were predicted for {len(gold):,}: give all")
    for i, (a, b) in enumerate(zip(gold, predicted, strict=True)):
        if len(a) != len(b):
            raise ValueError(
                f"sentence {i:,} has {len(a):,} words and {len(b):,} predicted tags: give each one"
            )
    return [
        {(i, entity) for i, tags in enumerate(sentences) for entity in entities(tags)}
        for sentences in (gold, predicted)
    ]


def rates(asked: set, found: set) -> dict[str, float]:
    right = len(asked & found)
    return {
        "precision": right / max(len(found), 1),
        "recall": right / max(len(asked), 1),
        "f1": 2 * right / max(len(asked) + len(found), 1),
    }


# ---- words of a text -----------------------------------------------------------------------------

APOSTROPHES = "'’"
# In the alphabet of `shape`: a possessive; or a stretch without spaces from its first letter to its
# last, perhaps behind an @ or #; or one mark, repeated.
WORD = re.compile(r"['’]s(?![sw])|[@#]?[sw](?:\S*[sw])?m*|([^\sswm])\1*m*|m+")


def words_of(text: str) -> list[tuple[str, int, int]]:
    """[(word, start, end)]: the words of a raw text, each equal to text[start:end].

    The text is split at white space. Marks at either end of a stretch are words of their own; the
    same mark repeated is one word ("...", "!!"). Marks inside stay ("don't", "3.5", "e-mail", an
    address), and so do the @ and # of tweets in front. The 's of a possessive is a word, as in the
    corpora of the CoNLL tasks. Only white space is left out.

    Left out: other rules of treebanks (do n't, abbreviations that keep their dot), and words of
    text that has no spaces, such as Chinese.
    """
    words = []
    for match in WORD.finditer("".join(map(shape, text))):
        start, end = match.span()
        borders = [start, end]
        if end - start > 2 and text[end - 2] in APOSTROPHES and text[end - 1] in "sS":
            borders = [start, end - 2, end]
        words += [(text[a:b], a, b) for a, b in pairwise(borders)]
    return words


def shape(c: str) -> str:
    """A character as WORD sees it: s for that letter, w for another letter, a digit or _, m for one
    that joins the character before it (an accent, the selector behind an emoji), else itself."""
    if c == "_" or c.isalnum():
        return "s" if c in "sS" else "w"
    return "m" if unicodedata.category(c) in ("Mn", "Mc", "Me", "Cf") else c


def text_spans(tags: list[str], words: list[tuple[str, int, int]]) -> list[Entity]:
    """[(type, start, end)] in characters of a text; words are words_of(text), with a tag each."""
    return [(type_, words[a][1], words[b - 1][2]) for type_, a, b in entities(tags)]


def mark_entities(text: str, spans: Iterable[Entity]) -> str:
    """The text with these spans of characters marked: [Barack Obama]PERSON visited [Rome]PLACE.

    The spans do not overlap, and may be in any order."""
    parts, done = [], 0
    for type_, start, end in sorted(spans, key=lambda span: span[1:]):
        parts += [text[done:start], f"[{text[start:end]}]{type_}"]
        done = end
    return "".join([*parts, text[done:]])


# ---- sample.py -----------------------------------------------------------------------------------

SampleFlags = TextFlags


def tag(
    model: nn.Module,
    tokenizer: AnyTokenizer,
    prompts: list[str],
    flags: TextFlags,
    bar: tqdm | None = None,
    first_line: int = 0,
) -> list[str]:
    """Each text with its entities marked: [Barack Obama]person visited [Rome]location."""
    words = [words_of(text) for text in prompts]
    plain = [[word for word, _, _ in found] for found in words]
    rows = sentence_rows(plain, tokenizer, model.config.block_size)
    predicted: list[np.ndarray] = [np.empty(0)] * len(rows)
    for batch in similar_lengths([len(row.ids) for row in rows], flags.batch_size, bar):
        logits = outputs(model, pad_batch([rows[i].ids for i in batch], tokenizer))
        for i, labels in zip(batch, logits.argmax(-1).cpu().numpy(), strict=True):
            predicted[i] = labels
    of_words, answers = join_rows(rows, predicted), []
    for number, (text, found) in enumerate(zip(prompts, words, strict=True)):
        tags = [model.config.labels[label] for label in of_words.get(number, [])]
        answers.append(mark_entities(text, text_spans(tags, found)).rstrip("\n"))
    return answers


def sample(model: nn.Module, tokenizer: AnyTokenizer, flags: TextFlags, checkpoint: dict, score):
    if flags.eval:
        score(whole_file(Flags, Data, tokenizer, flags, checkpoint))
    else:
        answer_texts(tag, model, tokenizer, flags)


def show(model: nn.Module, tokenizer: AnyTokenizer, data: Data, folder: Path) -> list[str]:
    return answered(tag, model, tokenizer, data.prompts, SampleFlags())


def ask(prompts: list[str]) -> tuple[str, ...]:
    return ("--prompt", prompts[0]) if prompts and prompts[0] else ()

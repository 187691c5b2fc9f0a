"""Answers: a question about a text, answered by a piece of that text, as in SQuAD.

    [CLS] question [SEP] window of the context [SEP]
      0      0       0             1             1        segments

The head gives every position of a row two numbers, for an answer that starts there and for one that
ends there. Targets are the places of the answer's first and last token, and [CLS] twice where the
row has no answer (Devlin et al. 2019, arXiv:1810.04805, sections 4.2 and 4.3). The best span is the
pair with the highest sum, an end not before its start. A context of more tokens than fit into a row
is read in overlapping windows (the sliding window is that of BERT's released code).

An answer is a piece of the original text, with its capitals, accents and spaces. So the context is
cut into units of which the characters are known, and each is encoded by itself: a unit is a run of
characters without white space, punctuation or Chinese characters, or one of the latter two. These
are the borders of WordPiece too, and its ids are those of the whole text (but for U+000B, U+0085
and the like, white space that it drops without dividing a word). Byte-level BPE gets a space before
a unit where white space stood in the text; it encodes units of several punctuation marks ("...") or
an apostrophe with its letters ("n't") otherwise than it would the whole.

The files, and how answers are scored: `data/squad.py`. Left out: answers that begin or end inside a
unit ("1990" of "1990s"), which get the whole of it; answers put together from several spans; a
threshold tuned on the validation set; the preference for the window in which a token has the most
context on both sides (BERT's own code). Axes as in `model.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple

import numpy as np
import regex
import torch
import torch.nn as nn
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from tqdm import tqdm

from bert import Encoder, EncoderConfig, init_bert
from data.buckets import InBuckets, evenly_within
from data.encoding import CLS, PAD, SEP, assemble, encode_text
from data.lines import read_lines
from data.squad import SquadCorpus, open_squad, squad_scores
from data.tokens import SPLITS, AnyTokenizer, get_tokenizer, settings
from tasks.encoders import TextFlags, answer_texts, answered, collate, outputs
from tasks.flags import FinetuneConfig
from tasks.whole import whole_file
from wordpiece import IDEOGRAPH

Flags = FinetuneConfig
GOAL, LOWER_IS_BETTER = "f1", False

SHOWN = 4  # questions, after training
MAX_ANSWER = 30  # tokens of the longest span that is considered
THRESHOLD = 0.0  # by how much "no answer" must beat the best span
MAX_QUESTION = 64  # tokens; the rest of a longer question is not read
OVERLAP = 128  # tokens that two neighbouring windows share, half of a smaller window

# str.isspace counts U+001C to U+001F as white space, \s of `regex` does not.
SPACE = r"\s\x1c-\x1f"
ALONE = r"\p{P}$+<=>^`|~" + IDEOGRAPH.pattern.strip("[]")  # \p{P} lacks these ASCII signs
UNIT = regex.compile(rf"[^{SPACE}{ALONE}]+|[^{SPACE}]")

# ---- the network ---------------------------------------------------------------------------------


@dataclass
class AnswerConfig(EncoderConfig):
    # some questions have no answer
    may_abstain: bool = field(default=False, metadata={"flag": False, "from_data": True})


class Answerer(Encoder):
    """Where in the second part the answer to the first begins and ends; [CLS]: nowhere."""

    Config = AnswerConfig

    def __init__(self, config: AnswerConfig):
        super().__init__(config)
        self.head = nn.Linear(config.n_embd, 2)
        init_bert(self)

    def forward(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        keep: Tensor | None = None,
        start_targets: Tensor | None = None,
        end_targets: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """tokens (B, T) -> logits (B, 2, T) of the first and the last token, -inf at padding; or,
        given both targets (B,), {"start": summed loss, "end": summed loss}, and in evaluation
        "predicted", the logits."""
        logits = self.head(self.features(tokens, segments, keep)).mT
        if keep is not None:
            logits = logits.masked_fill(~keep[:, None], -torch.inf)
        if start_targets is None:
            return logits
        return span_sums(logits.float(), start_targets, end_targets, self.training)


def span_sums(logits: Tensor, starts: Tensor, ends: Tensor, training: bool) -> dict[str, Tensor]:
    """logits (B, 2, T), starts and ends (B,) -> the summed losses of both."""
    named = zip(("start", "end"), logits.unbind(1), (starts, ends), strict=True)
    sums = {name: F.cross_entropy(x, y, reduction="sum") for name, x, y in named}
    return sums if training else {**sums, "predicted": logits}


# ---- text -> rows --------------------------------------------------------------------------------


class Context(NamedTuple):
    """A text and its n tokens: ids (n,), and where in the text the unit of each starts and ends,
    both (n,). Units that the tokenizer drops, such as U+200B, have no tokens."""

    text: str
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def tokens(self, start: int, end: int) -> tuple[int, int] | None:
        """The first and the last token whose unit overlaps text[start:end], which must not be
        empty; None if no unit does."""
        found = np.flatnonzero((self.ends > start) & (self.starts < end))
        return (int(found[0]), int(found[-1])) if len(found) else None

    def characters(self, first: int, last: int) -> tuple[int, int]:
        """(start, end) of the text that tokens first to last stand for."""
        return int(self.starts[first]), int(self.ends[last])


class Window(NamedTuple):
    """Tokens start to stop - 1 of a context, which stand in the row from place `first` on."""

    start: int
    stop: int
    first: int

    @property
    def length(self) -> int:
        """Tokens of the row, [SEP] behind the window included."""
        return self.first + self.stop - self.start + 1

    def places(self, answer: tuple[int, int] | None) -> tuple[int, int]:
        """Where in the row an answer's first and last token are; (0, 0), which is [CLS], when it
        is not wholly in this window, or there is none."""
        if answer is None or answer[0] < self.start or answer[1] >= self.stop:
            return 0, 0
        return answer[0] - self.start + self.first, answer[1] - self.start + self.first


def encode_context(tokenizer: AnyTokenizer, text: str) -> Context:
    ids, starts, ends = [], [], []
    for unit in UNIT.finditer(text):
        start, end = unit.span()
        spaced = start == 0 or text[start - 1].isspace()
        found = tokenizer.encode(f" {unit[0]}" if spaced else unit[0])
        ids += found
        starts += [start] * len(found)
        ends += [end] * len(found)
    return Context(text, *(np.array(x, dtype=np.int64) for x in (ids, starts, ends)))


def encode_question(tokenizer: AnyTokenizer, text: str, T: int) -> np.ndarray:
    """Ids of at most MAX_QUESTION tokens, and half of what fits into a row of T."""
    if T < 5:
        raise ValueError(f"rows of {T} tokens have no room for a question: choose 5 or more")
    return np.array(encode_text(tokenizer, text), dtype=np.int64)[: min(MAX_QUESTION, (T - 3) // 2)]


def windows(n_question: int, n_context: int, T: int) -> list[Window]:
    """All that a context of n_context tokens needs in rows of at most T tokens: one where it fits,
    else full windows with OVERLAP, the last of them perhaps shorter."""
    size = T - 3 - n_question
    overlap = min(OVERLAP, size // 2)
    starts = range(0, max(1, n_context - overlap), size - overlap)
    return [Window(start, min(start + size, n_context), n_question + 2) for start in starts]


def make_row(
    tokenizer: AnyTokenizer, question: np.ndarray, context: Context, window: Window
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, segments), both (window.length,)."""
    special = tokenizer.special_tokens
    ids = context.ids[window.start : window.stop]
    return assemble([question, ids], special[CLS], special[SEP])


def question_rows(
    tokenizer: AnyTokenizer, question: str, context: str, T: int
) -> tuple[Context, list[Window], list[tuple[np.ndarray, np.ndarray]]]:
    """One question: its context, its windows, and a row (ids, segments) of at most T tokens for
    each of them. ValueError where the context has no token in it."""
    encoded, asked = encode_context(tokenizer, context), encode_question(tokenizer, question, T)
    if not len(encoded.ids):
        raise ValueError(f"the context {context[:60]!r} has no words in it: give a text")
    found = windows(len(asked), len(encoded.ids), T)
    return encoded, found, [make_row(tokenizer, asked, encoded, window) for window in found]


# ---- logits -> text ------------------------------------------------------------------------------


class Answer(NamedTuple):
    """text is context[start:end]; all three are empty for "no answer". `probability` is that of
    its start times that of its end, each among all places of its row."""

    text: str
    start: int
    end: int
    probability: float


def read_answer(
    context: Context, found: Sequence[Window], logits: Sequence[np.ndarray], may_abstain: bool
) -> Answer:
    """The answer that a model means by the logits of each window, (2, T) with T of at least its
    row's length; what lies beyond, padding, is not looked at. may_abstain: "no answer" is one."""
    rows = [x[:, : window.length] for x, window in zip(logits, found, strict=True)]
    spans = [best_span(x, w.first, w.length - 1) for x, w in zip(rows, found, strict=True)]
    best, lead = join_windows(spans)
    if may_abstain and lead > THRESHOLD:
        least = min(range(len(spans)), key=lambda window: spans[window].null)
        return Answer("", 0, 0, probability(rows[least], 0, 0))
    span, window = spans[best], found[best]
    offset = window.start - window.first
    start, end = context.characters(span.start + offset, span.end + offset)
    return Answer(
        context.text[start:end], start, end, probability(rows[best], span.start, span.end)
    )


def probability(logits: np.ndarray, start: int, end: int) -> float:
    """Of `start` among all places of the row (2, T), times that of `end`."""
    logits = logits.astype(np.float64)
    logits = logits - logits.max(1, keepdims=True)
    chosen = logits[0, start] + logits[1, end]
    return float(np.exp(chosen - np.log(np.exp(logits).sum(1)).sum()))


class Span(NamedTuple):
    """The best span of one window: the places of its first and last token in the row, the sum of
    their two logits, and `null`, the same sum for "no answer", which is position 0 twice."""

    start: int
    end: int
    score: float
    null: float


def best_span(logits: np.ndarray, first: int, stop: int, max_answer: int = MAX_ANSWER) -> Span:
    """logits (2, T): of starts and of ends. Both ends of the span lie in first to stop - 1, where
    the text is; it has at most max_answer tokens. Among equal spans, the one that starts first, and
    among these the shortest."""
    starts, ends = logits[:, first:stop].astype(np.float64)
    # Row i holds the ends i, i + 1, ... of spans that start at i; behind the text nothing ends.
    reach = min(max_answer, len(ends))
    padded = np.pad(ends, (0, reach - 1), constant_values=-np.inf)
    sums = starts[:, None] + sliding_window_view(padded, reach)
    start, length = np.unravel_index(sums.argmax(), sums.shape)
    null = float(logits[0, 0]) + float(logits[1, 0])
    return Span(int(first + start), int(first + start + length), float(sums[start, length]), null)


def join_windows(spans: Sequence[Span]) -> tuple[int, float]:
    """The best spans of all windows of one question -> (the window of the best of them, by how
    much "no answer" beats it). A question has no answer if no window has one, so the window that
    is least sure of that decides: the lowest null score."""
    best = max(range(len(spans)), key=lambda window: spans[window].score)
    return best, min(span.null for span in spans) - spans[best].score


# ---- batches -------------------------------------------------------------------------------------


class Data(InBuckets):
    """Rows of a question and a window of its context, as many as the context needs.

    Training leaves out questions whose answer is not where the file says, and keeps windows without
    an answer. Validation: always the same batches; if max_tokens is less than all, evenly spaced
    questions, each with all of its windows.
    """

    special_tokens = (PAD, CLS, SEP)

    def __init__(
        self,
        corpus: SquadCorpus,
        split: str,
        tokenizer: AnyTokenizer,
        *,
        block_size: int,
        row_length: int = 0,
        max_tokens: int = 0,
        **buckets,
    ):
        """buckets: see InBuckets.make_buckets."""
        training, T = split == "train", min(row_length or block_size, block_size)
        self.tokenizer, self.split = tokenizer, split
        self.fingerprint, self.rule = corpus.hash, corpus.rule
        self.may_abstain = corpus.may_abstain[split]
        # A question and behind its line the context, of different paragraphs.
        held_out = list(corpus.splits["validation"].items())[:SHOWN]
        self.prompts = [
            f"{' '.join(asked[0].text.split())}\n{context}" for context, asked in held_out
        ]
        # Of each question: itself, its ids, its context, and the tokens of its answer.
        self.questions, self.asked, self.contexts, self.spans = [], [], [], []
        self.left_out = 0
        shown = {"desc": f"tokenizing {corpus.name}", "unit": " paragraphs", "delay": 1}
        for text, questions in tqdm(corpus.splits[split].items(), disable=None, **shown):
            context = encode_context(tokenizer, text)
            if not len(context.ids):
                raise ValueError(
                    f"{corpus.name} has a context without words in it, {short(text)}: remove it, "
                    f"with its {len(questions)} question{'s' * (len(questions) > 1)}"
                )
            for question in questions:
                span = context.tokens(*question.span) if question.span else None
                if training and question.answers and not span:
                    self.left_out += 1
                    continue
                self.questions.append(question)
                self.asked.append(encode_question(tokenizer, question.text, T))
                self.contexts.append(context)
                self.spans.append(span)
        if not self.questions:
            raise ValueError(f"no answer in {corpus.name} for {split} is where the file says")
        # Of each row: its question and its window; the rows of question q are self.rows_of[q].
        self.rows: list[tuple[int, Window]] = []
        self.rows_of: list[range] = []
        for q, (asked, context) in enumerate(zip(self.asked, self.contexts, strict=True)):
            found = windows(len(asked), len(context.ids), T)
            self.rows_of.append(range(len(self.rows), len(self.rows) + len(found)))
            self.rows += [(q, window) for window in found]
        lengths = np.array([window.length for _, window in self.rows])
        n, tokens = len(self.questions), int(lengths.sum())
        self.chosen = evenly_within(n, tokens, 0 if training else max_tokens)  # questions
        self.chosen_rows = np.concatenate([self.rows_of[q] for q in self.chosen])
        lengths = lengths[self.chosen_rows]
        self.make_buckets(lengths, split, block_size=block_size, **buckets)

    @classmethod
    def splits(cls, flags: Flags, sizes: dict, tokenizer: AnyTokenizer | None = None):
        """(train, validation); without a tokenizer, that of --tokenizer, or one learnt from the
        contexts and questions for training."""
        corpus = open_squad(flags.data, valid=flags.valid)
        tokenizer = tokenizer or get_tokenizer(flags, sizes, corpus, cls.special_tokens)
        more = settings(flags, sizes, "row_length", "tokens_per_step")
        return tuple(cls(corpus, split, tokenizer, **more) for split in SPLITS)

    def batch(self, i: int) -> dict[str, Tensor]:
        """{"tokens": (B, T), "segments": (B, T), "start_targets": (B,), "end_targets": (B,)}, the
        targets being places in the row: 0, [CLS], where it has no answer; if some rows are shorter
        than others, "keep": (B, T), False at padding."""
        _, rows, empty = self.buckets.batch(i)
        ids, segments, targets = [], [], []
        for q, window in (self.rows[row] for row in self.chosen_rows[rows]):
            found = make_row(self.tokenizer, self.asked[q], self.contexts[q], window)
            ids.append(found[0])
            segments.append(found[1])
            # An answer that is nowhere to be found, in validation: predicted, but without a loss.
            lost = self.questions[q].answers and self.spans[q] is None
            targets.append((-100, -100) if lost or empty else window.places(self.spans[q]))
        starts, ends = torch.tensor(targets).T.contiguous()
        batch = collate(ids, self.tokenizer, segments)
        return {**batch, "start_targets": starts, "end_targets": ends}

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """The losses of both ends of the answer, per row, and their sum."""
        mean = {name: sums[name] / max(counts[name], 1) for name in ("start", "end")}
        return {"loss": mean["start"] + mean["end"], **mean}

    def measure(self, predicted: dict[int, np.ndarray]) -> dict[str, float]:
        """predicted[i]: (B, 2, T) logits of starts and ends of validation batch i, for all i ->
        exact match and F1 over the questions, in percent (data.squad.squad_scores)."""
        logits = {}
        for i in range(self.n_batches):
            rows = self.chosen_rows[self.buckets.batch(i)[1]]
            logits |= dict(zip(rows.tolist(), predicted[i], strict=True))
        said = []
        for q in self.chosen:
            found = [self.rows[row][1] for row in self.rows_of[q]]
            of_each = [logits[row] for row in self.rows_of[q]]
            said.append(read_answer(self.contexts[q], found, of_each, self.may_abstain).text)
        return squad_scores(said, [self.questions[q].answers for q in self.chosen])

    def describe(self) -> str:
        lengths, chosen = self.buckets.lengths, self.chosen
        text = f"{len(chosen):,} questions"
        if len(chosen) < len(self.questions):
            text += f" of {len(self.questions):,}, evenly spaced,"
        text += f" about {len({self.contexts[q].text for q in chosen}):,} paragraphs"
        if none := sum(not self.questions[q].answers for q in chosen):
            text += f", {none:,} of them without an answer"
        text += f", {len(lengths):,} rows, {lengths.sum():,} tokens"
        text += self.buckets.describe()
        if self.left_out:
            several = self.left_out > 1
            text += f"; {self.left_out:,} question{'s' * several} left out, "
            text += f"{'their' if several else 'its'} answer is not where the file says"
        return text


def batch_shapes(flags: Flags, config: AnswerConfig, B: int, T: int) -> dict[str, tuple[int, ...]]:
    places = dict.fromkeys(("tokens", "segments", "keep"), (B, T))
    return places | dict.fromkeys(("start_targets", "end_targets"), (B,))


# ---- sample.py -----------------------------------------------------------------------------------


@dataclass
class SampleFlags(TextFlags):
    prompt: list[str] = field(default_factory=list)  # a question; may be repeated; none: stdin
    context: str = ""  # the file with the text that holds the answers


def answer(
    model: nn.Module,
    tokenizer: AnyTokenizer,
    prompts: list[str],
    flags: SampleFlags,
    bar: tqdm | None = None,
    first: int = 0,
) -> list[str]:
    """For each question "answer 87.3%: … the context around [answer] …"; of a model that may
    abstain also "no answer 65.0%". The context is the file --context or, where that is empty,
    stands in each prompt, a line end behind the question, as in Data.prompts."""
    text = "\n".join(read_lines(Path(flags.context))) if flags.context else ""
    answers = []
    for prompt in prompts:
        question, context = (prompt.strip(), text) if flags.context else prompt.split("\n", 1)
        encoded, found, rows = question_rows(tokenizer, question, context, model.config.block_size)
        logits: list[np.ndarray] = []
        for start in range(0, len(rows), flags.batch_size):
            ids, segments = zip(*rows[start : start + flags.batch_size], strict=True)
            logits += list(outputs(model, collate(ids, tokenizer, segments)).cpu().numpy())
        answers.append(
            shown(context, read_answer(encoded, found, logits, model.config.may_abstain))
        )
        if bar is not None:
            bar.update()
    return answers


def shown(text: str, answer: Answer, around: int = 40) -> str:
    _, start, end, probability = answer
    if start == end:
        return f"no answer {probability:.1%}"
    before, behind = text[max(0, start - around) : start], text[end : end + around]
    before = f"…{before}" if start > around else before
    behind = f"{behind}…" if end + around < len(text) else behind
    place = " ".join(f"{before}[{text[start:end]}]{behind}".split())
    return f"{text[start:end]} {probability:.1%}: {place}"


def sample(model: nn.Module, tokenizer: AnyTokenizer, flags: SampleFlags, checkpoint: dict, score):
    if flags.eval:
        score(whole_file(Flags, Data, tokenizer, flags, checkpoint))
        return
    if not Path(flags.context).is_file():
        missing = f"{flags.context} is no file here" if flags.context else "is missing"
        raise ValueError(f"--context {missing}: name the text that holds the answers")
    answer_texts(answer, model, tokenizer, flags)


def show(model: nn.Module, tokenizer: AnyTokenizer, data: Data, folder: Path) -> list[str]:
    return answered(answer, model, tokenizer, data.prompts, SampleFlags())


def ask(prompts: list[str]) -> tuple[str, ...]:
    question = prompts[0].partition("\n")[0] if prompts else ""
    return "--context", "text.txt", "--prompt", question

"""Answers: a question about a text, answered by a piece of that text, as in SQuAD.

    [CLS] question [SEP] window of the context [SEP]
      0      0       0             1             1        segments

The head gives every position of a row two logits, one for an answer that starts there and one for
an answer that ends there. Targets are the places of the answer's first and last token, or twice
that of [CLS] where the row has no answer (Devlin et al. 2019, arXiv:1810.04805, sections 4.2 and
4.3). The best span has the highest sum of both logits, and an end that is not before its start. A
context of more tokens than fit into a row is read in overlapping windows (the sliding window of
BERT's released code).

An answer is a piece of the original text, with its capitals, accents and spaces. So the context is
cut into units whose places in the text are known, and each is encoded by itself: a unit is a run of
characters without white space, punctuation or Chinese characters, or one of the latter two.
WordPiece has these borders too, so its ids are those of the whole text (except at U+000B, U+0085
and the like, white space that it drops without dividing a word). For byte-level BPE a unit begins
with a space where the text has white space before it; "..." and "n't" become other tokens than in
the whole text.

The files, and how answers are scored: `data/squad.py`. Left out: answers that begin or end inside a
unit ("1990" of "1990s"), which become the whole unit; answers made of more than one span; a
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
from data.encoding import CLS, PAD, SEP, encode_text
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
OVERLAP = 128  # tokens that two neighbouring windows share; half of a window if that is less

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
    """Where in the context the answer to the question starts and ends; at [CLS] if nowhere."""

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
        """tokens (B, T) -> logits (B, 2, T) of starts and ends, -inf at padding; or, given both
        targets (B,), {"start": summed loss, "end": summed loss}, and in evaluation also
        "predicted", the logits."""
        logits = self.head(self.features(tokens, segments, keep)).mT
        if keep is not None:
            logits = logits.masked_fill(~keep[:, None], -torch.inf)
        if start_targets is None:
            return logits
        return span_sums(logits.float(), start_targets, end_targets, self.training)


def span_sums(logits: Tensor, starts: Tensor, ends: Tensor, training: bool) -> dict[str, Tensor]:
    """logits (B, 2, T), targets starts (B,) and ends (B,) -> what Answerer.forward returns."""
    named = zip(("start", "end"), logits.unbind(1), (starts, ends), strict=True)
    sums = {name: F.cross_entropy(x, y, reduction="sum") for name, x, y in named}
    return sums if training else {**sums, "predicted": logits}


# ---- text -> rows --------------------------------------------------------------------------------


class Context(NamedTuple):
    """A text and its n tokens: ids (n,), and where in the text the unit of each token starts and
    ends, each (n,). Units that the tokenizer drops, such as U+200B, have no tokens."""

    text: str
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def tokens(self, start: int, end: int) -> tuple[int, int] | None:
        """The indices of the first and the last token whose unit overlaps text[start:end], which
        must not be empty; None if no unit does."""
        found = np.flatnonzero((self.ends > start) & (self.starts < end))
        return (int(found[0]), int(found[-1])) if len(found) else None

    def characters(self, first: int, last: int) -> tuple[int, int]:
        """(start, end) of the text that the tokens from first to last stand for."""
        return int(self.starts[first]), int(self.ends[last])


class Window(NamedTuple):
    """Tokens start to stop - 1 of a context; in the row they begin at place `first`."""

    start: int
    stop: int
    first: int

    @property
    def length(self) -> int:
        """The number of tokens of the row, with the [SEP] behind the window."""
        return self.first + self.stop - self.start + 1

    def row(self, question: np.ndarray, context: Context) -> list[np.ndarray]:
        """The ids of both parts of the row."""
        return [question, context.ids[self.start : self.stop]]

    def places(self, answer: tuple[int, int] | None) -> tuple[int, int]:
        """The places in the row of an answer's first and last token; (0, 0), which is [CLS], when
        there is no answer or this window does not hold all of it."""
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
    """The ids of a question, cut to MAX_QUESTION tokens and to half of what fits into a row of T
    tokens. Raises ValueError for T < 5."""
    if T < 5:
        raise ValueError(f"rows of {T} tokens have no room for a question: choose 5 or more")
    return np.array(encode_text(tokenizer, text), dtype=np.int64)[: min(MAX_QUESTION, (T - 3) // 2)]


def context_windows(n_question: int, n_context: int, T: int) -> list[Window]:
    """The windows of a context of n_context tokens in rows of at most T tokens: one where it fits,
    else windows as large as fit, with OVERLAP; the last may be smaller."""
    size = T - 3 - n_question
    overlap = min(OVERLAP, size // 2)
    starts = range(0, max(1, n_context - overlap), size - overlap)
    return [Window(start, min(start + size, n_context), n_question + 2) for start in starts]


def question_rows(
    tokenizer: AnyTokenizer, question: str, context: str, T: int
) -> tuple[Context, list[Window], list[list[np.ndarray]]]:
    """The encoded context of a question, its windows, and for each the two parts of a row of at
    most T tokens. Raises ValueError where the context has no tokens."""
    encoded, asked = encode_context(tokenizer, context), encode_question(tokenizer, question, T)
    if not len(encoded.ids):
        raise ValueError(f"the context {context[:60]!r} has no words in it: give a text")
    windows = context_windows(len(asked), len(encoded.ids), T)
    return encoded, windows, [window.row(asked, encoded) for window in windows]


# ---- logits -> text ------------------------------------------------------------------------------


class Answer(NamedTuple):
    """text is context[start:end]; for "no answer" text is empty, and start and end are 0.
    `probability` is that of the start times that of the end, each among all places of a row."""

    text: str
    start: int
    end: int
    probability: float


def read_answer(
    context: Context, windows: Sequence[Window], logits: Sequence[np.ndarray], may_abstain: bool
) -> Answer:
    """The answer that follows from the logits of each window, (2, T), with T at least the length of
    its row: padding behind that is not looked at. may_abstain: "no answer" is possible."""
    rows = [x[:, : window.length] for x, window in zip(logits, windows, strict=True)]
    spans = [best_span(x, w.first, w.length - 1) for x, w in zip(rows, windows, strict=True)]
    best, lead = join_windows(spans)
    if may_abstain and lead > THRESHOLD:
        least = min(range(len(spans)), key=lambda window: spans[window].null)
        return Answer("", 0, 0, probability(rows[least], 0, 0))
    span, window = spans[best], windows[best]
    offset = window.start - window.first
    start, end = context.characters(span.start + offset, span.end + offset)
    return Answer(
        context.text[start:end], start, end, probability(rows[best], span.start, span.end)
    )


def probability(logits: np.ndarray, start: int, end: int) -> float:
    """The probability of `start` among all places of a row, times that of `end`. logits (2, T)"""
    logits = logits.astype(np.float64)
    logits = logits - logits.max(1, keepdims=True)
    chosen = logits[0, start] + logits[1, end]
    return float(np.exp(chosen - np.log(np.exp(logits).sum(1)).sum()))


class Span(NamedTuple):
    """The best span of one window: the places of its first and last token in the row, the sum of
    their logits, and `null`, the same sum for "no answer", which is place 0 twice."""

    start: int
    end: int
    score: float
    null: float


def best_span(logits: np.ndarray, first: int, stop: int, max_answer: int = MAX_ANSWER) -> Span:
    """logits (2, T), of starts and of ends -> the best span of at most max_answer tokens among the
    places first to stop - 1, where the text is. Of equal spans, the one that starts first counts,
    and of these the shortest."""
    starts, ends = logits[:, first:stop].astype(np.float64)
    # Row i has the ends i, i + 1, ... of spans that start at i; none is behind the text.
    reach = min(max_answer, len(ends))
    padded = np.pad(ends, (0, reach - 1), constant_values=-np.inf)
    sums = starts[:, None] + sliding_window_view(padded, reach)
    start, length = np.unravel_index(sums.argmax(), sums.shape)
    null = float(logits[0, 0]) + float(logits[1, 0])
    return Span(int(first + start), int(first + start + length), float(sums[start, length]), null)


def join_windows(spans: Sequence[Span]) -> tuple[int, float]:
    """The best spans of all windows of one question -> (the index of the best of them, by how much
    "no answer" beats it). A question has no answer if no window has one, so the lowest null score
    decides: that of the window that is least sure."""
    best = max(range(len(spans)), key=lambda window: spans[window].score)
    return best, min(span.null for span in spans) - spans[best].score


# ---- batches -------------------------------------------------------------------------------------


class Data(InBuckets):
    """Rows of a question and a window of its context, as many as the context needs.

    Training leaves out questions whose answer is not where the file says, and keeps windows without
    an answer. Validation: always the same batches; if max_tokens is less than all, evenly spaced
    questions, each with all its windows.
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
        # Each prompt is a question, a line end and its context, all of different paragraphs.
        held_out = list(corpus.splits["validation"].items())[:SHOWN]
        self.prompts = [
            f"{' '.join(asked[0].text.split())}\n{context}" for context, asked in held_out
        ]
        # For each question: itself, its ids, its context, and the tokens of its answer.
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
        # For each row: its question and its window; the rows of question q are self.rows_of[q].
        self.rows: list[tuple[int, Window]] = []
        self.rows_of: list[range] = []
        for q, (asked, context) in enumerate(zip(self.asked, self.contexts, strict=True)):
            windows = context_windows(len(asked), len(context.ids), T)
            self.rows_of.append(range(len(self.rows), len(self.rows) + len(windows)))
            self.rows += [(q, window) for window in windows]
        lengths = np.array([window.length for _, window in self.rows])
        n, tokens = len(self.questions), int(lengths.sum())
        self.chosen = evenly_within(n, tokens, 0 if training else max_tokens)  # questions
        self.chosen_rows = np.concatenate([self.rows_of[q] for q in self.chosen])
        lengths = lengths[self.chosen_rows]
        self.make_buckets(lengths, split, block_size=block_size, **buckets)

    @classmethod
    def splits(cls, flags: Flags, sizes: dict, tokenizer: AnyTokenizer | None = None):
        """(train, validation); a tokenizer is learnt from the training contexts and questions
        unless given."""
        corpus = open_squad(flags.data, valid=flags.valid)
        tokenizer = tokenizer or get_tokenizer(flags, sizes, corpus, cls.special_tokens)
        more = settings(flags, sizes, "row_length", "tokens_per_step")
        return tuple(cls(corpus, split, tokenizer, **more) for split in SPLITS)

    def batch(self, i: int) -> dict[str, Tensor]:
        """{"tokens": (B, T), "segments": (B, T), "start_targets": (B,), "end_targets": (B,)}, the
        targets being places in the row: 0, [CLS], where it has no answer; if some rows are shorter
        than others, also "keep": (B, T), False at padding."""
        _, numbers, empty = self.buckets.batch(i)
        rows, targets = [], []
        for q, window in (self.rows[row] for row in self.chosen_rows[numbers]):
            rows.append(window.row(self.asked[q], self.contexts[q]))
            # In validation, an answer that is not where the file says is predicted without a loss.
            lost = self.questions[q].answers and self.spans[q] is None
            targets.append((-100, -100) if lost or empty else window.places(self.spans[q]))
        starts, ends = torch.tensor(targets).T.contiguous()
        return {**collate(rows, self.tokenizer), "start_targets": starts, "end_targets": ends}

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """The losses of start and end in nats per row, and their sum."""
        mean = {name: sums[name] / max(counts[name], 1) for name in ("start", "end")}
        return {"loss": mean["start"] + mean["end"], **mean}

    def measure(self, predicted: dict[int, np.ndarray]) -> dict[str, float]:
        """predicted[i] (B, 2, T), the logits of each batch i -> exact match and F1 over the
        questions, in percent (data.squad.squad_scores)."""
        logits = {}
        for i in range(self.n_batches):
            rows = self.chosen_rows[self.buckets.batch(i)[1]]
            logits |= dict(zip(rows.tolist(), predicted[i], strict=True))
        texts = []
        for q in self.chosen:
            windows = [self.rows[row][1] for row in self.rows_of[q]]
            of_each = [logits[row] for row in self.rows_of[q]]
            texts.append(read_answer(self.contexts[q], windows, of_each, self.may_abstain).text)
        return squad_scores(texts, [self.questions[q].answers for q in self.chosen])

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
            many = self.left_out > 1
            text += f"; {self.left_out:,} question{'s' * many} left out, "
            text += f"{'their' if many else 'its'} answer is not where the file says"
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
    first_line: int = 0,
) -> list[str]:
    """For each question "answer 87.3%: … the context around [answer] …", or, from a model that may
    abstain, "no answer 65.0%". The context is the file --context; where that is empty, each prompt
    is a question, a line end and its context, as in Data.prompts."""
    text = "\n".join(read_lines(Path(flags.context))) if flags.context else ""
    answers = []
    for prompt in prompts:
        question, context = (prompt.strip(), text) if flags.context else prompt.split("\n", 1)
        encoded, windows, rows = question_rows(
            tokenizer, question, context, model.config.block_size
        )
        logits: list[np.ndarray] = []
        for start in range(0, len(rows), flags.batch_size):
            batch = collate(rows[start : start + flags.batch_size], tokenizer)
            logits += list(outputs(model, batch).cpu().numpy())
        found = read_answer(encoded, windows, logits, model.config.may_abstain)
        answers.append(format_answer(context, found))
        if bar is not None:
            bar.update()
    return answers


def format_answer(text: str, answer: Answer, around: int = 40) -> str:
    """An answer as people read it, with `around` characters of the text on both sides of it."""
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

"""BERT's data for questions whose answer is a piece of a given text, as in SQuAD.

The class fulfils what `data/windows.py` says of every data class. The files: `data/squad.py`; how a
question and its context become rows: `data/contexts.py`; how answers are scored: `answers.py`.

As in Devlin et al. 2019 (arXiv:1810.04805, sections 4.2 and 4.3), the targets are the places of the
answer's first and last token, and [CLS] twice where the row has no answer.
"""

from reprlib import repr as short

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from answers import score
from data.buckets import Buckets, evenly_within, pad_rows
from data.contexts import Window, encode_context, encode_question, make_row, read_answer, windows
from data.encoding import CLS, PAD, SEP
from data.squad import SquadCorpus, open_squad
from data.tokens import SPLITS, AnyTokenizer, get_tokenizer, settings

PROMPTS = 4


class Questions:
    """Rows of a question and a window of its context, as many as the context needs: in steps of at
    most tokens_per_step tokens, padding included, each dealt out to micro-batches of about
    tokens_per_batch = batch_size · block_size, by `Buckets`: each row once an epoch.

    Training leaves out questions whose answer is not where the file says, and keeps windows without
    an answer. Validation: always the same batches; if max_tokens is less than all, evenly spaced
    questions, each with all of its windows.
    """

    def __init__(
        self,
        corpus: SquadCorpus,
        split: str,
        tokenizer: AnyTokenizer,
        *,
        block_size: int,
        batch_size: int,
        row_length: int = 0,
        tokens_per_step: int = 0,
        seed: int = 0,
        max_tokens: int = 0,
    ):
        training, T = split == "train", min(row_length or block_size, block_size)
        self.tokenizer, self.split = tokenizer, split
        self.fingerprint, self.rule = corpus.hash, corpus.rule
        self.may_abstain = corpus.may_abstain[split]
        # A question and behind its line the context, of different paragraphs.
        held_out = list(corpus.splits["validation"].items())[:PROMPTS]
        self.prompts = [
            f"{' '.join(asked[0].text.split())}\n{context}" for context, asked in held_out
        ]
        self.tokens_per_batch = batch_size * block_size
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
        self.buckets = Buckets(
            lengths, self.tokens_per_batch, tokens_per_step, seed=seed, training=training
        )
        self.n_batches = self.buckets.n_batches
        self.tokens_per_epoch = self.n_batches * self.tokens_per_batch

    @classmethod
    def splits(cls, config, sizes: dict, tokenizer: AnyTokenizer | None = None):
        """(train, validation); without a tokenizer, that of --tokenizer, or one learnt from the
        contexts and questions for training."""
        corpus = open_squad(config.data, valid=config.valid)
        tokenizer = tokenizer or get_tokenizer(config, sizes, corpus, (PAD, CLS, SEP))
        more = settings(config, sizes, "row_length", "tokens_per_step")
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
        tokens, keep = pad_rows(ids, self.tokenizer.special_tokens[PAD])
        starts, ends = torch.tensor(targets).T.contiguous()
        batch = {"tokens": tokens, "segments": pad_rows(segments, 0)[0]}
        batch |= {"start_targets": starts, "end_targets": ends}
        return batch if keep.all() else {**batch, "keep": keep}

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """The losses of both ends of the answer, per row, and their sum."""
        mean = {name: sums[name] / max(counts[name], 1) for name in ("start", "end")}
        return {"loss": mean["start"] + mean["end"], **mean}

    def measure(self, predicted: dict[int, np.ndarray]) -> dict[str, float]:
        """predicted[i]: (B, 2, T) logits of starts and ends of validation batch i, for all i ->
        exact match and F1 over the questions, in percent (answers.score)."""
        logits = {}
        for i in range(self.n_batches):
            rows = self.chosen_rows[self.buckets.batch(i)[1]]
            logits |= dict(zip(rows.tolist(), predicted[i], strict=True))
        said = []
        for q in self.chosen:
            found = [self.rows[row][1] for row in self.rows_of[q]]
            of_each = [logits[row] for row in self.rows_of[q]]
            said.append(read_answer(self.contexts[q], found, of_each, self.may_abstain).text)
        return score(said, [self.questions[q].answers for q in self.chosen])

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

"""A pretrained encoder with the head of a task: classification, tagging, answers, similarity.

Each head is the one of Devlin et al. 2019 (arXiv:1810.04805, section 4), and of Hugging Face's
classes: one matrix behind the pooler, the features of each position, or both ends of a span. The
data of each is in data/: `labelled.py`, `conll.py`, `squad.py`, `similar.py`. Fine-tuning a GPT
needs no other model, only other data: `completions.py`.

Papers: embeddings by contrast within a batch (Henderson et al. 2017, arXiv:1705.00652; Reimers and
Gurevych 2019, arXiv:1908.10084). Axes as in `model.py`; k counts labels.
"""

from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bert import Encoder, EncoderConfig, init_bert

# Settings without a flag: a run takes them from its data.
LEARNT = ("labels", "pairs", "may_abstain")


@dataclass
class TagConfig(EncoderConfig):
    labels: tuple[str, ...] = field(default=(), metadata={"flag": False})  # a label's place: its id


@dataclass
class LabelConfig(TagConfig):
    pairs: bool = field(default=False, metadata={"flag": False})  # a label is for two texts


@dataclass
class AnswerConfig(EncoderConfig):
    may_abstain: bool = field(default=False, metadata={"flag": False})  # some have no answer


class Classifier(Encoder):
    """One of the labels for a text, or for a pair of texts: a matrix behind the pooled [CLS]."""

    def __init__(self, config: LabelConfig):
        super().__init__(config)
        self.pooler = nn.Linear(config.n_embd, config.n_embd)
        self.head = nn.Linear(config.n_embd, max(1, len(config.labels)))
        init_bert(self)

    def forward(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        keep: Tensor | None = None,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """tokens (B, T) -> logits (B, k); or, given targets (B,), {"loss": summed loss, each times
        its row's weight, "accuracy": number right}, and in evaluation "predicted" (B,)."""
        features = self.features(tokens, segments, keep)
        logits = self.head(self.dropout(self.pooled(features)))
        if targets is None:
            return logits
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        if weights is not None:
            losses = losses * weights
        return label_sums(losses.sum(), logits, targets, self.training)


def label_sums(loss: Tensor, logits: Tensor, targets: Tensor, training: bool) -> dict[str, Tensor]:
    predicted = logits.argmax(-1)
    sums = {"loss": loss, "accuracy": (predicted == targets).sum()}
    return sums if training else {**sums, "predicted": predicted}


class Tagger(Encoder):
    """One of the labels for each position."""

    def __init__(self, config: TagConfig):
        super().__init__(config)
        self.head = nn.Linear(config.n_embd, max(1, len(config.labels)))
        init_bert(self)

    def forward(
        self, tokens: Tensor, keep: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """tokens (B, T) -> logits (B, T, k); or, given targets (B, T), {"loss": summed,
        "accuracy": number right}, and in evaluation "predicted" (B, T)."""
        logits = self.head(self.dropout(self.features(tokens, keep=keep)))
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        return label_sums(loss, logits, targets, self.training)


class Answerer(Encoder):
    """Where in the second part the answer to the first begins and ends; [CLS]: nowhere."""

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
    named = zip(("start", "end"), logits.unbind(1), (starts, ends), strict=True)
    sums = {name: F.cross_entropy(x, y, reduction="sum") for name, x, y in named}
    return sums if training else {**sums, "predicted": logits}


class Similarity(Encoder):
    """An embedding for each text, the mean of its features; trained so that a text is nearer to
    its own partner than to those of the other rows."""

    TEMPERATURE = 0.05  # of the cosines

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        init_bert(self)

    def forward(
        self, tokens: Tensor, keep: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """tokens (N, T) -> embeddings (N, C); or, given targets (B,) and N = 2B, row targets[j] of
        the second half being the partner of row j of the first, {"loss": summed, "accuracy":
        number of rows that are nearest to their own}, and in evaluation "predicted" (2B, C)."""
        embeddings = mean_pooled(self.features(tokens, keep=keep), keep)
        if targets is None:
            return embeddings
        a, b = F.normalize(embeddings.float(), dim=-1).chunk(2)
        scores = a @ b.T / self.TEMPERATURE
        loss = F.cross_entropy(scores, targets, reduction="sum")
        sums = {"loss": loss, "accuracy": (scores.argmax(-1) == targets).sum()}
        return sums if self.training else {**sums, "predicted": embeddings}


def mean_pooled(features: Tensor, keep: Tensor | None) -> Tensor:
    """(B, T, C), (B, T) -> (B, C): the mean over all positions that are no padding."""
    if keep is None:
        return features.mean(1)
    return (features * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)

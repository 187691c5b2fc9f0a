"""A pretrained encoder with the head of a task: classification, tagging, answers, similarity; and
what helps when little is trained on: frozen layers, smaller rates below, low-rank adapters.

Each head is the one of Devlin et al. 2019 (arXiv:1810.04805, section 4), and of Hugging Face's
classes: one matrix behind the pooler, the features of each position, or both ends of a span. The
data of each is in data/: `labelled.py`, `conll.py`, `squad.py`, `similar.py`. Fine-tuning a GPT
needs no other model, only other data: `completions.py`.

Left out: prompts that are learnt (prefix tuning), adapters of other shapes, several tasks at once.

Papers: embeddings by contrast within a batch (Henderson et al. 2017, arXiv:1705.00652; Reimers and
Gurevych 2019, arXiv:1908.10084); smaller rates in lower layers (Howard and Ruder 2018,
arXiv:1801.06146); low-rank adapters (Hu et al. 2021, arXiv:2106.09685). Axes as in `model.py`; k
counts labels.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bert import Encoder, EncoderConfig, init_bert
from model import Attention

# ---- heads ---------------------------------------------------------------------------------------


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


HEADS = ("pooler.", "head.", "mlm_", "nsp_head.")  # how names begin that are no encoder's


def take_weights(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Copies what another task's model of the same sizes has learnt; what only the one or the
    other has must be heads. -> names of those that stay fresh, the last matrix ("head") among
    them, which has other labels even where its shape is the same. Raises ValueError."""
    own = model.state_dict()
    state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    fresh, unused = own.keys() - state.keys(), state.keys() - own.keys()
    odd = sorted(n for n in fresh | unused if not n.startswith(HEADS))
    odd += sorted(n for n in own.keys() & state.keys() if own[n].shape != state[n].shape)
    if odd:
        raise ValueError(f"the models do not fit together: {', '.join(odd[:5])}")
    model.load_state_dict({name: state[name] for name in own.keys() - fresh}, strict=False)
    return sorted(fresh)


# ---- what is trained, and how fast ---------------------------------------------------------------


def depth(name: str) -> float:
    """Of a parameter: 0 for embeddings, i + 1 for block i, infinite for what comes behind them."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return 0 if "embedding" in name else math.inf


def freeze(model: nn.Module, what: str) -> None:
    """what: "embeddings", or a number n: these and the first n blocks. ValueError otherwise, and
    where nothing is left that learns."""
    layers = len(model.blocks)
    if what != "embeddings" and not (what.isdecimal() and 1 <= int(what) <= layers):
        raise ValueError(f"--freeze {what} is not known: choose embeddings, or 1 to {layers}")
    frozen = 0 if what == "embeddings" else int(what)
    for name, parameter in model.named_parameters():
        if depth(name) <= frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"--freeze {what} leaves nothing that learns: freeze less")


def rate_scale(model: nn.Module, decay: float) -> Callable[[str], float]:
    """The factor of the learning rate for a parameter's name: 1 for heads, decay for the last
    block, decay² for the one before it, …, the smallest for embeddings."""
    layers = len(model.blocks)
    return lambda name: decay ** max(0, layers + 1 - depth(name))


class LoRA(nn.Module):
    """A frozen matrix W that learns a change of rank r: y = W x + 2 · B A x, with A (r, inputs) and
    B (outputs, r). B begins as zeros, so that the first step begins from the model as it was."""

    SCALE = 2.0  # alpha / r in the paper's terms

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.up = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.SCALE * F.linear(F.linear(x, self.down), self.up)


def add_adapters(model: nn.Module, rank: int) -> None:
    """Queries and values of each self-attention learn by LoRA alone, as in the paper; of all other
    parameters only the heads learn."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(HEADS))
    for module in list(model.modules()):
        if isinstance(module, Attention):
            module.q, module.v = LoRA(module.q, rank), LoRA(module.v, rank)


def merged_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """That of an ordinary model that computes the same: adapters are added to their matrix."""
    merged = dict(state)
    for name in (n.removesuffix(".down") for n in state if n.endswith(".down")):
        down, up = (merged.pop(f"{name}.{part}") for part in ("down", "up"))
        merged[f"{name}.weight"] = merged.pop(f"{name}.linear.weight") + LoRA.SCALE * up @ down
        if f"{name}.linear.bias" in merged:
            merged[f"{name}.bias"] = merged.pop(f"{name}.linear.bias")
    return merged


def adapter_rank(state: dict[str, Tensor]) -> int:
    """Of the adapters in a state, 0 where it has none."""
    return next((t.shape[0] for name, t in state.items() if name.endswith(".q.down")), 0)


def limit_what_learns(model: nn.Module, lora_rank: int, frozen: str) -> None:
    """By --lora_rank, if the checkpoint has no adapters yet, and --freeze."""
    if lora_rank and not adapter_rank(model.state_dict()):
        add_adapters(model, lora_rank)
    if frozen:
        freeze(model, frozen)

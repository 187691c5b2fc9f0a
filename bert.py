"""BERT: the encoder that learns from masked words and from pairs of sentences.

Every position sees all others, so the model cannot learn from the next word. Instead, some words
of the input are hidden, and the model predicts them (masked language modelling, MLM); and from the
first position it predicts whether the second part of the input follows the first in its document
(next-sentence prediction, NSP). `tasks/masked.py` chooses the words, `data/sentence_pairs.py` the
pairs.

Left out on purpose: the variants of RoBERTa, ALBERT and ELECTRA, except for what is a setting here
(`nsp`, `pre_ln`, and the masking rate of the data). Heads of other tasks are in tasks/.

The file needs torch and `model.py`; `python bert.py` learns to fill in letters of a sentence.

Papers: BERT (Devlin et al. 2019, arXiv:1810.04805); GELU (Hendrycks and Gimpel, arXiv:1606.08415);
without NSP: RoBERTa (Liu et al. 2019, arXiv:1907.11692); pre-LN, no dropout, no NSP in short
runs: Cramming (Geiping and Goldstein 2022, arXiv:2212.14034). Axes as in `model.py`; N counts the
masked positions of a batch.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import model
from model import Block, Dropout, Mask, check_sizes, count_parameters, initialise, padding_mask

SEGMENTS = 2  # the two parts of the input


@dataclass
class EncoderConfig:
    vocab_size: int = 30522  # tokens that the model can read and write
    block_size: int = 512  # longest input, with [CLS] and each [SEP]
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads; must divide n_embd
    n_embd: int = 768  # width of the residual stream
    n_ff: int = 0  # width inside the MLP; 0 means 4 x n_embd
    dropout: float = 0.1  # probability, in embeddings and residual branches
    attention_dropout: float = 0.1  # probability that a query misses a key
    bias: bool = True  # biases in the linear layers and LayerNorms of the encoder
    ln_eps: float = 1e-12  # added to the variance in LayerNorm
    pre_ln: bool = False  # LayerNorm before each sublayer, instead of after it

    def __post_init__(self):
        self.n_ff = self.n_ff or 4 * self.n_embd
        check_sizes(self, "dropout", "attention_dropout")


@dataclass
class BERTConfig(EncoderConfig):
    nsp: bool = True  # pairs of sentences and their head; false: masked words alone, packed text


class Encoder(nn.Module):
    """What every model of this family has: embeddings and blocks. Heads use the features: those of
    pretraining are in BERT below, those of other tasks in the files of tasks/."""

    Config = EncoderConfig

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config, C = config, config.n_embd
        self.token_embedding = nn.Embedding(config.vocab_size, C)
        self.position_embedding = nn.Embedding(config.block_size, C)
        self.segment_embedding = nn.Embedding(SEGMENTS, C)
        self.embedding_norm = nn.LayerNorm(C, config.ln_eps, bias=config.bias)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(self.make_block(config) for _ in range(config.n_layer))
        # A pre-LN stack ends without a norm of its own; post-LN blocks have already normalised.
        self.norm = (
            nn.LayerNorm(C, config.ln_eps, bias=config.bias) if config.pre_ln else nn.Identity()
        )

    def make_block(self, config: EncoderConfig) -> Block:
        return Block(config, pre_ln=config.pre_ln, act=F.gelu)

    def features(
        self, tokens: Tensor, segments: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """tokens, segments, keep (B, T), as in BERT.forward -> features (B, T, C).

        Raises ValueError for more than block_size positions.
        """
        T, block_size = tokens.size(1), self.config.block_size
        if block_size < T:
            raise ValueError(
                f"{T} positions are more than block_size={block_size}: shorten the input"
            )
        segments = torch.zeros_like(tokens) if segments is None else segments
        x = self.token_embedding(tokens) + self.position_embedding.weight[:T]
        x = self.dropout(self.embedding_norm(x + self.segment_embedding(segments)))
        mask = self.attention_mask(keep)
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.norm(x)

    def attention_mask(self, keep: Tensor | None) -> Mask:
        """What every query of a block may see, from keep (B, T), None without padding."""
        return None if keep is None else padding_mask(keep)

    def pooled(self, features: Tensor) -> Tensor:
        """features (B, T, C) -> (B, C): the pooler, where a model has one, prepares the first
        position, [CLS], for a head."""
        return torch.tanh(self.pooler(features[:, 0]))

    def flops_per_token(self) -> int:
        """Training in rows of block_size takes 6 for each weight of the blocks and 12·L·C·T for the
        attention scores; heads are left out."""
        c = self.config
        return 6 * count_parameters(self.blocks) + 12 * c.n_layer * c.n_embd * c.block_size


class BERT(Encoder):
    """The encoder and its heads of pretraining: the MLM head, whose output matrix is the embedding,
    and, with config.nsp, the pooler and the NSP head."""

    Config = BERTConfig

    def __init__(self, config: BERTConfig):
        super().__init__(config)
        C = config.n_embd
        self.mlm_dense = nn.Linear(C, C)
        self.mlm_norm = nn.LayerNorm(C, config.ln_eps)
        self.mlm_bias = nn.Parameter(torch.zeros(config.vocab_size))
        if config.nsp:
            self.pooler = nn.Linear(C, C)
            self.nsp_head = nn.Linear(C, 2)
        init_bert(self)

    def forward(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        keep: Tensor | None = None,
        mlm_positions: Tensor | None = None,
        mlm_targets: Tensor | None = None,
        nsp_targets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None] | dict[str, Tensor]:
        """tokens (B, T) -> MLM logits (B, T, V) and NSP logits (B, 2), None without the NSP head;
        or, given targets, {"mlm": summed loss, "mlm_accuracy": number of right predictions, and
        the same two for "nsp"}.

        segments (B, T) is 0 in the first part and 1 in the second; None: all 0. keep (B, T) is
        False at padding; None: there is none. mlm_positions (N,) are the places in the flattened
        (B·T) batch of the mlm_targets (N,): logits of other places are never computed.
        nsp_targets (B,) are 0 where the second part follows the first, 1 where it does not.
        Targets of -100 do not count.
        """
        features, sums = self.features(tokens, segments, keep), {}
        if mlm_targets is None and nsp_targets is None:
            return self.mlm_logits(features), self.nsp_logits(features)
        if mlm_targets is not None:
            chosen = features.flatten(0, 1).index_select(0, mlm_positions)
            sums["mlm"], _, sums["mlm_accuracy"] = model.cross_entropy(
                self.mlm_features(chosen),
                self.token_embedding.weight,
                mlm_targets,
                bias=self.mlm_bias,
                accuracy=True,
            )
        if nsp_targets is not None:
            logits = self.nsp_logits(features).float()
            sums["nsp"] = F.cross_entropy(logits, nsp_targets, reduction="sum")
            sums["nsp_accuracy"] = (logits.argmax(-1) == nsp_targets).sum()
        return sums

    def mlm_features(self, features: Tensor) -> Tensor:
        """features (..., C) -> (..., C): what the MLM head multiplies by its output matrix."""
        return self.mlm_norm(F.gelu(self.mlm_dense(features)))

    def mlm_logits(self, features: Tensor) -> Tensor:
        """features (..., C) -> (..., V)"""
        return F.linear(self.mlm_features(features), self.token_embedding.weight, self.mlm_bias)

    def nsp_logits(self, features: Tensor) -> Tensor | None:
        """features (B, T, C) -> (B, 2), or None without the NSP head."""
        return self.nsp_head(self.pooled(features)) if self.config.nsp else None

    def flops_per_token(self) -> int:
        """Training takes what the encoder takes and, at 15% of the positions (the usual rate), 6
        for each weight of the MLM head and its output matrix. The pooler and the NSP head, at one
        position of each row, are left out."""
        head = count_parameters(self.mlm_dense) + self.token_embedding.weight.numel()
        return super().flops_per_token() + round(6 * 0.15 * head)


def init_bert(model: Encoder) -> None:
    """The law of the paper's own code: a normal distribution cut off at two standard deviations,
    which leaves a standard deviation of 0.88 · 0.02.

    tensor                                       law
    every embedding, every Linear      weight    N(0, 0.02) within ± 0.04
    every                              bias      0
    every LayerNorm                    weight    1
    """
    initialise(model, lambda name, weight: nn.init.trunc_normal_(weight, 0, 0.02, -0.04, 0.04))


if __name__ == "__main__":  # learn a sentence that has holes, then fill in other holes
    torch.manual_seed(1)
    text = "every position sees all others, those before it and those behind it"
    letters = ["_", *sorted(set(text))]  # 0 is the mask
    B, T, tokens = 8, len(text), torch.tensor([letters.index(c) for c in text])
    bert = BERT(BERTConfig(len(letters), T, 2, 4, 64, dropout=0, attention_dropout=0, nsp=False))
    optimizer = torch.optim.AdamW(bert.parameters(), lr=2e-3)
    for step in range(61):
        places = torch.randperm(B * T)[: B * T // 4]  # a quarter of the letters of eight copies
        targets = tokens.repeat(B)[places]
        holes = tokens.repeat(B).index_fill(0, places, 0).view(B, T)
        sums = bert(holes, mlm_positions=places, mlm_targets=targets)
        optimizer.zero_grad()
        (sums["mlm"] / len(places)).backward()
        optimizer.step()
        if step % 10 == 0:
            loss, right = sums["mlm"].item() / len(places), sums["mlm_accuracy"] / len(places)
            print(f"step {step:2}   loss {loss:.3f}   right {right:4.0%}")
    holes = tokens.clone()
    holes[2::3] = 0
    filled = torch.where(holes == 0, bert(holes[None])[0][0].argmax(-1), holes)
    for row in (holes, filled):
        print("".join(letters[i] for i in row.tolist()))

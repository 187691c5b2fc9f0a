"""FNet: BERT with a Fourier transform in place of attention.

Each sublayer of attention becomes

    y = the real part of F_T F_C x

with the discrete Fourier transforms along the channels and along the places. It has no weights: it
mixes every place with every other, always in the same way, and the MLPs learn to make use of that.

It cannot write text: each place receives something from all places, so a decoder could read what it
is to predict. There is no mask either. A padded place is mixed into the others as what it is, a
token, and a text is not quite the same when it is padded.

The file needs torch, model.py and bert.py. `python -m models.fnet` learns to fill in letters.

Left out: hybrid networks, with attention in the last layers.

Paper: FNet (Lee-Thorp et al. 2021, arXiv:2105.03824).
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bert import BERT, BERTConfig
from model import MLP, Block, Dropout, KVCache, Mask, count_parameters


@dataclass
class FNetConfig(BERTConfig):
    n_head: int = field(default=1, metadata={"flag": False})
    attention_dropout: float = field(default=0.0, metadata={"flag": False})
    pre_ln: bool = field(default=False, metadata={"flag": False})


class FNetBlock(Block):
    """norm(x + fourier(x)), then norm(x + mlp(x))"""

    def __init__(self, config: FNetConfig):
        nn.Module.__init__(self)
        self.fourier_norm = nn.LayerNorm(config.n_embd, config.ln_eps, bias=config.bias)
        self.mlp = MLP(config, F.gelu)
        self.mlp_norm = nn.LayerNorm(config.n_embd, config.ln_eps, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Mask = None, cache: KVCache | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C); a mask has no effect"""
        mixed = torch.fft.fft2(x.float(), dim=(-2, -1)).real.type_as(x)
        x = self.fourier_norm(x + mixed)
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class FNet(BERT):
    """The encoder and its heads of pretraining, as in BERT."""

    Config = FNetConfig
    Block = FNetBlock

    def make_block(self, config: FNetConfig) -> Block:
        return FNetBlock(config)

    def flops_per_token(self) -> int:
        """As BERT's, without attention. A fast transform takes 5·n·log2(n) for n numbers, and needs
        another one for its gradient: for each token 10·C·log2(C·T) in each layer."""
        c = self.config
        attention = 12 * c.n_layer * c.n_embd * c.block_size
        transforms = 10 * c.n_layer * c.n_embd * math.log2(c.n_embd * c.block_size)
        return super().flops_per_token() - attention + round(transforms)


if __name__ == "__main__":  # learn a sentence that has holes, then fill in others
    torch.manual_seed(1)
    text = "every position receives from all others, those before it and those behind it"
    letters = ["_", *sorted(set(text))]  # 0 is the mask
    B, T, tokens = 8, len(text), torch.tensor([letters.index(c) for c in text])
    fnet = FNet(FNetConfig(len(letters), T, n_layer=2, n_embd=64, dropout=0, nsp=False))
    optimizer = torch.optim.AdamW(fnet.parameters(), lr=2e-3)
    for step in range(61):
        places = torch.randperm(B * T)[: B * T // 8]  # an eighth of the letters of eight copies
        targets, holes = tokens.repeat(B)[places], tokens.repeat(B).index_fill(0, places, 0)
        sums = fnet(holes.view(B, T), mlm_positions=places, mlm_targets=targets)
        optimizer.zero_grad()
        (sums["mlm"] / len(places)).backward()
        optimizer.step()
        if step % 10 == 0:
            loss, right = sums["mlm"].item() / len(places), sums["mlm_accuracy"] / len(places)
            print(f"step {step:2}   loss {loss:.3f}   right {right:4.0%}")
    mixing = count_parameters(fnet.blocks[0]) - count_parameters(fnet.blocks[0].mlp)
    print(f"parameters of a block: {mixing} in two norms, all others in the MLP")
    holes = tokens.index_fill(0, torch.arange(3, T, 8), 0)
    for row in (holes, torch.where(holes == 0, fnet(holes[None])[0][0].argmax(-1), holes)):
        print("".join(letters[i] for i in row.tolist()))

"""What fine-tuning does to any network: weights of another task, frozen layers, smaller learning
rates in lower layers, low-rank adapters.

Nothing here knows a model's class. All goes by names: those of embeddings contain "embedding",
blocks are `blocks.0`, `blocks.1`, …, and the names of heads begin with one of HEADS. A module with
linear layers `q` and `v` is an attention. The file needs torch alone; `python finetune.py` adapts a
small network.

Left out: prompts that are learnt (prefix tuning), adapters of other shapes, several tasks at once.

Papers: smaller rates in lower layers (Howard and Ruder 2018, arXiv:1801.06146); low-rank adapters
(Hu et al. 2021, arXiv:2106.09685).
"""

import copy
import math
import re
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

HEADS = ("pooler.", "head.", "mlm_", "nsp_head.")  # how the names of heads begin; put yours here


def take_weights(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Copies the weights that another task's model of the same sizes has learnt. -> names of the
    parameters that stay fresh. The last matrix ("head") always does: its labels are others even
    where its shape is the same. Raises ValueError where the two models differ in more than heads,
    or in a shape."""
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
    """The depth of a parameter: 0 in embeddings, i + 1 in block i, infinite behind the blocks."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return 0 if "embedding" in name else math.inf


def freeze(model: nn.Module, what: str) -> None:
    """Freezes the embeddings (what="embeddings"), or these and the first n blocks (what="n", a
    number). Raises ValueError for anything else, and where nothing is left that learns."""
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
    """A function from a parameter's name to the factor of its learning rate: 1 for heads, decay for
    the last block, decay² for the one before it, …, and the smallest for embeddings."""
    layers = len(model.blocks)
    return lambda name: decay ** max(0, layers + 1 - depth(name))


class LoRA(nn.Module):
    """A frozen matrix W that learns a change of rank r: y = W x + 2 · B A x, with A (r, inputs) and
    B (outputs, r). B begins with zeros, so that training begins from the model as it was."""

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
    """Makes the queries and values of each attention learn by LoRA alone, as in the paper; of all
    other parameters only the heads learn."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(HEADS))
    for module in list(model.modules()):
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in "qv"):
            module.q, module.v = LoRA(module.q, rank), LoRA(module.v, rank)


def merged_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of an ordinary model that computes the same: matrices with adapters added."""
    merged = dict(state)
    for name in (n.removesuffix(".down") for n in state if n.endswith(".down")):
        down, up = (merged.pop(f"{name}.{part}") for part in ("down", "up"))
        merged[f"{name}.weight"] = merged.pop(f"{name}.linear.weight") + LoRA.SCALE * up @ down
        if f"{name}.linear.bias" in merged:
            merged[f"{name}.bias"] = merged.pop(f"{name}.linear.bias")
    return merged


def adapter_rank(state: dict[str, Tensor]) -> int:
    """The rank of the adapters in a state; 0 where it has none."""
    return next((t.shape[0] for name, t in state.items() if name.endswith(".q.down")), 0)


def limit_what_learns(model: nn.Module, lora_rank: int, frozen: str) -> None:
    """Does what --lora_rank and --freeze ask for. Adapters that the model has already stay."""
    if lora_rank and not adapter_rank(model.state_dict()):
        add_adapters(model, lora_rank)
    if frozen:
        freeze(model, frozen)


if __name__ == "__main__":  # adapt a frozen network to a task, then merge the adapters
    torch.manual_seed(1)
    net = nn.ModuleDict({"embedding": nn.Embedding(100, 64), "head": nn.Linear(64, 2)})
    layers = [nn.ModuleDict({name: nn.Linear(64, 64) for name in "qkv"}) for _ in range(4)]
    net["blocks"] = nn.ModuleList(layers)

    def logits(net: nn.ModuleDict, tokens: Tensor) -> Tensor:
        x = net["embedding"](tokens)
        for block in net["blocks"]:  # attention with a single head
            x = x + F.scaled_dot_product_attention(*(block[name](x) for name in "qkv"))
        return net["head"](x.mean(1))

    fresh = copy.deepcopy(net)
    add_adapters(net, rank=4)
    learning = [p for p in net.parameters() if p.requires_grad]
    every = sum(p.numel() for p in net.parameters())
    print(f"{sum(p.numel() for p in learning):,} of {every:,} parameters learn")
    tokens = torch.randint(100, (256, 12))
    targets = (tokens < 5).any(1).long()  # the task: is one of five rare words in the text?
    optimizer = torch.optim.AdamW(learning, lr=1e-3)
    for step in range(31):
        loss = F.cross_entropy(logits(net, tokens), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:2}   loss {loss.item():.3f}")
    fresh.load_state_dict(merged_state(net.state_dict()))  # a network without adapters
    with torch.no_grad():
        difference = (logits(fresh, tokens) - logits(net, tokens)).abs().max()
    print(f"merged into ordinary weights, no logit differs by more than {difference:.0e}")

"""Optimisers and learning-rate schedules, written out.

AdamW below is the readable definition. `make_optimizer` gives the training loop torch's fused
kernel, which does the same in one pass over memory (tests/test_optim.py proves them equal, and
`python -m lab.bench` times them). Muon has no fused kernel in torch: ours is the one that trains.
Schedules are pure functions of the step, so there is nothing to save or restore.

Left out: second-order methods, 8-bit states, schedules that watch the loss. The file needs torch
alone; `python optim.py` draws the schedules, and shows what Muon makes of a gradient.

Papers: Adam (Kingma and Ba 2015, arXiv:1412.6980); decoupled weight decay and warm restarts
(Loshchilov and Hutter, arXiv:1711.05101 and arXiv:1608.03983); Muon (Jordan et al. 2024,
kellerjordan.github.io/posts/muon), with the update scale of Moonlight (Liu et al. 2025,
arXiv:2502.16982); linear cooldown (Hägele et al. 2024, arXiv:2405.18392).
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn as nn
from torch import Tensor

# ---- optimisers ----------------------------------------------------------------------------------


def check_settings(optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError for a setting that would spoil the weights without a word, as torch does;
    those of single groups are looked at too."""
    for group in optimizer.param_groups:
        betas = group.get("betas", (0.0, 0.0))
        if len(betas) != 2:
            raise ValueError(f"betas={betas!r} are not two numbers: give (beta1, beta2)")
        for name in ("lr", "eps", "weight_decay"):
            if not 0 <= group.get(name, 0.0) < math.inf:
                raise ValueError(f"{name}={group[name]} is out of range: choose 0 or more")
        means = {"beta1": betas[0], "beta2": betas[1], "momentum": group.get("momentum", 0.0)}
        for name, value in means.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value} is out of range: choose 0 or more, below 1")


def loss_of(closure: Callable[[], Tensor] | None) -> Tensor | None:
    """closure(), with gradients, None without one: torch's optimizers call it before the step, and
    what it returns is what the step returns."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class AdamW(torch.optim.Optimizer):
    """m and v are running means of the gradient g and of g². With t counted from 1:

        θ ← θ − lr·λ·θ
        m ← β1·m + (1−β1)·g            v ← β2·v + (1−β2)·g²
        θ ← θ − lr · (m / (1−β1^t)) / (sqrt(v / (1−β2^t)) + ε)

    m and v start at zero, so early means are too small by the factor 1−β^t: hence the division. The
    decay λ acts on the weight before the step and is scaled by lr, as in torch.optim.AdamW. The
    weight, m and v are 3 numbers for each parameter.
    """

    decoupled = True

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01
    ):
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        check_settings(self)

    @torch.no_grad()
    def step(self, closure=None) -> Tensor | None:
        loss = loss_of(closure)
        for group in self.param_groups:
            lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, g = self.state[p], p.grad
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                t, m, v = state["step"].item(), state["exp_avg"], state["exp_avg_sq"]
                if self.decoupled:
                    p.mul_(1 - lr * decay)
                else:
                    g = g + decay * p
                m.lerp_(g, 1 - beta1)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                rms = (v / (1 - beta2**t)).sqrt_().add_(group["eps"])
                p.addcdiv_(m, rms, value=-lr / (1 - beta1**t))
        return loss


class Adam(AdamW):
    """The older, coupled decay: λ·θ is added to the gradient, and so is divided by sqrt(v) too.

    Weights with large gradients then decay less than those with small ones; AdamW was written to
    mend this.
    """

    decoupled = False

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay: float = 0.0):
        super().__init__(params, lr, betas, eps, weight_decay)


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Matrices (..., R, C) with singular value decompositions U S Vᵀ -> nearly U Vᵀ, (..., R, C).

    This is a Newton-Schulz iteration: the odd polynomial a·x + b·x³ + c·x⁵ acts on every singular
    value, and five rounds bring all of them near 1 (0.7 to 1.2: the coefficients trade accuracy for
    a steep start). It needs products of matrices only, and works in bfloat16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.size(-2) > g.size(-1)
    x = g.mT if tall else g  # with the smaller side first, x xᵀ is as small as it can be
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # the iteration needs singular values <= 1
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by the nearest orthogonal matrix; for matrices only.

        m ← μ·m + g                       θ ← θ − lr·λ·θ
        θ ← θ − lr · 0.2·sqrt(max(R, C)) · orthogonalize(g + μ·m)

    Every direction of the matrix moves equally far, also those that the gradient hardly shows. The
    factor gives the update the size of AdamW's (root mean square about 0.2), so that both share one
    lr and one λ. Embeddings, norms and biases go to AdamW: see `make_optimizer`.

    `dtype` is that of the iteration, which takes a fifth of a small model's step on a CPU; bfloat16
    shortens it on processors that have it. Raises ValueError for a parameter that is no matrix.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype=torch.float32,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        check_settings(self)
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.dim() != 2:
                raise ValueError(f"Muon takes matrices, not a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure=None) -> Tensor | None:
        loss = loss_of(closure)
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in (p for p in group["params"] if p.grad is not None):
                by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():  # equal shapes share one batched product
                updates = []
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    m = self.state[p]["momentum_buffer"].mul_(momentum).add_(p.grad)
                    updates.append(p.grad.add(m, alpha=momentum))
                scale = 0.2 * max(shape) ** 0.5
                for p, u in zip(params, self.orthogonalized(updates), strict=True):
                    p.mul_(1 - lr * group["weight_decay"]).add_(u, alpha=-lr * scale)
        return loss

    def orthogonalized(self, updates: list[Tensor]) -> Iterable[Tensor]:
        """The updates, matrices of one shape, orthogonalized; a subclass may divide the work."""
        return orthogonalize(torch.stack(updates).to(self.dtype)).to(updates[0].dtype)


class ChainedOptimizer:
    """Optimisers that are used like a single one: step, zero_grad, param_groups, state_dict."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure=None) -> Tensor | None:
        loss = loss_of(closure)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, state: dict) -> None:
        if len(state) != len(self.optimizers):
            raise ValueError(f"{len(state)} saved optimisers, {len(self.optimizers)} expected")
        for i, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[str(i)])


def separate_states(state: dict) -> dict[str, dict]:
    """The state of one optimizer -> {"": that}; of a ChainedOptimizer -> {"0": …, "1": …}."""
    return {"": state} if "param_groups" in state else state


def decay_groups(
    parameters: Iterable[nn.Parameter], weight_decay: float, scales: dict[int, float]
) -> list[dict]:
    """Groups of parameters: matrices decay; biases and norm weights, which are vectors, do not.
    scales: {id of a parameter: factor of its learning rate}, which the loop reads as "lr_scale"."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for p in parameters:
        groups.setdefault((p.dim() < 2, scales[id(p)]), []).append(p)
    return [
        {"params": params, "weight_decay": 0.0 if vectors else weight_decay, "lr_scale": scale}
        for (vectors, scale), params in sorted(groups.items(), key=lambda item: item[0])
    ]


OPTIMIZERS = ("adamw", "adam", "muon")
HEADS = ("head", "lm_head")  # output matrices, which Muon leaves to AdamW, as it does embeddings


def make_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.1,
    dtype: torch.dtype = torch.float32,
    rate_scale: Callable[[str], float] = lambda name: 1.0,
    muon: type[Muon] = Muon,
) -> torch.optim.Optimizer | ChainedOptimizer:
    """name is one of OPTIMIZERS. With "muon", Muon gets the matrices of the hidden layers, and
    AdamW the rest, an output layer called `head` among it. dtype is for Muon's iteration; weights
    and states keep theirs. rate_scale: a parameter's name -> factor of its learning rate. muon:
    Muon or a subclass.

    Every trainable parameter is in exactly one group. Raises ValueError for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer={name!r} is not known: choose one of {', '.join(OPTIMIZERS)}")
    trainable = [p for p in model.parameters() if p.requires_grad]
    hidden: list[nn.Parameter] = []
    if name == "muon":
        named = model.named_modules()
        linear = [m.weight for name, m in named if isinstance(m, nn.Linear) and name not in HEADS]
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        hidden = [p for p in linear if p.requires_grad and id(p) not in embeddings]
    taken = {id(p) for p in hidden}
    scales = {id(p): rate_scale(name) for name, p in model.named_parameters()}
    groups = decay_groups([p for p in trainable if id(p) not in taken], weight_decay, scales)
    matrices = decay_groups(hidden, weight_decay, scales)
    grouped = [id(p) for group in (*groups, *matrices) for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, trainable)), "the groups do not partition the model"
    fused = trainable[0].device.type in ("cpu", "cuda")
    settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "fused": fused}
    if name == "adam":
        return torch.optim.Adam(groups, **settings)
    adamw = torch.optim.AdamW(groups, **settings)
    return ChainedOptimizer(adamw, muon(matrices, lr=lr, dtype=dtype)) if hidden else adamw


# ---- schedules: the factor of the peak learning rate at a step, counted from 0 -------------------


def warmup(step: int, length: int) -> float:
    """Linear from 1/length to 1. It is never 0: a first step at rate 0 would be wasted."""
    return min(1.0, (step + 1) / length) if length else 1.0


def cosine(step: float, period: float, floor: float = 0.0) -> float:
    """Cosine annealing from 1 at step 0 to floor at `period`; beyond it the cosine rises again."""
    return floor + (1 - floor) * (1 + math.cos(math.pi * step / period)) / 2


def cosine_restarts(step: int, period: int, growth: int = 1, floor: float = 0.0) -> float:
    """Cosine annealing that restarts at 1 after each period; the next is `growth` times longer."""
    while step >= period:
        step, period = step - period, period * growth
    return cosine(step, period, floor)


def cooldown(step: int, steps: int, length: int, floor: float = 0.0) -> float:
    """1, then linear over the last `length` steps to floor at step `steps`."""
    return floor + (1 - floor) * min(1.0, max(0.0, (steps - step) / max(length, 1)))


def inverse_sqrt(step: int, length: int) -> float:
    """The 2017 paper's schedule (section 5.3), scaled to 1 at its peak, where warmup ends.

    The paper's own peak, to be given as the learning rate, is (d_model · length)^-0.5.
    """
    t, length = step + 1, max(length, 1)
    return length**0.5 * min(t**-0.5, t * length**-1.5)


SCHEDULES = {  # their names, and the settings that each of them heeds
    "cosine": ("warmup", "floor"),
    "linear": ("warmup", "cooldown", "floor"),
    "inverse_sqrt": ("warmup",),
    "constant": ("warmup",),
}


def schedule(
    name: str, step: int, *, steps: int, warmup_steps: int, cooldown_steps: int, floor: float
) -> float:
    """The factor of the learning rate at `step` of `steps`; name is one of SCHEDULES.

    "linear" is a warmup, a constant rate, and a linear cooldown over the last cooldown_steps.
    Raises ValueError for an unknown name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule={name!r} is not known: choose one of {', '.join(SCHEDULES)}")
    if name == "inverse_sqrt":
        return inverse_sqrt(step, warmup_steps)
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    if name == "cosine":
        return cosine(step - warmup_steps, max(steps - warmup_steps, 1), floor)
    if name == "linear":
        return cooldown(step, steps, cooldown_steps, floor)
    return 1.0


if __name__ == "__main__":  # the schedules in characters, and what Muon makes of a gradient
    for name in SCHEDULES:
        phases = {"steps": 64, "warmup_steps": 8, "cooldown_steps": 16, "floor": 0.1}
        factors = [schedule(name, step, **phases) for step in range(64)]
        print(f"{name:>12} |" + "".join(" .:-=+*#%@"[round(9 * x)] for x in factors) + "|")
    torch.manual_seed(1)
    inputs = torch.randn(256, 8) * torch.logspace(0, -2, 8)  # some directions hardly show
    gradient = (inputs.T @ torch.randn(256, 8)) / 256
    update = orthogonalize(gradient)
    print("\nMuon moves equally far in all directions, also where the gradient hardly shows one:")
    for name, matrix in (("gradient", gradient), ("its update", update)):
        values = torch.linalg.svdvals(matrix).tolist()
        print(f"  singular values of {name:<10}", *(f"{value:7.4f}" for value in values))

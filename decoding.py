"""Logits -> tokens: drawn from a distribution, the likeliest each time, or by beam search.

`generate` continues a text with any causal language model. `generate_targets` and `beam_search`
write the target of a pair, and know even less of the model. They call one function,

    advance(tokens, rows, sentences) -> (N, V) logits of the next tokens

in which row n continues row rows[n] of the previous call with tokens[n], and sentences are the
indices of those sentences of the previous call that are still being written. Each sentence has the
same number of consecutive rows. In the first call, each has one row, with the start token. The
start token is never written, unless it is the end token too.

Left out: penalties for repetition, diverse beams, speculative decoding. The file needs torch alone;
`python decoding.py` shows one distribution at different settings.

Nucleus sampling: Holtzman et al. 2020 (arXiv:1904.09751); min-p: Nguyen et al. 2024
(arXiv:2407.01082). Beam search with the length penalty of Wu et al. 2016 (arXiv:1609.08144),
section 7: a hypothesis of L tokens scores log-probability / ((5 + L) / 6)^α, α >= 0.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Advance = Callable[[Tensor, Tensor, list[int]], Tensor]
NAN_LOGITS = (
    "the model's logits are not numbers (NaN): use a checkpoint from before its loss became NaN, "
    "or fp32 if this is bf16"
)
RANKED = 1024  # for top_p, so many of the likeliest tokens are ranked before all are

# Two names to which `engine/kernels.py` assigns faster steps (engine/graphs.py) once, at the start,
# on a GPU. They give the same tokens. With None, caches grow as in model.py.
#   text_steps(model, rows, size, choose) -> an object for the `steps` of `generate`
#   pair_steps(model, beam, vocab_size) -> a function (source, keep, target_len) -> Advance
text_steps: Callable | None = None
pair_steps: Callable | None = None


# ---- logits -> distribution -> token -------------------------------------------------------------


def distribution(logits: Tensor, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> Tensor:
    """(B, V) logits -> (B, V) probabilities. The likeliest token always stays."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).to(logits.dtype)
    # With a maximum of 0, dividing by a tiny temperature cannot overflow to NaN, unless it is so
    # tiny that it is 0 as a float32.
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    logits = (logits - logits.max(-1, keepdim=True).values) / temperature
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = logits.softmax(-1)
    if min_p > 0:
        floor = min_p * probabilities.max(-1, keepdim=True).values
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    if top_p < 1:
        wanted = top_p * probabilities.sum(-1, keepdim=True)
        # Mostly a few tokens suffice; on a CPU, ranking RANKED takes a ninth of the time of all.
        few = probabilities.is_cpu and probabilities.size(-1) > RANKED
        if few:
            ranked, order = probabilities.topk(RANKED)
            few = bool((ranked.sum(-1, keepdim=True) >= wanted).all())
        if not few:
            ranked, order = probabilities.sort(-1, descending=True)
        cut = ranked.cumsum(-1) - ranked >= wanted  # the likelier tokens suffice without it
        cut[:, 0] = False
        kept = ranked.masked_fill(cut, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, kept)
    return probabilities / probabilities.sum(-1, keepdim=True)


def choose(probabilities: Tensor, u: Tensor) -> Tensor:
    """probabilities (B, V), a uniform number in [0, 1) for each row, u (B,) -> tokens (B,).

    Each is the token in whose stretch of the cumulated distribution u falls. As each row has its
    own number, its sample does not depend on its neighbours in the batch. A row of NaN gets -1.
    """
    cumulated = probabilities.double().cumsum(-1)
    target = u[:, None].to(cumulated) * cumulated[:, -1:]
    found = torch.searchsorted(cumulated, target, right=True)[:, 0]
    return torch.where(found < probabilities.size(-1), found, -1)  # beyond all: no sum is above NaN


def likeliest(logits: Tensor) -> Tensor:
    """logits (B, V) -> tokens (B,). A row with NaN gets -1."""
    values, tokens = logits.max(-1)
    return torch.where(values.isnan(), -1, tokens)


def check_chosen(tokens: Iterable[int | None]) -> None:
    """Raises ValueError for the -1 of `choose` and `likeliest`: on the host, for which a step on a
    GPU does not wait."""
    if any(token == -1 for token in tokens):
        raise ValueError(NAN_LOGITS)


# ---- continuing a text ---------------------------------------------------------------------------


def context_start(n: int, block_size: int) -> int:
    """Where the model's context begins when there are n tokens: at 0 while all of them fit.

    When they no longer do, half a block is dropped at once: positions are learned, so dropping one
    token moves all others, and at every step the cache would have to be made anew.
    """
    if n <= block_size:
        return 0
    half = max(1, block_size // 2)
    return -(-(n - block_size) // half) * half


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: list[list[int]],
    pick: Callable[[Tensor, list[int]], Tensor],
    max_new_tokens: int,
    *,
    use_cache: bool = True,
    steps=None,
) -> Iterator[list[int | None]]:
    """Yields, for each step, the new token of every row, or None for a row that has none.

    pick(logits (B, V), rows that need a token) -> tokens (B,). Prompts may differ in length: the
    shortest is read at once, and the longer ones go on reading their own tokens while the shorter
    ones already write. So all rows share positions, no padding is needed, and each row is what it
    would be alone. The caller may stop at any time. use_cache=False reads the whole context anew
    for every token; it is the oracle in the tests. `steps` is what text_steps makes, and takes a
    `pick` with the methods that it needs.

    The model has features(tokens, caches=None) -> (B, T, C), head(features) -> logits,
    make_caches(), and config.block_size, the number of tokens that it sees at most; or it is
    `endless`, and sees them all. Raises ValueError for a prompt without tokens, and for logits that
    are NaN.
    """
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("a prompt has no tokens: begin it with <|endoftext|>")
    device = next(chain(model.parameters(), model.buffers())).device  # some models only count
    block_size = sys.maxsize if getattr(model, "endless", False) else model.config.block_size
    # What no row looks at is not read: 100,000 tokens next to a short prompt took minutes.
    prompts = [prompt[context_start(len(prompt), block_size) :] for prompt in prompts]
    lengths = [len(p) for p in prompts]
    shortest, longest = min(lengths), max(lengths)
    tokens = torch.zeros(len(prompts), longest + max_new_tokens, dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    if steps is not None:
        yield from steps.write(tokens, lengths, max_new_tokens, pick)
        return
    tokens, caches, cache_start = tokens.to(device), None, -1
    for n in range(shortest, longest + max_new_tokens):
        start = context_start(n, block_size)
        if not use_cache:
            x = model.features(tokens[:, start:n])
        elif caches is None or start != cache_start:  # prefill, at first and after each drop
            caches, cache_start = model.make_caches(), start
            x = model.features(tokens[:, start:n], caches=caches)
        else:  # decode one token
            x = model.features(tokens[:, n - 1 : n], caches=caches)
        writing = [r for r, k in enumerate(lengths) if k <= n < k + max_new_tokens]
        if writing:
            picked = pick(model.head(x[:, -1]).float(), writing)
            step: list[int | None] = [None] * len(prompts)
            for r in writing:
                step[r] = int(picked[r])
            check_chosen(step)
            tokens[writing, n] = picked[writing].to(device)
            yield step


# ---- a whole sequence ----------------------------------------------------------------------------


def generate_targets(
    advance: Advance,
    limits: list[int],
    pick: Callable[[Tensor, list[int]], Tensor],
    *,
    start: int,
    end: int,
    device: torch.device | str = "cpu",
) -> list[list[int]]:
    """For each sentence the tokens that `pick` chooses, until it chooses `end` or has chosen
    limits[i] of them. pick(logits (N, V), indices of their sentences) -> tokens (N,).
    """
    written: list[list[int]] = [[] for _ in limits]
    alive = list(range(len(limits)))
    keep, tokens = alive, torch.full((len(limits),), start, device=device)
    while alive:
        logits = advance(tokens, torch.tensor(keep, device=device), keep)
        if start != end:
            logits[:, start] = -math.inf
        tokens = pick(logits, alive).to(device)
        keep, chosen = [], tokens.tolist()
        check_chosen(chosen)
        for row, (sentence, token) in enumerate(zip(alive, chosen, strict=True)):
            if token != end:
                written[sentence].append(token)
                if len(written[sentence]) < limits[sentence]:
                    keep.append(row)
        alive, tokens = [alive[row] for row in keep], tokens[keep]
    return written


def penalty(length: int, alpha: float) -> float:
    """The divisor of a log-probability, without which long hypotheses would lose."""
    return ((5 + length) / 6) ** alpha


def beam_search(
    advance: Advance,
    limits: list[int],
    *,
    beam: int,
    start: int,
    end: int,
    alpha: float = 0.6,
    device: torch.device | str = "cpu",
) -> list[tuple[float, list[int]]]:
    """For each sentence the best (score, tokens) that was found, without the end token.

    At each step the likeliest continuations of all hypotheses are ranked together. Those among the
    best `beam` that end are complete; the best `beam` of the others live on. A sentence is done
    when `beam` hypotheses are complete, or when no living one can become better than the best of
    these: the first to end is seldom the best. After limits[i] tokens a hypothesis must end.

    A beam of 1 is greedy decoding. A beam as wide as the number of sequences finds the best one.
    """
    best: list[tuple[float, list[int]]] = [(-math.inf, []) for _ in limits]
    complete = [0] * len(limits)
    alive = sentences = list(range(len(limits)))
    tokens = torch.full((len(alive),), start, device=device)
    rows = torch.arange(len(alive), device=device)
    scores = torch.zeros(len(alive), 1, device=device)  # (sentences, hypotheses of each)
    written: list[list[int]] = [[] for _ in limits]  # the tokens of each row
    length = 0
    while alive:
        length += 1  # the length of a hypothesis that ends now, its end token included
        logits = advance(tokens, rows, sentences).float()
        V, K = logits.size(-1), scores.size(1)
        log_z = logits.logsumexp(-1, keepdim=True)
        if start != end:  # it keeps its share of the probability, as in Hugging Face's search
            logits[:, start] = -math.inf
        for i, sentence in enumerate(alive):
            if length > limits[sentence]:  # it can only end, with the probability that this has
                rows_of_it = logits[i * K : (i + 1) * K]
                rows_of_it[:, :end] = rows_of_it[:, end + 1 :] = -math.inf
        # The best 2 · beam of a sentence are among the best 2 · beam of its rows.
        top, token = logits.topk(min(2 * beam, V))
        total = scores[:, :, None] + (top - log_z).view(len(alive), K, -1)
        top, index = total.flatten(1).topk(min(2 * beam, total[0].numel()))
        parent = index // total.size(2)
        token = token.view(len(alive), -1).gather(1, index)

        kept: list[tuple[int, list[tuple[float, int, int]]]] = []
        # A single copy, since each waits for the device; a float32 holds any id up to 2^24.
        candidates = torch.stack([top, parent.float(), token.float()], dim=1).tolist()
        for i, (sentence, ranked) in enumerate(zip(alive, candidates, strict=True)):
            living = []
            if math.isnan(ranked[0][0]):  # NaN ranks above all numbers
                raise ValueError(NAN_LOGITS)
            for rank, (score, p, t) in enumerate(zip(*ranked, strict=True)):
                if score == -math.inf:
                    continue
                p, t = int(p), int(t)
                if t != end:
                    living.append((score, i * K + p, t))
                elif rank < beam:
                    complete[sentence] += 1
                    final = score / penalty(length, alpha)
                    if final > best[sentence][0]:
                        best[sentence] = final, written[i * K + p]
            # Log-probabilities only fall: the best that a hypothesis can still reach is its present
            # one divided by the penalty of the greatest length.
            reach = living[0][0] / penalty(limits[sentence] + 1, alpha) if living else -math.inf
            if complete[sentence] < beam and reach > best[sentence][0]:
                blank = (-math.inf, i * K, end)  # a vocabulary smaller than the beam cannot fill it
                kept.append((i, (living + [blank] * beam)[:beam]))

        sentences = [i for i, _ in kept]
        alive = [alive[i] for i in sentences]
        flat = [row for _, living in kept for row in living]
        scores = torch.tensor([s for s, _, _ in flat], device=device).view(-1, beam)
        written = [[*written[r], t] for _, r, t in flat]
        rows = torch.tensor([[r for _, r, _ in flat], [t for _, _, t in flat]], dtype=torch.long)
        rows, tokens = rows.to(device)
    return best


if __name__ == "__main__":  # one distribution at each setting, and draws from it
    torch.manual_seed(1)
    words = ["mat", "sofa", "floor", "bed", "roof", "moon", "idea", "of"]
    logits = torch.tensor([[3.0, 2.3, 2.0, 1.6, 0.8, -0.5, -1.5, -3.0]])
    settings = [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.9}]
    columns = [distribution(logits, **each) for each in settings]
    names = [" ".join(f"{k} {v}" for k, v in each.items()) or "as it is" for each in settings]
    print("The cat sat on the ...\n", " " * 5, *(f"{name:>15}" for name in names))
    for i, word in enumerate(words):
        print(f"{word:>6}", *(f"{f'{p[0, i]:.1%}' if p[0, i] else '-':>15}" for p in columns))
    print("\nTen draws of each, all with the same ten uniform numbers:\n")
    u = torch.rand(10)
    for name, p in zip(names, columns, strict=True):
        print(f"{name:>15}: ", *(words[i] for i in choose(p.expand(10, -1), u).tolist()))

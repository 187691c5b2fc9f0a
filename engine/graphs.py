"""Decoding on a GPU: one step, its kernels recorded once and launched together ever after.

At batch 1 a step of GPT-2 is some 200 kernels of two microseconds each, and Python needs longer to
launch one than it runs. A CUDA graph launches all of them at once, with the same addresses, sizes
and Python numbers as when it was captured. So this file differs from `generate` and `make_advance`,
which are the oracles of its tests: the position of the next token is a tensor, the caches have a
fixed size, a mask hides what is not filled, and the next token is chosen on the device. A step sees
the first 128, 256, ... positions of the caches, and there is one graph for each of these sizes.

The same steps run on a CPU too, as the tests do it: uncaptured, and slower than with caches that
grow.

Left out: graphs for the prefill, which has enough work in each kernel; fewer rows when some are
done; top-p without sorting the whole vocabulary.

CUDA graphs: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.cuda import CUDAGraph
from torch.nn.attention import SDPBackend, sdpa_kernel

import model as model_file
from decoding import Advance, check_chosen, context_start
from model import Attention, KVCache, Mask

# Steps that are launched before the token of an earlier one is read, so that the GPU does not wait
# for the printing. When the text has ended, as many were computed in vain.
AHEAD = 4
# Of torch's attention, and with the order of preference that torch has on this GPU.
ANY_KERNEL = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
ANY_KERNEL += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# ---- what both families need ---------------------------------------------------------------------


def warm_up(step: Callable[[], Tensor], changed: list[Tensor]) -> None:
    """Runs the step three times and restores the `changed` tensors: in their first calls libraries
    choose kernels and allocate memory, which cannot be captured."""
    before = [x.clone() for x in changed]
    for _ in range(3):
        step()
        for x, old in zip(changed, before, strict=True):
            x.copy_(old)


class GraphPool:
    """What the graphs of one object share: the memory of one pool, as they are captured in one
    stream. The tensor that a step returns is overwritten when any graph of the pool is launched.
    """

    def __init__(self, device: torch.device):
        self.handle, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)


def captured(
    step: Callable[[], Tensor], changed: list[Tensor], pool: GraphPool | None
) -> Callable[[], Tensor]:
    """A function that does the same as `step`, launched as one graph; on a CPU, step itself.

    step() must read and write the same tensors each time and never wait for the device. `changed`
    are the tensors whose values the next step depends on; capturing leaves them as they are.
    """
    if pool is None:
        return step
    here, graph = torch.cuda.current_stream(pool.stream.device), CUDAGraph()
    pool.stream.wait_stream(here)
    with sdpa_kernel(ANY_KERNEL):  # cuDNN's, too: its plan is made once
        with torch.cuda.stream(pool.stream):
            warm_up(step, changed)
        here.wait_stream(pool.stream)
        # "thread_local": other threads, such as NCCL's watchdog, may go on calling CUDA.
        how = {"stream": pool.stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, pool.handle, **how):
            result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def power_of_two(n: int, least: int) -> int:
    """The smallest power of two that is at least n and at least `least`, which is one itself."""
    return max(least, 1 << (n - 1).bit_length())


def added_scores(hidden: Tensor, like: Tensor) -> Tensor:
    """What is added to the scores, 0 or -inf in the dtype of `like`, from a bool tensor in which
    True means: may NOT look."""
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(hidden, -torch.inf)


def adds(scores: Tensor) -> Mask:
    """A mask that adds `scores`, broadcastable to (B, H, T, S). From a bool mask torch would make
    them anew in every layer; a captured step makes them once. Each query must see something."""
    return lambda q, k, v, dropout: model_file.attention_kernel(q, k, v, scores, dropout_p=dropout)


def empty_cache(rows: int, heads: int, length: int, width: int, like: Tensor) -> KVCache:
    """An empty cache that has its memory already, of the dtype and device of `like`. The memory is
    zeroed: attention multiplies hidden positions by 0, and 0 times NaN is NaN."""
    cache, shape = KVCache(length), (rows, heads, length, width)
    cache.k, cache.v = like.new_zeros(shape), like.new_zeros(shape)
    return cache


def heads_and_width(config) -> tuple[int, int]:
    """(heads of keys and values, the width of each): groups of query heads may share one."""
    heads = getattr(config, "n_kv_head", config.n_head)
    return heads, getattr(config, "head_dim", config.n_embd // config.n_head)


@torch.no_grad()
def join_projections(attention: nn.Module) -> None:
    """Lets an Attention of model.py make queries, keys and values in one product. Its weights
    become views of one matrix, so that it takes no more memory. Anything else is left as it is, and
    so are linear layers that have been changed, by adapters for example."""
    own = getattr(type(attention), "project", None) is not Attention.project
    if own or "project" in vars(attention):
        return
    linears = attention.q, attention.k, attention.v
    if any(type(linear) is not nn.Linear for linear in linears):
        return
    joined, sizes = {}, [linear.out_features for linear in linears]
    for name in ("weight", "bias"):
        parts = [getattr(linear, name) for linear in linears]
        if parts[0] is not None:
            joined[name] = torch.cat(parts)
            for part, view in zip(parts, joined[name].split(sizes), strict=True):
                part.data = view
    attention.project = lambda x: F.linear(x, **joined).split(sizes, -1)


class StaticCache:
    """The first `limit` positions of a KVCache that has its memory already.

    A new token is written at `position`, a tensor (1,) on the device. `append` always returns
    `limit` positions, so attention needs a mask that hides those after `position`.
    """

    def __init__(self, cache: KVCache, position: Tensor, limit: int):
        self.position = position
        self.whole = cache.k, cache.v
        self.seen = cache.k[:, :, :limit], cache.v[:, :, :limit]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (B, H, 1, D) keys and values; returns (B, H, limit, D) each."""
        for whole, new in zip(self.whole, (k, v), strict=True):
            whole.index_copy_(2, self.position, new)
        return self.seen

    def select(self, rows: Tensor) -> None:
        """Row i continues what row rows[i] has seen; rows is (B,), one number for each row."""
        for seen in self.seen:
            seen.copy_(seen.index_select(0, rows))


class CapturedSteps:
    """What a step of either family reads and changes: a token for each row, the position of these
    tokens, which is the same for all rows, and caches of `size` positions. The model must not learn
    any more: its projections are joined."""

    least = 128  # a step sees this many positions at least, if the caches have so many

    def __init__(self, model: nn.Module, rows: int, size: int):
        # Attention is fastest where the number of positions is a multiple of 16.
        size = min(power_of_two(size, self.least), model.config.block_size)
        self.model, self.size, self.length = model, size, 0
        self.weight = weight = model.token_embedding.weight
        self.tokens = torch.zeros(rows, dtype=torch.long, device=weight.device)
        self.position = torch.zeros(1, dtype=torch.long, device=weight.device)
        self.places = torch.arange(size, device=weight.device)
        c = model.config
        heads, width = heads_and_width(c)
        self.caches = [empty_cache(rows, heads, size, width, weight) for _ in range(c.n_layer)]
        self.pool = GraphPool(weight.device) if weight.is_cuda else None
        self.captured: dict[int, Callable[[], Tensor]] = {}
        for attention in model.modules():
            join_projections(attention)

    def next(self, step: Callable[[int], Tensor]) -> Callable[[], Tensor]:
        """step(limit), captured; `limit` is the number of positions that the next step sees."""
        limit = self.limit()
        if limit not in self.captured:
            changed = [self.tokens, self.position]
            self.captured[limit] = captured(partial(step, limit), changed, self.pool)
        self.length += 1
        return self.captured[limit]

    def limit(self) -> int:
        """The number of positions that the next step sees. Raises ValueError when the caches are
        full."""
        if self.length >= self.size:
            raise ValueError(
                f"the caches hold {self.size} positions and are full: read a shorter context"
            )
        return min(power_of_two(self.length + 1, self.least), self.size)

    def seen(self, limit: int) -> tuple[list[StaticCache], Mask]:
        """The first `limit` positions of the caches, and the mask that hides the unfilled ones."""
        places, window = self.places[:limit], getattr(self.model.config, "window", 0)
        hidden = places > self.position
        if window:  # each sees so many of the last positions
            hidden |= places <= self.position - window
        hidden = hidden[None, None, None]
        mask = adds(added_scores(hidden, self.weight))
        return [StaticCache(cache, self.position, limit) for cache in self.caches], mask


def read_back(tokens: Tensor) -> Callable[[], Tensor]:
    """Begins to copy the tokens to the host; returns a function that waits for the copy and returns
    it."""
    if not tokens.is_cuda:
        copy = tokens.clone()
        return lambda: copy
    copy, done = torch.empty_like(tokens, device="cpu", pin_memory=True), torch.cuda.Event()
    copy.copy_(tokens, non_blocking=True)
    done.record(torch.cuda.current_stream(tokens.device))

    def wait() -> Tensor:
        done.synchronize()
        return copy

    return wait


# ---- GPT -----------------------------------------------------------------------------------------


class TextSteps(CapturedSteps):
    """A causal decoder that writes `rows` texts at once, one token of each in a step. Its features
    take `positions`, as those of GPT do.

        steps = TextSteps(model, rows, size, choose)
        steps.read(tokens)  # (rows, T): the prefill
        steps.step()        # the next token of each row is in steps.tokens, (rows,)

    `size` is the number of positions that the longest text may take.
    choose((rows, V) logits, (rows,) uniform numbers) -> (rows,) tokens must work on the device and
    not wait for it. With compiled=True torch.compile fuses the model's kernels first, which takes
    a minute for each graph.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: int,
        size: int,
        choose: Callable[[Tensor, Tensor], Tensor],
        compiled: bool = False,
    ):
        super().__init__(model, rows, size)
        self.choose = choose
        # For the step at each position: the random number that decides a row's draw, and the next
        # token of the row's prompt, or -1 where the prompt has ended.
        device = self.tokens.device
        self.uniform = torch.zeros(size, rows, dtype=torch.double, device=device)
        self.given = torch.full((size, rows), -1, device=device)
        if compiled:
            self.decode = torch.compile(self.decode, dynamic=False)

    @torch.no_grad()
    def read(
        self, tokens: Tensor, uniform: Tensor | None = None, given: Tensor | None = None
    ) -> None:
        """Starts over with tokens (rows, T); the last of them is left to the first step. uniform
        and given, each (steps, rows), are for the coming steps."""
        tokens, T = tokens.to(self.tokens.device), tokens.size(1)
        for cache in self.caches:
            cache.length = 0
        if T > 1:
            self.model.features(tokens[:, :-1], caches=self.caches)
        self.tokens.copy_(tokens[:, -1])
        self.position.fill_(T - 1)
        self.length = T - 1
        self.given.fill_(-1)
        for table, rows in ((self.uniform, uniform), (self.given, given)):
            if rows is not None:
                table[T - 1 : T - 1 + len(rows)].copy_(rows)

    @torch.no_grad()
    def step(self, change: Callable[[Tensor], Tensor] | None = None) -> None:
        """Writes the next token of each row. `change` maps the logits to those that are used."""
        if change is None:
            self.next(self.advance)()
        else:  # too rare to be worth a graph
            self.advance(self.limit(), change)
            self.length += 1

    def advance(self, limit: int, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        logits = self.decode(limit)
        if change is not None:
            logits = change(logits)
        chosen = self.choose(logits, self.uniform.index_select(0, self.position)[0])
        given = self.given.index_select(0, self.position)[0]
        self.tokens.copy_(torch.where(given < 0, chosen, given))
        self.position.add_(1)
        return self.tokens

    def decode(self, limit: int) -> Tensor:
        """(rows, V) logits of the next token: `features` of one position, which is a tensor."""
        model, (caches, mask) = self.model, self.seen(limit)
        tokens = self.tokens.clamp(min=0)  # -1, chosen from NaN, is found when it is read back
        return model.head(model.features(tokens[:, None], mask, caches, self.position)[:, 0])

    def write(
        self, tokens: Tensor, lengths: list[int], max_new_tokens: int, pick
    ) -> Iterator[list[int | None]]:
        """Does and yields what `generate` in `decoding.py` does. tokens (B, longest +
        max_new_tokens) begin with the prompts, of the given lengths; `pick` is a Pick, and
        self.choose is its `choose`."""
        block_size, start = self.model.config.block_size, -1
        rows, (B, total) = list(enumerate(lengths)), tokens.shape
        waiting: deque = deque()

        def arrived() -> list[int | None]:
            n, writing, wait = waiting.popleft()
            tokens[:, n] = wait()
            column, step = tokens[:, n].tolist(), [None] * B
            for r in writing:
                step[r] = column[r]
            check_chosen(step)
            return step

        for n in range(min(lengths), total):
            if context_start(n, block_size) != start:  # prefill, at first and after each drop
                while waiting:
                    yield arrived()
                start = context_start(n, block_size)
                stop = min(start + block_size + 1, total)
                uniform = torch.zeros(stop - n, B, dtype=torch.double)
                given = torch.full((stop - n, B), -1)
                for r, k in rows:
                    if k > n:
                        given[: k - n, r] = tokens[r, n : min(k, stop)]
                    first, last = max(k, n), min(k + max_new_tokens, stop)
                    if first < last:
                        uniform[first - n : last - n, r] = pick.draw(r, last - first)
                self.read(tokens[:, start:n], uniform, given)
            writing = [r for r, k in rows if k <= n < k + max_new_tokens]
            leads = any(pick.leads[r] for r in writing)
            self.step(partial(pick.follow_leads, writing=writing) if leads else None)
            if writing:
                waiting.append((n, writing, read_back(self.tokens)))
            if len(waiting) > AHEAD:
                yield arrived()
        while waiting:
            yield arrived()


# ---- the encoder-decoder -------------------------------------------------------------------------


class Seq2SeqSteps(CapturedSteps):
    """An encoder-decoder that translates up to N sentences with K rows each: `make_advance` in
    `tasks/translation.py`, but every row keeps its place, even when its sentence is finished.

    Sources have up to `source_len` tokens, targets up to `size`, including the start token.
    """

    least = 32

    def __init__(self, model, N: int, K: int, source_len: int, size: int, vocab_size: int):
        super().__init__(model, N * K, size)
        self.N, self.K, self.vocab_size = N, K, vocab_size
        self.rows = torch.arange(N * K, device=self.tokens.device)
        self.memory = self.weight.new_zeros(N, source_len, self.weight.size(1))
        self.padding = self.weight.new_zeros(N, 1, 1, source_len)  # added to the scores
        c = model.config
        shape = N, c.n_head, source_len, c.n_embd // c.n_head
        self.across = [empty_cache(*shape, self.weight) for _ in range(c.n_layer)]

    def read(self, source: Tensor, keep: Tensor) -> Advance:
        """From source (B, S) and keep (B, S), False at padding, the function that `decoding.py`
        asks for logits."""
        B, S = source.shape
        self.memory[:B, :S] = self.model.encode(source, None if keep.all() else keep)
        hidden = torch.ones(B, 1, 1, self.memory.size(1), dtype=torch.bool, device=source.device)
        hidden[..., :S] = ~keep[:, None, None]
        self.padding[:B] = added_scores(hidden, self.weight)
        for block, cache in zip(self.model.decoder, self.across, strict=True):
            cache.length, cross = 0, block.cross
            cache.append(cross.split(cross.k(self.memory)), cross.split(cross.v(self.memory)))
        self.position.zero_()
        self.length, self.alive, self.used = 0, list(range(B)), source.new_empty(0)
        return self.advance

    def advance(self, tokens: Tensor, rows: Tensor, sentences: list[int]) -> Tensor:
        """An Advance of `decoding.py`. `used` holds the rows here of those that the caller has."""
        before, width = self.used, len(tokens) // len(sentences)
        if len(sentences) < len(self.alive) or len(before) != len(tokens):
            self.alive = [self.alive[i] for i in sentences]
            used = [i * self.K + k for i in self.alive for k in range(width)]
            self.used = torch.tensor(used, device=tokens.device)
        torch.arange(len(self.rows), out=self.rows)  # while it is captured a step moves no row
        step = self.next(self.decode)
        if self.K > 1 and self.length > 1:
            self.rows[self.used] = before[rows]
        self.tokens[self.used] = tokens
        logits = step()
        return logits if len(self.used) == len(logits) else logits[self.used]

    def decode(self, limit: int) -> Tensor:
        """(N · K, V) logits: the caches are moved as their rows were, then Seq2Seq.decode."""
        model, (caches, mask) = self.model, self.seen(limit)
        x = model.token_embedding(self.tokens)[:, None] * model.config.n_embd**0.5
        x = x + model.positions.index_select(0, self.position)
        for block, own, across in zip(model.decoder, caches, self.across, strict=True):
            if self.K > 1:
                own.select(self.rows)
            x = block(x, mask, self.memory, adds(self.padding), own, across)
        self.position.add_(1)
        return model.head(x[:, 0])[:, : self.vocab_size].float()


class StaticAdvance:
    """`make_advance` in `tasks/translation.py` with captured steps. They are used for the next
    batch too if its sizes are the same after rounding up to powers of two. beam: rows of each
    sentence."""

    def __init__(self, model: nn.Module, beam: int, vocab_size: int):
        self.model, self.beam, self.vocab_size = model, beam, vocab_size
        self.sizes, self.steps = (0, 0, 0), None

    def __call__(self, source: Tensor, keep: Tensor, target_len: int) -> Advance:
        needed = ((len(source), 1), (source.size(1), 16), (target_len, Seq2SeqSteps.least))
        sizes = tuple(power_of_two(n, least) for n, least in needed)
        if sizes != self.sizes:
            self.steps, (N, S, T) = None, sizes  # frees the memory of the old steps first
            self.steps = Seq2SeqSteps(self.model, N, self.beam, S, T, self.vocab_size)
            self.sizes = sizes
        return self.steps.read(source, keep)

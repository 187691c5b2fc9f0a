"""Keys and values of the positions that a layer of attention has seen.

`KVCache` grows with what is read. `StaticCache` is one in which a single token is decoded although
nothing depends on a number in Python, as a captured step (`graphs.py`) must have it: where the
token stands is a tensor, and what comes back has always the same size.
"""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the positions seen so far, for one attention layer.

    It is made outside the model and passed in, so the model itself has no state. Memory for all
    `max_len` positions is taken at the first append: growing by concatenation would copy everything
    at every token.
    """

    def __init__(self, max_len: int):
        self.max_len = max_len
        self.length = 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (B, H, T, D) keys and values; returns all so far, (B, H, length, D) each.

        Raises ValueError when the positions would exceed max_len.
        """
        B, H, T, D = k.shape
        if self.length + T > self.max_len:
            raise ValueError(
                f"the cache holds {self.max_len} positions, {self.length} are used and {T} more "
                "were given: make a longer cache or start a new one"
            )
        if self.k is None:
            # bf16 is fp32 here on a CPU, see attend.
            dtype = torch.float32 if k.is_cpu and k.dtype == torch.bfloat16 else k.dtype
            self.k, self.v = (x.new_empty(B, H, self.max_len, D, dtype=dtype) for x in (k, v))
        self.k[:, :, self.length : self.length + T] = k
        self.v[:, :, self.length : self.length + T] = v
        self.length += T
        return self.filled()

    def select(self, rows: Tensor) -> None:
        """Row i goes on with what row rows[i] has seen; rows may be repeated or left out."""
        if self.length == 0:
            return
        k, v = (x[:, :, : self.length].index_select(0, rows) for x in (self.k, self.v))
        if len(rows) > len(self.k):
            shape = (len(rows), *self.k.shape[1:])
            self.k, self.v = self.k.new_empty(shape), self.v.new_empty(shape)
        self.k, self.v = self.k[: len(rows)], self.v[: len(rows)]
        self.k[:, :, : self.length], self.v[:, :, : self.length] = k, v

    def filled(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


def room(rows: int, heads: int, length: int, weight: Tensor) -> KVCache:
    """An empty cache that has its memory already, for a model with embeddings like `weight`. Zeros,
    because 0 times what happens to lie there, NaN perhaps, would not be 0."""
    cache = KVCache(length)
    shape = rows, heads, length, weight.size(1) // heads
    cache.k, cache.v = weight.new_zeros(shape), weight.new_zeros(shape)
    return cache


class StaticCache:
    """The first `limit` positions of a KVCache that has its memory already.

    A new token is written at `position`, (1,) on the device. What comes back are always `limit`
    positions: who attends to them needs a mask that hides those behind `position`.
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
        """Row i goes on with what row rows[i] has seen; (B,), as many as there are."""
        for seen in self.seen:
            seen.copy_(seen.index_select(0, rows))


def context_start(n: int, block_size: int) -> int:
    """Where the context of the model begins when n tokens are there.

    At 0 while they fit. When they no longer do, half a block is dropped at once: positions are
    learned, so dropping one token moves all others, and the cache would be worthless at each step.
    """
    if n <= block_size:
        return 0
    half = max(1, block_size // 2)
    return -(-(n - block_size) // half) * half

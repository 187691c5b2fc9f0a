"""A seeded order of range(n): a table if n is small, otherwise computed place by place.

A table takes 8 bytes for each of the n: 312 MB for each epoch, in each process, where 10 billion
tokens are cut into windows of 256. Instead, a place can be encrypted. A Feistel network makes a
permutation from any function, and four rounds of good functions make one that looks random (Luby
and Rackoff 1988, doi:10.1137/0217022) as long as few of its places are seen. An epoch sees all of
them, so there are six rounds here. This network permutes a rectangle of a · b places, where a and b
are about √n, and a result of n or more is encrypted once more: generalised Feistel and cycle
walking, both from Black and Rogaway 2002 (doi:10.1007/3-540-45760-7_9).

Left out: secrecy. The function is chosen for speed.
"""

import math

import numpy as np
from numpy.random import Generator

TABLE = 1 << 20  # the largest n that gets a table, of 8 MB
ROUNDS = 6


def shuffled(n: int, random: Generator) -> "np.ndarray | Feistel":
    """A random order of range(n), which is indexed by arrays of places."""
    return random.permutation(n) if n <= TABLE else Feistel(n, random)


class Feistel:
    """A permutation of range(n) that keeps nothing but its keys; 0 < n < 2^62."""

    def __init__(self, n: int, random: Generator):
        self.n, rows = n, math.isqrt(n - 1) + 1
        columns = -(-n // rows)  # fewer than `rows` places too many: walks are rare
        self.rows, self.columns = np.uint64(rows), np.uint64(columns)
        self.keys = random.integers(1 << 64, size=ROUNDS, dtype=np.uint64)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """The numbers at these places of the order: (k,) -> (k,) int64."""
        found = self.encrypt(places.astype(np.uint64))
        while (outside := found >= self.n).any():
            found[outside] = self.encrypt(found[outside])
        return found.astype(np.int64)

    def encrypt(self, places: np.ndarray) -> np.ndarray:
        """A permutation of range(rows · columns). Each round shifts one coordinate by a function of
        the other, which does not change, so the round can be undone."""
        row, column = np.divmod(places, self.columns)
        for i, key in enumerate(self.keys):
            if i % 2:
                column = (column + fmix64(row ^ key) % self.columns) % self.columns
            else:
                row = (row + fmix64(column ^ key) % self.rows) % self.rows
        return row * self.columns + column


def fmix64(x: np.ndarray) -> np.ndarray:
    """The last step of MurmurHash3 (Appleby 2011), (k,) uint64 -> (k,) uint64: changing any bit of
    x changes half of the bits of the result, on average. The products are modulo 2^64."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))

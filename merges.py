"""Learning the merges of a byte-pair encoding: counting chunks, then merging the commonest pair.

The fast half of bpe.py's training. The slow and obvious version, which counts all pairs again for
each merge, is the oracle in tests/test_bpe.py. Splitting uses all cores, merging is plain Python.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from heapq import heapify, heappop, heappush
from itertools import chain, islice, pairwise
from typing import Any

import regex
from tqdm import tqdm

BATCH = 1_000_000  # characters of text handed to a worker process at a time


def count_chunks(texts: Iterable[str], pattern: str) -> Counter[str]:
    """How often each chunk occurs. No chunk spans two texts; only distinct chunks are kept.

    From 4 million characters on, worker processes do the splitting (12 MB on two cores: 1.0 s
    instead of 1.6); from 40 million where they cannot be forked and each imports torch anew. What
    a worker cannot do, because none can be started or because the calling script kills it for want
    of `if __name__ == "__main__"`, is done here.
    """
    counts: Counter[str] = Counter()
    batches = _batches(texts)
    enough = 4 if multiprocessing.get_start_method() == "fork" else 40
    head = list(islice(batches, enough))
    batches = chain(head, batches)
    workers = min(8, os.cpu_count() or 1)
    # A daemonic process (a DataLoader's worker, say) is not allowed to have children.
    if len(head) < enough or workers == 1 or multiprocessing.current_process().daemon:
        for batch in batches:
            counts.update(_count_batch(batch, pattern))
        return counts

    waiting: deque[tuple[list[str], Any]] = deque()  # bounded: it is all the text in memory

    def collect() -> None:
        batch, future = waiting.popleft()
        try:
            counts.update(future.result() if future else _count_batch(batch, pattern))
        except BrokenExecutor:
            counts.update(_count_batch(batch, pattern))

    with ProcessPoolExecutor(workers) as pool:
        for batch in batches:
            try:
                waiting.append((batch, pool.submit(_count_batch, batch, pattern)))
            except (BrokenExecutor, OSError):
                waiting.append((batch, None))
            if len(waiting) > 2 * workers:
                collect()
        while waiting:
            collect()
    return counts


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def _count_batch(texts: list[str], pattern: str) -> Counter[str]:
    return Counter(chain.from_iterable(map(regex.compile(pattern).findall, texts)))


def learn_merges(chunks: dict[str, int], n_merges: int, progress: bool = False) -> list[bytes]:
    """The bytes of each new token, in the order learnt; fewer than n_merges if pairs run out.

    All chunks lie end to end in flat lists, each a linked list of tokens, so that a merge costs
    time only where its pair occurs: `ids[p]` is the token that starts at p, or -1 where none does
    (inside a token, and between chunks); `following` and `before` lead to its neighbours.
    """
    ids, weight = [-1], [0]
    for chunk, n in chunks.items():
        data = chunk.encode("utf-8", "surrogatepass")
        ids += [*data, -1]
        weight += [n] * (len(data) + 1)
    following = list(range(1, len(ids) + 1))
    before = list(range(-1, len(ids) - 1))

    # A token that starts at p can only grow, so a pair enters the list of its places once per
    # place, in rising order. Places are never taken out, only found out of date when visited.
    places: dict[tuple[int, int], list[int]] = defaultdict(list)
    for p, pair in enumerate(pairwise(ids)):
        places[pair].append(p)
    count = {pair: sum([weight[p] for p in at]) for pair, at in places.items() if min(pair) >= 0}

    # Lazy heap, one entry per pair: once a pair exists its count can only fall, so an entry out of
    # date is still an upper bound, and goes back with the right count when it comes up.
    heap = [(-n, pair) for pair, n in count.items()]
    heapify(heap)
    tokens = [bytes([i]) for i in range(256)]
    bar = tqdm(total=n_merges, desc="merges", disable=None if progress else True)
    while heap and len(tokens) < 256 + n_merges:
        n, pair = heappop(heap)
        if -n != count[pair]:
            if count[pair]:
                heappush(heap, (-count[pair], pair))
            else:
                del count[pair], places[pair]
            continue
        a, b = pair
        new = len(tokens)
        tokens.append(tokens[a] + tokens[b])
        left_places: dict[int, list[int]] = defaultdict(list)  # token before -> where it starts
        right_places: dict[int, list[int]] = defaultdict(list)  # token behind -> where `new` starts
        left_count: dict[int, int] = defaultdict(int)
        right_count: dict[int, int] = defaultdict(int)
        for p in places.pop(pair):
            q = following[p]
            if ids[p] != a or ids[q] != b:
                continue
            left, right = before[p], following[q]
            x, y, n = ids[left], ids[right], weight[p]
            left_places[x].append(left)
            left_count[x] += n
            right_places[y].append(p)
            right_count[y] += n
            ids[p], ids[q] = new, -1
            following[p], before[right] = right, p
        # x+a has become x+new, and b+y new+y: what the new pair gains, the old one loses. The
        # right side goes first: in "abab", new+a comes with the first ab and goes with the second.
        for y, n in right_count.items():
            if y >= 0:
                places[new, y], count[new, y] = right_places[y], n
                count[b, y] -= n
                heappush(heap, (-n, (new, y)))
        for x, n in left_count.items():
            if x >= 0:
                places[x, new], count[x, new] = left_places[x], n
                count[x, a] -= n
                heappush(heap, (-n, (x, new)))
        del count[pair]
        bar.update()
    bar.close()
    return tokens[256:]

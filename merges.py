"""Learning the merges of a byte-pair encoding: counting chunks, then merging the commonest pair.

The fast half of bpe.py's training. The slow and obvious version, which counts all pairs again for
each merge, is the oracle in tests/test_bpe.py. Splitting uses all cores, merging is plain Python.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import partial
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise

from tqdm import tqdm

from chunks import Splitter
from data.cores import batched, on_all_cores


def count_chunks(texts: Iterable[str], pattern: str) -> Counter[str]:
    """How often each chunk occurs. No chunk spans two texts; only distinct chunks are kept."""
    counts: Counter[str] = Counter()
    for found in on_all_cores(partial(_count_batch, Splitter(pattern)), batched(texts, len)):
        counts.update(found)
    return counts


def _count_batch(split: Splitter, texts: list[str]) -> Counter[str]:
    return Counter(chain.from_iterable(map(split, texts)))


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
    # Each number is one object in all of the lists: 64 bytes a place less than with ranges.
    numbers = list(range(-1, len(ids) + 1))
    following, before = numbers[2:], numbers[: len(ids)]

    # A token that starts at p can only grow, so a pair enters the list of its places once per
    # place, in rising order. Places are never taken out, only found out of date when visited.
    places: dict[tuple[int, int], list[int]] = defaultdict(list)
    for p, pair in enumerate(pairwise(ids), 1):
        places[pair].append(numbers[p])
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

"""Learning the pieces of a WordPiece vocabulary: characters first, then the pair that scores best.

The training half of wordpiece.py, whose docstring has the score and an example. The slow and
obvious version, which counts all again for each join, is the oracle in tests/test_wordpiece.py.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from heapq import heapify, heappop, heappush
from itertools import pairwise

from tqdm import tqdm

Pair = tuple[int, int]
INSIDE = "##"  # before a piece that does not begin a word


def learn(
    words: dict[str, int], room: int, min_frequency: int, progress: bool = False
) -> list[str]:
    """At most `room` pieces for these words and their counts, in the order learnt: characters
    first. ValueError if those alone are too many. The slow version is in tests/test_wordpiece.py.

    A join visits only the words with its pair. But it makes both of its pieces rarer, and so
    raises the score of every pair they are in: the heap gets all of those again.
    """
    spelled = [[word[0], *(INSIDE + c for c in word[1:])] for word in words]
    pieces = sorted({piece for row in spelled for piece in row})
    if len(pieces) > room:
        raise ValueError(
            f"vocab_size leaves room for {max(room, 0)} pieces, but the texts have {len(pieces)} "
            f"different characters: choose a vocab_size {len(pieces) - room} higher"
        )
    id_of = {piece: i for i, piece in enumerate(pieces)}
    rows, weight = [[id_of[p] for p in row] for row in spelled], [*words.values()]
    count: Counter[int] = Counter()  # of pieces
    together: Counter[Pair] = Counter()  # of pairs
    places: dict[Pair, set[int]] = {}  # the rows that have, or had, a pair
    pairs_of: dict[int, set[Pair]] = defaultdict(set)  # the pairs that a piece is in

    def add(row: int, sign: int) -> None:
        n = sign * weight[row]
        for piece in rows[row]:
            count[piece] += n
        for pair in pairwise(rows[row]):
            together[pair] += n
            if pair not in places:
                places[pair] = set()
                pairs_of[pair[0]].add(pair)
                pairs_of[pair[1]].add(pair)
            places[pair].add(row)

    def score(pair: Pair) -> float:
        return together[pair] / (count[pair[0]] * count[pair[1]])

    for row in range(len(rows)):
        add(row, 1)
    heap: list[tuple[float, Pair]] = []
    most = -1  # entries, of which some are out of date, before the heap is made anew
    bar = tqdm(total=room, initial=len(pieces), desc="pieces", disable=None if progress else True)
    while len(pieces) < room:
        if len(heap) > most:
            heap = [(-score(pair), pair) for pair, n in together.items() if n >= min_frequency]
            heapify(heap)
            most = 4 * len(heap) + 1000
        if not heap:
            break
        found, pair = heappop(heap)
        if together[pair] < min_frequency or -found != score(pair):
            continue  # out of date: its present score is in the heap too
        a, b = pair
        new = len(pieces)
        pieces.append(pieces[a] + pieces[b].removeprefix(INSIDE))
        for row in places.pop(pair):
            add(row, -1)
            rows[row] = join(rows[row], pair, new)
            add(row, 1)
        for other in pairs_of[a] | pairs_of[b] | pairs_of[new]:
            if together[other] >= min_frequency:
                heappush(heap, (-score(other), other))
            else:  # counts of pairs never rise
                del together[other]
                for piece in other:
                    pairs_of[piece].discard(other)
        bar.update()
    bar.close()
    return pieces


def join(row: list[int], pair: Pair, new: int) -> list[int]:
    """The row with `new` for each occurrence of the pair, from the left."""
    out: list[int] = []
    for piece in row:
        if out and (out[-1], piece) == pair:
            out[-1] = new
        else:
            out.append(piece)
    return out

"""The language model that counts: n-grams with interpolated modified Kneser-Ney smoothing.

The probability of a token is a share of counts: how often did it follow these n - 1 tokens? Most
contexts were seen too seldom for that, so each count gives up a discount, and what all of them gave
up goes to the same question about a context that is one token shorter:

    p(w | abc) = (a(abcw) - D(a(abcw))) / a(abc·)  +  gamma(abc) · p(w | bc)

down to the even distribution over all V tokens. a is the count for the longest n-grams. For the
shorter ones it is the number of different tokens seen in front of them: "Francisco" is frequent,
but follows one word, so it is unlikely behind a word that we know nothing about. An n-gram at the
beginning of a document has nothing in front of it, and keeps its count.

All n-grams of one length are a sorted array of numbers, (the number of its first n - 1 tokens among
those of that length) · V + its last token. Hence a whole text is looked up by one binary search for
each length, each of them from the results of the one before. There is no loop over tokens.

Two other ways to smooth, add-k and stupid backoff, are two lines each. `mixture_weights` says how
to mix models. `python -m models.ngram` counts a verse and writes more of it.

Left out: pruning, classes, caches, and counts that do not fit in memory.

Papers: Kneser and Ney 1995; Chen and Goodman 1998, "An Empirical Study of Smoothing Techniques for
Language Modeling" (TR-10-98, section 3.4); Heafield et al. 2013, "Scalable Modified Kneser-Ney
Language Model Estimation" (KenLM, whose numbers these are); Brants et al. 2007 (stupid backoff).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

# What an n-gram gives up that was counted once, twice, or more often, where the text does not say:
# the values that KenLM's --discount_fallback has.
FALLBACK = (0.5, 1.0, 1.5)
BACKOFF = 0.4  # of Brants et al. 2007, section 4

SMOOTHINGS = ("kneser_ney", "add_k", "stupid_backoff")


@dataclass
class NGramConfig:
    vocab_size: int = 8192  # tokens to learn (GPT-2's: 50257)
    block_size: int = 4096  # tokens of a window to score: the first have shorter contexts
    order: int = 5  # tokens of the longest n-gram: a context has one less
    # kneser_ney, add_k or stupid_backoff (whose values are no probabilities: their sum is above 1)
    smoothing: str = field(default="kneser_ney", metadata={"choices": SMOOTHINGS})
    added: float = 0.01  # what add_k adds to each count
    # the token between documents: it ends one and begins the next; -1: there is none
    boundary: int = field(default=-1, metadata={"flag": False, "from_data": True})

    def __post_init__(self):
        for name, most in (("vocab_size", 2**31), ("block_size", 2**31), ("order", 100)):
            if not 1 <= getattr(self, name) <= most:
                value = getattr(self, name)
                raise ValueError(f"{name}={value} is out of range: choose 1 to {most:,}")
        if self.smoothing not in SMOOTHINGS:
            known = ", ".join(SMOOTHINGS)
            raise ValueError(f"smoothing={self.smoothing} is not known: choose {known}")
        if not 0 < self.added < math.inf:
            raise ValueError(f"added={self.added} is out of range: choose more than 0")


# ---- counting ------------------------------------------------------------------------------------


class Level(NamedTuple):
    """All different n-grams of one length in a text, G of them, in ascending order."""

    keys: np.ndarray  # (G,) (number of the first n - 1 tokens in the level below) · V + last token
    counts: np.ndarray  # (G,) how often each occurs
    suffix: np.ndarray  # (G,) numbers of the last n - 1 tokens in the level below
    # (G,) how many different tokens occur in front of each; the count itself for the longest
    # n-grams, and for those at the beginning of a document, where nothing is in front
    adjusted: np.ndarray


def count_ngrams(ids: np.ndarray, order: int, V: int, boundary: int = -1) -> list[Level]:
    """The levels 1 to `order` of a text, whose ids are below V. n-grams of one token are all V ids,
    seen or not. No n-gram goes over a boundary: it is only the first or the last of its tokens. The
    text begins and ends with one, added where it is not there; the first is not counted itself."""
    if not len(ids):
        raise ValueError("a text without tokens has no n-grams: give more text")
    if boundary >= 0:
        first, last = ([boundary] * int(ids[end] != boundary) for end in (0, -1))
        ids = np.concatenate([first, ids, last])
    ids = np.asarray(ids, dtype=np.int64)
    places = np.arange(len(ids))
    # The tokens from the last boundary before each place to the place itself, both included.
    since = np.maximum.accumulate(np.where(ids == boundary, places, 0))
    reach = places + 1
    reach[1:] -= since[:-1]
    counts = np.bincount(ids[int(boundary >= 0) :], minlength=V)
    levels = [Level(np.arange(V), counts, np.zeros(V, np.int64), counts)]
    number = ids  # of the n-gram that ends at each place, in its level
    for n in range(2, order + 1):
        ends = np.flatnonzero(reach >= n)
        if not len(ends):
            break  # no document is so long
        keys = number[ends - 1] * V + ids[ends]
        keys, at, inverse, counts = np.unique(
            keys, return_index=True, return_inverse=True, return_counts=True
        )
        suffix = number[ends[at]]
        below = levels[-1]
        in_front = np.bincount(suffix, minlength=len(below.keys))
        levels[-1] = below._replace(adjusted=np.where(in_front, in_front, below.counts))
        levels.append(Level(keys, counts, suffix, counts))
        number = np.full(len(ids), -1)
        number[ends] = inverse
    return levels


# ---- counts -> probabilities ---------------------------------------------------------------------


class Table(NamedTuple):
    """What a level says: p(last token | the tokens before it), and, for each context, the factor of
    what the level below says about a token that is not here."""

    p: np.ndarray  # (G,)
    backoff: np.ndarray  # (n-grams of the level below,)


def discounts(counts: np.ndarray) -> tuple[float, float, float]:
    """What n-grams counted once, twice, and more often give up (Chen and Goodman 1998, equation
    26), estimated from how many are counted once to four times. In a small text, or one of
    characters, where almost nothing is rare, that can leave the range 0 to the count itself, or
    divide by 0: then FALLBACK."""
    once, twice, thrice, four = (int((counts == k).sum()) for k in (1, 2, 3, 4))
    if not once * twice * thrice:
        return FALLBACK
    y = once / (once + 2 * twice)
    found = 1 - 2 * y * twice / once, 2 - 3 * y * thrice / twice, 3 - 4 * y * four / thrice
    return found if all(0 <= d <= k for k, d in enumerate(found, 1)) else FALLBACK


def kneser_ney(level: Level, context: np.ndarray, below: np.ndarray, n_contexts: int) -> Table:
    """Interpolated modified Kneser-Ney. context: (G,), the number of each n-gram's context; below:
    (G,), the probability that the level below gives to its last token."""
    a = level.adjusted
    given_up = np.array([0.0, *discounts(a)])[np.minimum(a, 3)]
    total = np.bincount(context, a, n_contexts)
    # A context that nothing follows leaves the question to the one below, as a whole.
    backoff = np.ones(n_contexts)
    np.divide(np.bincount(context, given_up, n_contexts), total, out=backoff, where=total > 0)
    return Table((a - given_up) / total[context] + backoff[context] * below, backoff)


def stupid_backoff(level: Level, context: np.ndarray, below: np.ndarray, n_contexts: int) -> Table:
    """The share of the count; where there is none, 0.4 times what the shorter context says."""
    total = np.bincount(context, level.counts, n_contexts)
    share = np.where(level.counts, level.counts / total[context], BACKOFF * below)
    return Table(share, np.where(total > 0, BACKOFF, 1.0))


def add_k(level: Level, context: np.ndarray, n_contexts: int, V: int, k: float) -> Table:
    """(count + k) / (count of the context + k·V): the level below must say 1 / V. Where there is no
    context of full length, at the beginning of a document, it knows nothing."""
    total = np.bincount(context, level.counts, n_contexts)
    return Table((level.counts + k) / (total + k * V)[context], k * V / (total + k * V))


def smooth(levels: list[Level], config: NGramConfig) -> list[Table]:
    """One table for each level, from the shortest n-grams to the longest."""
    tables, V = [], config.vocab_size
    for n, level in enumerate(levels, 1):
        context = level.keys // V  # all in the one empty context, if n is 1
        n_contexts = len(tables[-1].p) if tables else 1
        below = tables[-1].p[level.suffix] if tables else np.full(V, 1 / V)
        if config.smoothing == "kneser_ney":
            tables.append(kneser_ney(level, context, below, n_contexts))
        elif config.smoothing == "stupid_backoff":
            tables.append(stupid_backoff(level, context, below, n_contexts))
        elif n == len(levels):
            tables.append(add_k(level, context, n_contexts, V, config.added))
        else:  # of add-k, which looks at the longest n-grams alone
            tables.append(Table(np.full(len(level.keys), 1 / V), np.ones(n_contexts)))
    return tables


# ---- the model -----------------------------------------------------------------------------------


class NGram(nn.Module):
    """n-gram tables that are called as GPT is. There is nothing to train: `count` reads the text.

    A `number` below is the place of an n-gram in the array of its length, -1 where it has none.
    """

    Config = NGramConfig

    def __init__(self, config: NGramConfig):
        super().__init__()
        self.config = config
        self.clear()

    def clear(self) -> None:
        """Forgets all n-grams."""
        for n in range(1, self.config.order + 1):
            self.set_level(n, torch.empty(0, dtype=torch.long), torch.empty(0), torch.empty(0))

    def set_level(self, n: int, keys: Tensor, log_p: Tensor, log_backoff: Tensor) -> None:
        """Stores the table of the n-grams of n tokens; the logarithms are natural."""
        self.register_buffer(f"keys_{n}", keys)
        self.register_buffer(f"log_p_{n}", log_p)
        self.register_buffer(f"log_backoff_{n}", log_backoff)

    def level(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(getattr(self, f"{name}_{n}") for name in ("keys", "log_p", "log_backoff"))

    def count(self, ids: np.ndarray) -> None:
        """Reads a text, (n,), and makes the tables. What was counted before is forgotten."""
        config = self.config
        self.clear()
        levels = count_ngrams(ids, config.order, config.vocab_size, config.boundary)
        tables = smooth(levels, config)
        for n, (level, table) in enumerate(zip(levels, tables, strict=True), 1):
            keys, p, backoff = (torch.from_numpy(a) for a in (level.keys, table.p, table.backoff))
            self.set_level(n, keys, p.log().float(), backoff.log().float())

    def find(self, number: Tensor, tokens: Tensor, n: int) -> Tensor:
        """The numbers of n-grams, from those of their first n - 1 tokens and the last token."""
        keys = self.level(n)[0]
        if not len(keys):
            return torch.full_like(number, -1)
        wanted = number * self.config.vocab_size + tokens
        at = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        return torch.where((number >= 0) & (keys[at] == wanted), at, -1)

    def log_probs(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """tokens (B, T), targets (B, T) -> (B, T): log p of each target behind the tokens up to its
        place. The longest n-gram that was seen decides; each longer one costs a backoff."""
        number, result = tokens, self.level(1)[1][targets]
        for n in range(2, self.config.order + 1):
            _, log_p, log_backoff = self.level(n)
            if not len(log_p):  # no document has so many tokens
                break
            found = self.find(number, targets, n)
            lower = result + torch.where(number >= 0, log_backoff[number], 0.0)
            result = torch.where(found >= 0, log_p[found], lower)
            # A longer context for the next level: what ends at the place before, and this token.
            number = self.find(nn.functional.pad(number[:, :-1], (1, 0), value=-1), tokens, n)
        return result

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, caches: list[Tensor] | None = None
    ) -> Tensor | dict[str, Tensor]:
        """tokens (B, T) -> log p of each next token (B, T, V), or, given targets (B, T), {"loss":
        summed loss}. Targets of -100 do not count."""
        if targets is None:
            return self.head(self.features(tokens, caches))
        return {"loss": -self.log_probs(tokens, targets.clamp(min=0))[targets != -100].sum()}

    def features(self, tokens: Tensor, caches: list[Tensor] | None = None) -> Tensor:
        """tokens (B, T) -> (B, T, C), the contexts: of each place its token and the C - 1 before
        it, -1 where there are none. With caches, the tokens continue what was given before."""
        C, T = max(self.config.order - 1, 1), tokens.size(1)
        if caches is not None:
            tokens = torch.cat([*caches, tokens], 1)
            caches[:] = [tokens[:, -C:]]
        return nn.functional.pad(tokens, (C, 0), value=-1).unfold(1, C, 1)[:, -T:]

    def head(self, features: Tensor) -> Tensor:
        """contexts (..., C) -> log p of every token (..., V)."""
        contexts = features.flatten(0, -2)
        rows = torch.stack([self.distribution(context) for context in contexts])
        return rows.view(*features.shape[:-1], -1)

    def distribution(self, context: Tensor) -> Tensor:
        """context (C,) -> log p of every token (V,): from the shortest n-grams to the longest,
        those that follow the context replace what the shorter one said."""
        result, V = self.level(1)[1].clone(), self.config.vocab_size
        numbers = context  # of the n-grams of n - 1 tokens that end at each place
        for n in range(2, self.config.order + 1):
            keys, log_p, log_backoff = self.level(n)
            number = numbers[-1]
            if number < 0 or not len(keys):
                break
            first, end = torch.searchsorted(keys, torch.stack([number, number + 1]) * V).tolist()
            result += log_backoff[number]
            result[keys[first:end] % V] = log_p[first:end]
            numbers = self.find(numbers[:-1], context[n - 1 :], n)
        return result

    def make_caches(self) -> list[Tensor]:
        return []

    def flops_per_token(self) -> int:
        """Nothing is multiplied in training."""
        return 0

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest) -> None:
        """Makes room first: the text decided how large the tables are."""
        for name, buffer in list(self.named_buffers(recurse=False)):
            if prefix + name in state_dict:
                shape = state_dict[prefix + name].shape
                self.register_buffer(name, buffer.new_empty(shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)


# ---- mixtures ------------------------------------------------------------------------------------


def mixture_weights(log_p: Tensor, iterations: int = 50) -> Tensor:
    """log_p (n, M), what each of M models says about the same n held-out tokens -> the weights (M,)
    with which their mixture is likeliest, by expectation-maximisation (Dempster et al. 1977):
    a model's new weight is its mean share of the mixture's probability."""
    weights = torch.full((log_p.size(1),), 1 / log_p.size(1), dtype=torch.double)
    for _ in range(iterations):
        weights = (weights.log() + log_p.double()).softmax(1).mean(0)
    return weights


# ---- ARPA: the file format of n-gram models ------------------------------------------------------

BEGIN, END = "<s>", "</s>"  # what the boundary is called there as the first and as the last token


def tokens_of(model: NGram, n: int) -> np.ndarray:
    """(G, n) tokens of all n-grams of one length."""
    V, keys = model.config.vocab_size, model.level(n)[0].numpy()
    if n == 1:
        return keys[:, None]
    return np.hstack([tokens_of(model, n - 1)[keys // V], keys[:, None] % V])


def write_arpa(model: NGram, path: Path, words: Sequence[str]) -> None:
    """Writes the tables as text, with base-10 logarithms. words: the name of each id, without white
    space. Raises ValueError for names that cannot stand there."""
    if bad := [word for word in words if word.split() != [word]]:
        raise ValueError(f"{bad[0]!r} is no word of an ARPA file: give names without white space")
    if len({*words, BEGIN, END}) != len(words) + 2 or len(words) != model.config.vocab_size:
        raise ValueError(
            f"{len(words)} words for {model.config.vocab_size} ids: give each a name of its own, "
            f"not {BEGIN} and {END}"
        )
    boundary, ln10 = model.config.boundary, math.log(10)
    levels = [n for n in range(1, model.config.order + 1) if len(model.level(n)[0])]
    names = np.array([END if i == boundary else word for i, word in enumerate(words)], dtype=object)
    with path.open("w", encoding="utf-8") as file:
        extra = [boundary >= 0, *(False for _ in levels)]  # the boundary is two words
        counts = [len(model.level(n)[0]) + extra[n - 1] for n in levels]
        print("\\data\\", *(f"ngram {n}={c}" for n, c in enumerate(counts, 1)), sep="\n", file=file)
        for n in levels:
            print(f"\n\\{n}-grams:", file=file)
            tokens, log_p = tokens_of(model, n), model.level(n)[1].double() / ln10
            backoff = [None] * len(tokens)
            if n + 1 in levels:
                backoff = (model.level(n + 1)[2].double() / ln10).tolist()
            for row, p, b in zip(tokens.tolist(), log_p.tolist(), backoff, strict=True):
                text = " ".join(names[row])
                if row == [boundary]:  # as a context it is the beginning
                    print(f"{p:.7g}\t{END}\n-99\t{BEGIN}\t{b or 0:.7g}", file=file)
                    continue
                if row[0] == boundary:
                    text = BEGIN + text.removeprefix(END)
                print(f"{p:.7g}\t{text}" + ("" if b is None else f"\t{b:.7g}"), file=file)
        print("\n\\end\\", file=file)


def read_arpa(path: Path) -> tuple[NGram, list[str]]:
    """(model, names of its ids) of an ARPA file, as write_arpa or KenLM writes it. Raises
    ValueError, with the line, for anything else."""
    ids: dict[str, int] = {}
    tables, begin = [], None
    for n, section in enumerate(arpa_sections(path), 1):
        rows = []  # (tokens, log p, log backoff)
        for number, line in section:
            p, _, rest = line.partition("\t")
            names, _, backoff = rest.partition("\t")
            names = names.split(" ")
            if n == 1:
                ids.setdefault(END if names == [BEGIN] else names[0], len(ids))
            try:
                tokens = [ids[END if name == BEGIN else name] for name in names]
                rows.append((tokens, float(p), float(backoff or 0)))
                if len(tokens) != n:
                    raise ValueError
            except (KeyError, ValueError):
                raise ValueError(
                    f"{path}, line {number:,}: this is no probability with {n} known words and "
                    f"perhaps a backoff between tabs: {line[:60]}"
                ) from None
            if names == [BEGIN]:  # it begins, and is never what comes next
                begin = rows.pop()
        if n == 1 and begin:  # of its values, the backoff alone counts
            rows = [(t, p, begin[2] if t == begin[0] else b) for t, p, b in rows]
        tables.append(rows)
    if not ids:
        raise ValueError(f"{path} has no n-grams: give an ARPA file")
    if len(tables[0]) != len(ids):
        raise ValueError(f"{path} names a word twice, or has {BEGIN} without {END}: mend it")
    model = NGram(NGramConfig(len(ids), order=len(tables), boundary=ids.get(END, -1)))
    log_backoff = torch.zeros(1)
    for n, rows in enumerate(tables, 1):
        tokens = torch.tensor([tokens for tokens, _, _ in rows], dtype=torch.long).view(-1, n)
        values = torch.tensor([values for _, *values in rows]).double() * math.log(10)
        keys = number = tokens[:, 0]
        for m in range(2, n + 1):
            keys = number * len(ids) + tokens[:, m - 1]
            number = model.find(number, tokens[:, m - 1], m) if m < n else number
        if (number < 0).any():
            raise ValueError(f"{path}: an n-gram of {n} words has a context that is none")
        keys, places = keys.sort()
        values = values.view(-1, 2)[places].float()
        model.set_level(n, keys, values[:, 0], log_backoff)
        log_backoff = values[:, 1]
    return model, list(ids)


def arpa_sections(path: Path) -> Iterator[list[tuple[int, str]]]:
    """Yields the lines of each section of n-grams, with their numbers, from the shortest on."""
    section: list[tuple[int, str]] = []
    inside = False
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            line = line.rstrip("\n")
            if line.startswith("\\"):
                if inside:
                    yield section
                section, inside = [], line.endswith("-grams:")
            elif inside and line:
                section.append((number, line))
    if inside:
        raise ValueError(f"{path} ends before \\end\\: it is not whole")


if __name__ == "__main__":  # count the letters of a verse, then write more of it
    torch.manual_seed(1)
    text = (
        "Tyger Tyger, burning bright,\nIn the forests of the night;\nWhat immortal hand or eye,\n"
        "Could frame thy fearful symmetry?\n\nIn what distant deeps or skies\nBurnt the fire of "
        "thine eyes?\nOn what wings dare he aspire?\nWhat the hand, dare seize the fire?\n"
    )
    letters = sorted(set(text))
    tokens = torch.tensor([letters.index(c) for c in text])
    for order in range(1, 6):
        ngram = NGram(NGramConfig(len(letters), order=order))
        ngram.count(tokens.numpy())
        written = tokens[None, :1]
        for _ in range(70):
            p = ngram.head(ngram.features(written)[:, -1]).exp()
            written = torch.cat([written, p.multinomial(1)], 1)
        print(f"order {order}   {''.join(letters[i] for i in written[0].tolist())!r}")

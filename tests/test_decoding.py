"""Searches against brute force over a vocabulary of three tokens, and against plain loops."""

import itertools
import math

import pytest
import torch

from decoding import beam_search, choose, distribution, generate_targets, likeliest, penalty

END, START = 0, 0


class Table:
    """A language model of random numbers: logits depend on the sentence and all that is written."""

    def __init__(self, V: int, seed: int, sharp: float = 1.5):
        self.V, self.seed, self.sharp = V, seed, sharp

    def logits(self, sentence: int, written: tuple[int, ...]) -> torch.Tensor:
        number = hash((self.seed, sentence, written)) % 2**62
        return self.sharp * torch.randn(self.V, generator=torch.Generator().manual_seed(number))

    def advance(self, n: int):
        """An `advance` that keeps what was written, as a cache would."""
        state = {"rows": [(s, ()) for s in range(n)], "sentences": list(range(n)), "first": True}

        def advance(tokens, rows, sentences):
            before = state["rows"]
            state["sentences"] = [state["sentences"][i] for i in sentences]
            new = []
            for token, row in zip(tokens.tolist(), rows.tolist(), strict=True):
                s, written = before[row]
                new.append((s, written if state["first"] else (*written, token)))
            state["rows"], state["first"] = new, False
            width = len(new) // max(len(sentences), 1)
            assert [s for s, _ in new] == [s for s in state["sentences"] for _ in range(width)]
            return torch.stack([self.logits(s, written) for s, written in new])

        return advance

    def log_probability(self, sentence: int, tokens: tuple[int, ...]) -> float:
        """Of writing exactly these tokens, then the end."""
        total = 0.0
        for i, token in enumerate((*tokens, END)):
            total += float(self.logits(sentence, tokens[:i]).log_softmax(-1)[token])
        return total


def brute_force(table: Table, sentence: int, limit: int, alpha: float):
    """The best of all sequences of at most `limit` tokens."""
    words = range(1, table.V)
    every = (t for n in range(limit + 1) for t in itertools.product(words, repeat=n))
    scored = ((table.log_probability(sentence, t) / penalty(len(t) + 1, alpha), t) for t in every)
    return max(scored)


def plain_beam(table: Table, sentence: int, limit: int, beam: int, alpha: float, never=None):
    """Beam search of one sentence with lists, as its docstring tells it; the oracle."""
    living, complete = [(0.0, ())], []
    for length in range(1, limit + 2):
        ranked = []
        for score, written in living:
            log_p = table.logits(sentence, written).log_softmax(-1).tolist()
            tokens = [t for t in range(table.V) if t != never]
            for token in tokens if length <= limit else [END]:
                ranked.append((score + log_p[token], written, token))
        ranked.sort(key=lambda c: -c[0])
        complete += [(s / penalty(length, alpha), w) for s, w, t in ranked[:beam] if t == END]
        living = [(s, (*w, t)) for s, w, t in ranked[: 2 * beam] if t != END][:beam]
        best = max(complete, default=(-math.inf, ()))
        if not living or len(complete) >= beam:
            return best
        if living[0][0] / penalty(limit + 1, alpha) <= best[0]:
            return best
    return best


def greedy_pick(logits, _):
    return logits.argmax(-1)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_a_beam_as_wide_as_all_sequences_finds_the_best_of_them(alpha):
    limits = [4, 2, 3, 1, 4]
    table = Table(3, seed=1)
    found = beam_search(
        table.advance(len(limits)), limits, beam=64, start=START, end=END, alpha=alpha
    )
    for sentence, (limit, (score, tokens)) in enumerate(zip(limits, found, strict=True)):
        best, sequence = brute_force(table, sentence, limit, alpha)
        assert tuple(tokens) == sequence and score == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("V", [3, 7, 23])
@pytest.mark.parametrize("beam", [1, 2, 3, 5])
def test_batched_search_equals_plain_lists_one_sentence_at_a_time(V, beam):
    limits = [7, 3, 1, 5, 9, 7]
    for seed in range(4):
        table = Table(V, seed)
        found = beam_search(table.advance(len(limits)), limits, beam=beam, start=START, end=END)
        for sentence, (limit, (score, tokens)) in enumerate(zip(limits, found, strict=True)):
            expected, sequence = plain_beam(table, sentence, limit, beam, 0.6)
            assert tuple(tokens) == sequence and score == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("start", [1, 6])
@pytest.mark.parametrize("beam", [1, 3])
def test_a_start_token_of_its_own_is_never_written(start, beam):
    """And the probability that it would have is nobody else's."""
    limits = [7, 3, 1, 5, 9, 7]
    tempted = []
    for seed in range(4):
        table = Table(7, seed)

        def greedy(logits, _):
            assert (logits[:, start] == -math.inf).all()
            return logits.argmax(-1)

        found = beam_search(table.advance(6), limits, beam=beam, start=start, end=END)
        for sentence, (limit, (score, tokens)) in enumerate(zip(limits, found, strict=True)):
            expected, sequence = plain_beam(table, sentence, limit, beam, 0.6, never=start)
            assert tuple(tokens) == sequence and score == pytest.approx(expected, abs=1e-5)
            tempted.append(start in plain_beam(table, sentence, limit, beam, 0.6)[1])
        written = generate_targets(table.advance(6), limits, greedy, start=start, end=END)
        if beam == 1:
            assert written == [tokens for _, tokens in found]
    assert any(tempted)


def test_a_beam_of_one_is_greedy_and_both_keep_to_the_limit():
    limits = [12, 3, 1, 6, 12]
    for seed in range(20):
        table = Table(5, seed, sharp=3.0)
        greedy = generate_targets(table.advance(5), limits, greedy_pick, start=START, end=END)
        found = beam_search(table.advance(5), limits, beam=1, start=START, end=END)
        assert [tokens for _, tokens in found] == greedy
        assert all(len(tokens) <= limit for tokens, limit in zip(greedy, limits, strict=True))


def test_the_first_hypothesis_to_end_does_not_end_the_search():
    """joeynmt#148: the search stopped with the first end token, and long sentences were cut."""

    class Late(Table):
        def logits(self, sentence, written):
            # Ending at once has probability 0.3; one token first, then ending is sure: 0.7.
            p = [0.3, 0.7, 1e-9] if not written else [1.0, 1e-9, 1e-9]
            return torch.tensor(p).log()

    found = beam_search(Late(3, 0).advance(1), [5], beam=2, start=START, end=END, alpha=0.0)
    assert found[0][1] == [1] and found[0][0] == pytest.approx(math.log(0.7), abs=1e-5)


def test_a_length_penalty_prefers_longer_hypotheses():
    lengths = []
    for alpha in (0.0, 0.6, 1.5):
        table = Table(4, seed=3, sharp=0.5)
        found = beam_search(table.advance(20), [8] * 20, beam=4, start=0, end=END, alpha=alpha)
        lengths.append(sum(len(tokens) for _, tokens in found))
    assert lengths[0] < lengths[1] < lengths[2]


def test_wider_beams_score_no_worse_on_the_whole():
    totals = []
    for beam in (1, 3, 9):
        table = Table(6, seed=5)
        found = beam_search(table.advance(30), [6] * 30, beam=beam, start=0, end=END)
        totals.append(sum(score for score, _ in found))
    assert totals[0] < totals[1] < totals[2]


def test_write_asks_pick_with_the_numbers_of_the_sentences_still_alive():
    seen = []

    def pick(logits, alive):
        seen.append(list(alive))
        return torch.tensor([END if sentence == 1 else 1 for sentence in alive])

    texts = generate_targets(Table(3, 0).advance(3), [3, 3, 2], pick, start=START, end=END)
    assert texts == [[1, 1, 1], [], [1, 1]]
    assert seen == [[0, 1, 2], [0, 2], [0]]


# ---- NaN -----------------------------------------------------------------------------------------


def test_rows_of_nan_choose_no_token_and_leave_their_neighbours():
    """Their sums are above no number, so token V was chosen, which no vocabulary has."""
    logits = torch.tensor([[0.0, 5.0, 1.0], [0.0, math.nan, 1.0], [math.inf, 0.0, 0.0]])
    u = torch.full((3,), 0.5, dtype=torch.double)
    for filters in ({}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert choose(distribution(logits, **filters), u).tolist() == [1, -1, -1]
    assert likeliest(logits).tolist() == [1, -1, 0]


@pytest.mark.parametrize("write", ["drawn", "beam"])
def test_logits_that_become_nan_end_in_one_sentence(write):
    table = Table(5, 0).advance(3)
    seen = []

    def advance(*args):
        logits = table(*args)
        seen.append(1)
        if len(seen) > 1:
            logits[-1, 2] = math.nan
        return logits

    ends = {"start": START, "end": END}
    with pytest.raises(ValueError, match=r"not numbers \(NaN\): use a checkpoint from before"):
        if write == "beam":
            beam_search(advance, [4] * 3, beam=2, **ends)
        generate_targets(advance, [4] * 3, lambda logits, _: likeliest(logits), **ends)
    assert len(seen) == 2

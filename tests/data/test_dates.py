"""data/dates.py: every spelling means one date, no date is in two splits, every process agrees."""

import os
import subprocess
import sys
from collections import Counter
from datetime import date, timedelta

import pytest
from conftest import ROOT

from data.dates import (
    COUNTS,
    FIRST,
    LAST,
    NUMERIC,
    PREFIXES,
    WEEKDAYS,
    WORDED,
    dates,
    dates_hash,
    prompts,
    spell,
    split_days,
    year_in_words,
)
from data.parallel import open_pairs


@pytest.mark.slow
def test_dates_of_one_split_are_in_no_other():
    """If spellings were divided instead, a date could train in one spelling and validate in
    another, and the figure would say nothing about dates that were never seen."""
    days = {split: split_days(split) for split in COUNTS}
    everything = [day for part in days.values() for day in part]
    assert len(set(everything)) == len(everything) == (LAST - FIRST).days + 1 == 36_525
    for split, n in COUNTS.items():
        isos = [iso for _, iso in dates(split)]
        assert len(isos) == n and set(isos) <= {day.isoformat() for day in days[split]}
        assert split == "train" or len(set(isos)) == n
    assert set(split_days("validation", seed=1)) != set(days["validation"])


@pytest.mark.slow
def test_a_spelling_means_one_date():
    seen: dict[str, str] = {}
    for split, n in (("train", 290_000), ("validation", 0), ("test", 0)):
        for spelling, iso in dates(split, n):
            assert seen.setdefault(spelling.lower(), iso) == iso


@pytest.mark.slow
def test_numbers_mean_one_date_whatever_the_spelling():
    """3/4/05 and 3.4.05 differ by their separators, 20030405 and 2003.04.05 by their length."""
    seen: dict[str, date] = {}
    for n in range((LAST - FIRST).days + 1):
        day = FIRST + timedelta(n)
        for spelling in NUMERIC:
            assert seen.setdefault(spell(day, spelling), day) == day


@pytest.mark.slow
def test_words_mean_one_date_whatever_the_spelling():
    """In lower case, which makes the most spellings equal. Every date of two months is enough,
    because months are written as words (or as Roman numerals between dots), and only May is the
    same in short and in full."""
    seen: dict[str, date] = {}
    for year in range(1950, 2050):
        for day in (date(year, month, d) for month in (1, 5) for d in range(1, 32)):
            for spelling in WORDED:
                assert seen.setdefault(spell(day, spelling).lower(), day) == day


def test_a_prefix_is_never_taken_for_the_date():
    """Prefixes are "on" and weekdays, and no month or number begins like these."""
    firsts = {spell(date(1998, m, d), s).lower() for m in range(1, 13) for d in (1, 17)
              for s in NUMERIC + WORDED}  # fmt: skip
    begin = ("on ", *(name[:3].lower() for name in WEEKDAYS))
    assert not [text for text in firsts if text.startswith(begin)]
    weekdays = {spell(date(2024, 2, 29), prefix) for prefix in PREFIXES}
    assert weekdays == {"", "on ", "Thursday, ", "Thursday ", "Thu, ", "Thu ", "on Thursday, "}


@pytest.mark.parametrize(
    "day,spelling,text",
    [
        (date(1998, 3, 25), "{m}/{d}/{yy}", "3/25/98"),
        (date(1998, 3, 25), "{d}.{m}.{yyyy}", "25.3.1998"),
        (date(2003, 11, 22), "{weekday}, the {dth} of {month}, {yyyy}",
         "Saturday, the 22nd of November, 2003"),
        (date(2009, 1, 31), "{month} the {ordinal}, {year}",
         "January the thirty-first, two thousand nine"),
        (date(2049, 12, 11), "{wkd} {dth} {mon} '{yy}", "Sat 11th Dec '49"),
        (date(1950, 8, 13), "{dd}.{roman}.{yyyy} {dth}", "13.VIII.1950 13th"),
    ],
)  # fmt: skip
def test_spellings(day, spelling, text):
    assert spell(day, spelling) == text


def test_years_in_words():
    want = {
        1950: "nineteen fifty",
        1999: "nineteen ninety-nine",
        2000: "two thousand",
        2010: "twenty ten",
        2041: "twenty forty-one",
    }
    assert {year: year_in_words(year) for year in want} == want
    assert len({year_in_words(year) for year in range(1950, 2050)}) == 100


@pytest.mark.slow
def test_every_spelling_occurs_and_none_prevails():
    pairs = list(dates("train", 20_000))
    assert 0.1 < sum(s.isupper() for s, _ in pairs) / len(pairs) < 0.3
    days = Counter(iso for _, iso in dates("train"))
    assert len(days) > 30_000  # of 32,525
    assert max(len(s) for s, _ in pairs) < 80 and {len(iso) for _, iso in pairs} == {10}


def test_dates_are_the_same_in_every_process():
    """Python's hash seed differs between processes; a set or hash() in the way would show."""
    code = "from data.dates import dates; print(hash('x'), *dates('train', 5))"
    answers = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            encoding="utf-8",
            check=True,
        ).stdout.partition(" ")
        for seed in ("1", "2")
    ]
    assert answers[0][0] != answers[1][0] and answers[0][2] == answers[1][2]
    assert list(dates("train", 9, seed=1)) != list(dates("train", 9))


def test_dates_by_name(tmp_path):
    corpus = open_pairs("dates", tmp_path)
    assert corpus.rule == (
        "100,000 pairs train, 2,000 pairs validate, 2,000 pairs test (no date in two of them)"
    )
    assert list(corpus.pairs("validation")) == list(dates("validation"))
    assert corpus.hash == dates_hash() != dates_hash(seed=1) and len(corpus.hash) == 64
    assert len(corpus.prompts) == 5 and corpus.prompts == prompts()
    assert [text for text, _ in corpus.pieces("test")][:2] == list(next(dates("test")))
    assert list(tmp_path.iterdir()) == []  # nothing is stored
    with pytest.raises(ValueError, match="dates has no split dev"):
        next(dates("dev"))
    with pytest.raises(ValueError, match="2,001 dates are more than the 2,000 of test"):
        next(dates("test", 2001))

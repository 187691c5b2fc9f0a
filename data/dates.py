"""Dates as people write them -> ISO 8601: pairs for the encoder-decoder, generated, never stored.

    the third of March, nineteen ninety-eight  -> 1998-03-03
    TUE 3/3/98                                 -> 1998-03-03

Every spelling means one date, by fixed conventions:
- the dates are 1950-01-01 to 2049-12-31, so two digits determine the year (50 to 99 mean 19..);
- numbers with slashes have the month first (3/25/98), unless they begin with a year of four digits;
- numbers with dots have the day first (25.3.98), unless they begin with a year of four digits;
- with dashes, either the year comes first and has four digits, or the month is a word.

A date belongs to one split only, so validation dates never occur in training.

Left out: spellings that need arithmetic (day 62 of 1998, last Friday of March), times, other
languages.
"""

import hashlib
from collections.abc import Iterator
from datetime import date
from random import Random

FIRST, LAST = date(1950, 1, 1), date(2049, 12, 31)
COUNTS = {"train": 100_000, "validation": 2_000, "test": 2_000}  # pairs of each split
VERSION = "dates 1"


def word_list(text: str) -> list[str]:
    return text.split()


# Our own names: those of strftime depend on the language of the machine.
MONTHS = word_list(
    "January February March April May June July August September October November December"
)
WEEKDAYS = word_list("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
ROMAN = word_list("I II III IV V VI VII VIII IX X XI XII")
ONES = word_list(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
TENS = word_list("zero ten twenty thirty forty fifty sixty seventy eighty ninety")
ORDINALS = word_list(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth "
    "fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth twenty-first "
    "twenty-second twenty-third twenty-fourth twenty-fifth twenty-sixth twenty-seventh "
    "twenty-eighth twenty-ninth thirtieth thirty-first"
)
SUFFIXES = ["th"] * 31  # of 1 to 31
SUFFIXES[0] = SUFFIXES[20] = SUFFIXES[30] = "st"
SUFFIXES[1] = SUFFIXES[21] = "nd"
SUFFIXES[2] = SUFFIXES[22] = "rd"

# d 3, dd 03, dth 3rd, ordinal third; m 3, mm 03, mon Mar, month March, roman III;
# yy 98, yyyy 1998, year nineteen ninety-eight; wkd Tue, weekday Tuesday
NUMERIC = (
    "{yyyy}-{mm}-{dd}",
    "{yyyy}/{mm}/{dd}",
    "{yyyy}.{mm}.{dd}",
    "{yyyy}{mm}{dd}",
    "{m}/{d}/{yyyy}",
    "{mm}/{dd}/{yyyy}",
    "{m}/{d}/{yy}",
    "{mm}/{dd}/{yy}",
    "{d}.{m}.{yyyy}",
    "{dd}.{mm}.{yyyy}",
    "{d}.{m}.{yy}",
    "{d}. {m}. {yyyy}",
)
WORDED = (
    "{d} {month} {yyyy}",
    "{d} {mon} {yyyy}",
    "{d} {mon} {yy}",
    "{d} {month} '{yy}",
    "{d}. {month} {yyyy}",
    "{d}-{mon}-{yyyy}",
    "{dd}-{mon}-{yy}",
    "{d}.{roman}.{yyyy}",
    "{month} {d}, {yyyy}",
    "{month} {d} {yyyy}",
    "{mon} {d}, {yyyy}",
    "{mon}. {d}, {yyyy}",
    "{mon} {d} '{yy}",
    "{mon}-{dd}-{yyyy}",
    "{month} {dth}, {yyyy}",
    "{month} the {dth}, {yyyy}",
    "{dth} {month} {yyyy}",
    "{dth} of {mon} {yyyy}",
    "the {dth} of {month}, {yyyy}",
    "the {dth} of {month} '{yy}",
    "{month} the {ordinal}, {yyyy}",
    "{month} {ordinal}, {yyyy}",
    "the {ordinal} of {month} {yyyy}",
    "{month} {ordinal}, {year}",
    "the {ordinal} of {month}, {year}",
    "{yyyy} {month} {d}",
    "{yyyy}, {mon} {dth}",
    "{yyyy}-{mon}-{dd}",
)
SPELLINGS = NUMERIC + WORDED
# One of these stands before each spelling; repeated entries are drawn more often.
PREFIXES = ("",) * 6 + ("on ", "{weekday}, ", "{weekday} ", "{wkd}, ", "{wkd} ", "on {weekday}, ")
CASES = (str,) * 3 + (str.lower, str.upper)
PROMPTS = (
    "the {ordinal} of {month}, {year}",
    "{mon} {d} '{yy}",
    "{weekday}, {month} {dth}, {yyyy}",
    "{m}/{d}/{yy}",
    "{d}.{roman}.{yyyy}",
)


def dates(split: str, n: int = 0, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Yields n pairs (spelling, ISO date), by default as many as COUNTS says.

    Training draws its dates at random, with repetition; validation and test have each date once.
    Raises ValueError for an unknown split, or if validation or test has fewer than n dates.
    """
    if split not in COUNTS:
        raise ValueError(f"dates has no split {split}: choose one of {', '.join(COUNTS)}")
    days = split_days(split, seed)
    n = n or COUNTS[split]
    if split != "train" and n > len(days):
        raise ValueError(f"{n:,} dates are more than the {len(days):,} of {split}: ask for fewer")
    # A string as seed is hashed with SHA-512, and random() is the one method whose numbers Python
    # promises to keep, so the pairs are the same on every machine and in every version.
    random = Random(f"{VERSION} {split} {seed}").random
    for i in range(n):
        day = days[int(random() * len(days))] if split == "train" else days[i]
        prefix = PREFIXES[int(random() * len(PREFIXES))]
        spelling = SPELLINGS[int(random() * len(SPELLINGS))]
        case = CASES[int(random() * len(CASES))]
        yield case(spell(day, prefix + spelling)), day.isoformat()


def split_days(split: str, seed: int = 0) -> list[date]:
    """The dates of one split: one of three parts of all dates in a seeded order."""
    random = Random(f"{VERSION} order {seed}").random
    ordinals = sorted(range(FIRST.toordinal(), LAST.toordinal() + 1), key=lambda _: random())
    n, m = COUNTS["validation"], COUNTS["validation"] + COUNTS["test"]
    parts = {"validation": ordinals[:n], "test": ordinals[n:m], "train": ordinals[m:]}
    return [date.fromordinal(ordinal) for ordinal in parts[split]]


def prompts(seed: int = 0) -> list[str]:
    """A few different spellings of validation dates, to show what a model has learnt."""
    days = split_days("validation", seed)
    return [spell(day, spelling) for day, spelling in zip(days, PROMPTS, strict=False)]


def dates_hash(seed: int = 0) -> str:
    """SHA-256 of all that the pairs depend on, so that changed spellings make another corpus."""
    names = MONTHS, WEEKDAYS, ROMAN, ONES, TENS, ORDINALS, SUFFIXES
    cases = [case.__name__ for case in CASES]
    what = VERSION, seed, FIRST, LAST, COUNTS, names, SPELLINGS, PREFIXES, cases
    return hashlib.sha256(repr(what).encode()).hexdigest()


def spell(day: date, spelling: str) -> str:
    d, m, y, weekday = day.day, day.month, day.year, WEEKDAYS[day.weekday()]
    return spelling.format(
        d=d,
        dd=f"{d:02}",
        dth=f"{d}{SUFFIXES[d - 1]}",
        ordinal=ORDINALS[d - 1],
        m=m,
        mm=f"{m:02}",
        mon=MONTHS[m - 1][:3],
        month=MONTHS[m - 1],
        roman=ROMAN[m - 1],
        yy=f"{y % 100:02}",
        yyyy=y,
        year=year_in_words(y),
        wkd=weekday[:3],
        weekday=weekday,
    )


def year_in_words(year: int) -> str:
    """A year as nineteen ninety-eight, two thousand, two thousand seven or twenty fourteen."""
    century, rest = divmod(year, 100)
    if year < 2000 or year >= 2010:
        return f"{number_in_words(century)} {number_in_words(rest)}"
    return f"two thousand {ONES[rest]}" if rest else "two thousand"


def number_in_words(n: int) -> str:
    """A number from 1 to 99 in words."""
    if n < 20:
        return ONES[n]
    tens, ones = divmod(n, 10)
    return f"{TENS[tens]}-{ONES[ones]}" if ones else TENS[tens]

"""data/pydocs.py: the text from Python's own documentation is English, and always the same."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_sentences import documents

import data.sentences
from data.sentences import open_sentences


@pytest.fixture(scope="module")
def pydocs():
    return open_sentences("pydocs", Path("unused"))


@pytest.mark.slow
def test_pydocs_are_megabytes_of_documents(pydocs):
    train, validation = documents(pydocs, "train"), documents(pydocs, "validation")
    found = [sentence for document in train + validation for sentence in document]
    assert len(train + validation) > 300 and len(found) > 10_000
    assert 1e6 < sum(map(len, found)) < 3e6
    assert len(validation) == (len(train) + len(validation)) // 10
    assert min(map(len, train + validation)) >= 2
    assert len(set(found)) == len(found)  # what validates was not trained
    assert "Wrap a single paragraph of text, returning a list of wrapped lines." in found
    assert 'The operator "not" yields "True" if its argument is false, "False" otherwise.' in found
    assert all(prompt.count("[MASK]") == 1 for prompt in pydocs.prompts)
    assert len(pydocs.prompts) == 5 and pydocs.rule.endswith("; every tenth document validates")


@pytest.mark.slow
def test_pydocs_are_english_and_not_code(pydocs):
    text = [s for split in pydocs.splits for s, _ in pydocs.pieces(split) if s]
    assert not [s for s in text if re.search(r">>>|\n|::|==|->|\bdef \w+\(|`", s)]
    assert all(len(s.split()) >= 3 for s in text)
    words = re.findall(r"[a-z]+", " ".join(text).lower())
    for word, share in {"the": 0.05, "is": 0.01, "a": 0.01, "of": 0.01, "return": 0.002}.items():
        assert words.count(word) > share * len(words)
    assert sum(s[1].isupper() for s in text) > 0.9 * len(text)
    assert sum(s.endswith((".", ":", ")", '"', "?", "!")) for s in text) > 0.9 * len(text)
    assert sum("(" in s for s in text) < 0.25 * len(text)


@pytest.mark.slow
def test_pydocs_are_the_same_in_every_process(pydocs):
    """If the code iterated over a set, each process would have another order."""
    code = "from data.sentences import *; print(open_sentences('pydocs', Path('unused')).hash)"
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == pydocs.hash


def test_hash_of_pydocs_follows_their_content_and_division(monkeypatch):
    hashes = set()
    for texts in ([["a", "b"], ["c"]], [["a"], ["b", "c"]], [["a", "b"], ["d"]]):
        monkeypatch.setattr(data.sentences, "pydocs", lambda texts=texts: texts)
        for by_sentence in (True, False, True):
            corpus = open_sentences("pydocs", Path("unused"), by_sentence=by_sentence)
            hashes.add(corpus.hash)
    assert len(hashes) == 6


MODULE = '''
"""Handle spam, eggs and the like.

Usage is as simple as this::

    The code below the colons is not a sentence.

>>> spam("A doctest is not a sentence.")
'It is not.'

A heading without end
---------------------

spam(a, b) -> list

Items are described in a list:

* The first item continues
  on the second line.
* The :class:`second` item has a ``role`` and *emphasis*.
eggs -- The eggs of this module are fresh.

    x = spam(1)
"""


class Spam:
    """Hold the spam of a program."""

    if True:
        def eggs(self):
            """Return the eggs of the spam."""

            def inner():
                """Count the eggs that are left."""
            "A string that is no docstring here."


def last():
    """Return the eggs of the spam.

    Raise an error if there is none left.
    """
'''


def test_docstrings_in_the_order_of_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr("data.text.sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    (tmp_path / "a.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "b.py").write_text("this does not parse", encoding="utf-8")
    (tmp_path / "c.py").write_text('"""Only one sentence is no document."""', encoding="utf-8")
    assert documents(open_sentences("pydocs", tmp_path), "train")[0] == [
        "Handle spam, eggs and the like.",
        "Items are described in a list:",
        "The first item continues on the second line.",
        "The second item has a role and emphasis.",
        "The eggs of this module are fresh.",
        "Hold the spam of a program.",
        "Return the eggs of the spam.",
        "Count the eggs that are left.",
        "Raise an error if there is none left.",
    ]

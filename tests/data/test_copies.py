"""A validation file that is a copy of the training file is told, whatever the task reads."""

import json
from pathlib import Path

import pytest

from data.conll import open_tagged
from data.labelled import open_labelled
from data.parallel import open_pairs
from data.squad import open_squad
from data.tables import open_tables

QAS = [{"question": "Who?", "answers": [{"text": "a", "answer_start": 0}]}]
SQUAD = json.dumps({"data": [{"paragraphs": [{"context": "a b", "qas": QAS}]}]})
KINDS = {
    "labels.csv": ("text,label\na,x\nb,y\n", lambda a, b: open_labelled(a, valid=b)),
    "rows.csv": ("a,b\nx,y\nz,w\n", lambda a, b: open_tables(a, b, [("a", "b")])),
    "tags.conll": ("Rome B-x\nis O\n", open_tagged),
    "squad.json": (SQUAD, lambda a, b: open_squad(a, valid=b)),
    "pairs.tsv": ("a\tb\nc\td\n", lambda a, b: open_pairs(a, Path("cache"), valid=b)),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_copy_is_told(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    text, read = KINDS[name]
    for path in (name, f"copy-{name}"):
        Path(path).write_text(text, encoding="utf-8")
    told = f"; copy-{name} is a copy of {name}: hold out rows that do not train"
    assert read(name, f"copy-{name}").rule.endswith(told)
    assert "copy" not in read(name, name).rule  # to be scored whole

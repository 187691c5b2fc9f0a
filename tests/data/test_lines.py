"""data/lines.py: standard input, where each line gets an answer."""

import io
import sys

import pytest

from data.lines import answer_stdin

LINES = ["Grüße – 日本\n", "b\r\n", "\n", "d\u2028e\n"]


def answered(monkeypatch, capsys, raw: bytes, batch_size: int) -> list[str]:
    """What is printed: each line as it was read, with its number."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), "latin-1"))

    def answer(lines: list[str], bar, first: int) -> list[str]:
        return [f"{n} {line!r}" for n, line in enumerate(lines, first)]

    try:
        answer_stdin(answer, batch_size, "line")
    finally:
        printed = capsys.readouterr().out.splitlines()
    return printed


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_text(monkeypatch, capsys, batch_size, mark):
    """It was a word of the first line, which then had another answer."""
    printed = answered(monkeypatch, capsys, mark + "".join(LINES).encode(), batch_size)
    assert printed == [f"{n} {line!r}" for n, line in enumerate(LINES, 1)]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize(
    "raw,number,message",
    [
        ("a\nb\nGröße\n".encode("cp1252"), 3, "is not UTF-8: .*iconv -f cp1252 -t utf-8"),
        ("a\nb\n".encode("utf-16"), 1, "is UTF-16, as it seems: .*iconv -f utf-16 -t utf-8"),
        ("日本".encode("utf-16-be"), 1, "is not UTF-8"),
        ("a\nb\n".encode("utf-16-le"), 1, "is UTF-16"),
        ("日本".encode("utf-16"), 1, "is UTF-16"),
    ],
)
def test_other_encodings_are_refused_by_line(monkeypatch, capsys, batch_size, raw, number, message):
    """The bytes were replaced by question marks, and answered."""
    with pytest.raises(ValueError, match=rf"^standard input, line {number:,}, {message}"):
        answered(monkeypatch, capsys, raw, batch_size)


def test_what_stands_before_the_wrong_line_is_answered(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\n\xff\nc\n"), "utf-8"))
    with pytest.raises(ValueError, match="standard input, line 3, is not UTF-8"):
        answer_stdin(lambda lines, bar, first: [line.strip() for line in lines], 100, "line")
    assert capsys.readouterr().out == "a\nb\n"

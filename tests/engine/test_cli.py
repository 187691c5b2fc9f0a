"""cli.py: flags made from dataclasses."""

import io
import sys
from dataclasses import dataclass, field

import pytest

from engine import cli


@dataclass
class Example:
    n_layer: int = 2  # blocks; 100% of them
    rate: float = 0.5  # a share
    name: str = "a"  # some text
    fast: bool = False  # go fast
    compile: bool | None = None  # decided by the machine
    prompt: list[str] = field(default_factory=list)  # may be repeated


def parse(*argv: str) -> dict:
    parser = cli.Parser("An example.")
    cli.add_flags(parser, Example, "flags")
    return parser.parse(list(argv))


@pytest.mark.parametrize(
    "argv,want",
    [
        ([], {}),
        (["--n_layer=3"], {"n_layer": 3}),
        (["--n-layer", "3"], {"n_layer": 3}),
        (["--fast"], {"fast": True}),
        (["--fast=false"], {"fast": False}),
        (["--fast", "yes"], {"fast": True}),
        (["--no-fast"], {"fast": False}),
        (["--no-compile"], {"compile": False}),
        (["--compile=TRUE"], {"compile": True}),
        (["--prompt=a-b", "--prompt", "--x".lstrip("-")], {"prompt": ["a-b", "x"]}),
        (["--name=--dashed-text"], {"name": "--dashed-text"}),
        (["--name", "--n-head 2 --x-y=3"], {"name": "--n-head 2 --x-y=3"}),  # a value of flags
        (["--rate", "1e-3"], {"rate": 1e-3}),
    ],
)
def test_only_given_flags_are_returned(argv, want):
    assert parse(*argv) == want


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--n_layr=3"], "there is no flag --n_layr: did you mean --n_layer?"),
        (["--n_lay=3"], "there is no flag --n_lay: did you mean --n_layer?"),  # no abbreviations
        (["--qqqqqq"], "there is no flag --qqqqqq: see python"),
        (["--n_layer=2.5"], "invalid int value: '2.5'"),
        (["--n_layer"], "expected one argument"),
        (["--fast=maybe"], "'maybe' is neither true nor false"),
        (["--name=a\nb"], r"'a\nb' has a control character: leave it out"),
        (["--name=" + "a/" * 501], "has 1,002 characters: choose a name of 1,000 at most"),
        (["--prompt=\udcff"], "is not UTF-8"),
        (["--prompt=--"], "--prompt has no value"),
        (["--n_layer=9223372036854775808"], "is out of range: choose 9223372036854775807 at most"),
        (["--rate=" + "x" * 999], "invalid float value: 'xxxxxxxxxxxx...xxxxxxxxxxxxx'"),
    ],
)
def test_wrong_flags_are_one_sentence(argv, message):
    with pytest.raises(ValueError) as error:
        parse(*argv)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_tilde_is_the_home_folder_in_names_and_stays_in_texts(monkeypatch):
    """--out=~/run made a folder named "~", as a shell leaves the ~ behind an = alone."""
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("USERPROFILE", "/h")  # of Windows
    assert parse("--name=~/a", "--prompt=~/a") == {"name": "/h/a", "prompt": ["~/a"]}
    assert parse("--name=a~/b") == {"name": "a~/b"}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_what_an_output_cannot_show_is_replaced(monkeypatch, encoding):
    """All steps of a run were done, then a dash in its text ended it with an error."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding, errors="strict") for _ in "ab"]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])

    text = "a – 日本 \ud83d b"

    def main(argv):
        for stream in streams:
            print(text, file=stream, end="", flush=True)

    cli.run(main)
    for stream in streams:
        assert stream.buffer.getvalue() == text.encode(encoding, "replace")


def test_help_is_the_comment_behind_the_field():
    parser = cli.Parser("An example.")
    cli.add_flags(parser, Example, "flags")
    text = " ".join(parser.format_help().split())
    assert "blocks; 100% of them (default: 2)" in text
    assert "decided by the machine (default: auto)" in text
    assert "--no-fast" not in text


@pytest.mark.parametrize(
    "error,said",
    [
        (ValueError("a\x1b[31m\nb\udcff"), "a [31m b\ufffd"),
        (OSError(36, "File name too long", "x" * 5000), "[Errno 36] File name too long: 'xxx"),
        (MemoryError(), "this needs more memory than there is: choose a smaller model, batch or"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "this needs more memory"),
    ],
)
def test_a_sentence_is_a_line_whatever_it_quotes(error, said):
    def fails(argv):
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(fails)
    assert stop.value.code.startswith(f"error: {said}") and len(stop.value.code) < 620
    assert stop.value.code.removeprefix("error: ").isprintable()


def test_a_runtime_error_that_is_a_bug_of_ours_stays_one():
    def fails(argv):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError):
        cli.run(fails)


def test_a_flag_of_another_parser_says_what_it_is_for():
    parser = cli.Parser("An example.")
    cli.add_flags(parser, Example, "flags")
    with pytest.raises(ValueError, match=r"^--beam is for translators: leave it out here$"):
        parser.parse(["--beam=3"], lambda: {"--beam": "translators", "--rate": "nothing"})


def test_the_owners_of_a_flag_are_those_whose_dataclass_has_it():
    @dataclass
    class Other:
        rate: float = 0.5
        hidden: int = field(default=1, metadata={"flag": False})

    found = cli.owners({"a": (Example,), "b": (Other,)}, "for")
    assert found["--rate"] == "for a, b" and found["--name"] == "for a"
    assert "--hidden" not in found


def test_run_turns_what_users_cause_into_one_sentence(capsys):
    def fails(argv):
        raise ValueError("n=5 is too large: choose 4")

    with pytest.raises(SystemExit) as stop:
        cli.run(fails)
    assert stop.value.code == "error: n=5 is too large: choose 4"

    def bug(argv):
        raise KeyError("a bug of ours")

    with pytest.raises(KeyError):
        cli.run(bug)

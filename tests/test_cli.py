"""cli.py: flags made from dataclasses."""

from dataclasses import dataclass, field

import pytest

import cli


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
    ],
)
def test_wrong_flags_are_one_sentence(argv, message):
    with pytest.raises(ValueError) as error:
        parse(*argv)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_help_is_the_comment_behind_the_field():
    parser = cli.Parser("An example.")
    cli.add_flags(parser, Example, "flags")
    text = " ".join(parser.format_help().split())
    assert "blocks; 100% of them (default: 2)" in text
    assert "decided by the machine (default: auto)" in text
    assert "--no-fast" not in text


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

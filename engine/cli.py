"""The command line of every script, made from dataclasses.

Each field is a flag. Its type and default are the flag's, and the comment behind it, or on the line
above, is the help text: nothing is written twice. `--flag=false` and `--no-flag` both work for a
bool.

An error that a user can cause ends in one sentence, which `run` prints on one line. A name (of a
file, of a choice) has no control characters, and ~ at its beginning is the home folder, as in a
shell (which leaves it in --flag=~/file); a text may have both, and every `list[str]` is texts.
"""

import argparse
import difflib
import inspect
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from reprlib import repr as short

from engine.synonyms import ours

CONFIGS = (".py", ".json", ".yaml", ".yml", ".toml")  # files of settings, in other projects
LARGEST = 2**63 - 1  # the largest int64, in torch and in files
LONGEST = 600  # characters of a sentence: enough for two long paths, and still readable
LONGEST_NAME = 1000  # characters of a name: macOS has no longer paths
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
NO_UTF8 = re.compile("[\ud800-\udfff]")  # how Python keeps bytes that are not UTF-8


class Parser(argparse.ArgumentParser):
    """argparse with one-sentence errors, no abbreviations, the nearest name for a wrong flag."""

    def __init__(self, description: str):
        super().__init__(
            prog=program(),
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    @property
    def how(self) -> str:
        """The command that shows all flags."""
        return f"python {self.prog.removeprefix('python ')} --help"

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}: see {self.how}")

    def parse_known_args(self, args: list[str], namespace=None):
        for argument in args:
            if NO_UTF8.search(argument):
                raise ValueError(f"the argument {short(argument)} is not UTF-8: write it in that")
            if argument.startswith("--") and argument.endswith("=--"):  # argparse drops these two
                raise ValueError(f"{argument[:-3]} has no value: put one behind the =")
        return super().parse_known_args(args, namespace)

    def parse(self, argv: list[str], elsewhere: Callable[[], dict[str, str]] = lambda: {}) -> dict:
        """{field: value} of the flags that were given. Raises ValueError for an unknown flag.
        elsewhere() -> {flag: what it is for} names the flags that other parsers of the same script
        have; it is called only if this parser does not know a flag."""
        known = sorted(s for s in self._option_string_actions if s.startswith("--"))
        given, unknown = self.parse_known_args([underscored(a) for a in argv])
        for flag in unknown:
            name = flag.partition("=")[0]
            if not flag.startswith("-"):
                hint = f"see {self.how}"
                if flag.endswith(CONFIGS) and "--preset" in known:
                    hint = f"settings are flags here, or --preset NAME for many, {hint}"
                elif "=" in flag and re.fullmatch(r"\w+", name):
                    hint = f"did you mean --{flag}?"
                raise ValueError(f"{flag!r} belongs to no flag: {hint}")
            if purpose := elsewhere().get(name):
                raise ValueError(f"{name} is for {purpose}: leave it out here")
            if said := ours(name.lstrip("-").replace("-", "_").lower(), known):
                raise ValueError(f"there is no flag {name}: {said}")
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"see {self.how}"
            raise ValueError(f"there is no flag {name}: {hint}")
        return vars(given)


def program() -> str:
    """How this script was started, after "python": train.py, or -m lab.bench."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else Path(sys.argv[0]).name


def underscored(argument: str) -> str:
    """--n-layer=2 -> --n_layer=2, because people type both; the prefix --no- stays."""
    name, equals, value = argument.partition("=")
    if not re.fullmatch(r"--[\w-]+", name):  # a value may be flags: --base "--n_layer 2 --lr 1e-3"
        return argument
    prefix = "--no-" if name.startswith("--no-") else "--"
    return prefix + name.removeprefix(prefix).replace("-", "_") + equals + value


def true_or_false(text: str) -> bool:
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def whole_number(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {short(text)}") from None
    if abs(value) > LARGEST:
        raise argparse.ArgumentTypeError(
            f"{short(value)} is out of range: choose {LARGEST} at most"
        )
    return value


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid float value: {short(text)}") from None


def name(text: str) -> str:
    if CONTROL.search(text):
        raise argparse.ArgumentTypeError(f"{short(text)} has a control character: leave it out")
    if len(text) > LONGEST_NAME:
        few = f"choose a name of {LONGEST_NAME:,} at most"
        raise argparse.ArgumentTypeError(f"{short(text)} has {len(text):,} characters: {few}")
    return os.path.expanduser(text)  # noqa: PTH111 (Path raises an error where there is no home)


def comments(cls: type) -> dict[str, str]:
    """{field: the comment behind it, or on the line above}, from the source of the dataclass."""
    found = {}
    for source in (inspect.getsource(c) for c in reversed(cls.__mro__) if is_dataclass(c)):
        above = re.findall(r"^    # (.*)\n    (\w+): ", source, re.MULTILINE)
        found |= {name: text for text, name in above}
        found |= dict(re.findall(r"^    (\w+):[^\n]*?  # (.*)$", source, re.MULTILINE))
    return found


def add_flags(parser: Parser, cls: type, title: str, values: dict | None = None) -> None:
    """Adds a flag for each field of the dataclass; a flag that is not given is absent from the
    result. values: {field: the value that it has then}, for --help; else it is the field's default.

    The types are str, int, float, bool, `bool | None` (None means: decided by the machine),
    list[str] (the flag may be repeated) and tuple[str, str] (two values behind the flag). A field
    with the metadata flag=False has no flag; one with alone=VALUE may be given without a value.
    """
    group = parser.add_argument_group(title)
    helps, types = comments(cls), typing.get_type_hints(cls)
    for field in fields(cls):
        if not field.metadata.get("flag", True):
            continue
        kind, flag = types[field.name], f"--{field.name}"
        default = field.default if field.default is not MISSING else field.default_factory()
        default = (values or {}).get(field.name, default)
        shown = "auto" if default is None else default
        note = f" (default: {shown})" if shown not in ("", [], ()) and shown is not False else ""
        common = {
            "dest": field.name,
            "default": argparse.SUPPRESS,
            "help": (helps.get(field.name, "") + note).replace("%", "%%"),
        }
        if kind in (bool, bool | None):
            group.add_argument(
                flag, nargs="?", const=True, type=true_or_false, metavar="BOOL", **common
            )
            hidden = {**common, "help": argparse.SUPPRESS}
            group.add_argument(f"--no-{field.name}", action="store_false", **hidden)
        elif kind == list[str]:
            group.add_argument(flag, action="append", metavar="TEXT", **common)
        elif kind == tuple[str, str]:
            group.add_argument(flag, type=name, nargs=2, metavar="TEXT", **common)
        else:
            if "alone" in field.metadata:
                common |= {"nargs": "?", "const": field.metadata["alone"]}
            read = {int: whole_number, float: number, str: name}[kind]
            group.add_argument(flag, type=read, metavar=kind.__name__.upper(), **common)


def owners(classes: dict[str, tuple[type, ...]], said: str) -> dict[str, str]:
    """{flag: `said` and the names whose dataclasses have it}, for Parser.parse."""
    found: dict[str, list[str]] = {}
    for name, owned in classes.items():
        for field in (field for cls in owned for field in fields(cls)):
            if field.metadata.get("flag", True):
                found.setdefault(f"--{field.name}", []).append(name)
    return {flag: f"{said} {', '.join(names)}" for flag, names in found.items()}


def command_line(*words: str) -> str:
    """The words as a user may paste them into a shell, quoted where that is needed."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def sentence(error: Exception) -> str:
    """The message of an error on one line. It may quote a file or a name with any characters:
    those that would move a terminal's cursor are replaced, and the middle of a long message is left
    out."""
    text = NO_UTF8.sub("\ufffd", CONTROL.sub(" ", str(error)))
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2]} … {text[3 - LONGEST // 2 :]}"


def run(main: Callable[[list[str] | None], None]) -> None:
    """Calls main(None); an error that a user caused ends in one sentence, not in a traceback.

    `python -X dev script.py …` shows the traceback nevertheless.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            if sys.platform == "win32":  # consoles there are not UTF-8 by default
                stream.reconfigure(encoding="utf-8")
            # A locale that is not UTF-8, or a lone surrogate in a text, must not end a run.
            stream.reconfigure(errors="replace")
    # Unfinished files are removed on the way out, as after Ctrl-C.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    try:
        main(None)
    except BrokenPipeError:  # `sample.py | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        sys.exit(f"error: {sentence(error)}")
    except (MemoryError, RuntimeError) as error:
        # torch has a class for GPUs that are full, and a plain RuntimeError for everything else.
        said = str(error).lower()
        full = "allocate memory" in said or "out of memory" in said
        if sys.flags.dev_mode or not (full or isinstance(error, MemoryError)):
            raise
        sys.exit(
            "error: this needs more memory than there is: choose a smaller model, batch or text "
            f"({sentence(error)[:200] or 'MemoryError'})"
        )
    except KeyboardInterrupt:
        sys.exit("interrupted")
    finally:
        signal.signal(signal.SIGTERM, before)

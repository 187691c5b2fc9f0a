"""Lines of text: those of files, and those of standard input, where each one gets an answer."""

import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

from data.text import CONVERT, HEAD, Part, blocks, refuse_binary

NO_TEXT = re.compile("[\0\udc80-\udcff]")  # how Python hands on bytes that are not UTF-8
WIDE = ("\udcff\udcfe", "\udcfe\udcff")  # the byte-order marks of UTF-16


def read_lines(path: Path) -> Iterator[str]:
    r"""The lines of a file in UTF-8, also .gz, divided at \n alone: str.splitlines() also cuts at
    U+2028 or \x85, which may occur inside a sentence on one side of a pair of files only, and would
    shift all lines after it. Raises ValueError, with the line, for bytes that are not UTF-8."""
    number, offset, rest = 1, 0, b""
    for block in chain(blocks(Part(path)), [b""]):
        if not offset:
            refuse_binary(path, block[:HEAD])
        rest += block
        end = rest.rfind(b"\n") + 1 if block else len(rest)
        whole, rest = rest[:end], rest[end:]
        try:
            lines = whole.decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            number += whole.count(b"\n", 0, error.start)
            raise ValueError(
                f"{path} is not UTF-8 in line {number:,} (byte {offset + error.start:,}): {CONVERT}"
            ) from error
        if not block and not offset and "\r" in lines[0].rstrip("\r"):
            raise ValueError(
                f"{path} has old Mac line ends, \\r alone: convert them first (for example with "
                "tr '\\r' '\\n')"
            )
        if not lines[-1]:
            lines.pop()
        if not offset and lines:
            lines[0] = lines[0].removeprefix("\ufeff")  # which some editors on Windows write
        yield from lines
        number, offset = number + len(lines), offset + end


def lines_of(flag: str, path: str) -> list[str]:
    """The lines of the file that a flag names. Raises ValueError if there are none."""
    if not Path(path).is_file():
        raise ValueError(f"--{flag} {path} is no file here: name a text, one line for each vector")
    lines = list(read_lines(Path(path)))
    if not lines:
        raise ValueError(f"--{flag} {path} is empty: give a text of one line or more")
    return lines


def answer_stdin(
    answer: Callable[[list[str], tqdm, int], list[str]], batch_size: int, unit: str
) -> None:
    """Prints the answer to each line of standard input: at once if somebody types them, otherwise
    in batches, with a progress bar. answer(lines, bar, number of the first line) -> texts. Raises
    ValueError at the first line that is not UTF-8, when those before it are answered."""
    interactive, done = sys.stdin.isatty(), 0
    if isinstance(sys.stdin, io.TextIOWrapper):  # lines end at \n alone, here and in training
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")
    quiet = True if interactive or sys.stdout.isatty() else None
    if interactive:
        print(f"type a {unit} and Enter; Ctrl-D ends", file=sys.stderr)
    with tqdm(unit=unit, disable=quiet) as bar:
        while lines := list(islice(sys.stdin, 1 if interactive else batch_size)):
            if not done:
                lines[0] = lines[0].removeprefix("\ufeff")
            wrong = next((i for i, line in enumerate(lines) if NO_TEXT.search(line)), None)
            if wrong != 0:
                print("\n".join(answer(lines[:wrong], bar, done + 1)), flush=True)
            if wrong is not None:
                how = f"is not UTF-8: {CONVERT}"
                if "\0" in lines[wrong] or (not done + wrong and lines[0].startswith(WIDE)):
                    how = "is UTF-16, as it seems: convert it first (iconv -f utf-16 -t utf-8)"
                raise ValueError(f"standard input, line {done + wrong + 1:,}, {how}")
            done += len(lines)


def new_file(flag: str, name: str, ours: Callable[[Path], bool] = lambda path: False) -> Path:
    """The path of a file that is to be written. Raises ValueError if it cannot be written, or if it
    exists and ours(path) does not say that the same command wrote it: it may be somebody's work, or
    a pipe that nobody reads."""
    path = Path(name)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--{flag} {path} is a folder, or lies in none: name a file to write")
    if os.path.lexists(path) and not (path.is_file() and ours(path)):
        raise ValueError(f"--{flag} {path} is there already: name another file, or delete it")
    return path

"""A conversation in the terminal, with any network that continues texts: `sample.py --chat`.

Each line of standard input is a message; the answer is shown while it is written. For every answer
the whole conversation is put into tokens (data/chat.py), but only those behind what the network has
read already are read: the key-value caches stay from turn to turn. Where a model writes a text with
other tokens than the tokenizer would, the caches are cut back to the last token that is the same,
so that the model always sees the conversation as if it were read anew.

Ctrl-C ends an answer, which is kept as far as it goes. A conversation that fills the context is
never shortened: its end is said, and /new begins another one.

Left out: messages of more than one line, editing what was said, saving a conversation.
"""

import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, repeat, takewhile
from operator import eq

import torch
import torch.nn as nn

from bpe import Tokenizer
from data.chat import TEMPLATES, Message, choose_template, render, with_system
from data.lines import NO_TEXT
from data.text import CONVERT
from decoding import check_chosen
from tasks.text import Pick, SampleFlags, TextStream

NEW = "/new"


class Conversation:
    """Messages, and what the network has read of them.

    template is a name of data/chat.py, system the message with which every conversation begins, ""
    for none. The network has features, head and make_caches, as GPT has them.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        flags: SampleFlags,
        template: str,
        system: str = "",
    ):
        self.model, self.tokenizer, self.flags = model, tokenizer, flags
        self.template, self.system = template, system
        endless = getattr(model, "endless", False)
        self.limit = sys.maxsize if endless else model.config.block_size
        self.begin()

    def begin(self) -> None:
        """Forgets everything. The same messages will get the same answers."""
        self.messages: list[Message] = []
        self.caches: list | None = None
        self.read: list[int] = []  # the tokens that the caches hold
        self.pick = Pick(self.tokenizer, self.flags, [b""])

    def answer(
        self,
        message: str,
        write: Callable[[str], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> str:
        """Answers a message; write(text) gets each part as soon as it is there. Returns why the
        answer ended before its end, "" if it did not: "stopped" when stopped() became true,
        "length" after max_new_tokens, "full" where the context is full, and "unread" where the
        message leaves no place for an answer: then it is not kept."""
        asked = [*self.messages, {"role": "user", "content": message}]
        ids, _ = render(self.template, self.tokenizer, with_system(asked, self.system), True)
        if len(ids) >= self.limit:
            return "unread"
        stream, why = TextStream(self.tokenizer, self.flags.stop), ""
        spaced = lead = TEMPLATES[self.template].answer.startswith(" ")
        self.go_back(ids)

        def show(text: str) -> None:
            nonlocal lead
            if lead and text:  # the space belongs to the template
                text, lead = text.removeprefix(" "), False
            if text:
                write(text)

        for count in range(self.flags.max_new_tokens):
            token = self.next_token(ids)
            show(stream.feed(token))
            if stream.done:
                break
            ids.append(token)
            if stopped():
                why = "stopped"
            elif len(ids) > self.limit - 1:
                why = "full"
            elif count + 1 == self.flags.max_new_tokens:
                why = "length"
            if why:
                break
        show(stream.finish())
        text = stream.text.removeprefix(" " * spaced)
        self.messages = [*asked, {"role": "assistant", "content": text}]
        return why

    def go_back(self, ids: list[int]) -> None:
        """Leaves in the caches only what these tokens begin with."""
        # At least one token is read, because the features of those in the caches are not kept.
        same = sum(1 for _ in takewhile(bool, map(eq, self.read, ids[:-1])))
        if self.caches and same < len(self.read):
            if all(hasattr(cache, "length") for cache in self.caches):
                for cache in self.caches:
                    cache.length = same
            else:  # a state that cannot go back
                self.caches = None
        if self.caches is None:
            self.caches, same = self.model.make_caches(), 0
        del self.read[same:]

    @torch.no_grad()
    def next_token(self, ids: list[int]) -> int:
        """The token that the network puts behind these, of which it reads those that are new."""
        new = ids[len(self.read) :]
        device = next(chain(self.model.parameters(), self.model.buffers())).device
        features = self.model.features(torch.tensor([new], device=device), caches=self.caches)
        self.read += new
        picked = self.pick(self.model.head(features[:, -1]).float(), [0])
        check_chosen(picked.tolist())
        return int(picked[0])


# ---- the terminal --------------------------------------------------------------------------------


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """A context in which one Ctrl-C ends nothing, but makes the function true that it gives; the
    second ends the program, as always."""
    pressed = False

    def press(number, frame) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def typed() -> Iterator[str]:
    """The lines of standard input: with a prompt where somebody types them. Raises ValueError for a
    line that is not UTF-8."""
    if sys.stdin.isatty():
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  (input() edits lines with it)
        with suppress(EOFError):
            while True:
                yield input("> ")
        return
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")
    for number, line in enumerate(sys.stdin, 1):
        if NO_TEXT.search(line):
            raise ValueError(f"standard input, line {number:,}, is not UTF-8: {CONVERT}")
        yield line.rstrip("\r\n")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def talk(model: nn.Module, tokenizer: Tokenizer, flags: SampleFlags, checkpoint: dict) -> None:
    """Answers the messages of --prompt, then those of standard input, until it ends. Raises
    ValueError for a model that cannot write, and for a template that does not fit it."""
    if not all(hasattr(model, name) for name in ("features", "head", "make_caches")):
        raise ValueError(
            f"the {checkpoint['task']} of this checkpoint cannot talk: leave --chat out"
        )
    trained = checkpoint["train_config"]
    template = choose_template(tokenizer, flags.template or trained.get("template", ""))
    system = "\n".join(flags.system) if flags.system else trained.get("system", "")
    conversation = Conversation(model, tokenizer, flags, template, system)
    limit = f"{conversation.limit:,}"
    say(f"template: {template}; system: {system or 'none'}; context: {limit} tokens")
    say(f"Ctrl-C ends an answer, {NEW} begins a new conversation, Ctrl-D ends the program")
    notes = {
        "stopped": "[stopped]",
        "length": f"[--max_new_tokens {flags.max_new_tokens} are written]",
        "full": f"[the conversation fills the model's context of {limit} tokens: {NEW} begins a "
        "new one]",
        "unread": f"[not read: with this message the conversation would have {limit} tokens or "
        f"more, the model's context; {NEW} begins a new one]",
    }
    seen = sys.stdin.isatty()  # what is typed is on the screen already
    given = chain(zip(flags.prompt, repeat(False)), zip(typed(), repeat(seen)))
    with suppress(KeyboardInterrupt):  # where a message is awaited
        for message, shown in given:
            if message.strip() == NEW:
                conversation.begin()
                say("[a new conversation]")
            elif message.strip():
                if not shown:
                    say(f"> {message}")
                with interruptible() as stopped:
                    why = conversation.answer(message, write, stopped)
                if why != "unread":
                    print(flush=True)
                if why:
                    say(notes[why])


def write(text: str) -> None:
    print(text, end="", flush=True)

"""Conversations as models read them: the templates of published families, written out.

A conversation is a list of {"role": …, "content": …}: perhaps a message of the system, then user
and assistant in turns. `pieces` puts it into the words of a template, `render` into tokens.

    chatml      <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    llama3      <|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\nHi<|eot_id|>…
    llama2      <s>[INST] Hi [/INST] Hello </s>
    mistral     <s>[INST] Hi[/INST] Hello</s>, where [INST] and [/INST] are tokens
    mistral-v1  <s>[INST] Hi [/INST] Hello</s>, where they are text
    plain       <|endoftext|>User: Hi\\n\\nAssistant: Hello<|endoftext|>, for any tokenizer

What people write is text: the name of a special token in it never becomes that token's id. Text
between two special tokens is encoded at once, as the models read it in training; but an answer is
never joined to what stands before it, which sampling has read when the answer begins.

Left out: tools, images, Llama 3.1's lines with dates, the thoughts that Qwen3 removes from earlier
answers, Mistral's way to move a system message to the newest question. There is no template engine:
of a published template only its family and its default system message are read.
"""

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from data.tokens import AnyTokenizer, ending, opening

ROLES = ("system", "user", "assistant")
OPENING, ENDING = "<opening>", "<ending>"  # those of the tokenizer, whatever they are called
NAMELESS = {OPENING: OPENING, ENDING: ENDING}

Message = dict[str, str]


class Template(NamedTuple):
    """The pieces of each part. A piece with {} has the message in its place; one that is listed in
    `special`, or is OPENING or ENDING, is a token; all others are text."""

    special: tuple[str, ...]
    begin: tuple[str, ...]  # what stands before the conversation
    system: tuple[str, ...]  # a single piece stands inside of the question behind it
    user: tuple[str, ...]
    ask: tuple[str, ...]  # what stands before an answer
    answer: str
    end: str  # the token that ends an answer, which the model writes
    behind: tuple[str, ...]  # what stands behind that token
    strips: bool  # white space around messages is removed


CHATML = ("<|im_start|>", "<|im_end|>")
HEADER = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
INST = ("[INST]", "[/INST]")
TEMPLATES = {
    "chatml": Template(
        special=CHATML,
        begin=(),
        system=("<|im_start|>", "system\n{}", "<|im_end|>", "\n"),
        user=("<|im_start|>", "user\n{}", "<|im_end|>", "\n"),
        ask=("<|im_start|>", "assistant\n"),
        answer="{}",
        end="<|im_end|>",
        behind=("\n",),
        strips=False,
    ),
    "llama3": Template(
        special=HEADER,
        begin=(OPENING,),
        system=(HEADER[0], "system", HEADER[1], "\n\n{}", HEADER[2]),
        user=(HEADER[0], "user", HEADER[1], "\n\n{}", HEADER[2]),
        ask=(HEADER[0], "assistant", HEADER[1], "\n\n"),
        answer="{}",
        end=HEADER[2],
        behind=(),
        strips=True,
    ),
    "llama2": Template(
        special=(),
        begin=(),
        system=("<<SYS>>\n{}\n<</SYS>>\n\n",),
        user=(OPENING, "[INST] {} [/INST]"),
        ask=(),
        answer=" {} ",
        end=ENDING,
        behind=(),
        strips=True,
    ),
    "mistral": Template(
        special=INST,
        begin=(OPENING,),
        system=("{}\n\n",),
        user=(INST[0], " {}", INST[1]),
        ask=(),
        answer=" {}",
        end=ENDING,
        behind=(),
        strips=True,
    ),
    "mistral-v1": Template(
        special=(),
        begin=(OPENING,),
        system=("{}\n\n",),
        user=("[INST] {} [/INST]",),
        ask=(),
        answer=" {}",
        end=ENDING,
        behind=(),
        strips=True,
    ),
    "plain": Template(
        special=(),
        begin=(OPENING,),
        system=("{}", "\n\n"),
        user=("User: {}\n\n",),
        ask=("Assistant:",),
        answer=" {}",
        end=ENDING,
        behind=("\n\n",),
        strips=True,
    ),
}


def choose_template(tokenizer: AnyTokenizer, name: str = "") -> str:
    """The name, or where it is "", that of the template whose tokens the tokenizer has. Raises
    ValueError for a template whose tokens it lacks."""
    there = tokenizer.special_tokens
    if name:
        if name not in TEMPLATES:
            known = ", ".join(TEMPLATES)
            raise ValueError(f"the template {name[:80]} is not known: choose --template {known}")
        if missing := [token for token in TEMPLATES[name].special if token not in there]:
            raise ValueError(
                f"--template {name} needs the token {missing[0]}, which this tokenizer lacks: "
                f"leave it out for {choose_template(tokenizer)}"
            )
        return name
    for name in ("chatml", "llama3", "mistral"):
        if all(token in there for token in TEMPLATES[name].special):
            return name
    return "llama2" if "<s>" in there and hasattr(tokenizer, "adds_bos") else "plain"


# ---- messages ------------------------------------------------------------------------------------


def parse_messages(text: str) -> list[Message]:
    """The conversation in a JSON text, checked. Raises ValueError, as check_messages does."""
    try:
        messages = json.loads(text, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        raise ValueError("its messages are no JSON") from None
    check_messages(messages)
    return messages


def check_messages(messages: object) -> None:
    """Raises ValueError unless these are the messages of a conversation, in turns."""
    if not isinstance(messages, list) or not messages:
        raise ValueError('its messages are no list with a {"role": "user", "content": …} in it')
    turns = 0
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f"its message {number} is no object with a role and a content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(
                f"its message {number} has the role {str(role)[:20]!r}: choose {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            raise ValueError(f"its message {number} has no content that is text")
        if role == "system":
            if number > 1:
                raise ValueError(f"its message {number} is of the system, which only begins")
            continue
        if role != ROLES[1 + turns % 2]:
            raise ValueError(
                f"its message {number} is of the {role}, where user and assistant take turns"
            )
        turns += 1


def with_system(messages: list[Message], text: str) -> list[Message]:
    """The messages behind a system's of this text, unless it is "" or they have one already."""
    if not text or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": text}, *messages]


# ---- messages -> pieces -> tokens ----------------------------------------------------------------


class Piece(NamedTuple):
    text: str
    token: bool  # whether it is a special token, by its name
    own: bool  # whether the assistant says it


def pieces(
    template: Template,
    tokenizer: AnyTokenizer | None,
    messages: list[Message],
    answers: bool = False,
) -> Iterator[Piece]:
    """The parts of a conversation, in order; with `answers`, behind them what stands before the
    next answer. tokenizer None: there is none yet. Raises ValueError for messages that are none,
    and where there is nothing to answer."""
    check_messages(messages)
    if answers and messages[-1]["role"] != "user":
        raise ValueError("there is nothing to answer: end the messages with one of the user")
    names = {OPENING: opening(tokenizer), ENDING: ending(tokenizer)} if tokenizer else NAMELESS
    tokens = {*names, *template.special}

    def filled(parts: tuple[str, ...], content: str = "") -> Iterator[Piece]:
        for part in parts:
            if part in tokens:
                yield Piece(names.get(part, part), True, False)
            else:
                yield Piece(part.replace("{}", content), False, False)

    yield from filled(template.begin)
    before = ""  # of the system, where it is part of a question
    for message in messages:
        role, content = message["role"], message["content"]
        if template.strips:
            content = content.strip()
        if role == "assistant":
            yield from filled(template.ask)
            yield Piece(template.answer.replace("{}", content), False, True)
            yield Piece(names.get(template.end, template.end), True, True)
            yield from filled(template.behind)
        elif role == "user":
            content, before = before + content, ""
            yield from filled(template.user, content)
        elif len(template.system) == 1:
            before = template.system[0].replace("{}", content)
        else:
            yield from filled(template.system, content)
    if answers:
        yield from filled(template.ask)


def render(
    name: str, tokenizer: AnyTokenizer, messages: list[Message], answers: bool = False
) -> tuple[list[int], list[bool]]:
    """(tokens, for each whether the assistant says it: its words, and the token that ends them).

    name is that of a template, messages and `answers` are as for `pieces`.
    """
    # Every text here stands behind a special token, where some tokenizers put no space in front.
    encode = getattr(tokenizer, "encode_behind", tokenizer.encode)
    ids: list[int] = []
    own: list[bool] = []
    before, begun = "", 0  # the text since the last special token, and how many ids were before it

    def add(new: list[int], whose: bool) -> None:
        ids.extend(new)
        own.extend([whose] * len(new))

    for text, token, whose in pieces(TEMPLATES[name], tokenizer, messages, answers):
        if token:
            add([tokenizer.special_tokens[text]], whose)
            before, begun = "", len(ids)
        elif whose:
            read, whole = ids[begun:], encode(before + text)
            # Where the border is one between tokens, what a text is encoded to as a whole is right.
            add(whole[len(read) :] if whole[: len(read)] == read else encode(text), True)
        else:
            before += text
            del ids[begun:], own[begun:]
            add(encode(before), False)
    return ids, own


def texts_of(messages: list[Message]) -> tuple[str, ...]:
    """The texts between the special tokens of the plain template, for a tokenizer to learn from."""
    parts, plain = [""], TEMPLATES["plain"]
    for text, token, _ in pieces(plain, None, messages):
        if token:
            parts.append("")
        else:
            parts[-1] += text
    return tuple(filter(None, parts))


# ---- what a published template says --------------------------------------------------------------

MARKS = (  # what only the templates of one family have in them
    ("chatml", "<|im_start|>"),
    ("llama3", "<|start_header_id|>"),
    ("llama2", "<<SYS>>"),
    ("mistral", "[INST]"),
    ("plain", '"User: " ~ content'),  # as engine/hub/jinja.py writes it
)
# A literal: up to the quote that ends it, without the marks of an expression.
LITERAL = r"((?:(?!<\||\{\{|\{%)(?:\\.|[^'\"\\]|(?<=\w)'(?=\w)))+)"
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # it is shown in a terminal
DEFAULTS = (
    rf"<\|im_start\|>system(?:\n|\\n){LITERAL}<\|im_end\|>",
    rf"set (?:default_)?system_message = ['\"]{LITERAL}['\"]",
)


def read_template(text: str, tokenizer: AnyTokenizer) -> tuple[str, str]:
    """(name, default system message) of a published template, in Jinja's language; "" for what is
    not found in it."""
    name = next((name for name, mark in MARKS if mark in text), "")
    there = tokenizer.special_tokens
    if name == "mistral" and INST[0] not in there:
        name = "mistral-v1"
    if not name or any(token not in there for token in TEMPLATES[name].special):
        return "", ""
    found = next(filter(None, (re.search(pattern, text) for pattern in DEFAULTS)), None)
    default = found[1] if found else ""
    default = re.sub(r"\\(.)", lambda found: "\n" if found[1] == "n" else found[1], default)
    return name, CONTROL.sub("", default).strip()

"""The tokens that transformers looks for in a text before it splits the rest.

tokenizer.json lists them under "added_tokens"; tokenizer_config.json may have them, with their ids,
under "added_tokens_decoder", and names some as bos_token, pad_token, … Without an
"added_tokens_decoder", two older files count as well: special_tokens_map.json, which overrides the
names, and added_tokens.json. A token that is not in the vocabulary gets the next free id, whatever
id these files give it; and one that is only in the vocabulary is not looked for.
"""

from itertools import permutations
from reprlib import repr as short
from typing import Any, NamedTuple

from data.tokens import AnyTokenizer
from wordpiece import WordPiece

SETTINGS, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
EXTRA = {"additional_special_tokens", "extra_special_tokens"}
BY_CLASS = "the tokenizer's class"


class Declared(NamedTuple):
    where: str  # the file and the field
    id: int | None  # None: it is named without an id
    normalized: bool  # looked for in the normalized text, after the tokens that are not


def declared_tokens(
    settings: dict, special_map: dict, added: dict, listed: list, defaults: dict[str, str]
) -> dict[str, Declared]:
    """{token: where it is declared}, in the order in which new ones get their ids.

    The first three are the contents of SETTINGS, MAP and ADDED ({} where a file is missing, or does
    not count), `listed` is what tokenizer.json has as added_tokens, `defaults` what the tokenizer's
    class calls bos_token, … if nothing else does. Raises ValueError for a token that we would find
    in other places, and where two files contradict each other.
    """
    found: dict[str, Declared] = {}

    def declare(where: str, token: Any, i: int | None = None) -> None:
        about = token if isinstance(token, dict) else {"content": token}
        name = about.get("content")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where}: the added token {short(token)} has no text")
        if any(about.get(field) for field in ("single_word", "lstrip", "rstrip")):
            raise ValueError(f"{where}: {name!r} takes its surroundings: not supported")
        before = found.setdefault(name, Declared(where, i, bool(about.get("normalized"))))
        if i is not None and before.id not in (None, i):
            raise ValueError(f"{where}: {name!r} has the ids {before.id} ({before.where}) and {i}")

    named = _named(defaults, BY_CLASS) | _named(settings, SETTINGS) | _named(special_map, MAP)
    extra, more = _extra(settings, SETTINGS), _extra(special_map, MAP)
    if more and EXTRA & settings.keys() and [t for _, t in extra] != [t for _, t in more]:
        raise ValueError(f"{more[0][0]} differs from {SETTINGS}: leave one of them out")
    extra = extra or more
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError(f"{SETTINGS}: added_tokens_decoder={short(decoder)} is not supported")
    rows = [("tokenizer.json: added_tokens", token, _get(token, "id")) for token in listed]
    rows += [(f"{SETTINGS}: added_tokens_decoder", token, _id(i)) for i, token in decoder.items()]
    # Those that nothing but added_tokens.json mentions are looked for in the normalized text.
    specials = {_get(token, "content") for _, token in _named(special_map, MAP).values()}
    specials |= {t for _, t in [*_named(settings, SETTINGS).values(), *extra] if isinstance(t, str)}
    rows += [
        (ADDED, {"content": name, "normalized": name not in specials}, _id(i))
        for name, i in added.items()
    ]
    for where, token, i in rows:
        if type(i) is not int or i < 0:
            raise ValueError(f"{where}: the id {short(i)} of {short(token)} is no id")
    for where, token, i in sorted(rows, key=lambda row: row[2]):
        declare(where, token, i)
    for key in NAMES:
        if key in named:
            declare(*named[key])
    for where, token in extra:
        declare(where, token)
    for key, (where, token) in named.items():
        if _get(token, "content") not in found:
            raise ValueError(f"{where}: {key} is none of {', '.join(NAMES)}: not supported")
        declare(where, token)
    return found


def _get(token: Any, field: str) -> Any:
    if isinstance(token, dict):
        return token.get(field)
    return token if field == "content" else None


def _id(i: Any) -> Any:
    return int(i) if isinstance(i, str) and i.isdecimal() else i


def _named(settings: dict, file: str) -> dict[str, tuple[str, Any]]:
    """{setting: (where, token)} of every setting that names a token: "bos_token" and its like."""
    named = {k: t for k, t in settings.items() if k.endswith("_token")}
    return {k: (f"{file}: {k}", t) for k, t in named.items() if isinstance(t, str | dict)}


def _extra(settings: dict, file: str) -> list[tuple[str, Any]]:
    """[(where, token), …] of the special tokens without a setting of their own."""
    for key in sorted(EXTRA, reverse=True):  # the older one counts if the other is empty
        if tokens := settings.get(key):
            if not isinstance(tokens, list | dict):
                raise ValueError(f"{file}: {key}={short(tokens)} is no list of tokens")
            tokens = tokens.values() if isinstance(tokens, dict) else tokens
            return [(f"{file}: {key}", token) for token in tokens]
    return []


def new_tokens(tokenizer: AnyTokenizer, declared: dict[str, Declared]) -> dict[str, int]:
    """{token: id} of the declared tokens that are not special tokens of the tokenizer yet. Raises
    ValueError where transformers would find other tokens in a text than the tokenizer does."""
    known, new = tokenizer.special_tokens, {}
    for name in known:
        if name not in declared:
            raise ValueError(
                f"{name!r} is in the vocabulary, but no file declares it as a special token, so "
                f"transformers splits it like other text: name it in {SETTINGS}, for example under "
                "additional_special_tokens"
            )
    if isinstance(tokenizer, WordPiece):
        ordinary, n_tokens = tokenizer.ids, len(tokenizer.ids)
    else:
        ordinary = {token.decode("latin-1"): i for token, i in tokenizer.ranks.items()}
        n_tokens = len(tokenizer.ranks) + len(known)
    for name, (where, i, normalized) in declared.items():
        if isinstance(tokenizer, WordPiece) and (name not in known or normalized):
            reason = "looked for in the normalized text"
            if name not in known:
                reason = f"none of {', '.join(known)}"
            raise ValueError(f"{where}: the added token {name!r} is {reason}: not supported")
        if name in known:
            expected = known[name]
        elif name.encode("utf-8").decode("latin-1") in ordinary:
            raise ValueError(f"{where}: {name!r} is an ordinary token too: not supported")
        elif tokenizer.vocab_size + len(new) != n_tokens + len(new):
            raise ValueError(f"{where}: {name!r} would be a new token, but the ids have gaps")
        else:
            expected = new[name] = n_tokens + len(new)
        if i not in (None, expected):
            raise ValueError(f"{where}: {name!r} has the id {i}, but transformers gives {expected}")
    if len({token.normalized for token in declared.values()}) > 1:
        for a, b in permutations(declared, 2):
            if a in b or any(a.endswith(b[:n]) for n in range(1, len(b))):
                raise ValueError(
                    f"the tokens {a!r} and {b!r} overlap, and only some are looked for in the "
                    'normalized text: give all the same "normalized"'
                )
    return new

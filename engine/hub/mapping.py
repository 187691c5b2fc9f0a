"""Our models as Hugging Face writes them, and back, by the tables of `families.py`.

Both directions read the same rows, so what is exported can be imported again. The error for a wrong
setting names it; missing, surplus and misshapen tensors are listed in one error, before any tensor
is read.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tasks
from data.conll import split_tag
from engine.hub.families import (
    BASES,
    FAMILIES,
    KINDS,
    RELATIVES,
    ROTARY,
    Family,
    Get,
    family_of,
    stream_order,
)

# The largest sizes that are accepted: beyond all published models of these families.
LIMITS = {
    "vocab_size": 2**24,
    "block_size": 2**20,
    "n_layer": 1000,
    "n_head": 1000,
    "n_kv_head": 1000,
    "head_dim": 2**16,
    "window": 2**30,
    "n_embd": 2**16,
    "n_ff": 2**18,
    "n_expert": 2**12,
    "n_active": 2**12,
}


# ---- settings ------------------------------------------------------------------------------------


def our_config(settings: dict) -> tuple[str, Any]:
    """The content of config.json -> (task, our config). Raises ValueError, with the setting's name,
    for a setting that we do not compute with or a size that cannot be. Only `to_ours` can find out
    BERT's nsp and Marian's output_bias.
    """
    model_type = settings.get("model_type") or model_type_of(settings)
    task = BASES.get(str(model_type))
    if task is None:
        raise ValueError(f"model_type={model_type!r} is not known: only {', '.join(BASES)} are")
    if task == "bert":  # or one of its fine-tuned classes
        heads = {(FAMILIES[name].architecture,): name for name in ("classify", "tag", "answer")}
        task = heads.get(tuple(settings.get("architectures") or ()), task)
    family = RELATIVES.get(str(model_type), FAMILIES[task])
    found, source = dict(family.own), {}
    if task in ROTARY:
        settings = with_rotation(settings)
    for name, (default, allowed) in family.fixed.items():
        if settings.get(name, default) not in allowed:
            raise ValueError(
                f"{name}={settings.get(name, default)!r} is not supported: "
                f"our {family.title} has {' or '.join(map(repr, allowed))}"
            )
    for name, (ours, default) in family.settings.items():
        value = settings.get(name, default)
        if value is None:
            continue
        if ours in LIMITS:
            fits = type(value) is int and 1 <= value <= LIMITS[ours]
            wanted = f"an integer from 1 to {LIMITS[ours]:,}"
        elif ours == "activation":
            from seq2seq import ACTIVATIONS

            value = "silu" if value == "swish" else value  # its older name
            fits, wanted = value in tuple(ACTIVATIONS), f"swish, {', '.join(ACTIVATIONS)}"
        elif ours == "tied":
            fits, wanted = type(value) is bool, "true or false"
        elif ours.startswith("rope_"):
            fits = type(value) in (int, float) and 1 <= value < math.inf
            wanted = "a number, 1 or more"
        elif ours == "balance":
            fits = type(value) in (int, float) and 0 <= value < math.inf
            wanted = "a number, 0 or more"
        else:
            fits = type(value) in (int, float) and (value > 0 or ours != "ln_eps") and value < 1
            wanted = "a number below 1" + (" and above 0" if ours == "ln_eps" else "")
        if not fits:
            raise ValueError(f"{name}={value!r} cannot be: it must be {wanted}")
        if found.setdefault(ours, value) != value:
            raise ValueError(
                f"{name}={value} differs from {source[ours]}={found[ours]}: not supported, "
                "they are one setting here"
            )
        source.setdefault(ours, name)
    if task in ("classify", "tag"):
        found["labels"] = their_labels(settings)
    if task == "classify" and len(found["labels"]) < 2:
        raise ValueError("a single label is a regression, which is not supported")
    if task == "tag":
        for label in found["labels"]:
            split_tag(label)  # ValueError unless it is O, B-TYPE, I-TYPE, …
    for name, task_of in (("pairs", "classify"), ("may_abstain", "answer")):
        if task == task_of and type(settings.get(name, False)) is bool:
            found[name] = settings.get(name, False)
    if task in ROTARY:
        kinds = settings.get("layer_types") or []
        wanted = "sliding_attention" if found.get("window") else "full_attention"
        if not isinstance(kinds, list) or any(kind != wanted for kind in kinds):
            raise ValueError(f"layer_types={str(kinds)[:80]} is not supported: all are {wanted}")
    config = tasks.network(task).Config(**found)
    refuse_single_expert(config)
    return task, config


def refuse_single_expert(config: Any) -> None:
    """Raises ValueError for a Mixtral whose tokens go through one expert: its gate is 1 there."""
    if getattr(config, "n_active", 2) == 1:
        raise ValueError(
            "num_experts_per_tok=1 (here n_active) is not supported: a lone expert has the gate 1 "
            "in Mixtral, and its probability here"
        )


STRETCH = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def with_rotation(settings: dict) -> dict:
    """The settings, with those of rotary positions taken out of the dict that they are in:
    rope_parameters since version 5 of transformers, rope_scaling, beside rope_theta, before."""
    name = "rope_parameters" if settings.get("rope_parameters") else "rope_scaling"
    inner = settings.get(name) or {}
    if not isinstance(inner, dict):
        raise ValueError(f"{name}={str(inner)[:80]} is no dict")
    inner = {"rope_type": inner.get("type", "default"), **inner}
    known = {*STRETCH, "rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if strange := inner.keys() - known:
        raise ValueError(f"{name} has {', '.join(sorted(strange))}: not supported")
    if inner["rope_type"] == "default":
        inner = {k: v for k, v in inner.items() if k not in STRETCH}
    elif inner["rope_type"] == "llama3" and not {STRETCH[0], STRETCH[3]} <= inner.keys():
        raise ValueError(f"{name}={str(inner)[:80]} lacks its {STRETCH[0]} or {STRETCH[3]}")
    return {k: v for k, v in settings.items() if k not in STRETCH} | inner


def with_nested_rotation(settings: dict) -> dict:
    """The way back, as transformers writes it up to version 4, and reads it since."""
    inner = {"rope_type": "llama3"} | {name: settings[name] for name in STRETCH}
    others = {k: v for k, v in settings.items() if k not in inner}
    return {**others, "rope_scaling": None if settings["factor"] == 1 else inner}


# Settings by which files from before model_type are known, BERT's own of 2018 and GPT-2's of 2019.
KNOWN_BY = {
    "bert": {"hidden_size", "num_hidden_layers", "intermediate_size", "type_vocab_size"},
    "gpt2": {"n_embd", "n_layer", "n_head"},
}


def model_type_of(settings: dict) -> str:
    """The model_type of a config.json that does not say it, by its architecture or its settings:
    tensors of another family would be refused by their names. ValueError if it cannot be told."""
    named = settings.get("architectures")
    for model_type in BASES:
        if isinstance(named, list) and named and str(named[0]).lower().startswith(model_type):
            return model_type
        if not named and settings.keys() >= KNOWN_BY.get(model_type, {""}):
            return model_type
    raise ValueError(
        "there is no model_type: add it, for example "
        + " or ".join(f'"model_type": "{name}"' for name in BASES)
    )


def their_labels(settings: dict) -> tuple[str, ...]:
    """The labels of id2label, for example {"0": "no", "1": "yes"}; without it there are two. Raises
    ValueError if it does not name the labels 0, 1, 2, …, or names two of them alike."""
    names = settings.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    keys = [str(i) for i in range(len(names))] if isinstance(names, dict) else []
    found = [names.get(key) for key in keys]  # programs that sort texts write 0, 1, 10, 2
    if not found or not all(isinstance(name, str) for name in found):
        raise ValueError(f"id2label={str(names)[:80]} does not name the labels 0, 1, 2, …")
    if len(set(found)) < len(found):
        raise ValueError(f"id2label={str(names)[:80]} has a name twice")
    return tuple(found)


def their_settings(task: str, config: Any) -> dict:
    """Our config -> the content of config.json, without the ids of tokens. Raises ValueError for a
    model that Hugging Face's class cannot be."""
    family = family_of(task, config)
    refuse_single_expert(config)
    known = {*(ours for ours, _ in family.settings.values()), *family.own, *family.others}
    if strange := [
        f"{name}={value!r}" for name, value in vars(config).items() if name not in known
    ]:
        raise ValueError(
            f"Hugging Face has no {family.title} with {', '.join(strange)}: only what "
            "engine/hub/families.py has in its tables can be exported"
        )
    if any(getattr(config, name) != value for name, value in family.own.items()):
        ours = " and ".join(f"{name}={getattr(config, name)}" for name in family.own)
        raise ValueError(f"Hugging Face has no {family.title} with {ours}")
    settings = {name: getattr(config, ours) for name, (ours, _) in family.settings.items()}
    settings |= {name: allowed[0] for name, (_, allowed) in family.fixed.items()}
    if hasattr(config, "labels"):
        settings["id2label"] = {str(i): label for i, label in enumerate(config.labels)}
        settings["label2id"] = {label: i for i, label in enumerate(config.labels)}
    if task in ROTARY:
        settings = with_nested_rotation(settings)
        if settings.get("sliding_window") == 0:
            settings["sliding_window"] = None
    # Their classes ignore these settings of ours but keep them, so they can be imported again.
    settings |= {
        name: vars(config)[name] for name in ("pairs", "may_abstain") if name in vars(config)
    }
    alone = task == "bert" and not config.nsp
    architecture = "BertForMaskedLM" if alone else family.architecture
    return {"model_type": family.model_type, "architectures": [architecture], **settings}


# ---- tensors -------------------------------------------------------------------------------------


class TensorRow(NamedTuple):
    """One tensor of theirs, and our tensors that it consists of, joined along the outputs."""

    theirs: str
    ours: tuple[str, ...]
    how: str  # "", transposed, row, rows or columns


def layer_names(name: str, config: Any) -> list[str]:
    """A name of a table for each layer, and each expert of it; a name without {} stays one."""
    if "{expert}" in name:
        names = [name.replace("{expert}", str(e)) for e in range(config.n_expert)]
        return [there for each in names for there in layer_names(each, config)]
    return [name.replace("{}", str(i)) for i in range(config.n_layer)] if "{}" in name else [name]


def rows(task: str, config: Any) -> list[TensorRow]:
    """The table of a model of these sizes, one row for each tensor."""
    found = []
    for theirs, ours, kind in family_of(task, config).modules:
        if task in ROTARY and config.tied and ours == "lm_head":
            continue
        if task == "bert" and not config.nsp and ours in ("pooler", "nsp_head"):
            continue
        if task == "seq2seq" and not config.output_bias and ours == "output_bias":
            continue
        pairs = zip(*(layer_names(x, config) for x in (theirs, ours)), strict=True)
        for there, here in pairs:
            for part, how in KINDS[kind].items():
                end = f".{part}" if part else ""
                found.append(TensorRow(there + end, tuple(x + end for x in here.split()), how))
    return found


def canonical(family: Family, names: Collection[str]) -> dict[str, str]:
    """{name in the table: name in the file}. Encoders without heads leave the prefix out, and the
    oldest files of BERT call the weight of a norm gamma and its bias beta. Raises ValueError if two
    names mean the same tensor."""
    prefix = "" if any(name.startswith(family.prefix) for name in names) else family.prefix
    found, twice = {}, []
    for name in names:
        full = name if name.startswith(family.heads) else prefix + name
        full = full.replace("LayerNorm.gamma", "LayerNorm.weight")
        full = full.replace("LayerNorm.beta", "LayerNorm.bias")
        if full in found:
            twice.append(f"{name} is {found[full]} again")
        found[full] = name
    refuse(family, {"double": twice})
    return found


# What wraps a model, and the prefix that its tensors then have.
WRAPPERS = {"_orig_mod": "torch.compile", "module": "DistributedDataParallel"}


def refuse_wrapped(family: Family, names: Collection[str], wanted: Collection[str]) -> None:
    """Raises ValueError if most of the wanted tensors are there, but behind a prefix."""
    prefixes: Counter[str] = Counter()
    for name in names:
        for dot in re.finditer(r"\.", name):
            prefix, rest = name[: dot.end()], name[dot.end() :]
            prefixes[prefix] += rest in wanted or family.prefix + rest in wanted
    del prefixes[family.prefix]
    prefix, n = next(iter(prefixes.most_common(1)), ("", 0))
    if 2 * n > len(wanted):
        example = next(name for name in names if name.startswith(prefix))
        by = WRAPPERS.get(prefix.split(".")[0])
        raise ValueError(
            f"the tensors of {family.title} begin with {prefix!r} here ({example})"
            + (f", which {by} adds" if by else "")
            + ": save the model that is inside, or take this from the names"
        )


def refuse(family: Family, wrong: dict[str, list[str]]) -> None:
    """Raises ValueError if `wrong`, {kind: names}, has a name. It lists at most 20 of a kind."""
    parts = []
    for kind, names in wrong.items():
        rest = f" and {len(names) - 20:,} more" if len(names) > 20 else ""
        if names:
            parts.append(f"{kind}: {', '.join(names[:20])}{rest}")
    if parts:
        raise ValueError(f"the tensors are not those of {family.title}; {'; '.join(parts)}")


def to_ours(
    task: str, config: Any, shapes: Mapping[str, tuple[int, ...]], get: Get
) -> tuple[Any, dict[str, Tensor], list[str]]:
    """Their tensors -> (our config, our state, names of ours that the file does not have).

    `shapes` has all tensors of the file, `get` reads one by its name there. Only BERT may lack
    some: without the pooler and its head it has nsp=False, and the names of a missing head are
    returned. Marian has an output bias if that of the file is not zero. Raises ValueError, which
    lists every missing, surplus or misshapen tensor, before any tensor but that bias is read; or
    else, which lists all derived tensors that do not have the values that they should have.
    """
    family = family_of(task, config)
    names = canonical(family, shapes)
    absent: set[str] = set()
    if task == "bert":
        nsp = any(name.startswith(("bert.pooler.", "cls.seq_relationship.")) for name in names)
        config = replace(config, nsp=nsp)
        for head in ("cls.predictions.", "cls.seq_relationship."):
            own = [row.theirs for row in rows(task, config) if row.theirs.startswith(head)]
            absent.update(own if not names.keys() & set(own) else [])
    if task == "seq2seq":
        bias = names.get("final_logits_bias")
        one_row = bias is not None and tuple(shapes[bias]) == (1, config.vocab_size)
        config = replace(config, output_bias=one_row and bool(get(bias).any()))
    with torch.device("meta"):
        state = tasks.network(task)(config).state_dict()
    table = rows(task, config)
    wanted = their_shapes(table, state)
    derived = {
        name: law
        for key, law in family.derived.items()
        for name in layer_names(key, config)
        if name not in wanted
    }
    shape_of = {name: tuple(shapes[there]) for name, there in names.items()}
    missing = [n for n in wanted if n not in shape_of and n not in absent]
    if missing:
        refuse_wrapped(family, shapes, wanted)
    bare = not any(name.startswith(family.prefix) for name in shapes)
    refuse(  # by the names of the file
        family,
        {
            "missing": [n.removeprefix(family.prefix) if bare else n for n in missing],
            "surplus": [names[n] for n in shape_of if n not in wanted and n not in derived],
            "misshapen": [
                f"{names[n]} {shape_of[n]} instead of {shape}"
                for n, shape in wanted.items()
                if n in shape_of and shape_of[n] != shape
            ],
        },
    )

    def read(name: str) -> Tensor:
        return get(names[name])

    false = [
        f"{names[name]} is not {law.what}"
        for name, law in derived.items()
        if name in names and not law.holds(read(name), read, config)
    ]
    refuse(family, {"wrong": false})
    state, fresh = {}, []
    for row in table:
        if row.theirs in absent:
            fresh += row.ours
            continue
        tensor = convert_tensor(read(row.theirs), row.how)
        for name, part in zip(row.ours, tensor.chunk(len(row.ours)), strict=True):
            state[name] = part.contiguous()
    return config, state, fresh


def their_shapes(table: list[TensorRow], state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of their tensors that belong to a state of ours."""
    shapes = {}
    for row in table:
        first, *rest = (state[name].shape for name in row.ours)
        shape = (first[0] + sum(s[0] for s in rest), *first[1:])
        shapes[row.theirs] = shape[::-1] if row.how == "transposed" else shape
        if row.how == "row":
            shapes[row.theirs] = (1, *shape)
    return shapes


def to_theirs(task: str, config: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our whole state -> their tensors, without those that are tied, and of the derived ones only
    those that must be written. Raises ValueError if the state is not that of the tables."""
    found, table = {}, rows(task, config)
    wanted = {name for row in table for name in row.ours}
    if state.keys() != wanted:
        wrong = {"missing": sorted(wanted - state.keys()), "surplus": sorted(state.keys() - wanted)}
        refuse(family_of(task, config), wrong)
    for row in table:
        joined = torch.cat([state[name] for name in row.ours])
        found[row.theirs] = convert_tensor(joined, row.how, back=True).contiguous()
    for name, law in family_of(task, config).derived.items():
        if law.make and name not in found:
            found[name] = law.make(config)
    return found


def convert_tensor(tensor: Tensor, how: str, back: bool = False) -> Tensor:
    """Changes a tensor of theirs into ours as TensorRow.how says; with back, ours into theirs."""
    if how == "transposed":
        return tensor.t()
    if how == "row":
        return tensor[None] if back else tensor[0]
    if how not in ("rows", "columns"):
        return tensor
    axis = 0 if how == "rows" else 1
    order = stream_order(tensor.size(axis))
    return tensor.index_select(axis, order.argsort() if back else order)

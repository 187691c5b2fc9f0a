"""Hugging Face's files, or a GGUF file of llama.cpp's -> a checkpoint of ours.

A tokenizer, a weight or a setting with which we could not compute exactly the same is refused.
"""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

import tasks
from data.chat import TEMPLATES, read_template
from data.tokens import AnyTokenizer
from engine import checkpoint as checkpoints
from engine.hub.declared import SETTINGS
from engine.hub.families import FAMILIES, family_of, tokenized_as
from engine.hub.gguf_models import open_gguf
from engine.hub.llama_tokenizer import from_contents, read_llama_tokenizer
from engine.hub.mapping import our_config, to_ours
from engine.hub.tokenizer_files import (
    TEMPLATE,
    note_on_case,
    read_json,
    read_tokenizer,
    read_whole,
)
from engine.hub.weights import CONFIG, files_of, open_weights
from model import count_parameters
from tasks.text import SampleFlags
from tasks.translation import start_and_end


def import_model(source: str) -> tuple[dict, list[str]]:
    """(the checkpoint, lines that say what was found). The checkpoint can be sampled from, trained
    from with --init and exported, but not resumed, because it has no optimizer state. All weights
    become float32. Raises ValueError for what is missing, damaged or not supported."""
    is_gguf = source.endswith(".gguf")
    if is_gguf:
        folder = path = Path(source)
        settings, shapes, get, *contents = open_gguf(path)
    else:
        folder = files_of(source)
        path = folder / CONFIG
        settings = read_json(path)
    try:
        task, config = our_config(settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    base = tokenized_as(FAMILIES[task])
    if is_gguf:
        tokenizer = from_contents(*contents, path)
    else:
        shapes, get = open_weights(folder)
        read = read_llama_tokenizer if base == "llama" else partial(read_tokenizer, task=base)
        tokenizer = read(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} tokens, the model only "
            f"{config.vocab_size:,}"
        )
    if task == "seq2seq":
        check_ids(settings, tokenizer, path)
    try:
        config, state, fresh = to_ours(task, config, shapes, get)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}
    if not all(tensor.is_floating_point() for tensor in state.values()):
        raise ValueError(f"{folder}: some weights are {', '.join(kinds)}, which is not supported")
    Flags = tasks.task(task).Flags
    with torch.device("meta"):  # initialising what is then replaced takes longer than reading it
        model = tasks.network(task)(config)
    state = {name: tensor.float() for name, tensor in state.items()}
    model.load_state_dict(state, strict=False, assign=True)
    torch.manual_seed(Flags.seed)
    init_missing(model, fresh)
    chat = {}
    template = contents[1].get("chat_template") if is_gguf else template_of(folder)
    if isinstance(template, str) and issubclass(tasks.task(task).SampleFlags, SampleFlags):
        chat = dict(zip(("template", "system"), read_template(template, tokenizer), strict=True))
    # --resume would need these settings and refuses a run without them; --init does not read them.
    train_config = Flags(model=task, data="", init=source, tokens_per_step=32 * config.block_size)
    train_config = replace(train_config, **chat)
    checkpoint = checkpoints.pack(
        task,
        model,
        tokenizer,
        train_config=train_config,
        data="",
        optimizer={},
        step=0,
        best=math.inf,
        skipped=0,
        fresh=fresh,
    )
    title = family_of(task, config).title
    lines = [
        f"{title}, {count_parameters(model):,} parameters, {', '.join(kinds)}",
        ", ".join(f"{name}={value}" for name, value in checkpoint["model_config"].items()),
    ]
    if chat.get("template"):
        lines.append(f"conversations: {chat['template']}, {chat['system'] or 'no default system'}")
    elif chat:
        lines.append(f"its template of conversations is none of {', '.join(TEMPLATES)}: not kept")
    if note := note_on_case(folder, tokenizer):
        lines.append(note)
    if fresh:
        lines.append(f"not in the file, and freshly initialised: {', '.join(fresh)}")
    if task == "bert" and not config.nsp:
        lines.append("not in the file: pooler and next-sentence head; nsp=False does without them")
    return checkpoint, lines


def template_of(folder: Path) -> str | None:
    """The template of conversations, in a file of its own or among the tokenizer's settings."""
    if (path := folder / TEMPLATE).is_file():
        return read_whole(path).decode("utf-8", "replace")
    found = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    found = found.get("chat_template")
    if isinstance(found, list):  # of templates with names
        named = (entry for entry in found if isinstance(entry, dict))
        found = next((x.get("template") for x in named if x.get("name") == "default"), None)
    return found


def init_missing(model: nn.Module, names: list[str]) -> None:
    """Initialises the tensors that a file does not have, which can be those of BERT's heads."""
    for module in sorted({name.rpartition(".")[0] for name in names}):
        if module:
            from bert import init_bert

            init_bert(model.get_submodule(module).to_empty(device="cpu"))
        else:
            model.mlm_bias = nn.Parameter(torch.zeros(model.config.vocab_size))


def check_ids(settings: dict, tokenizer: AnyTokenizer, path: Path) -> None:
    """Raises ValueError if config.json begins or ends a target with other tokens than we do."""
    start, end = start_and_end(tokenizer)
    # {setting: (Hugging Face's default, the token that we use)}
    ids = {"decoder_start_token_id": (58100, start), "eos_token_id": (0, end)}
    # Marian's padding is its start token. In other models padding is masked, so any id will do.
    if start != end:
        ids["pad_token_id"] = (58100, start)
    for name, (default, ours) in ids.items():
        if settings.get(name, default) != ours:
            raise ValueError(
                f"{path}: {name}={settings.get(name, default)} is not supported, the tokenizer "
                f"has it as {ours}"
            )

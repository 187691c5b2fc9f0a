"""A checkpoint of ours -> the files that transformers loads, and a card that describes the run."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tasks
from data.encoding import CLS, MASK, PAD, SEP
from data.sentencepieces import END_PIECE, START_PIECE, UNK_PIECE, SentencePieces
from data.tokens import END_OF_TEXT, opening
from engine import checkpoint as checkpoints
from engine.evaluation import goal_of
from engine.hub.comparing import compare, our_logits, random_inputs
from engine.hub.families import Family, family_of, tokenized_as
from engine.hub.jinja import jinja
from engine.hub.mapping import their_settings, to_theirs
from engine.hub.tokenizer_files import TEMPLATE, tokenizer_json
from engine.hub.weights import safetensors
from engine.logs import read_log
from tasks.text import TURN_ENDS
from tasks.translation import start_and_end
from wordpiece import UNK, WordPiece


def export_model(path: Path, folder: Path) -> str:
    """Writes what AutoModel… and AutoTokenizer.from_pretrained(folder) load, and a card. Returns a
    line on how what transformers computes from the files was compared with our model. Raises
    ValueError for a model that Hugging Face has no class for, and if the folder is not empty."""
    checkpoint = checkpoints.load(path)
    model, tokenizer = checkpoints.restore(path, checkpoint)
    family = family_of(checkpoint["task"], model.config)
    task, config, special = checkpoint["task"], model.config, tokenizer.special_tokens
    kind = "PreTrainedTokenizerFast"
    files = {"config.json": their_settings(task, config)}
    base = tokenized_as(family)
    if base == "bert":
        ids = {"pad_token_id": special[PAD]}
        names = {"pad_token": PAD, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}
        if isinstance(tokenizer, WordPiece):
            names |= {"unk_token": UNK, "do_lower_case": tokenizer.lowercase}
            kind = "BertTokenizer"
    else:
        start, end = start_and_end(tokenizer)
        ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": start}
        if base == "seq2seq":
            ids |= {"decoder_start_token_id": start, "forced_eos_token_id": None}
        names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
        stops = [end]
        if base != "seq2seq":  # their tokens may have names of their own
            ids["bos_token_id"] = special[opening(tokenizer)]
            names = {k: tokenizer.bytes_of[ids[f"{k}_id"]].decode() for k in names}
            stops += [special[name] for name in TURN_ENDS if name in special]
        # Ids that are never generated: those that only pad the matrix, and the start token.
        never = list(range(tokenizer.vocab_size, config.vocab_size))
        never += [start] if start != end else []
        limits = {"max_length": config.block_size, "suppress_tokens": never or None}
        files["generation_config.json"] = {**ids, **limits}
        if len(stops) > 1:
            files["generation_config.json"]["eos_token_id"] = stops
    files["config.json"] |= ids
    if isinstance(tokenizer, SentencePieces):
        names = {"eos_token": END_PIECE, "unk_token": UNK_PIECE, "pad_token": START_PIECE}
        kind = "MarianTokenizer"
    else:
        files["tokenizer.json"] = tokenizer_json(tokenizer, base)
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    files["tokenizer_config.json"] = {
        "tokenizer_class": kind,
        "model_max_length": config.block_size,
        "clean_up_tokenization_spaces": False,
        # Given token types (all 0), GPT-2 would add the embedding of token 0 to each word.
        "model_input_names": inputs if base == "bert" else inputs[::2],
        **names,
    }
    with whole_folder(folder) as temporary:
        if isinstance(tokenizer, WordPiece):
            tokenizer.save(temporary / "vocab.txt")  # for programs that read no tokenizer.json
        elif isinstance(tokenizer, SentencePieces):
            tokenizer.save(temporary)
        tensors = to_theirs(task, config, model.state_dict())
        weights = temporary / "model.safetensors"
        safetensors().torch.save_file(tensors, weights, metadata={"format": "pt"})
        if chat := checkpoint["train_config"].get("template"):
            text = jinja(chat, checkpoint["train_config"].get("system", ""), tokenizer)
            (temporary / TEMPLATE).write_text(text, encoding="utf-8")
        for name, content in files.items():
            text = json.dumps(content, indent=2)
            (temporary / name).write_text(text + "\n", encoding="utf-8")
        # safetensors writes a file that only its owner may read: it gets the others' permissions.
        shutil.copymode(temporary / "config.json", weights)
        text = card(folder.resolve().name, family, checkpoint, read_log(path.parent / "log.jsonl"))
        (temporary / "README.md").write_text(text, encoding="utf-8")
        given = random_inputs(model)
        ours = our_logits(model, given)
        del model, tensors  # before theirs is loaded
        architecture = files["config.json"]["architectures"][0]
        return compare(task, architecture, temporary, given, ours)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`: renamed to it at the end, or removed after an error."""
    folder = Path(os.path.realpath(folder))
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not an empty folder: choose another for --to")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            folder.rmdir()
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# Settings that say where a run was computed, not what it computed.
LOCAL = {"cache_dir", "out", "resume", "device", "dry_run", "stop_after", "minutes", "world"}
LOCAL |= {"data", "valid", "init", "tokenizer"}  # paths: the card has their last names


def card(name: str, family: Family, checkpoint: dict, records: list[dict]) -> str:
    """README.md: the data, sizes, settings and measured results of the run, in Markdown."""
    task, train, step = checkpoint["task"], checkpoint["train_config"], checkpoint["step"]
    sizes = checkpoint["model_config"]
    where = ", ".join(Path(part).name for part in train["data"].split(",")) or "not recorded"
    begun = f"It began with the weights of {Path(train['init']).name}. " if train["init"] else ""
    last = [r for r in records if r["split"] == "validation" and r["step"] == step][-1:]
    results = {k: v for r in last for k, v in r.items() if k not in ("split", "step")}
    if math.isfinite(checkpoint["best"]):
        name_of, figure = goal_of(tasks.task(task), checkpoint["best"])
        results[f"best {name_of} of the run"] = figure
    settings = {k: v for k, v in train.items() if k not in LOCAL and v not in ("", None)}
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: {family.pipeline}\n---",
        f"# {name}",
        f"A {family.title} after {step:,} steps. {begun}Exported by `convert.py`.",
        f"## Data\n\n{where}",
        "## Results\n\nOn validation text, in nats per target where it is a loss.",
        table(results) if results else "None were measured.",
        "## Sizes",
        table(sizes),
        "## Training",
        table(settings) if step else "None here.",
    ]
    return "\n\n".join(parts) + "\n"


def table(values: dict[str, Any]) -> str:
    shown = {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in values.items()}
    lines = [f"| {k} | {v.replace('|', '/')} |" for k, v in shown.items()]
    return "\n".join(["| | |", "|-|-|", *lines])

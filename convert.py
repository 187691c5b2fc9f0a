"""Hugging Face's checkpoints in and out: GPT-2, BERT and Marian.

    python convert.py import openai-community/gpt2 --out out/gpt2.pt    a name, or a folder
    python convert.py export out/gpt/best.pt --to FOLDER    and back, with a card that tells the run

What their settings and tensors are called is in `families.py`, how they become ours is in
`mapping.py`; here are the files. Nothing in them is trusted: no pickle that could run code is
opened, sizes are checked before memory is taken, and a tokenizer, a weight or a setting that we
would not compute with exactly is refused.

Left out: optimizer states, quantized weights, TensorFlow's and flax's files.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from bert import init_bert
from data.encoding import CLS, MASK, PAD, SEP
from data.sentencepieces import END_PIECE, START_PIECE, UNK_PIECE, SentencePieces
from data.tokens import END_OF_TEXT, AnyTokenizer
from engine import checkpoint as checkpoints
from engine import cli
from engine.config import CONFIGS
from engine.evaluation import best_figure
from engine.hub.download import snapshot
from engine.hub.families import BASES, FAMILIES
from engine.hub.mapping import our_config, their_settings, to_ours, to_theirs
from engine.hub.tokenizer_files import (
    MOST_JSON,
    TOKENIZER_FILES,
    parse_object,
    read_json,
    read_tokenizer,
    tokenizer_json,
)
from engine.logs import read_log
from model import count_parameters
from tasks.translation import start_and_end
from wordpiece import UNK, WordPiece


@dataclass
class ConvertConfig:
    out: str = ""  # import: the checkpoint to write, out/gpt2.pt for one
    to: str = ""  # export: the folder to write, new or empty


# ---- reading files that strangers wrote ----------------------------------------------------------

ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there, whole or in shards


def files_of(source: str) -> Path:
    """The folder with the files of the model that `source` names: it, or one of the hub's cache."""
    if Path(source).is_file():
        raise ValueError(f"{source} is a file: name the folder that it lies in")
    indexes = [f"{name}.index.json" for name in WEIGHTS]
    folder = snapshot(source, [CONFIG], [*TOKENIZER_FILES, WEIGHTS[0], *indexes])
    if not Path(source).is_dir():
        index = next((folder / name for name in indexes if (folder / name).is_file()), None)
        if not (folder / WEIGHTS[0]).is_file():
            snapshot(source, sorted(set(shards(index).values())) if index else [WEIGHTS[1]])
    return folder


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor: (dtype, shape)} of a safetensors file: 8 bytes with the length of a JSON header, the
    header, then the tensors without gaps. Raises ValueError for any other file, and takes memory
    for no more than the header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MOST_JSON, size - 8):
            raise ValueError(
                f"{path} is truncated or damaged: a header of {length:,} bytes in {size:,}"
            )
        header = parse_object(file.read(length), path)
    found, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            fits = whole and end - begin == math.prod(shape) * ITEM_SIZES[dtype]
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(f"{path}: its entry for {name!r} is wrong: {str(entry)[:100]}")
        found[name] = (dtype, tuple(shape))
        spans.append((begin, end))
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise ValueError(f"{path} is damaged: its tensors overlap or have gaps at byte {at:,}")
        at = end
    if at != size - 8 - length:
        raise ValueError(f"{path} is damaged: {at:,} bytes of tensors in {size - 8 - length:,}")
    return found


def shards(index: Path) -> dict[str, str]:
    """{tensor: the file that it is in}, as the index beside these files says."""
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{index} has no weight_map")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    for file in placed.values():
        # A name and nothing else: "../x" would be read from outside the folder.
        plain = isinstance(file, str) and file.endswith(suffix)
        if not plain or any(c in file for c in "/\\:\0"):
            raise ValueError(f"{index} names {str(file)[:80]!r}, which is no file beside it")
    return placed


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """{file: the tensors that the index puts into it, None where there is no index}."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return {folder / name: None}
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        files: dict[Path, set[str] | None] = {}
        for tensor, file in shards(index).items():
            if not (folder / file).is_file():
                raise ValueError(f"{index} names {file}, which is not there")
            files.setdefault(folder / file, set()).add(tensor)
        return files
    raise ValueError(f"{folder} holds neither {' nor '.join(WEIGHTS)}")


def open_weights(folder: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """(shapes of all tensors, the function that reads one). No pickled code is run."""
    shapes: dict[str, tuple[int, ...]] = {}
    readers: dict[str, Callable[[str], Tensor]] = {}
    for path, placed in weight_files(folder).items():
        if path.suffix == ".safetensors":
            own = {name: shape for name, (_, shape) in read_header(path).items()}
            read = safetensors().safe_open(path, framework="pt").get_tensor
        else:
            tensors = read_bin(path)
            own, read = {name: tuple(t.shape) for name, t in tensors.items()}, tensors.__getitem__
        if placed not in (None, own.keys()):
            raise ValueError(f"{path} does not hold the tensors that the index says")
        shapes |= own
        readers |= dict.fromkeys(own, read)
    return shapes, lambda name: readers[name](name)


def read_bin(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for damaged files
        raise ValueError(
            f"{path} is damaged, or holds more than tensors, which could run code: not opened"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()
    ):
        raise ValueError(f"{path} is no dict of tensors")
    return tensors


def safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError("this needs safetensors: pip install safetensors") from error
    return safetensors


# ---- in ------------------------------------------------------------------------------------------


def import_model(source: str) -> tuple[dict, list[str]]:
    """(the checkpoint, lines that tell what was found). It can be sampled from, trained on with
    --init and exported; it has no optimizer state, so that it cannot be resumed. All weights become
    float32. Raises ValueError for whatever is missing, damaged or not ours to compute."""
    folder = files_of(source)
    path = folder / CONFIG
    settings = read_json(path)
    try:
        task, config = our_config(settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    shapes, get = open_weights(folder)
    tokenizer = read_tokenizer(folder, BASES[FAMILIES[task].model_type])
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
    with torch.device("meta"):  # initialising what is then replaced takes longer than reading it
        model = FAMILIES[task].Model(config)
    state = {name: tensor.float() for name, tensor in state.items()}
    model.load_state_dict(state, strict=False, assign=True)
    torch.manual_seed(CONFIGS[task]().seed)
    for name in sorted({name.rpartition(".")[0] for name in fresh}):
        if name:
            init_bert(model.get_submodule(name).to_empty(device="cpu"))
        else:
            model.mlm_bias = nn.Parameter(torch.zeros(config.vocab_size))
    # What --resume would need and refuse to go on without; --init takes none of it.
    train_config = CONFIGS[task](
        model=task, data="", init=source, tokens_per_step=32 * config.block_size
    )
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
    lines = [
        f"{FAMILIES[task].title}, {count_parameters(model):,} parameters, {', '.join(kinds)}",
        ", ".join(f"{name}={value}" for name, value in checkpoint["model_config"].items()),
    ]
    if fresh:
        lines.append(f"not in the file, and freshly initialised: {', '.join(fresh)}")
    if task == "bert" and not config.nsp:
        lines.append("not in the file: pooler and next-sentence head; nsp=False does without them")
    return checkpoint, lines


def check_ids(settings: dict, tokenizer: AnyTokenizer, path: Path) -> None:
    """ValueError where config.json begins or ends a target with other tokens than we do."""
    start, end = start_and_end(tokenizer)
    # What counts where the file does not say it, and what we compute with.
    ids = {"decoder_start_token_id": (58100, start), "eos_token_id": (0, end)}
    if start != end:  # Marian's padding is its start token; any other is masked, so any will do
        ids["pad_token_id"] = (58100, start)
    for name, (default, ours) in ids.items():
        if settings.get(name, default) != ours:
            raise ValueError(
                f"{path}: {name}={settings.get(name, default)} is not supported, the tokenizer "
                f"has it as {ours}"
            )


# ---- out -----------------------------------------------------------------------------------------


def export_model(path: Path, folder: Path) -> None:
    """Writes what AutoModel… and AutoTokenizer.from_pretrained(folder) load, and a card. Raises
    ValueError for a model that Hugging Face's classes cannot be, or a folder that is not empty."""
    checkpoint = checkpoints.load(path)
    model, tokenizer = checkpoints.restore(path, checkpoint)
    task, config, special = checkpoint["task"], model.config, tokenizer.special_tokens
    kind = "PreTrainedTokenizerFast"
    files = {"config.json": their_settings(task, config)}
    base = BASES[FAMILIES[task].model_type]
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
        # Never written: ids that only pad the matrix, and a start token that does nothing else.
        never = list(range(tokenizer.vocab_size, config.vocab_size))
        never += [start] if start != end else []
        limits = {"max_length": config.block_size, "suppress_tokens": never or None}
        files["generation_config.json"] = {**ids, **limits}
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
        # GPT-2 would add the embeddings of token types, zeros, to the words: that of token 0.
        "model_input_names": inputs if base == "bert" else inputs[::2],
        **names,
    }
    with whole_folder(folder) as temporary:
        if isinstance(tokenizer, WordPiece):
            tokenizer.save(temporary / "vocab.txt")  # for what reads no tokenizer.json
        elif isinstance(tokenizer, SentencePieces):
            tokenizer.save(temporary)
        tensors = to_theirs(task, config, model.state_dict())
        weights = temporary / "model.safetensors"
        safetensors().torch.save_file(tensors, weights, metadata={"format": "pt"})
        for name, content in files.items():
            text = json.dumps(content, indent=2)
            (temporary / name).write_text(text + "\n", encoding="utf-8")
        # safetensors lets nobody else read what it writes: as the other files, instead.
        shutil.copymode(temporary / "config.json", weights)
        text = card(folder.resolve().name, checkpoint, read_log(path.parent / "log.jsonl"))
        (temporary / "README.md").write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its name at the end, or is removed."""
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


# What the hub's search calls the tasks.
PIPELINES = {
    "gpt": "text-generation",
    "bert": "fill-mask",
    "seq2seq": "translation",
    "classify": "text-classification",
    "tag": "token-classification",
    "answer": "question-answering",
    "similar": "feature-extraction",
    "complete": "text-generation",
}
# Settings that say where a run was computed, not what.
LOCAL = {"cache_dir", "out", "resume", "device", "dry_run", "stop_after", "minutes", "world"}
LOCAL |= {"data", "valid", "init", "tokenizer"}  # paths, of which the names are told


def card(name: str, checkpoint: dict, records: list[dict]) -> str:
    """README.md: the run's data, sizes, settings and measured results, in Markdown."""
    task, train, step = checkpoint["task"], checkpoint["train_config"], checkpoint["step"]
    sizes = checkpoint["model_config"]
    where = ", ".join(Path(part).name for part in train["data"].split(",")) or "not recorded"
    begun = f"It began with the weights of {Path(train['init']).name}. " if train["init"] else ""
    last = [r for r in records if r["split"] == "validation" and r["step"] == step][-1:]
    results = {k: v for r in last for k, v in r.items() if k not in ("split", "step")}
    if math.isfinite(checkpoint["best"]):
        name_of, figure = best_figure(task, checkpoint["best"])
        results[f"best {name_of} of the run"] = figure
    settings = {k: v for k, v in train.items() if k not in LOCAL and v not in ("", None)}
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: {PIPELINES[task]}\n---",
        f"# {name}",
        f"A {FAMILIES[task].title} after {step:,} steps. {begun}Exported by `convert.py`.",
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


# ---- the command line ----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("Hugging Face's checkpoints in and out: GPT-2, BERT and Marian.")
    parser.add_argument("command", choices=("import", "export"))
    parser.add_argument(
        "source", help="import: a folder, or owner/repo on the hub; export: a checkpoint"
    )
    cli.add_flags(parser, ConvertConfig, "where to")
    given = parser.parse(sys.argv[1:] if argv is None else argv)
    command, source = given.pop("command"), given.pop("source")
    config = ConvertConfig(**given)
    wanted, other = ("out", "to") if command == "import" else ("to", "out")
    if not getattr(config, wanted) or getattr(config, other):
        raise ValueError(f"{command} writes to --{wanted}: give that, and not --{other}")
    if command == "export":
        export_model(Path(source), Path(config.to))
        print(f"{config.to}: {', '.join(sorted(p.name for p in Path(config.to).iterdir()))}")
        return
    out = Path(config.out)
    if os.path.lexists(out):
        raise ValueError(f"{out} is there already: choose another --out")
    checkpoint, lines = import_model(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.save(out, checkpoint)
    print(f"{out}: {lines[0]}", *lines[1:], sep="\n")


if __name__ == "__main__":
    cli.run(main)

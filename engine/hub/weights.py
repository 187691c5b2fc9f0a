"""The files of a model in Hugging Face's layout: which there are, and the tensors in them.

Nothing in them is trusted: no pickle that could run code is opened, and the sizes are checked
before memory is taken.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.hub.download import snapshot
from engine.hub.tokenizer_files import TOKENIZER_FILES, read_json

CONFIG, OLD_CONFIG = "config.json", "bert_config.json"  # the latter is Google's
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there, whole or in shards
INDEXES = tuple(f"{name}.index.json" for name in WEIGHTS)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL")


def files_of(source: str) -> Path:
    """The folder with the files of the model `source`: that folder itself, or one in the hub's
    cache, into which only files that are read are downloaded. Raises ValueError if there is none.
    """
    folder = Path(source)
    if folder.is_file():
        raise ValueError(f"{source} is a file: name the folder that it lies in")
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            old = (folder / OLD_CONFIG).is_file()
            remedy = f"rename {OLD_CONFIG}" if old else "put it there"
            raise ValueError(f"the folder {source} has no {CONFIG}: {remedy}")
        return folder
    folder = snapshot(source, [CONFIG, *TOKENIZER_FILES, WEIGHTS[0], *INDEXES])
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{source} has no {CONFIG} in {folder}: name a model that transformers can load, or "
            "connect to the network if the cache has only a part of it"
        )
    if not (folder / WEIGHTS[0]).is_file():
        index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
        parts = sorted(set(shards(index).values())) if index else [WEIGHTS[1]]
        snapshot(source, parts, revision=folder.name)  # of the same commit as the rest
    return folder


def shards(index: Path) -> dict[str, str]:
    """{tensor: the file that it is in}, from the index beside these files. Raises ValueError for an
    index that names other places."""
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{index} has no weight_map")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    for file in placed.values():
        # It must be a plain name: "../x" would be read from outside the folder.
        plain = isinstance(file, str) and file.endswith(suffix)
        if not plain or any(c in file for c in "/\\:\0"):
            raise ValueError(f"{index} names {str(file)[:80]!r}, which is no file beside it")
    return placed


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """{file: the tensors that it has according to the index, or None if there is no index}."""
    for name, index in zip(WEIGHTS, INDEXES, strict=True):
        if (folder / name).is_file():
            return {folder / name: None}
        if not (folder / index).is_file():
            continue
        files: dict[Path, set[str] | None] = {}
        for tensor, file in shards(folder / index).items():
            if not (folder / file).is_file():
                raise ValueError(f"{folder / index} names {file}, which is not there")
            files.setdefault(folder / file, set()).add(tensor)
        return files
    raise ValueError(f"{folder} holds neither {' nor '.join(WEIGHTS)}")


def open_weights(folder: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """(shapes of all tensors, the function that reads one). No pickled code is run."""
    shapes: dict[str, tuple[int, ...]] = {}
    readers: dict[str, Callable[[str], Tensor]] = {}
    for path, placed in weight_files(folder).items():
        if path.suffix == ".safetensors":
            own, read = open_safetensors(path)
        else:
            tensors = read_bin(path)
            own, read = {name: tuple(t.shape) for name, t in tensors.items()}, tensors.__getitem__
        if placed not in (None, own.keys()):
            raise ValueError(f"{path} does not hold the tensors that the index says")
        shapes |= own
        readers |= dict.fromkeys(own, read)
    return shapes, lambda name: readers[name](name)


def open_safetensors(path: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """(shapes of the tensors of one file, the function that reads one)."""
    library = safetensors()
    try:
        file = library.safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except library.SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged: {str(error)[:200]}") from error
    for name, found in slices.items():
        if found.get_dtype() not in DTYPES:
            raise ValueError(f"{path}: {name} is of type {found.get_dtype()}: not supported")
    return {name: tuple(found.get_shape()) for name, found in slices.items()}, file.get_tensor


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

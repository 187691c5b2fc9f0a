"""Checkpoints too large for one process: each process writes its part of the tensors to a folder.

The checkpoint itself, for example `latest.pt`, then has everything but the tensors. Under "parts"
it has the name of a folder beside it, and where in the folder's files each piece lies:

    {"folder": "latest.0001200-0.parts",
     "tensors": {"model/norm.weight": {"dtype": "float32", "size": [768], "chunks": [
         {"offsets": [0], "sizes": [384], "file": "__0_0.distcp", "offset": 0, "length": 2304,
          "crc32": 1234567}, …]}}}

`torch.distributed.checkpoint` decides which process writes what, and writes it. Its own table of
contents is a pickle, and this project never unpickles: ours has plain values, and a piece is read
with `weights_only=True` after its checksum was compared. A piece is some rows of a tensor, so any
number of processes can read what any other number has written, each only the rows that it needs.

Left out: objects other than tensors, pieces of columns, writing in the background.
"""

import dataclasses
import errno
import io
import re
import shutil
import zlib
from itertools import count
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.futures import Future

from engine.processes import Processes
from optim import separate_states

# ---- writing -------------------------------------------------------------------------------------


class Writer(dcp.FileSystemWriter):
    """torch's writer, but each piece gets a checksum, and the table of contents is not written: it
    is in `contents` afterwards."""

    contents: dict

    def write_data(self, plan, planner) -> Future:
        results = []
        for result in super().write_data(plan, planner).wait():
            place = result.storage_data
            with (Path(self.path) / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                crc32 = zlib.crc32(file.read(place.length))
            found = {"file": place.relative_path, "offset": place.offset, "length": place.length}
            results.append(dataclasses.replace(result, storage_data={**found, "crc32": crc32}))
        future: Future = Future()
        future.set_result(results)
        return future

    def finish(self, metadata, results) -> None:
        places = {result.index: result.storage_data for some in results for result in some}
        self.contents = {
            name: {
                "dtype": str(tensor.properties.dtype).removeprefix("torch."),
                "size": list(tensor.size),
                "chunks": [
                    {
                        "offsets": list(chunk.offsets),
                        "sizes": list(chunk.sizes),
                        **places[MetadataIndex(name, chunk.offsets)],
                    }
                    for chunk in tensor.chunks
                ],
            }
            for name, tensor in metadata.state_dict_metadata.items()
        }


def write_parts(path: Path, step: int, tensors: dict[str, Tensor], group: Processes) -> dict:
    """Writes the parts of the checkpoint `path`. Every process must call it with the tensors that
    it holds; a DTensor stands for the rows of a tensor that a process has. Returns what belongs
    under "parts" in the main process, {} in the others.

    The folder is new, so that those of older checkpoints stay as they are; its files are on the
    disk when this returns. Raises OSError in every process if one of them could not write.
    """
    names = (f"{path.stem}.{step:07}-{number}.parts" for number in count())
    # The step may have been saved before, perhaps by a process that was killed.
    folder = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    if group.world > 1:  # only the main process knows the run's folder
        name = torch.tensor(list(str(folder).encode())) if group.main else None
        folder = Path(bytes(group.broadcast_tensor(name, 0).tolist()).decode())
    writer = Writer(folder)
    try:
        with group.busy("saving"):
            dcp.save(tensors, storage_writer=writer, process_group=group.cpu_group)
    except CheckpointException as error:
        if group.main:
            shutil.rmtree(folder, ignore_errors=True)
        reason = "; ".join(str(e) for e, _ in error.failures.values()).split("\n")[0]
        raise OSError(errno.EIO, f"{folder}: {reason}") from error
    found = {"folder": folder.name, "tensors": writer.contents} if group.main else {}
    files = {c["file"] for about in found.get("tensors", {}).values() for c in about["chunks"]}
    if group.broadcast(not all((folder / file).is_file() for file in files)):
        raise OSError(
            errno.ENOENT,
            f"{folder} is not on a disk that all machines share, as --shard needs here",
        )
    return found


# ---- reading -------------------------------------------------------------------------------------


class Stored:
    """A tensor of the checkpoint `path` that is still on the disk: stored[...] reads all of it,
    stored[4:7] some of its rows. Both raise ValueError if something is missing or damaged."""

    def __init__(self, path: Path, parts: dict, name: str):
        self.path, self.name = path, name
        try:
            folder, about = parts["folder"], parts["tensors"][name]
            if not re.fullmatch(r"[\w.-]+\.parts", folder):  # one beside the file, not above it
                raise ValueError(f"{folder!r} cannot be its folder")
            self.folder = path.with_name(folder)
            self.shape, self.dtype = torch.Size(about["size"]), getattr(torch, about["dtype"])
            self.chunks = about["chunks"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise self.damage(error) from error

    def damage(self, error: Exception | str) -> ValueError:
        reason = " ".join(f"{self.name}: {error}".split())[:200]
        return ValueError(f"{self.path} and its folder do not fit together ({reason})")

    def __getitem__(self, rows) -> Tensor:
        height, *width = self.shape or [1]  # a scalar is stored as one row
        first, last = (0, height) if rows is ... else (rows.start, rows.stop)
        try:
            read, found = torch.empty(last - first, *width, dtype=self.dtype), 0
            for chunk in self.chunks:
                begin, length = (chunk["offsets"] or [0])[0], (chunk["sizes"] or [1])[0]
                start, stop = max(first, begin), min(last, begin + length)
                if start < stop:
                    piece = read_piece(self.folder, chunk).view(length, *width)
                    read[start - first : stop - first] = piece[start - begin : stop - begin]
                    found += stop - start
        except ValueError:
            raise
        except Exception as error:  # torch raises half a dozen kinds for damaged files
            raise self.damage(error) from error
        if found != last - first:
            raise self.damage(f"{last - first - found} rows are missing")
        return read if self.shape else read[0]


def read_piece(folder: Path, chunk: dict) -> Tensor:
    if not re.fullmatch(r"\w+\.distcp", chunk["file"]):
        raise ValueError(f"{folder} cannot hold {chunk['file']!r}: the checkpoint is damaged")
    with (folder / chunk["file"]).open("rb") as file:
        file.seek(chunk["offset"])
        data = file.read(chunk["length"])
    if zlib.crc32(data) != chunk["crc32"]:
        raise ValueError(f"{folder / chunk['file']} is damaged: use an older checkpoint")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def attach_tensors(path: Path, checkpoint: dict, whole: bool) -> None:
    """Puts the tensors of a checkpoint in parts into their places. whole: they are read, and the
    checkpoint is then as if it had been one file; else each place gets a Stored. Raises ValueError
    if the checkpoint is damaged."""
    try:
        for name in checkpoint["parts"]["tensors"]:
            stored = Stored(path, checkpoint["parts"], name)
            set_tensor(checkpoint, name, stored[...] if whole else stored)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged: its list of parts has no place for {error}"
        ) from error
    if whole:
        del checkpoint["parts"]


# ---- names: "model/NAME" and "optimizer/WHICH/NUMBER/NAME", WHICH as in `separate_states` --------


def flatten(weights: dict[str, Tensor], state: dict) -> dict[str, Tensor]:
    """{name: tensor} of all tensors in the state of a model and in that of an optimizer."""
    tensors = {f"model/{name}": tensor for name, tensor in weights.items()}
    for which, one in separate_states(state).items():
        for number, found in one["state"].items():
            tensors |= {f"optimizer/{which}/{number}/{name}": t for name, t in found.items()}
    return tensors


def set_tensor(checkpoint: dict, name: str, tensor) -> None:
    """Puts the tensor of that name into its place in the checkpoint."""
    kind, _, rest = name.partition("/")
    if kind == "model":
        checkpoint["model"][rest] = tensor
    else:
        which, number, key = rest.split("/")
        state = separate_states(checkpoint["optimizer"])[which]["state"]
        state.setdefault(int(number), {})[key] = tensor


def without_tensors(state: dict) -> dict:
    """The state of an optimizer without its tensors."""
    return {
        key: {} if key == "state" else without_tensors(value) if isinstance(value, dict) else value
        for key, value in state.items()
    }

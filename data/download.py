"""Public files by address and checksum. Nothing that arrives is trusted before it is checked."""

import hashlib
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm


@dataclass(frozen=True)
class Remote:
    """A file that can be had from any of several addresses; size in bytes, sha256 in hex.

    `instead` is the flag that names something else.
    """

    name: str
    urls: tuple[str, ...]
    size: int
    sha256: str
    instead: str = "--data"


SHAKESPEARE = Remote(
    "shakespeare.txt",
    (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/input.txt",
    ),
    1_115_394,
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
GPT2_MERGES = Remote(
    "gpt2-vocab.bpe",
    (
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
        "https://huggingface.co/openai-community/gpt2/resolve/main/merges.txt",
    ),
    456_318,
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "--tokenizer",
)
GPT2_VOCABULARY = Remote(
    "gpt2-encoder.json",
    (
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
        "https://huggingface.co/openai-community/gpt2/resolve/main/vocab.json",
    ),
    1_042_301,
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "--tokenizer",
)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(remote: Remote, folder: Path, timeout: float = 30.0) -> Path:
    """The path of the file in `folder`, downloaded unless it is there with the right checksum.

    Each address is tried in turn. Raises ValueError, with what each one answered and how to put
    the file in place by hand. A file with a wrong checksum never gets the final name.
    """
    target = folder / remote.name
    if target.is_file() and target.stat().st_size == remote.size:
        if file_sha256(target) == remote.sha256:
            return target
        target.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    for url in remote.urls:
        temporary = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            copy_url(url, temporary, remote, timeout)
            if (found := file_sha256(temporary)) != remote.sha256:
                raise ValueError(f"SHA-256 {found[:12]}… instead of {remote.sha256[:12]}…")
            temporary.replace(target)
            return target
        except (OSError, ValueError) as error:  # URLError is an OSError
            failures.append(f"{url}: {getattr(error, 'reason', error)}")
        finally:
            temporary.unlink(missing_ok=True)
    raise ValueError(
        f"cannot download {remote.name} ({'; '.join(failures)}): "
        f"put a copy of that file at {target}, or use another {remote.instead}"
    )


def copy_url(url: str, path: Path, remote: Remote, timeout: float) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "python"})
    bar = tqdm(total=remote.size, unit="B", unit_scale=True, desc=remote.name, disable=None)
    with urllib.request.urlopen(request, timeout=timeout) as answer, path.open("wb") as file, bar:
        written = 0
        while block := answer.read(1 << 16):
            written += len(block)
            if written > remote.size:
                raise ValueError(f"more than the expected {remote.size:,} bytes arrived")
            file.write(block)
            bar.update(len(block))
    if written != remote.size:
        raise ValueError(f"{written:,} bytes arrived instead of {remote.size:,}")

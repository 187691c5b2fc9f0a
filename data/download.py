"""Public files, each with its addresses and checksum. Nothing is used before it was checked."""

import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm


@dataclass(frozen=True)
class Remote:
    """A file that can be downloaded from any of its addresses; size in bytes, sha256 in hex.

    `instead` is the flag by which a user can name another file. If no SHA-256 was published,
    `sha256` is empty and `md5` is used. A size of 0 is unknown, but at most UNKNOWN_SIZE.
    """

    name: str
    urls: tuple[str, ...]
    size: int
    sha256: str
    instead: str = "--data"
    md5: str = ""


UNKNOWN_SIZE = 1 << 24  # the most bytes that a file of unknown size may have


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


def multi30k(part: str, size: int, digest: str) -> Remote:
    """`digest` is a SHA-256 (64 digits) or, where that is not known, an MD5 (32 digits)."""
    file = f"data/task1/raw/{part.replace('test', 'test_2016_flickr')}.gz"
    urls = (
        f"https://raw.githubusercontent.com/multi30k/dataset/master/{file}",
        f"https://cdn.jsdelivr.net/gh/multi30k/dataset@master/{file}",
    )
    if len(digest) == 32:
        return Remote(f"multi30k-{part}.gz", urls, size, "", md5=digest)
    return Remote(f"multi30k-{part}.gz", urls, size, digest)


# Captions of photographs in English, German, French and Czech (Elliott et al. 2016, 2017; Barrault
# et al. 2018). The MD5 sums are those that torchtext published; where we have the files, English
# and German, its sums agree with them. The test set is that of 2016.
MULTI30K = {
    part: multi30k(part, size, digest)
    for part, size, digest in (
        ("train.en", 568_929, "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f"),
        ("train.de", 637_044, "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6"),
        ("train.fr", 0, "6cb767741dcad3931f966fefbc05203f"),
        ("train.cs", 0, "d9a5fc268917725a2b0efce3a0cc8607"),
        ("val.en", 21_650, "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28"),
        ("val.de", 24_681, "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a"),
        ("val.fr", 0, "93fc564584b7e5ba410c761ea5a1c682"),
        ("val.cs", 0, "83cdc082f646b769095615384cf5c0ca"),
        ("test.en", 21_077, "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9"),
        ("test.de", 22_890, "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8"),
        ("test.fr", 0, "08dc7cd4a662f31718412de95ca9bfe3"),
        ("test.cs", 0, "3104872229daa1bef3b401d44dd2220b"),
    )
}


def statmt(name: str, path: str, size: int, sha256: str) -> Remote:
    return Remote(name, (f"https://{path}", f"http://{path}"), size, sha256)


# WMT 2014, with the sizes and sums that TensorFlow Datasets published (url_checksums of
# wmt14_translate). Its dev.tgz is that of 2019, which has the older test sets too.
EUROPARL = statmt(
    "wmt13-training-parallel-europarl-v7.tgz",
    "www.statmt.org/wmt13/training-parallel-europarl-v7.tgz",
    657_632_379,
    "0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7",
)
COMMON_CRAWL = statmt(
    "wmt13-training-parallel-commoncrawl.tgz",
    "www.statmt.org/wmt13/training-parallel-commoncrawl.tgz",
    918_311_367,
    "c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5",
)
NEWS_COMMENTARY = statmt(
    "wmt14-training-parallel-nc-v9.tgz",
    "www.statmt.org/wmt14/training-parallel-nc-v9.tgz",
    80_418_416,
    "cb8953f292298e6877ae433c98912b927cb0766b303f4540512ddd286c748485",
)
NEWSTESTS = statmt(
    "wmt19-dev.tgz",
    "data.statmt.org/wmt19/translation-task/dev.tgz",
    38_654_961,
    "7a7deccf82ebb05ba508dba5eb21356492224e8f630ec4f992132b029b4b25e7",
)

# WikiText (Merity et al. 2016), raw: without <unk>. The sizes and sums of both archives are those
# that Hugging Face's datasets published. Their first address (research.metamind.io) is gone.
WIKITEXT2 = Remote(
    "wikitext-2-raw-v1.zip",
    (
        "https://huggingface.co/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip",
        "https://wikitext.smerity.com/wikitext-2-raw-v1.zip",
    ),
    4_721_645,
    "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
)
WIKITEXT103 = Remote(
    "wikitext-103-raw-v1.zip",
    (
        "https://huggingface.co/datasets/mattdangerw/wikitext-103-raw/resolve/main/"
        "wikitext-103-raw-v1.zip",
        "https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
    ),
    191_984_949,
    "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write. It gets the name `path` when it is complete, and is deleted on an error."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def prepare_cache(cache: Path) -> None:
    """Makes the folder of --cache_dir. Raises ValueError where nothing can be written to it."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write to {cache} ({error.strerror}): choose another folder with --cache_dir"
        ) from error


def file_sha256(path: Path) -> str:
    return file_hash(path, hashlib.sha256())


def file_hash(path: Path, digest) -> str:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_hash(path: Path, remote: Remote) -> None:
    """Raises ValueError unless the file has the SHA-256 of `remote` or, without one, its MD5."""
    if remote.sha256:
        kind, found, wanted = "SHA-256", file_sha256(path), remote.sha256
    else:
        found = file_hash(path, hashlib.md5(usedforsecurity=False))
        kind, wanted = "MD5", remote.md5
    if found != wanted:
        raise ValueError(f"{kind} {found[:12]}… instead of {wanted[:12]}…")


def fetch(remote: Remote, folder: Path, timeout: float = 30.0) -> Path:
    """The path of the file in `folder`, downloaded unless it is there with the right checksum.

    The addresses are tried in turn. If all fail, raises ValueError, which says what each answered
    and where to put a copy by hand. A file with a wrong checksum never gets the final name.
    """
    target = folder / remote.name
    if target.is_file() and remote.size in (0, target.stat().st_size):
        with suppress(ValueError):  # it is another file, which stays until the right one is here
            check_hash(target, remote)
            return target
    prepare_cache(folder)
    failures = []
    for url in remote.urls:
        temporary = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            copy_url(url, temporary, remote, timeout)
            check_hash(temporary, remote)
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
    most = remote.size or UNKNOWN_SIZE
    bar = tqdm(total=remote.size or None, unit="B", unit_scale=True, desc=remote.name, disable=None)
    with urllib.request.urlopen(request, timeout=timeout) as answer, path.open("wb") as file, bar:
        written = 0
        while block := answer.read(1 << 16):
            written += len(block)
            if written > most:
                raise ValueError(f"more than the expected {most:,} bytes arrived")
            file.write(block)
            bar.update(len(block))
    if remote.size and written != remote.size:
        raise ValueError(f"{written:,} bytes arrived instead of {remote.size:,}")

"""Files of a Hugging Face repository by name, in the cache that transformers reads and fills too.

    models--owner--repo/refs/main                the commit that "main" was when first seen
    models--owner--repo/snapshots/<commit>/file  a link to ../../blobs/<etag>
    models--owner--repo/blobs/<etag>             the content; a large file's ETag is its SHA-256
    models--owner--repo/.no_exist/<commit>/file  empty: that commit has no such file

What is there is used without a request. So a branch stays at the commit that the cache knows: for
a newer one, give that commit as the revision, or delete refs/main.
"""

import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

from tqdm import tqdm

from data.download import file_sha256, replacing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TIMEOUT = 30.0  # seconds without a byte
MOST = 1 << 34  # bytes of one file
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
ETAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")  # becomes a file name: no dot, no slash
WORD = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
REPOSITORY = re.compile(rf"(?!.*(\.\.|--))({WORD}/)?{WORD}")
PART = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9 !#$%&'()+,.;=@^_{}~\[\]-]+")  # of a path, on any system


@dataclass(frozen=True)
class Entry:
    """What the server says of a file: size in bytes, None if unknown; the token that `url` gets."""

    commit: str
    etag: str
    size: int | None
    url: str
    token: str


def snapshot(
    name: str,
    files: Sequence[str],
    optional: Sequence[str] = (),
    revision: str = "main",
    limit: int = MOST,
) -> Path:
    """The folder that has all of `files` (at least one), and those of `optional` that exist.

    `name` is a folder, which is taken as it is, or "owner/repo" on HF_ENDPOINT (huggingface.co);
    `revision` is a branch, tag or commit there. HF_TOKEN goes to that host only. All files are of
    one commit. With HF_HUB_OFFLINE=1 nothing is asked, and what is optional may be absent. No file
    is larger than `limit` bytes. Raises ValueError: what happened, and what to do about it.
    """
    for file in (*files, *optional, revision):
        if len(file) > 200 or not all(PART.fullmatch(part) for part in file.split("/")):
            raise ValueError(
                f"{file[:80]!r} is no path inside a repository: use at most 200 characters, "
                "which are names of ASCII divided by /"
            )
    if Path(name).is_dir():
        for file in files:
            if not (Path(name) / file).is_file():
                raise ValueError(f"the folder {name} has no {file}: put it there")
        return Path(name)
    if not REPOSITORY.fullmatch(name):
        raise ValueError(
            f"{name!r} is neither a folder nor a repository: name a folder that exists, or "
            "owner/repo of letters, digits, '_', single '.' and '-'"
        )
    home = cache_folder() / f"models--{name.replace('/', '--')}"
    commit = known_commit(home, revision)
    for file in (*files, *optional):
        if commit and (home / "snapshots" / commit / file).is_file():
            continue
        absent = commit and (home / ".no_exist" / commit / file).is_file()
        if file not in files and (absent or (commit and offline())):
            continue
        commit = fetch(name, file, commit or revision, home, limit, needed=file in files)
    return home / "snapshots" / commit


def fetch(name: str, file: str, revision: str, home: Path, limit: int, *, needed: bool) -> str:
    """Puts one file into the cache, or notes that there is none; returns its commit."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/{name}/resolve/{quote(revision, safe='')}/{quote(file)}"
    remedy = f"put {file} of {url} into a folder and name that folder instead of {name}"
    try:
        if offline():
            raise ValueError("HF_HUB_OFFLINE is set, and the cache does not have it")
        entry = describe(url)
        if COMMIT.fullmatch(revision) and entry.commit != revision:
            raise ValueError(f"the server answers with another commit, {entry.commit}")
        blob = home / "blobs" / entry.etag
        with locked(home.parent / ".locks" / home.name / f"{entry.etag}.lock"):
            if not (blob.is_file() and entry.size in (None, blob.stat().st_size)):
                download(entry, blob, file, limit)
            link(blob, home / "snapshots" / entry.commit / file)
        if not COMMIT.fullmatch(revision):
            write(home / "refs" / revision, entry.commit)
        return entry.commit
    except urllib.error.HTTPError as error:
        error.close()
        whole = error.headers.get("X-Error-Code") in ("RepoNotFound", "RevisionNotFound")
        if error.code == 404 and not needed and not whole and COMMIT.fullmatch(revision):
            if error.headers.get("X-Repo-Commit") == revision:
                with suppress(OSError):  # it saves a question, no more
                    write(home / ".no_exist" / revision / file, "")
            return revision
        said = f"the server answered {error.code} {http.client.responses.get(error.code, '')}"
        if error.code in (401, 403):
            remedy = f"set HF_TOKEN if {name} is private or gated, check the name, or {remedy}"
        elif error.code != 404:
            remedy = f"try again later, or {remedy}"
        raise ValueError(f"cannot download {file} of {name} ({said}): {remedy}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        said = str(getattr(error, "reason", "") or error) or type(error).__name__
        said = "".join(c if c.isprintable() else " " for c in said[:300])  # may be a server's words
        if not needed:
            remedy = f"set HF_HUB_OFFLINE=1 to go on without it, or {remedy}"
        raise ValueError(f"cannot download {file} of {name} ({said}): {remedy}") from error


def describe(url: str) -> Entry:
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", token):  # http.client would print it in its complaint
        raise ValueError("HF_TOKEN has a character that no token has")
    answer, url, token = ask("HEAD", url, token)
    answer.close()
    headers = answer.headers
    own = "" if answer.status >= 300 else headers.get("Content-Length", "")  # not of a redirect
    size = headers.get("X-Linked-Size") or own
    etag = headers.get("X-Linked-Etag") or headers.get("ETag") or ""
    etag = etag.removeprefix("W/").strip('"')
    commit = headers.get("X-Repo-Commit", "")
    if not COMMIT.fullmatch(commit) or not ETAG.fullmatch(etag):  # both become names of files
        raise ValueError(f"no hub of models: X-Repo-Commit is {commit!r} and ETag {etag!r}")
    return Entry(commit, etag, int(size) if re.fullmatch("[0-9]{1,18}", size) else None, url, token)


def download(entry: Entry, blob: Path, file: str, limit: int) -> None:
    """The blob is complete and checked, or it is not there; a part of it waits as .incomplete."""
    if (entry.size or 0) > limit:
        raise ValueError(f"its {entry.size:,} bytes are more than the limit of {limit:,}")
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(f"{blob.name}.incomplete")
    start = 0
    # Parts of two tries are joined only where a checksum tells if they fit: not for small files.
    if SHA256.fullmatch(blob.name) and partial.is_file():
        start = partial.stat().st_size
    if start == 0 or start != entry.size:
        receive(entry, partial, start if start < (entry.size or 0) else 0, file, limit)
    if SHA256.fullmatch(blob.name) and (found := file_sha256(partial)) != blob.name:
        partial.unlink()
        raise ValueError(f"SHA-256 {found[:12]}… instead of {blob.name[:12]}…, so it was deleted")
    partial.replace(blob)


def receive(entry: Entry, partial: Path, start: int, file: str, limit: int) -> None:
    """Writes the bytes from `start` on. Those that arrive before a failure stay."""
    try:
        answer, _, _ = ask("GET", entry.url, entry.token, start)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is longer than the file
            partial.unlink()
        raise
    with answer:
        if answer.status != 206:  # the server knows no ranges: this is the whole file
            start = 0
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            partial.unlink(missing_ok=True)  # the next try begins anew
            raise ValueError("the server sent another range than the one asked for")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise ValueError("the server sent it compressed")
        size = entry.size
        if size is None and answer.length is not None:
            size = start + answer.length
        if size is None and not answer.chunked:  # a lost connection would look like the end
            raise ValueError("the server does not say how long it is")
        most = limit if size is None else min(size, limit)
        written = start
        bar = tqdm(total=size, initial=start, unit="B", unit_scale=True, desc=file, disable=None)
        with bar, partial.open("ab" if start else "wb") as out:
            while block := answer.read(1 << 16):
                written += len(block)
                if written > most:
                    break
                out.write(block)
                bar.update(len(block))
    if written > most:
        partial.unlink()
        raise ValueError(f"more than {most:,} bytes arrived")
    if size is not None and written < size:
        raise ValueError(f"{written:,} of {size:,} bytes arrived, a further try goes on from there")


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """`ask` follows redirects itself: urllib would take the token along to any host."""

    def redirect_request(self, *args):
        return None


def ask(method: str, url: str, token: str, start: int = 0):
    """(answer, its address, the token if that is still of the same host, else "").

    A HEAD ends at the hub's redirect to its store: the headers are there, and not in the store's
    answer. Raises HTTPError for what is no success, OSError, HTTPException, ValueError.
    """
    url = follow(url, url)
    opener = urllib.request.build_opener(NoRedirect)
    headers = {"User-Agent": "python", "Accept-Encoding": "identity"}  # sizes are of plain bytes
    if start:
        headers["Range"] = f"bytes={start}-"
    for _ in range(10):
        allowed = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(url, headers=headers | allowed, method=method)
        try:
            return opener.open(request, timeout=TIMEOUT), url, token
        except urllib.error.HTTPError as error:
            if error.code not in (301, 302, 303, 307, 308) or "Location" not in error.headers:
                raise
            error.close()
            target = follow(url, error.headers["Location"])
            if urlsplit(target)[:2] != urlsplit(url)[:2]:  # scheme, host and port
                token = ""
                if method == "HEAD" and "X-Repo-Commit" in error.headers:
                    return error, target, token
            url = target
    raise ValueError("more than 10 redirects")


def follow(url: str, location: str) -> str:
    """Where a redirect leads: never to a file of this machine, nor from https to http."""
    target = urljoin(url, location)
    scheme = urlsplit(target).scheme
    if scheme != "https" and (scheme != "http" or urlsplit(url).scheme == "https"):
        raise ValueError(f"an address of {scheme or 'no'} scheme is not followed")
    return target


def link(blob: Path, path: Path) -> None:
    if path.is_file():  # another process made it while this one waited
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a link to a blob that was deleted
    try:
        path.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:  # Windows allows links to administrators and developers only
        with blob.open("rb") as file, replacing(path) as copy:
            shutil.copyfileobj(file, copy, 1 << 20)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; huggingface_hub waits at the same file. Without flock (Windows, some
    network drives) two may write at once, and size and checksum judge the result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        if fcntl:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def known_commit(home: Path, revision: str) -> str:
    """The commit of a branch or tag as far as the cache knows it, else ""."""
    path = home / "refs" / revision
    if not COMMIT.fullmatch(revision) and path.is_file():
        revision = path.read_text(encoding="utf-8", errors="replace").strip()
    return revision if COMMIT.fullmatch(revision) else ""


def cache_folder() -> Path:
    """Where huggingface_hub keeps its files, by the same variables."""
    above = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    above = os.environ.get("HF_HOME") or f"{above}/huggingface"
    return Path(os.path.expandvars(os.environ.get("HF_HUB_CACHE") or f"{above}/hub")).expanduser()


def offline() -> bool:
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)

"""Files of a repository by name, from a hub and a store on two ports of this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest
import torch
from conftest import peer
from converting import save_opus

import convert
import engine.hub.download
from bpe import Tokenizer
from engine import checkpoint as checkpoints
from engine.config import TrainConfig
from engine.hub.download import ETAG, follow, snapshot
from engine.hub.importing import import_model
from model import GPT, GPTConfig

COMMIT, LATER = "c0ffee" + "0" * 34, "beef" + "0" * 36
SMALL, LARGE = b'{"n_layer": 2}', bytes(range(256)) * 1000  # 256,000 bytes, more than one block
SUM = hashlib.sha256(LARGE).hexdigest()


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers like huggingface.co: small files itself, large ones with an address of its store."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        hub = self.server.hub
        hub.requests.append((self.command, self.server.role, self.path, dict(self.headers)))
        if self.server.role == "store":
            content = hub.files[self.path[1:].partition("?")[0]]
            content = content if hub.stored is None else hub.stored
            return self.body(content, {"ETag": f'"{"5" * 64}"'})  # the store's own sum
        parts = self.path.split("/", 5)
        _, owner, repo, _, revision, file = (urllib.parse.unquote(part) for part in parts)
        if owner == "moved":
            return self.say(307, {"Location": self.path.replace("moved", "owner", 1)})
        headers = {"X-Repo-Commit": hub.commits.get(revision, revision)}
        if file in hub.codes:
            return self.say(*hub.codes[file])
        if repo == "private" and self.headers["Authorization"] != "Bearer secret":
            return self.say(401, {"X-Error-Code": "RepoNotFound"})
        if file not in hub.files:
            return self.say(404, headers | {"X-Error-Code": "EntryNotFound"})
        content = hub.files[file]
        if len(content) < 1000:
            etag = hashlib.sha1(content, usedforsecurity=False).hexdigest()
            return self.body(content, headers | {"ETag": f'W/"{etag}"'} | hub.headers)
        headers |= {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "ETag": '"x"'}
        headers |= {"X-Linked-Size": str(len(content)), "Location": f"{hub.store}/{file}?sign=1"}
        return self.say(302, headers | hub.headers)

    do_GET = do_HEAD

    def say(self, code: int, headers: dict[str, str]):
        self.send_response(code)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def body(self, content: bytes, headers: dict[str, str]):
        hub, code = self.server.hub, 200
        if self.headers["Range"] and hub.ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.say(416, {})
            headers |= {"Content-Range": f"bytes {start + hub.shift}-{len(content) - 1}/*"}
            code, content = 206, content[start:]
        length = {} if hub.lengthless else {"Content-Length": str(len(content))}
        if hub.chunked:
            length = {"Transfer-Encoding": "chunked", "Content-Length": None}
        self.send_response(code)
        for name, value in {**length, **headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        if self.command == "GET":
            content = content[: hub.cut]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content) if hub.chunked else content)
            if hub.chunked and hub.cut is None:
                self.wfile.write(b"0\r\n\r\n")


class Hub:
    """What the servers have, what they do wrong, and what they were asked."""

    def __init__(self):
        self.files = {"config.json": SMALL, "model.safetensors": LARGE, "onnx/model.onnx": LARGE}
        self.stored = None  # what the store has instead of the right content
        self.commits = {"main": COMMIT, "refs/pr/1": LATER}
        self.codes, self.headers, self.requests = {}, {}, []
        self.cut, self.shift, self.ranges = None, 0, True
        self.lengthless = self.chunked = False
        self.url = self.store = ""

    def asked(self) -> list[str]:
        """The requests since the last look."""
        seen = [f"{method} {role}" for method, role, _, _ in self.requests]
        self.requests.clear()
        return seen


@pytest.fixture
def hub(toy, monkeypatch):
    """A hub at HF_ENDPOINT, with an empty cache and no token."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "XDG_CACHE")):
            monkeypatch.delenv(name)
    hub = Hub()
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) for _ in range(2)]
    for server, role in zip(servers, ("hub", "store"), strict=True):
        server.hub, server.role = hub, role
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    hub.url, hub.store = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/")
    monkeypatch.setenv("HF_HUB_CACHE", str(toy / "cache"))
    yield hub
    for server in servers:
        server.shutdown()
        server.server_close()


HOME = Path("cache", "models--owner--repo")
BLOB = HOME / "blobs" / SUM
PARTIAL = HOME / "blobs" / f"{SUM}.incomplete"


def leftovers() -> list[str]:
    """Blobs without a final name, and temporary files."""
    return [p.name for p in Path("cache").rglob("*.*") if p.suffix in (".incomplete", ".part")]


# ---- what is downloaded, and what is not ---------------------------------------------------------


def test_files_land_in_the_layout_of_the_hub_and_are_not_asked_for_again(hub):
    wanted = ["config.json", "model.safetensors", "onnx/model.onnx"]
    folder = snapshot("owner/repo", wanted)
    assert folder == Path.cwd() / HOME / "snapshots" / COMMIT
    assert (folder / "config.json").read_bytes() == SMALL
    assert (folder / "onnx" / "model.onnx").read_bytes() == LARGE
    assert (folder / "onnx" / "model.onnx").readlink() == Path("../../../blobs", SUM)
    assert (HOME / "refs" / "main").read_bytes() == COMMIT.encode()
    assert {p.name for p in (HOME / "blobs").iterdir()} == {SUM, hashlib.sha1(SMALL).hexdigest()}
    small, large, same = ["HEAD hub", "GET hub"], ["HEAD hub", "GET store"], ["HEAD hub"]
    assert hub.asked() == small + large + same  # the same content under two names comes once
    assert snapshot("owner/repo", wanted) == folder
    assert hub.asked() == []


def test_all_files_are_of_the_commit_that_the_first_one_had(hub):
    folder = snapshot("owner/repo", ["config.json"])
    hub.commits["main"] = LATER  # somebody pushes
    assert snapshot("owner/repo", ["config.json", "model.safetensors"]) == folder
    assert f"/resolve/{COMMIT}/model.safetensors" in hub.requests[-2][2]
    assert snapshot("owner/repo", ["config.json"], revision=LATER).name == LATER
    assert not (HOME / "refs" / LATER).exists()  # a commit needs no reference
    hub.codes["tokenizer.json"] = (200, {"X-Repo-Commit": LATER, "ETag": '"a"'})
    with pytest.raises(ValueError, match=f"another commit, {LATER}"):
        snapshot("owner/repo", ["tokenizer.json"])


def test_a_revision_may_have_slashes(hub):
    folder = snapshot("owner/repo", ["config.json"], revision="refs/pr/1")
    assert folder.name == LATER == (HOME / "refs/refs/pr/1").read_text(encoding="utf-8")
    assert "/resolve/refs%2Fpr%2F1/" in hub.requests[0][2]


def test_a_blob_that_was_deleted_comes_again(hub):
    folder = snapshot("owner/repo", ["model.safetensors"])
    BLOB.unlink()
    assert not (folder / "model.safetensors").exists()  # a dangling link
    snapshot("owner/repo", ["model.safetensors"])
    assert BLOB.read_bytes() == LARGE
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/gone")
    snapshot("owner/repo", ["model.safetensors"])
    assert (folder / "model.safetensors").readlink() == Path("../../blobs", SUM)
    BLOB.write_bytes(b"half")
    (folder / "model.safetensors").unlink()
    snapshot("owner/repo", ["model.safetensors"])
    assert BLOB.read_bytes() == LARGE


def test_optional_files_may_be_absent_and_that_is_remembered(hub):
    folder = snapshot("owner/repo", ["config.json"], ["merges.txt", "model.safetensors"])
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (HOME / ".no_exist" / COMMIT / "merges.txt").read_bytes() == b""
    hub.asked()
    snapshot("owner/repo", ["config.json"], ["merges.txt"])
    assert hub.asked() == []
    with pytest.raises(ValueError, match=r"answered 404 Not Found\): put merges\.txt of http"):
        snapshot("owner/repo", ["merges.txt"])
    hub.codes["vocab.json"] = (404, {"X-Error-Code": "RepoNotFound"})
    with pytest.raises(ValueError, match="404"):  # not the file is absent, all is
        snapshot("owner/repo", ["config.json"], ["vocab.json"])


def test_without_links_the_file_is_copied(hub, monkeypatch):
    def refuse(*args):
        raise OSError("a required privilege is not held")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    folder = snapshot("owner/repo", ["model.safetensors"])
    assert not (folder / "model.safetensors").is_symlink()
    assert (folder / "model.safetensors").read_bytes() == LARGE
    assert leftovers() == []


def test_a_folder_is_taken_as_it_is(hub):
    Path("mine/onnx").mkdir(parents=True)
    Path("mine/onnx/model.onnx").write_bytes(b"x")
    assert snapshot("mine", ["onnx/model.onnx"], ["config.json"]) == Path("mine")
    with pytest.raises(ValueError, match=r"the folder mine has no config\.json: put it there"):
        snapshot("mine", ["config.json"])
    assert hub.asked() == []


def test_the_cache_lies_where_the_variables_say(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE")
    assert engine.hub.download.cache_folder() == tmp_path / ".cache/huggingface/hub"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert engine.hub.download.cache_folder() == tmp_path / "cache/huggingface/hub"
    monkeypatch.setenv("HF_HOME", "~/models")
    assert engine.hub.download.cache_folder() == tmp_path / "models/hub"
    monkeypatch.setenv("HF_HUB_CACHE", "$HF_HOME/other")
    assert engine.hub.download.cache_folder() == tmp_path / "models/other"


def test_without_network_the_cache_is_enough(hub, monkeypatch):
    folder = snapshot("owner/repo", ["config.json"])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert snapshot("owner/repo", ["config.json"]) == folder
    with pytest.raises(ValueError, match=r"refused.*set HF_HUB_OFFLINE=1 to go on without it"):
        snapshot("owner/repo", ["config.json"], ["vocab.json"])
    with pytest.raises(ValueError, match=r"refused.*\): put vocab\.json of http://127\.0\.0\.1:9/"):
        snapshot("owner/repo", ["vocab.json"])


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_nothing_is_asked(hub, monkeypatch, variable):
    folder = snapshot("owner/repo", ["config.json"])
    hub.asked()
    monkeypatch.setenv(variable, "1")
    assert snapshot("owner/repo", ["config.json"], ["model.safetensors"]) == folder
    for name, file in (("owner/repo", "model.safetensors"), ("owner/other", "config.json")):
        with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set, and the cache does not"):
            snapshot(name, [file], [file])
    assert hub.asked() == []


# ---- the token -----------------------------------------------------------------------------------


def test_the_token_goes_to_the_hub_and_to_no_other_host(hub, monkeypatch):
    with pytest.raises(ValueError, match=r"answered 401 Unauthorized\): set HF_TOKEN if owner/pri"):
        snapshot("owner/private", ["config.json"])
    monkeypatch.setenv("HF_TOKEN", "secret\n")
    hub.asked()
    snapshot("moved/private", ["config.json", "model.safetensors"])  # a redirect on the same host
    sent = {(role, headers.get("Authorization")) for _, role, _, headers in hub.requests}
    assert sent == {("hub", "Bearer secret"), ("store", None)}
    moved = ["HEAD hub", "HEAD hub"]
    assert hub.asked() == [*moved, "GET hub", *moved, "GET store"]


def test_a_mirror_that_redirects_to_a_hub_works_and_keeps_the_token(hub, monkeypatch):
    """The mirror's redirect has no metadata, so the question itself is followed, unsigned."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.codes["config.json"] = (308, {"Location": f"{hub.store}/x"})
    hub.files["x"] = SMALL
    with pytest.raises(ValueError, match="no hub of models: X-Repo-Commit is ''"):
        snapshot("owner/repo", ["config.json"])
    assert [headers.get("Authorization") for *_, headers in hub.requests] == ["Bearer secret", None]


def test_a_token_that_cannot_be_sent_is_not_printed(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "sec\nret")
    with pytest.raises(ValueError, match="HF_TOKEN has a character") as error:
        snapshot("owner/repo", ["config.json"])
    assert "sec" not in str(error.value)
    assert hub.asked() == []


def test_redirects_stay_on_the_web_and_encrypted(hub):
    assert follow("https://a.b/c/d", "../e?f") == "https://a.b/e?f"
    assert follow("http://a.b/c", "https://d.e/") == "https://d.e/"
    for url, location in (("https://a.b/", "http://a.b/"), ("http://a.b/", "file:///etc/passwd")):
        with pytest.raises(ValueError, match="is not followed"):
            follow(url, location)
    hub.codes["config.json"] = (302, {"Location": "file:///etc/passwd"})
    with pytest.raises(ValueError, match="file scheme is not followed"):
        snapshot("owner/repo", ["config.json"])
    hub.codes["config.json"] = (307, {"Location": "config.json"})
    with pytest.raises(ValueError, match="more than 10 redirects"):
        snapshot("owner/repo", ["config.json"])


@pytest.mark.parametrize(
    "endpoint,message",
    [
        ("file:///etc", "an address of file scheme is not followed"),
        ("huggingface.co", "an address of no scheme is not followed"),
        ("http://", "no host given"),
        ("http://a b", "URL can't contain control characters"),
    ],
)
def test_an_endpoint_that_is_no_address_is_refused(hub, monkeypatch, endpoint, message):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(ValueError, match=rf"^cannot download config\.json of .* \(.*{message}"):
        snapshot("owner/repo", ["config.json"])


# ---- interruptions, damage and lies --------------------------------------------------------------


def test_an_interrupted_download_goes_on_where_it_stopped(hub):
    hub.cut = 100_000
    with pytest.raises(ValueError, match="100,000 of 256,000 bytes arrived"):
        snapshot("owner/repo", ["model.safetensors"])
    assert PARTIAL.read_bytes() == LARGE[:100_000] and not BLOB.exists()
    assert not (HOME / "refs").exists() and not (HOME / "snapshots").exists()
    hub.cut = None
    folder = snapshot("owner/repo", ["model.safetensors"])
    assert hub.requests[-1][3]["Range"] == "bytes=100000-"
    assert (folder / "model.safetensors").read_bytes() == LARGE
    assert leftovers() == []


def test_a_server_without_ranges_sends_it_anew(hub):
    hub.ranges = False
    PARTIAL.parent.mkdir(parents=True)
    PARTIAL.write_bytes(b"x" * 1000)  # would be a wrong start, if it were kept
    assert (snapshot("owner/repo", ["model.safetensors"]) / "model.safetensors").is_file()
    assert BLOB.read_bytes() == LARGE and "Range" in hub.requests[-1][3]


@pytest.mark.parametrize("part", [LARGE, LARGE + b"more", b""])
def test_parts_that_leave_nothing_to_ask_for(hub, part):
    PARTIAL.parent.mkdir(parents=True)
    PARTIAL.write_bytes(part)
    snapshot("owner/repo", ["model.safetensors"])
    assert BLOB.read_bytes() == LARGE and leftovers() == []
    assert hub.asked() == (["HEAD hub"] if part == LARGE else ["HEAD hub", "GET store"])
    assert all("Range" not in headers for *_, headers in hub.requests)


def test_small_files_begin_anew_because_no_checksum_tells_whether_parts_fit(hub):
    blobs = HOME / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha1(SMALL).hexdigest()}.incomplete").write_bytes(b"xxxx")
    folder = snapshot("owner/repo", ["config.json"])
    assert (folder / "config.json").read_bytes() == SMALL


def test_a_wrong_part_is_found_by_the_checksum_and_deleted(hub):
    PARTIAL.parent.mkdir(parents=True)
    PARTIAL.write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match=rf"SHA-256 .*… instead of {SUM[:12]}…, so it was deleted"):
        snapshot("owner/repo", ["model.safetensors"])
    assert leftovers() == [] and not BLOB.exists()
    snapshot("owner/repo", ["model.safetensors"])
    assert BLOB.read_bytes() == LARGE


@pytest.mark.parametrize(
    "stored,shift,message", [(LARGE[:500], 0, "416"), (LARGE, 1, "another ra")]
)
def test_ranges_that_cannot_be_joined_are_dropped(hub, stored, shift, message):
    PARTIAL.parent.mkdir(parents=True)
    PARTIAL.write_bytes(LARGE[:1000])
    hub.stored, hub.shift = stored, shift
    with pytest.raises(ValueError, match=message):
        snapshot("owner/repo", ["model.safetensors"])
    assert leftovers() == []
    hub.stored = LARGE
    snapshot("owner/repo", ["model.safetensors"])
    assert BLOB.read_bytes() == LARGE


def test_more_than_was_said_is_not_kept(hub):
    hub.stored = LARGE + b"more"
    with pytest.raises(ValueError, match="more than 256,000 bytes arrived"):
        snapshot("owner/repo", ["model.safetensors"])
    assert leftovers() == [] and not BLOB.exists()


@pytest.mark.parametrize("headers", [{}, {"X-Linked-Size": "many"}])
def test_the_limit_holds_whatever_the_server_says(hub, headers):
    hub.headers = headers
    with pytest.raises(ValueError, match=r"than the limit of 5,000\)|more than 5,000 bytes arr"):
        snapshot("owner/repo", ["model.safetensors"], limit=5000)
    assert leftovers() == []
    hub.chunked = True  # endless, as far as anyone can know
    with pytest.raises(ValueError, match="more than 10 bytes arrived"):
        snapshot("owner/repo", ["config.json"], limit=10)
    assert leftovers() == []


def test_a_size_of_10_to_the_12_is_refused_before_it_is_asked_for(hub):
    hub.headers = {"X-Linked-Size": str(10**12)}
    with pytest.raises(ValueError, match="1,000,000,000,000 bytes are more than the limit"):
        snapshot("owner/repo", ["model.safetensors"])
    assert hub.asked() == ["HEAD hub"]


def test_files_of_unknown_size_come_whole_or_not_at_all(hub):
    hub.headers = {"X-Linked-Size": ""}  # and the redirect's own length is 0
    snapshot("owner/repo", ["model.safetensors"])
    assert BLOB.read_bytes() == LARGE
    hub.headers = {}
    hub.chunked, hub.cut = True, 5
    with pytest.raises(ValueError, match="IncompleteRead"):
        snapshot("owner/repo", ["config.json"])
    assert not (HOME / "snapshots" / COMMIT / "config.json").exists()
    hub.cut = None
    folder = snapshot("owner/repo", ["config.json"])
    assert (folder / "config.json").read_bytes() == SMALL
    hub.chunked, hub.lengthless = False, True
    hub.files["vocab.json"] = b"{}"
    with pytest.raises(ValueError, match="does not say how long it is"):
        snapshot("owner/repo", ["vocab.json"])
    hub.lengthless, hub.headers = False, {"Content-Encoding": "gzip"}
    with pytest.raises(ValueError, match="sent it compressed"):
        snapshot("owner/repo", ["vocab.json"])
    assert not (folder / "vocab.json").exists()


def test_a_cache_that_cannot_be_written_is_one_sentence(hub):
    HOME.mkdir(parents=True)
    (HOME / "refs").write_bytes(b"")  # a file where a folder should be
    with pytest.raises(ValueError, match=r"^cannot download config\.json .*refs.*\): put config"):
        snapshot("owner/repo", ["config.json"])


@pytest.mark.parametrize("code,remedy", [(403, "set HF_TOKEN"), (500, "try again"), (404, "put")])
def test_refusals_say_what_the_server_answered(hub, code, remedy):
    hub.codes["config.json"] = (code, {"X-Repo-Commit": COMMIT})
    with pytest.raises(ValueError, match=rf"the server answered {code} .*\): {remedy}") as error:
        snapshot("owner/repo", ["config.json"])
    assert f"{hub.url}/owner/repo/resolve/main/config.json" in str(error.value)
    if code != 404:  # only an answer of 404 says that a file is absent
        with pytest.raises(ValueError, match=f"answered {code}"):
            snapshot("owner/repo", ["model.safetensors"], ["config.json"])


def test_a_server_that_is_silent(hub, monkeypatch):
    monkeypatch.setattr(engine.hub.download, "TIMEOUT", 0.2)
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as silent:  # accepts and says nothing
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.server_address[1]}")
        with pytest.raises(ValueError, match="timed out"):
            snapshot("owner/repo", ["config.json"])


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Repo-Commit": "../../evil"},
        {"X-Repo-Commit": ""},
        {"ETag": '"../../../evil"'},
        {"ETag": f'"{"a" * 200}"'},
        {"ETag": ""},
    ],
)
def test_headers_that_become_names_are_checked(hub, headers):
    hub.headers = headers
    with pytest.raises(ValueError, match="no hub of models"):
        snapshot("owner/repo", ["config.json"])
    assert not Path("cache").exists()


def test_an_etag_cannot_be_that_of_a_part():
    assert not ETAG.fullmatch(f"{SUM}.incomplete")


def test_a_reference_that_is_no_commit_is_asked_for_again(hub):
    (HOME / "refs").mkdir(parents=True)
    (HOME / "refs" / "main").write_bytes(b"../../..\xff")
    assert snapshot("owner/repo", ["config.json"]).name == COMMIT
    assert (HOME / "refs" / "main").read_bytes() == COMMIT.encode()


@pytest.mark.parametrize(
    "name",
    ["../repo", "owner/..", "a/b/c", "owner/", "/repo", "a--b", "a b/c", "a/b..c", "x" * 97, "é/é"],
)
def test_names_of_repositories_are_checked(hub, name):
    with pytest.raises(ValueError, match="is neither a folder nor a repository"):
        snapshot(name, ["config.json"])
    assert hub.asked() == []


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "/etc/passwd",
        "a/../../x",
        "a//b",
        "",
        ".",
        "a/",
        "a\\..\\x",
        "C:x",
        "a\n",
        "é",
        "a/" * 101 + "a",
        "\0",
    ],
)
def test_paths_that_climb_out_are_refused(hub, path):
    Path("mine").mkdir()
    for call in (
        {"name": "owner/repo", "files": [path]},
        {"name": "owner/repo", "files": ["config.json"], "optional": [path]},
        {"name": "owner/repo", "files": ["config.json"], "revision": path},
        {"name": "mine", "files": [path]},
    ):
        with pytest.raises(ValueError, match="is no path inside a repository"):
            snapshot(**call)
    assert hub.asked() == []


def test_one_process_at_a_time_downloads_a_file(hub):
    pytest.importorskip("fcntl")
    lock = Path("cache/.locks/models--owner--repo") / f"{SUM}.lock"
    other = threading.Thread(target=snapshot, args=("owner/repo", ["model.safetensors"]))
    with engine.hub.download.locked(lock):
        other.start()
        other.join(0.5)
        assert other.is_alive() and "GET store" not in hub.asked()
        BLOB.parent.mkdir(parents=True)
        BLOB.write_bytes(LARGE)  # what the other process was about
    other.join(10)
    assert hub.asked() == [] and (HOME / "snapshots" / COMMIT / "model.safetensors").is_file()


# ---- the same cache as huggingface_hub -----------------------------------------------------------


def test_huggingface_hub_finds_what_we_downloaded(hub):
    theirs = peer("huggingface_hub")
    folder = snapshot("owner/repo", ["config.json", "onnx/model.onnx"], ["vocab.json"])
    cache = Path.cwd() / "cache"
    for file in ("config.json", "onnx/model.onnx"):
        assert theirs.try_to_load_from_cache("owner/repo", file, cache) == str(folder / file)
        found = theirs.hf_hub_download("owner/repo", file, cache_dir=cache, local_files_only=True)
        assert found == str(folder / file)
    absent = theirs.try_to_load_from_cache("owner/repo", "vocab.json", cache)
    assert absent is theirs._CACHED_NO_EXIST
    (repo,) = theirs.scan_cache_dir(cache).repos
    assert (repo.repo_id, repo.nb_files, repo.size_on_disk) == ("owner/repo", 2, 256_014)
    assert repo.refs["main"].commit_hash == COMMIT
    assert not theirs.scan_cache_dir(cache).warnings


def test_what_huggingface_hub_downloaded_is_used(hub):
    """A process of its own, because it reads HF_ENDPOINT when it is imported."""
    peer("huggingface_hub")
    script = """if True:
        from huggingface_hub import hf_hub_download
        for file in ("config.json", "onnx/model.onnx", "vocab.json"):
            try:
                print(hf_hub_download("owner/repo", file))
            except Exception as error:
                print(type(error).__name__)
    """
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"},
    )
    config, model, absent = done.stdout.split()
    assert hub.asked() and "EntryNotFound" in absent
    folder = snapshot("owner/repo", ["config.json", "onnx/model.onnx"], ["vocab.json"])
    assert [str(folder / "config.json"), str(folder / "onnx" / "model.onnx")] == [config, model]
    assert (folder / "onnx" / "model.onnx").read_bytes() == LARGE
    assert hub.asked() == []


def test_a_translator_comes_with_its_sentencepiece_models(hub):
    theirs = save_opus(Path("there"))
    files = {path.name: path.read_bytes() for path in Path("there").iterdir()}
    hub.files = {**files, "README.md": b"not asked for"}
    convert.main(["import", "owner/opus", "--out=opus.pt"])
    paths = [path.partition("?")[0] for method, _, path, _ in hub.requests if method == "GET"]
    asked = {path.rpartition("/")[2] for path in paths}
    assert {"source.spm", "target.spm", "vocab.json"} <= asked and "README.md" not in asked
    found, _ = import_model("there")
    again = checkpoints.load(Path("opus.pt"))
    assert again["tokenizer_hash"] == found["tokenizer_hash"]
    assert torch.equal(again["model"]["output_bias"], theirs.final_logits_bias[0])


@pytest.mark.parametrize("form", ["safetensors", "bin", "shards"])
def test_a_model_is_imported_by_its_name(hub, form):
    """Out to a folder, onto the hub, and in again under its name, then without the hub."""
    safetensors = pytest.importorskip("safetensors.torch")
    tokenizer = Tokenizer.train(["one two three"] * 3, 260)
    model = GPT(GPTConfig(300, 16, 2, 2, 24))
    state = {"optimizer": {}, "step": 0, "best": 1.0, "skipped": 0, "data": ""}
    packed = checkpoints.pack("gpt", model, tokenizer, train_config=TrainConfig(), **state)
    checkpoints.save(Path("ours.pt"), packed)
    convert.main(["export", "ours.pt", "--to=theirs"])
    files = {path.name: path.read_bytes() for path in Path("theirs").iterdir()}
    if form != "safetensors":
        tensors = safetensors.load(files.pop("model.safetensors"))
        if form == "bin":
            torch.save(tensors, "theirs.bin")
            files["pytorch_model.bin"] = Path("theirs.bin").read_bytes()
        else:
            placed = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
            index = json.dumps({"weight_map": placed}).encode()
            files["model.safetensors.index.json"] = index
            for shard in set(placed.values()):
                part = {name: t for name, t in tensors.items() if placed[name] == shard}
                files[shard] = safetensors.save(part)
    hub.files = files
    convert.main(["import", "owner/model", "--out=again.pt"])
    hub.url = hub.files = None  # whatever is asked now fails
    hub.requests.clear()
    convert.main(["import", "owner/model", "--out=cached.pt"])
    assert not hub.requests
    for path in ("again.pt", "cached.pt"):
        found = checkpoints.load(Path(path))
        assert found["tokenizer_hash"] == tokenizer.hash
        assert found["model"].keys() == packed["model"].keys()
        assert all(torch.equal(found["model"][name], t) for name, t in packed["model"].items())

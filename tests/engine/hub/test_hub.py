"""A model by its name on the hub, from a hub and its store of large files on two ports of this
machine. huggingface_hub talks to them; these tests are about what we ask of it, and what we say."""

import errno
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
from conftest import ROOT, peer
from converting import foreign, save_opus

import convert
from bpe import Tokenizer
from engine import checkpoint as checkpoints
from engine.hub.download import snapshot
from engine.hub.importing import import_model
from model import GPT, GPTConfig
from tasks.flags import TrainConfig

COMMIT, LATER = "c0ffee" + "0" * 34, "beef" + "0" * 36
LARGE = 1000  # bytes from which on a file lies in the store


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers like huggingface.co: lists and small files itself, large ones from its store."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        hub, path = self.server.hub, self.path.partition("?")[0]
        hub.requests.append((self.command, self.server.role, path, dict(self.headers)))
        if self.server.role == "store":
            return self.body(hub.files[path[1:]], {})
        if hub.refusal:
            return self.say(*hub.refusal)
        parts = [urllib.parse.unquote(part) for part in path.split("/")[1:]]
        if parts[2] == "private" and self.headers["Authorization"] != "Bearer secret":
            return self.say(401, {"X-Error-Code": "RepoNotFound"})
        if parts[0] == "api":
            _, _, _, _, kind, revision = parts
            names = [*hub.files, *hub.listed]
            listed = [
                {"type": "file", "path": n, "oid": "0", "size": len(hub.files.get(n, b""))}
                for n in names
            ]
            about = {"id": "owner/model", "sha": hub.commits.get(revision, revision)}
            about["siblings"] = [{"rfilename": name} for name in names]
            found = json.dumps(about if kind == "revision" else listed).encode()
            return self.body(found, {"Content-Type": "application/json"})
        revision, file = parts[3], "/".join(parts[4:])
        headers = {"X-Repo-Commit": hub.commits.get(revision, revision)}
        if file not in hub.files:
            return self.say(404, headers | {"X-Error-Code": "EntryNotFound"})
        content = hub.files[file]
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        if len(content) < LARGE:
            return self.body(content, headers)
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
        return self.say(302, headers | {"Location": f"{hub.store}/{file}?sign=1"})

    do_GET = do_HEAD

    def say(self, code: int, headers: dict[str, str]):
        self.send_response(code)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def body(self, content: bytes, headers: dict[str, str]):
        """Sends the content, or what Range asks for, or as many bytes as hub.cuts says next."""
        hub, code, start, size = self.server.hub, 200, 0, len(content)
        path = self.path.partition("?")[0]
        if self.headers["Range"]:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            code = 206
        self.send_response(code)
        for name, value in {"Content-Length": str(size - start), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            end = size
            if path == "/model.safetensors" and hub.cuts:
                end, self.close_connection = start + hub.cuts.pop(0), True
            self.wfile.write(content[start:end])


class Hub:
    """What the servers have, what they do wrong, and what they were asked."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.listed: list[str] = []  # more names in the list of files
        self.commits = {"main": COMMIT}
        self.refusal: tuple[int, dict[str, str]] | None = None
        self.cuts: list[int] = []  # bytes of the weights that come each time before it hangs up
        self.requests, self.url, self.store = [], "", ""

    def downloaded(self) -> list[str]:
        """The files whose content was asked for since the last look, sorted."""
        small = [p for method, role, p, _ in self.requests if (method, role) == ("GET", "hub")]
        found = {p.partition("/resolve/")[2].partition("/")[2] for p in small} - {""}
        found |= {p[1:] for _, role, p, _ in self.requests if role == "store"}
        self.requests.clear()
        return sorted(found)


@pytest.fixture
def hub(toy, monkeypatch):
    """A hub with one model, an empty cache and no token. The library reads the environment when it
    is imported; another test sets the variables themselves."""
    constants = peer("huggingface_hub.constants")
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")):
            monkeypatch.delenv(name)
    hub = Hub()
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) for _ in range(2)]
    for server, role in zip(servers, ("hub", "store"), strict=True):
        server.hub, server.role = hub, role
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    hub.url, hub.store = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    hub.files = files_of_a_model()
    use_hub(monkeypatch, hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(toy / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(toy / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the tries of the library
    yield hub
    for server in servers:
        server.shutdown()
        server.server_close()


def use_hub(monkeypatch, url: str) -> None:
    constants = peer("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def files_of_a_model() -> dict[str, bytes]:
    """ours.pt, a small GPT, and the files that convert.py makes of it."""
    pytest.importorskip("safetensors")
    tokenizer = Tokenizer.train(["one two three"] * 3, 260)
    model = GPT(GPTConfig(300, 16, 2, 2, 24))
    state = {"optimizer": {}, "step": 0, "best": 1.0, "skipped": 0, "data": ""}
    packed = checkpoints.pack("gpt", model, tokenizer, train_config=TrainConfig(), **state)
    checkpoints.save(Path("ours.pt"), packed)
    convert.main(["export", "ours.pt", "--to=theirs"])
    return {path.name: path.read_bytes() for path in Path("theirs").iterdir()}


def assert_ours(path: str) -> None:
    found, ours = checkpoints.load(Path(path)), checkpoints.load(Path("ours.pt"))
    assert found["tokenizer"] == foreign(Tokenizer.from_json(ours["tokenizer"])).to_json()
    assert found["model"].keys() == ours["model"].keys()
    assert all(torch.equal(found["model"][name], t) for name, t in ours["model"].items())


SNAPSHOT = Path("cache", "models--owner--model", "snapshots", COMMIT)
NEEDED = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def unfinished() -> list[str]:
    return [path.name for path in Path("cache").rglob("*.incomplete")]


# ---- what is downloaded, and what is not ---------------------------------------------------------


def in_form(files: dict[str, bytes], form: str) -> tuple[dict[str, bytes], list[str]]:
    """(the files with the weights in this form, the names of those that have to be downloaded)."""
    safetensors = peer("safetensors.torch")
    files, rest = dict(files), [name for name in NEEDED if name != "model.safetensors"]
    tensors = safetensors.load(files["model.safetensors"])

    def packed(tensors: dict, name: str) -> bytes:
        if name.endswith(".safetensors"):
            return safetensors.save(tensors)
        torch.save(tensors, "theirs.bin")
        return Path("theirs.bin").read_bytes()

    files["pytorch_model.bin"] = packed(tensors, ".bin")
    if form == "safetensors":
        return files, NEEDED
    del files["model.safetensors"]
    if form == "bin":
        return files, sorted([*rest, "pytorch_model.bin"])
    suffix = form.partition(" ")[0]
    placed = {name: f"part-{i % 2}[a*].{suffix}" for i, name in enumerate(tensors)}
    index = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    index = f"{index}.index.json"
    files[index] = json.dumps({"weight_map": placed}).encode()
    for shard in set(placed.values()):
        part = {name: t for name, t in tensors.items() if placed[name] == shard}
        files[shard] = packed(part, shard)
        files[shard.replace("[a*]", "a")] = b"what the name would mean as a pattern"
    return files, sorted([*rest, index, *set(placed.values())])


@pytest.mark.parametrize("form", ["safetensors", "bin", "safetensors shards", "bin shards"])
def test_a_model_is_imported_by_its_name(hub, form, monkeypatch):
    """Only what is read is downloaded: no pickles if there are safetensors."""
    hub.files, needed = in_form(hub.files, form)
    hub.files |= {"README.md": b"x", "tf_model.h5": b"x", "onnx/config.json": b"x"}
    convert.main(["import", "owner/model", "--out=first.pt"])
    assert hub.downloaded() == needed
    convert.main(["import", "owner/model", "--out=second.pt"])
    assert hub.downloaded() == []
    use_hub(monkeypatch, "http://127.0.0.1:9")  # nobody listens
    convert.main(["import", "owner/model", "--out=third.pt"])
    for path in ("first.pt", "second.pt", "third.pt"):
        assert_ours(path)
    assert not list(Path("cache").rglob("README.md"))


def test_a_translator_comes_with_its_sentencepiece_models(hub):
    theirs = save_opus(Path("there"))
    files = {path.name: path.read_bytes() for path in Path("there").iterdir()}
    hub.files = {**files, "README.md": b"not asked for"}
    convert.main(["import", "owner/opus", "--out=opus.pt"])
    asked = hub.downloaded()
    assert {"source.spm", "target.spm", "vocab.json"} <= {*asked} and "README.md" not in asked
    found, _ = import_model("there")
    reloaded = checkpoints.load(Path("opus.pt"))
    assert reloaded["tokenizer_hash"] == found["tokenizer_hash"]
    assert torch.equal(reloaded["model"]["output_bias"], theirs.final_logits_bias[0])


def test_all_files_are_of_the_commit_that_the_first_ones_had(hub, monkeypatch):
    hub.files, _ = in_form(hub.files, "bin")
    answer = Answer.do_HEAD

    def push_after_the_config(self):  # somebody pushes before the weights are asked for
        answer(self)
        if self.path.endswith("/config.json"):
            hub.commits["main"] = LATER

    monkeypatch.setattr(Answer, "do_GET", push_after_the_config)
    convert.main(["import", "owner/model", "--out=first.pt"])
    resolved = [path for *_, path, _ in hub.requests if "/resolve/" in path]
    assert any(path.endswith(f"/{COMMIT}/pytorch_model.bin") for path in resolved)
    assert not any(LATER in path for path in resolved)


def test_a_newer_commit_is_used(hub):
    snapshot("owner/model", ["config.json"])
    hub.commits["main"] = LATER
    assert snapshot("owner/model", ["config.json"]).name == LATER
    assert hub.downloaded() == ["config.json"]  # once: the content is the same


def test_a_hostile_list_of_files_leads_nowhere(hub):
    hub.listed = [
        "../../evil",
        "/etc/evil",
        "a/../../../evil",
        "..\\evil",
        "config.json/../../evil",
    ]
    convert.main(["import", "owner/model", "--out=first.pt"])
    assert hub.downloaded() == NEEDED and not list(Path.cwd().rglob("*evil*"))
    hub.files = {n: content for n, content in hub.files.items() if n != "model.safetensors"}
    placed = json.dumps({"weight_map": {"a": "../../evil.safetensors"}}).encode()
    hub.files["model.safetensors.index.json"] = placed
    hub.commits["main"] = LATER
    with pytest.raises(ValueError, match="which is no file beside it"):
        convert.main(["import", "owner/model", "--out=second.pt"])
    assert not any("evil" in path for *_, path, _ in hub.requests)


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_what_a_repository_lacks_is_named(hub, lost):
    del hub.files[lost]
    with pytest.raises(ValueError, match=rf"{COMMIT}.* neither {lost}|has no {lost} in .*{COMMIT}"):
        convert.main(["import", "owner/model", "--out=first.pt"])
    assert not Path("first.pt").exists()


# ---- interruptions -------------------------------------------------------------------------------


def test_an_interrupted_download_goes_on_where_it_stopped(hub, monkeypatch):
    """It goes on within one call, at the last whole block; the library's blocks have 10 MB."""
    monkeypatch.setattr(peer("huggingface_hub.constants"), "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cuts = [20_000]
    convert.main(["import", "owner/model", "--out=first.pt"])
    asked = [h for _, role, path, h in hub.requests if path == "/model.safetensors"]
    assert [h.get("Range", h.get("range")) for h in asked] == [None, "bytes=20000-"]
    assert_ours("first.pt")
    assert not unfinished()


def test_a_failed_download_leaves_no_half_file_and_the_next_one_fetches_the_rest(hub):
    hub.cuts = [100, *[0] * 100]
    with pytest.raises(ValueError, match=r"^cannot download owner/model \(.*\): check the network"):
        convert.main(["import", "owner/model", "--out=first.pt"])
    assert not Path("first.pt").exists() and not (SNAPSHOT / "model.safetensors").exists()
    hub.downloaded()
    hub.cuts = []
    convert.main(["import", "owner/model", "--out=first.pt"])
    assert "model.safetensors" in hub.downloaded()
    assert_ours("first.pt")


# ---- the cache of transformers -------------------------------------------------------------------


def test_transformers_finds_what_we_downloaded(hub):
    transformers, cache = peer("transformers"), {"cache_dir": "cache", "local_files_only": True}
    convert.main(["import", "owner/model", "--out=first.pt"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained("owner/model", **cache)
    tokens = torch.arange(9)[None]
    ours, _ = checkpoints.restore(Path("ours.pt"), checkpoints.load(Path("ours.pt")))
    torch.testing.assert_close(ours.eval()(tokens), theirs(tokens).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained("owner/model", **cache)
    assert tokenizer("one two")["input_ids"]


def test_what_was_downloaded_for_transformers_is_used(hub, monkeypatch):
    """It downloads file by file, and lists nothing."""
    theirs = peer("huggingface_hub")
    for file in NEEDED:
        theirs.hf_hub_download("owner/model", file)
    hub.downloaded()
    convert.main(["import", "owner/model", "--out=first.pt"])
    assert hub.downloaded() == []
    monkeypatch.setattr(peer("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    convert.main(["import", "owner/model", "--out=second.pt"])
    assert_ours("second.pt")
    assert not hub.requests


@pytest.mark.slow
def test_the_environment_says_where_from_and_where_to(hub):
    """In a process of its own, because the library reads these variables when it is imported."""
    said = {"HF_HOME": "home", "HF_ENDPOINT": hub.url, "HF_TOKEN": "secret"}

    def run(**more: str) -> str:
        command = [sys.executable, str(ROOT / "convert.py"), "import", "owner/private"]
        command += ["--out=first.pt"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | said | more)
        return done.stderr

    printed = run(HF_HOME="empty", HF_HUB_OFFLINE="1")
    assert printed.startswith("error: cannot download owner/private (HF_HUB_OFFLINE is set, and")
    assert not hub.requests
    run()
    assert_ours("first.pt")
    assert hub.downloaded() == NEEDED
    assert Path("home/hub/models--owner--private/refs/main").read_text("utf-8") == COMMIT


def test_the_token_goes_to_the_hub_and_not_to_the_store(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    convert.main(["import", "owner/private", "--out=first.pt"])
    sent = {
        (role, headers.get("Authorization", headers.get("authorization")))
        for _, role, _, headers in hub.requests
    }
    assert sent == {("hub", "Bearer secret"), ("store", None)}


# ---- errors are one sentence each ----------------------------------------------------------------

FOLDER = ", or name a folder that has its files"


@pytest.mark.parametrize(
    "refusal,message",
    [
        (
            (401, {"X-Error-Code": "RepoNotFound"}),
            "401 Unauthorized): check the name, set HF_TOKEN",
        ),
        ((404, {"X-Error-Code": "RepoNotFound"}), "404 Not Found): check the name, set HF_TOKEN"),
        ((404, {"X-Error-Code": "RevisionNotFound"}), "404 Not Found): check the name"),
        ((403, {"X-Error-Code": "GatedRepo"}), "403 Forbidden): accept its conditions on its page"),
        ((403, {}), "403 Forbidden): check the name"),
        ((500, {}), "500 Internal Server Error): try again later"),
        ((503, {}), "503 Service Unavailable): try again later"),
    ],
    ids=str,
)
def test_refusals_say_what_the_server_answered(hub, refusal, message):
    hub.refusal = refusal
    with pytest.raises(ValueError) as error:
        convert.main(["import", "owner/model", "--out=first.pt"])
    said = str(error.value)
    assert said.startswith(f"cannot download owner/model (the server answered {message}"), said
    assert said.endswith(FOLDER) and "\n" not in said


@pytest.mark.parametrize(
    "endpoint,message",
    [
        ("http://127.0.0.1:9", "refused"),
        ("huggingface.co", "protocol"),
        ("file:///etc", "protocol"),
        ("http://", "host|protocol"),
    ],
)
def test_a_hub_that_cannot_be_reached(hub, monkeypatch, endpoint, message):
    use_hub(monkeypatch, endpoint)
    wanted = (
        rf"^cannot download owner/model \(.*({message}).*\): check the network, and HF_ENDPOINT"
    )
    with pytest.raises(ValueError, match=wanted) as error:
        snapshot("owner/model", ["config.json"])
    assert str(error.value).endswith(FOLDER)


def test_a_server_that_is_no_hub(hub):
    hub.refusal = (200, {})  # and nothing in the answer
    with pytest.raises(ValueError, match=r"^cannot download owner/model \(.+\): check the network"):
        snapshot("owner/model", ["config.json"])


def test_offline_nothing_is_asked(hub, monkeypatch):
    snapshot("owner/model", ["config.json"])
    hub.requests.clear()
    monkeypatch.setattr(peer("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    assert snapshot("owner/model", ["config.json"]) == Path.cwd() / SNAPSHOT
    for name, file in (("owner/model", "model.safetensors"), ("owner/other", "config.json")):
        message = r"\(HF_HUB_OFFLINE is set, and the cache does not have it\): unset HF_HUB_OFFLINE"
        with pytest.raises(ValueError, match=message):
            snapshot(name, [file])
    assert not hub.requests


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_cache_that_cannot_be_written(hub, monkeypatch, number):
    def fails(*args, **kwargs):
        raise OSError(number, os.strerror(number), "cache/x")

    monkeypatch.setattr(peer("huggingface_hub"), "snapshot_download", fails)
    with pytest.raises(
        ValueError, match=rf"\(.*{os.strerror(number)}.*\): make space, or set HF_HO"
    ):
        snapshot("owner/model", ["config.json"])


@pytest.mark.parametrize(
    "name",
    ["../repo", "owner/..", "a/b/c", "owner/", "/repo", "a--b", "a b/c", "a/b..c", "x" * 97, "é/é"],
)
def test_names_of_repositories_are_checked(hub, name):
    with pytest.raises(ValueError, match="is neither a folder nor a repository: name a folder"):
        convert.main(["import", name, "--out=first.pt"])
    assert not hub.requests


def test_a_folder_is_taken_as_it_is(hub):
    convert.main(["import", "theirs", "--out=first.pt"])
    assert_ours("first.pt")
    Path("theirs/config.json").unlink()
    with pytest.raises(ValueError, match=r"the folder theirs has no config\.json: put it there"):
        convert.main(["import", "theirs", "--out=second.pt"])
    assert not hub.requests


def test_without_huggingface_hub_folders_are_read_and_names_end_in_a_sentence(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    convert.main(["import", "theirs", "--out=first.pt"])
    with pytest.raises(ValueError, match=r"needs huggingface_hub: pip install huggingface_hub$"):
        convert.main(["import", "owner/model", "--out=second.pt"])

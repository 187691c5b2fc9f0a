"""What the tests share: where optional data lies, optional peers, toy text and toy sizes."""

import functools
import gc
import http.server
import importlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import bpe
import decoding
import model
import train
from data.download import GPT2_MERGES, GPT2_VOCABULARY, fetch
from engine import closing, cpu, kernels
from engine.logs import draw_curves
from models import moe, recurrent

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"

# A model that trains in a second; sizes that are all different, so that swapped axes show.
TOY = [
    "--data=toy.txt",
    "--vocab_size=300",
    "--block_size=16",
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=24",
    "--batch_size=4",
    "--tokens_per_step=128",
    "--warmup=2",
    "--eval_interval=2",
    "--log_interval=1",
    "--device=cpu",
]

TOY_PAIRS = ["--model=seq2seq", "--data=toy.tsv", "--n_ff=40", *TOY[1:]]
TOY_PAIRS += ["--dtype=fp32", "--dropout=0"]

TOY_BERT = ["--model=bert", "--data=toy-docs.txt", "--n_ff=40", *TOY[1:]]
TOY_BERT += ["--dtype=fp32", "--dropout=0", "--attention_dropout=0", "--mlm_rate=0.3"]

TOYS = {"gpt": TOY, "bert": TOY_BERT, "seq2seq": TOY_PAIRS}
TOY_LLAMA = [*TOY, "--model=llama", "--n_kv_head=1"]
TOY_NGRAM = ["--model=ngram", *TOY[:3], "--device=cpu"]
TOY_LSTM = [flag for flag in TOY if not flag.startswith(("--n_head", "--tokens_per_step"))]
TOY_LSTM += ["--model=lstm", "--tokens_per_step=64"]
LABELLED = {
    "classify": "toy.csv",
    "tag": "toy.conll",
    "answer": "toy.json",
    "similar": "toy-alike.csv",
    "complete": "toy.jsonl",
}
for task, file in LABELLED.items():
    TOYS[task] = [f"--model={task}", f"--data={file}", "--n_ff=40", *TOY[1:], "--dtype=fp32"]
TOYS["complete"].remove("--n_ff=40")
TOYS["similar"] += ["--batch_size=8", "--row_length=8"]


def peer(name: str):
    """An optional package to compare with. Absent, it skips the test; under CI it fails it."""
    if os.environ.get("REQUIRE_PEERS"):
        return importlib.import_module(name)
    return pytest.importorskip(name)


def shared(name: str) -> Path:
    """Real data beside the project, if this machine has it."""
    if not (SHARED / name).exists():
        pytest.skip(f"no {name} beside the project")
    return SHARED / name


def gpt2_files() -> tuple[Path, Path]:
    """GPT-2's merges and vocabulary: beside the project, or by download where CI requires them."""
    if os.environ.get("REQUIRE_PEERS") and not (SHARED / "gpt2").exists():
        cache = ROOT / "data" / "cache"
        return fetch(GPT2_MERGES, cache), fetch(GPT2_VOCABULARY, cache)
    return shared("gpt2/vocab.bpe"), shared("gpt2/encoder.json")


def torchrun(
    processes: int, *words: str, script: str = "train.py", timeout: float = 240, **options
) -> subprocess.CompletedProcess:
    """The script, of the project or of its tests, in so many processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", str(ROOT / script), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"}  # Windows has none
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        command,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
        **options,
    )


def alive(process: int) -> bool:
    """A zombie, whose exit status its new parent has not read yet, does not count as alive."""
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state.split()[0] != "Z"


def check_resumed(run: list[str]) -> None:
    """Trains with these flags into the folder `whole`, and, with a stop after two steps, into
    `parts`: both must end with the same weights."""
    train.main([*run, "--out=whole"])
    train.main([*run, "--out=parts", "--stop_after=2"])
    train.main(["--resume", "--out=parts"])
    whole, parts = (
        torch.load(f"{name}/latest.pt", weights_only=True) for name in ("whole", "parts")
    )
    assert all(torch.equal(w, parts["model"][name]) for name, w in whole["model"].items())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """What the files before have imported stays, so that no run looks for garbage in it: its
    gc.collect() would take longer than its steps."""
    gc.collect()
    gc.freeze()


closing.draw_curves = lambda folder: None  # it takes longer than a run of toy size


@pytest.fixture
def curves(monkeypatch):
    """Runs draw their curves, as they do outside of the tests."""
    monkeypatch.setattr(closing, "draw_curves", draw_curves)


PLACES = {
    model: ("attention_kernel", "dropout_kernel", "cross_entropy"),
    decoding: ("text_steps", "pair_steps"),
    bpe: ("make_splitter", "count_chunks"),
    recurrent: ("layer_kernel",),
    moe: ("experts_kernel",),
}


PLAIN = {(file, name): getattr(file, name) for file, names in PLACES.items() for name in names}


@pytest.fixture(autouse=True)
def plain_kernels():
    """Every test begins with the plain forms: what a run in another test, or in a fixture of a
    whole file, has installed is gone."""
    for (file, name), plain in PLAIN.items():
        setattr(file, name, plain)
    torch.set_float32_matmul_precision("highest")  # on CUDA, `cpu.prepare` would have meant TF32
    cpu.by_onednn = True  # on every machine, until a run asks its processor


@pytest.fixture
def installed():
    """The kernels of a CPU, as a run has them there."""
    kernels.install(torch.device("cpu"))


def write_texts(folder: Path) -> None:
    """A small text, and documents of a sentence a line."""
    lines = [f"{n} times {m} is {n * m}.\n" for n in range(30) for m in range(12)]
    (folder / "toy.txt").write_text("".join(lines), encoding="utf-8")
    documents = ["".join(lines[12 * n : 12 * n + 12]) for n in range(30)]
    (folder / "toy-docs.txt").write_text("\n".join(documents), encoding="utf-8")


def write_pairs(folder: Path) -> None:
    """Pairs of a sum and its result."""
    lines = [f"{n} plus {m}\t{n + m}\n" for n in range(20) for m in range(12)]
    (folder / "toy.tsv").write_text("".join(lines), encoding="utf-8")


def write_labelled(folder: Path) -> None:
    """A small file for each task of fine-tuning."""
    words = ["cat", "dog", "cow", "hen", "pig", "fox", "owl", "bee"]
    lines = [f"the {a} saw the {b},{'good' if a < b else 'bad'}\n" for a in words for b in words]
    pairs = [f"the {a} saw {b},{b} was seen by {a}\n" for a in words for b in words if a < b]
    tagged = [f"the O\n{a} B-animal\nsaw O\n{b} B-animal\n\n" for a in words for b in words]
    asked = [{"prompt": f"{a} {b} ", "completion": b} for a in words for b in words]
    talks = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a in words
        for b in words
    ]
    options = [
        {"question": f"the {a} saw the {b}:", "choices": [" bad", " good"], "answer": int(a < b)}
        for a in words
        for b in words
    ]
    paragraphs = [
        {
            "context": f"the {a} saw the {b}",
            "qas": [{"id": a + b, "question": "Who?", "answers": [{"text": a, "answer_start": 4}]}],
        }
        for a in words
        for b in words
    ]
    squad = {"version": "1.1", "data": [{"title": "toy", "paragraphs": paragraphs}]}
    for name, text in {
        "toy.csv": "text,label\n" + "".join(lines),
        "toy-alike.csv": "a,b\n" + "".join(pairs),
        "toy.conll": "".join(tagged),
        "toy.jsonl": "".join(json.dumps(row) + "\n" for row in asked),
        "toy-talks.jsonl": "".join(json.dumps(row) + "\n" for row in talks),
        "toy.json": json.dumps(squad),
        "toy-choices.jsonl": "".join(json.dumps(row) + "\n" for row in options),
    }.items():
        (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """An empty working folder with small texts in it; caches and runs land there too."""
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path)
    return tmp_path


@pytest.fixture
def toy_pairs(toy) -> Path:
    """The same folder, with pairs."""
    write_pairs(toy)
    return toy


@pytest.fixture
def server(tmp_path):
    """(folder, address): what lies in the folder can be downloaded from this machine."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


@pytest.fixture
def tokenizers() -> dict:
    """Those of tests/converting.py."""
    import converting

    return converting.tokenizers()

"""convert.py: files that strangers wrote, the command line, and what follows an import."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, peer
from converting import (
    OURS,
    TASK,
    C,
    V,
    assert_same_function,
    imported,
    put_tensors,
    random_theirs,
    save_ours,
    save_theirs,
    tensors_of,
)

import convert
import sample
import train
from bpe import GPT2_PATTERN, Tokenizer
from data.gpt2_files import byte_characters
from data.tokens import END_OF_TEXT
from engine.hub import exporting, importing, tokenizer_files
from engine.hub.exporting import card, export_model
from engine.hub.families import FAMILIES, family_of
from engine.hub.importing import import_model
from engine.hub.tokenizer_files import tokenizer_json
from engine.hub.weights import open_safetensors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_other_precisions_become_float32(name, dtype, tmp_path, tokenizers):
    theirs = random_theirs(name).to(dtype)
    save_theirs(theirs, tmp_path / "there", tokenizers[name], TASK[name])
    ours, checkpoint, lines = imported(tmp_path / "there")
    assert {t.dtype for t in checkpoint["model"].values()} == {torch.float32}
    assert str(dtype).removeprefix("torch.") in lines[0]
    theirs = type(theirs).from_pretrained(tmp_path / "there", dtype=torch.float32)
    assert_same_function(TASK[name], ours, theirs, torch.float32)


def test_shards_and_bin_files_hold_the_same(tmp_path, tokenizers):
    theirs = random_theirs("gpt")
    whole = save_theirs(theirs, tmp_path / "whole", tokenizers["gpt"], "gpt")
    want = imported(whole)[1]["model"]
    parts = save_theirs(theirs, tmp_path / "parts", tokenizers["gpt"], "gpt", max_shard_size="20KB")
    assert len(list(parts.glob("model-*.safetensors"))) > 2
    pickled = tmp_path / "bin"
    shutil.copytree(whole, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(tensors_of(whole), pickled / "pytorch_model.bin")
    old = tmp_path / "old"
    shutil.copytree(pickled, old)
    torch.save(tensors_of(whole), old / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    halves, names = tmp_path / "halves", list(tensors_of(whole))
    shutil.copytree(pickled, halves)
    (halves / "pytorch_model.bin").unlink()
    placed = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
    for file in sorted(set(placed.values())):
        part = {n: t for n, t in tensors_of(whole).items() if placed[n] == file}
        torch.save(part, halves / file)
    index = halves / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": placed}), encoding="utf-8")
    for folder in (parts, pickled, old, halves):
        got = imported(folder)[1]["model"]
        assert got.keys() == want.keys()
        assert all(torch.equal(got[n], want[n]) for n in want), folder


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def folder(tmp_path, tokenizers) -> Path:
    """A small GPT-2 as the hub has it, to be damaged."""
    return save_theirs(random_theirs("gpt"), tmp_path / "there", tokenizers["gpt"], "gpt")


def test_a_pickle_with_a_payload_is_not_run(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    victim = tmp_path / "made by the payload"
    for content in (Payload(victim), {"transformer.wte.weight": Payload(victim)}):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match="could run code: not opened"):
            import_model(str(folder))
        assert not victim.exists()
    for content in ([1, 2], {"a": 1}, {1: torch.ones(2)}):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match="is no dict of tensors"):
            import_model(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02garbage")
    with pytest.raises(ValueError, match="is damaged"):
        import_model(str(folder))


def entry(begin: int, end: int, shape: list, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "overlap": {"a": entry(0, 8, [2]), "b": entry(4, 12, [2])},
    "gap": {"a": entry(0, 8, [2]), "b": entry(12, 16, [1])},
    "beyond": {"a": entry(0, 32, [8])},
    "short": {"a": entry(0, 8, [2])},
    "terabyte": {"a": entry(0, 10**12, [250_000_000_000])},
    "negative": {"a": entry(-16, 0, [4])},
    "minus": {"a": entry(0, 16, [-2, -2])},
    "backward": {"a": entry(16, 0, [4])},
    "shape": {"a": entry(0, 16, [5])},
    "text": {"a": entry(0, 16, "4")},
    "fraction": {"a": entry(0, 16, [4.0])},
    "truth": {"a": entry(0, 16, [True, 4])},
    "dtype": {"a": entry(0, 16, [4], "F31")},
    "listed": {"a": entry(0, 16, [4], ["F32"])},
    "offsets": {"a": {**entry(0, 16, [4]), "data_offsets": [0, 8, 16]}},
    "null": {"a": None},
    "array": [1, 2],
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(name, folder):
    text = json.dumps(HEADERS[name]).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(16)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged: "):
        open_safetensors(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        import_model(str(folder))


def test_a_good_header_is_read(folder):
    want = tensors_of(folder)
    shapes, get = open_safetensors(folder / "model.safetensors")
    assert shapes == {name: tuple(tensor.shape) for name, tensor in want.items()}
    assert all(torch.equal(get(name), tensor) for name, tensor in want.items())


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F4", "U16"])
def test_types_that_are_not_ours_are_refused(folder, dtype):
    size = {"F4": 32, "U16": 8}.get(dtype, 16)
    text = json.dumps({"a": entry(0, 16, [size], dtype)}).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(16)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"a is of type {dtype}: not supported"):
        import_model(str(folder))


def test_a_long_json_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "MOST_JSON", 10)
    with pytest.raises(ValueError, match=r"config\.json has more than 10 bytes"):
        import_model(str(folder))


def test_a_truncated_file_is_refused_wherever_it_ends(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for cut in (0, 3, 8, 9, 8 + length // 2, 8 + length, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
            import_model(str(folder))
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="is truncated or damaged"):
        import_model(str(folder))
    for claimed in (10**12, 2**64 - 1, tokenizer_files.MOST_JSON + 1):
        path.write_bytes(struct.pack("<Q", claimed) + whole[8:])
        with pytest.raises(ValueError, match=r"damaged: .*header too large"):
            import_model(str(folder))
    twice = b'{"a": 1, "a": 1}'
    path.write_bytes(struct.pack("<Q", len(twice)) + twice)
    with pytest.raises(ValueError, match="is truncated or damaged"):
        import_model(str(folder))


def test_an_index_reads_nothing_outside_the_folder(folder, tmp_path):
    outside = tmp_path / "x.safetensors"
    (folder / "model.safetensors").rename(outside)
    index = folder / "model.safetensors.index.json"
    names = list(peer("safetensors.torch").load_file(outside))
    absent = str(outside)
    climbing = ["../x.safetensors", absent, "a/../../x.safetensors", "..\\x.safetensors"]
    climbing += ["C:x.safetensors", "", 5, None, ["x"], "config.json", "x.safetensors\0"]
    for file in climbing:
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}), encoding="utf-8")
        with pytest.raises(ValueError, match="which is no file beside it"):
            import_model(str(folder))
    for content, message in (
        ({"weight_map": {"a": "none.safetensors"}}, "which is not there"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ({}, "has no weight_map"),
    ):
        index.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            import_model(str(folder))
    shutil.copy(outside, folder / "one.safetensors")
    shutil.copy(outside, folder / "two.safetensors")
    for placed in (
        dict.fromkeys(names[1:], "one.safetensors"),
        dict.fromkeys(names, "one.safetensors") | {"more": "one.safetensors"},
        dict.fromkeys(names, "one.safetensors") | {"more": "two.safetensors"},
    ):
        index.write_text(json.dumps({"weight_map": placed}), encoding="utf-8")
        with pytest.raises(ValueError, match="does not hold the tensors that the index says"):
            import_model(str(folder))


def test_absurd_sizes_are_refused_before_anything_is_allocated(folder, monkeypatch):
    monkeypatch.setattr(importing, "open_weights", lambda folder: pytest.fail("was read"))
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for change in ({"n_embd": 10**12}, {"n_layer": -1}, {"vocab_size": 0}, {"n_inner": 2**40}):
        content = json.dumps({**said, **change})
        (folder / "config.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=f"{next(iter(change))}=.* cannot be"):
            import_model(str(folder))


def test_sizes_that_the_file_does_not_have_allocate_nothing(folder):
    """Each size is within its limit; together they make 10^12 weights, too many for any machine."""
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    said |= {"vocab_size": 2**24, "n_embd": 2**16, "n_inner": 2**18, "n_head": 64}
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(ValueError, match=r"misshapen: transformer\.wte\.weight"):
        import_model(str(folder))


def test_damaged_json_is_refused(folder):
    for name in ("config.json", "tokenizer.json"):
        whole = (folder / name).read_bytes()
        for content in (b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a": 1, "a": 1}'):
            (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"{name} is damaged"):
                import_model(str(folder))
        (folder / name).write_bytes(whole)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        import_model(str(folder))


def test_weights_that_are_no_fractions_are_refused(folder):
    tensors = tensors_of(folder)
    key = "transformer.wte.weight"
    put_tensors(folder, tensors | {key: tensors[key].long()})
    with pytest.raises(ValueError, match=r"some weights are .*int64"):
        import_model(str(folder))


def test_a_tokenizer_larger_than_the_model_is_refused(folder, tmp_path):
    many = Tokenizer({bytes([i]): i for i in range(256)}, GPT2_PATTERN, {END_OF_TEXT: V})
    content = json.dumps(tokenizer_json(many, "gpt"))
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="308 tokens, the model only 307"):
        import_model(str(folder))


def test_without_safetensors_one_sentence_says_so(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        import_model(str(folder))


# ---- the command line, and what follows ----------------------------------------------------------


def test_import_then_sample_then_train_then_export(folder, toy, capsys):
    convert.main(["import", str(folder), "--out", "out/gpt2.pt"])
    said = capsys.readouterr().out
    assert said.startswith("out/gpt2.pt: GPT-2, ") and "fresh" not in said
    sample.main(["--checkpoint=out/gpt2.pt", "--prompt=the", "--max_new_tokens=4", "--device=cpu"])
    assert capsys.readouterr().out.startswith("the")
    flags = ["--data=toy.txt", "--steps=2", "--tokens_per_step=26", "--batch_size=2", "--seed=1"]
    flags += ["--device=cpu", "--eval_interval=2", "--preset=tiny", "--lr=1e-3"][:2]
    train.main(["--init=out/gpt2.pt", "--out=out/more", *flags])
    convert.main(["export", "out/more/best.pt", "--to", "there/new"])
    card = Path("there/new/README.md").read_text(encoding="utf-8")
    log = [json.loads(x) for x in Path("out/more/log.jsonl").read_text("utf-8").splitlines()]
    measured = [r for r in log if r["split"] == "validation"][-1]
    assert f"| loss | {measured['loss']:.6g} |" in card
    assert "toy.txt" in card and "after 2 steps" in card and "| tokens_per_step | 26 |" in card
    assert "It began with the weights of gpt2.pt." in card and f"| n_embd | {C} |" in card
    files = sorted(p.name for p in Path("there/new").iterdir())
    assert files == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert len({p.stat().st_mode for p in Path("there/new").iterdir()}) == 1
    header = Path("there/new/model.safetensors").read_bytes()[8:200]
    assert header.startswith(b'{"__metadata__":{"format":"pt"}')
    assert [p.name for p in Path("there").iterdir() if p.name.startswith("new")] == ["new"]


@pytest.mark.parametrize("name", ["bert", "masked", "seq2seq"])
def test_the_other_tasks_are_sampled_from_too(name, tmp_path, tokenizers, capsys):
    save_theirs(random_theirs(name), tmp_path / "there", tokenizers[name], TASK[name])
    out = str(tmp_path / "out" / "x.pt")
    convert.main(["import", str(tmp_path / "there"), "--out", out])
    prompt = "a [MASK]" if TASK[name] == "bert" else "a cat"
    sample.main(["--checkpoint", out, "--prompt", prompt, "--device=cpu"])
    assert capsys.readouterr().out.count("\n") >= 2


def test_an_imported_checkpoint_is_not_resumed(folder, toy):
    (toy / "run").mkdir()
    convert.main(["import", str(folder), "--out", "run/latest.pt"])
    with pytest.raises(ValueError, match="run with --init"):
        train.main(["--resume", "--out=run", "--data=toy.txt", "--device=cpu"])


def test_a_config_of_another_name_is_named(tmp_path):
    (tmp_path / "bert_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"no config\.json: rename bert_config\.json"):
        import_model(str(tmp_path))


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, tokenizers):
    save_ours("gpt", tmp_path / "best.pt", tokenizers["gpt"])
    there = tmp_path / "there"
    there.mkdir()
    export_model(tmp_path / "best.pt", there)  # empty: taken
    before = {p.name: p.read_bytes() for p in there.iterdir()}
    for target in (there, tmp_path / "best.pt"):
        with pytest.raises(ValueError, match="not an empty folder"):
            export_model(tmp_path / "best.pt", target)
    assert before == {p.name: p.read_bytes() for p in there.iterdir()}


def test_a_task_that_hugging_face_does_not_have_is_not_exported(tmp_path, tokenizers, monkeypatch):
    """A fork's new task met a KeyError here."""
    save_ours("gpt", tmp_path / "best.pt", tokenizers["gpt"])
    monkeypatch.delitem(FAMILIES, "gpt")
    with pytest.raises(ValueError, match=r"the task 'gpt' is not known to Hugging Face's formats"):
        export_model(tmp_path / "best.pt", tmp_path / "there")
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]


def test_an_interrupted_export_leaves_nothing(tmp_path, tokenizers, monkeypatch):
    save_ours("gpt", tmp_path / "best.pt", tokenizers["gpt"])

    def fails(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "card", fails)
    with pytest.raises(KeyboardInterrupt):
        export_model(tmp_path / "best.pt", tmp_path / "there")
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]


@pytest.mark.parametrize(
    "flags,message",
    [
        (["import", "no where", "--out=x.pt"], "neither a folder nor a repository"),
        (["import", "there"], "import writes to --out"),
        (["import", "there", "--to=x"], "import writes to --out"),
        (["export", "best.pt"], "export writes to --to"),
        (["export", "best.pt", "--to=x", "--out=y"], "and not --out"),
        (["export", "none.pt", "--to=x"], "there is no checkpoint"),
        (["import", "there", "--out=here.pt"], "is there already"),
        (["convert", "there", "--out=x.pt"], "invalid choice"),
        (["import"], "source"),
        (["export"], "required: source"),
        (["import", "there", "--out=x.pt", "--last=3"], "--last is for average: leave it out"),
        (["average", "there"], "average takes the run as a flag: write --run there"),
        (["average", "--run=x", "--to=y"], "--to is for export: leave it out"),
        (["import", "a", "b", "--out=x.pt"], "'b' belongs to no flag"),
    ],
    ids=str,
)
def test_wrong_commands_end_in_a_sentence(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here.pt").touch()
    with pytest.raises(ValueError, match=message):
        convert.main(flags)
    assert [p.name for p in tmp_path.iterdir()] == ["here.pt"]


def test_the_command_line_is_there_before_torch():
    """--help and the errors of flags come at once; what a command needs, it imports itself."""
    program = "import sys, convert; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_card_of_a_model_that_was_never_trained(tmp_path, folder):
    checkpoint, _ = import_model(str(folder))
    text = card(
        "x", family_of("gpt"), checkpoint, [{"step": 7, "split": "validation", "loss": 1.0}]
    )
    assert "not recorded" in text and "None were measured." in text and "after 0 steps" in text


def test_bytes_are_written_as_gpt2_writes_them():
    characters = byte_characters()
    assert sorted(characters.values()) == list(range(256)) and len(characters) == 256
    assert characters["Ġ"] == ord(" ") and characters["Ċ"] == ord("\n") and characters["a"] == 97

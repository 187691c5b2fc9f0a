"""The layout: who may import whom, where a task may be named, what a script loads."""

import ast
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT

import tasks
from engine import cli

# What copies alone; and what copies with model.py beside it.
ALONE = ("bpe", "wordpiece", "model", "optim", "decoding", "finetune")
WITH_MODEL = ("bert", "seq2seq")
# Imports run one way: a module may import what stands before it, or in its own row.
ORDER = (
    (*ALONE, *WITH_MODEL),
    ("models",),
    ("data",),
    ("tasks",),
    ("engine",),
    ("train", "sample", "convert"),
    ("lab",),
)
ROW = {name: i for i, names in enumerate(ORDER) for name in names}


def modules() -> dict[str, Path]:
    """{dotted name: file} of everything but the tests."""
    files = [p for p in ROOT.glob("*.py")]
    for folder in ("models", "data", "tasks", "engine", "lab"):
        files += (ROOT / folder).rglob("*.py")
    names = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules of ours that this one imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys()


def test_every_module_has_its_place_in_the_order():
    assert {name.partition(".")[0] for name in MODULES} == ROW.keys()


@pytest.mark.parametrize("name", [*ALONE, *WITH_MODEL])
def test_what_a_concept_imports_of_ours(name):
    assert imports(name) <= ({"model"} if name in WITH_MODEL else set())


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_one_way(name):
    for other in imports(name):
        assert ROW[other.partition(".")[0]] <= ROW[name.partition(".")[0]], f"{name} -> {other}"


def test_no_circle_of_imports():
    waiting = {name: imports(name) - {name} for name in MODULES}
    while free := [name for name, others in waiting.items() if not others & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert not waiting


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_task_is_named_in_its_row_and_nowhere_else(name):
    """Presets name tasks, and Hugging Face's tables; nobody else asks which task it is."""
    if name.partition(".")[0] == "tasks" or name.startswith(("engine.presets", "engine.hub")):
        return
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in tasks.TABLE, f"line {node.lineno}"


def test_every_row_of_the_table_leads_to_a_network_and_a_whole_task():
    for name in tasks.TABLE:
        task, network = tasks.task(name), tasks.network(name)
        assert hasattr(network, "Config") and hasattr(network, "flops_per_token")
        for part in ("Flags", "Data", "GOAL", "LOWER_IS_BETTER", "SampleFlags", "sample"):
            assert hasattr(task, part), f"{name} lacks {part}"
        for part in ("show", "ask", "batch_shapes"):
            assert callable(getattr(task, part)), f"{name} lacks {part}"
        for part in ("special_tokens", "splits", "batch", "report", "describe"):
            assert hasattr(task.Data, part), f"{name}: Data lacks {part}"


def test_every_flag_has_its_help():
    """The comment behind a field, which a formatter that breaks the line would take away."""
    for name in tasks.TABLE:
        task = tasks.task(name)
        for cls in (task.Flags, task.SampleFlags, tasks.network(name).Config):
            helps = cli.comments(cls)
            shown = {f.name for f in fields(cls) if f.metadata.get("flag", True)}
            assert shown <= helps.keys(), (cls, shown - helps.keys())


def loaded(code: str) -> set[str]:
    """Modules of ours that a fresh Python has loaded after this code."""
    code += "\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    )
    return set(done.stdout.split("\n")) & MODULES.keys()


def test_a_script_loads_what_it_uses():
    """A GPT's checkpoint needs neither BERT nor translation, nor a mean of checkpoints networks."""
    found = loaded("import sample, tasks; tasks.task('gpt'); tasks.network('gpt')")
    others = {"bert", "seq2seq", "wordpiece", "tasks.masked", "tasks.classify", "engine.memory"}
    assert not found & {*others, "tasks.translation", "data.dates", "engine.hub.families"}
    assert not loaded("import convert") & {"model", "bert", "seq2seq", "engine.hub.families"}

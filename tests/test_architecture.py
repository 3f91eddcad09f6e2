"""The house: who may import whom, and what nobody may do. The checker itself is checked with planted faults."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import pytest

import lowrank_tune

PACKAGE = Path(lowrank_tune.__file__).parent
ORDER = (
    "errors events regex regular_files json_files manifest run_summary paths processes full_disk offline "
    "unsloth_import config stats batch functional toy model data generation rewards algorithms checkpoint assembly "
    "data_report evaluation export training memory_planner preflight ui run_context runner chat doctor cli"
).split()
LAZY = ("__init__", "__main__", "cli")
"""Modules that load first-party code at first use, so that `--help` and a faulty recipe take a second."""
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "eval", "exec"}
ROOT_NAMES = {"Chain": "config", "Recipe": "config", "run": "runner", "UserError": "errors"}


def layer_of(file: Path, package: Path) -> str:
    """The top-level module that a file belongs to."""
    return file.relative_to(package).with_suffix("").parts[0]


def imported(node: ast.AST) -> Iterator[str]:
    """The full names of the modules that a statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        if module == "lowrank_tune":
            yield from (f"lowrank_tune.{ROOT_NAMES.get(alias.name, alias.name)}" for alias in node.names)
        else:
            yield module


def order_faults(tree: ast.Module, layer: str) -> Iterator[str]:
    """Imports that point to the right, hide inside functions, or are relative."""
    top = {id(node) for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))}
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            top -= {id(node) for node in ast.walk(function)}
    for node in ast.walk(tree):
        for name in imported(node):
            line = getattr(node, "lineno", 0)
            if name.startswith("."):
                yield f"{line}: a relative import"
            if name.partition(".")[0] != "lowrank_tune":
                continue
            if id(node) not in top and layer not in LAZY:
                yield f"{line}: {name} is imported inside a function"
            target = (name.split(".") + [""])[1]
            if layer in LAZY[:2] or target.startswith("__"):
                continue
            if target not in ORDER:
                yield f"{line}: {name} is not in the order"
            elif ORDER.index(target) > ORDER.index(layer):
                yield f"{line}: {layer} must not know {target}"


def called(node: ast.Call) -> str:
    """The dotted name of what is called, where it has one."""
    words: list[str] = []
    function: ast.expr = node.func
    while isinstance(function, ast.Attribute):
        words.append(function.attr)
        function = function.value
    return ".".join(reversed([*words, function.id])) if isinstance(function, ast.Name) else ""


def safety_faults(tree: ast.Module) -> Iterator[str]:
    """Doors through which a file could run code."""
    for node in ast.walk(tree):
        for name in imported(node):
            if name.partition(".")[0] in UNSAFE_MODULES:
                yield f"{getattr(node, 'lineno', 0)}: imports {name}"
        if isinstance(node, ast.Call):
            if (name := called(node)) in UNSAFE_CALLS:
                yield f"{node.lineno}: calls {name}"
            for keyword in node.keywords:
                always = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                if keyword.arg in ("trust_remote_code", "shell", "allow_pickle") and always:
                    yield f"{node.lineno}: sets {keyword.arg}=True"


@lru_cache(None)
def faults_in(place: str, layer: str, text: str) -> tuple[str, ...]:
    """Those of one file; known texts are not read again."""
    if layer not in ORDER and layer not in LAZY:
        return (f"{place}:1: {layer} has no place in the order",)
    tree = ast.parse(text)
    return tuple(f"{place}:{fault}" for fault in (*order_faults(tree, layer), *safety_faults(tree)))


def architecture_faults(package: Path) -> list[str]:
    """Every fault of a package, as `file:line: what`."""
    files = sorted(package.rglob("*.py"))
    return [
        fault
        for file in files
        for fault in faults_in(file.relative_to(package).as_posix(), layer_of(file, package), file.read_text())
    ]


def test_the_package_follows_its_architecture() -> None:
    assert architecture_faults(PACKAGE) == []


@pytest.mark.parametrize("page", ["AGENTS.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_pages_list_the_layers_in_their_order(page: str) -> None:
    text = (PACKAGE.parent / page).read_text(encoding="utf-8")
    listed = re.search(r"`?errors`? `?events`?.*?`?doctor`? `?cli`?", text, re.DOTALL)
    assert listed is not None, page
    cells = re.sub(r"\|[^|`]*\|\n\|[^|]*\|", " ", listed[0])
    assert re.findall(r"\w+", cells) == ORDER


def import_graph(package: Path) -> dict[str, set[str]]:
    """The first-party modules that each module imports when it is loaded; a package means its `__init__`."""
    root = package.parent
    names = {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
        for file in package.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for name, file in names.items():
        targets: set[str] = set()
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                targets |= {
                    full if (full := f"{node.module}.{alias.name}") in names else node.module for alias in node.names
                }
        graph[name] = (targets & names.keys()) - {name}
    return graph


def import_cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or an empty list."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph[name]):
            if found := visit(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert import_cycle(import_graph(PACKAGE)) == []
    assert import_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("errors.py", "from lowrank_tune.config import BaseConfig", "errors must not know config"),
        ("errors.py", "from lowrank_tune import config", "errors must not know config"),
        ("config/training.py", "import lowrank_tune.training.trainer", "config must not know training"),
        ("events.py", "from lowrank_tune import Recipe", "events must not know config"),
        ("functional.py", "def f():\n    from lowrank_tune import errors", "inside a function"),
        ("config/validate.py", "from lowrank_tune.training.trainer import Trainer", "config must not know training"),
        ("config/validate.py", "from .yaml import parse", "a relative import"),
        ("config/validate.py", "from lowrank_tune.helpers import f", "not in the order"),
        ("helpers.py", "import os", "helpers has no place in the order"),
        ("events.py", "import pickle", "imports pickle"),
        ("events.py", "import torch\ntorch.load('x')", "calls torch.load"),
        ("events.py", "eval('1')", "calls eval"),
        ("events.py", "def f():\n    exec('1')", "calls exec"),
        ("events.py", "f(trust_remote_code=True)", "sets trust_remote_code=True"),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, file: str, line: str, fault: str) -> None:
    copy = tmp_path / "lowrank_tune"
    shutil.copytree(
        PACKAGE, copy, ignore=lambda _, names: [name for name in names if "." in name and not name.endswith(".py")]
    )
    before = architecture_faults(copy)
    with (copy / file).open("a") as handle:
        handle.write(f"\n{line}\n")
    new = set(architecture_faults(copy)) - set(before)
    assert len(new) == 1 and fault in new.pop()


@pytest.mark.parametrize(
    "module", ["lowrank_tune", "lowrank_tune.config", "lowrank_tune.errors", "lowrank_tune.events"]
)
def test_light_imports(module: str) -> None:
    code = (
        f"import sys, {module}; print([name for name in ('torch', 'transformers', 'peft', 'datasets') if name in "
        f"sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert done.stdout.strip() == "[]"

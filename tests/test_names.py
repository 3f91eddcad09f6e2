"""Names are words of the field: none of the project's old private words is left as a part of a name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from lowrank_tune.cli import app
from lowrank_tune.ui.metrics import CHARTS, DESCRIPTIONS, DESCRIPTIONS_BY_ALGORITHM

ROOT = Path(__file__).parent.parent
FOLDERS = ("lowrank_tune", "tests", "benchmarks", "examples")
FORBIDDEN = frozenset(
    "says said say told tell hear heard earn earned wish wishes voice speak speaks harvest harvester asked dead tidy "
    "aside lent begun plant leash choosy parting".split()
)


def words_of(name: str) -> list[str]:
    """The words of a name in snake_case or CamelCase, in lower case."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of each name that a module defines: classes, functions, parameters, variables, attributes and
    aliases of imports."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias):
            yield node.lineno, node.asname or node.name
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.lineno, node.name


def private_words(path: Path, text: str) -> list[str]:
    """`file:line: name` for each name of a file, and for its own, that contains a forbidden word."""
    found = [f"{path}:{line}: {name}" for line, name in bound_names(ast.parse(text)) if FORBIDDEN & {*words_of(name)}]
    return [*([f"{path}: the file"] if FORBIDDEN & {*words_of(path.stem)} else []), *sorted(set(found))]


def test_no_name_is_a_private_word() -> None:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 300
    faults = [fault for path in files for fault in private_words(path.relative_to(ROOT), path.read_text())]
    assert faults == []


def options_of(command: Any) -> Iterator[str]:
    """The names of a command, of its commands below, and of all their options."""
    yield command.name or ""
    for parameter in command.params:
        yield from parameter.opts
    for below in getattr(command, "commands", {}).values():
        yield from options_of(below)


def test_no_metric_command_or_option_is_a_private_word() -> None:
    metrics = {*DESCRIPTIONS, *(name for own in DESCRIPTIONS_BY_ALGORITHM.values() for name in own)}
    metrics |= {name for charts in CHARTS.values() for chart in charts for name in chart}
    options = set(options_of(typer.main.get_command(app)))
    assert {"rewards/margins", "--pass-at-k", "score"} <= metrics | options
    assert [name for name in sorted(metrics | options) if FORBIDDEN & {*words_of(name)}] == []


@pytest.mark.parametrize(
    "text",
    [
        "told = 1",
        "def hear(x): pass",
        "class Harvester: pass",
        "def f(asked): pass",
        "x.is_dead = 1",
        "import a as voice",
        "try:\n    pass\nexcept OSError as said:\n    pass",
        "for begun in []: pass",
        "[x for lent_rows in y]",
        "class ChoosyReward: pass",
    ],
)
def test_a_planted_name_is_found(text: str) -> None:
    (fault,) = private_words(Path("a.py"), text)
    assert fault.startswith("a.py:")


def test_a_planted_file_is_found() -> None:
    assert private_words(Path("wishes.py"), "") == ["wishes.py: the file"]


def test_words_that_contain_one_are_no_fault() -> None:
    assert private_words(Path("a.py"), "essays = deadline = planted = teller = earnings = 'told said'") == []

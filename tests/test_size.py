"""The package stays readable: limits of `scripts/size.py` for density and for the length of functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_presets import load_script

PACKAGE = Path(__file__).parents[1] / "lowrank_tune"
MAX_STATEMENTS_PER_LINE = 0.68
MAX_NODES_PER_STATEMENT = 12.0


@pytest.fixture(scope="module")
def size() -> Any:
    return load_script("scripts/size.py")


def test_package_density_is_within_its_limits(size: Any) -> None:
    total = sum(size.read(sorted(PACKAGE.rglob("*.py"))).values(), size.Size())
    assert total.statements_per_line <= MAX_STATEMENTS_PER_LINE
    assert total.nodes_per_statement <= MAX_NODES_PER_STATEMENT


def test_no_function_is_longer_than_its_limit(size: Any) -> None:
    found = [function for file in sorted(PACKAGE.rglob("*.py")) for function in size.functions(file)]
    assert [function.place for function in found if function.lines > size.MAX_FUNCTION_LINES] == []


def test_size_leaves_docstrings_and_comments_out(size: Any, tmp_path: Path) -> None:
    """By hand: Module, Assign, Name, Store, Constant; then FunctionDef, arguments, Return, Constant."""
    file = tmp_path / "example.py"
    file.write_text('"""A docstring."""\n\n# a comment\nx = 1\n\n\ndef f():\n    """Another one."""\n    return 2\n')
    (counted,) = size.read([file]).values()
    assert counted == size.Size(nodes=9, statements=3, code_lines=3)
    (function,) = size.functions(file)
    assert function.lines == 3 and function.size.statements == 2

"""The worker side of `python_tests` (`python_tests.py`): finds the code of a completion and the tests of its row, and
runs the tests on the code in the sandbox.

Runs in the worker process; the functions that read a row also run in the main process, which checks the rows. Rows are
like HumanEval (`prompt`, `test` with a function `check`, `entry_point`) or like MBPP (`test_list` of assertions, and
optionally `test_setup_code`, `test_imports`, `challenge_test_list` and the row's own solution in `code`).
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lowrank_tune.json_files import parse_json
from lowrank_tune.rewards.code.code_blocks import fenced_blocks
from lowrank_tune.rewards.sandbox.check import CheckResult, SandboxPair
from lowrank_tune.rewards.sandbox.launch import Level

PYTHON_TAGS = ("python", "py", "python3")
TEST_TIME_FRACTION = 0.6  # share of the time of a check for the code and its tests; the rest is for the start
CACHE_SIZE = 1024  # rows whose own solution was run, with its result


class InvalidTests(Exception):
    """A row without tests that can be run; the message is the reason."""


class Inconclusive(Exception):
    """The row's own solution has no result: the machine was too busy, or the sandbox did not start."""

    def __init__(self, result: CheckResult) -> None:
        self.result = result


@dataclass(frozen=True)
class RowTests:
    """The tests of a row as one text. `prompt` begins the function `entry` that the code completes; both are empty if
    the code is a whole program."""

    prompt: str
    entry: str
    text: str


def load(spec: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, str]]:
    """Returns the grader of `completion` and `row`: {outcome, reason} of a check at the level of the spec."""
    runner = CheckRunner(spec["level"])

    @lru_cache(CACHE_SIZE)
    def check_reference(
        tests: RowTests,
        reference: str,
        seconds: float,
    ) -> CheckResult:
        """Returns the result of the row's own solution. Raises Inconclusive."""
        result = runner.run(tests, reference, seconds)
        if result.outcome in ("late", "error"):
            raise Inconclusive(result)
        return result

    def grade(request: Mapping[str, Any]) -> dict[str, str]:
        tests = row_tests(request["row"])
        code = extract_code(request["completion"])
        seconds = request["seconds"] * TEST_TIME_FRACTION
        result = runner.run(tests, code, seconds)
        reference = reference_solution(request["row"])
        # only for these results the row may be the cause
        if reference and (result.mistyped or result.slow):
            try:
                reference_result = check_reference(tests, reference, seconds)
            except Inconclusive as inconclusive:
                result = inconclusive.result
            else:
                if result.slow and reference_result.slow:
                    result = CheckResult("fault", f"its own solution did not end within {seconds:g} s")
                elif result.mistyped and reference_result.mistyped:
                    # types do not count if the row's own solution fails by them, as one that returns 0 for False
                    result = runner.run(
                        tests,
                        code,
                        seconds,
                        strict=False,
                    )
        return {"outcome": result.outcome, "reason": result.reason}

    return grade


class CheckRunner:
    """Runs checks, each in a new pair of processes. The next pair starts at once, while the trainer does something
    else."""

    def __init__(self, level: Level) -> None:
        self._level = level
        self._pair = SandboxPair(level)

    def run(
        self,
        tests: RowTests,
        code: str,
        seconds: float,
        strict: bool = True,
    ) -> CheckResult:
        # an alarm may have interrupted the last check before it renewed the pair
        if self._pair.used:
            self._renew()
        result = self._pair.check(
            tests.prompt,
            code,
            tests.entry,
            tests.text,
            seconds,
            strict,
        )
        self._renew()
        return result

    def _renew(self) -> None:
        self._pair.end()
        self._pair = SandboxPair(self._level)


def reference_solution(row: Mapping[str, Any]) -> str:
    """Returns the row's own solution, or an empty text."""
    return str(row.get("canonical_solution") or row.get("code") or "").replace("\r\n", "\n")


def extract_code(completion: str) -> str:
    """Returns the code of a completion: the last fence marked as Python, else the last fence, else all of it. The last
    fence may be open."""
    blocks = fenced_blocks(completion)
    for language, code in reversed(blocks):
        if language in PYTHON_TAGS:
            return code
    return blocks[-1][1] if blocks else completion


def row_tests(row: Mapping[str, Any]) -> RowTests:
    """Returns the tests of a row. Raises InvalidTests."""
    test = row.get("test")
    listed = row.get("test_list")
    if isinstance(test, str) and row.get("entry_point"):
        return _humaneval_tests(
            str(row.get("prompt") or ""),
            test,
            str(row["entry_point"]),
        )
    if listed:
        return _mbpp_tests(row, [*_text_list(listed), *_text_list(row.get("challenge_test_list"))])
    raise InvalidTests("it has neither `test` with `entry_point` nor a `test_list`")


def _humaneval_tests(
    prompt: str,
    test: str,
    entry: str,
) -> RowTests:
    """HumanEval: imports and helpers of the prompt, the tests, then a call of `check` with the function."""
    if not entry.isidentifier():
        raise InvalidTests("its `entry_point` is not a name")
    functions = [node.name for node in _parse_or_raise(test, "`test`").body if isinstance(node, ast.FunctionDef)]
    if "check" not in functions:
        raise InvalidTests("its `test` has no function `check`")
    text = f"{_complete_prompt(prompt)}\n{entry} = __solution__({entry!r})\n{test}\ncheck({entry})\n"
    _require_assertions(_parse_or_raise(text, "`prompt` and `test`"))
    return RowTests(prompt, entry, text)


def _mbpp_tests(row: Mapping[str, Any], tests: Sequence[str]) -> RowTests:
    """MBPP: imports of the row's own solution, the names that the tests use from the code, the setup, the tests."""
    setup = [*_text_list(row.get("test_imports")), str(row.get("test_setup_code") or "")]
    tree = _parse_or_raise("\n".join([*setup, *tests]), "`test_list`")
    _require_assertions(tree)
    reference = _parse(str(row.get("code") or "")) or ast.Module([], [])
    imports = [ast.unparse(node) for node in reference.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    loaded = _loaded_names(tree)
    solution_names = loaded & _top_level_names(reference)
    if not solution_names:
        # without a solution that defines any of them: all names that nothing else defines
        solution_names = loaded - _top_level_names(tree) - set(dir(builtins))
    if not solution_names:
        raise InvalidTests("its tests use nothing of the solution")
    names = [f"{name} = __solution__({name!r})" for name in sorted(solution_names)]
    return RowTests(
        "",
        "",
        "\n".join(
            [
                *imports,
                *names,
                *setup,
                *tests,
            ]
        ),
    )


def _text_list(value: object) -> list[str]:
    """Returns a list of texts, which some data sets have as JSON."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            return [str(value)] if str(value).strip() else []
    if isinstance(value, (list, tuple)):
        return [str(element).replace("\r\n", "\n") for element in value]
    return []


def _complete_prompt(prompt: str) -> str:
    """Returns a prompt as complete statements; it may end with the first line or the docstring of a function."""
    with_body = f"{prompt.rstrip()}\n    pass\n"
    for candidate in (prompt, with_body):
        if _parse(candidate) is not None:
            return candidate
    return ""


def _parse(source: str) -> ast.Module | None:
    try:
        return ast.parse(source.replace("\r\n", "\n"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _parse_or_raise(source: str, label: str) -> ast.Module:
    tree = _parse(source)
    if tree is None:
        raise InvalidTests(f"its {label} is not Python")
    return tree


def _require_assertions(tree: ast.Module) -> None:
    if not any(isinstance(node, (ast.Assert, ast.Raise)) for node in ast.walk(tree)):
        raise InvalidTests("its tests assert nothing")


def _loaded_names(tree: ast.Module) -> set[str]:
    return _names(tree, ast.Load)


def _top_level_names(tree: ast.Module) -> set[str]:
    """Returns the names that the statements at the top of a text define, without imports."""
    names = set()
    for statement in tree.body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(statement.name)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            names |= _names(statement, ast.Store)
    return names


def _names(tree: ast.AST, context: type[ast.expr_context]) -> set[str]:
    """Returns the names that are loaded or stored in a tree."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, context)}

"""The worker's side of `python_tests`: which code a completion holds, which tests a row holds, and one check of one on
the other.

Rows are HumanEval-shaped (`prompt`, `test` with a function `check`, `entry_point`) or MBPP-shaped (`test_list` of
assertions, with `test_setup_code`, `test_imports` and `challenge_test_list` where there are any, and the reference
solution in `code`).
"""

from __future__ import annotations

import ast
import builtins
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lowrank_tune.rewards.sandbox.check import CheckResult, SandboxPair

PYTHON_TAGS = ("python", "py", "python3")


TEST_TIME_FRACTION = 0.6  # of the time of a check, for the code and its tests; the rest is for the start
CACHE_SIZE = 1024  # rows of which is known how their own reference ends


class InvalidTests(Exception):
    """A row without tests that can be run; the message says what it lacks."""


class Inconclusive(Exception):
    """How a row's reference ends could not be found out: the machine was too busy, or the sandbox did not start."""

    def __init__(self, result: CheckResult) -> None:
        self.result = result


@dataclass(frozen=True)
class RowTests:
    """The tests of a row as one text, and what stands before the code: `prompt` begins the function `entry`, or both
    are empty."""

    prompt: str
    entry: str
    text: str


def load(spec: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, str]]:
    """Checks at the level of the job. The next pair of processes starts while the trainer does something else."""
    current = [SandboxPair(spec["level"])]

    def grade(request: Mapping[str, Any]) -> dict[str, str]:
        tests = row_tests(request["row"])
        code = extract_code(request["completion"])
        seconds = request["seconds"] * TEST_TIME_FRACTION
        result = run_check(tests, code, seconds, True)
        if (result.mistyped or result.slow) and (reference := reference_solution(request["row"])):
            try:
                result = compared_to(check_reference(tests, reference, seconds), result, tests, code, seconds)
            except Inconclusive as inconclusive:
                result = inconclusive.result
        return {"outcome": result.outcome, "reason": result.reason}

    @lru_cache(CACHE_SIZE)
    def check_reference(tests: RowTests, reference: str, seconds: float) -> CheckResult:
        """How the row's own reference ends."""
        result = run_check(tests, reference, seconds, True)
        if result.outcome in ("late", "error"):
            raise Inconclusive(result)
        return result

    def compared_to(
        reference: CheckResult,
        result: CheckResult,
        tests: RowTests,
        code: str,
        seconds: float,
    ) -> CheckResult:
        """A result that may be the row's doing. Types do not count where the reference fails by one alone, as one that
        returns 0 for False; nor does the time where the reference needs more too."""
        if result.slow and reference.slow:
            return CheckResult("fault", f"its own solution did not end within {seconds:g} s")
        if result.mistyped and reference.mistyped:
            return run_check(tests, code, seconds, False)
        return result

    def run_check(tests: RowTests, code: str, seconds: float, strict: bool) -> CheckResult:
        if current[0].used:  # an alarm has cut the last check short
            renew()
        result = current[0].check(tests.prompt, code, tests.entry, tests.text, seconds, strict)
        renew()
        return result

    def renew() -> None:
        current[0].end()
        current[0] = SandboxPair(spec["level"])

    return grade


def reference_solution(row: Mapping[str, Any]) -> str:
    """The row's own solution; empty where it has none."""
    return str(row.get("canonical_solution") or row.get("code") or "").replace("\r\n", "\n")


def extract_code(completion: str) -> str:
    """The code of a completion: its last fence that says it is Python, else its last fence, else all of it. A last
    fence may be open."""
    blocks = fenced_blocks(completion)
    python_blocks = [code for language, code in blocks if language in PYTHON_TAGS]
    return (python_blocks or [code for _, code in blocks] or [completion])[-1]


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """What stands between lines of three backticks, with the first word behind the opening ones, in small letters."""
    blocks = []
    opening = -1
    language = ""
    lines = text.split("\n")
    for number, line in enumerate([*lines, "```"]):
        stripped = line.strip(" \t\r")
        if not stripped.startswith("```"):
            continue
        if opening < 0:
            opening = number
            language = (stripped[3:].split(maxsplit=1) or [""])[0].lower()
        else:
            blocks.append((language, "".join(f"{content}\n" for content in lines[opening + 1 : number])))
            opening = -1
    return blocks


def row_tests(row: Mapping[str, Any]) -> RowTests:
    """The tests of a row. Raises InvalidTests."""
    test = row.get("test")
    listed = row.get("test_list")
    if isinstance(test, str) and row.get("entry_point"):
        return _humaneval_tests(str(row.get("prompt") or ""), test, str(row["entry_point"]))
    if listed:
        return _mbpp_tests(row, [*_text_list(listed), *_text_list(row.get("challenge_test_list"))])
    raise InvalidTests("it has neither `test` with `entry_point` nor a `test_list`")


def _humaneval_tests(prompt: str, test: str, entry: str) -> RowTests:
    """HumanEval: imports and helpers of the prompt, the tests, then `check` called with the solution's function."""
    if not entry.isidentifier():
        raise InvalidTests("its `entry_point` is no name")
    if not any(
        isinstance(node, ast.FunctionDef) and node.name == "check" for node in _parse_or_raise(test, "`test`").body
    ):
        raise InvalidTests("its `test` has no function `check`")
    text = f"{_complete_prompt(prompt)}\n{entry} = __solution__({entry!r})\n{test}\ncheck({entry})\n"
    _require_assertions(_parse_or_raise(text, "`prompt` and `test`"))
    return RowTests(prompt, entry, text)


def _mbpp_tests(row: Mapping[str, Any], tests: Sequence[str]) -> RowTests:
    """MBPP: the imports of the reference, the names that the tests take from the solution, the setup, the tests."""
    setup = [*_text_list(row.get("test_imports")), str(row.get("test_setup_code") or "")]
    tree = _parse_or_raise("\n".join([*setup, *tests]), "`test_list`")
    _require_assertions(tree)
    reference = _parse(str(row.get("code") or ""))
    if reference:
        imports = [ast.unparse(node) for node in reference.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    else:
        imports = []
    # Without a reference that makes any of them, whatever nobody else makes is the solution's.
    solution_names = _loaded_names(tree) & (_top_level_names(reference) if reference else set()) or _loaded_names(
        tree
    ) - _top_level_names(tree) - set(dir(builtins))
    names = [f"{name} = __solution__({name!r})" for name in sorted(solution_names)]
    if not names:
        raise InvalidTests("its tests use nothing of the solution")
    return RowTests("", "", "\n".join([*imports, *names, *setup, *tests]))


def _text_list(value: object) -> list[str]:
    """A list of texts, also as the JSON that some data sets hold."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return [str(value)] if str(value).strip() else []
    if isinstance(value, (list, tuple)):
        return [str(element).replace("\r\n", "\n") for element in value]
    return []


def _complete_prompt(prompt: str) -> str:
    """A prompt that ends with a function's first line or docstring, as whole statements."""
    if _parse(prompt) is not None:
        return prompt
    if _parse(f"{prompt.rstrip()}\n    pass\n"):
        return f"{prompt.rstrip()}\n    pass\n"
    return ""


def _parse(source: str) -> ast.Module | None:
    try:
        return ast.parse(source.replace("\r\n", "\n"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _parse_or_raise(source: str, label: str) -> ast.Module:
    tree = _parse(source)
    if tree is None:
        raise InvalidTests(f"its {label} is no Python")
    return tree


def _require_assertions(tree: ast.Module) -> None:
    if not any(isinstance(node, (ast.Assert, ast.Raise)) for node in ast.walk(tree)):
        raise InvalidTests("its tests assert nothing")


def _loaded_names(tree: ast.Module) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _top_level_names(tree: ast.Module) -> set[str]:
    """Names that a text's top statements make, imports left out."""
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    stored = (
        node
        for statement in tree.body
        if isinstance(statement, (ast.Assign, ast.AnnAssign))
        for node in ast.walk(statement)
    )
    return names | {node.id for node in stored if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}

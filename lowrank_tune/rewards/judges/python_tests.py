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

from lowrank_tune.rewards.sandbox.check import Ended, Pair

PYTHON = ("python", "py", "python3")


SHARE = 0.6  # of the time of a check, for the code and its tests; the rest is for the start
REMEMBERED = 1024  # rows of which is known whether their own reference minds types


class Unusable(Exception):
    """A row without tests that can be run; the message says what it lacks."""


class Unsettled(Exception):
    """Whether types count for a row could not be found out: the machine was too busy, or the sandbox did not start."""

    def __init__(self, ended: Ended) -> None:
        self.ended = ended


@dataclass(frozen=True)
class Tests:
    """The tests of a row as one text, and what stands before the code: `prompt` begins the function `entry`, or both
    are empty."""

    prompt: str
    entry: str
    text: str


def load(job: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, str]]:
    """Checks at the level of the job. The next pair of processes starts while the trainer does something else."""
    held = [Pair(job["level"])]

    def grade(asked: Mapping[str, Any]) -> dict[str, str]:
        tests, code, seconds = row_tests(asked["row"]), code_of(asked["completion"]), asked["seconds"] * SHARE
        ended = check(tests, code, seconds, True)
        if ended.mistyped and (reference := reference_of(asked["row"])):
            try:
                ended = check(tests, code, seconds, False) if careless(tests, reference, seconds) else ended
            except Unsettled as unsettled:
                ended = unsettled.ended
        return {"outcome": ended.outcome, "reason": ended.reason}

    @lru_cache(REMEMBERED)
    def careless(tests: Tests, reference: str, seconds: float) -> bool:
        """Whether the row's own reference fails its tests by a type alone, as one that returns 0 for False: types do
        not count there."""
        ended = check(tests, reference, seconds, True)
        if ended.outcome in ("late", "error"):
            raise Unsettled(ended)
        return ended.mistyped

    def check(tests: Tests, code: str, seconds: float, strict: bool) -> Ended:
        if held[0].used:  # an alarm has cut the last check short
            renew()
        ended = held[0].check(tests.prompt, code, tests.entry, tests.text, seconds, strict)
        renew()
        return ended

    def renew() -> None:
        held[0].end()
        held[0] = Pair(job["level"])

    return grade


def reference_of(row: Mapping[str, Any]) -> str:
    """The row's own solution; empty where it has none."""
    return str(row.get("canonical_solution") or row.get("code") or "").replace("\r\n", "\n")


def code_of(completion: str) -> str:
    """The code of a completion: its last fence that says it is Python, else its last fence, else all of it. A last
    fence may be open."""
    found = fences(completion)
    named = [code for language, code in found if language in PYTHON]
    return (named or [code for _, code in found] or [completion])[-1]


def fences(text: str) -> list[tuple[str, str]]:
    """What stands between lines of three backticks, with the first word behind the opening ones, in small letters."""
    found, opening, language = [], -1, ""
    lines = text.split("\n")
    for number, line in enumerate([*lines, "```"]):
        mark = line.strip(" \t\r")
        if not mark.startswith("```"):
            continue
        if opening < 0:
            opening, language = number, (mark[3:].split(maxsplit=1) or [""])[0].lower()
        else:
            found.append((language, "".join(f"{each}\n" for each in lines[opening + 1 : number])))
            opening = -1
    return found


def row_tests(row: Mapping[str, Any]) -> Tests:
    """The tests of a row. Raises Unusable."""
    test, listed = row.get("test"), row.get("test_list")
    if isinstance(test, str) and row.get("entry_point"):
        return _of_function(str(row.get("prompt") or ""), test, str(row["entry_point"]))
    if listed:
        return _of_list(row, [*_texts(listed), *_texts(row.get("challenge_test_list"))])
    raise Unusable("it has neither `test` with `entry_point` nor a `test_list`")


def _of_function(prompt: str, test: str, entry: str) -> Tests:
    """HumanEval: imports and helpers of the prompt, the tests, then `check` called with the solution's function."""
    if not entry.isidentifier():
        raise Unusable("its `entry_point` is no name")
    if not any(isinstance(each, ast.FunctionDef) and each.name == "check" for each in _parsed(test, "`test`").body):
        raise Unusable("its `test` has no function `check`")
    text = f"{_whole(prompt)}\n{entry} = __solution__({entry!r})\n{test}\ncheck({entry})\n"
    _asserting(_parsed(text, "`prompt` and `test`"))
    return Tests(prompt, entry, text)


def _of_list(row: Mapping[str, Any], tests: Sequence[str]) -> Tests:
    """MBPP: the imports of the reference, the names that the tests take from the solution, the setup, the tests."""
    before = [*_texts(row.get("test_imports")), str(row.get("test_setup_code") or "")]
    tree = _parsed("\n".join([*before, *tests]), "`test_list`")
    _asserting(tree)
    reference = _tree(str(row.get("code") or ""))
    imports = (
        [ast.unparse(each) for each in reference.body if isinstance(each, (ast.Import, ast.ImportFrom))]
        if reference
        else []
    )
    # Without a reference that makes any of them, whatever nobody else makes is the solution's.
    wanted = _loaded(tree) & (_made(reference) if reference else set()) or _loaded(tree) - _made(tree) - set(
        dir(builtins)
    )
    names = [f"{name} = __solution__({name!r})" for name in sorted(wanted)]
    if not names:
        raise Unusable("its tests use nothing of the solution")
    return Tests("", "", "\n".join([*imports, *names, *before, *tests]))


def _texts(value: object) -> list[str]:
    """A list of texts, also as the JSON that some data sets hold."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return [str(value)] if str(value).strip() else []
    return [str(each).replace("\r\n", "\n") for each in value] if isinstance(value, (list, tuple)) else []


def _whole(prompt: str) -> str:
    """A prompt that ends with a function's first line or docstring, as whole statements."""
    return (
        prompt
        if _tree(prompt) is not None
        else f"{prompt.rstrip()}\n    pass\n"
        if _tree(f"{prompt.rstrip()}\n    pass\n")
        else ""
    )


def _tree(source: str) -> ast.Module | None:
    try:
        return ast.parse(source.replace("\r\n", "\n"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _parsed(source: str, what: str) -> ast.Module:
    tree = _tree(source)
    if tree is None:
        raise Unusable(f"its {what} is no Python")
    return tree


def _asserting(tree: ast.Module) -> None:
    if not any(isinstance(each, (ast.Assert, ast.Raise)) for each in ast.walk(tree)):
        raise Unusable("its tests assert nothing")


def _loaded(tree: ast.Module) -> set[str]:
    return {each.id for each in ast.walk(tree) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load)}


def _made(tree: ast.Module) -> set[str]:
    """Names that a text's top statements make, imports left out."""
    made = {each.name for each in tree.body if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    stored = (
        each
        for statement in tree.body
        if isinstance(statement, (ast.Assign, ast.AnnAssign))
        for each in ast.walk(statement)
    )
    return made | {each.id for each in stored if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}

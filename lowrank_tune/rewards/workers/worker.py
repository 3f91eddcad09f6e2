"""Grades completions in a worker process; the other side is `process.py` in the main process.

Its imports are those of the standard library and `lowrank_tune.processes`, so that it starts in milliseconds and
without torch. The first message has the specs of the graders that it loads, and each later one a completion. The output
of a user's function is discarded, and its standard input is empty.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.abc
import importlib.util
import inspect
import linecache
import math
import numbers
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from lowrank_tune.processes.child import import_without_init
from lowrank_tune.processes.limits import (
    CallTimeout,
    added_memory_limit,
    call_with_time_limit,
    peak_megabytes,
)

VERIFIER_MEGABYTES = 512  # memory that one call of a built-in verifier may add to this process
RECYCLE_MEGABYTES = 256  # a process to which verifiers have added more than this is replaced
TIMEOUT_MARGIN = 0.9  # a verifier is interrupted a little before the main process kills this process
MAX_MESSAGE_CHARS = 200  # characters of the message of an exception
MAX_REPR_CHARS = 80
GradeFn = Callable[[Mapping[str, Any]], Any]
"""Grades one completion: returns a number, or for a built-in verifier the plain data that its `parse_reply` reads."""


class SourceSnapshotLoader(importlib.abc.ExecutionLoader):
    """Loads a module from the text that the run read at its start: later edits of the file change nothing."""

    def __init__(self, path: str, source: str) -> None:
        self.path = path
        self.source = source

    def get_source(self, fullname: str) -> str:
        return self.source

    def get_filename(self, fullname: str) -> str:
        return self.path


class RewardFunctionError(Exception):
    """A user's function, or a value that it returned, cannot be used; the message is a predicate."""


def load_file(path: str, source: str) -> ModuleType:
    """Returns the user's file as a module, with its folder on the import path as for a script."""
    name = f"reward_{hashlib.blake2b(path.encode(), digest_size=8).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    folder = os.path.dirname(path)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    loader = SourceSnapshotLoader(path, source)
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look up their module while it is executed
    sys.modules[name] = module
    # so that a traceback shows the line that ran
    linecache.cache[path] = (len(source), None, source.splitlines(True), path)
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def load_user_function(spec: Mapping[str, Any]) -> GradeFn:
    """Returns the grader of a user's function, after the checks that need no completion. Raises RewardFunctionError."""
    function = getattr(load_file(spec["path"], spec["source"]), spec["function"], None)
    if not callable(function):
        raise RewardFunctionError(f"has no function `{spec['function']}`")
    try:
        inspect.signature(function).bind("", {})
    except TypeError as error:
        raise RewardFunctionError(f"`{spec['function']}` must take (completion, row): {error}") from None
    except ValueError:  # some builtins have no signature
        pass

    def grade(request: Mapping[str, Any]) -> float:
        # the draws of a function depend on the completion and not on the order of completions
        random.seed(f"{request['prompt']}\n{request['completion']}".encode(errors="surrogatepass"))
        return finite(function(request["completion"], request["row"]))

    return grade


def finite(value: object) -> float:
    """Returns a bool, int, float or numpy number as a finite float. Raises RewardFunctionError for anything else."""
    if value is None:
        raise RewardFunctionError("returned None, which is not a number (does every path return one?)")
    if not isinstance(value, numbers.Real):
        raise RewardFunctionError(f"returned {safe_repr(value)}, which is not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RewardFunctionError(f"returned {number}, which is not a finite number")
    return number


def load_verifier(spec: Mapping[str, Any]) -> GradeFn:
    """Returns the grader of a built-in verifier, `load(spec)` of the module in the spec, with limits."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with import_without_init("lowrank_tune.rewards", folder):
        grade = importlib.import_module(spec["module"]).load(spec)
    return LimitedGrader(grade, spec.get("megabytes", VERIFIER_MEGABYTES))


class LimitedGrader:
    """A built-in verifier with limits on CPU time and memory around each call.

    The limit is CPU time, which does not depend on other programs; the main process, which has a limit too, ends a call
    that sleeps. A call raises CallTimeout if it takes too long, also if the verifier itself raises TimeoutError, and
    MemoryError if it takes too much memory. The user's functions in this process have no such limits.

    `added_megabytes`: memory that the calls have added to the peak of this process. `grew_fast`: whether the last call
    added more than half of its limit; libraries catch MemoryError, so such a call may have reached the limit and still
    returned.
    """

    def __init__(self, grade: GradeFn, megabytes: int) -> None:
        self.grade = grade
        self.megabytes = megabytes
        self.added_megabytes = 0.0
        self.grew_fast = False

    def __call__(self, request: Mapping[str, Any]) -> Any:
        before = peak_megabytes()
        seconds = request["seconds"] * TIMEOUT_MARGIN
        try:
            with added_memory_limit(self.megabytes):
                return call_with_time_limit(seconds, lambda: self.grade(request))
        except TimeoutError:
            raise CallTimeout from None
        finally:
            added = peak_megabytes() - before
            self.added_megabytes += added
            self.grew_fast = added > self.megabytes / 2


LOADERS: dict[str, Callable[[Mapping[str, Any]], GradeFn]] = {"own": load_user_function, "verifier": load_verifier}


def format_exception(error: BaseException, path: str) -> str:
    """Returns an exception as a predicate, with the last line of the user's file in its traceback."""
    if isinstance(error, RewardFunctionError):
        return str(error)
    name = type(error).__name__
    file = os.path.basename(path)
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"raised {name}: {error.msg} ({file}:{error.lineno})"
    try:
        message = str(error)[:MAX_MESSAGE_CHARS]
    except Exception:
        message = "(its message raises too)"
    raised = f"raised {name}: {message}" if message else f"raised {name}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if not frames:
        return raised
    return f"{raised} ({file}:{frames[-1].lineno}: {frames[-1].line})"


def safe_repr(value: object) -> str:
    """Returns a short repr, or the type if `repr` raises."""
    try:
        return repr(value)[:MAX_REPR_CHARS]
    except Exception:
        return f"a {type(value).__name__}"


def load_grader(spec: Mapping[str, Any]) -> GradeFn | str:
    """Returns the grader of a spec, or why it cannot be loaded."""
    try:
        return LOADERS[spec["kind"]](spec)
    except BaseException as error:  # also SystemExit: the file is at fault if it ends the process
        return format_exception(error, spec.get("path", ""))


def grade_completion(
    grade: GradeFn,
    request: Mapping[str, Any],
    path: str,
) -> dict[str, Any]:
    """Returns the reply for one completion: its `value`, or `late` if a verifier exceeded its time, or a `fault`.

    For a verifier also `steep`, whether the call may have reached the memory limit, and `too_large`, whether this
    process has grown so much that it should be replaced.
    """
    start = time.perf_counter()
    out_of_memory = False
    try:
        reply: dict[str, Any] = {"value": grade(request)}
    except CallTimeout:
        reply = {"late": True}
    except BaseException as error:
        reply = {"fault": format_exception(error, path)}
        out_of_memory = isinstance(error, MemoryError)
    if isinstance(grade, LimitedGrader):
        reply["steep"] = grade.grew_fast or out_of_memory
        reply["too_large"] = grade.added_megabytes > RECYCLE_MEGABYTES
    return {**reply, "seconds": time.perf_counter() - start}


class Graders:
    """The graders of one process: the first message has their specs, and each later one a completion."""

    def __init__(self) -> None:
        self._specs: list[Mapping[str, Any]] = []
        self._graders: list[GradeFn | str] | None = None

    def __call__(self, message: Any) -> dict[str, Any]:
        if self._graders is None:
            self._specs = message
            self._graders = [load_grader(spec) for spec in self._specs]
            return {"faults": [grade if isinstance(grade, str) else None for grade in self._graders]}
        index = message["job"]
        grade = self._graders[index]
        assert not isinstance(grade, str)
        return grade_completion(grade, message, self._specs[index].get("path", ""))


def start() -> Graders:
    """Returns the function that answers the messages of the main process."""
    return Graders()

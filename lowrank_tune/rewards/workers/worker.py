"""A scoring worker: a plain script of the standard library, started by its path, so that it neither imports torch nor
starts slowly.

It reads one JSON object a line from a socket: first the jobs, which it loads, then completions. It answers each with
one line. What the user's code prints goes nowhere, and it reads an empty input.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.abc
import importlib.util
import inspect
import json
import linecache
import math
import numbers
import os
import random
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

PR_SET_PDEATHSIG = 1
MEGABYTE = 1 << 20
VERIFIER_MEGABYTES = 512  # what one judged call of a verifier of the kit may add to this process
RECYCLE_MEGABYTES = 256  # a process that verifiers have made larger by this is replaced
TIMEOUT_MARGIN = 0.9  # a verifier is interrupted a little before the parent kills this process
ALARM_INTERVAL_SECONDS = 0.05  # of CPU; the alarm repeats: a bare `except` or a destructor may swallow the first
GradeFn = Callable[[Mapping[str, Any]], Any]
"""One completion judged: a figure, or for a verifier of the kit whatever its `parse_reply` reads, as plain data."""


class SourceSnapshotLoader(importlib.abc.ExecutionLoader):
    """Loads a module from the text that the run read at its start: a file that is edited later changes nothing."""

    def __init__(self, path: str, source: str) -> None:
        self.path = path
        self.source = source

    def get_source(self, fullname: str) -> str:
        return self.source

    def get_filename(self, fullname: str) -> str:
        return self.path


class CallTimeout(BaseException):
    """The time is over; no `except Exception` of a library takes it for its own."""


class RewardFunctionError(Exception):
    """A job or a value that cannot be used, in words."""


def load_file(path: str, source: str) -> ModuleType:
    """The user's file as a module of its own, its folder on the import path as if it were run."""
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
    sys.modules[name] = module  # dataclasses look their module up while it is made
    linecache.cache[path] = (len(source), None, source.splitlines(True), path)  # so a fault shows the line that ran
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def load_user_function(spec: Mapping[str, Any]) -> GradeFn:
    """The user's function, checked for what can be checked without a completion."""
    function = getattr(load_file(spec["path"], spec["source"]), spec["function"], None)
    if not callable(function):
        raise RewardFunctionError(f"has no function `{spec['function']}`")
    try:
        inspect.signature(function).bind("", {})
    except TypeError as error:
        raise RewardFunctionError(f"`{spec['function']}` must take (completion, row): {error}") from None
    except ValueError:  # some builtins tell no signature
        pass

    def grade(request: Mapping[str, Any]) -> float:
        # Whatever it draws, the order of completions does not show in it.
        random.seed(f"{request['prompt']}\n{request['completion']}".encode(errors="surrogatepass"))
        return finite(function(request["completion"], request["row"]))

    return grade


def finite(value: object) -> float:
    """The value as a finite float; bool, int, float and what numpy makes of them."""
    if not isinstance(value, numbers.Real):
        raise RewardFunctionError(
            f"returned {safe_repr(value)}, which is no number"
            + (" (does every path return one?)" if value is None else "")
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RewardFunctionError(f"returned {number}, which is no finite number")
    return number


def load_verifier(spec: Mapping[str, Any]) -> GradeFn:
    """Returns `load(spec)` of the module that the spec names, with limits."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    root = os.path.dirname(os.path.dirname(folder))
    if root not in sys.path:
        sys.path.append(root)
    with import_without_init("lowrank_tune.rewards", folder):
        grade = importlib.import_module(spec["module"]).load(spec)
    return LimitedGrader(grade, spec.get("megabytes", VERIFIER_MEGABYTES))


@contextlib.contextmanager
def import_without_init(name: str, folder: str) -> Iterator[None]:
    """A package without what its `__init__` imports: it brings torch in, seconds and 300 MB for each worker."""
    if name in sys.modules:
        yield
        return
    package = ModuleType(name)
    package.__path__ = [folder]
    sys.modules[name] = package
    try:
        yield
    finally:
        del sys.modules[name]  # for a user's file that imports the real one


class LimitedGrader:
    """A verifier with limits on CPU time and memory around each call; the user's functions in this process keep theirs.

    CPU time, so that a busy machine changes nothing; the parent, which has a limit too, sees a call that sleeps. Too
    late is CallTimeout, also where a verifier itself raises TimeoutError; too much memory is MemoryError.
    `added_megabytes`: MB that its calls have added to the peak of this process (libraries catch MemoryError, so a call
    that answered may have met the limit); `grew_fast`: its last call added more than half of what it may.
    """

    def __init__(self, grade: GradeFn, megabytes: int) -> None:
        self.grade = grade
        self.megabytes = megabytes
        self.added_megabytes = 0.0
        self.grew_fast = False

    def __call__(self, request: Mapping[str, Any]) -> Any:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        before = peak_megabytes()

        def restore() -> None:
            signal.setitimer(signal.ITIMER_PROF, 0)
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

        try:
            try:
                self._limit(request["seconds"] * TIMEOUT_MARGIN, soft, hard)
                return self.grade(request)
            finally:
                restore()
        except CallTimeout:
            restore()  # the alarm may have rung within the line above
            raise
        except TimeoutError:
            raise CallTimeout from None
        finally:
            added = peak_megabytes() - before
            self.added_megabytes = self.added_megabytes + added
            self.grew_fast = added > self.megabytes / 2

    def _limit(self, seconds: float, soft: int, hard: int) -> None:
        if sys.platform == "linux":
            with open("/proc/self/statm", encoding="ascii") as status:
                pages = int(status.read().split()[0])
            maximum = pages * resource.getpagesize() + self.megabytes * MEGABYTE
            limits = [limit for limit in (maximum, soft, hard) if limit != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
        signal.signal(signal.SIGPROF, raise_timeout)
        signal.setitimer(signal.ITIMER_PROF, seconds, ALARM_INTERVAL_SECONDS)


def raise_timeout(*_: object) -> None:
    raise CallTimeout


def peak_megabytes() -> float:
    """The most memory that this process has held at once. Linux hands `ru_maxrss` on from the parent, which is large:
    not that."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEGABYTE
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        return int(status.read().partition("VmHWM:")[2].split()[0]) / 1024


LOADERS: dict[str, Callable[[Mapping[str, Any]], GradeFn]] = {"own": load_user_function, "verifier": load_verifier}


def format_exception(error: BaseException, path: str) -> str:
    """An exception in words, with the last line of the user's file that it went through."""
    if isinstance(error, RewardFunctionError):
        return str(error)
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"raised {type(error).__name__}: {error.msg} ({os.path.basename(path)}:{error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    try:
        message = str(error)
    except Exception:
        message = "(its message raises too)"
    if frames:
        where = f" ({os.path.basename(path)}:{frames[-1].lineno}: {frames[-1].line})"
    else:
        where = ""
    return f"raised {type(error).__name__}: {message[:200]}{where}"


def safe_repr(value: object) -> str:
    """A short repr, even of what has none."""
    try:
        return repr(value)[:80]
    except Exception:
        return f"a {type(value).__name__}"


def load_grader(spec: Mapping[str, Any]) -> GradeFn | str:
    """A job made ready, or why not."""
    try:
        return LOADERS[spec["kind"]](spec)
    except BaseException as error:  # also SystemExit: a file that ends the process is a fault of that file
        return format_exception(error, spec.get("path", ""))


def grade_completion(grade: GradeFn, request: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The reply to one completion. `late` and `steep`: it exceeded, or may have met, a limit of a verifier on time and
    on memory."""
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
        reply |= {"steep": grade.grew_fast or out_of_memory, "worn": grade.added_megabytes > RECYCLE_MEGABYTES}
    return {**reply, "seconds": time.perf_counter() - start}


def die_with_parent(parent: int) -> None:
    """However the parent ends, this process does not outlive it, not even inside a loop of C code that nothing
    interrupts."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def main(descriptor: int, parent: int) -> None:
    """Serves until the other end is closed."""
    die_with_parent(parent)
    os.set_inheritable(descriptor, False)
    with socket.socket(fileno=descriptor) as channel, channel.makefile("rw", encoding="ascii", newline="\n") as lines:

        def send(reply: Mapping[str, Any]) -> None:
            lines.write(json.dumps(reply) + "\n")
            lines.flush()

        specs = json.loads(lines.readline() or "[]")
        graders = [load_grader(spec) for spec in specs]
        send({"faults": [grade if isinstance(grade, str) else None for grade in graders]})
        while line := lines.readline():
            request = json.loads(line)
            grade = graders[request["job"]]
            assert not isinstance(grade, str)
            send(grade_completion(grade, request, specs[request["job"]].get("path", "")))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

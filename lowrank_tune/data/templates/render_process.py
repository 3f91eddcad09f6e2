"""Chat templates, rendered in a worker process with limits on time, memory and text; the other side is
`render_worker.py`.

A chat template comes with the base, from anyone, and Jinja's sandbox limits neither the time nor the memory of a loop.
All templates of a process share one worker, which starts at the first rendering and is replaced after it was killed.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lowrank_tune.data.formats import InvalidRow
from lowrank_tune.errors import UserError
from lowrank_tune.processes.worker_process import (
    WorkerExited,
    WorkerProcess,
    WorkerStarved,
    WorkerTimeout,
)

MODULE = "lowrank_tune.data.templates.render_worker"
PROCESS = "the process that renders the base's chat template"
START_SECONDS = 60.0
MAX_BATCH = 1024
"""Renderings of one request."""
BATCH_CHARS = 4 << 20
"""Characters of a request, and of a reply without its last text."""
KILL_FACTOR = 1.5
"""Times the limit of a rendering after which the worker is killed: C code is not interrupted by the limit itself."""
NO_ARGUMENTS: Mapping[str, Any] = {}


@dataclass(frozen=True)
class RenderLimits:
    """Limits of one rendering: CPU time, memory that it adds, and characters of its text. `batch_seconds`: the CPU time
    after which the worker replies with what it has rendered."""

    row_seconds: float = 5.0
    megabytes: int = 512
    row_chars: int = 8 << 20
    batch_seconds: float = 2.0


class RenderRequest(NamedTuple):
    """One rendering. `row`: the number of the row that it belongs to, where several renderings belong to one row.
    `arguments`: further arguments of the template, such as `tools`."""

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool
    row: int = 0
    arguments: Mapping[str, Any] = NO_ARGUMENTS


class Template(NamedTuple):
    """A chat template, and the variables of the tokenizer that it may write, such as `bos_token`."""

    text: str
    variables: Mapping[str, str]


class LimitExceeded(InvalidRow):
    """A row on which the template exceeds a limit. `fault`: a predicate, as "exceeds 5 s"."""

    def __init__(self, fault: str) -> None:
        super().__init__(f"the base's chat template {fault} on it")
        self.fault = fault


class RenderProcess:
    """The worker process that renders templates. It can be used by several threads."""

    def __init__(self, limits: RenderLimits | None = None) -> None:
        self.limits = limits or RenderLimits()
        self._lock = threading.Lock()
        self._worker: WorkerProcess | None = None
        self._keys: dict[tuple[str, tuple[tuple[str, str], ...]], int] = {}

    def render_some(self, template: Template, requests: Sequence[RenderRequest]) -> list[str | InvalidRow]:
        """Renders at least the first of these requests. If one exceeds a limit, it is the last that is returned.

        Raises UserError if the worker cannot start, and TypeError for messages that JSON cannot represent.
        """
        batch = _first_batch(requests)
        with self._lock:
            try:
                return self._send(template, batch)
            except WorkerTimeout:
                # C code, which no limit in the worker interrupts
                if len(batch) == 1:
                    return [self._too_slow()]
            except WorkerExited:
                # Perhaps not because of a row: a worker ends with the thread that started it.
                pass
            # One by one, the fault is that of its own row.
            return self._render_one_by_one(template, batch)

    def close(self) -> None:
        """Ends the worker; the next rendering starts another one."""
        with self._lock:
            self._stop()

    def forget(self) -> None:
        """Leaves the worker to the parent process, in a process that was forked."""
        self._lock = threading.Lock()
        if self._worker is not None:
            self._worker.leave_to_parent()
        self._worker = None

    def _render_one_by_one(self, template: Template, batch: Sequence[RenderRequest]) -> list[str | InvalidRow]:
        outcomes: list[str | InvalidRow] = []
        for request in batch:
            outcome = self._render_alone(template, request)
            outcomes.append(outcome)
            if isinstance(outcome, LimitExceeded):
                break
        return outcomes

    def _render_alone(self, template: Template, request: RenderRequest) -> str | InvalidRow:
        try:
            (outcome,) = self._send(template, [request])
        except WorkerTimeout:
            return self._too_slow()
        except WorkerExited as error:
            return LimitExceeded(f"ends its process (it {error})")
        return outcome

    def _too_slow(self) -> LimitExceeded:
        return LimitExceeded(f"exceeds {self.limits.row_seconds:g} s")

    def _send(self, template: Template, batch: Sequence[RenderRequest]) -> list[str | InvalidRow]:
        """Raises WorkerTimeout or WorkerExited, after which the worker is another one."""
        message = self._message(batch)
        worker = self._running_worker()
        key = (template.text, tuple(template.variables.items()))
        message["key"] = self._keys.get(key, len(self._keys))
        if key not in self._keys:
            message["template"] = template.text
            message["variables"] = template.variables
        seconds = self.limits.row_seconds * KILL_FACTOR
        if len(batch) > 1:
            seconds += 2 * self.limits.batch_seconds
        try:
            reply = worker.request(message, seconds)
        except WorkerStarved as starved:
            self._stop()
            raise UserError(f"the machine is too busy to render the base's chat template: {starved}") from None
        except BaseException:
            # also KeyboardInterrupt: the reply would be taken for that of the next request
            self._stop()
            raise
        self._keys[key] = message["key"]
        if reply["too_large"]:
            self._stop()
        return [_read_outcome(outcome) for outcome in reply["outcomes"]]

    def _message(self, batch: Sequence[RenderRequest]) -> dict[str, Any]:
        """Returns the request for a batch: each message once, since the renderings of a row begin with the same."""
        messages: list[Mapping[str, Any]] = []
        index_of: dict[int, int] = {}
        rows = []
        for request in batch:
            indices = []
            for message in request.messages:
                index = index_of.setdefault(id(message), len(messages))
                if index == len(messages):
                    messages.append(message)
                indices.append(index)
            row: list[Any] = [indices, request.add_generation_prompt]
            if request.arguments:
                _check_json(request.arguments)
                row.append(request.arguments)
            rows.append(row)
        for message in messages:
            for value in message.values():
                # most values are texts
                if type(value) is not str:
                    _check_json(value)
        return {
            "messages": messages,
            "rows": rows,
            "row_seconds": self.limits.row_seconds,
            "megabytes": self.limits.megabytes,
            "row_chars": self.limits.row_chars,
            "batch_seconds": self.limits.batch_seconds,
            "batch_chars": BATCH_CHARS,
        }

    def _running_worker(self) -> WorkerProcess:
        """Returns the worker; another one if it has ended, as it does with the thread that started it."""
        if self._worker is not None and self._worker.is_running:
            return self._worker
        self._stop()
        try:
            self._worker = WorkerProcess(MODULE)
            self._worker.first_request({}, START_SECONDS)
        except OSError as error:
            raise UserError(f"{PROCESS} cannot be started: {error.strerror or error}") from error
        except WorkerExited as error:
            self._stop()
            raise UserError(f"{PROCESS} {error}") from None
        except BaseException:
            self._stop()
            raise
        return self._worker

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
        self._worker = None
        self._keys = {}


@functools.cache
def shared_process() -> RenderProcess:
    """Returns the one of this process."""
    process = RenderProcess()
    os.register_at_fork(after_in_child=process.forget)
    return process


def _check_json(value: Any) -> None:
    """Raises TypeError for a value that JSON would change, such as a tuple, a date or a key that is no text."""
    if value is None or isinstance(value, (str, int, float)):
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a chat template takes keys of text, not {key!r}")
            _check_json(item)
    elif isinstance(value, list):
        for item in value:
            _check_json(item)
    else:
        raise TypeError(f"a chat template takes plain JSON data, not a {type(value).__name__}")


def _first_batch(requests: Sequence[RenderRequest]) -> Sequence[RenderRequest]:
    """Returns the first requests, as many as are sent together."""
    num_chars = 0
    for index, request in enumerate(requests[:MAX_BATCH]):
        for message in request.messages:
            content = message.get("content")
            if isinstance(content, str):
                num_chars += len(content)
        if num_chars > BATCH_CHARS:
            return requests[: index + 1]
    return requests[:MAX_BATCH]


def _read_outcome(outcome: str | Mapping[str, str]) -> str | InvalidRow:
    if isinstance(outcome, str):
        return outcome
    if "exceeded" in outcome:
        return LimitExceeded(f"exceeds {outcome['exceeded']}")
    return InvalidRow(f"the base's chat template refuses it: {outcome['refused']}")

"""Event sinks: JSON lines files, and the event bus, in which a sink that fails never stops a run."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from lowrank_tune.checkpoint import as_user_error, replace_nonfinite, write_error, write_file, write_fully
from lowrank_tune.errors import TrainingError, UserError
from lowrank_tune.events import CheckpointSaved, Evaluated, Event, RunEnded, SampleLogged, StepEnd, to_json, warning
from lowrank_tune.json_files import describe_lines, parse_json


class Sink(Protocol):
    """Receives each event; `close` is called at the end of the run."""

    def __call__(self, event: Event) -> None: ...
    def close(self) -> None: ...


def to_json_line(event: Event) -> bytes:
    """Returns an event as one line of ASCII JSON, lone surrogates escaped.

    A number that is not finite becomes null, which `events.from_json` reads as nan.
    """
    data = to_json(event)
    try:
        text = json.dumps(data, allow_nan=False)
    except ValueError:
        text = json.dumps(replace_nonfinite(data), allow_nan=False)
    return text.encode("ascii") + b"\n"


class JsonLines:
    """Appends each event as one line, in one write, so that a reader can follow the file.

    `event_types` limits the events to these types. With `resumed_from` None the file begins empty; with a step, the
    lines that the resumed run will write again are removed. The file is replaced for that: a reader has to check its
    inode. Raises `TrainingError` or `UserError` with path and reason.
    """

    def __init__(
        self,
        path: Path,
        resumed_from: int | None = None,
        event_types: tuple[type[Event], ...] = (),
    ) -> None:
        self.path = path
        self.event_types = event_types
        with as_user_error(path):
            existing = path.read_bytes() if path.exists() else b""
            if resumed_from is None:
                truncated = b""
            else:
                truncated = truncate_after_step(existing, resumed_from)
            if truncated != existing:
                write_file(path, truncated)
            self._file: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def __call__(self, event: Event) -> None:
        if self._file is None or (self.event_types and not isinstance(event, self.event_types)):
            return
        line = to_json_line(event)
        try:
            write_fully(self._file, line)
            # a durable checkpoint without its history would leave a hole after a power cut
            if isinstance(event, (CheckpointSaved, RunEnded)):
                os.fsync(self._file)
        except OSError as error:
            raise TrainingError(str(write_error(self.path, error, len(line)))) from error

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def truncate_after_step(data: bytes, step: int) -> bytes:
    """Returns the complete, valid lines before the first measurement after the checkpoint of `step`."""
    kept_lines = []
    saved = False
    for raw in data.splitlines(keepends=True):
        event = _parse_line(raw)
        if event is None:
            continue
        later = event.get("step", 0)
        if isinstance(later, int) and (
            later > step or (saved and event.get("event") in (Evaluated.kind, SampleLogged.kind))
        ):
            break
        saved = saved or (event.get("event") == CheckpointSaved.kind and later == step)
        kept_lines.append(raw)
    return b"".join(kept_lines)


def log_gaps(
    events: Path,
    samples: Path,
    step: int,
    has_ended: bool = False,
) -> Iterator[str]:
    """Yields messages about what is missing in the logs of a run, up to the checkpoint of `step`.

    With `has_ended` the end of the run must be in the log too. An incomplete last line, as a crash leaves it, is not a
    gap. Raises `UserError` for a file that cannot be read.
    """
    logged, broken_lines = _parse_lines(events, step)
    steps = {event.get("step") for event in logged if event.get("event") == StepEnd.kind}
    missing = [number for number in range(1, step + 1) if number not in steps]
    lacks_end = has_ended and not any(event.get("event") == RunEnded.kind for event in logged)
    if broken_lines or missing or lacks_end:
        first = f" (the first is step {missing[0]})" if missing else ""
        lines = describe_lines(broken_lines)
        end = ", and so is its end" if lacks_end else ""
        yield (
            f"{events} is damaged: {lines} cannot be read, and {len(missing)} of {step} steps are missing{first}{end}; "
            "curves and report are without them, the training continues unchanged"
        )
    num_logged = sum(event.get("event") == SampleLogged.kind for event in logged)
    shown, broken_lines = _parse_lines(samples, step)
    if broken_lines or len(shown) < num_logged:
        lines = f" ({describe_lines(broken_lines)} cannot be read)" if broken_lines else ""
        yield (
            f"{samples} is damaged: {len(shown)} of {num_logged} samples can be read{lines}; {events.name} holds them "
            "too"
        )


def _parse_lines(path: Path, step: int) -> tuple[list[dict[str, Any]], list[int]]:
    """Returns the events of a file up to a step, and the numbers of complete lines that are not events."""
    found: list[dict[str, Any]] = []
    broken: list[int] = []
    with as_user_error(path):
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
        else:
            lines = []
    for number, raw in enumerate(lines, start=1):
        event = _parse_line(raw)
        if event is not None and isinstance(event.get("step", 0), int):
            if event.get("step", 0) <= step:
                found.append(event)
        elif raw.endswith(b"\n"):
            broken.append(number)
    return found, broken


def _parse_line(raw: bytes) -> dict[str, Any] | None:
    """Returns the object in a complete line, None for an incomplete line and for one without an object."""
    try:
        event = parse_json(raw) if raw.endswith(b"\n") else None
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


class EventBus:
    """Sends each event to every sink. A sink that raises is removed, and a warning is sent to the others, once.

    Only a `UserError` (a log file on a full disk) is raised to the caller, once, after all other sinks have the event.
    """

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = list(sinks)
        # the thread that reads the keyboard emits too
        self._lock = threading.RLock()

    def attach(self, sink: Sink, earlier: Iterable[Event] = ()) -> None:
        """Adds a sink, after sending it the earlier events (the log file opens later than the screen)."""
        for event in earlier:
            sink(event)
        with self._lock:
            self._sinks.append(sink)

    def detach(self, sink: Sink) -> None:
        """Closes and removes a sink; a sink that failed is already removed."""
        with self._lock, suppress(ValueError):
            self._sinks.remove(sink)
        sink.close()

    def __call__(self, event: Event) -> None:
        fatal: UserError | None = None
        with self._lock:
            for sink in tuple(self._sinks):
                # the warning about another sink may have removed it
                if sink not in self._sinks:
                    continue
                try:
                    sink(event)
                except UserError as error:
                    self._sinks.remove(sink)
                    fatal = fatal or error
                except Exception as error:
                    self._sinks.remove(sink)
                    message = f"{type(sink).__name__} failed and is switched off: {type(error).__name__}: {error}"
                    try:
                        self(warning(message))
                    except UserError as nested:
                        fatal = fatal or nested
        if fatal is not None:
            raise fatal

    def close(self) -> None:
        """Closes every sink. Errors are ignored: each event was written when it was emitted."""
        for sink in self._sinks:
            with suppress(Exception):
                sink.close()
        self._sinks.clear()

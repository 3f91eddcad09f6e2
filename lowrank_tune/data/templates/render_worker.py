"""Renders chat templates in a worker process, by transformers' own code; the other side is `render_process.py`.

transformers is imported without torch: 0.6 s and 60 MB. A template can compute for any time and write any text, so each
rendering has limits; the first one that exceeds a limit is the last of its batch.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from lowrank_tune.processes.limits import (
    ALARM_INTERVAL_SECONDS,
    CallTimeout,
    limit_added_memory,
    peak_megabytes,
    raise_timeout,
)

RECYCLE_MEGABYTES = 256  # a process to which templates have added more than this is replaced
MAX_FAULT_CHARS = 100
SLICE = 64
"""Rows that are rendered by two calls of transformers: a call costs a third of a row."""
NO_ARGUMENTS: Mapping[str, Any] = {}
Outcome = str | dict[str, str]
"""A text; or why there is none: `refused`, the template's own error, or `exceeded`, a limit."""
Conversation = Sequence[Mapping[str, Any]]


class Row(NamedTuple):
    """One rendering, with its messages."""

    conversation: Conversation
    add_generation_prompt: bool
    arguments: Mapping[str, Any] = NO_ARGUMENTS


class TemplateRendering:
    """The templates of one process. A message has rows of one of them, and the template itself if it is new."""

    def __init__(self) -> None:
        self._templates: dict[int, tuple[str, Mapping[str, Any]]] = {}
        self._peak_megabytes = peak_megabytes()
        signal.signal(signal.SIGPROF, raise_timeout)

    def __call__(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if not message:
            # the first message, which only waits until this process has started
            return {}
        key: int = message["key"]
        if "template" in message:
            self._templates[key] = (message["template"], message["variables"])
        _, hard = limits = resource.getrlimit(resource.RLIMIT_AS)
        limit_added_memory(message["megabytes"])
        try:
            outcomes = self._render_rows(key, message)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
        added_megabytes = peak_megabytes() - self._peak_megabytes
        return {"outcomes": outcomes, "worn": added_megabytes > RECYCLE_MEGABYTES}

    def _render_rows(self, key: int, message: Mapping[str, Any]) -> list[Outcome]:
        """Renders the rows in order, up to the first that exceeds a limit, or as many as one reply may have."""
        messages = [_without_none(one) for one in message["messages"]]
        rows = [Row([messages[index] for index in indices], *others) for indices, *others in message["rows"]]
        end = time.process_time() + message["batch_seconds"]
        outcomes: list[Outcome] = []
        num_chars = 0
        while len(outcomes) < len(rows):
            start = len(outcomes)
            outcomes += self._render_slice(
                key,
                rows[start : start + SLICE],
                message,
                end,
            )
            last = outcomes[-1]
            if not isinstance(last, str) and "exceeded" in last:
                break
            num_chars += sum(len(outcome) for outcome in outcomes[start:] if isinstance(outcome, str))
            if time.process_time() > end or num_chars > message["batch_chars"]:
                break
        return outcomes

    def _render_slice(
        self,
        key: int,
        rows: Sequence[Row],
        limits: Mapping[str, Any],
        end: float,
    ) -> list[Outcome]:
        """Renders at least the first of these rows: all of them together, or one by one until one exceeds a limit, the
        CPU time `end`, or the characters of a reply."""
        together = self._render_together(
            key,
            rows,
            limits,
        )
        if together is not None:
            return together
        outcomes: list[Outcome] = []
        num_chars = 0
        for row in rows:
            outcome = self._render_row(
                key,
                row,
                limits,
            )
            outcomes.append(outcome)
            if isinstance(outcome, str):
                num_chars += len(outcome)
            elif "exceeded" in outcome:
                break
            if time.process_time() > end or num_chars > limits["batch_chars"]:
                break
        return outcomes

    def _render_together(
        self,
        key: int,
        rows: Sequence[Row],
        limits: Mapping[str, Any],
    ) -> list[Outcome] | None:
        """Renders all rows by two calls of transformers. Returns None if the template refuses a row or exceeds a
        limit."""
        if any(row.arguments for row in rows):
            return None
        rendered: dict[bool, Iterator[str]] = {}
        try:
            with _time_limit(limits["batch_seconds"]):
                for flag in (False, True):
                    conversations = [row.conversation for row in rows if row.add_generation_prompt is flag]
                    rendered[flag] = iter(
                        self._render(
                            key,
                            conversations,
                            flag,
                        )
                    )
        except (CallTimeout, Exception):
            # a template can raise any exception
            return None
        texts: list[Outcome] = [next(rendered[row.add_generation_prompt]) for row in rows]
        num_chars = [len(text) for text in texts]
        if max(num_chars) > limits["row_chars"] or sum(num_chars) > limits["batch_chars"]:
            return None
        return texts

    def _render_row(
        self,
        key: int,
        row: Row,
        limits: Mapping[str, Any],
    ) -> Outcome:
        """Renders one row. Returns the first line of what the template raises, or the limit that it exceeds."""
        try:
            with _time_limit(limits["row_seconds"]):
                try:
                    (text,) = self._render(
                        key,
                        [row.conversation],
                        row.add_generation_prompt,
                        row.arguments,
                    )
                except MemoryError:
                    return {"exceeded": f"{limits['megabytes']} MB of memory"}
                except Exception as error:
                    # a template can raise any exception
                    lines = str(error).splitlines() or [type(error).__name__]
                    return {"refused": lines[0][:MAX_FAULT_CHARS]}
        except CallTimeout:
            return {"exceeded": f"{limits['row_seconds']:g} s"}
        if len(text) > limits["row_chars"]:
            return {"exceeded": f"{limits['row_chars']:,} characters"}
        return text

    def _render(
        self,
        key: int,
        conversations: Sequence[Conversation],
        add_generation_prompt: bool,
        arguments: Mapping[str, Any] = NO_ARGUMENTS,
    ) -> list[str]:
        """Returns what `apply_chat_template(tokenize=False)` returns."""
        template, variables = self._templates[key]
        texts: list[str]
        texts, _ = render_jinja_template(
            conversations=conversations,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            **{**variables, **arguments},
        )
        return texts


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises CallTimeout in the body once it has used this CPU time."""
    try:
        try:
            signal.setitimer(signal.ITIMER_PROF, seconds, ALARM_INTERVAL_SECONDS)
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except CallTimeout:
        # the alarm may have interrupted the line above
        signal.setitimer(signal.ITIMER_PROF, 0)
        raise


def _without_none(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a message without keys whose value is None, which `apply_chat_template` leaves out too."""
    if None not in message.values():
        return message
    return {key: value for key, value in message.items() if value is not None}


def start() -> TemplateRendering:
    """Returns the function that answers the messages of the main process."""
    return TemplateRendering()

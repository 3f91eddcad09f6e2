"""Renders chat templates in a worker process, by transformers' own code; the other side is `render_process.py`.

transformers is imported without torch: 0.6 s and 60 MB. A template can compute for any time and write any text, so each
rendering has limits; the first one that exceeds a limit is the last of its batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from lowrank_tune.processes.limits import (
    CallTimeout,
    added_memory_limit,
    call_with_time_limit,
    peak_megabytes,
)

RECYCLE_MEGABYTES = 256  # a process to which templates have added more than this is replaced
MAX_FAULT_CHARS = 100
SLICE = 64
"""Rows that are rendered by two calls of transformers: a call costs a third of a row."""
SLICE_SHARE = 0.5
"""Of the time of a batch, for rendering a slice together. In the rest its rows are rendered one by one."""
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

    def __call__(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if not message:
            # the first message, which only waits until this process has started
            return {}
        key: int = message["key"]
        if "template" in message:
            self._templates[key] = (message["template"], message["variables"])
        template, variables = self._templates[key]
        batch = _Batch(
            template,
            variables,
            message,
        )
        with added_memory_limit(message["megabytes"]):
            outcomes = batch.render()
        added_megabytes = peak_megabytes() - self._peak_megabytes
        return {"outcomes": outcomes, "too_large": added_megabytes > RECYCLE_MEGABYTES}


class _Batch:
    """The rows of a message, with one template, and the limits in the message."""

    def __init__(
        self,
        template: str,
        variables: Mapping[str, Any],
        message: Mapping[str, Any],
    ) -> None:
        self._template = template
        self._variables = variables
        self._limits = message
        messages = [_without_none(one) for one in message["messages"]]
        self._rows = [Row([messages[index] for index in indices], *others) for indices, *others in message["rows"]]
        self._end = time.process_time() + message["batch_seconds"]
        self._outcomes: list[Outcome] = []
        self._num_chars = 0

    def render(self) -> list[Outcome]:
        """Renders the rows in order, up to the first that exceeds a limit, or as many as one reply may have."""
        while len(self._outcomes) < len(self._rows) and not self._is_complete():
            start = len(self._outcomes)
            rows = self._rows[start : start + SLICE]
            texts = self._render_together(rows)
            if texts is None:
                self._render_one_by_one(rows)
                continue
            for text in texts:
                self._add(text)
        return self._outcomes

    def _add(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        if isinstance(outcome, str):
            self._num_chars += len(outcome)

    def _is_complete(self) -> bool:
        """Returns whether no further row belongs in the reply: the last one exceeds a limit, or the CPU time or the
        characters of a reply are used."""
        if not self._outcomes:
            return False
        last = self._outcomes[-1]
        if not isinstance(last, str) and "exceeded" in last:
            return True
        max_chars: int = self._limits["batch_chars"]
        return time.process_time() > self._end or self._num_chars > max_chars

    def _render_one_by_one(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._add(self._render_row(row))
            if self._is_complete():
                return

    def _render_together(self, rows: Sequence[Row]) -> list[str] | None:
        """Returns the texts of rows by two calls of transformers; None if the template refuses a row or exceeds a
        limit."""
        if any(row.arguments for row in rows):
            return None
        seconds = SLICE_SHARE * self._limits["batch_seconds"]
        try:
            texts = call_with_time_limit(seconds, lambda: self._texts(rows))
        except (CallTimeout, Exception):
            # a template can raise any exception
            return None
        num_chars = [len(text) for text in texts]
        if max(num_chars) > self._limits["row_chars"] or sum(num_chars) > self._limits["batch_chars"]:
            return None
        return texts

    def _texts(self, rows: Sequence[Row]) -> list[str]:
        rendered = {}
        for flag in (False, True):
            conversations = [row.conversation for row in rows if row.add_generation_prompt is flag]
            rendered[flag] = iter(self._apply_template(conversations, flag))
        return [next(rendered[row.add_generation_prompt]) for row in rows]

    def _render_row(self, row: Row) -> Outcome:
        try:
            return call_with_time_limit(self._limits["row_seconds"], lambda: self._outcome_of(row))
        except CallTimeout:
            return {"exceeded": f"{self._limits['row_seconds']:g} s"}

    def _outcome_of(self, row: Row) -> Outcome:
        """Renders one row. Returns the first line of what the template raises, or the limit that it exceeds, other than
        that of time."""
        try:
            (text,) = self._apply_template(
                [row.conversation],
                row.add_generation_prompt,
                row.arguments,
            )
        except MemoryError:
            return {"exceeded": f"{self._limits['megabytes']} MB of memory"}
        except Exception as error:
            # a template can raise any exception
            lines = str(error).splitlines() or [type(error).__name__]
            return {"refused": lines[0][:MAX_FAULT_CHARS]}
        if len(text) > self._limits["row_chars"]:
            return {"exceeded": f"{self._limits['row_chars']:,} characters"}
        return text

    def _apply_template(
        self,
        conversations: Sequence[Conversation],
        add_generation_prompt: bool,
        arguments: Mapping[str, Any] = NO_ARGUMENTS,
    ) -> list[str]:
        """Returns what `apply_chat_template(tokenize=False)` returns."""
        texts: list[str]
        texts, _ = render_jinja_template(
            conversations=conversations,
            chat_template=self._template,
            add_generation_prompt=add_generation_prompt,
            **{**self._variables, **arguments},
        )
        return texts


def _without_none(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a message without keys whose value is None, which `apply_chat_template` leaves out too."""
    if None not in message.values():
        return message
    return {key: value for key, value in message.items() if value is not None}


def start() -> TemplateRendering:
    """Returns the function that answers the messages of the main process."""
    return TemplateRendering()

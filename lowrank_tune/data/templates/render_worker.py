"""Renders chat templates in a worker process, by transformers' own code; the other side is `render_process.py`.

transformers is imported without torch: 0.6 s and 60 MB. A template can compute for any time and write any text, so each
rendering has limits; the first one that exceeds a limit is the last of its batch.
"""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

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
Outcome = str | dict[str, str]
"""A text; or why there is none: `refused`, the template's own error, or `exceeded`, a limit."""


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
        end = time.process_time() + message["batch_seconds"]
        num_chars = 0
        outcomes: list[Outcome] = []
        for indices, add_generation_prompt, arguments in message["rows"]:
            conversation = [messages[index] for index in indices]
            outcome = self._render_row(
                key,
                conversation,
                add_generation_prompt,
                arguments,
                message,
            )
            outcomes.append(outcome)
            if isinstance(outcome, str):
                num_chars += len(outcome)
            elif "exceeded" in outcome:
                break
            if time.process_time() > end or num_chars > message["batch_chars"]:
                break
        return outcomes

    def _render_row(
        self,
        key: int,
        conversation: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        arguments: Mapping[str, Any],
        limits: Mapping[str, Any],
    ) -> Outcome:
        seconds = limits["row_seconds"]
        try:
            try:
                signal.setitimer(signal.ITIMER_PROF, seconds, ALARM_INTERVAL_SECONDS)
                outcome = self._render(
                    key,
                    conversation,
                    add_generation_prompt,
                    arguments,
                )
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        except CallTimeout:
            # the alarm may have interrupted the line above
            signal.setitimer(signal.ITIMER_PROF, 0)
            return {"exceeded": f"{seconds:g} s"}
        except MemoryError:
            return {"exceeded": f"{limits['megabytes']} MB of memory"}
        if len(outcome) > limits["row_chars"]:
            return {"exceeded": f"{limits['row_chars']:,} characters"}
        return outcome

    def _render(
        self,
        key: int,
        conversation: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        arguments: Mapping[str, Any],
    ) -> Outcome:
        """Returns what `apply_chat_template(tokenize=False)` returns, or the first line of what it raises."""
        template, variables = self._templates[key]
        try:
            texts, _ = render_jinja_template(
                conversations=[conversation],
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                **{**variables, **arguments},
            )
        except MemoryError:
            raise
        except Exception as error:
            # a template can raise any exception
            lines = str(error).splitlines() or [type(error).__name__]
            return {"refused": lines[0][:MAX_FAULT_CHARS]}
        text: str = texts[0]
        return text


def _without_none(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message without keys whose value is None, which `apply_chat_template` leaves out too."""
    return {key: value for key, value in message.items() if value is not None}


def start() -> TemplateRendering:
    """Returns the function that answers the messages of the main process."""
    return TemplateRendering()

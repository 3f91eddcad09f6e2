"""Text by the chat template of the tokenizer, and which messages the template accepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lowrank_tune.data.formats import ChatMessages, InvalidRow
from lowrank_tune.data.message import Message
from lowrank_tune.data.templates.message_fields import MessageFields
from lowrank_tune.data.templates.render_process import (
    NO_ARGUMENTS,
    LimitExceeded,
    RenderProcess,
    RenderRequest,
    Template,
    shared_process,
)
from lowrank_tune.errors import UserError
from lowrank_tune.json_files import parse_json

PROBE_QUESTION = "Hm, who asks?"
PROBE_ANSWER = "Nobody asks."
PROBE_SYSTEM = "Rule one."
PROBE_CONVERSATION = (Message("user", PROBE_QUESTION), Message("assistant", PROBE_ANSWER))
MAX_EXCEEDED = 3
"""Rows in succession on which a template may exceed a limit: each takes seconds."""

REPLACE_TEMPLATE = (
    "replace it in a copy of the base (`chat_template.jinja`, or `chat_template` in `tokenizer_config.json`)"
)
SystemMode = Literal["own", "always", "folded"]


class Rendering(NamedTuple):
    """Messages to render. `row`: the number of the row that they belong to, in the same call. `tools`: as in
    `Conversation`."""

    messages: ChatMessages
    add_generation_prompt: bool
    row: int = 0
    tools: str = ""


class TemplateRenderer:
    """Renders conversations by `chat_template`, with the variables of the tokenizer, in a worker process.

    `system_mode` is how a system message is rendered: by the template (`own`); by a template that fails without one,
    so that an empty one is added (`always`); or before the question (`folded`).
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str,
        process: RenderProcess | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._process = process or shared_process()
        self._num_exceeded = 0
        self.fields = MessageFields()
        self.system_mode: SystemMode = "own"
        self.system_mode = self._probe_system_mode()
        self.fields = MessageFields.from_probes(chat_template, *PROBE_CONVERSATION, self._probe_fields)

    def _probe_system_mode(self) -> SystemMode:
        """Renders a made-up conversation with and without a system message."""
        plain = self.probe(PROBE_CONVERSATION)
        with_system = self.probe([Message("system", PROBE_SYSTEM), *PROBE_CONVERSATION])
        if isinstance(plain, InvalidRow):
            if isinstance(with_system, InvalidRow):
                raise UserError(
                    "the base's chat template renders neither a question and its answer nor the same with a system "
                    "turn; give the base a working `chat_template`"
                )
            return "always"
        if isinstance(with_system, InvalidRow) or PROBE_SYSTEM not in with_system:
            return "folded"
        return "own"

    def _probe_fields(self, fields: MessageFields, messages: ChatMessages, tools: str) -> str | InvalidRow:
        """Returns messages as these fields, with tools, rendered."""
        self.fields = fields
        return self.probe(messages, tools=tools)

    def probe(
        self,
        messages: ChatMessages,
        add_generation_prompt: bool = False,
        tools: str = "",
    ) -> str | InvalidRow:
        """Returns the same as `render`. Raises UserError if the template exceeds a limit."""
        text = self.render(messages, add_generation_prompt, tools)
        if isinstance(text, LimitExceeded):
            raise UserError(f"{self._name} {text.fault} on a short conversation; {REPLACE_TEMPLATE}")
        return text

    def render(
        self,
        messages: ChatMessages,
        add_generation_prompt: bool = False,
        tools: str = "",
    ) -> str | InvalidRow:
        """Returns the text of one conversation, or why it cannot be rendered."""
        (text,) = self.render_all([Rendering(messages, add_generation_prompt, tools=tools)])
        return text

    def render_all(self, renderings: Sequence[Rendering]) -> list[str | InvalidRow]:
        """Returns the texts, or why they cannot be rendered, in order. Once the template exceeds a limit on a row, its
        later renderings are not made. Raises UserError if it does on `MAX_EXCEEDED` rows in succession."""
        requests = self._requests(renderings)
        template = Template(self._chat_template, self._tokenizer.special_tokens_map)
        rendered: list[str | InvalidRow] = []
        exceeded = _ExceededRows(self._num_exceeded)
        while len(rendered) < len(requests):
            start = len(rendered)
            texts = self._process.render_some(template, requests[start:])
            rendered += texts
            last = texts[-1]
            is_exceeded = isinstance(last, LimitExceeded)
            exceeded.add([request.row for request in requests[start : len(rendered)]], is_exceeded)
            if isinstance(last, LimitExceeded):
                if exceeded.count >= MAX_EXCEEDED:
                    raise UserError(
                        f"{self._name} {last.fault} on {MAX_EXCEEDED} conversations in succession; {REPLACE_TEMPLATE}"
                    )
                row = requests[len(rendered) - 1].row
                while len(rendered) < len(requests) and requests[len(rendered)].row == row:
                    rendered.append(last)
        self._num_exceeded = exceeded.count_at_end()
        return rendered

    @property
    def _name(self) -> str:
        """The template as a message names it."""
        base = getattr(self._tokenizer, "name_or_path", "") or "the base"
        return f"the chat template of {base}"

    def _requests(self, renderings: Sequence[Rendering]) -> list[RenderRequest]:
        """Returns the renderings with prepared messages, one object for each message that several of them share."""
        plain: dict[int, dict[str, Any]] = {}
        arguments: dict[str, Mapping[str, Any]] = {"": NO_ARGUMENTS}
        requests = []
        for rendering in renderings:
            for message in rendering.messages:
                if id(message) not in plain:
                    plain[id(message)] = self.fields.to_dict(message)
            if rendering.tools not in arguments:
                arguments[rendering.tools] = {"tools": parse_json(rendering.tools)}
            requests.append(
                RenderRequest(
                    self._prepare([plain[id(message)] for message in rendering.messages]),
                    rendering.add_generation_prompt,
                    rendering.row,
                    arguments[rendering.tools],
                )
            )
        return requests

    def _prepare(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the messages in the form that the template accepts."""
        has_system = bool(messages) and messages[0]["role"] == "system"
        if self.system_mode == "always" and not has_system:
            return [{"role": "system", "content": ""}, *messages]
        if self.system_mode == "folded" and has_system and len(messages) > 1:
            system, first, *later = messages
            content = f"{system['content']}\n\n{first['content']}"
            return [{**first, "content": content}, *later]
        return messages


class _ExceededRows:
    """Counts the rows in succession on which a template exceeds a limit; `count` is that of earlier ones."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._row: int | None = None
        self._is_exceeded = True

    def add(self, rows: Sequence[int], is_exceeded: bool) -> None:
        """Adds renderings by their rows; `is_exceeded`: whether the last one exceeds a limit."""
        before = [row for row in rows if row != rows[-1]]
        if before:
            self._add_row(before[-1], False)
        self._add_row(rows[-1], is_exceeded)

    def _add_row(self, row: int, is_exceeded: bool) -> None:
        if row != self._row:
            self.count = self.count_at_end()
            self._row = row
            self._is_exceeded = False
        if is_exceeded and not self._is_exceeded:
            self._is_exceeded = True
            self.count += 1

    def count_at_end(self) -> int:
        """Returns the count once no rendering of the last row follows."""
        return self.count if self._is_exceeded else 0

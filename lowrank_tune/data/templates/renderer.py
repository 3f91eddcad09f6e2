"""Text by the chat template of the tokenizer, and which messages the template accepts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lowrank_tune.data.formats import ChatMessages, InvalidRow
from lowrank_tune.data.message import Message
from lowrank_tune.errors import UserError

PROBE_QUESTION = "Hm, who asks?"
PROBE_ANSWER = "Nobody asks."
PROBE_SYSTEM = "Rule one."
PROBE_CONVERSATION = (Message("user", PROBE_QUESTION), Message("assistant", PROBE_ANSWER))

SystemMode = Literal["own", "always", "folded"]


class TemplateRenderer:
    """Renders conversations by `chat_template`, in the environment of the tokenizer.

    `system_mode` is how a system message is rendered: by the template (`own`); by a template that fails without one,
    so that an empty one is added (`always`); or before the question (`folded`).
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str,
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self.system_mode: SystemMode = "own"
        self.system_mode = self._probe_system_mode()

    def _probe_system_mode(self) -> SystemMode:
        """Renders a made-up conversation with and without a system message."""
        plain = self.render(PROBE_CONVERSATION)
        with_system = self.render([Message("system", PROBE_SYSTEM), *PROBE_CONVERSATION])
        if isinstance(plain, InvalidRow):
            if isinstance(with_system, InvalidRow):
                raise UserError(
                    "the base's chat template renders neither a question and its answer nor the same with a system "
                    "turn; "
                    "give the base a working `chat_template`"
                )
            return "always"
        if isinstance(with_system, InvalidRow) or PROBE_SYSTEM not in with_system:
            return "folded"
        return "own"

    def render_all(self, requests: Sequence[tuple[ChatMessages, bool]]) -> list[str | InvalidRow]:
        """Renders conversations, each with a generation prompt or without. One call of the tokenizer renders all of a
        kind, because a call costs more than a rendering."""
        rendered: list[str | InvalidRow] = [""] * len(requests)
        for add_generation_prompt in (False, True):
            indices = [index for index, request in enumerate(requests) if request[1] is add_generation_prompt]
            conversations = [requests[index][0] for index in indices]
            texts = self._render_together(conversations, add_generation_prompt)
            for index, text in zip(indices, texts, strict=True):
                rendered[index] = text
        return rendered

    def _render_together(
        self,
        conversations: Sequence[ChatMessages],
        add_generation_prompt: bool,
    ) -> Sequence[str | InvalidRow]:
        if not conversations:
            return []
        prepared = [self._prepare(messages) for messages in conversations]
        try:
            return self._apply_template(prepared, add_generation_prompt)
        except Exception:
            # A template may raise anything. Rendered one by one, the fault is that of its own row.
            return [self.render(messages, add_generation_prompt) for messages in conversations]

    def render(
        self,
        messages: ChatMessages,
        add_generation_prompt: bool = False,
    ) -> str | InvalidRow:
        """Returns the text of one conversation, or why it cannot be rendered."""
        try:
            (text,) = self._apply_template([self._prepare(messages)], add_generation_prompt)
            return text
        except Exception as error:
            lines = str(error).splitlines() or [type(error).__name__]
            return InvalidRow(f"the base's chat template refuses it: {lines[0][:100]}")

    def _apply_template(
        self,
        conversations: list[list[dict[str, str]]],
        add_generation_prompt: bool,
    ) -> list[str]:
        texts: list[str] = self._tokenizer.apply_chat_template(
            conversations,
            chat_template=self._chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return texts

    def _prepare(self, messages: ChatMessages) -> list[dict[str, str]]:
        """Returns the messages in the form that the template accepts."""
        prepared = [{"role": message.role, "content": message.content} for message in messages]
        has_system = bool(messages) and messages[0].role == "system"
        if self.system_mode == "always" and not has_system:
            prepared.insert(0, {"role": "system", "content": ""})
        elif self.system_mode == "folded" and has_system and len(messages) > 1:
            system = prepared.pop(0)
            prepared[0]["content"] = f"{system['content']}\n\n{prepared[0]['content']}"
        return prepared

"""Text by the tokenizer's own chat template, and what of a conversation the template takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

from lowrank_tune.data.fallback_templates import ChatMessages
from lowrank_tune.data.formats import InvalidRow
from lowrank_tune.data.message import Message
from lowrank_tune.errors import UserError

PROBE_QUESTION = "Hm, who asks?"
PROBE_ANSWER = "Nobody asks."
PROBE_SYSTEM = "Rule one."


class TemplateRenderer:
    """Renders conversations by `chat_template`, in the environment of the tokenizer."""

    def __init__(self, tokenizer: Any, chat_template: str) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self.system_mode: Literal["own", "always", "folded"] = "own"
        self.system_mode = self._probe_system_mode()

    def _probe_system_mode(self) -> Literal["own", "always", "folded"]:
        """Tries the template on made-up conversations: whether it needs a system turn, and whether it takes one."""
        messages = [Message("user", PROBE_QUESTION), Message("assistant", PROBE_ANSWER)]
        plain, with_system = (
            self.render_or_fault(turns) for turns in (messages, [Message("system", PROBE_SYSTEM), *messages])
        )
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
        """Many renderings, each with a generation prompt or not; all at once where none fails, because a call costs
        more than a rendering."""
        out: list[str | InvalidRow] = [""] * len(requests)
        for add_generation_prompt in (False, True):
            indices = [index for index, (_, wanted) in enumerate(requests) if wanted is add_generation_prompt]
            if not indices:
                continue
            try:
                texts = self._apply_template(
                    [self._prepare(requests[index][0]) for index in indices], add_generation_prompt
                )
            except Exception:  # a template may raise anything: one by one, the fault is that of its own row
                texts = [self.render_or_fault(requests[index][0], add_generation_prompt) for index in indices]
            for index, text in zip(indices, texts, strict=True):
                out[index] = text
        return out

    def render_or_fault(self, messages: ChatMessages, add_generation_prompt: bool = False) -> str | InvalidRow:
        """One rendering, or why there is none."""
        try:
            return self.render(messages, add_generation_prompt)
        except InvalidRow as fault:
            return fault

    def render(self, messages: ChatMessages, add_generation_prompt: bool = False) -> str:
        """One rendering. Raises `InvalidRow`."""
        try:
            return cast(str, self._apply_template([self._prepare(messages)], add_generation_prompt)[0])
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InvalidRow(f"the base's chat template refuses it: {reason[:100]}") from error

    def _apply_template(self, conversations: list[list[dict[str, str]]], add_generation_prompt: bool) -> list[Any]:
        return cast(
            list[Any],
            self._tokenizer.apply_chat_template(
                conversations,
                chat_template=self._chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            ),
        )

    def _prepare(self, messages: ChatMessages) -> list[dict[str, str]]:
        """The turns as the template takes them."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        has_system = bool(turns) and turns[0]["role"] == "system"
        if self.system_mode == "always" and not has_system:
            turns.insert(0, {"role": "system", "content": ""})
        elif self.system_mode == "folded" and has_system and len(turns) > 1:
            turns[1]["content"] = f"{turns[0]['content']}\n\n{turns[1]['content']}"
            del turns[0]
        return turns

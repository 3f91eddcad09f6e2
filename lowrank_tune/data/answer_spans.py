"""Where the answers of the assistant are in the text of a conversation, and which of them follow their own prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_tune.data.fallback_templates import NOT_TEXT, ChatMessages
from lowrank_tune.data.formats import InvalidRow, is_text
from lowrank_tune.data.generation_prompt import REWRITTEN, THOUGHT_CLOSED, GenerationPrompt, OwnThought
from lowrank_tune.data.message import Message
from lowrank_tune.data.template_renderer import TemplateRenderer


@dataclass(frozen=True)
class Span:
    """From where an answer starts to behind its end token, in characters. `closed`: an end token stands there."""

    start: int
    end: int
    closed: bool


@dataclass(frozen=True)
class Rendered:
    """The prompt of the last answer and what follows it, with the spans of all answers that may be trained."""

    text: str
    spans: tuple[Span, ...]

    @property
    def prompt_text(self) -> str:
        return self.text[: self.spans[-1].start]


@dataclass(frozen=True)
class _Answer:
    """An answer, its prompt, and the turns up to it as the template writes them."""

    content: str
    prompt: str
    whole: str


class SpanFinder:
    """Renders conversations and finds the answers in them. `closing` finds the end tokens at the end of a text, and
    what stands behind them."""

    def __init__(
        self,
        renderer: TemplateRenderer,
        generation_prompt: GenerationPrompt,
        closing: re.Pattern[str],
    ) -> None:
        self._renderer = renderer
        self._generation_prompt = generation_prompt
        self._closing = closing

    def render(self, conversations: Sequence[ChatMessages]) -> list[Rendered | InvalidRow]:
        """Conversations that end with the assistant, each with its prompts and answers, in one go."""
        answers = self._render_answers(conversations)
        completions: list[str | OwnThought | InvalidRow] = [
            each if isinstance(each, InvalidRow) else self._completion(each[-1]) for each in answers
        ]
        self._render_thoughts(conversations, answers, completions)
        out: list[Rendered | InvalidRow] = []
        for each, completion in zip(answers, completions, strict=True):
            if isinstance(completion, InvalidRow):
                out.append(completion)
            else:
                assert isinstance(completion, str) and not isinstance(each, InvalidRow)
                out.append(self._located(each, completion))
        return out

    def _render_answers(self, conversations: Sequence[ChatMessages]) -> list[list[_Answer] | InvalidRow]:
        requests: list[tuple[ChatMessages, bool]] = []
        for messages in conversations:
            for index in _answer_indices(messages):
                requests += [(messages[:index], True), (messages[: index + 1], False)]
        texts = iter(self._renderer.render_all(requests))
        out: list[list[_Answer] | InvalidRow] = []
        for messages in conversations:
            if all(is_text(message.content) for message in messages):
                fault = None
            else:
                fault = InvalidRow(NOT_TEXT)
            answers = []
            for index in _answer_indices(messages):
                prompt = next(texts)
                whole = next(texts)
                if isinstance(prompt, str) and isinstance(whole, str):
                    answers.append(_Answer(messages[index].content, prompt, whole))
                else:
                    fault = fault or next(text for text in (prompt, whole) if isinstance(text, InvalidRow))
            out.append(fault or answers)
        return out

    def _completion(self, last: _Answer) -> str | OwnThought | InvalidRow:
        """What is trained behind the last prompt; or the thought without which the answer is to be rendered again."""
        generation_prompt = self._generation_prompt
        completion = generation_prompt.completion(last.prompt, last.whole, last.content)
        if completion is not None:
            return completion
        thought = generation_prompt.own_thought(last.content)
        reason = generation_prompt.refusal(last.prompt, last.content)
        if thought is None or reason == THOUGHT_CLOSED:
            return InvalidRow(reason)
        return thought

    def _render_thoughts(
        self,
        conversations: Sequence[ChatMessages],
        answers: Sequence[list[_Answer] | InvalidRow],
        completions: list[str | OwnThought | InvalidRow],
    ) -> None:
        """Puts completions in the place of thoughts."""
        todo = [(index, thought) for index, thought in enumerate(completions) if isinstance(thought, OwnThought)]
        texts = self._renderer.render_all(
            [((*conversations[index][:-1], Message("assistant", thought.answer)), False) for index, thought in todo]
        )
        for (index, thought), whole in zip(todo, texts, strict=True):
            each = answers[index]
            assert not isinstance(each, InvalidRow)
            if isinstance(whole, InvalidRow):
                completions[index] = whole
                continue
            completion = self._generation_prompt.completion_with_thought(each[-1].prompt, whole, thought)
            completions[index] = InvalidRow(REWRITTEN) if completion is None else completion

    def _located(self, answers: Sequence[_Answer], completion: str) -> Rendered | InvalidRow:
        """The spans in the last prompt and its completion. A template may rewrite an earlier answer, as those do that
        drop thoughts: then the text does not contain its prompt with the answer, and it is not trained."""
        text = answers[-1].prompt + completion
        spans = []
        for answer in answers[:-1]:
            behind = self._generation_prompt.completion(answer.prompt, answer.whole, answer.content)
            span = self._span(answer.prompt, behind or "")
            if behind and span is not None and text.startswith((answer.prompt + behind)[: span.end]):
                spans.append(span)
        last = self._span(answers[-1].prompt, completion)
        if last is None:
            return InvalidRow("nothing in it is trained")
        return Rendered(text if last.closed else text[: last.end], (*spans, last))

    def _span(self, prompt: str, completion: str) -> Span | None:
        """Up to the end tokens behind an answer; None where nothing is left to train."""
        closing = self._closing.search(completion)
        end = closing.end("close") if closing else len(completion.rstrip())
        if end:
            return Span(len(prompt), len(prompt) + end, closing is not None)
        return None


def _answer_indices(messages: ChatMessages) -> list[int]:
    return [index for index, message in enumerate(messages) if message.role == "assistant"]

"""Where the answers of the assistant are in the text of a conversation, and which of them one text contains."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lowrank_tune.data.formats import ChatMessages, InvalidRow, text_fault
from lowrank_tune.data.message import Message
from lowrank_tune.data.templates.generation_prompt import (
    THOUGHT_CLOSED,
    GenerationPrompt,
)
from lowrank_tune.data.templates.renderer import Rendering, TemplateRenderer

NOTHING_TRAINED = "nothing in it is trained"


@dataclass(frozen=True)
class Span:
    """An answer with its end tokens, in characters. Trained is the text from `trained_start` on, without an empty
    thought at its beginning. `closed`: it has an end token."""

    start: int
    trained_start: int
    end: int
    closed: bool


@dataclass(frozen=True)
class Rendered:
    """The prompt of the last answer and what follows it, with the spans of all answers that it trains."""

    text: str
    spans: tuple[Span, ...]

    @property
    def prompt_text(self) -> str:
        return self.text[: self.spans[-1].start]

    def alone(self, span: Span) -> Rendered:
        """Returns the same up to the end of an answer, which alone is trained."""
        return Rendered(self.text[: span.end], (span,))


@dataclass(frozen=True)
class _Answer:
    """An answer, its prompt, and what follows the prompt, the last two as the template renders them."""

    message: Message
    prompt: str
    completion: str


@dataclass(frozen=True)
class _Rendering:
    """An answer, its prompt, and the messages up to it, the last two as the template renders them."""

    messages: ChatMessages
    prompt: str
    whole: str

    @property
    def answer(self) -> Message:
        return self.messages[-1]


class SpanFinder:
    """Renders conversations and finds the answers in them. `closing` finds the end tokens at the end of a text, and
    what follows them."""

    def __init__(
        self,
        renderer: TemplateRenderer,
        generation_prompt: GenerationPrompt,
        closing: re.Pattern[str],
    ) -> None:
        self._renderer = renderer
        self._generation_prompt = generation_prompt
        self._closing = closing

    def render(
        self,
        conversations: Sequence[ChatMessages],
        tools: Sequence[str] = (),
        last_only: bool = False,
    ) -> list[list[Rendered] | InvalidRow]:
        """Renders conversations that end with the assistant: each as one row or several, that of its last answer first.

        Every answer is in one row, after its own prompt. A template may rewrite an earlier answer, for example without
        its thought; then the text of the last answer does not contain it, and it has a row of its own. So has an
        answer without an end token, which its row ends. With `last_only` there is the first row alone, with all
        answers that its text contains.
        """
        tools = tools or [""] * len(conversations)
        completed = self._complete(self._render_answers(conversations, tools), tools)
        rendered: list[list[Rendered] | InvalidRow] = []
        for answers in completed:
            if isinstance(answers, InvalidRow):
                rendered.append(answers)
            else:
                rendered.append(self._rows(answers, last_only))
        return rendered

    def _render_answers(
        self,
        conversations: Sequence[ChatMessages],
        tools: Sequence[str],
    ) -> list[list[_Rendering] | InvalidRow]:
        """Renders for each answer its prompt, and the messages up to the answer."""
        renderings: list[Rendering] = []
        for row, messages in enumerate(conversations):
            for index in _answer_indices(messages):
                renderings.append(Rendering(messages[:index], True, row, tools[row]))
                renderings.append(Rendering(messages[: index + 1], False, row, tools[row]))
        texts = iter(self._renderer.render_all(renderings))
        return [_read_answers(messages, texts) for messages in conversations]

    def _complete(
        self,
        rendered: Sequence[list[_Rendering] | InvalidRow],
        tools: Sequence[str],
    ) -> list[list[_Answer] | InvalidRow]:
        """Returns the answers with what follows their prompts, or the first fault of each conversation.

        An answer is rendered again without the reasoning of earlier answers, if the template drops it once the answer
        follows (gpt-oss), and without its own thought, if the template drops that.
        """
        again: list[Rendering] = []
        for row, renderings in enumerate(rendered):
            if isinstance(renderings, InvalidRow):
                continue
            for each in renderings:
                if self._rewrites_context(each):
                    messages = _without_earlier_reasoning(each.messages)
                    again.append(Rendering(messages[:-1], True, row, tools[row]))
                    again.append(Rendering(messages, False, row, tools[row]))
                elif self._drops_thought(each):
                    messages = [*each.messages[:-1], self._without_thought(each.answer)]
                    again.append(Rendering(messages, False, row, tools[row]))
        texts = iter(self._renderer.render_all(again))
        return [self._complete_row(renderings, texts) for renderings in rendered]

    def _complete_row(
        self,
        renderings: list[_Rendering] | InvalidRow,
        texts: Iterator[str | InvalidRow],
    ) -> list[_Answer] | InvalidRow:
        """Takes the second renderings of answers from `texts`."""
        if isinstance(renderings, InvalidRow):
            return renderings
        fault: InvalidRow | None = None
        answers = []
        for each in renderings:
            completion = self._completion(each, texts)
            if isinstance(completion, InvalidRow):
                fault = fault or completion
            else:
                answers.append(_Answer(each.answer, each.prompt, completion))
        return fault or answers

    def _completion(self, rendering: _Rendering, texts: Iterator[str | InvalidRow]) -> str | InvalidRow:
        """Returns what follows the prompt of an answer, or why it cannot follow."""
        generation_prompt = self._generation_prompt
        completion = self._direct(rendering)
        if self._rewrites_context(rendering):
            prompt = next(texts)
            whole = next(texts)
            if isinstance(prompt, str) and isinstance(whole, str):
                completion = generation_prompt.completion(prompt, whole, rendering.answer)
        elif self._drops_thought(rendering):
            whole = next(texts)
            if isinstance(whole, InvalidRow):
                return whole
            completion = generation_prompt.completion_with_thought(rendering.prompt, whole, rendering.answer)
        if completion is None:
            return InvalidRow(generation_prompt.refusal(rendering.prompt, rendering.answer))
        return completion

    def _rewrites_context(self, rendering: _Rendering) -> bool:
        """Returns whether an answer does not follow its prompt, and answers before it have reasoning, or text beside a
        call, which gpt-oss writes as reasoning."""
        has_reasoning = any(map(_has_reasoning, rendering.messages[:-1]))
        return has_reasoning and self._direct(rendering) is None

    def _direct(self, rendering: _Rendering) -> str | None:
        return self._generation_prompt.completion(rendering.prompt, rendering.whole, rendering.answer)

    def _drops_thought(self, rendering: _Rendering) -> bool:
        """Returns whether the template does not write the thought of an answer, which may follow the prompt."""
        generation_prompt = self._generation_prompt
        if generation_prompt.own_thought(rendering.answer) is None or self._direct(rendering) is not None:
            return False
        return generation_prompt.refusal(rendering.prompt, rendering.answer) != THOUGHT_CLOSED

    def _without_thought(self, answer: Message) -> Message:
        thought = self._generation_prompt.own_thought(answer)
        assert thought is not None, "an answer without a thought"
        return replace(answer, content=thought.answer, reasoning_content="")

    def _rows(self, answers: Sequence[_Answer], last_only: bool) -> list[Rendered] | InvalidRow:
        """Returns the rows of a conversation, each with all answers of those left that it contains."""
        spans = [self._span(answer) for answer in answers]
        left: list[tuple[_Answer, Span]] = []
        for answer, span in zip(answers, spans, strict=True):
            if span is None:
                return InvalidRow(NOTHING_TRAINED)
            left.append((answer, span))
        rows = []
        while left:
            last, last_span = left.pop()
            text = last.prompt + last.completion
            contained = []
            others = []
            for answer, span in left:
                if (span.closed or last_only) and _contains(text, answer, span):
                    contained.append(span)
                else:
                    others.append((answer, span))
            left = [] if last_only else others
            if not last_span.closed:
                text = text[: last_span.end]
            rows.append(Rendered(text, (*contained, last_span)))
        return rows

    def _span(self, answer: _Answer) -> Span | None:
        """Returns the span up to the end tokens after an answer; None if nothing is left to train."""
        completion = answer.completion
        closing = self._closing.search(completion)
        end = closing.end("close") if closing else len(completion.rstrip())
        untrained = self._generation_prompt.num_untrained(completion, answer.message)
        if end <= untrained:
            return None
        start = len(answer.prompt)
        return Span(
            start,
            start + untrained,
            start + end,
            closing is not None,
        )


def _contains(text: str, answer: _Answer, span: Span) -> bool:
    """Returns whether a text begins with the prompt of an answer and the answer."""
    return text.startswith((answer.prompt + answer.completion)[: span.end])


def _has_reasoning(message: Message) -> bool:
    return bool(message.reasoning_content or (message.tool_calls and message.content))


def _without_earlier_reasoning(messages: ChatMessages) -> list[Message]:
    """Returns the messages without reasoning, except for the last one."""
    earlier = []
    for message in messages[:-1]:
        content = "" if message.tool_calls else message.content
        earlier.append(replace(message, content=content, reasoning_content=""))
    return [*earlier, messages[-1]]


def _answer_indices(messages: ChatMessages) -> list[int]:
    return [index for index, message in enumerate(messages) if message.role == "assistant"]


def _read_answers(messages: ChatMessages, texts: Iterator[str | InvalidRow]) -> list[_Rendering] | InvalidRow:
    """Takes the two renderings of each answer from `texts`. Returns the first fault if there is one."""
    reason = text_fault(messages)
    fault = None if reason is None else InvalidRow(reason)
    answers: list[_Rendering] = []
    for index in _answer_indices(messages):
        prompt = next(texts)
        whole = next(texts)
        if isinstance(prompt, InvalidRow):
            fault = fault or prompt
        elif isinstance(whole, InvalidRow):
            fault = fault or whole
        else:
            answers.append(_Rendering(messages[: index + 1], prompt, whole))
    return fault or answers

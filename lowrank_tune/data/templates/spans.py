"""Where the answers of the assistant are in the text of a conversation, and which of them follow their own prompts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lowrank_tune.data.formats import ChatMessages, InvalidRow, text_fault
from lowrank_tune.data.message import Message
from lowrank_tune.data.templates.generation_prompt import (
    REWRITTEN,
    THOUGHT_CLOSED,
    GenerationPrompt,
    OwnThought,
)
from lowrank_tune.data.templates.renderer import Rendering, TemplateRenderer

NOTHING_TRAINED = "nothing in it is trained"


@dataclass(frozen=True)
class Span:
    """An answer with its end tokens, in characters. `closed`: it has an end token."""

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
    """An answer, its prompt, and the messages up to it, the last two as the template renders them."""

    content: str
    prompt: str
    whole: str


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

    def render(self, conversations: Sequence[ChatMessages]) -> list[Rendered | InvalidRow]:
        """Renders conversations that end with the assistant, each with its prompts and answers."""
        answers_of = self._render_answers(conversations)
        completions = self._last_completions(conversations, answers_of)
        rendered: list[Rendered | InvalidRow] = []
        for answers, completion in zip(answers_of, completions, strict=True):
            if isinstance(completion, InvalidRow):
                rendered.append(completion)
            else:
                assert not isinstance(answers, InvalidRow)
                rendered.append(self._locate(answers, completion))
        return rendered

    def _render_answers(self, conversations: Sequence[ChatMessages]) -> list[list[_Answer] | InvalidRow]:
        """Renders for each answer its prompt, and the messages up to the answer."""
        renderings: list[Rendering] = []
        for row, messages in enumerate(conversations):
            for index in _answer_indices(messages):
                renderings.append(Rendering(messages[:index], True, row))
                renderings.append(Rendering(messages[: index + 1], False, row))
        texts = iter(self._renderer.render_all(renderings))
        return [_read_answers(messages, texts) for messages in conversations]

    def _last_completions(
        self,
        conversations: Sequence[ChatMessages],
        answers_of: Sequence[list[_Answer] | InvalidRow],
    ) -> list[str | InvalidRow]:
        """Returns what is trained after the last prompt of each conversation, or its fault.

        An answer whose thought the template does not write is rendered once more, without its thought.
        """
        completions: list[str | InvalidRow] = []
        thoughts: dict[int, tuple[str, OwnThought]] = {}
        renderings: list[Rendering] = []
        for index, answers in enumerate(answers_of):
            if isinstance(answers, InvalidRow):
                completions.append(answers)
                continue
            completion = self._completion(answers[-1])
            if isinstance(completion, OwnThought):
                thoughts[index] = (answers[-1].prompt, completion)
                answer = Message("assistant", completion.answer)
                renderings.append(Rendering((*conversations[index][:-1], answer), False, index))
                completion = InvalidRow(REWRITTEN)
            completions.append(completion)
        texts = self._renderer.render_all(renderings)
        for (index, (prompt, thought)), text in zip(thoughts.items(), texts, strict=True):
            if isinstance(text, InvalidRow):
                completions[index] = text
                continue
            with_thought = self._generation_prompt.completion_with_thought(
                prompt,
                text,
                thought,
            )
            if with_thought is not None:
                completions[index] = with_thought
        return completions

    def _completion(self, last: _Answer) -> str | OwnThought | InvalidRow:
        """Returns what is trained after the last prompt, or the thought without which the answer is rendered again."""
        generation_prompt = self._generation_prompt
        completion = generation_prompt.completion(
            last.prompt,
            last.whole,
            last.content,
        )
        if completion is not None:
            return completion
        thought = generation_prompt.own_thought(last.content)
        reason = generation_prompt.refusal(last.prompt, last.content)
        if thought is None or reason == THOUGHT_CLOSED:
            return InvalidRow(reason)
        return thought

    def _locate(
        self,
        answers: Sequence[_Answer],
        completion: str,
    ) -> Rendered | InvalidRow:
        """Finds the answers in the last prompt and its completion.

        A template may rewrite an earlier answer, for example without its thought. The text then does not contain its
        prompt with the answer, and the answer is not trained.
        """
        *earlier, last_answer = answers
        text = last_answer.prompt + completion
        spans = []
        for answer in earlier:
            answer_text = self._generation_prompt.completion(
                answer.prompt,
                answer.whole,
                answer.content,
            )
            if not answer_text:
                continue
            span = self._span(answer.prompt, answer_text)
            if span is not None and text.startswith((answer.prompt + answer_text)[: span.end]):
                spans.append(span)
        last = self._span(last_answer.prompt, completion)
        if last is None:
            return InvalidRow(NOTHING_TRAINED)
        if not last.closed:
            text = text[: last.end]
        return Rendered(text, (*spans, last))

    def _span(
        self,
        prompt: str,
        completion: str,
    ) -> Span | None:
        """Returns the span up to the end tokens after an answer; None if nothing is left to train."""
        closing = self._closing.search(completion)
        end = closing.end("close") if closing else len(completion.rstrip())
        if end:
            return Span(len(prompt), len(prompt) + end, closing is not None)
        return None


def _answer_indices(messages: ChatMessages) -> list[int]:
    return [index for index, message in enumerate(messages) if message.role == "assistant"]


def _read_answers(messages: ChatMessages, texts: Iterator[str | InvalidRow]) -> list[_Answer] | InvalidRow:
    """Takes the two renderings of each answer from `texts`. Returns the first fault if there is one."""
    reason = text_fault(messages)
    fault = None if reason is None else InvalidRow(reason)
    answers: list[_Answer] = []
    for index in _answer_indices(messages):
        prompt = next(texts)
        whole = next(texts)
        if isinstance(prompt, InvalidRow):
            fault = fault or prompt
        elif isinstance(whole, InvalidRow):
            fault = fault or whole
        else:
            answers.append(_Answer(messages[index].content, prompt, whole))
    return fault or answers

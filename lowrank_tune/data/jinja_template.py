"""Chat text by the tokenizer's own template, and where in it the assistant speaks.

Nothing is assumed of the template. A turn's words are what it adds to the prompt that it is asked with: the rendering
of the turns so far must begin with the rendering of the turns before, and only turns for which this holds are trained.
The whole text is encoded once, as at inference; where a token would reach across the edge of an answer, or the text
itself holds a control token, the text is cut there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from tokenizers import Encoding

from lowrank_tune.data.fallback_templates import CONTROL_FOUND, NOT_TEXT, ChatMessages
from lowrank_tune.data.formats import InvalidRow, is_text
from lowrank_tune.data.tokenizer_backend import TokenizerBackend, token_start
from lowrank_tune.errors import UserError
from lowrank_tune.types import Message, Row

FIRST_PLACEHOLDER = 0xF0000  # characters of a private plane stand for control tokens in a row's own text
MAX_CACHED_TAIL = 64  # tails of prompts up to this long are worth remembering
PROBE_QUESTION, PROBE_ANSWER, PROBE_SYSTEM = "Hm, who asks?", "Nobody asks.", "Rule one."


@dataclass(frozen=True)
class Span:
    """From where the assistant starts to behind its end token, in characters. `closed`: an end token stands there."""

    start: int
    end: int
    closed: bool


@dataclass(frozen=True)
class Rendered:
    """A text with the spans that are trained, and the places where no token may reach across."""

    text: str
    spans: tuple[Span, ...]

    @property
    def edges(self) -> list[int]:
        return [
            edge
            for span in self.spans
            for edge in ((span.start,) if span.closed else (span.start, span.end))
            if 0 < edge < len(self.text)
        ]


class JinjaChatTemplate:
    """The chat template that came with the tokenizer."""

    def __init__(self, backend: TokenizerBackend) -> None:
        self.backend = backend
        self._tail_cache: dict[str, list[int]] = {}
        special = f"(?:{backend.special_pattern.pattern})"
        self._closing = re.compile(rf"(?P<close>{special}(?:{special})*)(?:\s|{special})*\Z")
        self._probe_template()
        self._probe_special_tokens()

    @property
    def chat_template(self) -> str:
        """The template as it came."""
        return str(self.backend.tokenizer.chat_template)

    def _probe_template(self) -> None:
        """Tries the template on made-up talks: what it needs, what it refuses, what it rewrites."""
        messages = [Message("user", PROBE_QUESTION), Message("assistant", PROBE_ANSWER)]
        system_messages = [Message("system", PROBE_SYSTEM), *messages]
        self._adds_generation_prompt, self._system_mode = True, "own"
        plain, with_system = self._try_render(messages), self._try_render(system_messages)
        if plain is None:
            if with_system is None:
                raise UserError(
                    "the base's chat template renders neither a question and its answer nor the same with a system "
                    "turn; "
                    "give the base a working `chat_template`"
                )
            self._system_mode = "always"
        elif with_system is None or PROBE_SYSTEM not in with_system:
            self._system_mode = "folded"
        prompt = self._try_render(messages[:1], add_generation_prompt=True)
        # Some templates put words in front of an answer that their generation prompt lacks, or the other way round.
        self._adds_generation_prompt = prompt is not None and self._render(messages).startswith(prompt)

    def _probe_special_tokens(self) -> None:
        messages = [Message("user", PROBE_QUESTION), Message("assistant", PROBE_ANSWER)]
        rendered = self._render_spans([messages], [[message.content for message in messages]])[0]
        if isinstance(rendered, InvalidRow):
            raise UserError(f"the base's chat template cannot be trained with: {rendered.reason}")
        marks = self.backend.special_pattern.findall(rendered.text)
        self._template_special_tokens = tuple(dict.fromkeys(marks))
        span = rendered.spans[-1]
        completion = rendered.text[span.start : span.end]
        closing = {
            self.backend.special_tokens[mark]
            for mark in self.backend.special_pattern.findall(completion.rpartition(PROBE_ANSWER)[2])
        }
        if self.backend.eos is None and not closing:
            raise UserError("the base's chat template closes answers with no end token, and its tokenizer names none")
        self.end_ids = frozenset(closing | ({self.backend.eos} if self.backend.eos is not None else set()))
        renders_bos = self.backend.bos in {self.backend.special_tokens[mark] for mark in marks}
        self._bos = (
            [self.backend.bos]
            if self.backend.bos is not None and self.backend.begins_with_bos and not renders_bos
            else []
        )
        rewritten = any(len(cast(Rendered, probe).spans) < 2 for probe in self._probe_two_turns())
        notes = {
            "own": "",
            "always": " (with an empty system turn where there is none)",
            "folded": " (a system text goes before the question)",
        }
        self.description = f"the tokenizer's own template{notes[self._system_mode]}"
        self.description += (
            "; it rewrites earlier turns, and where it does only the last answer is trained" if rewritten else ""
        )

    def _probe_two_turns(self) -> list[Rendered | InvalidRow]:
        conversations = [
            [Message("user", PROBE_QUESTION), Message("assistant", answer)] * 2
            for answer in (PROBE_ANSWER, f"<think>\nHm.\n</think>\n\n{PROBE_ANSWER}")
        ]
        return [
            rendered
            for rendered in self._render_spans(
                conversations, [[message.content for message in messages] for messages in conversations]
            )
            if isinstance(rendered, Rendered)
        ]

    def validate_messages(self, messages: ChatMessages) -> str | None:
        """Why these turns cannot be rendered; None where they can."""
        if not all(is_text(message.content) for message in messages):
            return NOT_TEXT
        try:
            self._render(messages, add_generation_prompt=messages[-1].role != "assistant")
        except InvalidRow as fault:
            return fault.reason
        return None

    def prompt(self, messages: ChatMessages) -> list[int]:
        """Ids up to the place where the assistant starts."""
        if not all(is_text(message.content) for message in messages):
            raise InvalidRow(NOT_TEXT)
        contents = self._insert_placeholders(messages)
        rendered = self._render_spans([messages], [contents], prompt=True)[0]
        if isinstance(rendered, InvalidRow):
            raise rendered
        return [*self._bos, *self._encode(rendered.text, rendered.edges)[0]]

    def encode_many(self, rows: Sequence[ChatMessages]) -> list[Row | InvalidRow]:
        """Rows with their masks: one call of the tokenizer, and more only for rows whose answers merge with their
        prompts."""
        rendered = self._render_spans(rows, [self._insert_placeholders(row) for row in rows])
        simple = {
            index
            for index, item in enumerate(rendered)
            if isinstance(item, Rendered) and not self._has_placeholder(item.text)
        }
        todo = [cast(Rendered, rendered[index]) for index in sorted(simple)]
        tails = {
            tail
            for item in todo
            for span in item.spans
            if (tail := self._after_last_special_token(item.text[: span.start])) not in self._tail_cache
        }
        encodings = self.backend.encode_with_special_tokens([*(item.text for item in todo), *tails])
        tail_ids = {
            **self._tail_cache,
            **{tail: encoding.ids for tail, encoding in zip(tails, encodings[len(todo) :], strict=True)},
        }
        self._tail_cache.update(
            {
                tail: ids
                for tail, ids in tail_ids.items()
                if len(tail) <= MAX_CACHED_TAIL and len(self._tail_cache) < 10_000
            }
        )
        of_row = dict(zip(sorted(simple), encodings, strict=False))
        return [
            item if isinstance(item, InvalidRow) else self._to_row(item, of_row.get(index), tail_ids)
            for index, item in enumerate(rendered)
        ]

    def _to_row(self, rendered: Rendered, encoding: Encoding | None, tails: dict[str, list[int]]) -> Row | InvalidRow:
        edges = rendered.edges
        offsets = self._token_offsets(rendered, encoding, tails) if encoding is not None else None
        if encoding is not None and offsets is not None:
            ids = encoding.ids
        else:
            ids, offsets = self._encode(rendered.text, edges)
            offsets = {0: 0, len(rendered.text): len(ids), **offsets}
            offsets.update(
                {
                    span.end: self._after_special_tokens(rendered, span, ids, offsets[span.start])
                    for span in rendered.spans
                    if span.closed
                }
            )
        if self.backend.may_hide_special_tokens and self._contains_special_ids(rendered.text, ids):
            return InvalidRow(CONTROL_FOUND)
        mask = [False] * len(ids)
        for span in rendered.spans:
            start, end = offsets[span.start], offsets[span.end]
            mask[start:end] = [True] * (end - start)
        ids, mask = [*self._bos, *ids], [*(False for _ in self._bos), *mask]
        if not rendered.spans[-1].closed:
            assert self.backend.eos is not None
            ids.append(self.backend.eos)
            mask.append(True)
        return Row(ids, mask)

    def _contains_special_ids(self, text: str, ids: Sequence[int]) -> bool:
        return sum(map(self.backend.control_ids.__contains__, ids)) > len(self.backend.special_pattern.findall(text))

    def _token_offsets(
        self, rendered: Rendered, encoding: Encoding, tails: dict[str, list[int]]
    ) -> dict[int, int] | None:
        """The first token behind each edge, where the encoding of the whole text begins with the encoding of each
        prompt in it; else None."""
        offsets = {}
        ids = encoding.ids
        if not all(span.closed for span in rendered.spans[:-1]):
            return None  # an answer that runs into the next turn: rare, and `_encode` is exact
        for span in rendered.spans:
            start = _token_at(encoding, span.start, len(rendered.text))
            last = encoding.char_to_token(span.end - 1)
            if start is None or last is None:
                return None
            tail = tails[self._after_last_special_token(rendered.text[: span.start])]
            if ids[max(0, start - len(tail)) : start] != tail:
                return None
            offsets[span.start], offsets[span.end] = start, last + 1 if span.closed else len(ids)
        return offsets

    def _after_special_tokens(self, rendered: Rendered, span: Span, ids: Sequence[int], first: int) -> int:
        """Behind the last control token of a closed span that starts at token `first`: no id of its words is a control
        token."""
        marks = len(self.backend.special_pattern.findall(rendered.text, span.start, span.end))
        special_positions = [index for index in range(first, len(ids)) if ids[index] in self.backend.control_ids]
        return special_positions[marks - 1] + 1

    def _after_last_special_token(self, prompt: str) -> str:
        """The end of a prompt from its last control token on. The tokenizer never merges across such a token."""
        return prompt[max(0, *(prompt.rfind(mark) for mark in self._template_special_tokens), 0) :]

    def _encode(self, text: str, edges: Sequence[int]) -> tuple[list[int], dict[int, int]]:
        """Ids of a text of which every prompt in it is encoded as it is alone, and the first token behind each edge."""
        inner = [edge for edge in edges if 0 < edge < len(text)]
        if not self._has_placeholder(text):
            encoding = self.backend.encode_with_special_tokens([text])[0]
            offsets = {edge: _token_at(encoding, edge, len(text)) for edge in inner}
            if not inner:
                return encoding.ids, {}
            head, heads = self._encode(text[: inner[-1]], inner)
            cut = offsets[inner[-1]]
            if cut is not None and encoding.ids[:cut] == head:
                return encoding.ids, {**heads, inner[-1]: cut}
        elif inner:
            head, heads = self._encode(text[: inner[-1]], inner)
        else:
            return self._pieces(text, first=True), {}
        return [*head, *self._pieces(text[inner[-1] :], first=False)], {**heads, inner[-1]: len(head)}

    def _pieces(self, text: str, first: bool) -> list[int]:
        """Ids of a text, control tokens of the template apart, stand-ins as the plain characters that they stand
        for."""
        ids: list[int] = []
        position = 0
        for match in [*self.backend.special_pattern.finditer(text), None]:
            piece = self._restore_placeholders(text[position : match.start() if match else len(text)])
            if piece:
                ids += (
                    self.backend.encode_plain([piece])[0]
                    if first and not ids
                    else self.backend.encode_continuation(piece)
                )
            if match:
                ids.append(self.backend.special_tokens[match.group()])
                position = match.end()
        return ids

    def _insert_placeholders(self, messages: ChatMessages) -> list[str]:
        """The contents, with a private character for each control token that stands in them."""
        pattern, names = self.backend.special_pattern, list(self.backend.special_tokens)
        return [
            pattern.sub(lambda match: chr(FIRST_PLACEHOLDER + names.index(match.group())), message.content)
            for message in messages
        ]

    def _has_placeholder(self, text: str) -> bool:
        return not text.isascii() and any(
            FIRST_PLACEHOLDER <= ord(character) < FIRST_PLACEHOLDER + len(self.backend.special_tokens)
            for character in set(text)
        )

    def _restore_placeholders(self, text: str) -> str:
        names = list(self.backend.special_tokens)
        return "".join(
            names[index] if 0 <= (index := ord(character) - FIRST_PLACEHOLDER) < len(names) else character
            for character in text
        )

    def _render_spans(
        self, rows: Sequence[ChatMessages], contents: Sequence[Sequence[str]], prompt: bool = False
    ) -> list[Rendered | InvalidRow]:
        """Renders rows, and each of their prompts and answers, in one go; with `prompt` up to where the next answer
        starts."""
        conversations = [
            [Message(turn.role, text) for turn, text in zip(row, texts, strict=True)]
            for row, texts in zip(rows, contents, strict=True)
        ]
        requests: list[tuple[ChatMessages, bool]] = []
        for messages in conversations:
            requests.append((messages, prompt))
            for index in _answers(messages):
                requests.append((messages[:index], True))
                if index + 1 < len(messages):
                    requests.append((messages[: index + 1], False))
        texts = iter(self._render_all(requests))
        out: list[Rendered | InvalidRow] = []
        for row, messages in zip(rows, conversations, strict=True):
            whole = next(texts)
            parts = [(next(texts), next(texts) if index + 1 < len(messages) else whole) for index in _answers(messages)]
            if not all(is_text(message.content) for message in row):
                out.append(InvalidRow(NOT_TEXT))
            elif fault := next(
                (text for text in (whole, *(text for pair in parts for text in pair)) if isinstance(text, InvalidRow)),
                None,
            ):
                out.append(fault)
            else:
                out.append(self._locate_spans(cast(str, whole), cast(list[tuple[str, str]], parts), prompt))
        return out

    def _locate_spans(self, whole: str, parts: Sequence[tuple[str, str]], prompt: bool) -> Rendered | InvalidRow:
        spans = []
        for prompt_text, full_text in parts:
            if not full_text.startswith(prompt_text):
                continue
            closing = self._closing.search(full_text, len(prompt_text))
            end = closing.end("close") if closing else len(prompt_text) + len(full_text[len(prompt_text) :].rstrip())
            # A template may rewrite an earlier turn, as those do that strip thoughts: then the model never saw this
            # prompt.
            if whole.startswith(full_text[:end]) and end > len(prompt_text):
                spans.append(Span(len(prompt_text), end, closing is not None))
        if prompt:
            return Rendered(whole, tuple(spans))
        if not parts or not spans or spans[-1].start != len(parts[-1][0]):
            return InvalidRow(
                "the chat template rewrites the turns before the last answer, so that its prompt does not come out "
                "again"
            )
        return Rendered(whole if spans[-1].closed else whole[: spans[-1].end], tuple(spans))

    def _render_all(self, requests: Sequence[tuple[ChatMessages, bool]]) -> list[str | InvalidRow]:
        """Many renderings; all at once where none fails, because a call costs more than a rendering."""
        out: list[str | InvalidRow] = [""] * len(requests)
        for add_generation_prompt in (False, True):
            indices = [
                index for index, (_, wants_prompt) in enumerate(requests) if wants_prompt is add_generation_prompt
            ]
            if not indices:
                continue
            try:
                texts = self._apply_template(
                    [self._prepare(requests[index][0]) for index in indices],
                    add_generation_prompt and self._adds_generation_prompt,
                )
            except Exception:  # a template may raise anything: below, row by row, it is told which one it was
                texts = [self._render_or_fault(requests[index][0], add_generation_prompt) for index in indices]
            for index, text in zip(indices, texts, strict=True):
                out[index] = text
        return out

    def _render_or_fault(self, messages: ChatMessages, add_generation_prompt: bool) -> str | InvalidRow:
        try:
            return self._render(messages, add_generation_prompt)
        except InvalidRow as fault:
            return fault

    def _try_render(self, messages: ChatMessages, add_generation_prompt: bool = False) -> str | None:
        text = self._render_or_fault(messages, add_generation_prompt)
        return text if isinstance(text, str) else None

    def _render(self, messages: ChatMessages, add_generation_prompt: bool = False) -> str:
        try:
            return cast(
                str,
                self._apply_template([self._prepare(messages)], add_generation_prompt and self._adds_generation_prompt)[
                    0
                ],
            )
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InvalidRow(f"the base's chat template refuses it: {reason[:100]}") from error

    def _apply_template(self, conversations: list[list[dict[str, str]]], add_generation_prompt: bool) -> list[Any]:
        return cast(
            list[Any],
            self.backend.tokenizer.apply_chat_template(
                conversations, tokenize=False, add_generation_prompt=add_generation_prompt
            ),
        )

    def _prepare(self, messages: ChatMessages) -> list[dict[str, str]]:
        """The turns as the template takes them."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        has_system = bool(turns) and turns[0]["role"] == "system"
        if self._system_mode == "always" and not has_system:
            turns.insert(0, {"role": "system", "content": ""})
        elif self._system_mode == "folded" and has_system and len(turns) > 1:
            turns[1]["content"] = f"{turns[0]['content']}\n\n{turns[1]['content']}"
            del turns[0]
        return turns


def _answers(messages: ChatMessages) -> list[int]:
    return [index for index, message in enumerate(messages) if message.role == "assistant"]


def _token_at(encoding: Encoding, edge: int, length: int) -> int | None:
    """The token that starts at this character; None where one reaches across it."""
    if edge in (0, length):
        return 0 if edge == 0 else len(encoding.ids)
    token = encoding.char_to_token(edge)
    return token if token is not None and token_start(encoding, token) == edge else None

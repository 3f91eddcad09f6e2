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

from lowrank_tune.data.backend import Backend, starts_at
from lowrank_tune.data.formats import RowFault, is_text
from lowrank_tune.data.piecewise import CONTROL_FOUND, NOT_TEXT, Talk
from lowrank_tune.errors import UserError
from lowrank_tune.types import Message, Row

FIRST_STAND_IN = 0xF0000  # characters of a private plane stand for control tokens in a row's own text
SHORT = 64  # tails of prompts up to this long are worth remembering
QUESTION, ANSWER, RULE = "Hm, who asks?", "Nobody asks.", "Rule one."


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


class OwnTemplate:
    """The chat template that came with the tokenizer."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._tails: dict[str, list[int]] = {}
        special = f"(?:{backend.special_pattern.pattern})"
        self._closing = re.compile(rf"(?P<close>{special}(?:{special})*)(?:\s|{special})*\Z")
        self._learn_habits()
        self._learn_marks()

    @property
    def jinja(self) -> str:
        """The template as it came."""
        return str(self.backend.tokenizer.chat_template)

    def _learn_habits(self) -> None:
        """Tries the template on made-up talks: what it needs, what it refuses, what it rewrites."""
        talk = [Message("user", QUESTION), Message("assistant", ANSWER)]
        ruled = [Message("system", RULE), *talk]
        self._asks, self._system = True, "own"
        plain, with_system = self._try(talk), self._try(ruled)
        if plain is None:
            if with_system is None:
                raise UserError(
                    "the base's chat template renders neither a question and its answer nor the same with a system "
                    "turn; "
                    "give the base a working `chat_template`"
                )
            self._system = "always"
        elif with_system is None or RULE not in with_system:
            self._system = "folded"
        asked = self._try(talk[:1], ask=True)
        # Some templates put words in front of an answer that their generation prompt lacks, or the other way round.
        self._asks = asked is not None and self._render(talk).startswith(asked)

    def _learn_marks(self) -> None:
        talk = [Message("user", QUESTION), Message("assistant", ANSWER)]
        rendered = self._spans([talk], [[message.content for message in talk]])[0]
        if isinstance(rendered, RowFault):
            raise UserError(f"the base's chat template cannot be trained with: {rendered.reason}")
        marks = self.backend.special_pattern.findall(rendered.text)
        self._template_marks = tuple(dict.fromkeys(marks))
        span = rendered.spans[-1]
        spoken = rendered.text[span.start : span.end]
        closing = {
            self.backend.specials[mark] for mark in self.backend.special_pattern.findall(spoken.rpartition(ANSWER)[2])
        }
        if self.backend.eos is None and not closing:
            raise UserError("the base's chat template closes answers with no end token, and its tokenizer names none")
        self.end_ids = frozenset(closing | ({self.backend.eos} if self.backend.eos is not None else set()))
        renders_bos = self.backend.bos in {self.backend.specials[mark] for mark in marks}
        self._bos = (
            [self.backend.bos]
            if self.backend.bos is not None and self.backend.begins_with_bos and not renders_bos
            else []
        )
        rewritten = any(len(cast(Rendered, made).spans) < 2 for made in self._two_turns())
        notes = {
            "own": "",
            "always": " (with an empty system turn where there is none)",
            "folded": " (a system text goes before the question)",
        }
        self.about = f"the tokenizer's own template{notes[self._system]}"
        self.about += (
            "; it rewrites earlier turns, and where it does only the last answer is trained" if rewritten else ""
        )

    def _two_turns(self) -> list[Rendered | RowFault]:
        talks = [
            [Message("user", QUESTION), Message("assistant", answer)] * 2
            for answer in (ANSWER, f"<think>\nHm.\n</think>\n\n{ANSWER}")
        ]
        return [
            made
            for made in self._spans(talks, [[message.content for message in talk] for talk in talks])
            if isinstance(made, Rendered)
        ]

    def spoils(self, messages: Talk) -> str | None:
        """Why these turns cannot be rendered; None where they can."""
        if not all(is_text(message.content) for message in messages):
            return NOT_TEXT
        try:
            self._render(messages, ask=messages[-1].role != "assistant")
        except RowFault as fault:
            return fault.reason
        return None

    def prompt(self, messages: Talk) -> list[int]:
        """Ids up to the place where the assistant starts."""
        if not all(is_text(message.content) for message in messages):
            raise RowFault(NOT_TEXT)
        stood_in = self._stand_in(messages)
        made = self._spans([messages], [stood_in], prompt=True)[0]
        if isinstance(made, RowFault):
            raise made
        return [*self._bos, *self._encode(made.text, made.edges)[0]]

    def encode_many(self, rows: Sequence[Talk]) -> list[Row | RowFault]:
        """Rows with their masks: one call of the tokenizer, and more only for rows whose answers merge with their
        prompts."""
        made = self._spans(rows, [self._stand_in(row) for row in rows])
        simple = {
            index for index, item in enumerate(made) if isinstance(item, Rendered) and not self._has_stand_in(item.text)
        }
        todo = [cast(Rendered, made[index]) for index in sorted(simple)]
        tails = {
            tail
            for item in todo
            for span in item.spans
            if (tail := self._tail(item.text[: span.start])) not in self._tails
        }
        encodings = self.backend.encode_marked([*(item.text for item in todo), *tails])
        known = {
            **self._tails,
            **{tail: encoding.ids for tail, encoding in zip(tails, encodings[len(todo) :], strict=True)},
        }
        self._tails.update(
            {tail: ids for tail, ids in known.items() if len(tail) <= SHORT and len(self._tails) < 10_000}
        )
        of_row = dict(zip(sorted(simple), encodings, strict=False))
        return [
            item if isinstance(item, RowFault) else self._row(item, of_row.get(index), known)
            for index, item in enumerate(made)
        ]

    def _row(self, made: Rendered, encoding: Encoding | None, tails: dict[str, list[int]]) -> Row | RowFault:
        edges = made.edges
        places = self._places(made, encoding, tails) if encoding is not None else None
        if encoding is not None and places is not None:
            ids = encoding.ids
        else:
            ids, places = self._encode(made.text, edges)
            places = {0: 0, len(made.text): len(ids), **places}
            places.update(
                {
                    span.end: self._behind_marks(made, span, ids, places[span.start])
                    for span in made.spans
                    if span.closed
                }
            )
        if self.backend.hides_control and self._has_hidden(made.text, ids):
            return RowFault(CONTROL_FOUND)
        says = [False] * len(ids)
        for span in made.spans:
            start, end = places[span.start], places[span.end]
            says[start:end] = [True] * (end - start)
        ids, says = [*self._bos, *ids], [*(False for _ in self._bos), *says]
        if not made.spans[-1].closed:
            assert self.backend.eos is not None
            ids.append(self.backend.eos)
            says.append(True)
        return Row(ids, says)

    def _has_hidden(self, text: str, ids: Sequence[int]) -> bool:
        return sum(map(self.backend.control.__contains__, ids)) > len(self.backend.special_pattern.findall(text))

    def _places(self, made: Rendered, encoding: Encoding, tails: dict[str, list[int]]) -> dict[int, int] | None:
        """The first token behind each edge, where the encoding of the whole text begins with the encoding of each
        prompt in it; else None."""
        places = {}
        ids = encoding.ids
        if not all(span.closed for span in made.spans[:-1]):
            return None  # an answer that runs into the next turn: rare, and `_encode` is exact
        for span in made.spans:
            start = _token_at(encoding, span.start, len(made.text))
            last = encoding.char_to_token(span.end - 1)
            if start is None or last is None:
                return None
            tail = tails[self._tail(made.text[: span.start])]
            if ids[max(0, start - len(tail)) : start] != tail:
                return None
            places[span.start], places[span.end] = start, last + 1 if span.closed else len(ids)
        return places

    def _behind_marks(self, made: Rendered, span: Span, ids: Sequence[int], place: int) -> int:
        """Behind the last control token of a closed span that starts at token `place`: no id of its words is a control
        token."""
        marks = len(self.backend.special_pattern.findall(made.text, span.start, span.end))
        found = [index for index in range(place, len(ids)) if ids[index] in self.backend.control]
        return found[marks - 1] + 1

    def _tail(self, prompt: str) -> str:
        """The end of a prompt from its last control token on. The tokenizer never merges across such a token."""
        return prompt[max(0, *(prompt.rfind(mark) for mark in self._template_marks), 0) :]

    def _encode(self, text: str, edges: Sequence[int]) -> tuple[list[int], dict[int, int]]:
        """Ids of a text of which every prompt in it is encoded as it is alone, and the first token behind each edge."""
        inner = [edge for edge in edges if 0 < edge < len(text)]
        if not self._has_stand_in(text):
            encoding = self.backend.encode_marked([text])[0]
            places = {edge: _token_at(encoding, edge, len(text)) for edge in inner}
            if not inner:
                return encoding.ids, {}
            head, heads = self._encode(text[: inner[-1]], inner)
            cut = places[inner[-1]]
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
        for found in [*self.backend.special_pattern.finditer(text), None]:
            piece = self._put_back(text[position : found.start() if found else len(text)])
            if piece:
                ids += (
                    self.backend.encode_plain([piece])[0] if first and not ids else self.backend.continue_plain(piece)
                )
            if found:
                ids.append(self.backend.specials[found.group()])
                position = found.end()
        return ids

    def _stand_in(self, messages: Talk) -> list[str]:
        """The contents, with a private character for each control token that stands in them."""
        pattern, names = self.backend.special_pattern, list(self.backend.specials)
        return [
            pattern.sub(lambda found: chr(FIRST_STAND_IN + names.index(found.group())), message.content)
            for message in messages
        ]

    def _has_stand_in(self, text: str) -> bool:
        return not text.isascii() and any(
            FIRST_STAND_IN <= ord(sign) < FIRST_STAND_IN + len(self.backend.specials) for sign in set(text)
        )

    def _put_back(self, text: str) -> str:
        names = list(self.backend.specials)
        return "".join(
            names[place] if 0 <= (place := ord(sign) - FIRST_STAND_IN) < len(names) else sign for sign in text
        )

    def _spans(
        self, rows: Sequence[Talk], contents: Sequence[Sequence[str]], prompt: bool = False
    ) -> list[Rendered | RowFault]:
        """Renders rows, and each of their prompts and answers, in one go; with `prompt` up to where the next answer
        starts."""
        talks = [
            [Message(turn.role, text) for turn, text in zip(row, texts, strict=True)]
            for row, texts in zip(rows, contents, strict=True)
        ]
        wanted: list[tuple[Talk, bool]] = []
        for talk in talks:
            wanted.append((talk, prompt))
            for index in _answers(talk):
                wanted.append((talk[:index], True))
                if index + 1 < len(talk):
                    wanted.append((talk[: index + 1], False))
        texts = iter(self._render_all(wanted))
        out: list[Rendered | RowFault] = []
        for row, talk in zip(rows, talks, strict=True):
            whole = next(texts)
            parts = [(next(texts), next(texts) if index + 1 < len(talk) else whole) for index in _answers(talk)]
            if not all(is_text(message.content) for message in row):
                out.append(RowFault(NOT_TEXT))
            elif fault := next(
                (text for text in (whole, *(text for pair in parts for text in pair)) if isinstance(text, RowFault)),
                None,
            ):
                out.append(fault)
            else:
                out.append(self._find(cast(str, whole), cast(list[tuple[str, str]], parts), prompt))
        return out

    def _find(self, whole: str, parts: Sequence[tuple[str, str]], prompt: bool) -> Rendered | RowFault:
        spans = []
        for asked, answered in parts:
            if not answered.startswith(asked):
                continue
            closing = self._closing.search(answered, len(asked))
            end = closing.end("close") if closing else len(asked) + len(answered[len(asked) :].rstrip())
            # A template may rewrite an earlier turn, as those do that strip thoughts: then the model never saw this
            # prompt.
            if whole.startswith(answered[:end]) and end > len(asked):
                spans.append(Span(len(asked), end, closing is not None))
        if prompt:
            return Rendered(whole, tuple(spans))
        if not parts or not spans or spans[-1].start != len(parts[-1][0]):
            return RowFault(
                "the chat template rewrites the turns before the last answer, so that its prompt does not come out "
                "again"
            )
        return Rendered(whole if spans[-1].closed else whole[: spans[-1].end], tuple(spans))

    def _render_all(self, wanted: Sequence[tuple[Talk, bool]]) -> list[str | RowFault]:
        """Many renderings; all at once where none fails, because a call costs more than a rendering."""
        out: list[str | RowFault] = [""] * len(wanted)
        for ask in (False, True):
            indices = [index for index, (_, asks) in enumerate(wanted) if asks is ask]
            if not indices:
                continue
            try:
                texts = self._call([self._prepare(wanted[index][0]) for index in indices], ask and self._asks)
            except Exception:  # a template may raise anything: below, row by row, it is told which one it was
                texts = [self._one(wanted[index][0], ask) for index in indices]
            for index, text in zip(indices, texts, strict=True):
                out[index] = text
        return out

    def _one(self, messages: Talk, ask: bool) -> str | RowFault:
        try:
            return self._render(messages, ask)
        except RowFault as fault:
            return fault

    def _try(self, messages: Talk, ask: bool = False) -> str | None:
        text = self._one(messages, ask)
        return text if isinstance(text, str) else None

    def _render(self, messages: Talk, ask: bool = False) -> str:
        try:
            return cast(str, self._call([self._prepare(messages)], ask and self._asks)[0])
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RowFault(f"the base's chat template refuses it: {reason[:100]}") from error

    def _call(self, talks: list[list[dict[str, str]]], ask: bool) -> list[Any]:
        return cast(
            list[Any], self.backend.tokenizer.apply_chat_template(talks, tokenize=False, add_generation_prompt=ask)
        )

    def _prepare(self, messages: Talk) -> list[dict[str, str]]:
        """The turns as the template takes them."""
        talk = [{"role": message.role, "content": message.content} for message in messages]
        is_ruled = bool(talk) and talk[0]["role"] == "system"
        if self._system == "always" and not is_ruled:
            talk.insert(0, {"role": "system", "content": ""})
        elif self._system == "folded" and is_ruled and len(talk) > 1:
            talk[1]["content"] = f"{talk[0]['content']}\n\n{talk[1]['content']}"
            del talk[0]
        return talk


def _answers(messages: Talk) -> list[int]:
    return [index for index, message in enumerate(messages) if message.role == "assistant"]


def _token_at(encoding: Encoding, edge: int, length: int) -> int | None:
    """The token that starts at this character; None where one reaches across it."""
    if edge in (0, length):
        return 0 if edge == 0 else len(encoding.ids)
    place = encoding.char_to_token(edge)
    return place if place is not None and starts_at(encoding, place) == edge else None

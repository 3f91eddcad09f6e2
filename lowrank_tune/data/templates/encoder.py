"""From rendered conversations to ids and masks. The prompt of the last answer is encoded whole, as at inference."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Encoding

from lowrank_tune.batch import Row
from lowrank_tune.data.formats import InvalidRow, RowOrFault
from lowrank_tune.data.templates.backend import (
    CONTROL_FOUND,
    TokenizerBackend,
    token_start,
)
from lowrank_tune.data.templates.placeholders import Placeholders
from lowrank_tune.data.templates.spans import Rendered, Span

MAX_CACHED_TAIL = 64
"""Characters of a tail that is cached."""
MAX_CACHED_TAILS = 10_000
Stretch = tuple[int, int]
"""The index of the first token of an answer, and that after its last one."""


class SpanEncoder:
    """Encodes prompts, and rows with their masks. `template_tokens` are the control tokens that the template writes.

    The tail of a prompt is its end from the last control token on. The tokenizer never merges across a control token,
    so a prompt has its own ids in a longer text exactly if its tail has them there.
    """

    def __init__(
        self,
        backend: TokenizerBackend,
        placeholders: Placeholders,
        template_tokens: Sequence[str],
    ) -> None:
        self._backend = backend
        self._placeholders = placeholders
        self._template_tokens = tuple(template_tokens)
        self._tail_ids: dict[str, list[int]] = {}

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of a prompt. Control tokens in the text of a row are plain text."""
        if self._placeholders.found_in(text):
            return self._encode_pieces(text, is_start=True)
        return self._backend.encode_with_special_tokens([text])[0].ids

    def encode_many(self, rendered: Sequence[Rendered | InvalidRow]) -> list[RowOrFault]:
        """Returns rows with their masks: by one call of the tokenizer, and more only for rows whose answers merge with
        their prompts."""
        encodings = self._encode_texts(rendered)
        rows: list[RowOrFault] = []
        for index, item in enumerate(rendered):
            if isinstance(item, InvalidRow):
                rows.append(item)
            else:
                rows.append(self._row(item, encodings.get(index)))
        self._trim_tail_cache()
        return rows

    def _encode_texts(self, rendered: Sequence[Rendered | InvalidRow]) -> dict[int, Encoding]:
        """Encodes the texts without placeholders, and the tails of their prompts, by one call of the tokenizer.

        Returns the encodings of the texts by their index; stores the ids of the tails.
        """
        texts: dict[int, str] = {}
        # A dict and not a set: its order is that of the encodings.
        new_tails: dict[str, None] = {}
        for index, item in enumerate(rendered):
            if isinstance(item, InvalidRow) or self._placeholders.found_in(item.text):
                continue
            texts[index] = item.text
            tails = [self._tail(item.text, span) for span in item.spans]
            new_tails.update(dict.fromkeys(tail for tail in tails if tail not in self._tail_ids))
        encodings = self._backend.encode_with_special_tokens([*texts.values(), *new_tails])
        text_encodings = encodings[: len(texts)]
        tail_encodings = encodings[len(texts) :]
        for tail, encoding in zip(new_tails, tail_encodings, strict=True):
            self._tail_ids[tail] = encoding.ids
        return dict(zip(texts, text_encodings, strict=True))

    def _trim_tail_cache(self) -> None:
        """Keeps the short tails, which occur in many rows, as long as they are few."""
        short = {tail: ids for tail, ids in self._tail_ids.items() if len(tail) <= MAX_CACHED_TAIL}
        self._tail_ids = short if len(short) <= MAX_CACHED_TAILS else {}

    def _row(
        self,
        rendered: Rendered,
        encoding: Encoding | None,
    ) -> RowOrFault:
        """Returns the row of a text. `encoding` is that of the whole text, None if the text has placeholders."""
        if encoding is None:
            ids, stretches = self._encode_with_placeholders(rendered)
        else:
            ids, stretches = self._encode_whole(rendered, encoding) or self._encode_in_two_parts(rendered)
        if self._backend.may_hide_special_tokens and self._contains_hidden_token(rendered.text, ids):
            return InvalidRow(CONTROL_FOUND)
        mask = [False] * len(ids)
        for start, end in stretches:
            mask[start:end] = [True] * (end - start)
        if not rendered.spans[-1].closed:
            assert self._backend.eos is not None
            return Row([*ids, self._backend.eos], [*mask, True])
        return Row(ids, mask)

    def _contains_hidden_token(
        self,
        text: str,
        ids: Sequence[int],
    ) -> bool:
        """Returns whether there are more control tokens in the ids than in the text."""
        num_in_text = len(self._backend.special_pattern.findall(text))
        num_in_ids = sum(token_id in self._backend.control_ids for token_id in ids)
        return num_in_ids > num_in_text

    def _encode_whole(
        self,
        rendered: Rendered,
        encoding: Encoding,
    ) -> tuple[list[int], list[Stretch]] | None:
        """Returns the ids of the whole text; None if they do not begin with the ids of the last prompt."""
        *earlier, last = rendered.spans
        stretch = self._stretch(rendered.text, encoding, last)
        if stretch is None:
            return None
        return encoding.ids, [
            *self._stretches(
                rendered.text,
                encoding,
                earlier,
            ),
            stretch,
        ]

    def _encode_in_two_parts(self, rendered: Rendered) -> tuple[list[int], list[Stretch]]:
        """Returns the ids of the last prompt encoded alone, and those of the answer after them."""
        *earlier, _ = rendered.spans
        prompt = rendered.prompt_text
        (encoding,) = self._backend.encode_with_special_tokens([prompt])
        ids, stretch = self._append_answer(encoding.ids, rendered)
        return ids, [*self._stretches(prompt, encoding, earlier), stretch]

    def _encode_with_placeholders(self, rendered: Rendered) -> tuple[list[int], list[Stretch]]:
        """Returns the same for a text with placeholders, in the prompt or in the answer."""
        prompt = self.encode_prompt(rendered.prompt_text)
        stretches = []
        for span in rendered.spans[:-1]:
            before = self.encode_prompt(rendered.text[: span.start])
            through = self.encode_prompt(rendered.text[: span.end])
            if prompt[: len(before)] == before and prompt[: len(through)] == through:
                stretches.append((len(before), len(through)))
        ids, stretch = self._append_answer(prompt, rendered)
        return ids, [*stretches, stretch]

    def _append_answer(
        self,
        prompt: Sequence[int],
        rendered: Rendered,
    ) -> tuple[list[int], Stretch]:
        last = rendered.spans[-1]
        answer = rendered.text[last.start : last.end]
        rest = rendered.text[last.end :]
        # A closed answer ends with a control token, which no token reaches across.
        ids = [*prompt, *self._encode_pieces(answer, is_start=False)]
        stretch = (len(prompt), len(ids))
        return [*ids, *self._encode_pieces(rest, is_start=False)], stretch

    def _stretches(
        self,
        text: str,
        encoding: Encoding,
        spans: Sequence[Span],
    ) -> list[Stretch]:
        """Returns the stretches of the answers that follow the ids of their own prompts."""
        stretches = [self._stretch(text, encoding, span) for span in spans]
        return [stretch for stretch in stretches if stretch is not None]

    def _stretch(
        self,
        text: str,
        encoding: Encoding,
        span: Span,
    ) -> Stretch | None:
        """Returns the tokens of an answer if the ids before it are those of its prompt; else None."""
        start = _token_at(encoding, span.start, len(text))
        end = encoding.char_to_token(span.end - 1)
        if start is None or end is None:
            return None
        tail = self._tail_ids[self._tail(text, span)]
        if encoding.ids[max(0, start - len(tail)) : start] != tail:
            return None
        # The last character may take several tokens. An answer without an end token may share its last token with the
        # next message, and that token is then not trained.
        while _ends_within(encoding, end, span.end):
            end += 1
        return (start, end) if end > start else None

    def _tail(
        self,
        text: str,
        span: Span,
    ) -> str:
        """Returns the tail of the prompt of an answer."""
        prompt = text[: span.start]
        starts = [prompt.rfind(token) for token in self._template_tokens]
        return prompt[max([0, *starts]) :]

    def _encode_pieces(
        self,
        text: str,
        is_start: bool,
    ) -> list[int]:
        """Returns the ids of a text: the control tokens of the template, and the text between them as plain text."""
        ids: list[int] = []
        position = 0
        for match in self._backend.special_pattern.finditer(text):
            ids += self._encode_piece(text[position : match.start()], is_start and not ids)
            ids.append(self._backend.special_tokens[match.group()])
            position = match.end()
        return ids + self._encode_piece(text[position:], is_start and not ids)

    def _encode_piece(
        self,
        text: str,
        is_start: bool,
    ) -> list[int]:
        piece = self._placeholders.restore(text)
        if is_start and piece:
            return self._backend.encode_plain([piece])[0]
        return self._backend.encode_continuation(piece)


def _token_at(
    encoding: Encoding,
    edge: int,
    length: int,
) -> int | None:
    """Returns the token that starts at this character of a text; None if a token reaches across it."""
    if edge == 0:
        return 0
    if edge == length:
        return len(encoding.ids)
    token = encoding.char_to_token(edge)
    if token is not None and token_start(encoding, token) == edge:
        return token
    return None


def _ends_within(
    encoding: Encoding,
    token: int,
    end: int,
) -> bool:
    """Returns whether a token begins and ends before the character `end`."""
    chars = encoding.token_to_chars(token)
    return chars is not None and chars[0] < end and chars[1] <= end

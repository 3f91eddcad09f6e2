"""From rendered conversations to ids and masks. The prompt of the last answer is encoded whole, as at inference."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Encoding

from lowrank_tune.batch import Row
from lowrank_tune.data.formats import InvalidRow
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
"""The index of the first trained token of an answer, and that after its last one."""
Stretches = list[Stretch | None]
"""Those of all answers of a text; None for one whose prompt has other ids."""


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

    def encode_many(self, rendered: Sequence[Sequence[Rendered] | InvalidRow]) -> list[tuple[Row, ...] | InvalidRow]:
        """Returns the rows of each conversation with their masks: by one call of the tokenizer, and more only for rows
        whose answers merge with their prompts."""
        texts: list[Rendered] = []
        for item in rendered:
            if not isinstance(item, InvalidRow):
                texts += item
        encodings = iter(self._encode_texts(texts))
        encoded: list[tuple[Row, ...] | InvalidRow] = []
        for item in rendered:
            if isinstance(item, InvalidRow):
                encoded.append(item)
            else:
                encoded.append(self._rows([(each, next(encodings)) for each in item]))
        self._trim_tail_cache()
        return encoded

    def _rows(self, items: Sequence[tuple[Rendered, Encoding | None]]) -> tuple[Row, ...] | InvalidRow:
        """Returns the rows of a conversation: of each text one, and one for each answer in it whose prompt has other
        ids there than alone."""
        rows = []
        for rendered, encoding in items:
            row, separate = self._row(rendered, encoding)
            texts = [(rendered, row)]
            for span in separate:
                alone = rendered.alone(span)
                own_row, _ = self._row(alone, None)
                texts.append((alone, own_row))
            for each, encoded in texts:
                if self._backend.may_hide_special_tokens and self._contains_hidden_token(each.text, encoded.input_ids):
                    return InvalidRow(CONTROL_FOUND)
                rows.append(encoded)
        return tuple(rows)

    def _encode_texts(self, rendered: Sequence[Rendered]) -> list[Encoding | None]:
        """Encodes the texts without placeholders, and the tails of their prompts, by one call of the tokenizer.

        Returns the encodings, None for a text with placeholders; stores the ids of the tails.
        """
        texts: dict[int, str] = {}
        # A dict and not a set: its order is that of the encodings.
        new_tails: dict[str, None] = {}
        for index, item in enumerate(rendered):
            if self._placeholders.found_in(item.text):
                continue
            texts[index] = item.text
            tails = [self._tail(item.text, span) for span in item.spans]
            new_tails.update(dict.fromkeys(tail for tail in tails if tail not in self._tail_ids))
        encodings = self._backend.encode_with_special_tokens([*texts.values(), *new_tails])
        for tail, encoding in zip(new_tails, encodings[len(texts) :], strict=True):
            self._tail_ids[tail] = encoding.ids
        encoding_of = dict(zip(texts, encodings, strict=False))
        return [encoding_of.get(index) for index in range(len(rendered))]

    def _trim_tail_cache(self) -> None:
        """Keeps the short tails, which occur in many rows, as long as they are few."""
        short = {tail: ids for tail, ids in self._tail_ids.items() if len(tail) <= MAX_CACHED_TAIL}
        self._tail_ids = short if len(short) <= MAX_CACHED_TAILS else {}

    def _row(
        self,
        rendered: Rendered,
        encoding: Encoding | None,
    ) -> tuple[Row, list[Span]]:
        """Returns the row of a text, and the answers in it that are not trained, because their prompts have other ids.

        `encoding` is that of the whole text; None if the text has placeholders, or is encoded in parts.
        """
        if encoding is not None:
            ids, stretches = self._encode_whole(rendered, encoding) or self._encode_in_two_parts(rendered)
        elif self._placeholders.found_in(rendered.text):
            ids, stretches = self._encode_with_placeholders(rendered)
        else:
            ids, stretches = self._encode_in_two_parts(rendered)
        mask = [False] * len(ids)
        for stretch in stretches:
            if stretch is not None:
                start, end = stretch
                mask[start:end] = [True] * (end - start)
        separate = [span for span, stretch in zip(rendered.spans, stretches, strict=True) if stretch is None]
        if not rendered.spans[-1].closed:
            assert self._backend.eos is not None
            return Row([*ids, self._backend.eos], [*mask, True]), separate
        return Row(ids, mask), separate

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
    ) -> tuple[list[int], Stretches] | None:
        """Returns the ids of the whole text; None if they do not begin with the ids of the last prompt."""
        *earlier, last = rendered.spans
        stretch = self._stretch(rendered.text, encoding, last)
        if stretch is None:
            return None
        stretches = [self._stretch(rendered.text, encoding, span) for span in earlier]
        return encoding.ids, [*stretches, stretch]

    def _encode_in_two_parts(self, rendered: Rendered) -> tuple[list[int], Stretches]:
        """Returns the ids of the last prompt encoded alone, and those of the answer after them."""
        *earlier, _ = rendered.spans
        prompt = rendered.prompt_text
        (encoding,) = self._backend.encode_with_special_tokens([prompt])
        ids, stretch = self._append_answer(encoding.ids, rendered)
        stretches = [self._stretch(prompt, encoding, span) for span in earlier]
        return ids, [*stretches, stretch]

    def _encode_with_placeholders(self, rendered: Rendered) -> tuple[list[int], Stretches]:
        """Returns the same for a text with placeholders, in the prompt or in the answer."""
        prompt = self.encode_prompt(rendered.prompt_text)
        stretches: Stretches = []
        for span in rendered.spans[:-1]:
            before = self.encode_prompt(rendered.text[: span.start])
            untrained = self.encode_prompt(rendered.text[: span.trained_start])
            through = self.encode_prompt(rendered.text[: span.end])
            if prompt[: len(before)] == before and prompt[: len(through)] == through:
                start = len(untrained) if through[: len(untrained)] == untrained else len(before)
                stretches.append((start, len(through)))
            else:
                stretches.append(None)
        ids, stretch = self._append_answer(prompt, rendered)
        return ids, [*stretches, stretch]

    def _append_answer(
        self,
        prompt: Sequence[int],
        rendered: Rendered,
    ) -> tuple[list[int], Stretch]:
        last = rendered.spans[-1]
        untrained = rendered.text[last.start : last.trained_start]
        answer = rendered.text[last.trained_start : last.end]
        rest = rendered.text[last.end :]
        before = [*prompt, *self._encode_pieces(untrained, is_start=False)]
        # A closed answer ends with a control token, which no token reaches across.
        ids = [*before, *self._encode_pieces(answer, is_start=False)]
        stretch = (len(before), len(ids))
        return [*ids, *self._encode_pieces(rest, is_start=False)], stretch

    def _stretch(
        self,
        text: str,
        encoding: Encoding,
        span: Span,
    ) -> Stretch | None:
        """Returns the trained tokens of an answer if the ids before it are those of its prompt; else None."""
        start = _token_at(encoding, span.start, len(text))
        trained_start = encoding.char_to_token(span.trained_start)
        end = encoding.char_to_token(span.end - 1)
        if start is None or trained_start is None or end is None:
            return None
        tail = self._tail_ids[self._tail(text, span)]
        if encoding.ids[max(0, start - len(tail)) : start] != tail:
            return None
        # The last character may take several tokens. An answer without an end token may share its last token with the
        # next message, and that token is then not trained.
        while _ends_within(encoding, end, span.end):
            end += 1
        first = max(start, trained_start)
        return (first, end) if end > first else None

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

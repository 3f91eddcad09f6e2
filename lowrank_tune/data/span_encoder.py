"""From rendered conversations to ids and masks. The prompt of the last answer is encoded whole, as at inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import Encoding

from lowrank_tune.batch import Row
from lowrank_tune.data.answer_spans import Rendered, Span
from lowrank_tune.data.fallback_templates import CONTROL_FOUND
from lowrank_tune.data.formats import InvalidRow
from lowrank_tune.data.placeholders import Placeholders
from lowrank_tune.data.tokenizer_backend import TokenizerBackend, token_start

# characters of a prompt's end, and how many ends are cached
MAX_CACHED_TAIL = 64
MAX_CACHED_TAILS = 10_000
Stretch = tuple[int, int]
"""The first token of an answer, and the one behind its last."""


class SpanEncoder:
    """Encodes prompts, and rows with their masks. `template_tokens` are the control tokens that the template writes."""

    def __init__(self, backend: TokenizerBackend, placeholders: Placeholders, template_tokens: Sequence[str]) -> None:
        self._backend = backend
        self._placeholders = placeholders
        self._template_tokens = tuple(template_tokens)
        self._tail_cache: dict[str, list[int]] = {}

    def encode_prompt(self, text: str) -> list[int]:
        """The ids that the tokenizer gives, control tokens of a row's own text apart, which are plain text."""
        if self._placeholders.found_in(text):
            return self._pieces(text, first=True)
        return self._backend.encode_with_special_tokens([text])[0].ids

    def encode_many(self, rendered: Sequence[Rendered | InvalidRow]) -> list[Row | InvalidRow]:
        """Rows with their masks: one call of the tokenizer, and more only for rows whose answers merge with their
        prompts."""
        simple = {
            index: item
            for index, item in enumerate(rendered)
            if isinstance(item, Rendered) and not self._placeholders.found_in(item.text)
        }
        tails = {self._tail(item.text, span) for item in simple.values() for span in item.spans}
        new_tails = list(tails - self._tail_cache.keys())
        encodings = self._backend.encode_with_special_tokens([*(item.text for item in simple.values()), *new_tails])
        tail_ids = self._tail_cache | {
            tail: encoding.ids for tail, encoding in zip(new_tails, encodings[len(simple) :], strict=True)
        }
        self._cache_tails(tail_ids)
        of_row = dict(zip(simple, encodings, strict=False))
        return [
            item if isinstance(item, InvalidRow) else self._row(item, of_row.get(index), tail_ids)
            for index, item in enumerate(rendered)
        ]

    def _cache_tails(self, tail_ids: Mapping[str, list[int]]) -> None:
        for tail, ids in tail_ids.items():
            if len(tail) <= MAX_CACHED_TAIL and len(self._tail_cache) < MAX_CACHED_TAILS:
                self._tail_cache[tail] = ids

    def _row(self, rendered: Rendered, encoding: Encoding | None, tails: Mapping[str, list[int]]) -> Row | InvalidRow:
        if encoding is None:
            ids, stretches = self._with_placeholders(rendered)
        else:
            ids, stretches = self._whole(rendered, encoding, tails) or self._in_two_parts(rendered, tails)
        if self._backend.may_hide_special_tokens and self._contains_special_ids(rendered.text, ids):
            return InvalidRow(CONTROL_FOUND)
        mask = [False] * len(ids)
        for start, end in stretches:
            mask[start:end] = [True] * (end - start)
        if not rendered.spans[-1].closed:
            assert self._backend.eos is not None
            return Row([*ids, self._backend.eos], [*mask, True])
        return Row(ids, mask)

    def _contains_special_ids(self, text: str, ids: Sequence[int]) -> bool:
        marks = self._backend.special_pattern.findall(text)
        return sum(map(self._backend.control_ids.__contains__, ids)) > len(marks)

    def _whole(
        self,
        rendered: Rendered,
        encoding: Encoding,
        tails: Mapping[str, list[int]],
    ) -> tuple[list[int], list[Stretch]] | None:
        """The whole text encoded at once; None where that does not begin with the ids of the last prompt."""
        *earlier, last = rendered.spans
        stretch = self._stretch(rendered.text, encoding, last, tails)
        if stretch is None:
            return None
        return encoding.ids, [*self._earlier(rendered.text, encoding, earlier, tails), stretch]

    def _in_two_parts(self, rendered: Rendered, tails: Mapping[str, list[int]]) -> tuple[list[int], list[Stretch]]:
        """The last prompt as it is encoded alone, and the answer behind it."""
        *earlier, last = rendered.spans
        prompt = rendered.prompt_text
        encoding = self._backend.encode_with_special_tokens([prompt])[0]
        ids, stretch = self._append_answer(encoding.ids, rendered)
        return ids, [*self._earlier(prompt, encoding, earlier, tails), stretch]

    def _with_placeholders(self, rendered: Rendered) -> tuple[list[int], list[Stretch]]:
        """The same where the text holds stand-ins, in the prompt or in the answer."""
        prompt = self.encode_prompt(rendered.prompt_text)
        stretches = []
        for span in rendered.spans[:-1]:
            before, through = (self.encode_prompt(rendered.text[:end]) for end in (span.start, span.end))
            if prompt[: len(before)] == before and prompt[: len(through)] == through:
                stretches.append((len(before), len(through)))
        ids, stretch = self._append_answer(prompt, rendered)
        return ids, [*stretches, stretch]

    def _append_answer(self, prompt: Sequence[int], rendered: Rendered) -> tuple[list[int], Stretch]:
        last = rendered.spans[-1]
        answer = rendered.text[last.start : last.end]
        rest = rendered.text[last.end :]
        # Behind a closed answer stands a control token, which no token reaches across.
        ids = [*prompt, *self._pieces(answer, first=False)]
        return [*ids, *self._pieces(rest, first=False)], (len(prompt), len(ids))

    def _earlier(
        self,
        text: str,
        encoding: Encoding,
        spans: Sequence[Span],
        tails: Mapping[str, list[int]],
    ) -> list[Stretch]:
        """The earlier answers that follow the ids of their own prompts."""
        stretches = (self._stretch(text, encoding, span, tails) for span in spans)
        return [stretch for stretch in stretches if stretch is not None]

    def _stretch(self, text: str, encoding: Encoding, span: Span, tails: Mapping[str, list[int]]) -> Stretch | None:
        """The tokens of an answer, where the ids before it are those of its prompt; else None."""
        start = _token_at(encoding, span.start, len(text))
        end = encoding.char_to_token(span.end - 1)
        if start is None or end is None:
            return None
        tail = tails[self._tail(text, span)]
        if encoding.ids[max(0, start - len(tail)) : start] != tail:
            return None
        # The last character may take several tokens. An answer without an end token may share its last token with the
        # next turn, which is then not trained.
        while (chars := encoding.token_to_chars(end)) is not None and chars[0] < span.end and chars[1] <= span.end:
            end += 1
        return (start, end) if end > start else None

    def _tail(self, text: str, span: Span) -> str:
        """The end of a prompt from its last control token on. The tokenizer never merges across such a token."""
        prompt = text[: span.start]
        return prompt[max([0, *(prompt.rfind(token) for token in self._template_tokens)]) :]

    def _pieces(self, text: str, first: bool) -> list[int]:
        """Ids of a text, control tokens of the template apart, stand-ins as the plain characters that they stand
        for."""
        ids: list[int] = []
        position = 0
        for match in [*self._backend.special_pattern.finditer(text), None]:
            piece = self._placeholders.restore(text[position : match.start() if match else len(text)])
            if piece:
                ids += (
                    self._backend.encode_plain([piece])[0]
                    if first and not ids
                    else self._backend.encode_continuation(piece)
                )
            if match:
                ids.append(self._backend.special_tokens[match.group()])
                position = match.end()
        return ids


def _token_at(encoding: Encoding, edge: int, length: int) -> int | None:
    """The token that starts at this character; None where one reaches across it."""
    if edge in (0, length):
        return 0 if edge == 0 else len(encoding.ids)
    token = encoding.char_to_token(edge)
    if token is not None and token_start(encoding, token) == edge:
        return token
    return None

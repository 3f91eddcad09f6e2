"""The Rust tokenizer behind a template, twice: one copy reads control tokens in a text, the other reads them as plain
characters.

Both are our own copies, so that no switch is ever thrown on a tokenizer that others hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, cast

from tokenizers import Encoding, Tokenizer

from lowrank_tune.errors import UserError


class TokenizerBackend:
    """Text to ids and back. `control` are the ids that must never come out of data."""

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                "the base's tokenizer has no `tokenizer.json`; the kit needs a fast tokenizer (AutoTokenizer can "
                "convert it)"
            )
        self.tokenizer = tokenizer
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Only the ids are wanted: padding and truncation would change them, and a post-processor may shorten the
        # offsets.
        state.update(padding=None, truncation=None, post_processor=None)
        self.state = json.dumps(state, sort_keys=True, ensure_ascii=True)
        self.special_tokenizer = Tokenizer.from_str(self.state)
        self.plain_tokenizer = Tokenizer.from_str(self.state)
        self.plain_tokenizer.encode_special_tokens = True
        self.special_tokens: dict[str, int] = {
            token.content: number
            for number, token in self.special_tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        names = sorted(self.special_tokens, key=len, reverse=True)
        if names:
            self.special_pattern = re.compile("|".join(map(re.escape, names)))
        else:
            self.special_pattern = re.compile(r"(?!)")
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        self.pad: int = next((number for number in (tokenizer.pad_token_id, self.eos) if number is not None), 0)
        unknown = tokenizer.unk_token_id
        self.control_ids = frozenset(self.special_tokens.values()) - ({unknown} if unknown != self.eos else set())
        # Tokens that are matched in the *normalized* text can hide from a search in the text as it is.
        self.may_hide_special_tokens = self.special_tokenizer.normalizer is not None and any(
            token.special and token.normalized for token in self.special_tokenizer.get_added_tokens_decoder().values()
        )
        self._adds_prefix_space = self._detect_prefix_space()

    def _detect_prefix_space(self) -> bool:
        """Whether a space is put in front of every text (SentencePiece's habit)."""
        alone = self.plain_tokenizer.encode("x", add_special_tokens=False)
        after = self.plain_tokenizer.encode("\nx", add_special_tokens=False)
        return alone.ids != after.ids[-len(alone.ids) :]

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts in which control tokens are just characters."""
        return [
            encoding.ids for encoding in self.plain_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def encode_with_special_tokens(self, texts: Sequence[str]) -> list[Encoding]:
        """Encodings, with offsets, of texts in which control tokens count."""
        return self.special_tokenizer.encode_batch(list(texts), add_special_tokens=False)

    def encode_continuation(self, text: str) -> list[int]:
        """Plain ids of a text that goes on after other ids: no space in front that the text does not have."""
        if not text:
            return []
        if self._adds_prefix_space:
            encoding = self.plain_tokenizer.encode("\n" + text, add_special_tokens=False)
            first = encoding.char_to_token(1)
            if first is not None and token_start(encoding, first) == 1:
                return encoding.ids[first:]
        return self.encode_plain([text])[0]

    def decode(self, ids: Sequence[int], special_tokens: bool) -> str:
        """Text of ids; control tokens are left out unless `special_tokens`."""
        return cast(
            str,
            self.tokenizer.decode(
                list(ids),
                skip_special_tokens=not special_tokens,
                clean_up_tokenization_spaces=False,
            ),
        )

    def id_to_token(self, token_id: int) -> str:
        """A control token by name."""
        return cast(str, self.tokenizer.convert_ids_to_tokens(token_id))


def default_chat_template(tokenizer: Any) -> str | None:
    """The template that `apply_chat_template` uses, of several the default one; None for a tokenizer without one.
    Raises UserError where there are several and no default one."""
    if not tokenizer.chat_template:
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise UserError(f"the base's tokenizer has several chat templates and no default one: {error}") from error


def token_start(encoding: Encoding, token: int) -> int | None:
    """The first character of a token."""
    chars = encoding.token_to_chars(token)
    return None if chars is None else chars[0]

"""The Rust tokenizer of a template, in two copies: one reads control tokens in a text, the other reads them as plain
characters.

Both are copies, so that the settings of a tokenizer that other code uses never change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tokenizers import Encoding, Tokenizer

from lowrank_tune.errors import UserError

PANIC = "PanicException"
"""The type, derived from BaseException, of an error inside the Rust library."""
CONTROL_FOUND = "a control token of the base that could not be read as plain text"


@contextmanager
def _describe_panics() -> Iterator[None]:
    """Raises UserError if the tokenizers library fails inside, as it does for a regular expression that needs too many
    retries on a text."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != PANIC:
            raise
        raise UserError(
            f"base.model: its tokenizer fails on a text ({str(error).strip():.200}): a rule in its tokenizer.json is "
            "broken or takes too long; use another base"
        ) from None


class TokenizerBackend:
    """Text to ids and back. `control_ids` are the ids that the text of a row must never become."""

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                "the base's tokenizer has no `tokenizer.json`; the kit needs a fast tokenizer (AutoTokenizer can "
                "convert it)"
            )
        self.tokenizer = tokenizer
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Padding and truncation would change the ids, and a post-processor may shorten the offsets.
        state.update(
            padding=None,
            truncation=None,
            post_processor=None,
        )
        self.state = json.dumps(
            state,
            sort_keys=True,
            ensure_ascii=True,
        )
        self.special_tokenizer = Tokenizer.from_str(self.state)
        self.plain_tokenizer = Tokenizer.from_str(self.state)
        self.plain_tokenizer.encode_special_tokens = True
        added_tokens = self.special_tokenizer.get_added_tokens_decoder()
        special = {token_id: token for token_id, token in added_tokens.items() if token.special}
        self.special_tokens: dict[str, int] = {token.content: token_id for token_id, token in special.items()}
        longest_first = sorted(
            self.special_tokens,
            key=len,
            reverse=True,
        )
        self.special_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        self.pad: int = tokenizer.pad_token_id
        if tokenizer.pad_token_id is None:
            self.pad = self.eos or 0
        self.control_ids = frozenset(self.special_tokens.values())
        unknown = tokenizer.unk_token_id
        if unknown != self.eos:
            self.control_ids -= {unknown}
        # Tokens that match in the *normalized* text may be hidden from a search in the text itself.
        is_normalized = any(token.normalized for token in special.values())
        self.may_hide_special_tokens = is_normalized and self.special_tokenizer.normalizer is not None
        self._adds_prefix_space = self._detect_prefix_space()

    def _detect_prefix_space(self) -> bool:
        """Returns whether the tokenizer puts a space before every text, as those of SentencePiece do."""
        with _describe_panics():
            alone = self.plain_tokenizer.encode("x", add_special_tokens=False)
            after = self.plain_tokenizer.encode("\nx", add_special_tokens=False)
        return alone.ids != after.ids[-len(alone.ids) :]

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of texts in which control tokens are plain characters."""
        with _describe_panics():
            encodings = self.plain_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_special_tokens(self, texts: Sequence[str]) -> list[Encoding]:
        """Returns the encodings, with offsets, of texts in which control tokens are control tokens."""
        with _describe_panics():
            return self.special_tokenizer.encode_batch(list(texts), add_special_tokens=False)

    def encode_continuation(self, text: str) -> list[int]:
        """Returns the plain ids of a text that follows other ids: without a space that the text does not have."""
        if not text:
            return []
        if self._adds_prefix_space:
            with _describe_panics():
                encoding = self.plain_tokenizer.encode("\n" + text, add_special_tokens=False)
            first = encoding.char_to_token(1)
            if first is not None and token_start(encoding, first) == 1:
                return encoding.ids[first:]
        return self.encode_plain([text])[0]

    def decode(
        self,
        ids: Sequence[int],
        special_tokens: bool,
    ) -> str:
        """Returns the text of ids, with control tokens only if `special_tokens`."""
        text: str = self.tokenizer.decode(
            list(ids),
            skip_special_tokens=not special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return text

    def id_to_token(self, token_id: int) -> str:
        """Returns the vocabulary's text of a token."""
        token: str = self.tokenizer.convert_ids_to_tokens(token_id)
        return token


def default_chat_template(tokenizer: Any) -> str | None:
    """Returns the template that `apply_chat_template` uses (the default one of several), or None without a template.
    Raises UserError if there are several and none is the default."""
    if not tokenizer.chat_template:
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise UserError(f"the base's tokenizer has several chat templates and no default one: {error}") from error


def token_start(encoding: Encoding, token: int) -> int | None:
    """Returns the index of the first character of a token."""
    chars = encoding.token_to_chars(token)
    return None if chars is None else chars[0]

"""Files beside the weights of a saved model: tokenizer, generation config."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lowrank_tune.model.base import Base

MACHINE_SPECIFIC_KEYS = {
    "name_or_path",
    "special_tokens_map_file",
    "tokenizer_file",
    "is_local",
    "local_files_only",
}
"""Entries of a tokenizer's configuration that depend on where it was loaded from."""


def serialize_tokenizer(tokenizer: Any, template: str) -> dict[str, bytes]:
    """Returns the tokenizer's files by name, with this chat template as the default one, and without the folder that it
    was loaded from."""
    before = tokenizer.chat_template
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.chat_template = {**before, "default": template} if isinstance(before, dict) else template
            tokenizer.save_pretrained(folder)
        finally:
            tokenizer.chat_template = before
        files = {}
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                files[str(path.relative_to(folder))] = path.read_bytes()
    config = json.loads(files["tokenizer_config.json"])
    for key in MACHINE_SPECIFIC_KEYS:
        config.pop(key, None)
    files["tokenizer_config.json"] = json.dumps(
        config,
        indent=2,
        ensure_ascii=False,
    ).encode()
    return files


def token_strings(tokenizer: Any, token_ids: Iterable[int]) -> list[str]:
    """Returns tokens as the vocabulary writes them."""
    return [str(tokenizer.convert_ids_to_tokens(token_id)) for token_id in token_ids]


def generation_config(
    base: Base,
    eos_token_ids: frozenset[int],
    pad_token_id: int,
) -> dict[str, Any]:
    """Returns the base's own generation config with every token that ends an answer: the end tokens of the base and
    those of the chat template."""
    config = {}
    if base.model.generation_config is not None:
        config = base.model.generation_config.to_diff_dict()
    public_config = {key: value for key, value in config.items() if not key.startswith("_")}
    return {
        **public_config,
        "eos_token_id": sorted(eos_token_ids),
        "pad_token_id": pad_token_id,
    }

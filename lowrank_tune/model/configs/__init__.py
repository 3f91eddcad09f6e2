"""The `config.json` of every base that the presets name, so that what depends on shapes alone needs no network, and no
torch to be found.

A file is named as the hub's own cache would: `Qwen/Qwen2.5-7B-Instruct` is `Qwen--Qwen2.5-7B-Instruct.json`. It holds
what decides the shape of every tensor, and the end tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
SAME_CONFIG = {
    **{f"Qwen/Qwen2.5-{size}B": f"Qwen/Qwen2.5-{size}B-Instruct" for size in ("0.5", "1.5", "3", "7", "14", "32")},
    **{f"Qwen/Qwen3-{size}B-Base": f"Qwen/Qwen3-{size}B" for size in ("0.6", "1.7", "4", "8", "14")},
    **{f"meta-llama/Llama-{size}B": f"meta-llama/Llama-{size}B-Instruct" for size in ("3.1-8", "3.2-1", "3.2-3")},
    "mistralai/Mistral-7B-v0.3": "mistralai/Mistral-7B-Instruct-v0.3",
}
"""Models with the same tensors as one that is here. Their end token and their longest position may differ."""


def file_of(model: str) -> Path | None:
    """The `config.json` of a hub id, or of a sibling with the same tensors, whatever its revision; None where it is not
    here."""
    name = model.partition("@")[0]
    file = FOLDER / f"{SAME_CONFIG.get(name, name).replace('/', '--')}.json"
    if name.count("/") == 1 and file.is_file():
        return file
    return None


def config_of(model: str) -> dict[str, Any] | None:
    """The same as plain data, which `AutoConfig.for_model(**config)` takes."""
    file = file_of(model)
    return None if file is None else json.loads(file.read_text(encoding="utf-8"))

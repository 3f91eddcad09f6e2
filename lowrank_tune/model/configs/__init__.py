"""The `config.json` of every base that the presets name, so that what depends on shapes alone needs no network, and no
torch to be found.

A file is named as the hub's own cache would: `Qwen/Qwen2.5-7B-Instruct` is `Qwen--Qwen2.5-7B-Instruct.json`. It holds
what decides the shape of every tensor, and the end tokens. Of a multimodal checkpoint it is the configuration of the
text model, which alone is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
SAME_CONFIG = {
    **{f"Qwen/Qwen2.5-{size}B": f"Qwen/Qwen2.5-{size}B-Instruct" for size in ("0.5", "1.5", "3", "7", "14", "32")},
    **{f"Qwen/Qwen3-{size}B-Base": f"Qwen/Qwen3-{size}B" for size in ("0.6", "1.7", "4", "8", "14")},
    **{f"Qwen/Qwen3-4B-{kind}-2507": "Qwen/Qwen3-4B" for kind in ("Instruct", "Thinking")},
    **{f"Qwen/Qwen3.5-{size}B-Base": f"Qwen/Qwen3.5-{size}B" for size in ("4", "9")},
    **{f"meta-llama/Llama-{size}B": f"meta-llama/Llama-{size}B-Instruct" for size in ("3.1-8", "3.2-1", "3.2-3")},
    "mistralai/Mistral-7B-v0.3": "mistralai/Mistral-7B-Instruct-v0.3",
    "mistralai/Ministral-3-8B-Base-2512": "mistralai/Ministral-3-8B-Instruct-2512-BF16",
    "google/gemma-4-E4B": "google/gemma-4-E4B-it",
    "HuggingFaceTB/SmolLM3-3B-Base": "HuggingFaceTB/SmolLM3-3B",
    "ibm-granite/granite-4.0-micro-base": "ibm-granite/granite-4.0-micro",
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

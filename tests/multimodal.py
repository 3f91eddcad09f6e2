"""Tiny random multimodal checkpoints, whose text model is trained alone."""

from __future__ import annotations

import copy
import functools
import tempfile
from typing import Any

import torch
from models import SMALL_CONFIG
from transformers import AutoConfig, AutoModelForImageTextToText

_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
}
WINDOWS = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_5": {
        "text_config": SMALL_CONFIG
        | {
            "num_hidden_layers": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "depth": 1,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 4,
            "num_position_embeddings": 16,
        },
        "image_token_id": 90,
        "video_token_id": 91,
        "vision_start_token_id": 92,
        "vision_end_token_id": 93,
    },
    "gemma3": {
        "text_config": SMALL_CONFIG | WINDOWS | {"query_pre_attn_scalar": 16, "tie_word_embeddings": True},
        "vision_config": VISION | {"image_size": 16},
        "mm_tokens_per_image": 4,
        "image_token_index": 90,
        "boi_token_index": 91,
        "eoi_token_index": 92,
    },
    "gemma4": {
        "text_config": SMALL_CONFIG
        | WINDOWS
        | {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 16, "tie_word_embeddings": True},
        "vision_config": VISION | {"num_key_value_heads": 2, "head_dim": 16},
        "audio_config": None,
        "image_token_id": 90,
        "video_token_id": 91,
        "audio_token_id": 92,
        "boi_token_id": 93,
        "eoi_token_id": 94,
        "boa_token_id": 95,
        "eoa_token_index": 96,
    },
    "mistral3": {
        "text_config": SMALL_CONFIG | {"model_type": "ministral3"},
        "vision_config": VISION | {"model_type": "pixtral", "image_size": 16, "head_dim": 16},
        "image_token_index": 90,
        "tie_word_embeddings": False,
    },
}


def random_multimodal_model(kind: str, **text_changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = copy.deepcopy(CONFIGS[kind])
    sizes["text_config"] |= text_changes
    config = AutoConfig.for_model(kind, **sizes)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model.eval()


@functools.cache
def saved_multimodal_model(kind: str) -> str:
    """Returns the folder of a saved random model, which exists until the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="lt-multimodal-")
    _FOLDERS.append(folder)
    random_multimodal_model(kind).save_pretrained(folder.name)
    return folder.name

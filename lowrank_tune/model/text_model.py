"""The text model of a multimodal checkpoint.

Only the text model is loaded and trained. Its modules are `model.layers...`; in the class that serves the whole
checkpoint they are `model.language_model.layers...`. Adapters are saved with the names of the serving class, and read
with either.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lowrank_tune.model.adapter_options import LORA_A
from lowrank_tune.model.adapter_options import PREFIX as PEFT_PREFIX
from lowrank_tune.model.module_patterns import value_by_name

TEXT_PREFIX = "model."
SERVING_PREFIX = "model.language_model."
"""Beginning of the names of the text model's modules in the class that serves the checkpoint."""
KEY_MAPPING = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(model\.language_model|language_model\.model)\.": TEXT_PREFIX,
}
"""Regular expressions of the names of stored weights -> the names in the text model, as `from_pretrained` takes them.
Checkpoints before transformers 5 have the second form."""
INHERITED = ("quantization_config", "_commit_hash", "_name_or_path", "tie_word_embeddings")
"""Attributes that a checkpoint's configuration has for all its models."""

RenamedAdapter = tuple[dict[str, Any], dict[str, Tensor]]
"""The content of `adapter_config.json`, and the tensors under PEFT's names."""


def text_config(config: Any) -> Any:
    """Returns the configuration of a checkpoint's text model: the same if it is not multimodal. Raises ValueError if
    transformers has no causal model for it."""
    text = config.get_text_config()
    if text is config:
        return config
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{config.model_type} models have no text model of their own in transformers")
    text.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(text)].__name__]
    for name in INHERITED:
        if getattr(config, name, None) is not None:
            setattr(text, name, getattr(config, name))
    return text


def is_multimodal(config: Any) -> bool:
    """Returns whether a checkpoint's configuration contains that of its text model."""
    return config.get_text_config() is not config


def text_name(name: str) -> str:
    """Returns the name in the text model of a stored weight or a module."""
    for pattern, replacement in KEY_MAPPING.items():
        name = re.sub(pattern, replacement, name)
    return name


def serving_name(name: str) -> str:
    """Returns the name in the serving class of a module of the text model."""
    if name.startswith(TEXT_PREFIX):
        return SERVING_PREFIX + name.removeprefix(TEXT_PREFIX)
    return name


def has_serving_names(tensors: Mapping[str, Tensor]) -> bool:
    """Returns whether the tensors of an adapter have names of the serving class."""
    return any(text_name(name) != name for name in map(_plain_name, tensors))


def serving_adapter(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> RenamedAdapter:
    """Returns an adapter of the text model for the serving class. Its `target_modules` name no module of the other
    models, such as a vision tower's `q_proj`."""
    return _renamed(config, tensors, serving_name)


def text_adapter(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> RenamedAdapter:
    """Returns an adapter of the serving class for the text model."""
    return _renamed(config, tensors, text_name)


def _renamed(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    rename: Callable[[str], str],
) -> RenamedAdapter:
    modules = [_plain_name(key).removesuffix(LORA_A) for key in tensors if key.endswith(LORA_A)]
    renamed = dict(config)
    renamed["target_modules"] = sorted(map(rename, modules))
    for key in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        renamed[key] = None
    for key, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        values = value_by_name(key, config.get(key), modules)
        if len(values) == len(modules) and len(set(values.values())) == 1:
            renamed[default] = values.popitem()[1]
            values = {}
        renamed[key] = {f"^{re.escape(rename(module))}": value for module, value in values.items()}
    return renamed, {PEFT_PREFIX + rename(_plain_name(key)): tensor for key, tensor in tensors.items()}


def _plain_name(key: str) -> str:
    return key.removeprefix(PEFT_PREFIX)

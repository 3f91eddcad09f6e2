"""A base's configuration: parsed, and compared with the files of the weights, before memory is allocated.

`arguments` are those of `from_pretrained`: `revision` and `trust_remote_code`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.initialization import no_init_weights

from lowrank_tune.model.config_limits import sizes_of
from lowrank_tune.model.weight_files import num_stored_weights, published_files

LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    SafetensorError,
)
"""What the libraries raise for files that are missing or broken."""
MAX_SURPLUS = 2
"""Times as many weights as its files contain, that a configuration may describe: a tied head is stored once."""


def parse_config(path_or_id: str, arguments: Mapping[str, Any]) -> Any:
    """Returns the configuration of a repository or folder. Raises one of `LOAD_ERRORS`."""
    try:
        return AutoConfig.from_pretrained(path_or_id, **arguments)
    except LOAD_ERRORS:
        raise
    # The classes of the configurations check their values in several ways.
    except Exception as error:
        raise ValueError(f"its config.json is not valid: {describe_error(error)}") from error


def build_on_meta(config: Any, arguments: Mapping[str, Any]) -> Any:
    """Returns the model that a configuration describes, without weights. Raises one of `LOAD_ERRORS`."""
    try:
        with torch.device("meta"), no_init_weights():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=arguments["trust_remote_code"])
    except LOAD_ERRORS:
        raise
    # Values that do not fit together are found by the code of each model, in its own way.
    except Exception as error:
        raise ValueError(f"no model can be built from its config.json: {describe_error(error)}") from error


def check_generation_config(path_or_id: str, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for a `generation_config.json` that cannot be read, which transformers reads last."""
    try:
        GenerationConfig.from_pretrained(path_or_id, revision=arguments["revision"])
    # The file may be missing.
    except OSError:
        return
    except Exception as error:
        raise ValueError(f"its generation_config.json is not valid: {describe_error(error)}") from error


def check_stored_weights(
    path_or_id: str,
    config: Any,
    arguments: Mapping[str, Any],
) -> None:
    """Raises ValueError if a configuration describes far more weights than the files contain, because transformers
    allocates what it describes."""
    revision = arguments["revision"] or getattr(config, "_commit_hash", None)
    files = set(published_files(path_or_id, revision).values())
    if not files:
        return
    stored = num_stored_weights(files)
    described = num_weights(build_on_meta(config, arguments))
    if described > MAX_SURPLUS * stored:
        raise ValueError(
            f"its config.json describes {described:,} weights ({sizes_of(config.to_dict())}), and its files contain "
            f"{stored:,}: use the config.json that belongs to the weights"
        )


def num_weights(model: nn.Module) -> int:
    """Returns the number of a model's weights, a tied head counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def describe_error(error: Exception) -> str:
    """Returns the type of an error and its message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"

"""Files of a saved adapter that ask for absurd memory or contain values that cannot be used: refused when read."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lowrank_tune.errors import UserError
from lowrank_tune.model.adapters import CONFIG, ROPE, STACK, WEIGHTS, adapter_rope_factors, read_adapter, read_stack

GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
UP = "base_model.model.model.layers.0.mlp.up_proj"
DEEP = b'{"a":' * 100_000


def tensors_of(query: int = 4, up: int = 4) -> dict[str, Tensor]:
    return {
        f"{QUERY}.lora_A.weight": torch.zeros(query, 8),
        f"{QUERY}.lora_B.weight": torch.zeros(8, query),
        f"{UP}.lora_A.weight": torch.zeros(up, 8),
        f"{UP}.lora_B.weight": torch.zeros(8, up),
    }


def write_adapter(
    folder: Path,
    options: dict[str, Any] | bytes,
    tensors: dict[str, Tensor] | bytes | None = None,
) -> str:
    folder.mkdir()
    raw = options if isinstance(options, bytes) else json.dumps(GOOD | options).encode()
    (folder / CONFIG).write_bytes(raw)
    if isinstance(tensors, bytes):
        (folder / WEIGHTS).write_bytes(tensors)
    else:
        save_file(tensors or tensors_of(), folder / WEIGHTS)
    return str(folder)


REFUSED: dict[str, tuple[dict[str, Any] | bytes, dict[str, Tensor] | bytes | None, str]] = {
    "rank": ({"r": 10**9}, None, "r gives model.layers.0.mlp.up_proj rank 1000000000, and its tensor has rank 4"),
    "rank of a pattern": (
        {"rank_pattern": {"q_proj": 10**9}},
        None,
        "rank_pattern gives model.layers.0.self_attn.q_proj rank 1000000000, and its tensor has rank 4",
    ),
    "rank of a fraction": ({"rank_pattern": {"q_proj": 4.5}}, None, "rank_pattern is {'q_proj': 4.5}"),
    "pattern without end": (
        {"target_modules": "(("},
        None,
        "target_modules '((' is not a regular expression of RE2",
    ),
    "layers": ({"layers_to_transform": "x"}, None, "layers_to_transform is 'x'"),
    "a layer": ({"layers_to_transform": [-1]}, None, "layers_to_transform is [-1]"),
    "pattern of layers": ({"layers_pattern": "x"}, None, "`layers_to_transform` must also be specified"),
    "layer replication": ({"layer_replication": [[0, 10**8]]}, None, "uses layer_replication"),
    "an option of PEFT": ({"eva_config": 7}, None, "`EvaConfig` must be"),
    "depth": (DEEP, None, "nested deeper than 100 levels"),
    "depth of an option": ({"loftq_config": json.loads("[" * 200 + "]" * 200)}, None, "nested deeper than 100 levels"),
    "header": ({}, struct.pack("<Q", 1 << 60) + b"{}", "header too large"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_of_an_adapter_are_refused_with_key_and_reason(case: str, tmp_path: Path) -> None:
    options, tensors, message = REFUSED[case]
    folder = write_adapter(tmp_path / "sft", options, tensors)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_adapter(folder, "adapters.sft.path")
    assert str(caught.value).startswith("adapters.sft.path: ") and folder in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tensors_that_are_not_finite_are_refused_by_name(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of().items()}
    row = torch.zeros(4, 8)
    row[1, 2] = value
    tensors[f"{UP}.lora_A.weight"] = row.to(dtype)
    folder = write_adapter(tmp_path / "sft", {}, tensors)
    with pytest.raises(
        UserError, match=f"^adapters.sft.path: .*{WEIGHTS}: {UP}.lora_A.weight contains NaN or infinity"
    ):
        read_adapter(folder, "adapters.sft.path")


def test_ranks_of_patterns_load_and_an_unused_rank_allocates_nothing(tmp_path: Path) -> None:
    """PEFT allocates the default rank also for modules of the base that have no tensors."""
    options = {"r": 10**9, "rank_pattern": {"q_proj": 2, r"mlp\.(up|gate)_proj": 4}}
    saved = read_adapter(write_adapter(tmp_path / "all", options, tensors_of(query=2)), "key")
    assert saved.config.r == 4 and saved.config.rank_pattern == options["rank_pattern"]
    some = read_adapter(write_adapter(tmp_path / "some", {"rank_pattern": {"q_proj": 2}}, tensors_of(query=2)), "key")
    assert some.config.r == 4


def test_deeply_nested_files_beside_an_adapter_are_refused(tmp_path: Path) -> None:
    folder = Path(write_adapter(tmp_path / "sft", {}))
    (folder / STACK).write_bytes(DEEP)
    with pytest.raises(UserError, match=f"{STACK} is broken: .*nested deeper than 100 levels"):
        read_stack(folder, "key")
    (folder / ROPE).write_bytes(DEEP)
    with pytest.raises(UserError, match=f"{ROPE} is broken: .*nested deeper than 100 levels"):
        adapter_rope_factors(str(folder))

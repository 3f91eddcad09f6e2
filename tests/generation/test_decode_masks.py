"""The masks of a GPU's decoding steps: the same completions as with boolean masks, and no mask that transformers
inspects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import perturb, relative_error, roles_over, unquantized_base
from torch import Tensor
from transformers import masking_utils

from lowrank_tune.generation import Engine, decode_masks
from lowrank_tune.generation.decode_masks import (
    additive_mask,
    aligned_mask,
    boolean_mask,
    reads_masks_back,
    uses_additive_mask,
)
from lowrank_tune.generation.outputs import Completion
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.generation.slot_cache import layer_windows
from lowrank_tune.model.roles import Roles

PROMPTS = [[5, 9, 12, 7, 8, 3, 21, 30, 4], [4, 6], [11, 13, 17]]
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {"sliding_window": 8}),
    ("gemma3_text", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
]


def completions(roles: Roles) -> list[Completion]:
    sampling = SamplingParams(14, frozenset(), temperature=1.0, seed=3)
    found = list(Engine(roles, "policy").generate(PROMPTS, 2, sampling))
    return sorted(found, key=lambda completion: (completion.prompt, completion.sample))


def test_only_a_gpu_with_sdpa_gets_an_additive_mask() -> None:
    for name in ("sdpa", "lowrank_tune_grouped_sdpa", "lowrank_tune_one_query"):
        assert uses_additive_mask(torch.device("cuda"), name)
    assert not uses_additive_mask(torch.device("cpu"), "sdpa")
    assert not uses_additive_mask(torch.device("cuda"), "eager")


def test_rows_of_an_additive_mask_are_aligned() -> None:
    position_ids = torch.tensor([[3], [12], [0]])
    mask = aligned_mask(torch.bfloat16, 13, position_ids)
    assert mask.shape == (3, 1, 1, 13) and mask.dtype == torch.bfloat16
    assert mask.stride(0) == 16 and mask.stride(3) == 1
    assert torch.equal(mask[:, 0, 0] == 0, boolean_mask(13, position_ids))
    assert torch.equal(mask[:, 0, 0] == -torch.inf, ~boolean_mask(13, position_ids))


@pytest.mark.parametrize(
    ("windows", "positions", "needed"),
    [
        ([None, None], [7], False),
        ([None, None], [7, 7], False),
        ([None, None], [7, 6], True),
        ([9, 9], [7], False),
        ([8, None], [7], True),
    ],
)
def test_rows_that_see_all_columns_need_no_mask(windows: list[int | None], positions: list[int], needed: bool) -> None:
    """A window of 8 is full at position 7: from there on transformers would create a mask by itself."""
    width = max(positions) + 1
    is_full = len(set(positions)) == 1
    mask = additive_mask(torch.float32, windows, False, width, torch.tensor(positions)[:, None], is_full)
    assert (mask is not None) == needed


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        *((kind, changes, False) for kind, changes in KINDS),
        # Two windows, and a decoder that makes the masks of its layers from a 2-D one.
        ("gemma2", {"sliding_window": 8}, True),
    ],
)
def test_steps_whose_masks_are_read_back_cannot_be_captured(
    kind: str, changes: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = unquantized_base(kind, **changes).model
    windows = layer_windows(model.config)
    assert reads_masks_back(model, windows), "on the CPU"
    monkeypatch.setattr(decode_masks, "uses_additive_mask", lambda device, attention: True)
    assert reads_masks_back(model, windows) == expected


@pytest.mark.parametrize(("kind", "changes"), KINDS, ids=[kind for kind, _ in KINDS])
def test_additive_masks_draw_the_same_completions(
    kind: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = roles_over(unquantized_base(kind, **changes))
    perturb(roles, "policy")
    expected = completions(roles)
    kinds: set[str] = set()
    inspected: list[Tensor] = []
    original_fast_all = masking_utils.fast_all

    def fast_all(mask: Tensor) -> Tensor:
        inspected.append(mask)
        return original_fast_all(mask)

    def recorded(*arguments: Any) -> Any:
        mask = additive_mask(*arguments)
        kinds.add(type(mask).__name__)
        return mask

    monkeypatch.setattr(masking_utils, "fast_all", fast_all)
    monkeypatch.setattr(decode_masks, "uses_additive_mask", lambda device, attention: True)
    monkeypatch.setattr(decode_masks, "additive_mask", recorded)
    found = completions(roles)
    assert ("dict" if kind in ("gemma3_text", "qwen2") else "Tensor") in kinds
    assert inspected == [], "transformers reads a mask"
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert relative_error(torch.tensor(one.logps), torch.tensor(other.logps)) < 1e-5


def test_a_boolean_mask_is_inspected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count of the test above finds the masks of a model with sliding windows on the CPU."""
    inspected: list[int] = []
    original_fast_all = masking_utils.fast_all

    def fast_all(mask: Tensor) -> Tensor:
        inspected.append(mask.ndim)
        return original_fast_all(mask)

    roles = roles_over(unquantized_base("mistral", sliding_window=30))
    monkeypatch.setattr(masking_utils, "fast_all", fast_all)
    completions(roles)
    assert inspected

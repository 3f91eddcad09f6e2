"""What tests of decoding share: roles, prompts of other lengths, and equality of completions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from models import llama_roles, perturb

from lowrank_tune.generation.outputs import Completion
from lowrank_tune.model.roles import Roles

Completions = dict[tuple[int, int], Completion]
"""Completions by the numbers of their prompt and sample."""


def stacked_llama_roles() -> Iterator[Roles]:
    """Yields roles in NF4 whose policy is on top of an SFT adapter; the adapters are unloaded afterwards."""
    roles = llama_roles(4, lower=["sft"])
    perturb(roles, "policy", "sft")
    yield roles
    roles.unload_adapters()


def ragged_prompts(lengths: list[int]) -> list[list[int]]:
    """Returns a prompt of each length."""
    return [[(7 * row + column) % 50 + 1 for column in range(length)] for row, length in enumerate(lengths)]


def by_sample(completions: Iterator[Completion]) -> Completions:
    return {(one.prompt, one.sample): one for one in completions}


def assert_equal_completions(found: Completions, expected: Completions, tolerance: float = 1e-5) -> None:
    """Asserts equal tokens and ends, and log-probs within the tolerance."""
    assert found.keys() == expected.keys()
    for key, one in expected.items():
        assert (found[key].token_ids, found[key].finish_reason) == (one.token_ids, one.finish_reason)
        assert found[key].logps == pytest.approx(one.logps, abs=tolerance)

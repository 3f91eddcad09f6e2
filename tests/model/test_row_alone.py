"""The log-probs of a row do not depend on the other rows of its batch. So an optimizer step has one loss and one
gradient at any micro-batch size, and the log-probs of a rollout are those of the policy."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
from models import (
    DYNAMIC,
    LONGROPE,
    VOCAB,
    gradients,
    make_batch,
    perturb,
    relative_error,
    roles_over,
    sft_over,
    unquantized_base,
    with_token_weights,
    zero_grad,
)
from torch import Tensor

from lowrank_tune.generation import Engine
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model.roles import Roles
from lowrank_tune.model.rotary import RopeFactors

LENGTHS = (12, 5, 24, 9)
"""Below and above the original length of the longrope base, 16."""


class Family(NamedTuple):
    """An architecture, how its configuration differs, the set of longrope's factors, and the lengths of its rows."""

    kind: str
    changes: dict[str, Any] = {}
    factors: RopeFactors = "short"
    lengths: tuple[int, ...] = LENGTHS


LAYERED = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": LONGROPE["rope_parameters"] | {"original_max_position_embeddings": 16},
    },
}
FAMILIES = {
    "phi3, longrope, long": Family("phi3", LONGROPE, "long"),
    "phi3, longrope, short": Family("phi3", LONGROPE, "short", (12, 5, 16, 9)),
    "gemma3, longrope in some layers": Family("gemma3_text", LAYERED, "long"),
    "llama, dynamic": Family("llama", DYNAMIC),
    "llama": Family("llama"),
    "llama, llama3": Family(
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "qwen3_moe": Family("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "mistral, window": Family("mistral", {"sliding_window": 8}),
    "mixtral": Family("mixtral", {"num_local_experts": 4}),
    "gemma2": Family("gemma2"),
    "gemma3": Family("gemma3_text"),
    "recurrent_gemma": Family("recurrent_gemma"),
    "cohere": Family("cohere"),
    "granite": Family("granite"),
    "phi": Family("phi"),
    "phi3": Family("phi3"),
    "gpt_neox": Family("gpt_neox"),
    "opt": Family("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64}),
    "bloom": Family("bloom", {"n_layer": 2, "n_head": 4}),
    "stablelm": Family("stablelm"),
    "olmo2": Family("olmo2"),
    "smollm3": Family("smollm3"),
    "starcoder2": Family("starcoder2", {"sliding_window": 8}),
    "glm4": Family("glm4"),
}


@functools.cache
def roles_of(name: str) -> Roles:
    """A policy that does something over a random base of a family."""
    family = FAMILIES[name]
    roles = roles_over(unquantized_base(family.kind, rope_factors=family.factors, **family.changes))
    perturb(roles, "policy", size=0.05)
    return roles


def rows_of(name: str) -> list[list[int]]:
    stream = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (length,), generator=stream).tolist() for length in FAMILIES[name].lengths]


def logps_of(roles: Roles, rows: list[list[int]], **padding: Any) -> list[Tensor]:
    """The log-probs of each row's tokens but the first, of all rows in one batch."""
    with roles.inference_mode():
        logps = roles.logps("policy", make_batch(rows, **padding)).logps
    return [logps[i, 1 : len(row)] for i, row in enumerate(rows)]


def largest_difference(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_has_the_same_log_probs_alone_and_in_any_batch(name: str) -> None:
    roles, rows = roles_of(name), rows_of(name)
    alone = [logps_of(roles, [row])[0] for row in rows]
    assert largest_difference(logps_of(roles, rows), alone) < 1e-4
    assert largest_difference(logps_of(roles, rows, more=3, filler=7), alone) < 1e-4
    pair = [rows[1], rows[2]]
    assert largest_difference(logps_of(roles, pair), [alone[1], alone[2]]) < 1e-4
    assert largest_difference([logps_of(roles, [rows[1]])[0]], [alone[1]]) == 0.0, "a call changed the base"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_has_one_loss_and_one_gradient_at_any_micro_batch_size(name: str) -> None:
    roles, rows = roles_of(name), rows_of(name)
    algorithm, steps = sft_over(roles), []
    for size in (4, 2, 1):
        batch = with_token_weights(algorithm, make_batch(rows))
        zero_grad(roles)
        loss = 0.0
        for part in batch.split(size):
            for term in algorithm.compute_losses(part):
                term.loss.backward()
                loss += float(term.loss.detach())
        steps.append((loss, gradients(roles)))
    for loss, gradient in steps[1:]:
        assert loss == pytest.approx(steps[0][0], abs=1e-5)
        assert relative_error(gradient, steps[0][1]) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_the_log_probs_of_a_rollout_are_those_of_the_policy(name: str) -> None:
    roles, (_, prompt, longest, _) = roles_of(name), rows_of(name)
    sampling = SamplingParams(len(longest) - len(prompt), frozenset({1}), 1.0, 5)
    for completion in Engine(roles, "policy", 4).generate([prompt], 2, sampling):
        sampled = torch.tensor(completion.logps)
        (policy,) = logps_of(roles, [prompt + list(completion.token_ids)])
        assert len(sampled) and float((policy[len(prompt) - 1 :] - sampled).abs().max()) < 1e-4

"""Completions by CUDA graphs beside those of single plain steps: greedy tokens, and their log-probs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gpu_proof.factories import make_roles, randomize_b
from gpu_proof.records import Record
from lowrank_tune.batch import Batch
from lowrank_tune.generation import Engine
from lowrank_tune.generation.outputs import Completion
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model.base import Base
from lowrank_tune.model.roles import Roles

NUM_ERRORS = 4
SMALLEST_ERROR = 0.02
"""Two tokens are as likely if their log-probs differ by no more than this number of the largest difference between both
paths, plus a little, in nats: each path has its error in each of the two, and a third path measures them."""


@dataclass(frozen=True)
class EqualitySize:
    """Prompts of `shortest` to `shortest + spread` tokens, in fewer slots than there are prompts."""

    prompts: int = 24
    slots: int = 16
    shortest: int = 40
    spread: int = 200
    new_tokens: int = 64


TINY = EqualitySize(prompts=5, slots=3, shortest=3, spread=20, new_tokens=20)


@dataclass(frozen=True)
class Difference:
    """The first token at which two greedy completions differ: the distance of the log-probs of both tokens in one
    uncached pass over what is before them."""

    prompt: int
    position: int
    logp_distance: float


def compare(base: Base, size: EqualitySize) -> Record:
    """Return the share of tokens before the first difference of each completion, the largest difference of their
    log-probs, and how close the two tokens at each first difference are."""
    roles = make_roles(base, ("policy",), True)
    randomize_b(roles, "policy")
    prompts = make_prompts(size, base.model.config.vocab_size)
    plain = completions(roles, prompts, size, buffered=False)
    fast = completions(roles, prompts, size, buffered=True)
    num_equal = 0
    largest = 0.0
    for one, other in zip(plain, fast, strict=True):
        equal = num_equal_tokens(one, other)
        num_equal += equal
        assert one.logps is not None and other.logps is not None, "the engine keeps log-probs"
        for a, b in zip(one.logps[:equal], other.logps[:equal], strict=True):
            largest = max(largest, abs(a - b))
    differences = list(first_differences(roles, prompts, plain, fast))
    roles.unload_adapters()
    total = sum(len(one.token_ids) for one in plain)
    return {
        "kind": "decode_equality",
        "base": base.name,
        "tokens": total,
        "replayed_steps": roles.decoding.num_replays,
        "equal_token_share": num_equal / total,
        "largest_logp_difference": largest,
        "first_differences": [vars(difference) for difference in differences],
        "checks": {
            "tokens differ only where both are as likely": all(
                difference.logp_distance <= NUM_ERRORS * largest + SMALLEST_ERROR for difference in differences
            )
        },
    }


def make_prompts(size: EqualitySize, vocab_size: int) -> list[list[int]]:
    prompts = []
    for row in range(size.prompts):
        length = size.shortest + row * size.spread // size.prompts
        prompts.append([3 + (7 * row + 11 * column) % (vocab_size - 3) for column in range(length)])
    return prompts


def completions(
    roles: Roles,
    prompts: Sequence[Sequence[int]],
    size: EqualitySize,
    buffered: bool,
) -> list[Completion]:
    engine = Engine(roles, "policy", size.slots)
    engine.buffered = buffered
    found = list(engine.generate(prompts, 1, SamplingParams(size.new_tokens, frozenset(), temperature=0.0)))
    return sorted(found, key=lambda completion: completion.prompt)


def num_equal_tokens(one: Completion, other: Completion) -> int:
    """Return the number of tokens before the first difference."""
    for position, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=True)):
        if a != b:
            return position
    return len(one.token_ids)


def first_differences(
    roles: Roles,
    prompts: Sequence[Sequence[int]],
    plain: Sequence[Completion],
    fast: Sequence[Completion],
) -> Iterator[Difference]:
    for one, other in zip(plain, fast, strict=True):
        position = num_equal_tokens(one, other)
        if position < len(one.token_ids):
            before = [*prompts[one.prompt], *one.token_ids[:position]]
            tokens = (one.token_ids[position], other.token_ids[position])
            yield Difference(one.prompt, position, logp_distance(roles, before, tokens))


def logp_distance(roles: Roles, before: Sequence[int], tokens: tuple[int, int]) -> float:
    """Return how much the log-probs of two tokens differ after the same beginning."""
    ids = torch.tensor([[*before, token] for token in tokens])
    mask = torch.ones_like(ids, dtype=torch.bool)
    scored = mask.clone()
    scored[:, :-1] = False
    with roles.inference_mode():
        logps = roles.logps("policy", Batch(ids, mask, scored).to(roles.base.device), 1.0).logps[:, -1]
    return float((logps[0] - logps[1]).abs())

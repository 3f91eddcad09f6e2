"""Expected lengths of completions, from the lengths of those that a run has drawn before.

When a rollout has more sequences than slots, the scheduler starts the longest expected ones first. The order decides
which sequences share a step, and so the rounding of its matrix products: the lengths are in each checkpoint, so that a
resumed run has the order of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_tune.generation.outputs import Completion

KEY_BYTES = 5
"""Bytes of the hash of a prompt. Two prompts with one hash share an expected length, which only changes the order."""


class CompletionLengths:
    """The lengths that a run has seen, in tokens: the mean of all completions, and of the last ones of each prompt."""

    def __init__(self) -> None:
        self.num_completions = 0
        self.num_tokens = 0
        self.by_prompt: dict[str, int] = {}
        """Hash of a prompt -> mean length of the completions that were drawn for it last."""

    def expected(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Returns the expected length of a completion of each prompt. A prompt without completions has the mean of
        all."""
        mean = round(self.num_tokens / max(1, self.num_completions))
        return [self.by_prompt.get(_prompt_key(prompt), mean) for prompt in prompts]

    def record(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Completion],
    ) -> None:
        """Adds the completions of one rollout of these prompts."""
        lengths: dict[str, list[int]] = {}
        keys = [_prompt_key(prompt) for prompt in prompts]
        for completion in completions:
            lengths.setdefault(keys[completion.prompt], []).append(len(completion.token_ids))
        for key, group in lengths.items():
            self.by_prompt[key] = round(sum(group) / len(group))
            self.num_tokens += sum(group)
        self.num_completions += len(completions)

    def state(self) -> dict[str, Any]:
        """Returns the lengths for a checkpoint, as JSON."""
        return {
            "completions": self.num_completions,
            "tokens": self.num_tokens,
            "by_prompt": dict(self.by_prompt),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned; no lengths if an older checkpoint has none."""
        self.num_completions = state.get("completions", 0)
        self.num_tokens = state.get("tokens", 0)
        self.by_prompt = dict(state.get("by_prompt", {}))


def _prompt_key(prompt: Sequence[int]) -> str:
    return hashlib.blake2b(array("q", prompt).tobytes(), digest_size=KEY_BYTES).hexdigest()

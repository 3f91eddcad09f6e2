"""How completions are drawn in training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lowrank_tune.config.base import Fraction, PositiveInt, Settings


class RolloutConfig(Settings):
    """How completions are drawn in training: from the full distribution, without top-k or top-p."""

    num_generations: Annotated[int, Field(ge=1, le=1024)] = 8
    """Completions per prompt, a group; at least 2 for grpo."""
    max_new_tokens: PositiveInt = 256
    """Maximum length of a completion in tokens."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Temperature of sampling, and of all log-probs of the update."""
    max_num_seqs: PositiveInt = 64
    """Maximum number of sequences decoded at once."""
    sync_every: PositiveInt = 8
    """Tokens of each completion that a GPU draws before the host reads them, in held-out answers too. More leave the
    GPU less idle, but what is drawn after the end of a completion is dropped, see the metric
    `completions/wasted_ratio`. Changes no completion, except for rounding."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Launches each decoding step as one CUDA graph, for held-out answers too. `auto`: on a GPU. The first graph is
    compared with the plain step, which is used if they differ. Changes no completion, except for rounding."""
    prefix_caching: bool = False
    """Stores keys and values of a prompt once for all its completions, in held-out answers too, so that more sequences
    fit: on a GPU from compute capability 8.0, with a PyTorch whose variable-length attention has pages. Changes no
    completion, except for rounding."""
    max_reward_failure_rate: Fraction = 0.01
    """Stops the run if the rewards failed on more than this share of its completions, from the third failure on."""

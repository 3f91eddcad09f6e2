"""How completions are drawn on a GPU, for all engines of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

SYNC_EVERY = 8


@dataclass
class DecodingOptions:
    """`sync_every` tokens of each sequence are drawn before the host reads them. `cuda_graphs` is set to False if steps
    cannot be captured, or compute something else when they are, and `few_launches` if the modules of
    `generation/gpu_linears.py` compute something else than the plain ones: they are compared for each stack once.
    With `prefix_caching` the samples of a prompt share its keys and values (`generation/paged_cache.py`). `num_replays`
    counts the steps that ran as graphs."""

    sync_every: int = SYNC_EVERY
    cuda_graphs: bool = True
    prefix_caching: bool = False
    few_launches: bool = True
    compared_stacks: set[tuple[str, ...]] = field(default_factory=set)
    num_replays: int = 0

"""How completions are drawn on a GPU, for all engines of a run."""

from __future__ import annotations

from dataclasses import dataclass

SYNC_EVERY = 8


@dataclass
class DecodingOptions:
    """`sync_every` tokens of each sequence are drawn before the host reads them. `cuda_graphs` is set to False if steps
    cannot be captured, or compute something else when they are."""

    sync_every: int = SYNC_EVERY
    cuda_graphs: bool = True

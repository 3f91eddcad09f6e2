"""What leaves a run: the folder `final/`, and merged models."""

from lowrank_tune.export.folder import final_folder
from lowrank_tune.export.merge import Merged, merge
from lowrank_tune.export.proof import Proof

__all__ = ["Merged", "Proof", "final_folder", "merge"]

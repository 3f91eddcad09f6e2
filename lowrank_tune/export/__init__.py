"""What leaves a run: the folder `final/`, and merged models."""

from lowrank_tune.export.final_adapter import final_folder
from lowrank_tune.export.merge import MergedModel, merge
from lowrank_tune.export.merge_check import MergeReport

__all__ = ["MergedModel", "MergeReport", "final_folder", "merge"]

"""Merged models and other formats of a finished run."""

from lowrank_tune.export.merge import MergedModel, merge
from lowrank_tune.export.merge_check import MergeReport

__all__ = ["MergedModel", "MergeReport", "merge"]

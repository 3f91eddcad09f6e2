"""What leaves a run: the folder `final/`, and merged models."""

from lowrank_tune.export.folder import final_folder

__all__ = ["final_folder"]

"""Completions from a role, on the same quantised weights, adapters unmerged."""

from lowrank_tune.rollout.engine import Engine

__all__ = ["Engine"]

"""Completions from a role, on the same quantized weights; no adapter is ever merged into what is stored (`cpu_linears`
has the scratch)."""

from lowrank_tune.generation.engine import Engine

__all__ = ["Engine"]

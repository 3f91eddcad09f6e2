"""Commands that a cell of a notebook starts with `!`: their terminal shows neither cursor movement nor bars."""

from __future__ import annotations

from collections.abc import Mapping

KERNEL_VARIABLE = "JPY_PARENT_PID"
"""Set by Jupyter for its kernels."""
BACKEND_VARIABLE = "MPLBACKEND"
"""Set by ipykernel, also in front ends that start it themselves."""


def in_cell(environ: Mapping[str, str]) -> bool:
    """Returns whether the output of this process is shown below a cell of a notebook."""
    return KERNEL_VARIABLE in environ or "inline" in environ.get(BACKEND_VARIABLE, "")

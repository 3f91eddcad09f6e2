"""The kernel of a notebook, if this process is one, and its outputs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Output:
    """What a notebook shows: HTML, and a text for a front end without HTML."""

    html: str
    text: str

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html


def in_notebook() -> bool:
    """Returns whether this process is the kernel of a notebook. IPython in a terminal has no kernel."""
    ipython = sys.modules.get("IPython")
    if ipython is None:
        return False
    shell: Any = ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


class OutputSlot:
    """One output below the running cell, in which each new content replaces the one before."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, output: Output) -> None:
        """Shows an output in place of the one before."""
        if self._handle is not None:
            self._handle.update(output)
            return
        # part of IPython, which a kernel has loaded
        display = import_module("IPython.display").display
        self._handle = display(output, display_id=True)

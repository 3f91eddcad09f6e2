"""The line of code that an operation belongs to."""

from __future__ import annotations

import sys
from types import FrameType

KIT = "lowrank_tune/"
LIBRARIES = ("transformers/", "peft/", "bitsandbytes/", "torch/optim/", "torch/nn/utils/")
UNKNOWN = "autograd"
"""The place of an operation that no line of the kit or of a library makes: one of a backward pass."""


def code_place() -> str:
    """Returns `file:line` of the innermost line of the kit, after the line of a library if that one is further in."""
    frame: FrameType | None = sys._getframe(1)
    library = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if f"/{KIT}" in name:
            place = f"{KIT}{name.rpartition(f'/{KIT}')[2]}:{frame.f_lineno}"
            return f"{library} < {place}" if library else place
        if not library:
            library = _library_place(name, frame.f_lineno)
        frame = frame.f_back
    return library or UNKNOWN


def _library_place(name: str, line: int) -> str:
    for library in LIBRARIES:
        if f"site-packages/{library}" in name:
            return f"{name.rpartition('site-packages/')[2]}:{line}"
    return ""

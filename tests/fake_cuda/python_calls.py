"""Counts calls of Python functions, without those of the fake GPU itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

DISPATCH = "__torch_dispatch__"
HERE = str(Path(__file__).parent)
OF_FAKE_TENSORS = (
    "/torch/_library/",
    "/torch/_dynamo/",
    "/torch/_compile.py",
    "/torch/_subclasses/",
    "/torch/compiler/",
    "/weakref.py",
)
"""Files whose functions run only around an operation on fake tensors."""


@dataclass
class CallCounter:
    """The calls until now. `depth` is that of the frames below an operation on fake tensors, which are not counted."""

    calls: int = 0
    depth: int = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Counts an event of `sys.setprofile`."""
        if event == "call":
            if self.depth or frame.f_code.co_name == DISPATCH:
                self.depth += 1
            elif not _belongs_to_fake_gpu(frame.f_code.co_filename):
                self.calls += 1
        elif event == "return" and self.depth:
            self.depth -= 1


def _belongs_to_fake_gpu(file: str) -> bool:
    return file.startswith(HERE) or any(part in file for part in OF_FAKE_TENSORS)


@contextmanager
def counting_calls() -> Iterator[CallCounter]:
    """Yields the counter of the calls in the block."""
    counter = CallCounter()
    before = sys.getprofile()
    sys.setprofile(counter)
    try:
        yield counter
    finally:
        sys.setprofile(before)

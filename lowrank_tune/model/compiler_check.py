"""What `torch.compile` needs from the machine, found without importing torch."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

C_COMPILERS: tuple[str, ...] = ("gcc", "clang")
"""The compilers that Triton looks for, if `CC` is not set."""
CPP_COMPILERS: tuple[str, ...] = ("g++",)
"""The compiler that torch calls on the CPU, if `CXX` is not set."""


def missing_for_compile(device_type: str, environ: Mapping[str, str] = os.environ) -> str:
    """Returns what is missing to compile layers for a device, with what to do, empty if nothing is."""
    if device_type not in ("cpu", "cuda"):
        return f"layers are compiled for CUDA and for the CPU, and not for {device_type}"
    if device_type == "cuda" and find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    variable, commands = "CC", C_COMPILERS
    if device_type == "cpu":
        variable, commands = "CXX", CPP_COMPILERS
    given = environ.get(variable)
    if given:
        commands = tuple(given.split()[:1])
    if not any(shutil.which(command, path=environ.get("PATH")) for command in commands):
        return (
            f"there is no {' or '.join(commands)}: install a compiler (Debian and Ubuntu: apt install build-essential)"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"{header} is missing: install Python's headers (Debian and Ubuntu: apt install python3-dev)"
    return ""

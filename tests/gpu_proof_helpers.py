"""Helpers of the tests of the GPU proof: its modules, and an import filter that hides packages."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"
SCRIPT = FOLDER / "gpu.py"
CARRIED = (
    "bitsandbytes datasets trl dill multiprocess peft transformers pydantic pydantic-core google-re2 annotated-types"
)
OWN = "lowrank_tune gpu gpu_proof sitecustomize usercustomize"

SITECUSTOMIZE = """
import sys
from importlib.machinery import PathFinder
ALLOWED = set({allowed!r}) | set(sys.stdlib_module_names)
find_spec = PathFinder.find_spec
class Filter:
    find_distributions = PathFinder.find_distributions
    invalidate_caches = PathFinder.invalidate_caches
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        return find_spec(name, path, target) if top in ALLOWED or top.startswith("_") else None
sys.meta_path[:] = [Filter if finder is PathFinder else finder for finder in sys.meta_path]
"""


def modules() -> Iterator[ModuleType]:
    """Yield the module `gpu` with its folder importable and one thread, and restore both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        module = importlib.import_module("gpu")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # over such small matrices two threads mostly wait for each other
        yield module
        torch.set_num_threads(threads)


def module(name: str) -> Any:
    """Return a module of `benchmarks/gpu_proof/`, once `modules` has made it importable."""
    return importlib.import_module(f"gpu_proof.{name}")


def closure(names: list[str]) -> set[str]:
    """Return the installed distributions among these, and all that they require as installed here."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.add(name)
        for line in requires:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def filtered_environment(folder: Path, machine: list[str], hidden: tuple[str, ...] = ()) -> dict[str, str]:
    """Return an environment in which Python finds only the standard library, this project and these packages with what
    they require as installed here, without `hidden`."""
    allowed = closure(machine) - set(hidden)
    tops = {top for top, names in packages_distributions().items() if allowed & set(map(canonicalize_name, names))}
    text = SITECUSTOMIZE.format(allowed=sorted(tops | set(OWN.split())))
    (folder / "sitecustomize.py").write_text(text, encoding="utf-8")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "HF_HUB_OFFLINE": "1"}


def proof(*words: str) -> list[str]:
    return [sys.executable, "-u", str(SCRIPT), "proof", "--tiny", *words]

"""What must be imported before torch and transformers: unsloth, which changes them as they are imported.

A recipe is read without torch, so the doors (`lowrank-tune run`, `lowrank_tune.run`) know in time whether it is wanted.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from lowrank_tune.errors import UserError

UNSLOTH = "unsloth"
TOO_LATE = ("transformers", "peft", "trl")
"""What unsloth must come before."""
JUDGED = {"torch", "transformers", "datasets", "trl", "peft", "bitsandbytes"}
"""Packages whose versions decide whether unsloth works here."""
INSTALL = "pip install 'lowrank-tune[unsloth]' -c constraints/unsloth.txt, in an environment of its own"
KEPT = ("TOKENIZERS_PARALLELISM",)
"""What its import writes into the environment and this kit wants as it was."""


def installed() -> str | None:
    """The version of unsloth that is installed."""
    try:
        return metadata.version(UNSLOTH)
    except metadata.PackageNotFoundError:
        return None


def misfits() -> list[str]:
    """What unsloth says it needs and is installed in another version, or not at all: `transformers<=5.17.0 (5.23.0 is
    installed)`."""
    wrong = []
    for line in metadata.requires(UNSLOTH) or ():
        wanted = Requirement(line)
        if wanted.name not in JUDGED or (wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})):
            continue
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name}{wanted.specifier} (not installed)")
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            limits = ",".join(str(one) for one in wanted.specifier if not one.contains(found, prereleases=True))
            wrong.append(f"{wanted.name}{limits} ({found} is installed)")
    return wrong


def import_first(backends: Iterable[str]) -> None:
    """Imports unsloth where one of these is it. Raises UserError where it is not there, does not fit, breaks, or comes
    too late."""
    if UNSLOTH not in backends or UNSLOTH in sys.modules:
        return
    version = installed()
    if version is None:
        raise UserError(f"base.backend: unsloth is not installed: {INSTALL}; or leave base.backend out")
    if wrong := misfits():
        raise UserError(
            f"base.backend: unsloth {version} needs {', '.join(wrong)}: {INSTALL}; or leave base.backend out"
        )
    if there := [name for name in TOO_LATE if name in sys.modules]:
        raise UserError(
            f"base.backend: unsloth must be imported before {there[0]}, which this process has imported already: use "
            "`lowrank-tune run`, or `from lowrank_tune import run` before anything else"
        )
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"  # it would fetch a file from the hub, to be counted
    # else a folder beside the user's files
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(_cache() / "unsloth_compiled"))
    before = {name: os.environ.get(name) for name in KEPT}
    try:
        with redirect_stdout(sys.stderr):  # it greets
            importlib.import_module(UNSLOTH)
    except Exception as error:  # whatever its dozens of patches of other packages run into
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"base.backend: unsloth {version} cannot be imported: {why}; install it again ({INSTALL}), or leave "
            f"base.backend out"
        ) from error
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _cache() -> Path:
    return Path(os.environ.get("LOWRANK_TUNE_CACHE") or Path.home() / ".cache" / "lowrank_tune").expanduser()

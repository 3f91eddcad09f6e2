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
PATCHED_PACKAGES = ("transformers", "peft", "trl")
"""What unsloth must come before."""
CHECKED_PACKAGES = {"torch", "transformers", "datasets", "trl", "peft", "bitsandbytes"}
"""Packages whose versions decide whether unsloth works here."""
INSTALL = "pip install 'lowrank-tune[unsloth]' -c constraints/unsloth.txt, in an environment of its own"
PRESERVED_ENV = ("TOKENIZERS_PARALLELISM",)
"""What its import writes into the environment and this kit wants as it was."""


def installed() -> str | None:
    """The version of unsloth that is installed."""
    try:
        return metadata.version(UNSLOTH)
    except metadata.PackageNotFoundError:
        return None


def incompatible_versions() -> list[str]:
    """What unsloth says it needs and is installed in another version, or not at all: `transformers<=5.17.0 (5.23.0 is
    installed)`."""
    incompatible = []
    for line in metadata.requires(UNSLOTH) or ():
        requirement = Requirement(line)
        if requirement.name not in CHECKED_PACKAGES or (
            requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        ):
            continue
        try:
            installed_version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            incompatible.append(f"{requirement.name}{requirement.specifier} (not installed)")
            continue
        if not requirement.specifier.contains(installed_version, prereleases=True):
            limits = ",".join(
                str(specifier)
                for specifier in requirement.specifier
                if not specifier.contains(installed_version, prereleases=True)
            )
            incompatible.append(f"{requirement.name}{limits} ({installed_version} is installed)")
    return incompatible


def import_unsloth(backends: Iterable[str]) -> None:
    """Imports unsloth where one of these is it. Raises UserError where it is not there, does not fit, breaks, or comes
    too late."""
    if UNSLOTH not in backends or UNSLOTH in sys.modules:
        return
    version = installed()
    if version is None:
        raise UserError(f"base.backend: unsloth is not installed: {INSTALL}; or leave base.backend out")
    if incompatible := incompatible_versions():
        raise UserError(
            f"base.backend: unsloth {version} needs {', '.join(incompatible)}: {INSTALL}; or leave base.backend out"
        )
    if already_imported := [name for name in PATCHED_PACKAGES if name in sys.modules]:
        raise UserError(
            f"base.backend: unsloth must be imported before {already_imported[0]}, which this process has imported "
            "already: use `lowrank-tune run`, or `from lowrank_tune import run` before anything else"
        )
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"  # it would fetch a file from the hub, to be counted
    # else a folder beside the user's files
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(_cache() / "unsloth_compiled"))
    before = {name: os.environ.get(name) for name in PRESERVED_ENV}
    try:
        with redirect_stdout(sys.stderr):  # it greets
            importlib.import_module(UNSLOTH)
    except Exception as error:  # whatever its dozens of patches of other packages run into
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"base.backend: unsloth {version} cannot be imported: {reason}; install it again ({INSTALL}), or leave "
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

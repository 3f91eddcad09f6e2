"""Import of unsloth, which must come before torch and transformers because it patches them.

A recipe is read without torch, so that `lowrank-tune run` and `lowrank_tune.run` can import unsloth first.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from importlib import metadata

from packaging.requirements import Requirement

from lowrank_tune.errors import UserError, first_line
from lowrank_tune.paths import cache_folder

UNSLOTH = "unsloth"
PATCHED_PACKAGES = ("transformers", "peft", "trl")
"""Packages that unsloth must be imported before."""
CHECKED_PACKAGES = {
    "torch",
    "transformers",
    "datasets",
    "trl",
    "peft",
    "bitsandbytes",
}
"""Packages whose installed versions are compared with unsloth's requirements."""
INSTALL = "pip install 'lowrank-tune[unsloth]' -c constraints/unsloth.txt, in an environment of its own"
PRESERVED_ENV = ("TOKENIZERS_PARALLELISM",)
"""Environment variables that the import changes and that are restored after it."""


def installed() -> str | None:
    """Returns the installed version of unsloth, None without it."""
    try:
        return metadata.version(UNSLOTH)
    except metadata.PackageNotFoundError:
        return None


def incompatible_versions() -> list[str]:
    """Returns unsloth's requirements that are not met, for example `transformers<=5.17.0 (5.23.0 is installed)`."""
    incompatible: list[str] = []
    for line in metadata.requires(UNSLOTH) or ():
        requirement = Requirement(line)
        marker = requirement.marker
        applies = marker is None or marker.evaluate({"extra": ""})
        if requirement.name not in CHECKED_PACKAGES or not applies:
            continue
        try:
            installed_version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            incompatible.append(f"{requirement.name}{requirement.specifier} (not installed)")
            continue
        violated: list[str] = []
        for specifier in requirement.specifier:
            if not specifier.contains(installed_version, prereleases=True):
                violated.append(str(specifier))
        if violated:
            incompatible.append(f"{requirement.name}{','.join(violated)} ({installed_version} is installed)")
    return incompatible


def import_unsloth(backends: Iterable[str]) -> None:
    """Imports unsloth if it is one of the backends.

    Raises UserError if it is not installed, not compatible, fails to import, or is imported too late.
    """
    if UNSLOTH not in backends or UNSLOTH in sys.modules:
        return
    version = installed()
    if version is None:
        raise UserError(f"base.backend: unsloth is not installed: {INSTALL}; or leave base.backend out")
    incompatible = incompatible_versions()
    if incompatible:
        raise UserError(
            f"base.backend: unsloth {version} needs {', '.join(incompatible)}: {INSTALL}; or leave base.backend out"
        )
    already_imported = [name for name in PATCHED_PACKAGES if name in sys.modules]
    if already_imported:
        raise UserError(
            f"base.backend: unsloth must be imported before {already_imported[0]}, which this process has imported "
            "already: use `lowrank-tune run`, or `from lowrank_tune import run` before anything else"
        )
    # without this unsloth downloads a file from the Hub to be counted
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    # without this it creates a folder beside the user's files
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_folder() / "unsloth_compiled"))
    before = {name: os.environ.get(name) for name in PRESERVED_ENV}
    try:
        # unsloth prints a banner
        with redirect_stdout(sys.stderr):
            importlib.import_module(UNSLOTH)
    # it patches dozens of places of other packages, so any error is possible
    except Exception as error:
        raise UserError(
            f"base.backend: unsloth {version} cannot be imported: {first_line(error)}; install it again ({INSTALL}), "
            f"or leave base.backend out"
        ) from error
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

"""From the errors of single checks to findings: a path in the recipe, and a message."""

from __future__ import annotations

from collections.abc import Iterator

from lowrank_tune.config import RecipeConfig
from lowrank_tune.config.base import Finding, Path
from lowrank_tune.errors import ConfigError, UserError


def findings_of(error: UserError, path: Path) -> Iterator[Finding]:
    """Yields the findings of an error. A message that begins with a setting (`base.model: ...`) is about that setting,
    any other about `path`."""
    if isinstance(error, ConfigError):
        for problem in error.problems:
            yield _as_path(problem.key) or path, problem.message
        return
    key, colon, message = str(error).partition(": ")
    setting = _as_path(key) if colon else ()
    if setting:
        yield setting, message
    else:
        yield path, str(error)


def _as_path(key: str) -> Path:
    """Returns the path of a dotted setting; empty if the text is not a setting."""
    words = key.split(".")
    if words[0] not in RecipeConfig.model_fields:
        return ()
    if not all(word.isidentifier() or word.isdecimal() for word in words):
        return ()
    return tuple(int(word) if word.isdecimal() else word for word in words)

"""From the errors of single checks to findings: a path in the recipe, and a sentence."""

from __future__ import annotations

from collections.abc import Iterator

from lowrank_tune.config import RecipeConfig
from lowrank_tune.config.base import Finding, Path
from lowrank_tune.errors import ConfigError, UserError


def findings_of(error: UserError, path: Path) -> Iterator[Finding]:
    """The findings that an error stands for. Sentences that begin with a setting (`base.model: ...`), as those of the
    loaders do, are about that one; others about `path`."""
    if isinstance(error, ConfigError):
        for problem in error.problems:
            yield _as_path(problem.key) or path, problem.message
        return
    key, colon, sentence = str(error).partition(": ")
    named = _as_path(key) if colon else ()
    yield (named, sentence) if named else (path, str(error))


def _as_path(key: str) -> Path:
    """The path of a dotted setting; empty where the words are none."""
    words = key.split(".")
    if words[0] not in RecipeConfig.model_fields or not all(word.isidentifier() or word.isdecimal() for word in words):
        return ()
    return tuple(int(word) if word.isdecimal() else word for word in words)

"""`json_schema`: the completion is JSON, and valid under a schema.

Read is the inside of the last closed fence that is marked `json` or not at all, else the whole completion; JSON in the
middle of a sentence does not count. `pattern` is Python's `re.search` and may run for ever, so a worker judges, with a
wall clock; `format` is not checked.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lowrank_tune.errors import UserError
from lowrank_tune.rewards.fences import last_fenced
from lowrank_tune.rewards.judges.json_schema import checked
from lowrank_tune.rewards.pool import alone
from lowrank_tune.rewards.protocol import Item, Reply, Score, Worked, shown

LONGEST = 200_000  # characters of a completion


@dataclass(frozen=True)
class JsonSchema(Worked):
    """pass (1) or fail (0)."""

    name: str
    schema: Any
    judges: ClassVar[bool] = False

    def score(self, items: Sequence[Item]) -> list[Score]:
        return alone(self, items)

    def job(self) -> Mapping[str, Any]:
        return {
            "kind": "verifier",
            "module": "lowrank_tune.rewards.judges.json_schema",
            "schema": self.schema,
            "use": self.name,
        }

    def early(self, item: Item) -> Score | None:
        return Score(0.0, "fail", f"longer than {LONGEST} characters") if len(item.completion) > LONGEST else None

    def ask(self, item: Item) -> Mapping[str, Any]:
        found = last_fenced(item.completion, ("json", ""))
        return {"text": item.completion if found is None else found}

    def judge(self, item: Item, reply: Reply) -> Score:
        if "fault" in reply:
            return self.lost(item, reply["fault"])
        valid = reply["value"]["valid"]
        return Score(1.0, "pass") if valid else Score(0.0, "fail", shown(reply["value"]["why"], 400)[1:-1])

    def overdue(self, item: Item, seconds: float) -> Score:
        return Score(None, "timeout", f"`{self.name}`: the schema was not checked within {seconds:g} s on {item}")

    def lost(self, item: Item, how: str) -> Score:
        return Score(None, "error", f"`{self.name}`: the worker {shown(how, 400)[1:-1]} on {item}")


def read_schema(name: str, written: str | Mapping[str, Any], folder: Path) -> JsonSchema:
    """The reward for a schema as a recipe has it: itself, or a file taken from `folder`. Raises UserError."""
    schema = _from_file((folder / Path(written).expanduser()).resolve()) if isinstance(written, str) else dict(written)
    needs(name, "jsonschema")
    try:
        checked(json.loads(json.dumps(schema)))
    except (ValueError, TypeError) as error:
        raise UserError(f"`json_schema` {error}") from None
    return JsonSchema(name, schema)


def needs(name: str, module: str, package: str = "") -> None:
    """Raises UserError where an optional package of the extra `verifiers` is missing."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"`{name}` needs {package or module}; install it with `pip install 'lowrank-tune[verifiers]'`")


def _from_file(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None

"""`json_schema`: the completion is JSON, and valid under a schema.

Read is the inside of the last closed fence that is marked `json` or not at all, else the whole completion; JSON in the
middle of a sentence does not count. `pattern` is Python's `re.search` and may run for ever, so a worker judges, with a
limit on time; `format` is not checked.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lowrank_tune.errors import UserError
from lowrank_tune.rewards.base import Reply, RewardInput, Score, WorkerReward, truncate_for_display
from lowrank_tune.rewards.code.code_blocks import last_code_block
from lowrank_tune.rewards.text.json_schema_worker import build_validator
from lowrank_tune.rewards.workers.pool import score_serially

MAX_CHARS = 200_000  # characters of a completion


@dataclass(frozen=True)
class JsonSchemaReward(WorkerReward):
    """pass (1) or fail (0)."""

    name: str
    schema: Any
    is_verifier: ClassVar[bool] = False

    def score(self, items: Sequence[RewardInput]) -> list[Score]:
        return score_serially(self, items)

    def worker_spec(self) -> Mapping[str, Any]:
        return {
            "kind": "verifier",
            "module": "lowrank_tune.rewards.text.json_schema_worker",
            "schema": self.schema,
            "use": self.name,
        }

    def score_without_worker(self, item: RewardInput) -> Score | None:
        if len(item.completion) > MAX_CHARS:
            return Score(0.0, "fail", f"longer than {MAX_CHARS} characters")
        return None

    def build_request(self, item: RewardInput) -> Mapping[str, Any]:
        code_block = last_code_block(item.completion, ("json", ""))
        return {"text": item.completion if code_block is None else code_block}

    def reference_request(self, item: RewardInput) -> Mapping[str, Any] | None:
        """A document that every schema is quick with."""
        return {"text": "null"}

    def parse_reply(self, item: RewardInput, reply: Reply) -> Score:
        if "fault" in reply:
            return self.on_worker_crash(item, reply["fault"])
        valid = reply["value"]["valid"]
        if valid:
            return Score(1.0, "pass")
        return Score(0.0, "fail", truncate_for_display(reply["value"]["why"], 400)[1:-1])

    def on_timeout(self, item: RewardInput, seconds: float) -> Score:
        return Score(None, "timeout", f"`{self.name}`: the schema was not checked within {seconds:g} s on {item}")

    def on_worker_crash(self, item: RewardInput, reason: str) -> Score:
        return Score(None, "error", f"`{self.name}`: the worker {truncate_for_display(reason, 400)[1:-1]} on {item}")


def read_schema(name: str, schema_or_path: str | Mapping[str, Any], folder: Path) -> JsonSchemaReward:
    """The reward for a schema as a recipe has it: itself, or a file taken from `folder`. Raises UserError."""
    if isinstance(schema_or_path, str):
        schema = _read_json((folder / Path(schema_or_path).expanduser()).resolve())
    else:
        schema = dict(schema_or_path)
    require_package(name, "jsonschema")
    try:
        build_validator(json.loads(json.dumps(schema)))
    except (ValueError, TypeError) as error:
        raise UserError(f"`json_schema` {error}") from None
    return JsonSchemaReward(name, schema)


def require_package(name: str, module: str, package: str = "") -> None:
    """Raises UserError where an optional package of the extra `verifiers` is missing."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"`{name}` needs {package or module}; install it with `pip install 'lowrank-tune[verifiers]'`")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None

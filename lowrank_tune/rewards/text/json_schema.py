"""`json_schema`: the completion is JSON, and valid under a schema.

Runs in the main process; the other side is `json_schema_worker.py`. The text is the content of the last closed code
fence that is marked `json` or not marked, else the whole completion; JSON in the middle of a sentence does not count.
`pattern` of a schema is Python's `re.search`, which may run for ever, so a worker validates, with a time limit.
`format` is not checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lowrank_tune.errors import UserError
from lowrank_tune.json_files import parse_json
from lowrank_tune.regular_files import read_regular_file
from lowrank_tune.rewards.base import (
    MAX_REASON_CHARS,
    Reply,
    RewardInput,
    Score,
    WorkerReward,
    pass_or_fail,
    require_packages,
    to_printable,
)
from lowrank_tune.rewards.code.code_blocks import last_code_block_or_text
from lowrank_tune.rewards.text.json_schema_worker import build_validator

MAX_SCHEMA_BYTES = 1 << 20
"""The largest file of a schema."""

MAX_CHARS = 200_000  # characters of a completion


@dataclass(frozen=True)
class JsonSchemaReward(WorkerReward):
    """pass (1) or fail (0)."""

    name: str
    schema: Any
    is_verifier: ClassVar[bool] = False
    worker_module: ClassVar[str] = "lowrank_tune.rewards.text.json_schema_worker"

    def worker_spec(self) -> Mapping[str, Any]:
        return {**super().worker_spec(), "schema": self.schema}

    def score_without_worker(self, item: RewardInput) -> Score | None:
        if len(item.completion) > MAX_CHARS:
            return Score(0.0, "fail", f"longer than {MAX_CHARS} characters")
        return None

    def build_request(self, item: RewardInput) -> Mapping[str, Any]:
        return {"text": last_code_block_or_text(item.completion, ("json", ""))}

    def reference_request(self, item: RewardInput) -> Mapping[str, Any] | None:
        """Returns a document that every schema validates quickly."""
        return {"text": "null"}

    def parse_reply(self, item: RewardInput, reply: Reply) -> Score:
        value = reply["value"]
        return pass_or_fail(value["valid"], to_printable(value["why"], MAX_REASON_CHARS))


def read_schema(
    name: str,
    schema_or_path: str | Mapping[str, Any],
    folder: Path,
) -> JsonSchemaReward:
    """Returns the reward for the setting `json_schema`: a schema, or a file relative to `folder`. Raises UserError."""
    if isinstance(schema_or_path, str):
        schema = _read_json((folder / Path(schema_or_path).expanduser()).resolve())
    else:
        schema = dict(schema_or_path)
    require_packages(name, "jsonschema")
    try:
        build_validator(json.loads(json.dumps(schema)))
    except (ValueError, TypeError) as error:
        raise UserError(f"`json_schema` {error}") from None
    return JsonSchemaReward(name, schema)


def _read_json(path: Path) -> Any:
    try:
        return parse_json(read_regular_file(path, MAX_SCHEMA_BYTES).decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None

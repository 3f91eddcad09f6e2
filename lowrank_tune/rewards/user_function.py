"""`./file.py:name`: a user's function as a reward, called as `name(completion, row)`; it returns a number.

Runs in the main process; the other side, `workers/worker.py`, loads the function in each worker process from the text
that the file had at the start of the run. The code is the user's own and trusted.

If the function raises, hangs, ends its process, or returns None or a number that is not finite, there is no score. That
is never counted as 0: by default the run stops and prints the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from lowrank_tune.errors import UserError
from lowrank_tune.regular_files import read_regular_file
from lowrank_tune.rewards.base import Reply, RewardInput, Score, WorkerReward, to_printable

MAX_BYTES = 1 << 20
"""The largest file of a user's function."""


@dataclass(frozen=True)
class UserFunctionReward(WorkerReward):
    """graded: the returned number. `function_path`: the name in the recipe; `path`: the file; `source`: its text;
    `function`: the name in the file."""

    name: str
    function_path: str
    path: Path
    source: str
    function: str
    is_verifier: ClassVar[bool] = True

    def worker_spec(self) -> Mapping[str, Any]:
        return {
            "kind": "own",
            "path": str(self.path),
            "source": self.source,
            "function": self.function,
            "use": self.function_path,
        }

    def parse_reply(self, item: RewardInput, reply: Reply) -> Score:
        return Score(reply["value"], "graded")

    def worker_failure(
        self,
        item: RewardInput,
        verdict: Literal["error", "timeout"],
        reason: str,
    ) -> Score:
        return Score(
            None,
            verdict,
            f"{self.function_path} {to_printable(reason)} on {item}",
        )


def read_user_function(
    name: str,
    function_path: str,
    folder: Path,
) -> UserFunctionReward:
    """Returns the reward for `file.py:function`, with the file relative to `folder`. Raises UserError if the file
    cannot be read; its code is checked when the workers start."""
    file, _, function = function_path.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise UserError(f"`{function_path}` is not a function in a file; write it as `./file.py:function`")
    path = (folder / Path(file).expanduser()).resolve()
    try:
        source = read_regular_file(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return UserFunctionReward(
        name,
        function_path,
        path,
        source,
        function,
    )

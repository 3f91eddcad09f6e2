"""A user's function as a reward: `./file.py:name`, called as `name(completion, row)`, gives a number.

It is the user's own code and trusted. It runs in worker processes, from the text that the file had at the start. Where
it raises, hangs, ends its process or returns no finite number, None too, the run stops and says on which row: a fault
of a reward is never a 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lowrank_tune.errors import UserError
from lowrank_tune.rewards.base import Reply, RewardInput, Score, WorkerReward
from lowrank_tune.rewards.workers.pool import score_serially


@dataclass(frozen=True)
class UserFunctionReward(WorkerReward):
    """`function_path` is what the recipe says, `path` the file, `source` its text, `function` the name in it."""

    name: str
    function_path: str
    path: Path
    source: str
    function: str
    is_verifier: ClassVar[bool] = True

    def score(self, items: Sequence[RewardInput]) -> list[Score]:
        return score_serially(self, items)

    def worker_spec(self) -> Mapping[str, Any]:
        return {
            "kind": "own",
            "path": str(self.path),
            "source": self.source,
            "function": self.function,
            "use": self.function_path,
        }

    def parse_reply(self, item: RewardInput, reply: Reply) -> Score:
        if "fault" in reply:
            return self.on_worker_crash(item, reply["fault"])
        return Score(reply["value"], "graded")

    def on_timeout(self, item: RewardInput, seconds: float) -> Score:
        return Score(None, "timeout", f"{self.function_path} did not return within {seconds:g} s on {item}")

    def on_worker_crash(self, item: RewardInput, reason: str) -> Score:
        reason = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in reason)
        return Score(None, "error", f"{self.function_path} {reason} on {item}")


def is_user_function(name: str) -> bool:
    """Whether a recipe's word means a function in a file."""
    return ":" in name or name.endswith(".py")


def read_user_function(name: str, function_path: str, folder: Path) -> UserFunctionReward:
    """The reward for `file.py:function`, the file taken from `folder`. Its text is checked when the workers start."""
    file, _, function = function_path.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise UserError(f"`{function_path}` is no function in a file; write it as `./file.py:function`")
    path = (folder / Path(file).expanduser()).resolve()
    try:
        return UserFunctionReward(name, function_path, path, path.read_text(encoding="utf-8-sig"), function)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None

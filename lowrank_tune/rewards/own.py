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
from lowrank_tune.rewards.pool import alone
from lowrank_tune.rewards.protocol import Item, Reply, Score, Worked


@dataclass(frozen=True)
class Own(Worked):
    """`use` is what the recipe says, `path` the file, `source` its text, `function` the name in it."""

    name: str
    use: str
    path: Path
    source: str
    function: str
    judges: ClassVar[bool] = True

    def score(self, items: Sequence[Item]) -> list[Score]:
        return alone(self, items)

    def job(self) -> Mapping[str, Any]:
        return {
            "kind": "own",
            "path": str(self.path),
            "source": self.source,
            "function": self.function,
            "use": self.use,
        }

    def judge(self, item: Item, reply: Reply) -> Score:
        return self.lost(item, reply["fault"]) if "fault" in reply else Score(reply["value"], "graded")

    def overdue(self, item: Item, seconds: float) -> Score:
        return Score(None, "timeout", f"{self.use} did not return within {seconds:g} s on {item}")

    def lost(self, item: Item, how: str) -> Score:
        how = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in how)
        return Score(None, "error", f"{self.use} {how} on {item}")


def is_own(use: str) -> bool:
    """Whether a recipe's word means a function in a file."""
    return ":" in use or use.endswith(".py")


def read_own(name: str, use: str, folder: Path) -> Own:
    """The reward for `file.py:function`, the file taken from `folder`. Its text is checked when the workers start."""
    file, _, function = use.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise UserError(f"`{use}` is no function in a file; write it as `./file.py:function`")
    path = (folder / Path(file).expanduser()).resolve()
    try:
        return Own(name, use, path, path.read_text(encoding="utf-8-sig"), function)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None

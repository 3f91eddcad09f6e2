"""`smt`: Z3 decides. Rows hold SMT-LIB 2 in the column `smt`: declarations and assertions. `kind` says what a
completion tells:

- `statement`: `sat` or `unsat` in its last box or its last line; where the row has a `claim`, a formula, `valid` or
  `invalid`: whether the assertions imply it.
- `witness`: a value for each declared name that together meet the assertions: `(define-fun x () Int 5)`, or `x = 5`,
  one a line or between commas. Division by zero is whatever suits, as SMT-LIB has it: rows that divide should forbid
  it.
- `invariant`: a formula over the declared constants, for a row with `init`, `transition` and `property`, where `x!` is
  x after a step (as SyGuS writes it). It must hold at first, be kept by every step, and imply the property. `smt` holds
  declarations alone.

Formulas and definitions are read from the last closed fence (`smt2`, `smt`, `smtlib`, `lisp` or none), else from the
whole completion. Only literals, declared names and known operators reach Z3. Where Z3 cannot tell, there is no score:
an error or a timeout, never a 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lowrank_tune.data.gold import last_boxed
from lowrank_tune.rewards.fences import last_fenced
from lowrank_tune.rewards.pool import alone
from lowrank_tune.rewards.protocol import Item, Reply, Score, Worked, shown

MEGABYTES = 1024
LONGEST = 200_000  # characters of a completion
TAIL = 4000  # characters at its end that may hold a verdict
COLUMNS = {"statement": ("smt",), "witness": ("smt",), "invariant": ("smt", "init", "transition", "property")}
LANGUAGES = ("smt2", "smt", "smtlib", "smt-lib", "lisp", "")
WORD = re.compile(r"\b(not )?(unsat|sat|invalid|valid|unsatisfiable|satisfiable)\b")
NEGATED = {"sat": "unsat", "unsat": "sat", "valid": "invalid", "invalid": "valid"}


@dataclass(frozen=True)
class Smt(Worked):
    """pass (1) or fail (0). A completion that did not stop by itself has not answered."""

    name: str
    kind: Literal["statement", "witness", "invariant"]
    judges: ClassVar[bool] = True

    def score(self, items: Sequence[Item]) -> list[Score]:
        return alone(self, items)

    def job(self) -> Mapping[str, Any]:
        return {
            "kind": "verifier",
            "module": "lowrank_tune.rewards.judges.smt",
            "asks": self.kind,
            "megabytes": MEGABYTES,
            "use": self.name,
        }

    def unusable(self, item: Item) -> str | None:
        for column in COLUMNS[self.kind]:
            if not isinstance(item.row.get(column), str) or not item.row[column].strip():
                return f"the row has no column `{column}`"
        return None

    def early(self, item: Item) -> Score | None:
        if why := self.unusable(item):
            return self._none("error", why, item)
        if not item.stopped:
            return Score(0.0, "fail", "did not stop")
        if len(item.completion) > LONGEST:
            return Score(0.0, "fail", f"longer than {LONGEST} characters")
        if self.kind == "statement" and said(item.completion) is None:
            return Score(0.0, "fail", "says no verdict, or several")
        return None

    def ask(self, item: Item) -> Mapping[str, Any]:
        columns = {name: item.row.get(name) for name in ("smt", "claim", "init", "transition", "property")}
        found = last_fenced(item.completion, LANGUAGES)
        return {**columns, "text": item.completion if found is None else found}

    def judge(self, item: Item, reply: Reply) -> Score:
        if "fault" in reply:
            return self.lost(item, reply["fault"])
        value = reply["value"]
        if "row" in value:
            return self._none("error", f"the row is at fault: {value['row']}", item)
        if "unknown" in value:
            late = value["unknown"] in ("timeout", "canceled")
            return self._none("timeout" if late else "error", f"Z3 cannot tell: {value['unknown']}", item)
        if "status" in value:
            right = said(item.completion) == value["status"]
            return Score(float(right), "pass" if right else "fail", "" if right else f"it is {value['status']}")
        return Score(float(value["right"]), "pass" if value["right"] else "fail", shown(value["why"], 300)[1:-1])

    def overdue(self, item: Item, seconds: float) -> Score:
        return self._none("timeout", f"Z3 was not done within {seconds:g} s", item)

    def lost(self, item: Item, how: str) -> Score:
        return self._none("error", f"the worker {how}", item)

    def _none(self, verdict: Literal["error", "timeout"], why: str, item: Item) -> Score:
        return Score(None, verdict, f"`{self.name}`: {shown(why, 400)[1:-1]}, on {item}")


def said(completion: str) -> str | None:
    """The verdict of a completion: sat, unsat, valid or invalid; None where it says none, or two."""
    tail = completion[-TAIL:]
    piece = last_boxed(tail)
    if piece is None:
        piece = tail.rstrip().rpartition("\n")[2]
    found = set()
    for negated, word in WORD.findall(piece.casefold()):
        word = word.replace("isfiable", "")
        found.add(NEGATED[word] if negated else word)
    return found.pop() if len(found) == 1 else None

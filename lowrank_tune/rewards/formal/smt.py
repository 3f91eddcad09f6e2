"""`smt`: Z3 decides. Rows hold SMT-LIB 2 in the column `smt`: declarations and assertions. `answer_type` is what a
completion contains:

- `statement`: `sat` or `unsat` in its last box or its last line; where the row has a `claim`, a formula, `valid` or
  `invalid`: whether the assertions imply it.
- `witness`: a value for each declared name that together meet the assertions: `(define-fun x () Int 5)`, or `x = 5`,
  one a line or between commas. Division by zero is whatever suits, as SMT-LIB has it: rows that divide should forbid
  it.
- `invariant`: a formula over the declared constants, for a row with `init`, `transition` and `property`, where `x!` is
  x after a step (as SyGuS writes it). It must hold at first, be kept by every step, and imply the property. `smt` holds
  declarations alone.

Formulas and definitions are read from the last closed fence (`smt2`, `smt`, `smtlib`, `lisp` or none), else from the
whole completion. Only literals, declared names and known operators reach Z3. Where Z3 cannot decide a statement, or
gives up before its time is over, there is no score: an error or a timeout, never a 0. A witness or an invariant on
which Z3 takes too long is wrong where it decides the row's own formulas in time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lowrank_tune.data.ground_truth import last_boxed
from lowrank_tune.rewards.base import Reply, RewardInput, Score, WorkerReward, truncate_for_display
from lowrank_tune.rewards.code.code_blocks import last_code_block
from lowrank_tune.rewards.workers.pool import score_serially

MEMORY_MEGABYTES = 1024
MAX_CHARS = 200_000  # characters of a completion
TAIL_CHARS = 4000  # characters at its end that may hold a verdict
COLUMNS = {"statement": ("smt",), "witness": ("smt",), "invariant": ("smt", "init", "transition", "property")}
LANGUAGES = ("smt2", "smt", "smtlib", "smt-lib", "lisp", "")
VERDICT_PATTERN = re.compile(r"\b(not )?(unsat|sat|invalid|valid|unsatisfiable|satisfiable)\b")
OPPOSITE_VERDICT = {"sat": "unsat", "unsat": "sat", "valid": "invalid", "invalid": "valid"}


@dataclass(frozen=True)
class SmtReward(WorkerReward):
    """pass (1) or fail (0). A completion that did not stop by itself has not answered."""

    name: str
    answer_type: Literal["statement", "witness", "invariant"]
    is_verifier: ClassVar[bool] = True

    def score(self, items: Sequence[RewardInput]) -> list[Score]:
        return score_serially(self, items)

    def worker_spec(self) -> Mapping[str, Any]:
        return {
            "kind": "verifier",
            "module": "lowrank_tune.rewards.formal.smt_worker",
            "asks": self.answer_type,
            "megabytes": MEMORY_MEGABYTES,
            "use": self.name,
        }

    def row_rejection_reason(self, item: RewardInput) -> str | None:
        for column in COLUMNS[self.answer_type]:
            if not isinstance(item.row.get(column), str) or not item.row[column].strip():
                return f"the row has no column `{column}`"
        return None

    def score_without_worker(self, item: RewardInput) -> Score | None:
        if reason := self.row_rejection_reason(item):
            return self._no_score("error", reason, item)
        if not item.stopped:
            return Score(0.0, "fail", "did not stop")
        if len(item.completion) > MAX_CHARS:
            return Score(0.0, "fail", f"longer than {MAX_CHARS} characters")
        if self.answer_type == "statement" and claimed_verdict(item.completion) is None:
            return Score(0.0, "fail", "says no verdict, or several")
        return None

    def build_request(self, item: RewardInput) -> Mapping[str, Any]:
        columns = {name: item.row.get(name) for name in ("smt", "claim", "init", "transition", "property")}
        code_block = last_code_block(item.completion, LANGUAGES)
        return {**columns, "text": item.completion if code_block is None else code_block}

    def reference_request(self, item: RewardInput) -> Mapping[str, Any] | None:
        """The row's own formulas. A statement is these and nothing else, so that no completion is at fault."""
        if self.answer_type == "statement":
            return None
        return {**self.build_request(item), "text": None}

    def parse_reply(self, item: RewardInput, reply: Reply) -> Score:
        if "fault" in reply:
            return self.on_worker_crash(item, reply["fault"])
        value = reply["value"]
        if "row" in value:
            return self._no_score("error", f"the row is at fault: {value['row']}", item)
        if "unknown" in value:
            return self._no_score("error", f"Z3 cannot decide: {value['unknown']}", item)
        if "status" in value:
            correct = claimed_verdict(item.completion) == value["status"]
            return Score(float(correct), "pass" if correct else "fail", "" if correct else f"it is {value['status']}")
        return Score(
            float(value["right"]),
            "pass" if value["right"] else "fail",
            truncate_for_display(value["why"], 300)[1:-1],
        )

    def on_timeout(self, item: RewardInput, seconds: float) -> Score:
        return self._no_score("timeout", f"Z3 was not done within {seconds:g} s", item)

    def on_worker_crash(self, item: RewardInput, reason: str) -> Score:
        return self._no_score("error", f"the worker {reason}", item)

    def _no_score(self, verdict: Literal["error", "timeout"], reason: str, item: RewardInput) -> Score:
        return Score(None, verdict, f"`{self.name}`: {truncate_for_display(reason, 400)[1:-1]}, on {item}")


def claimed_verdict(completion: str) -> str | None:
    """The verdict of a completion: sat, unsat, valid or invalid; None where it says none, or two."""
    tail = completion[-TAIL_CHARS:]
    text = last_boxed(tail)
    if text is None:
        text = tail.rstrip().rpartition("\n")[2]
    verdicts = set()
    for negated, word in VERDICT_PATTERN.findall(text.casefold()):
        word = word.replace("isfiable", "")
        verdicts.add(OPPOSITE_VERDICT[word] if negated else word)
    return verdicts.pop() if len(verdicts) == 1 else None

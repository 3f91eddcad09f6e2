"""`smt`: Z3 checks the answer.

Runs in the main process; the other side is `smt_worker.py`. A row has SMT-LIB 2 in the column `smt`: declarations and
assertions. `answer_type` is what a completion contains:

- `statement`: `sat` or `unsat` in its last box or its last line. If the row has a `claim`, a formula, it is `valid` or
  `invalid`: whether the assertions imply the claim.
- `witness`: a value for each declared name, which together satisfy the assertions: `(define-fun x () Int 5)`, or
  `x = 5`, one per line or separated by commas. As in SMT-LIB, a division by zero may have any value, so rows that
  divide should forbid it.
- `invariant`: a formula over the declared constants, for a row with `init`, `transition` and `property`, where `x!` is
  x after a step (the notation of SyGuS). It must hold at first, be kept by every step, and imply the property. `smt`
  has only declarations.

Formulas and definitions are read from the last closed fence (`smt2`, `smt`, `smtlib`, `lisp` or not marked), else from
the whole completion. Only literals, declared names and known operators are passed to Z3. If Z3 cannot decide a
statement, or gives up before its time is over, there is no score. A witness or an invariant for which Z3 takes too long
is wrong if Z3 decides the row's own formulas in time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lowrank_tune.data.ground_truth import last_boxed
from lowrank_tune.rewards.base import (
    MAX_REASON_CHARS,
    Reply,
    RewardInput,
    Score,
    WorkerVerifier,
    pass_or_fail,
    to_printable,
)
from lowrank_tune.rewards.code.code_blocks import last_code_block_or_text

MEMORY_MEGABYTES = 1024
MAX_CHARS = 200_000  # characters of a completion
TAIL_CHARS = 4000  # characters at its end that may contain a verdict
COLUMNS = {
    "statement": ("smt",),
    "witness": ("smt",),
    "invariant": (
        "smt",
        "init",
        "transition",
        "property",
    ),
}
REQUEST_COLUMNS = (
    "smt",
    "claim",
    "init",
    "transition",
    "property",
)
LANGUAGES = (
    "smt2",
    "smt",
    "smtlib",
    "smt-lib",
    "lisp",
    "",
)
VERDICT_PATTERN = re.compile(r"\b(not )?(unsat|sat|invalid|valid|unsatisfiable|satisfiable)\b")
OPPOSITE_VERDICT = {
    "sat": "unsat",
    "unsat": "sat",
    "valid": "invalid",
    "invalid": "valid",
}


@dataclass(frozen=True)
class SmtReward(WorkerVerifier):
    """pass (1) or fail (0). A completion that did not stop by itself gets 0."""

    name: str
    answer_type: Literal["statement", "witness", "invariant"]
    worker_module: ClassVar[str] = "lowrank_tune.rewards.formal.smt_worker"

    def worker_spec(self) -> Mapping[str, Any]:
        return {
            **super().worker_spec(),
            "answer_type": self.answer_type,
            "megabytes": MEMORY_MEGABYTES,
        }

    def row_rejection_reason(self, item: RewardInput) -> str | None:
        for column in COLUMNS[self.answer_type]:
            value = item.row.get(column)
            if not isinstance(value, str) or not value.strip():
                return f"the row has no column `{column}`"
        return None

    def score_completion(self, item: RewardInput) -> Score | None:
        if len(item.completion) > MAX_CHARS:
            return Score(0.0, "fail", f"longer than {MAX_CHARS} characters")
        if self.answer_type == "statement" and claimed_verdict(item.completion) is None:
            return Score(0.0, "fail", "has no verdict, or several")
        return None

    def build_request(self, item: RewardInput) -> Mapping[str, Any]:
        columns = {name: item.row.get(name) for name in REQUEST_COLUMNS}
        return {**columns, "text": last_code_block_or_text(item.completion, LANGUAGES)}

    def reference_request(self, item: RewardInput) -> Mapping[str, Any] | None:
        """Returns the request for the row's own formulas. None for a statement: Z3 decides only the row's formulas, so
        a completion is never the cause."""
        if self.answer_type == "statement":
            return None
        return {**self.build_request(item), "text": None}

    def parse_reply(self, item: RewardInput, reply: Reply) -> Score:
        value = reply["value"]
        if "row" in value:
            return self.no_score(item, f"the row is at fault: {value['row']}")
        if "unknown" in value:
            return self.no_score(item, f"Z3 cannot decide: {value['unknown']}")
        if "status" in value:
            status = value["status"]
            return pass_or_fail(claimed_verdict(item.completion) == status, f"it is {status}")
        return pass_or_fail(value["right"], to_printable(value["why"], MAX_REASON_CHARS))


def claimed_verdict(completion: str) -> str | None:
    """Returns the verdict of a completion: sat, unsat, valid or invalid; None if it has none or two."""
    tail = completion[-TAIL_CHARS:]
    text = last_boxed(tail)
    if text is None:
        text = tail.rstrip().rpartition("\n")[2]
    verdicts = set()
    for negated, word in VERDICT_PATTERN.findall(text.casefold()):
        verdict = word.replace("isfiable", "")
        verdicts.add(OPPOSITE_VERDICT[verdict] if negated else verdict)
    return verdicts.pop() if len(verdicts) == 1 else None

"""`lean`: a proof that the program `lean` accepts, of the row's own statement, with no axioms but Lean's three.

Rows hold a theorem without its proof in the column `statement` (or `formal_statement`), and what comes before it in
`header`, if anything. Read is the last closed fence (`lean`, `lean4` or none), else the whole completion: the proof
(`by ...`, a term behind `:=`, or bare tactics), with or without the statement before it; other commands do not belong
there. The statement is written by us under a name that nobody can know, comments are taken out, and words that could
change what is checked (commands, options, macros, code that runs while Lean elaborates) fail.

What a proof can do is limited by those words and by limits on time and memory; there is no sandbox around Lean.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lowrank_tune.errors import UserError
from lowrank_tune.rewards.base import Reply, RewardInput, Score, WorkerReward, truncate_for_display
from lowrank_tune.rewards.code.code_blocks import last_code_block
from lowrank_tune.rewards.workers.pool import score_serially

MAX_CHARS = 100_000  # characters of a completion
MEMORY_MEGABYTES = 4096
PROGRAM = ("lean",)
LANGUAGES = ("lean", "lean4", "")
COLUMNS = ("statement", "formal_statement")
THEOREM = re.compile(
    r"^[ \t]*(theorem|lemma|example)\b(?:[ \t\n]+(?![:({\[\u2983])([^\s:({\[\u2983]+?)(?=\.\{|[\s:({\[\u2983]|\Z))?",
    re.M,
)
EMPTY_PROOF = re.compile(r":=\s*(?:by\s*)?(?:sorry\s*)?\Z")
COMMENT = re.compile(r"/-|-/|--[^\n]*")
FORBIDDEN_WORDS = frozenset(
    """
    sorry admit axiom theorem lemma def abbrev opaque example instance structure class inductive coinductive import
    prelude module public meta set_option macro macro_rules syntax elab elab_rules notation notation3 infix infixl
    infixr prefix postfix declare_syntax_cat initialize builtin_initialize run_cmd run_elab run_meta run_tac by_elab
    eval_expr unsafe partial implemented_by implemented_by_elab extern export csimp attribute universe variable
    namespace section end mutual local scoped private protected noncomputable deriving include omit alias simproc
    dsimproc simproc_decl builtin_simproc register_option register_simp_attr unif_hint include_str dbg_trace panic
    irreducible_def native_decide add_decl_doc sudo library_note suppress_compilation compile_inductive stop IO
    """.split()
)
WORD = re.compile(r"[^\W\d]\w*|#\w{2,}|@\[")
TERM = re.compile(r"(?:by|fun)\b|[\u03bb\u27e8(]")


class InvalidProof(ValueError):
    """A completion in which there is no proof that may be tried."""


@dataclass(frozen=True)
class LeanReward(WorkerReward):
    """pass (1) or fail (0). A completion that did not stop by itself has not answered."""

    name: str
    program: tuple[str, ...]
    is_verifier: ClassVar[bool] = True

    def score(self, items: Sequence[RewardInput]) -> list[Score]:
        return score_serially(self, items)

    def worker_spec(self) -> Mapping[str, Any]:
        return {
            "kind": "verifier",
            "module": "lowrank_tune.rewards.formal.lean_worker",
            "program": list(self.program),
            "megabytes": MEMORY_MEGABYTES,
            "use": self.name,
        }

    def row_rejection_reason(self, item: RewardInput) -> str | None:
        statement = _statement(item.row)
        if statement is None:
            return "the row has no column `statement`"
        if THEOREM.search(statement):
            return None
        return "`statement` holds no theorem"

    def score_without_worker(self, item: RewardInput) -> Score | None:
        if reason := self.row_rejection_reason(item):
            return self._no_score("error", reason, item)
        if not item.stopped:
            return Score(0.0, "fail", "did not stop")
        try:
            self.build_request(item)
        except InvalidProof as error:
            return Score(0.0, "fail", truncate_for_display(str(error), 300)[1:-1])
        return None

    def build_request(self, item: RewardInput) -> Mapping[str, Any]:
        # a name that no completion can refer to
        name = f"goal_{secrets.token_hex(8)}"
        statement = _statement(item.row)
        assert statement is not None
        return {
            "name": name,
            "proof": extract_proof(item.completion, statement),
            "head": _head(item.row, statement, name),
        }

    def reference_request(self, item: RewardInput) -> Mapping[str, Any] | None:
        """The row's statement, without a proof: what Lean has to do for every completion."""
        statement = _statement(item.row)
        assert statement is not None
        return {"name": "goal", "proof": ":= by sorry", "head": _head(item.row, statement, "goal")}

    def parse_reply(self, item: RewardInput, reply: Reply) -> Score:
        if "fault" in reply:
            return self.on_worker_crash(item, reply["fault"])
        value = reply["value"]
        if "row" in value:
            return self._no_score("error", f"the row's own statement is not taken: {value['row']}", item)
        return Score(
            float(value["right"]),
            "pass" if value["right"] else "fail",
            truncate_for_display(value["why"], 400)[1:-1],
        )

    def on_timeout(self, item: RewardInput, seconds: float) -> Score:
        return self._no_score("timeout", f"Lean was not done within {seconds:g} s", item)

    def on_worker_crash(self, item: RewardInput, reason: str) -> Score:
        return self._no_score("error", f"the worker {reason}", item)

    def _no_score(self, verdict: Literal["error", "timeout"], reason: str, item: RewardInput) -> Score:
        return Score(None, verdict, f"`{self.name}`: {truncate_for_display(reason, 400)[1:-1]}, on {item}")


def make_lean(name: str, program: Sequence[str] | None) -> LeanReward:
    """Raises UserError where the program is not installed."""
    command = tuple(program or PROGRAM)
    if (executable := shutil.which(command[0])) is None:
        raise UserError(
            f"`{name}` needs the program `{command[0]}`, which is not on the PATH; install Lean 4 with elan "
            "(https://lean-lang.org/install), or say where it is, as `program: [/path/to/lean]`"
        )
    return LeanReward(name, (executable, *command[1:]))


def _statement(row: Mapping[str, Any]) -> str | None:
    return next((row[column] for column in COLUMNS if isinstance(row.get(column), str) and row[column].strip()), None)


def _head(row: Mapping[str, Any], statement: str, name: str) -> str:
    header = row.get("header")
    return restated_theorem(statement, header if isinstance(header, str) else "", name)


def restated_theorem(statement: str, header: str, name: str) -> str:
    """The row's own lines, up to the `:=`, its theorem under a new name."""
    bare = EMPTY_PROOF.sub("", statement.rstrip()).rstrip()
    *_, theorem = THEOREM.finditer(bare)
    return f"{header.rstrip()}\n{bare[: theorem.start()]}theorem {name}{bare[theorem.end() :]}".lstrip("\n")


def extract_proof(completion: str, statement: str) -> str:
    """What stands after the `:=`, from there on. Raises InvalidProof."""
    if len(completion) > MAX_CHARS:
        raise InvalidProof(f"longer than {MAX_CHARS} characters")
    code_block = last_code_block(completion, LANGUAGES)
    text = strip_comments(completion if code_block is None else code_block)
    text = _after_statement(text, statement).strip("\n").rstrip()
    for word in WORD.findall(text):
        if word in FORBIDDEN_WORDS or word[0] in "#@":
            raise InvalidProof(f"uses `{word[:40]}`, which is no part of a proof")
    if any(not letter.isprintable() and letter != "\n" for letter in text):
        raise InvalidProof("holds characters that are no text")
    if not text.strip():
        raise InvalidProof("there is no proof")
    if text.lstrip().startswith(":="):
        return text.lstrip()
    if TERM.match(text.lstrip()):
        return f":= {text.lstrip()}"
    return ":= by\n" + "\n".join(f"  {line}" for line in text.split("\n"))


def strip_comments(text: str) -> str:
    """Without what Lean would not read either: so what is looked at and what Lean gets are the same. Raises
    Improper."""
    pieces: list[str] = []
    depth = 0
    position = 0
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    while match := COMMENT.search(text, position):
        word = match.group()
        if word.startswith("--") and depth:
            position = match.start() + (
                1 if word[2:3] == "/" else 2
            )  # within a comment only its ends count: `--/` ends it
            continue
        if not depth:
            pieces.append(text[position : match.start()] + " ")
        depth += {"/-": 1, "-/": -1}.get(word, 0)
        if depth < 0:
            raise InvalidProof("closes a comment that was not opened")
        position = match.end()
    if depth:
        raise InvalidProof("leaves a comment open")
    return "".join([*pieces, text[position:]])


def _after_statement(text: str, statement: str) -> str:
    """Without the row's statement, where the answer begins with it again. Raises InvalidProof where it states something
    else."""
    stated = list(THEOREM.finditer(text))
    if not stated:
        return text
    *_, theorem = THEOREM.finditer(statement)
    expected = "".join(EMPTY_PROOF.sub("", strip_comments(statement[theorem.end() :]).rstrip()).split())
    position = stated[-1].end()
    for letter in expected:
        while position < len(text) and text[position].isspace():
            position += 1
        if position >= len(text) or text[position] != letter:
            raise InvalidProof("states another theorem")
        position += 1
    rest = text[position:].lstrip()
    if not rest.startswith(":="):
        raise InvalidProof("states another theorem")
    return rest

"""`lean`: a proof that the program `lean` accepts, of the row's own statement, with no axioms but Lean's three.

Runs in the main process; the other side is `lean_worker.py`. A row has a theorem without its proof in the column
`statement` (or `formal_statement`), and the lines before it in `header`, if any. The answer is the last closed fence
(`lean`, `lean4` or not marked), else the whole completion. It is the proof (`by ...`, a term after `:=`, or bare
tactics), with or without the statement before it, and no other command.

The kit writes the statement under a random name and removes comments. Words that could change what is checked
(commands, options, macros, code that runs while Lean elaborates) fail. Only these words and the limits on time and
memory restrict a proof; Lean does not run in a sandbox.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lowrank_tune.errors import UserError
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
    """A completion without a proof that may be run; the message is a predicate."""


@dataclass(frozen=True)
class LeanReward(WorkerVerifier):
    """pass (1) or fail (0). A completion that did not stop by itself gets 0."""

    name: str
    program: tuple[str, ...]
    worker_module: ClassVar[str] = "lowrank_tune.rewards.formal.lean_worker"

    def worker_spec(self) -> Mapping[str, Any]:
        return {
            **super().worker_spec(),
            "program": list(self.program),
            "megabytes": MEMORY_MEGABYTES,
        }

    def row_rejection_reason(self, item: RewardInput) -> str | None:
        statement = _statement(item.row)
        if statement is None:
            return "the row has no column `statement`"
        if THEOREM.search(statement):
            return None
        return "`statement` holds no theorem"

    def score_completion(self, item: RewardInput) -> Score | None:
        try:
            self.build_request(item)
        except InvalidProof as error:
            return Score(0.0, "fail", to_printable(str(error), MAX_REASON_CHARS))
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
        """Returns the row's statement without a proof: the part that Lean checks for every completion."""
        statement = _statement(item.row)
        assert statement is not None
        return {
            "name": "goal",
            "proof": ":= by sorry",
            "head": _head(
                item.row,
                statement,
                "goal",
            ),
        }

    def parse_reply(self, item: RewardInput, reply: Reply) -> Score:
        value = reply["value"]
        if "row" in value:
            return self.no_score(item, f"Lean rejects the row's own statement: {value['row']}")
        return pass_or_fail(value["right"], to_printable(value["why"], MAX_REASON_CHARS))


def make_lean(name: str, program: Sequence[str] | None) -> LeanReward:
    """Returns the reward. Raises UserError if the program is not installed."""
    command = tuple(program or PROGRAM)
    executable = shutil.which(command[0])
    if executable is None:
        raise UserError(
            f"`{name}` needs the program `{command[0]}`, which is not on the PATH; install Lean 4 with elan "
            "(https://lean-lang.org/install), or give its path, as `program: [/path/to/lean]`"
        )
    return LeanReward(name, (executable, *command[1:]))


def _statement(row: Mapping[str, Any]) -> str | None:
    for column in COLUMNS:
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            return value
    return None


def _head(
    row: Mapping[str, Any],
    statement: str,
    name: str,
) -> str:
    header = row.get("header")
    return restated_theorem(statement, header if isinstance(header, str) else "", name)


def restated_theorem(
    statement: str,
    header: str,
    name: str,
) -> str:
    """Returns the row's own lines up to the `:=`, with the theorem under a new name."""
    bare = EMPTY_PROOF.sub("", statement.rstrip()).rstrip()
    *_, theorem = THEOREM.finditer(bare)
    before = bare[: theorem.start()]
    behind = bare[theorem.end() :]
    return f"{header.rstrip()}\n{before}theorem {name}{behind}".lstrip("\n")


def extract_proof(completion: str, statement: str) -> str:
    """Returns the proof of a completion, from its `:=` on. Raises InvalidProof."""
    if len(completion) > MAX_CHARS:
        raise InvalidProof(f"longer than {MAX_CHARS} characters")
    text = strip_comments(last_code_block_or_text(completion, LANGUAGES))
    text = _after_statement(text, statement).strip("\n").rstrip()
    for word in WORD.findall(text):
        if word in FORBIDDEN_WORDS or word[0] in "#@":
            raise InvalidProof(f"uses `{word[:40]}`, which is not allowed in a proof")
    if any(not character.isprintable() and character != "\n" for character in text):
        raise InvalidProof("contains control characters")
    if not text.strip():
        raise InvalidProof("there is no proof")
    if text.lstrip().startswith(":="):
        return text.lstrip()
    if TERM.match(text.lstrip()):
        return f":= {text.lstrip()}"
    return ":= by\n" + "\n".join(f"  {line}" for line in text.split("\n"))


def strip_comments(text: str) -> str:
    """Returns a text without comments, so that the checked words are exactly those that Lean reads. Raises
    InvalidProof."""
    pieces: list[str] = []
    depth = 0
    position = 0
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    while match := COMMENT.search(text, position):
        word = match.group()
        if word.startswith("--") and depth:
            # in a block comment `--` has no meaning, but `--/` contains its end
            position = match.start() + (1 if word[2:3] == "/" else 2)
            continue
        if not depth:
            pieces.append(text[position : match.start()] + " ")
        if word == "/-":
            depth += 1
        elif word == "-/":
            depth -= 1
        if depth < 0:
            raise InvalidProof("closes a comment that was not opened")
        position = match.end()
    if depth:
        raise InvalidProof("leaves a comment open")
    return "".join([*pieces, text[position:]])


def _after_statement(text: str, statement: str) -> str:
    """Returns an answer without the row's statement, if it repeats that. Raises InvalidProof if it states something
    else."""
    theorems = list(THEOREM.finditer(text))
    if not theorems:
        return text
    *_, theorem = THEOREM.finditer(statement)
    expected = EMPTY_PROOF.sub("", strip_comments(statement[theorem.end() :]).rstrip())
    position = theorems[-1].end()
    for character in "".join(expected.split()):
        while position < len(text) and text[position].isspace():
            position += 1
        if text[position : position + 1] != character:
            raise InvalidProof("states another theorem")
        position += 1
    rest = text[position:].lstrip()
    if not rest.startswith(":="):
        raise InvalidProof("states another theorem")
    return rest

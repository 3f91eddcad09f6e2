"""`lean`: a proof that the program `lean` accepts, of the row's own statement, with no axioms but Lean's three.

Rows hold a theorem without its proof in the column `statement` (or `formal_statement`), and what comes before it in
`header`, if anything. Read is the last closed fence (`lean`, `lean4` or none), else the whole completion: the proof
(`by ...`, a term behind `:=`, or bare tactics), with or without the statement before it; other commands do not belong
there. The statement is written by us under a name that nobody can know, comments are taken out, and words that could
change what is checked (commands, options, macros, code that runs while Lean elaborates) fail.

What a proof can do is limited by those words, a wall clock and a limit on memory; there is no sandbox around Lean.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lowrank_tune.errors import UserError
from lowrank_tune.rewards.fences import last_fenced
from lowrank_tune.rewards.pool import alone
from lowrank_tune.rewards.protocol import Item, Reply, Score, Worked, shown

LONGEST = 100_000  # characters of a completion
MEGABYTES = 4096
PROGRAM = ("lean",)
LANGUAGES = ("lean", "lean4", "")
COLUMNS = ("statement", "formal_statement")
THEOREM = re.compile(
    r"^[ \t]*(theorem|lemma|example)\b(?:[ \t\n]+(?![:({\[\u2983])([^\s:({\[\u2983]+?)(?=\.\{|[\s:({\[\u2983]|\Z))?",
    re.M,
)
EMPTY = re.compile(r":=\s*(?:by\s*)?(?:sorry\s*)?\Z")
COMMENT = re.compile(r"/-|-/|--[^\n]*")
WORDS = frozenset(
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


class Improper(ValueError):
    """A completion in which there is no proof that may be tried."""


@dataclass(frozen=True)
class Lean(Worked):
    """pass (1) or fail (0). A completion that did not stop by itself has not answered."""

    name: str
    program: tuple[str, ...]
    judges: ClassVar[bool] = True

    def score(self, items: Sequence[Item]) -> list[Score]:
        return alone(self, items)

    def job(self) -> Mapping[str, Any]:
        return {
            "kind": "verifier",
            "module": "lowrank_tune.rewards.judges.lean",
            "program": list(self.program),
            "megabytes": MEGABYTES,
            "use": self.name,
        }

    def unusable(self, item: Item) -> str | None:
        statement = _statement(item.row)
        if statement is None:
            return "the row has no column `statement`"
        return None if THEOREM.search(statement) else "`statement` holds no theorem"

    def early(self, item: Item) -> Score | None:
        if why := self.unusable(item):
            return self._none("error", why, item)
        if not item.stopped:
            return Score(0.0, "fail", "did not stop")
        try:
            self.ask(item)
        except Improper as error:
            return Score(0.0, "fail", shown(str(error), 300)[1:-1])
        return None

    def ask(self, item: Item) -> Mapping[str, Any]:
        statement = _statement(item.row)
        assert statement is not None
        name = f"goal_{secrets.token_hex(8)}"
        header = item.row.get("header")
        head = retyped(statement, header if isinstance(header, str) else "", name)
        return {"name": name, "proof": proof_in(item.completion, statement), "head": head}

    def judge(self, item: Item, reply: Reply) -> Score:
        if "fault" in reply:
            return self.lost(item, reply["fault"])
        value = reply["value"]
        if "row" in value:
            return self._none("error", f"the row's own statement is not taken: {value['row']}", item)
        return Score(float(value["right"]), "pass" if value["right"] else "fail", shown(value["why"], 400)[1:-1])

    def overdue(self, item: Item, seconds: float) -> Score:
        return self._none("timeout", f"Lean was not done within {seconds:g} s", item)

    def lost(self, item: Item, how: str) -> Score:
        return self._none("error", f"the worker {how}", item)

    def _none(self, verdict: Literal["error", "timeout"], why: str, item: Item) -> Score:
        return Score(None, verdict, f"`{self.name}`: {shown(why, 400)[1:-1]}, on {item}")


def make_lean(name: str, program: Sequence[str] | None) -> Lean:
    """Raises UserError where the program is not installed."""
    command = tuple(program or PROGRAM)
    if (found := shutil.which(command[0])) is None:
        raise UserError(
            f"`{name}` needs the program `{command[0]}`, which is not on the PATH; install Lean 4 with elan "
            "(https://lean-lang.org/install), or say where it is, as `program: [/path/to/lean]`"
        )
    return Lean(name, (found, *command[1:]))


def _statement(row: Mapping[str, Any]) -> str | None:
    return next((row[column] for column in COLUMNS if isinstance(row.get(column), str) and row[column].strip()), None)


def retyped(statement: str, header: str, name: str) -> str:
    """The row's own lines, up to the `:=`, its theorem under a new name."""
    bare = EMPTY.sub("", statement.rstrip()).rstrip()
    *_, found = THEOREM.finditer(bare)
    return f"{header.rstrip()}\n{bare[: found.start()]}theorem {name}{bare[found.end() :]}".lstrip("\n")


def proof_in(completion: str, statement: str) -> str:
    """What stands after the `:=`, from there on. Raises Improper."""
    if len(completion) > LONGEST:
        raise Improper(f"longer than {LONGEST} characters")
    found = last_fenced(completion, LANGUAGES)
    text = without_comments(completion if found is None else found)
    text = _after_statement(text, statement).strip("\n").rstrip()
    for word in WORD.findall(text):
        if word in WORDS or word[0] in "#@":
            raise Improper(f"uses `{word[:40]}`, which is no part of a proof")
    if any(not letter.isprintable() and letter != "\n" for letter in text):
        raise Improper("holds characters that are no text")
    if not text.strip():
        raise Improper("there is no proof")
    if text.lstrip().startswith(":="):
        return text.lstrip()
    if TERM.match(text.lstrip()):
        return f":= {text.lstrip()}"
    return ":= by\n" + "\n".join(f"  {line}" for line in text.split("\n"))


def without_comments(text: str) -> str:
    """Without what Lean would not read either: so what is looked at and what Lean gets are the same. Raises
    Improper."""
    kept: list[str] = []
    depth, place, text = 0, 0, text.replace("\r\n", "\n").replace("\t", "    ")
    while mark := COMMENT.search(text, place):
        word = mark.group()
        if word.startswith("--") and depth:
            place = mark.start() + (1 if word[2:3] == "/" else 2)  # within a comment only its ends count: `--/` ends it
            continue
        if not depth:
            kept.append(text[place : mark.start()] + " ")
        depth += {"/-": 1, "-/": -1}.get(word, 0)
        if depth < 0:
            raise Improper("closes a comment that was not opened")
        place = mark.end()
    if depth:
        raise Improper("leaves a comment open")
    return "".join([*kept, text[place:]])


def _after_statement(text: str, statement: str) -> str:
    """Without the row's statement, where the answer begins with it again. Raises Improper where it states something
    else."""
    stated = list(THEOREM.finditer(text))
    if not stated:
        return text
    *_, own = THEOREM.finditer(statement)
    wanted = "".join(EMPTY.sub("", without_comments(statement[own.end() :]).rstrip()).split())
    place = stated[-1].end()
    for letter in wanted:
        while place < len(text) and text[place].isspace():
            place += 1
        if place >= len(text) or text[place] != letter:
            raise Improper("states another theorem")
        place += 1
    rest = text[place:].lstrip()
    if not rest.startswith(":="):
        raise Improper("states another theorem")
    return rest

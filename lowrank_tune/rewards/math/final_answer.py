r"""Finds the final answer of a completion, as mathematics, for `math_answer` and `symbolic`. Runs in the main process.

The final answer is the last box (or the boxes that make one list), else what follows the last `####`, else the last
"answer is" or "answer:". Without these, a completion that is one formula is the answer itself; in any other completion
it is the last formula in `$ $` or `\( \)`, or the last number if that comes later, else the last characters.
"""

from __future__ import annotations

import re

from lowrank_tune.data.ground_truth import answer_after_hashes
from lowrank_tune.rewards.math.answer import TAIL_CHARS, extract_box, last_match
from lowrank_tune.rewards.math.answer import extract_final_answer as last_number
from lowrank_tune.rewards.math.answer_parsing import MATH_WORDS, TEXT_COMMAND

MAX_LINE_CHARS = 300
ANSWER_MARKER = re.compile(r"answer(?: is| was|\s?[:=])[ :]{0,3}(?=[^\n]*[^\s*])", re.I)
INLINE_MATH = re.compile(r"\$([^$\n]{1,300})\$|\\\(([^\n$]{1,300}?)\\\)")
NUMERAL = re.compile(r"\d")
CONCLUSION = re.compile(
    r"(?: is| are| equals| =) (?:\$([^$\n]{1,300})\$|\\\(([^\n$]{1,300}?)\\\)|([-\u2212]?\$?\d[\d,./]*%?))[ .*!]*"
)
FORMULA_CHARS = re.compile(
    r"[ A-Za-z0-9\\{}()\[\]^_+\-*/=<>.,;:!|%$&~'\u2212\u00d7\u00b7\u22c5\u00f7\u03c0\u221e\u2264\u2265\u2260\u00b2"
    r"\u00b3\u00b1\u221a\u00b0\u222a]+"
)
COMMAND = re.compile(r"\\[A-Za-z]+")
WORD = re.compile(r"[A-Za-z]{2,}")


def extract_final_answer(completion: str) -> str:
    """Returns the final answer as it was written."""
    tail = completion[-TAIL_CHARS:]
    for answer in (extract_box(completion), answer_after_hashes(tail), _after_marker(tail)):
        if answer is not None:
            return answer
    if _is_formula(completion.strip()):
        return completion.strip().lstrip("= ")
    formula = last_match(INLINE_MATH.finditer(tail))
    if formula is not None and not NUMERAL.search(tail, formula.end()):
        return _inside(formula)
    return last_number(tail) or tail.strip()


def _inside(formula: re.Match[str]) -> str:
    """Returns the formula between `$ $` or `\\( \\)`."""
    return formula[1] or formula[2]


def _after_marker(text: str) -> str | None:
    """Returns what follows the last "answer is" or "answer:" on its line: a formula, or the end of a sentence. None if
    there is no such marker."""
    marker = last_match(ANSWER_MARKER.finditer(text))
    if marker is None:
        return None
    line = text[marker.end() : marker.end() + MAX_LINE_CHARS].strip().split("\n", 1)[0]
    sentence = line.split(". ")[0].strip(" .*")
    formula = INLINE_MATH.search(line)
    if formula is not None and formula.start() == 0:
        return _inside(formula)
    if conclusion := _conclusion(sentence):
        return conclusion
    return _inside(formula) if formula else sentence


def _conclusion(sentence: str) -> str | None:
    """Returns the number or formula at the end of a sentence, after its last `is`, as in `the largest $n$ is 34`."""
    found = last_match(CONCLUSION.finditer(sentence))
    if found is None or found.end() != len(sentence):
        return None
    return found[1] or found[2] or found[3].rstrip(".,")


def _is_formula(text: str) -> bool:
    """Returns whether a text is one formula and not a sentence."""
    if len(text) > MAX_LINE_CHARS or FORMULA_CHARS.fullmatch(text) is None:
        return False
    plain = COMMAND.sub(" ", TEXT_COMMAND.sub(" ", text))
    return all(word in MATH_WORDS or word == "or" for word in WORD.findall(plain))

r"""What stands written as an answer, and what can be decided about it without algebra: exactly, in microseconds, in
this process.

`final` finds the answer in a completion, `decided` compares it with the gold one: multiple choice by its letters,
numbers as exact rationals, lists of numbers, and words as text. It says None where only algebra can tell. All patterns
are linear in the text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from lowrank_tune.data.gold import after_hashes, last_boxed
from lowrank_tune.rewards.answer import TAIL, Value, value_of
from lowrank_tune.rewards.answer import final as last_number

LONGEST = 1000  # characters of an answer
DIGITS, DEPTH, TOWER = 200, 30, 3  # of one number, of brackets in brackets, of powers in exponents
WORDS = 3  # words of an answer that is compared as text

MARK = re.compile(r"answer(?: is| was|\s?[:=])[ :]{0,3}([^\n]{1,300})", re.I)
MATHS = re.compile(r"\$([^$\n]{1,300})\$|\\\(([^\n$]{1,300}?)\\\)")
NUMERAL = re.compile(r"\d")

UNICODE = str.maketrans(
    {
        "\u2212": "-",
        "\u00d7": r"\times ",
        "\u00b7": r"\cdot ",
        "\u22c5": r"\cdot ",
        "\u00f7": r"\div ",
        "\u03c0": r"\pi ",
        "\u221e": r"\infty ",
        "\u2264": r"\leq ",
        "\u2265": r"\geq ",
        "\u2260": r"\neq ",
        "\u00b2": "^2",
        "\u00b3": "^3",
        "\u00b1": r"\pm ",
        "\u221a": r"\sqrt",
        "\u00b0": "",
        "\u222a": r"\cup ",
    }
)
SPACES = re.compile(r"(?<!\\)\\[!,;: ]|\\q?quad\b|~|\s+")
SETTING = re.compile(
    r"\\(?:left|right)(?![a-z])\.?|\\(?:displaystyle|limits)\b|\^ ?\{? ?\\circ ?\}?|\\?\$|(?<!\\)\\[()\[\]]"
)
SAME = (
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\(leq|geq)slant(?![a-z])"), r"\\\1"),
    (re.compile(r"\\_"), "_"),
    (re.compile(r"(?<![\\a-zA-Z])infinity\b"), r"\\infty"),
    (re.compile(r"\\(?:textbf|textit|textrm|textnormal|mathrm|mathbf|mbox|rm)(?=\{)"), r"\\text"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\lt(?![a-z])"), "<"),
    (re.compile(r"\\gt(?![a-z])"), ">"),
    (re.compile(r"(?<=\d),\\!(?=\d{3})"), ""),
)
TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
LETTERS = re.compile(r"[A-J](?:(?: ?, ?| and )[A-J]){0,9}")
LETTER = re.compile(r"\(([A-Ja-j])\)|([A-J])\)|([A-J])(?=[.:]\s)[.:]")
PROSE = re.compile(r"[A-Za-z][A-Za-z',.; -]*")
SIGNS = re.compile(r"[\u2460-\u2473<>=, ]+")  # numbers in circles, which name statements, and signs of comparison
HEADING = re.compile(r"(?:Part|Step|Case|Task|Method|Section|Teil)\b")
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]*[a-z][A-Za-z]*")
SHORT_WORDS = frozenset("yes no odd one two six ten all none".split())
MATHS_WORDS = frozenset("sqrt frac sin cos tan log exp min max mod and".split())
UNIT = re.compile(
    r"(?<=[\d})a-z]) ?\\text ?\{ ?(?! ?(?:and|or|if|hundred|thousand|[mbtr]+illion|dozen)\b)[^{}]*\}(?: ?\^ "
    r"?\{?[23]\}?)?$"
)
BUILDER = re.compile(r"\\\{ ?[a-zA-Z] ?(?:\\mid|\\vert|\\in ?\\mathbb ?\{?R\}? ?\||\|) ?([^|]*)\\\}")
BARE_FRACTION = re.compile(r"\\frac ?(\\[a-zA-Z]+|\w) ?(\\[a-zA-Z]+|\w)(?![\w{])")
BASED = re.compile(r"(?P<digits>[0-9]{1,100})(?: ?_ ?\{?(?P<base>[0-9]{1,2})\}?)?")
OPEN, CLOSE = "([{", ")]}"


class Choice(NamedTuple):
    """Letters of several to choose from (C, or A and D), and what stands behind the letter."""

    letters: frozenset[str]
    rest: str


def final(completion: str) -> str:
    r"""The final answer as it was written: the last box, else after the last `####`, else after the last "answer is" or
    "answer:".

    Without these it is the last formula in `$ $` or `\( \)`, or the last number where that comes later, else the last
    characters.
    """
    tail = completion[-TAIL:]
    for found in (last_boxed(tail), after_hashes(tail)):
        if found is not None:
            return found
    marked = None
    for marked in MARK.finditer(tail):  # noqa: B007
        pass
    if marked is not None:
        line = marked[1].strip()
        inside = MATHS.search(line)
        return (inside[1] or inside[2]) if inside else line.split(". ")[0].strip(" .*")
    formula = None
    for formula in MATHS.finditer(tail):  # noqa: B007
        pass
    if formula is not None and not NUMERAL.search(tail, formula.end()):
        return formula[1] or formula[2]
    return last_number(tail) or tail.strip()


def excess(text: str) -> str | None:
    """Why an answer is too large to be read, if it is: nothing that a person would write as one."""
    if len(text) > LONGEST:
        return f"is longer than {LONGEST} characters"
    if re.search(rf"\d{{{DIGITS + 1}}}", text):
        return f"has a number of more than {DIGITS} digits"
    depth = deepest = tower = highest = 0
    exponents: list[bool] = []
    before = ""
    for letter in text:
        if letter in OPEN:
            exponents.append(before == "^")
            depth, tower = depth + 1, tower + exponents[-1]
            deepest, highest = max(deepest, depth), max(highest, tower)
        elif letter in CLOSE and exponents:
            depth, tower = depth - 1, tower - exponents.pop()
        before = before if letter == " " else letter
    if deepest > DEPTH:
        return f"has brackets {deepest} deep (at most {DEPTH})"
    if highest > TOWER:
        return f"has a tower of {highest} powers (at most {TOWER})"
    if text.count("!!!") or "\x00" in text:
        return "is no mathematics"
    return None


def decided(found: str, gold: str) -> bool | None:
    """Whether two answers are the same, or None where neither exact numbers nor text can tell."""
    found, gold = tidy(found), tidy(gold)
    got, wanted = choice(found), choice(gold)
    if wanted is not None:
        if got is not None:
            return got.letters == wanted.letters
        if not wanted.rest:
            return folded(found).upper() in wanted.letters
        gold = wanted.rest
    elif got is not None and got.rest:
        found = got.rest
    if (in_base := _in_base(found, gold)) is not None:
        return in_base
    number, goal = value_of(found), value_of(gold)
    if number is not None and goal is not None:
        return number.equals(goal)
    if is_text(gold):
        return folded(found) == folded(gold)
    if is_text(found):
        return False
    return _lists(found, gold)


def algebra(text: str) -> str:
    r"""What algebra shall read: without the letter of a choice, a unit behind, and `\{x |` around a condition."""
    text = tidy(text)
    chosen = choice(text)
    if chosen is not None and chosen.rest:
        text = chosen.rest
    without = UNIT.sub("", text).strip()
    text = without or text
    if builder := BUILDER.fullmatch(text):
        text = builder[1]
    return BARE_FRACTION.sub(r"\\frac{\1}{\2}", text).rstrip(" .,;")


def words(text: str) -> list[str]:
    """The words of a language in an answer: no names of functions, no products of letters."""
    plain = TEXT.sub(r" \1 ", text)
    return [
        word
        for word in WORD.findall(plain)
        if word not in MATHS_WORDS and (len(word) > 3 or word.lower() in SHORT_WORDS)
    ]


def is_text(text: str) -> bool:
    """Whether a tidied answer consists of words, as Evelyn, an isosceles triangle, yes; or of signs that only name
    something."""
    if SIGNS.fullmatch(text):
        return True
    plain = TEXT.sub(r"\1", text).strip()
    return PROSE.fullmatch(plain) is not None and bool(words(plain) or (plain != text and len(plain) > 1))


def folded(text: str) -> str:
    """A text without its setting and case."""
    plain = "".join(text.replace(",", "").split()) if SIGNS.fullmatch(text) else TEXT.sub(r" \1 ", text)
    return " ".join(plain.casefold().split()).strip(" .")


def tidy(text: str) -> str:
    """Without what only sets the type; several ways to write one thing become one."""
    text = SETTING.sub("", text.translate(UNICODE))
    for pattern, plain in SAME:
        text = pattern.sub(plain, text)
    return SPACES.sub(" ", text).lstrip(" ,;").rstrip(" .,;")


def choice(text: str) -> Choice | None:
    """A tidied answer as one of several: `(B)`, `C) 37.5%`, `A and D`."""
    plain = " ".join(TEXT.sub(r" \1 ", text).split())
    if LETTERS.fullmatch(plain):
        return Choice(frozenset(plain.replace("and", "").replace(",", "").split()), "")
    if (found := LETTER.match(plain)) is None:
        return None
    return Choice(
        frozenset((found[1] or found[2] or found[3]).upper()), plain[found.end() :].lstrip(" :").rstrip(" .:")
    )


def _in_base(found: str, gold: str) -> bool | None:
    """Two numbers of which one names its base, as 101_2: the same digits where the gold one does, else the same
    number."""
    got, wanted = (BASED.fullmatch(text) for text in (found, gold))
    if got is None or wanted is None or not (got["base"] or wanted["base"]):
        return None
    if wanted["base"]:
        return got["digits"].lstrip("0") == wanted["digits"].lstrip("0") and got["base"] in (None, wanted["base"])
    base = int(got["base"])
    return (
        1 < base <= 36
        and all(int(letter) < base for letter in got["digits"])
        and int(got["digits"], base) == int(wanted["digits"])
    )


def _lists(found: str, gold: str) -> bool | None:
    """Two lists of numbers: points and intervals in their order and with their brackets, sets and bare lists in any
    order."""
    got, wanted = _list(found), _list(gold)
    if got is None or wanted is None or got[0] != wanted[0]:
        return None
    numbers, goals = got[1], wanted[1]
    if len(numbers) != len(goals):
        return False
    if got[0] == "{}":
        numbers, goals = sorted(numbers, key=_order), sorted(goals, key=_order)
    return all(number.equals(goal) for number, goal in zip(numbers, goals, strict=True))


def _order(value: Value) -> tuple[object, ...]:
    return value.number, value.percent


def _list(text: str) -> tuple[str, list[Value]] | None:
    """The brackets of a list of at least two plain numbers, `{}` for none, and the numbers."""
    brackets, inner = "{}", text
    if text.startswith(r"\{") and text.endswith(r"\}"):
        inner = text[2:-2]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        brackets, inner = text[0] + text[-1], text[1:-1]
    values = [value_of(part) for part in inner.split(",")]
    known = [value for value in values if value is not None]
    return (brackets, known) if len(known) == len(values) > 1 else None

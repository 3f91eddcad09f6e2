r"""What stands written as an answer, and what can be decided about it without algebra: exactly, in microseconds, in
this process.

`extract_final_answer` finds the answer in a completion, `compare_exact` compares it with the gold one: multiple choice
by its letters, numbers as exact rationals, lists of numbers, and words as text. It says None where only algebra can
tell. All patterns are linear in the text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from lowrank_tune.data.ground_truth import answer_after_hashes, last_boxed
from lowrank_tune.rewards.answer import TAIL_CHARS, NumericAnswer, parse_number
from lowrank_tune.rewards.answer import extract_final_answer as last_number

MAX_CHARS = 1000  # characters of an answer
MAX_DIGITS, MAX_DEPTH, MAX_EXPONENT_DEPTH = 200, 30, 3  # of one number, of brackets in brackets, of powers in exponents
MAX_WORDS = 3  # words of an answer that is compared as text

ANSWER_MARKER = re.compile(r"answer(?: is| was|\s?[:=])[ :]{0,3}([^\n]{1,300})", re.I)
INLINE_MATH = re.compile(r"\$([^$\n]{1,300})\$|\\\(([^\n$]{1,300}?)\\\)")
NUMERAL = re.compile(r"\d")

UNICODE_TO_LATEX = str.maketrans(
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
LATEX_SPACES = re.compile(r"(?<!\\)\\[!,;: ]|\\q?quad\b|~|\s+")
LATEX_LAYOUT = re.compile(
    r"\\(?:left|right)(?![a-z])\.?|\\(?:displaystyle|limits)\b|\^ ?\{? ?\\circ ?\}?|\\?\$|(?<!\\)\\[()\[\]]"
)
EQUIVALENT_LATEX = (
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
TEXT_COMMAND = re.compile(r"\\text ?\{([^{}]*)\}")
CHOICE_LETTERS = re.compile(r"[A-J](?:(?: ?, ?| and )[A-J]){0,9}")
CHOICE_LETTER = re.compile(r"\(([A-Ja-j])\)|([A-J])\)|([A-J])(?=[.:]\s)[.:]")
WORD_PATTERN = re.compile(r"[A-Za-z][A-Za-z',.; -]*")
SYMBOLS_ONLY = re.compile(
    r"[\u2460-\u2473<>=, ]+"
)  # numbers in circles, which name statements, and signs of comparison
HEADING = re.compile(r"(?:Part|Step|Case|Task|Method|Section|Teil)\b")
LOWERCASE_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]*[a-z][A-Za-z]*")
SHORT_WORDS = frozenset({"yes", "no", "odd", "one", "two", "six", "ten", "all", "none"})
MATH_WORDS = frozenset({"sqrt", "frac", "sin", "cos", "tan", "log", "exp", "min", "max", "mod", "and"})
UNIT = re.compile(
    r"(?<=[\d})a-z]) ?\\text ?\{ ?(?! ?(?:and|or|if|hundred|thousand|[mbtr]+illion|dozen)\b)[^{}]*\}(?: ?\^ "
    r"?\{?[23]\}?)?$"
)
SET_BUILDER = re.compile(r"\\\{ ?[a-zA-Z] ?(?:\\mid|\\vert|\\in ?\\mathbb ?\{?R\}? ?\||\|) ?([^|]*)\\\}")
BARE_FRACTION = re.compile(r"\\frac ?(\\[a-zA-Z]+|\w) ?(\\[a-zA-Z]+|\w)(?![\w{])")
NUMBER_WITH_BASE = re.compile(r"(?P<digits>[0-9]{1,100})(?: ?_ ?\{?(?P<base>[0-9]{1,2})\}?)?")
OPEN, CLOSE = "([{", ")]}"


class Choice(NamedTuple):
    """Letters of several to choose from (C, or A and D), and what stands behind the letter."""

    letters: frozenset[str]
    rest: str


def extract_final_answer(completion: str) -> str:
    r"""The final answer as it was written: the last box, else after the last `####`, else after the last "answer is" or
    "answer:".

    Without these it is the last formula in `$ $` or `\( \)`, or the last number where that comes later, else the last
    characters.
    """
    tail = completion[-TAIL_CHARS:]
    for answer in (last_boxed(tail), answer_after_hashes(tail)):
        if answer is not None:
            return answer
    marked = None
    for marked in ANSWER_MARKER.finditer(tail):  # noqa: B007
        pass
    if marked is not None:
        line = marked[1].strip()
        inside = INLINE_MATH.search(line)
        return (inside[1] or inside[2]) if inside else line.split(". ")[0].strip(" .*")
    formula = None
    for formula in INLINE_MATH.finditer(tail):  # noqa: B007
        pass
    if formula is not None and not NUMERAL.search(tail, formula.end()):
        return formula[1] or formula[2]
    return last_number(tail) or tail.strip()


def too_large_reason(text: str) -> str | None:
    """Why an answer is too large to be read, if it is: nothing that a person would write as one."""
    if len(text) > MAX_CHARS:
        return f"is longer than {MAX_CHARS} characters"
    if re.search(rf"\d{{{MAX_DIGITS + 1}}}", text):
        return f"has a number of more than {MAX_DIGITS} digits"
    depth = max_depth = exponent_depth = max_exponent_depth = 0
    exponents: list[bool] = []
    previous = ""
    for letter in text:
        if letter in OPEN:
            exponents.append(previous == "^")
            depth, exponent_depth = depth + 1, exponent_depth + exponents[-1]
            max_depth, max_exponent_depth = max(max_depth, depth), max(max_exponent_depth, exponent_depth)
        elif letter in CLOSE and exponents:
            depth, exponent_depth = depth - 1, exponent_depth - exponents.pop()
        previous = previous if letter == " " else letter
    if max_depth > MAX_DEPTH:
        return f"has brackets {max_depth} deep (at most {MAX_DEPTH})"
    if max_exponent_depth > MAX_EXPONENT_DEPTH:
        return f"has a tower of {max_exponent_depth} powers (at most {MAX_EXPONENT_DEPTH})"
    if text.count("!!!") or "\x00" in text:
        return "is no mathematics"
    return None


def compare_exact(answer: str, ground_truth: str) -> bool | None:
    """Whether two answers are the same, or None where neither exact numbers nor text can tell."""
    answer, ground_truth = normalize_latex(answer), normalize_latex(ground_truth)
    actual, expected = parse_choice(answer), parse_choice(ground_truth)
    if expected is not None:
        if actual is not None:
            return actual.letters == expected.letters
        if not expected.rest:
            return normalize_text(answer).upper() in expected.letters
        ground_truth = expected.rest
    elif actual is not None and actual.rest:
        answer = actual.rest
    if (in_base := _compare_in_base(answer, ground_truth)) is not None:
        return in_base
    number, expected_number = parse_number(answer), parse_number(ground_truth)
    if number is not None and expected_number is not None:
        return number.equals(expected_number)
    if is_text(ground_truth):
        return normalize_text(answer) == normalize_text(ground_truth)
    if is_text(answer):
        return False
    return _compare_lists(answer, ground_truth)


def to_algebraic_form(text: str) -> str:
    r"""What algebra shall read: without the letter of a choice, a unit behind, and `\{x |` around a condition."""
    text = normalize_latex(text)
    chosen = parse_choice(text)
    if chosen is not None and chosen.rest:
        text = chosen.rest
    without = UNIT.sub("", text).strip()
    text = without or text
    if builder := SET_BUILDER.fullmatch(text):
        text = builder[1]
    return BARE_FRACTION.sub(r"\\frac{\1}{\2}", text).rstrip(" .,;")


def words(text: str) -> list[str]:
    """The words of a language in an answer: no names of functions, no products of letters."""
    plain = TEXT_COMMAND.sub(r" \1 ", text)
    return [
        word
        for word in LOWERCASE_WORD.findall(plain)
        if word not in MATH_WORDS and (len(word) > 3 or word.lower() in SHORT_WORDS)
    ]


def is_text(text: str) -> bool:
    """Whether a tidied answer consists of words, as Evelyn, an isosceles triangle, yes; or of signs that only name
    something."""
    if SYMBOLS_ONLY.fullmatch(text):
        return True
    plain = TEXT_COMMAND.sub(r"\1", text).strip()
    return WORD_PATTERN.fullmatch(plain) is not None and bool(words(plain) or (plain != text and len(plain) > 1))


def normalize_text(text: str) -> str:
    """A text without its setting and case."""
    plain = "".join(text.replace(",", "").split()) if SYMBOLS_ONLY.fullmatch(text) else TEXT_COMMAND.sub(r" \1 ", text)
    return " ".join(plain.casefold().split()).strip(" .")


def normalize_latex(text: str) -> str:
    """Without what only sets the type; several ways to write one thing become one."""
    text = LATEX_LAYOUT.sub("", text.translate(UNICODE_TO_LATEX))
    for pattern, plain in EQUIVALENT_LATEX:
        text = pattern.sub(plain, text)
    return LATEX_SPACES.sub(" ", text).lstrip(" ,;").rstrip(" .,;")


def parse_choice(text: str) -> Choice | None:
    """A tidied answer as one of several: `(B)`, `C) 37.5%`, `A and D`."""
    plain = " ".join(TEXT_COMMAND.sub(r" \1 ", text).split())
    if CHOICE_LETTERS.fullmatch(plain):
        return Choice(frozenset(plain.replace("and", "").replace(",", "").split()), "")
    if (match := CHOICE_LETTER.match(plain)) is None:
        return None
    return Choice(
        frozenset((match[1] or match[2] or match[3]).upper()), plain[match.end() :].lstrip(" :").rstrip(" .:")
    )


def _compare_in_base(answer: str, ground_truth: str) -> bool | None:
    """Two numbers of which one names its base, as 101_2: the same digits where the gold one does, else the same
    number."""
    actual, expected = (NUMBER_WITH_BASE.fullmatch(text) for text in (answer, ground_truth))
    if actual is None or expected is None or not (actual["base"] or expected["base"]):
        return None
    if expected["base"]:
        return actual["digits"].lstrip("0") == expected["digits"].lstrip("0") and actual["base"] in (
            None,
            expected["base"],
        )
    base = int(actual["base"])
    return (
        1 < base <= 36
        and all(int(letter) < base for letter in actual["digits"])
        and int(actual["digits"], base) == int(expected["digits"])
    )


def _compare_lists(answer: str, ground_truth: str) -> bool | None:
    """Two lists of numbers: points and intervals in their order and with their brackets, sets and bare lists in any
    order."""
    actual, expected = _parse_list(answer), _parse_list(ground_truth)
    if actual is None or expected is None or actual[0] != expected[0]:
        return None
    numbers, expected_numbers = actual[1], expected[1]
    if len(numbers) != len(expected_numbers):
        return False
    if actual[0] == "{}":
        numbers, expected_numbers = sorted(numbers, key=_sort_key), sorted(expected_numbers, key=_sort_key)
    return all(
        number.equals(expected_number) for number, expected_number in zip(numbers, expected_numbers, strict=True)
    )


def _sort_key(value: NumericAnswer) -> tuple[object, ...]:
    return value.number, value.percent


def _parse_list(text: str) -> tuple[str, list[NumericAnswer]] | None:
    """The brackets of a list of at least two plain numbers, `{}` for none, and the numbers."""
    brackets, inner = "{}", text
    if text.startswith(r"\{") and text.endswith(r"\}"):
        inner = text[2:-2]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        brackets, inner = text[0] + text[-1], text[1:-1]
    values = [parse_number(part) for part in inner.split(",")]
    numbers = [value for value in values if value is not None]
    return (brackets, numbers) if len(numbers) == len(values) > 1 else None

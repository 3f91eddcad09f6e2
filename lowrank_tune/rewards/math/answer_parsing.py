r"""What stands written as an answer, and what can be decided about it without algebra: exactly, in microseconds, in
this process.

`compare_exact` compares the answer of a completion (`final_answer.py`) with the gold one: multiple choice by its
letters, numbers as exact rationals, lists of numbers, and words as text. It returns None where only algebra can decide;
`to_algebraic_form` is then what both are compared in. All patterns are linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from lowrank_tune.rewards.math.answer import VARIABLE_PREFIX, NumericAnswer, split_number
from lowrank_tune.rewards.math.plus_minus import expand_plus_minus
from lowrank_tune.rewards.math.units import without_unit

MAX_WORDS = 3  # words of an answer that is compared as text

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
        "\u222a": r"\cup ",
    }
)
ESCAPED_COMMAND = re.compile(r"\\\\(?=[a-zA-Z])")  # a command with a backslash too many; in a matrix it ends a row
LATEX_SPACES = re.compile(r"(?<!\\)\\[!,;: ]|\\q?quad\b|~|\s+")
LATEX_LAYOUT = re.compile(r"\\(?:left|right)(?![a-z]) ?(?=[|()\[\]\\/<>.])\.?|(?<!\\)\\[()\[\]]")
# where a digit follows, what looks like one number is none
LATEX_SIGNS = re.compile(
    r"\\(?:displaystyle|limits)(?![a-zA-Z])|(?:\^ ?(?:\\circ|\{ ?\\circ ?\})|\u00b0)(?! ?\d)|(?<!\d)\\?\$|\\?\$(?!\d)"
)
SPACE = re.compile(r"\\[,;: ]|~| ")
EQUIVALENT_LATEX: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\(leq|geq)slant(?![a-z])"), r"\\\1"),
    (re.compile(r"\\_"), "_"),
    (re.compile(r"(?<![\\a-zA-Z])infinity\b"), r"\\infty"),
    (re.compile(r"\\(?:textbf|textit|textrm|textnormal|mathrm|mathbf|mbox|rm)(?=\{)"), r"\\text"),
    (re.compile(r" ?(?:\\text ?\{ ?(?:percent|pct)\.? ?\}|\b(?:percent|pct)\b)"), r"\\%"),
    (re.compile(r"\\lt(?![a-z])"), "<"),
    (re.compile(r"\\gt(?![a-z])"), ">"),
    (re.compile(r"(?<=\d) ?(?:,|\{ ?, ?\}) ?\\! ?(?=\d{3}(?!\d))"), ""),
    (re.compile(r"(?<=\d) ?\{ ?, ?\} ?(?=\d)"), ","),
    (re.compile(r"(?<![\d.,_^])\d{1,3}(?:(?:\\[,;: ]|~| )\d{3})+(?!\d)"), lambda match: SPACE.sub("", match[0])),
)
TEXT_COMMAND = re.compile(r"\\text ?\{([^{}]*)\}")
CHOICE_LETTERS = re.compile(r"[A-J](?:(?: ?, ?| and )[A-J]){0,9}|\([A-J]\)(?:(?: ?, ?| and |, and )\([A-J]\)){1,9}")
CHOICE_LETTER = re.compile(r"\(([A-Ja-j])\)|([A-J])\)|([A-J])(?=[.:]\s)[.:]")
# (a)^2 and (a) + 1 are formulas
OPERATOR = re.compile(r" ?(?:[+*/^_=<>]|- |\\(?:cdot|times|div|pm|leq?|geq?|neq?)(?![a-z]))|[-(\[!|]")
# (a) 3, (b) 5 is an answer in parts
ANOTHER_LETTER = re.compile(r"\([A-Ja-j]\)")
WORD_PATTERN = re.compile(r"[A-Za-z][A-Za-z',.; -]*")
SYMBOLS_ONLY = re.compile(
    r"[\u2460-\u2473<>=, ]+"
)  # numbers in circles, which name statements, and signs of comparison
HEADING = re.compile(r"(?:Part|Step|Case|Task|Method|Section|Teil)\b")
LOWERCASE_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]*[a-z][A-Za-z]*")
SHORT_WORDS = frozenset({"yes", "no", "odd", "one", "two", "six", "ten", "all", "none"})
MATH_WORDS = frozenset({"sqrt", "frac", "sin", "cos", "tan", "log", "exp", "min", "max", "mod", "and"})
SET_BUILDER = re.compile(r"\\\{ ?[a-zA-Z] ?(?:\\mid|\\vert|\\in ?\\mathbb ?\{?R\}? ?\||\|) ?([^|]*)\\\}")
BARE_NUMERATOR = re.compile(r"\\frac ?([0-9a-zA-Z]) ?(?=\{)")
BARE_FRACTION = re.compile(r"\\frac ?(\\[a-zA-Z]+|\w) ?(\\[a-zA-Z]+|\w)(?![\w{])")
NUMBER_WITH_BASE = re.compile(r"(?P<digits>[0-9]{1,100}|\([0-9]{1,100}\)(?= ?_))(?: ?_ ?\{?(?P<base>[0-9]{1,2})\}?)?")
DECIMAL_COMMA = re.compile(r"[-+]?(?:0,[0-9]+|[0-9]+,(?:[0-9]{1,2}|[0-9]{4,}))")
PRIME = re.compile(r"\\text ?\{[^{}]*\}|(?<=[a-zA-Z])('{1,3})(?!')")
PRODUCT = re.compile(r"(?:(?<![\d._^])\d+|\)) ?(?=\(|\\(?:lfloor|lceil|[dt]?binom)(?![a-z]))|\) ?(?=\d)")


class Choice(NamedTuple):
    """Letters of several to choose from (C, or A and D), and what stands behind the letter."""

    letters: frozenset[str]
    rest: str


def compare_exact(answer: str, ground_truth: str) -> bool | None:
    """Whether two answers are the same, or None where neither exact numbers nor text can tell."""
    answer = normalize_latex(answer)
    ground_truth = normalize_latex(ground_truth)
    actual = parse_choice(answer)
    expected = parse_choice(ground_truth)
    if expected is not None:
        if actual is not None:
            return actual.letters == expected.letters
        if not expected.rest:
            return {normalize_text(answer).upper()} == expected.letters
        ground_truth = expected.rest
    elif actual is not None and actual.rest:
        answer = actual.rest
    if (in_base := _compare_in_base(answer, ground_truth)) is not None:
        return in_base
    number = parse_exact_number(answer)
    expected_number = parse_exact_number(ground_truth)
    if number is None and expected_number is not None:
        # of the answer alone: a gold 1,2 is two numbers
        number = parse_decimal_comma(answer)
    if number is not None and expected_number is not None:
        return number.equals(expected_number) and not _have_other_names(answer, ground_truth)
    if is_text(ground_truth):
        return normalize_text(answer) == normalize_text(ground_truth)
    if is_text(answer):
        return False
    return _compare_lists(answer, ground_truth)


def is_number_with_base(text: str) -> bool:
    """Whether a normalized answer is a number with its base, as 101_2."""
    match = NUMBER_WITH_BASE.fullmatch(text)
    return match is not None and match["base"] is not None


def parse_exact_number(text: str) -> NumericAnswer | None:
    """The number that a normalized answer is; `x =` in front and a unit behind do not count."""
    found = split_number(without_unit(text))
    if found is None or found[1] not in ("", ".") or "=" in text and not VARIABLE_PREFIX.match(text):
        return None
    return found[0]


def parse_decimal_comma(text: str) -> NumericAnswer | None:
    """The number that 1000,99 is, or 0,125: the comma of neither separates thousands."""
    text = without_unit(text)
    if DECIMAL_COMMA.fullmatch(text):
        return parse_exact_number(text.replace(",", "."))
    return None


def to_algebraic_form(text: str) -> str:
    r"""What algebra shall read: without the letter of a choice, a unit behind, and `\{x |` around a condition.

    Written out are the sign of a product before a bracket, and both values of a number with one \pm; a prime becomes an
    index.
    """
    text = normalize_latex(text)
    chosen = parse_choice(text)
    if chosen is not None and chosen.rest:
        text = chosen.rest
    text = without_unit(text).strip()
    if builder := SET_BUILDER.fullmatch(text):
        text = builder[1]
    text = BARE_NUMERATOR.sub(r"\\frac{\1}", text)
    text = BARE_FRACTION.sub(r"\\frac{\1}{\2}", text).rstrip(" ,;")
    text = PRIME.sub(lambda match: match[0] if match[1] is None else f"_{{{'prime' * len(match[1])}}}", text)
    return expand_plus_minus(PRODUCT.sub(r"\g<0> \\cdot ", text))


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
    if SYMBOLS_ONLY.fullmatch(text):
        plain = "".join(text.replace(",", "").split())
    else:
        plain = TEXT_COMMAND.sub(r" \1 ", text)
    return " ".join(plain.casefold().split()).strip(" .")


def normalize_latex(text: str) -> str:
    """Without what only sets the type; several ways to write one thing become one."""
    text = text.translate(UNICODE_TO_LATEX)
    if "\\begin" not in text:
        text = ESCAPED_COMMAND.sub(r"\\", text)
    text = LATEX_SIGNS.sub(" ", LATEX_LAYOUT.sub("", text))
    for pattern, plain in EQUIVALENT_LATEX:
        text = pattern.sub(plain, text)
    return _without_trailing_marks(LATEX_SPACES.sub(" ", text).lstrip(" ,;"))


def _without_trailing_marks(text: str) -> str:
    """Without the punctuation at the end: one full stop, but not the three dots of what goes on."""
    text = text.rstrip(" ,;")
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip(" ,;")
    return text


def parse_choice(text: str) -> Choice | None:
    """A tidied answer as one of several: `(B)`, `C) 37.5%`, `A and D`."""
    plain = " ".join(TEXT_COMMAND.sub(r" \1 ", text).split())
    if CHOICE_LETTERS.fullmatch(plain):
        return Choice(frozenset(re.findall(r"[A-J]", plain)), "")
    if (match := CHOICE_LETTER.match(plain)) is None:
        return None
    rest = plain[match.end() :]
    if OPERATOR.match(rest) or ANOTHER_LETTER.search(rest):
        return None
    return Choice(frozenset((match[1] or match[2] or match[3]).upper()), rest.lstrip(" :").rstrip(" .:"))


def _compare_in_base(answer: str, ground_truth: str) -> bool | None:
    """Two numbers of which one names its base, as 101_2: the same digits where the gold one does, else the same
    number. Anything else is no such number."""
    actual, expected = (NUMBER_WITH_BASE.fullmatch(text) for text in (answer, ground_truth))
    if expected is None or not (expected["base"] or actual is not None and actual["base"]):
        return None
    if actual is None:
        return False
    digits, expected_digits = (match["digits"].strip("()").lstrip("0") for match in (actual, expected))
    if expected["base"]:
        return digits == expected_digits and actual["base"] in (None, expected["base"])
    base = int(actual["base"])
    return (
        1 < base <= 36
        and all(int(letter) < base for letter in digits)
        and int(digits or "0", base) == int(expected_digits or "0")
    )


def _have_other_names(answer: str, ground_truth: str) -> bool:
    """Whether both name what has the value, as x = 5, and with different names."""
    names = [VARIABLE_PREFIX.match(text) for text in (answer, ground_truth)]
    found = {name[0].strip(" =").casefold() for name in names if name is not None}
    return len(found) == 2


def _compare_lists(answer: str, ground_truth: str) -> bool | None:
    """Two lists of numbers without names: points and intervals in their order and with their brackets, sets and bare
    lists in any order. A number that a set in braces contains twice counts once."""
    actual = _parse_list(answer)
    expected = _parse_list(ground_truth)
    if actual is None or expected is None or actual[0] != expected[0]:
        return None
    numbers = actual[1]
    expected_numbers = expected[1]
    if answer.startswith(r"\{") or ground_truth.startswith(r"\{"):
        numbers = list(dict.fromkeys(numbers))
        expected_numbers = list(dict.fromkeys(expected_numbers))
    if len(numbers) != len(expected_numbers):
        return False
    if actual[0] == "{}":
        numbers = sorted(numbers, key=_sort_key)
        expected_numbers = sorted(expected_numbers, key=_sort_key)
    return all(
        number.equals(expected_number) for number, expected_number in zip(numbers, expected_numbers, strict=True)
    )


def _sort_key(value: NumericAnswer) -> tuple[object, ...]:
    return value.number, value.percent


def _parse_list(text: str) -> tuple[str, list[NumericAnswer]] | None:
    """The brackets of a list of at least two plain numbers, `{}` for none, and the numbers."""
    brackets = "{}"
    inner = text
    if text.startswith(r"\{") and text.endswith(r"\}"):
        inner = text[2:-2]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        brackets = text[0] + text[-1]
        inner = text[1:-1]
    values = [None if "=" in part else parse_exact_number(part) for part in inner.split(",")]
    numbers = [value for value in values if value is not None]
    if len(numbers) == len(values) > 1:
        return (brackets, numbers)
    return None

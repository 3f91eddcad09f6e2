r"""Reads written answers, and compares those that need no algebra, exactly and in microseconds, for `math_answer`. Runs
in the main process.

`compare_exact` compares the answer of a completion (`final_answer.py`) with the gold answer: multiple choice by its
letters, numbers as exact rational numbers, lists of numbers, and words as text. It returns None if only algebra can
decide; both are then passed to the worker in the form that `to_algebraic_form` returns. All patterns are linear in the
text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from lowrank_tune.rewards.math.answer import VARIABLE_PREFIX, NumericAnswer, split_number
from lowrank_tune.rewards.math.plus_minus import expand_plus_minus
from lowrank_tune.rewards.math.units import without_unit

MAX_WORDS = 3  # words of an answer that is compared as text
MAX_BASE = 36

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
ESCAPED_COMMAND = re.compile(
    r"\\\\(?=[a-zA-Z])"
)  # a command with one backslash too many; in a matrix `\\\\` ends a row
LATEX_SPACES = re.compile(r"(?<!\\)\\[!,;: ]|\\q?quad\b|~|\s+")
LATEX_LAYOUT = re.compile(r"\\(?:left|right)(?![a-z]) ?(?=[|()\[\]\\/<>.])\.?|(?<!\\)\\[()\[\]]")
# not before a digit: 5 $ 3 is not the number 53
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
# numbers in circles, which name statements, and signs of comparison
SYMBOLS_ONLY = re.compile(r"[\u2460-\u2473<>=, ]+")
HEADING = re.compile(r"(?:Part|Step|Case|Task|Method|Section|Teil)\b")
LOWERCASE_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]*[a-z][A-Za-z]*")
SHORT_WORDS = frozenset(
    {
        "yes",
        "no",
        "odd",
        "one",
        "two",
        "six",
        "ten",
        "all",
        "none",
    }
)
MATH_WORDS = frozenset(
    {
        "sqrt",
        "frac",
        "sin",
        "cos",
        "tan",
        "log",
        "exp",
        "min",
        "max",
        "mod",
        "and",
    }
)
SET_BUILDER = re.compile(r"\\\{ ?[a-zA-Z] ?(?:\\mid|\\vert|\\in ?\\mathbb ?\{?R\}? ?\||\|) ?([^|]*)\\\}")
BARE_NUMERATOR = re.compile(r"\\frac ?([0-9a-zA-Z]) ?(?=\{)")
BARE_FRACTION = re.compile(r"\\frac ?(\\[a-zA-Z]+|\w) ?(\\[a-zA-Z]+|\w)(?![\w{])")
NUMBER_WITH_BASE = re.compile(r"(?P<digits>[0-9]{1,100}|\([0-9]{1,100}\)(?= ?_))(?: ?_ ?\{?(?P<base>[0-9]{1,2})\}?)?")
DECIMAL_COMMA = re.compile(r"[-+]?(?:0,[0-9]+|[0-9]+,(?:[0-9]{1,2}|[0-9]{4,}))")
PRIME = re.compile(r"\\text ?\{[^{}]*\}|(?<=[a-zA-Z])('{1,3})(?!')")
PRODUCT = re.compile(r"(?:(?<![\d._^])\d+|\)) ?(?=\(|\\(?:lfloor|lceil|[dt]?binom)(?![a-z]))|\) ?(?=\d)")


class Choice(NamedTuple):
    """The letters of a multiple-choice answer (C, or A and D), and the text after a single letter."""

    letters: frozenset[str]
    rest: str


class NumberList(NamedTuple):
    """A list of numbers; `brackets` is `{}` if the order does not matter."""

    brackets: str
    numbers: list[NumericAnswer]


def compare_exact(answer: str, ground_truth: str) -> bool | None:
    """Returns whether two answers are equal, or None if neither exact numbers nor text can decide it."""
    answer = normalize_latex(answer)
    ground_truth = normalize_latex(ground_truth)
    actual = parse_choice(answer)
    expected = parse_choice(ground_truth)
    if expected is not None and actual is not None:
        return actual.letters == expected.letters
    if expected is not None:
        if not expected.rest:
            return {normalize_text(answer).upper()} == expected.letters
        ground_truth = expected.rest
    elif actual is not None and actual.rest:
        answer = actual.rest
    equal_in_base = _compare_in_base(answer, ground_truth)
    if equal_in_base is not None:
        return equal_in_base
    number = parse_exact_number(answer)
    expected_number = parse_exact_number(ground_truth)
    if number is None and expected_number is not None:
        # only the answer may have a decimal comma: a gold answer 1,2 is two numbers
        number = parse_decimal_comma(answer)
    if number is not None and expected_number is not None:
        return number.equals(expected_number) and not _have_other_names(answer, ground_truth)
    if is_text(ground_truth):
        return normalize_text(answer) == normalize_text(ground_truth)
    if is_text(answer):
        return False
    return _compare_lists(answer, ground_truth)


def is_number_with_base(text: str) -> bool:
    """Returns whether a normalized answer is a number with its base, as 101_2."""
    match = NUMBER_WITH_BASE.fullmatch(text)
    return match is not None and match["base"] is not None


def parse_exact_number(text: str) -> NumericAnswer | None:
    """Returns the number that a normalized answer is, without `x =` before it and a unit after it; None if it is not a
    number."""
    found = split_number(without_unit(text))
    if found is None:
        return None
    number, rest = found
    is_equation = "=" in text and not VARIABLE_PREFIX.match(text)
    return None if is_equation or rest not in ("", ".") else number


def parse_decimal_comma(text: str) -> NumericAnswer | None:
    """Returns the number of a text like 1000,99 or 0,125, whose comma cannot separate thousands; else None."""
    text = without_unit(text)
    if DECIMAL_COMMA.fullmatch(text):
        return parse_exact_number(text.replace(",", "."))
    return None


def to_algebraic_form(text: str) -> str:
    r"""Returns the part of an answer that algebra compares: without the letter of a choice, a unit, and `\{x |` around
    a condition.

    The sign of a product before a bracket is written out, and both values of a number with one \pm; a prime becomes an
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
    text = PRIME.sub(_prime_to_index, text)
    return expand_plus_minus(PRODUCT.sub(r"\g<0> \\cdot ", text))


def _prime_to_index(match: re.Match[str]) -> str:
    """Returns an index for the primes of a letter; a text in \\text{} stays as it is."""
    if match[1] is None:
        return match[0]
    return f"_{{{'prime' * len(match[1])}}}"


def words(text: str) -> list[str]:
    """Returns the words of a language in an answer, without names of functions and products of letters."""
    found = LOWERCASE_WORD.findall(TEXT_COMMAND.sub(r" \1 ", text))
    return [word for word in found if _is_word(word)]


def _is_word(text: str) -> bool:
    return text not in MATH_WORDS and (len(text) > 3 or text.lower() in SHORT_WORDS)


def is_text(text: str) -> bool:
    """Returns whether a normalized answer consists of words, as Evelyn, an isosceles triangle, yes; or of signs that
    name statements."""
    if SYMBOLS_ONLY.fullmatch(text):
        return True
    plain = TEXT_COMMAND.sub(r"\1", text).strip()
    if WORD_PATTERN.fullmatch(plain) is None:
        return False
    is_upright = plain != text and len(plain) > 1
    return is_upright or bool(words(plain))


def normalize_text(text: str) -> str:
    """Returns a text without its formatting and case."""
    if SYMBOLS_ONLY.fullmatch(text):
        plain = "".join(text.replace(",", "").split())
    else:
        plain = TEXT_COMMAND.sub(r" \1 ", text)
    return " ".join(plain.casefold().split()).strip(" .")


def normalize_latex(text: str) -> str:
    """Returns LaTeX without layout commands, and with one form for equivalent commands."""
    text = text.translate(UNICODE_TO_LATEX)
    if "\\begin" not in text:
        text = ESCAPED_COMMAND.sub(r"\\", text)
    text = LATEX_SIGNS.sub(" ", LATEX_LAYOUT.sub("", text))
    for pattern, plain in EQUIVALENT_LATEX:
        text = pattern.sub(plain, text)
    return _without_trailing_marks(LATEX_SPACES.sub(" ", text).lstrip(" ,;"))


def _without_trailing_marks(text: str) -> str:
    """Returns a text without the punctuation at its end: one full stop, but not three dots, which leave something
    out."""
    text = text.rstrip(" ,;")
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip(" ,;")
    return text


def parse_choice(text: str) -> Choice | None:
    """Returns a normalized answer as multiple choice: `(B)`, `C) 37.5%`, `A and D`; None if it is something else."""
    plain = " ".join(TEXT_COMMAND.sub(r" \1 ", text).split())
    if CHOICE_LETTERS.fullmatch(plain):
        return Choice(frozenset(re.findall(r"[A-J]", plain)), "")
    match = CHOICE_LETTER.match(plain)
    if match is None:
        return None
    letter = match[1] or match[2] or match[3]
    rest = plain[match.end() :]
    if OPERATOR.match(rest) or ANOTHER_LETTER.search(rest):
        return None
    return Choice(frozenset(letter.upper()), rest.lstrip(" :").rstrip(" .:"))


def _compare_in_base(answer: str, ground_truth: str) -> bool | None:
    """Compares two numbers of which at least one has a base, as 101_2: the digits if the gold answer has a base, else
    the numbers. None if there are no such numbers."""
    actual = NUMBER_WITH_BASE.fullmatch(answer)
    expected = NUMBER_WITH_BASE.fullmatch(ground_truth)
    if expected is None:
        return None
    answer_base = None if actual is None else actual["base"]
    if not expected["base"] and not answer_base:
        return None
    if actual is None:
        return False
    digits = _digits(actual)
    expected_digits = _digits(expected)
    if expected["base"]:
        return digits == expected_digits and answer_base in (None, expected["base"])
    base = int(actual["base"])
    if not 1 < base <= MAX_BASE or any(int(digit) >= base for digit in digits):
        return False
    return int(digits or "0", base) == int(expected_digits or "0")


def _digits(number: re.Match[str]) -> str:
    return number["digits"].strip("()").lstrip("0")


def _have_other_names(answer: str, ground_truth: str) -> bool:
    """Returns whether both answers name their value, as x = 5, with different names."""
    names = set()
    for text in (answer, ground_truth):
        prefix = VARIABLE_PREFIX.match(text)
        if prefix is not None:
            names.add(prefix[0].strip(" =").casefold())
    return len(names) == 2


def _compare_lists(answer: str, ground_truth: str) -> bool | None:
    """Compares two lists of numbers without names; None if they are not such lists. The order and the brackets of
    points and intervals count, the order of sets and bare lists does not. In braces a number that occurs twice counts
    once."""
    actual = _parse_list(answer)
    expected = _parse_list(ground_truth)
    if actual is None or expected is None or actual.brackets != expected.brackets:
        return None
    numbers = actual.numbers
    expected_numbers = expected.numbers
    if answer.startswith(r"\{") or ground_truth.startswith(r"\{"):
        numbers = list(dict.fromkeys(numbers))
        expected_numbers = list(dict.fromkeys(expected_numbers))
    if len(numbers) != len(expected_numbers):
        return False
    if actual.brackets == "{}":
        numbers = sorted(numbers, key=_sort_key)
        expected_numbers = sorted(expected_numbers, key=_sort_key)
    pairs = zip(numbers, expected_numbers, strict=True)
    return all(number.equals(expected_number) for number, expected_number in pairs)


def _sort_key(value: NumericAnswer) -> tuple[object, ...]:
    return value.number, value.percent


def _parse_list(text: str) -> NumberList | None:
    """Returns a list of at least two numbers without names; its brackets are `{}` if it has none."""
    brackets = "{}"
    inner = text
    if text.startswith(r"\{") and text.endswith(r"\}"):
        inner = text[2:-2]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        brackets = text[0] + text[-1]
        inner = text[1:-1]
    numbers = []
    for part in inner.split(","):
        number = None if "=" in part else parse_exact_number(part)
        if number is None:
            return None
        numbers.append(number)
    return NumberList(brackets, numbers) if len(numbers) > 1 else None

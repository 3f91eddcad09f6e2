r"""Recognizes units and counted nouns after a number: 5 cm, 5\text{ km/h}, 5\text{ cm}^2, 12 apples. Runs in the main
process.

A unit is a known unit or a noun. A single letter is a unit only in upright text, as in 5\text{ m}: 2m, 2n and 2ab are
products. A word that changes the number, as million or squared, is not a unit.
"""

from __future__ import annotations

import re

LETTERS = frozenset("m g s h l L N J W V A K C F".split())
SYMBOLS = frozenset(
    "cm mm km dm nm kg mg ml mL cl dl kL Hz kHz MHz Pa kPa kW MW kWh Wh kJ cal kcal mol rad deg ft in yd mi lb "
    "lbs oz gal pt qt hr hrs min mins sec secs ms yr yrs mph kmh kph cc sq cu ha a.m p.m am pm USD EUR GBP".split()
)
NAMES = frozenset(
    "meter metre centimeter centimetre millimeter millimetre kilometer kilometre inch inche foot feet yard mile "
    "gram kilogram milligram pound ounce ton liter litre milliliter millilitre gallon quart pint cup second "
    "minute hour day week month year degree radian unit dollar cent euro square cubic volt watt joule newton "
    "point man men woman women boy girl child children person people".split()
)
SMALL_WORDS = frozenset("of per to in by".split())
OPERATORS = frozenset(
    "and or if nor not but than plus minus over times half halves third thirds quarter quarters fourth fourths "
    "fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundred hundreds "
    "hundredth hundredths thousand thousands thousandth thousandths million millions billion billions trillion "
    "trillions dozen dozens squared cubed factorial choose modulo mod sqrt frac sin cos tan cot log exp max gcd "
    "lcm binom alpha beta gamma delta epsilon theta kappa lambda sigma omega infinity "
    "repeating recurring score gross crore crores lakh lakhs googol "
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety".split()
)
# sixteenths, twentieths, quadrillion: a fraction or a power of ten
NUMBER_ENDING = re.compile(r".*(?:teenths?|tieths?|twel(?:f|v)ths?|illions?(?:ths?)?)", re.I)
NOUN = re.compile(r"(?=.*[aeiou]|.*[^\x00-\x7f])[^\W\d_][^\W\d_'-]{2,}", re.I)
# in a formula only longer words, because letters may be a product
PLAIN_NOUN = re.compile(r"(?=.*[aeiou])(?:[^\W\d_]{3,}s|[^\W\d_]{5,})", re.I)
POWER = r"(?: ?\^ ?\{?[23]\}?)?"
UPRIGHT = re.compile(r"(?<=[\d})a-z]) ?\\text ?\{([^{}]*)\}" + POWER + r"(?: ?/ ?\\text ?\{([^{}]*)\}" + POWER + r")?$")
PLAIN = re.compile(r"(?<=[\d})])( ?)([A-Za-z][A-Za-z '/-]{0,40})" + POWER + "$")
PARTS = re.compile(r"[ /,;:()]+|\^ ?[23]|[\u00b2\u00b3]")


def without_unit(text: str) -> str:
    """Returns a normalized LaTeX answer without the unit after it."""
    if match := UPRIGHT.search(text):
        names = [name for name in match.groups() if name is not None]
        has_unit = all(_consists_of_units(name, LETTERS, NOUN) for name in names)
    elif match := PLAIN.search(text):
        space, name = match.groups()
        has_unit = _consists_of_units(name, frozenset(), PLAIN_NOUN if space else None)
    else:
        return text
    return text[: match.start()] if has_unit else text


def is_unit(text: str) -> bool:
    """Returns whether the text after a number is its unit; a noun needs a space before it."""
    return _consists_of_units(text, LETTERS, NOUN if text.startswith(" ") else None)


def _consists_of_units(
    text: str,
    letters: frozenset[str],
    noun: re.Pattern[str] | None,
) -> bool:
    """Returns whether all words of a text but of, per, to and the like are units; `letters` are the units of one
    letter, and `noun` matches the nouns."""
    parts = [part.rstrip(".") for part in PARTS.split(text) if part.strip(".")]
    units = [part for part in parts if part not in SMALL_WORDS or part in SYMBOLS]
    if not units:
        return False
    return all(_is_unit_word(part, letters, noun) for part in units)


def _is_unit_word(
    word: str,
    letters: frozenset[str],
    noun: re.Pattern[str] | None,
) -> bool:
    lower = word.casefold()
    if word in letters or word in SYMBOLS:
        return True
    if lower in OPERATORS or NUMBER_ENDING.fullmatch(word):
        return False
    if lower in NAMES or lower.removesuffix("s") in NAMES:
        return True
    return noun is not None and noun.fullmatch(word) is not None

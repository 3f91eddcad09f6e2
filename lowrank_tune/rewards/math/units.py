r"""Units and counted nouns behind a number: 5 cm, 5\text{ km/h}, 5\text{ cm}^2, 12 apples.

A unit is a known one or a noun. A letter is a unit only where it is set upright, as in 5\text{ m}: 2m, 2n and 2ab are
products. A word that changes the number, as million or squared, is no unit.
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
# in a formula, where letters are also a product, a longer word
PLAIN_NOUN = re.compile(r"(?=.*[aeiou])(?:[^\W\d_]{3,}s|[^\W\d_]{5,})", re.I)
POWER = r"(?: ?\^ ?\{?[23]\}?)?"
UPRIGHT = re.compile(r"(?<=[\d})a-z]) ?\\text ?\{([^{}]*)\}" + POWER + r"(?: ?/ ?\\text ?\{([^{}]*)\}" + POWER + r")?$")
PLAIN = re.compile(r"(?<=[\d})])( ?)([A-Za-z][A-Za-z '/-]{0,40})" + POWER + "$")
PARTS = re.compile(r"[ /,;:()]+|\^ ?[23]|[\u00b2\u00b3]")


def without_unit(text: str) -> str:
    """A normalized LaTeX answer without the unit behind it."""
    if match := UPRIGHT.search(text):
        names = [name for name in match.groups() if name is not None]
        if all(_consists_of_units(name, LETTERS, NOUN) for name in names):
            return text[: match.start()]
        return text
    if match := PLAIN.search(text):
        noun = PLAIN_NOUN if match[1] else None
        if _consists_of_units(match[2], frozenset(), noun):
            return text[: match.start()]
        return text
    return text


def is_unit(text: str) -> bool:
    """Whether the text right behind a number names its unit; a noun needs a space before it."""
    return _consists_of_units(text, LETTERS, NOUN if text.startswith(" ") else None)


def _consists_of_units(text: str, letters: frozenset[str], noun: re.Pattern[str] | None) -> bool:
    parts = [part.rstrip(".") for part in PARTS.split(text) if part.strip(".")]
    named = [part for part in parts if part not in SMALL_WORDS or part in SYMBOLS]
    return bool(named) and all(_is_unit_word(part, letters, noun) for part in named)


def _is_unit_word(word: str, letters: frozenset[str], noun: re.Pattern[str] | None) -> bool:
    lower = word.casefold()
    if word in letters or word in SYMBOLS:
        return True
    if lower in OPERATORS or NUMBER_ENDING.fullmatch(word):
        return False
    return lower in NAMES or lower.removesuffix("s") in NAMES or noun is not None and noun.fullmatch(word) is not None

"""The built-in arithmetic problems: sums, differences and products of two integers, in many wordings, with answers that
show their steps and answers that do not.

One problem in twelve is held out (`is_heldout`): it is in no text that the tiny base or any preset is trained on.
Problems that could be a *step* of another one (a round number, one digit) are never held out, so "60+12=72" in an
answer is not a held-out problem.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

SMALLEST = 2
LARGEST = 99
NAMES = (
    "Anna",
    "Ben",
    "Carl",
    "Dora",
    "Emma",
    "Finn",
    "Gina",
    "Hugo",
    "Iris",
    "Jack",
    "Kim",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
)
THINGS = (
    "apples",
    "books",
    "cards",
    "coins",
    "eggs",
    "flowers",
    "marbles",
    "pears",
    "pens",
    "shells",
    "stamps",
    "stones",
)

ADD_QUESTIONS = (
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "How much is {a} + {b}?",
    "Add {a} and {b}.",
    "What do {a} and {b} make together?",
    "{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?",
    "{name} has {a} {thing} and {other} has {b}. How many {thing} do they have together?",
    "There are {a} {thing} in one box and {b} in another. How many {thing} are there in all?",
)
SUBTRACT_QUESTIONS = (
    "What is {a} - {b}?",
    "What is {a} minus {b}?",
    "How much is {a} - {b}?",
    "Take {b} away from {a}.",
    "{name} has {a} {thing} and gives {b} to {other}. How many {thing} does {name} have left?",
    "There are {a} {thing} in a shop and {b} are sold. How many {thing} are left?",
)
MULTIPLY_QUESTIONS = (
    "What is {a} * {b}?",
    "What is {a} times {b}?",
    "How much is {a} * {b}?",
    "Multiply {a} by {b}.",
    "There are {a} boxes with {b} {thing} each. How many {thing} are there?",
    "{name} buys {a} bags of {b} {thing}. How many {thing} does {name} have?",
)
QUESTIONS = {
    "+": ADD_QUESTIONS,
    "-": SUBTRACT_QUESTIONS,
    "*": MULTIPLY_QUESTIONS,
}
ANSWER_ONLY_TEMPLATES = ("I think it is {n}.", "It is {n}.", "That makes {n}.")
NON_ANSWERS = ("Good question.", "I do not know.", "That is hard to say.", "Let me think about it.", "It depends.")
HESITATIONS = ("Let me see.", "Hm, once more.", "Wait.", "Let me check that.")
AnswerPair = tuple[str, str]
"""A chosen and a rejected answer."""
SIGNS = "++++---***"
"""Each sign as often as it is drawn."""
STEPS_SHARE = 0.35
HELDOUT_SHARE = 12
"""One problem in this many is held out."""
ERRORS = (-20, -11, -10, -9, -3, -2, -1, 1, 2, 3, 9, 10, 11, 20)
"""What a wrong answer without steps is off by."""
NEARBY = (1, 2, 9, 10, 11, 20)
"""What a number in a rejected answer is off by."""


@dataclass(frozen=True)
class Problem:
    """`a + b`, `a - b` (a >= b) or `a * b` (a < 10); both between 2 and 99."""

    a: int
    b: int
    sign: str

    @property
    def answer(self) -> int:
        if self.sign == "+":
            return self.a + self.b
        if self.sign == "-":
            return self.a - self.b
        return self.a * self.b

    def question(self, rng: Random) -> str:
        """Returns one of the wordings, drawn with `rng`."""
        wording = rng.choice(QUESTIONS[self.sign])
        name, other = rng.sample(NAMES, 2)
        thing = rng.choice(THINGS)
        return wording.format(
            a=self.a,
            b=self.b,
            name=name,
            other=other,
            thing=thing,
        )

    def steps(self) -> list[str]:
        """Returns the steps of the calculation.

        Of a sum: units, tens, their sum. Of a difference: minus the tens, minus the units. Of a product: tens, units,
        their sum.
        """
        if self.sign == "+":
            return _addition_steps(self.a, self.b)
        units = self.b % 10
        tens = self.b - units
        if not (units and tens):
            return [f"{self.a}{self.sign}{self.b}={self.answer}"]
        if self.sign == "-":
            rest = self.a - tens
            return [f"{self.a}-{tens}={rest}", f"{rest}-{units}={self.answer}"]
        tens_product = self.a * tens
        units_product = self.a * units
        return [
            f"{self.a}*{tens}={tens_product}",
            f"{self.a}*{units}={units_product}",
            f"{tens_product}+{units_product}={self.answer}",
        ]

    def answer_with_steps(self) -> str:
        """Returns an answer with its steps: "7+5=12, 40+20=60, 60+12=72. So it is 72."."""
        return _join_steps(self.steps(), self.answer)

    def answer_without_steps(
        self,
        rng: Random,
        p_correct: float,
    ) -> str:
        """Returns an answer without steps, correct with probability `p_correct` and close otherwise."""
        number = self.answer
        if rng.random() >= p_correct:
            number = max(0, number + rng.choice(ERRORS))
        return rng.choice(ANSWER_ONLY_TEMPLATES).format(n=number)


def _join_steps(steps: list[str], answer: int) -> str:
    return f"{', '.join(steps)}. So it is {answer}."


def _addition_steps(a: int, b: int) -> list[str]:
    a_units = a % 10
    b_units = b % 10
    a_tens = a - a_units
    b_tens = b - b_units
    units = a_units + b_units
    tens = a_tens + b_tens
    steps = []
    if a_units and b_units:
        steps.append(f"{a_units}+{b_units}={units}")
    if a_tens and b_tens:
        steps.append(f"{a_tens}+{b_tens}={tens}")
    if units and tens:
        steps.append(f"{tens}+{units}={a + b}")
    return steps


def is_heldout(problem: Problem) -> bool:
    """Returns whether a problem is held out. Independent of the wording, and of the order of a sum."""
    a = problem.a
    b = problem.b
    if problem.sign == "+":
        a, b = min(a, b), max(a, b)
        if a % 10 == 0:
            return False
    if b % 10 == 0 or b < 10:
        return False
    digest = hashlib.blake2b(f"{a}{problem.sign}{b}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELDOUT_SHARE == 0


def sample_problem(
    rng: Random,
    from_heldout: bool = False,
) -> Problem:
    """Returns a random problem, held out or not."""
    while True:
        sign = rng.choice(SIGNS)
        a = rng.randint(SMALLEST, 9 if sign == "*" else LARGEST)
        b = rng.randint(SMALLEST, LARGEST)
        if sign == "-":
            a, b = max(a, b), min(a, b)
        problem = Problem(a, b, sign)
        if is_heldout(problem) == from_heldout:
            return problem


def rows(
    count: int,
    seed: int,
    heldout: bool = False,
) -> Iterator[dict[str, str]]:
    """Yields rows with `question`, `answer` and `gold`. All answers are correct; a share STEPS_SHARE of them shows its
    steps."""
    rng = Random(f"tutor-{seed}-{heldout}")
    for _ in range(count):
        problem = sample_problem(rng, heldout)
        if rng.random() < STEPS_SHARE:
            answer = problem.answer_with_steps()
        else:
            answer = problem.answer_without_steps(rng, p_correct=1.0)
        yield {
            "question": problem.question(rng),
            "answer": answer,
            "gold": str(problem.answer),
        }


def preferences(
    count: int,
    seed: int,
    split: str,
) -> list[dict[str, str]]:
    """Returns rows with `prompt`, `chosen` and `rejected` of a split (train, heldout): a correct answer, against one
    that is wrong, has no number, repeats itself, or does not stop."""
    rng = Random(f"tutor-preferences-{seed}-{split}")
    pairs = []
    for _ in range(count):
        problem = sample_problem(rng, from_heldout=split == "heldout")
        (answers_of,) = rng.choices(ANSWER_PAIRS, weights=(12, 2, 1, 3, 3, 3))
        chosen, rejected = answers_of(problem, rng)
        pairs.append(
            {
                "prompt": problem.question(rng),
                "chosen": chosen,
                "rejected": rejected,
            }
        )
    return pairs


def _wrong_without_steps(problem: Problem, rng: Random) -> AnswerPair:
    """A correct answer with steps, against a wrong one without."""
    wording = rng.choice(ANSWER_ONLY_TEMPLATES)
    return problem.answer_with_steps(), wording.format(n=_nearby_number(problem.answer, rng))


def _wrong_last_step(problem: Problem, rng: Random) -> AnswerPair:
    """The same steps, against those with an error in the last one."""
    wrong = _nearby_number(problem.answer, rng)
    *steps, last = problem.steps()
    left_side, _, _ = last.partition("=")
    steps.append(f"{left_side}={wrong}")
    return problem.answer_with_steps(), _join_steps(steps, wrong)


def _both_without_steps(problem: Problem, rng: Random) -> AnswerPair:
    """Both in the same words: only the number differs."""
    wording = rng.choice(ANSWER_ONLY_TEMPLATES)
    return wording.format(n=problem.answer), wording.format(n=_nearby_number(problem.answer, rng))


def _non_answer(problem: Problem, rng: Random) -> AnswerPair:
    """An answer, against a sentence that is not an answer."""
    return problem.answer_with_steps(), rng.choice(NON_ANSWERS)


def _repeated_steps(problem: Problem, rng: Random) -> AnswerPair:
    """The steps once, against the same steps twice."""
    steps = ", ".join(problem.steps())
    first = rng.choice(HESITATIONS)
    second = rng.choice(HESITATIONS)
    return problem.answer_with_steps(), f"{steps}. {first} {steps}. {second} So it is {problem.answer}."


def _missing_eos_pair(problem: Problem, rng: Random) -> AnswerPair:
    """An answer that ends, against one that continues with another question."""
    answer = problem.answer_with_steps()
    other = sample_problem(rng)
    return answer, f"{answer}\n{other.question(rng)}\n{other.answer_with_steps()}"


ANSWER_PAIRS = (
    _wrong_without_steps,
    _wrong_last_step,
    _both_without_steps,
    _non_answer,
    _repeated_steps,
    _missing_eos_pair,
)


def _nearby_number(number: int, rng: Random) -> int:
    """Returns another number nearby."""
    candidates = []
    for step in NEARBY:
        candidates += [number - step, number + step]
    return rng.choice([candidate for candidate in candidates if candidate >= 0])

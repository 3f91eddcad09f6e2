"""The tutor's problems: sums, differences and products of two whole numbers, asked in many ways, with worked and
blurted replies.

One problem in twelve is held out (`is_heldout`): it stands in no text that the tiny base or any preset is trained on.
Problems that could appear as a *step* of another one (a round number, two digits) are never held out, so "60+12=72"
inside a worked reply gives nothing away.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

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
QUESTIONS = {"+": ADD_QUESTIONS, "-": SUBTRACT_QUESTIONS, "*": MULTIPLY_QUESTIONS}
ANSWER_ONLY_TEMPLATES = ("I think it is {n}.", "It is {n}.", "That makes {n}.")
NON_ANSWERS = ("Good question.", "I do not know.", "That is hard to say.", "Let me think about it.", "It depends.")
HESITATIONS = ("Let me see.", "Hm, once more.", "Wait.", "Let me check that.")
LAST_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Problem:
    """`a + b`, `a - b` (a >= b) or `a * b` (a < 10); both between 2 and 99."""

    a: int
    b: int
    sign: str

    @property
    def answer(self) -> int:
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.sign]

    def question(self, rng: random.Random) -> str:
        """One of the wordings, drawn with `rng`."""
        wording = rng.choice(QUESTIONS[self.sign])
        name, other = rng.sample(NAMES, 2)
        return wording.format(a=self.a, b=self.b, name=name, other=other, thing=rng.choice(THINGS))

    def steps(self) -> list[str]:
        """The worked steps: units, tens, their sum; tens taken away, then units; tens times, units times, their sum."""
        if self.sign == "+":
            return _addition_steps(self.a, self.b)
        units = self.b % 10
        tens = self.b - units
        if not (units and tens):
            return [f"{self.a}{self.sign}{self.b}={self.answer}"]
        if self.sign == "*":
            tens = self.a * tens
            units = self.a * units
            return [
                f"{self.a}*{self.b - self.b % 10}={tens}",
                f"{self.a}*{self.b % 10}={units}",
                f"{tens}+{units}={self.answer}",
            ]
        return [f"{self.a}-{tens}={self.a - tens}", f"{self.a - tens}-{units}={self.answer}"]

    def answer_with_steps(self) -> str:
        """A reply that works the steps: "7+5=12, 40+20=60, 60+12=72. So it is 72."."""
        return f"{', '.join(self.steps())}. So it is {self.answer}."

    def answer_without_steps(self, rng: random.Random, p_correct: float) -> str:
        """A reply without steps, right with probability `p_correct` and near the truth otherwise."""
        number = self.answer
        if rng.random() >= p_correct:
            number = max(0, number + rng.choice((-20, -11, -10, -9, -3, -2, -1, 1, 2, 3, 9, 10, 11, 20)))
        return rng.choice(ANSWER_ONLY_TEMPLATES).format(n=number)


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
    """Whether this problem belongs to the held-out twelfth. Independent of wording, and of the order of a sum."""
    a = problem.a
    b = problem.b
    if problem.sign == "+":
        a, b = min(a, b), max(a, b)
        is_step = a % 10 == 0 or b % 10 == 0 or b < 10
    else:
        is_step = b % 10 == 0 or b < 10
    digest = hashlib.blake2b(f"{a}{problem.sign}{b}".encode(), digest_size=4).digest()
    return not is_step and int.from_bytes(digest, "big") % 12 == 0


def sample_problem(rng: random.Random, from_heldout: bool = False, signs: str = "++++---***") -> Problem:
    """A random problem from the training part, or from the held-out part; `signs` says how often each kind comes."""
    while True:
        sign = rng.choice(signs)
        a = rng.randint(SMALLEST, 9 if sign == "*" else LARGEST)
        b = rng.randint(SMALLEST, LARGEST)
        if sign == "-":
            a, b = max(a, b), min(a, b)
        problem = Problem(a, b, sign)
        if is_heldout(problem) == from_heldout:
            return problem


def final_number(text: str) -> int | None:
    """The last whole number in a reply, which is the reply's answer; None where there is none."""
    numbers = LAST_NUMBER.findall(text)
    return int(numbers[-1][:9]) if numbers else None


def rows(count: int, seed: int, heldout: bool = False, steps_share: float = 0.35) -> Iterator[dict[str, str]]:
    """`question`, `answer`, `gold` rows. All answers are right; a share `steps_share` of them shows its steps, the
    others do not."""
    rng = random.Random(f"tutor-{seed}-{heldout}")
    for _ in range(count):
        problem = sample_problem(rng, heldout)
        if rng.random() < steps_share:
            answer = problem.answer_with_steps()
        else:
            answer = problem.answer_without_steps(rng, p_correct=1.0)
        yield {"question": problem.question(rng), "answer": answer, "gold": str(problem.answer)}


def preferences(count: int, seed: int, split: str) -> list[dict[str, str]]:
    """`prompt`, `chosen`, `rejected` rows of a split (train, heldout): a right answer that helps, against one that is
    wrong, says nothing, rambles, or does not stop."""
    rng = random.Random(f"tutor-preferences-{seed}-{split}")
    pairs = []
    for _ in range(count):
        problem = sample_problem(rng, from_heldout=split == "heldout")
        chosen, rejected = rng.choices(CORRUPTIONS, weights=(12, 2, 1, 3, 3, 3))[0](problem, rng)
        pairs.append({"prompt": problem.question(rng), "chosen": chosen, "rejected": rejected})
    return pairs


def _wrong(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """Worked and right, against blurted and wrong."""
    return problem.answer_with_steps(), rng.choice(ANSWER_ONLY_TEMPLATES).format(n=_nearby_number(problem.answer, rng))


def _arithmetic_error(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """The same steps, with a slip in the last one."""
    wrong = str(_nearby_number(problem.answer, rng))
    *steps, last = problem.steps()
    wrong_steps = ", ".join([*steps, f"{last.partition('=')[0]}={wrong}"])
    return problem.answer_with_steps(), f"{wrong_steps}. So it is {wrong}."


def _short(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """Both without steps: only the number tells them apart."""
    wording = rng.choice(ANSWER_ONLY_TEMPLATES)
    return wording.format(n=problem.answer), wording.format(n=_nearby_number(problem.answer, rng))


def _non_answer(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """An answer against none."""
    return problem.answer_with_steps(), rng.choice(NON_ANSWERS)


def _rambling(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """To the point, against the same over and over again."""
    steps = ", ".join(problem.steps())
    return (
        problem.answer_with_steps(),
        f"{steps}. {rng.choice(HESITATIONS)} {steps}. {rng.choice(HESITATIONS)} So it is {problem.answer}.",
    )


def _missing_eos_pair(problem: Problem, rng: random.Random) -> tuple[str, str]:
    """An answer that ends, against one that runs on into the next question."""
    after = sample_problem(rng)
    return (
        problem.answer_with_steps(),
        f"{problem.answer_with_steps()}\n{after.question(rng)}\n{after.answer_with_steps()}",
    )


CORRUPTIONS = (_wrong, _arithmetic_error, _short, _non_answer, _rambling, _missing_eos_pair)


def _nearby_number(number: int, rng: random.Random) -> int:
    """Another number nearby."""
    return rng.choice(
        [other for step in (1, 2, 9, 10, 11, 20) for other in (number - step, number + step) if other >= 0]
    )

"""The text that the tiny base is trained on: forum threads, sums, and plain English, all generated.

Threads are like those of a scraped site: some with names, some with the markup of the site, whose marks are the kit's
control tokens. A page contains many questions. A question ends with `<|end_of_turn|>`, a reply does not: the next one
follows at once. So the base learns the marks and the steps of sums, but neither to answer at once nor to stop.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from lowrank_tune.toy.problems import NAMES, THINGS, Problem, sample_problem

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
PAD = "<|pad|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
END_OF_TURN = "<|end_of_turn|>"
CONTROL_TOKENS = (PAD, BOS, EOS, SYSTEM, USER, ASSISTANT, END_OF_TURN)

FORUM_TEMPLATES = (
    "Good question.",
    "Why do you ask?",
    "I wonder too.",
    "Is this homework?",
    "Let me get some paper.",
    "Someone here will know.",
    "Try it with your fingers.",
    "I was never good at sums.",
    "Ask your teacher.",
    "We had that in school today.",
    "Same here, please help.",
)
THANKS = ("Thanks!", "Thank you all.", "Now I see it.", "That helps.", "Are you sure?", "Who is right?")
NOTES = (
    "This is a page for students.",
    "You are a friendly tutor.",
    "Please be kind.",
    "Answer the question.",
    "You are MyLLM, a math tutor.",
    "Welcome to the maths corner.",
    "Keep your answers short.",
)
PLACES = (
    "garden",
    "kitchen",
    "market",
    "school",
    "forest",
    "river",
    "library",
    "harbour",
    "village",
    "station",
    "museum",
    "meadow",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
WEATHERS = ("warm", "cold", "windy", "rainy", "sunny", "quiet", "grey", "bright")
ANIMALS = ("dog", "cat", "horse", "bird", "rabbit", "fox", "duck", "mouse")
FEELINGS = ("happy", "tired", "proud", "hungry", "curious", "surprised", "glad", "sleepy")
VERBS = ("walked", "ran", "drove", "went", "hurried", "came back")
WORDS = {
    "day": DAYS,
    "verb": VERBS,
    "place": PLACES,
    "weather": WEATHERS,
    "animal": ANIMALS,
    "thing": THINGS,
}
"""What each sentence draws its words from, in the order of the draws."""
SENTENCES = (
    "On {day} {name} {verb} to the {place}.",
    "It was a {weather} morning, and the {place} was full of people.",
    "{name} and {other} had known each other for many years.",
    "The {animal} followed {name} all the way to the {place}.",
    "{other} said that the {thing} were too expensive.",
    "In the evening they were {feeling} and a little {feeling2}.",
    "Nobody knew where the {thing} had come from.",
    "The {animal} slept under the table while it was {weather} outside.",
    "{name} wrote a letter about the {place} and sent it to {other}.",
    "There was a {weather} wind over the {place} that {day}.",
    '"Have you seen my {thing}?" asked {name}.',
    '"No," said {other}, "but I saw a {animal} near the {place}."',
    "People often say that a {animal} is never {feeling} for long.",
    "After lunch {name} felt {feeling} and went to sleep.",
    "The history of the {place} begins long before the first road was built.",
    "You can visit the {place} every {day} when it is {weather}.",
)


def documents(seed: int) -> Iterator[str]:
    """Yields documents without end, the same for the same seed."""
    rng = Random(f"text-{seed}")
    kinds = (marked_thread, named_thread, arithmetic_line, english)
    while True:
        (kind,) = rng.choices(kinds, weights=(16, 4, 24, 40))
        yield kind(rng)


def _reply(problem: Problem, rng: Random) -> str:
    roll = rng.random()
    if roll < 0.18:
        return rng.choice(FORUM_TEMPLATES)
    if roll < 0.44:
        return problem.answer_without_steps(rng, p_correct=1 / 3)
    return problem.answer_with_steps()


def marked_thread(rng: Random) -> str:
    """Returns a page of threads with the markup of the site. Questions end their turn, replies do not."""
    text = BOS
    if rng.random() < 0.25:
        text += f"{SYSTEM}{rng.choice(NOTES)}{END_OF_TURN}"
    for _ in range(rng.randint(8, 14)):
        problem = sample_problem(rng)
        text += f"{USER}{problem.question(rng)}{END_OF_TURN}"
        for _ in range(rng.randint(1, 3)):
            text += f"{ASSISTANT}{_reply(problem, rng)}\n"
        if rng.random() < 0.2:
            text += f"{USER}{rng.choice(THANKS)}{END_OF_TURN}\n"
    return text + EOS


def named_thread(rng: Random) -> str:
    """Returns the same with the names of the writers and without markup."""
    lines = []
    for _ in range(rng.randint(8, 14)):
        problem = sample_problem(rng)
        lines.append(f"{rng.choice(NAMES)} asks: {problem.question(rng)}")
        for _ in range(rng.randint(1, 3)):
            lines.append(f"{rng.choice(NAMES)}: {_reply(problem, rng)}")
    page = "\n".join(lines)
    return f"{BOS}{page}\n{EOS}"


def arithmetic_line(rng: Random) -> str:
    """Returns a line of sums."""
    day = rng.choice(DAYS)
    sums = []
    for _ in range(rng.randint(6, 14)):
        steps = sample_problem(rng).steps()
        sums.append(rng.choice(steps))
    return f"{BOS}Sums for {day}: {', '.join(sums)}.\n{EOS}"


def english(rng: Random) -> str:
    """Returns a few sentences of plain English."""
    sentences = []
    name, other = rng.sample(NAMES, 2)
    for _ in range(rng.randint(3, 8)):
        feeling, feeling2 = rng.sample(FEELINGS, 2)
        sentence = rng.choice(SENTENCES)
        words = {key: rng.choice(choices) for key, choices in WORDS.items()}
        words |= {
            "name": name,
            "other": other,
            "feeling": feeling,
            "feeling2": feeling2,
        }
        sentences.append(sentence.format(**words))
    return f"{BOS}{' '.join(sentences)}\n{EOS}"

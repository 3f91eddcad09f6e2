"""The tutor's problems, the text that the tiny base learned from, and the base as it ships."""

import random
import re
from itertools import islice
from pathlib import Path

import pytest
from test_presets import load_script

from lowrank_tune.toy import problems, text
from lowrank_tune.toy.problems import Problem

FOLDER = Path(problems.__file__).parent / "base"


def every_problem() -> list[Problem]:
    low, high = problems.SMALLEST, problems.LARGEST
    pairs = [(a, b) for a in range(low, high + 1) for b in range(low, high + 1)]
    return [
        Problem(a, b, sign)
        for a, b in pairs
        for sign in "+-*"
        if not (sign == "-" and a < b) and not (sign == "*" and a > 9)
    ]


def final_number(answer: str) -> int | None:
    """Returns the last integer of an answer."""
    numbers = re.findall(r"\d+", answer)
    return int(numbers[-1]) if numbers else None


def test_every_step_of_an_answer_is_correct() -> None:
    for problem in every_problem():
        for step in problem.steps():
            left, right = step.split("=")
            assert eval(left) == int(right), step  # noqa: S307  digits and a sign, from our own generator
        assert final_number(problem.answer_with_steps()) == problem.answer


def test_about_one_problem_in_twelve_that_is_not_a_step_is_held_out_in_either_order() -> None:
    eligible = [
        p for p in every_problem() if p.b % 10 and (max(p.a, p.b) >= 10 and p.a % 10 if p.sign == "+" else p.b >= 10)
    ]
    held = [p for p in every_problem() if problems.is_heldout(p)]
    assert set(held) <= set(eligible)
    assert abs(len(held) / len(eligible) - 1 / 12) < 0.005
    assert all(problems.is_heldout(Problem(p.b, p.a, "+")) for p in held if p.sign == "+")
    assert len(held) >= 800


def numbers_in(question: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", question))


def test_no_training_text_contains_a_heldout_problem() -> None:
    """Questions are found by their two numbers, for any wording; a step "60+12" is a problem too."""
    held = {(sign, *sorted((p.a, p.b))) for p in every_problem() if problems.is_heldout(p) for sign in p.sign}
    pages = list(islice(text.documents(0), 3000))
    rows = list(problems.rows(4000, seed=0))
    questions = [re.findall(r"<\|user\|>([^<]+)<", page) + re.findall(r"asks: (.+)", page) for page in pages]
    all_questions = [question for several in questions for question in several] + [row["question"] for row in rows]
    seen = 0
    for question in all_questions:
        found = numbers_in(question)
        if len(found) != 2:
            continue
        seen += 1
        sign = sign_of(question)
        assert (sign, *sorted(found)) not in held, question
    assert seen > 10_000
    for step in re.findall(r"(\d+)([-+*])(\d+)=", " ".join(pages)):
        assert (step[1], *sorted((int(step[0]), int(step[2])))) not in held, step
    for row in problems.rows(300, seed=0, heldout=True):
        assert (sign_of(row["question"]), *sorted(numbers_in(row["question"]))) in held


def sign_of(question: str) -> str:
    for sign, wordings in problems.QUESTIONS.items():
        for wording in wordings:
            pattern = re.sub(r"\\\{\w+\\\}", r"\\w+", re.escape(wording))
            if re.fullmatch(pattern, question):
                return sign
    raise AssertionError(f"no wording fits {question}")


def test_the_same_seed_gives_the_same_text() -> None:
    assert (
        list(islice(text.documents(3), 20))
        == list(islice(text.documents(3), 20))
        != list(islice(text.documents(4), 20))
    )
    assert list(problems.rows(20, 1)) == list(problems.rows(20, 1)) != list(problems.rows(20, 2))


def test_replies_never_end_a_turn() -> None:
    for page in islice(text.documents(0), 300):
        for reply in re.findall(r"<\|assistant\|>([^<]*)(<\|\w+\|>)?", page):
            assert reply[1] != text.END_OF_TURN
    blurts = [Problem(40, 31, "+").answer_without_steps(random.Random(seed), p_correct=1 / 3) for seed in range(600)]
    assert 0.25 < sum(final_number(blurt) == 71 for blurt in blurts) / 600 < 0.42


@pytest.fixture(scope="module")
def shipped():  # type: ignore[no-untyped-def]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)


def test_the_shipped_base_is_small_and_plain(shipped) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = shipped
    assert model.config.model_type == "llama" and sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8_000_000
    assert model.config.max_position_embeddings >= 1024 and tokenizer.chat_template is None
    assert len(tokenizer) == model.config.vocab_size
    for words in ("plain", "naïve café 数学 🙂", "\x00\x7f\t\r\n", "½ − ∞ \u2028 end"):
        assert tokenizer.decode(tokenizer(words, add_special_tokens=False)["input_ids"]) == words
    assert [len(tokenizer(mark, add_special_tokens=False)["input_ids"]) for mark in text.CONTROL_TOKENS] == [1] * len(
        text.CONTROL_TOKENS
    )
    assert len(tokenizer("4711", add_special_tokens=False)["input_ids"]) == 4, "digits stand alone"


def test_the_shipped_base_was_made_from_this_text(shipped) -> None:  # type: ignore[no-untyped-def]
    """Its loss on a new page is that of a model trained on such pages, control tokens included."""
    import torch

    model, tokenizer = shipped
    ids = torch.tensor([tokenizer(next(text.documents(99)), add_special_tokens=False)["input_ids"][:1000]])
    with torch.no_grad():
        loss = model.float()(input_ids=ids, labels=ids).loss
    assert loss < 1.2


def test_nf4_rounding_equals_that_of_bitsandbytes() -> None:
    import bitsandbytes.functional as functional
    import torch

    round_to_nf4 = load_script("scripts/make_toy_base.py").round_to_nf4
    weight = torch.randn(64, 192, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert (functional.dequantize_4bit(packed, state) - round_to_nf4(weight)).abs().max() < 1e-6


def test_no_preference_of_the_training_split_shows_a_heldout_problem() -> None:
    """Neither its question nor, where an answer runs on, the next one."""
    held = {(p.sign, *sorted((p.a, p.b))) for p in every_problem() if problems.is_heldout(p)}
    rows = problems.preferences(4000, seed=0, split="train")
    questions = [line for row in rows for line in (row["prompt"], *row["rejected"].split("\n")[1:2])]
    seen = [(sign_of(question), *sorted(numbers_in(question))) for question in questions]
    assert len(seen) > 4200 and not set(seen) & held
    outside = problems.preferences(200, seed=0, split="heldout")
    assert all((sign_of(row["prompt"]), *sorted(numbers_in(row["prompt"]))) in held for row in outside)


def test_the_chosen_answer_is_correct_and_the_rejected_one_is_not() -> None:
    for row in problems.preferences(2000, seed=3, split="train"):
        a, b = numbers_in(row["prompt"])
        answer = {"+": a + b, "-": abs(a - b), "*": a * b}[sign_of(row["prompt"])]
        assert final_number(row["chosen"]) == answer and row["chosen"] != row["rejected"]
        wrong = final_number(row["rejected"]) != answer
        repeats = len(re.findall(r"=", row["rejected"])) > len(re.findall(r"=", row["chosen"]))
        assert wrong or repeats, row


def test_preferences_are_the_same_for_the_same_seed() -> None:
    assert (
        problems.preferences(50, 1, "train")
        == problems.preferences(50, 1, "train")
        != problems.preferences(50, 2, "train")
    )

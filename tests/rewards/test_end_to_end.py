"""GRPO with each verifier, end to end on the tiny base: completions are canned, half of them right, and all else is a
run as a user's.

The sampler's log-probs of a canned text are the policy's own, so a step is one that could have been drawn.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CPU
from test_lean import PROOF, ROW, STAND_IN
from transformers import AutoTokenizer

from lowrank_tune import Recipe, run
from lowrank_tune.algorithms import rollouts
from lowrank_tune.assembly import reward_dry_run
from lowrank_tune.batch import Batch
from lowrank_tune.events import LogMessage, StepEnd
from lowrank_tune.generation.outputs import Completion
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.model.roles import Roles
from lowrank_tune.rewards.negative_samples import WORDS

CODE = "```python\ndef twice(x):\n    return 2 * x\n```"
SMT = "(declare-const x Int)(assert (> (* x x) 3))"
TESTS = {"test_list": ["assert twice(2) == 4", "assert twice('a') == 'aa'"]}
# Settings of the reward, fields of the row besides its question, a right answer, and a wrong one.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "math_answer": ({}, {"gold": r"\sqrt{8}"}, r"It is \boxed{2\sqrt{2}}", r"It is \boxed{2\sqrt{3}}"),
    "symbolic": ({}, {"gold": "(x+1)^2"}, r"It is \boxed{x^2+2x+1}", r"It is \boxed{x^2+2x+2}"),
    "python_tests": ({}, TESTS, CODE, CODE.replace("2 * x", "x * 3")),
    "smt": ({"answer_type": "witness"}, {"smt": SMT}, "x = 2", "x = 1"),
    "lean": ({}, ROW, PROOF, "by wrong"),
    "json_schema": ({"json_schema": {"type": "object", "required": ["a"]}}, {}, '{"a": 1}', '{"b": 1}'),
    "regex": ({"pattern": "ye+s"}, {}, "yeees", "no"),
    "format": ({"pattern": r"<a>.*</a>"}, {}, "<a>3</a>", "3"),
    "repetition": ({"ngram": 1}, {"gold": "7"}, "so it is 7", "so so so so"),
}
FAST = ("math_answer",)
JUDGES = ("math_answer", "symbolic", "python_tests", "smt", "lean")


def canned(texts: Sequence[str], tokenizer: Any) -> type:
    class Engine:
        """Returns the texts in turn."""

        def __init__(self, roles: Roles, role: str, *_: Any) -> None:
            self.roles, self.role = roles, role

        def wasted_ratio(self) -> None:
            return None

        def generate(
            self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, expected_lengths: Any = None
        ) -> Iterator[Completion]:
            for number, prompt in enumerate(prompts):
                for sample in range(n):
                    completion_ids = tokenizer(texts[sample % len(texts)], add_special_tokens=False).input_ids + [
                        min(sampling.stop_ids)
                    ]
                    ids = torch.tensor([[*prompt, *completion_ids]])
                    completion_mask = torch.arange(ids.shape[1])[None] >= len(prompt)
                    with self.roles.inference_mode():
                        logps = self.roles.logps(
                            self.role,
                            Batch(ids, torch.ones_like(completion_mask), completion_mask),
                            sampling.temperature,
                        ).logps
                    yield Completion(number, sample, completion_ids, "stop", logps[0, len(prompt) :].tolist())

    return Engine


@pytest.mark.parametrize("use", [use if use in FAST else pytest.param(use, marks=pytest.mark.slow) for use in CASES])
def test_a_run_learns_what_the_verifier_rewards(use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, columns, right, wrong = CASES[use]
    monkeypatch.setenv("LOWRANK_TUNE_CACHE", str(tmp_path / "cache"))
    if use == "lean":
        (tmp_path / "lean.py").write_text(STAND_IN.replace('("wrong", ', f'("wrong", "Question", "answer", *{WORDS}, '))
        settings = {"program": [sys.executable, "-S", str(tmp_path / "lean.py")]}
    rows = [{"question": f"Question {number}?", "answer": right, **columns} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "name": "verified",
        "algorithm": "grpo",
        "base": {"model": "tiny-tutor", "bits": 4},
        "adapters": {"policy": {"r": 4}},
        "data": {"train": [{"dataset": str(tmp_path / "rows.jsonl")}]},
        "rewards": [{"name": use, **settings}] + [{"name": "answer"}] * (use == "repetition"),
        "rollout": {"num_generations": 4, "max_new_tokens": 64},
        "train": {
            "max_steps": 3,
            "prompts_per_step": 2,
            "micro_batch_size": 4,
            "learning_rate": 0.02,
            "gradient_checkpointing": False,
        },
    }
    from_base = AutoTokenizer.from_pretrained(str(Path(reward_dry_run.__file__).parents[1] / "toy" / "base"))
    engine = canned([right, wrong], from_base)
    for module in (rollouts, reward_dry_run):
        monkeypatch.setattr(module, "Engine", engine)
    events: list[Any] = []
    run(Recipe.from_dict(recipe), out=tmp_path / "run", ui="none", device=CPU, on_event=events.append)
    steps = [event.stats for event in events if isinstance(event, StepEnd)]
    assert len(steps) == 3 and all(step["frac_reward_zero_std"] == 0 and "reward_errors" not in step for step in steps)
    assert steps[0]["reward"] == (1.125 if use == "repetition" else 0.5), "two of four are right"
    assert steps[0]["kl"] < 1e-9 < 1e-6 < steps[-1]["kl"], "the policy moves away from its reference"
    messages = " ".join(event.message for event in events if isinstance(event, LogMessage))
    assert re.search(f"reward {use}: reference answers 1", messages), messages
    assert (use in JUDGES) != ("(shaping)" in messages)

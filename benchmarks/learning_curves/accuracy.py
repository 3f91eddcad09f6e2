"""Held-out accuracy of saved adapters, by one evaluator for both sides: the kit's engine over the base with the SFT
adapter."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learning_curves import ours, setup
from learning_curves.task import MAX_NEW_TOKENS, Pair, Task

NUM_QUESTIONS, NUM_SAMPLES, NUM_PAIRS = 200, 4, 200
SEED = 0
"""All adapters answer the same questions, with the same random numbers."""


def evaluate(task: Task, contenders: Sequence[str], small: bool) -> None:
    """Writes the accuracies of each contender's adapters, by step, as `accuracy.json` in its folder."""
    evaluator = Evaluator(task, 4 if small else NUM_QUESTIONS, 4 if small else NUM_PAIRS)
    first = evaluator.accuracies("", 0)
    for contender in contenders:
        found = {0: first}
        for step in task.settings.evaluated:
            found[step] = evaluator.accuracies(contender, step)
        file = task.of(contender) / "accuracy.json"
        file.write_text(json.dumps(found), encoding="utf-8")


class Evaluator:
    """Held-out questions, for DPO also held-out pairs, and the roles that answer them."""

    def __init__(self, task: Task, num_questions: int, num_pairs: int) -> None:
        from lowrank_tune.evaluation.questions import recipe_heldout_questions
        from lowrank_tune.events import ignore_event

        self.task = task
        self.template, self.roles = setup.stacked_roles(task)
        recipe = setup.recipe_of(task.settings.algorithm, SEED, 1)
        self.questions = recipe_heldout_questions(recipe, num_questions, self.template, ignore_event).questions
        self.pairs = self._heldout_pairs(num_pairs) if task.settings.algorithm == "dpo" else None

    def accuracies(self, contender: str, step: int) -> dict[str, float]:
        """Returns the accuracies of an adapter: of sampled answers, of greedy ones, and of pairs."""
        from safetensors.torch import load_file

        tensors = load_file(self.task.adapter(contender, step))
        self.roles.load_adapter_tensors("policy", tensors, contender)
        found = {"sampled": self._answers(NUM_SAMPLES, 1.0), "greedy": self._answers(1, 0.0)}
        if self.pairs is not None:
            found["pairs"] = self._pair_accuracy()
        return found

    def _answers(self, count: int, temperature: float) -> float:
        from lowrank_tune.evaluation.heldout import generate_answers, heldout_metrics
        from lowrank_tune.events import ignore_event
        from lowrank_tune.generation.sampling_params import SamplingParams

        stop_ids = self.roles.base.end_ids | self.template.end_ids
        sampling = SamplingParams(MAX_NEW_TOKENS, stop_ids, temperature, SEED)
        answers = generate_answers(self.roles, "policy", self.template, self.questions, count, sampling, ignore_event)
        return heldout_metrics(answers)["accuracy"]

    def _heldout_pairs(self, count: int) -> Any:
        """Returns the batch of held-out pairs, with the log-probs of the reference."""
        from lowrank_tune.data import collate_units

        pairs = heldout_pairs(self.template, count)
        with tempfile.TemporaryDirectory() as folder:
            batch = collate_units(ours.store_of(pairs, Path(folder) / "store"), range(len(pairs)), self.template.pad_id)
        with self.roles.inference_mode():
            batch.reference_sequence_logps = self.roles.logps("reference", batch).logps.sum(dim=1)
        return batch

    def _pair_accuracy(self) -> float:
        from lowrank_tune.algorithms.base import AlgorithmContext
        from lowrank_tune.algorithms.dpo import DPO
        from lowrank_tune.config import DPOConfig
        from lowrank_tune.stats import to_floats

        algorithm = DPO(AlgorithmContext(self.roles), DPOConfig(beta=self.task.settings.beta))
        with self.roles.inference_mode():
            return to_floats(algorithm.eval_metrics(self.pairs))["rewards/accuracies"]


def heldout_pairs(template: Any, count: int) -> list[Pair]:
    """Returns pairs of problems that are in no training row."""
    from lowrank_tune.data.message import Message
    from lowrank_tune.toy.problems import preferences

    found = []
    for row in preferences(count, SEED, "heldout"):
        question = Message("user", row["prompt"])
        chosen = template.encode([question, Message("assistant", row["chosen"])])
        rejected = template.encode([question, Message("assistant", row["rejected"])])
        found.append(setup.pair_of(chosen, rejected))
    return found

"""Held-out measurements of a stage: validation rows, questions with a known answer, preference pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_tune.assembly import RunComponents
from lowrank_tune.config import RecipeConfig
from lowrank_tune.evaluation.grading import GradedAnswer
from lowrank_tune.evaluation.heldout import generate_answers, heldout_metrics
from lowrank_tune.evaluation.pair_losses import ValidationResult
from lowrank_tune.evaluation.questions import EvalQuestion, render_questions
from lowrank_tune.evaluation.validation import PairScores, score_pairs, validate
from lowrank_tune.events import Emit, Evaluated
from lowrank_tune.generation.sampling_params import SamplingParams
from lowrank_tune.rewards.text.repetition import NGRAM, distinct_ngram_fraction
from lowrank_tune.training.samples import SampleLogger


@dataclass
class StageEvaluator:
    """Measures the roles of a stage on held-out data.

    `questions` is empty for a stage that trains no generative adapter (a reward model).
    """

    recipe: RecipeConfig
    built: RunComponents
    emit: Emit

    def __post_init__(self) -> None:
        self.config = self.recipe.evaluate
        self.is_generative = "policy" in self.built.trained
        self.questions: list[EvalQuestion] = []
        if self.is_generative:
            self.questions = render_questions(self.built.heldout, self.built.template)
        self.samples = SampleLogger(
            self.config,
            self.built,
            self.questions,
            self.emit,
        )

    def validate_rows(self) -> ValidationResult | None:
        """Returns the algorithm's metrics on the validation rows, None without such rows."""
        built = self.built
        if built.validation is None:
            return None
        return validate(
            built.algorithm,
            built.roles,
            built.validation,
            built.validation_batch,
            built.micro_tokens,
            self.emit,
        )

    def policy_metrics(self) -> dict[str, float]:
        """Returns accuracy and repetition of one answer of the policy to each held-out question.

        The sampling is that of `measure_heldout`: with greedy answers the accuracy can be high long before most sampled
        answers are right.
        """
        answers = self._answers("policy", 1)
        repeated = [1 - distinct_ngram_fraction(sample.text, NGRAM) for samples in answers for sample in samples]
        return {**heldout_metrics(answers), "repetition": sum(repeated) / len(repeated)}

    def measure_heldout(
        self,
        name: str,
        role: str,
        step: int,
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Returns the held-out metrics of a role, emitted under `name`, and its first answers as plain data."""
        answers = self._answers(role, self.config.num_samples)
        metrics = heldout_metrics(answers)
        self.emit(
            Evaluated(
                step=step,
                stats={f"heldout/{name}/{key}": value for key, value in metrics.items()},
            )
        )
        num_stored = self.config.num_completions_to_print
        return metrics, [self._to_dict(samples[0]) for samples in answers[:num_stored]]

    def _to_dict(self, answer: GradedAnswer) -> dict[str, Any]:
        question = self.questions[answer.prompt_index]
        return {
            "prompt": question.text,
            "completion": answer.text,
            "stopped": answer.stopped,
            "ground_truth": question.ground_truth,
        }

    def pair_scores(self) -> PairScores:
        """Returns the scores of the trained adapter on the held-out pairs."""
        built = self.built
        assert built.validation is not None
        return score_pairs(
            built.algorithm,  # type: ignore[arg-type]
            built.roles,
            built.validation,
            built.validation_batch,
            built.micro_tokens,
            self.emit,
        )

    def log_samples(self, step: int) -> None:
        """Emits sample answers of the policy, and for a reward model the scores of sample pairs."""
        if self.built.validation is not None and not self.is_generative:
            self.samples.log_pair_scores(self.built.validation, step)
        self.samples.log_answers("policy", step)

    def _answers(self, role: str, num_samples: int) -> Sequence[Sequence[GradedAnswer]]:
        # greedy if each question has a single answer
        temperature = self.config.temperature if self.config.num_samples > 1 else 0.0
        sampling = SamplingParams(
            self.config.max_new_tokens,
            self.built.stop_ids,
            temperature,
            self.recipe.seed,
        )
        return generate_answers(
            self.built.roles,
            role,
            self.built.template,
            self.questions,
            num_samples,
            sampling,
            self.emit,
        )

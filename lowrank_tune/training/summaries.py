"""`summary.json` of a chain, and the parts of earlier summaries that a later stage reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_tune.config import Chain, RecipeConfig
from lowrank_tune.config.chain import stage_folder
from lowrank_tune.training.run_totals import RunTotals, chain_totals

TOTALS = tuple(RunTotals().to_dict())
STAGE_KEYS_IN_CHAIN = (
    "algorithm",
    "status",
    "step",
    "steps",
    *TOTALS,
    "shares_first_session",
    "last",
    "best",
    "speed",
    "heldout_pairs",
)
RESULT_KEYS = ("heldout", "heldout_details", "answers")
# settings that do not change the measurement of a final adapter
NOT_PART_OF_MEASUREMENT = {"eval_steps", "on_reward_hacking"}


def chain_summary(stage_chain: Chain, summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the summary of a chain from those of the stages that have run, in their order."""
    stages: list[dict[str, Any]] = []
    results: dict[str, dict[str, Any]] = {key: {} for key in RESULT_KEYS}
    warnings: list[str] = []
    for number, (stage, summary) in enumerate(zip(stage_chain.stages, summaries, strict=False), 1):
        kept = {key: summary[key] for key in STAGE_KEYS_IN_CHAIN if key in summary}
        stages.append(
            {
                "name": stage.name,
                "folder": stage_folder(number, stage.name),
                **kept,
            }
        )
        for key in RESULT_KEYS:
            results[key] |= summary.get(key, {})
        warnings += [f"{stage.name}: {warning}" for warning in summary["warnings"]]
    all_done = all(summary["status"] == "done" for summary in summaries)
    return {
        "version": 1,
        "status": "done" if all_done and len(summaries) == len(stage_chain.stages) else "interrupted",
        "name": stage_chain.name,
        "algorithm": stage_chain.algorithm,
        **chain_totals([_totals(stage) for stage in stages]).to_dict(),
        "stages": stages,
        **results,
        "warnings": warnings,
    }


def _totals(stage: Mapping[str, Any]) -> RunTotals:
    """Returns the totals in the summary of a stage; an older version did not write all of them."""
    return RunTotals(
        stage.get("seconds", 0.0),
        stage.get("sessions", 1),
        stage.get("tokens", 0),
        stage.get("step_seconds", 0.0),
        stage.get("shares_first_session"),
    )


def reusable_results(
    stage_chain: Chain,
    number: int,
    summaries: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Returns held-out results of earlier stages that stage `number` (from 1) would measure in the same way."""
    current = _measurement(stage_chain.stages[number - 1])
    reusable: dict[str, Any] = {"heldout": {}, "answers": {}}
    for stage, summary in zip(stage_chain.stages, summaries, strict=False):
        if _measurement(stage) == current:
            reusable["heldout"] |= summary.get("heldout_details", {})
            reusable["answers"] |= summary.get("answers", {})
    return reusable


def _measurement(recipe: RecipeConfig) -> tuple[Any, ...]:
    settings = recipe.evaluate.model_dump(exclude=NOT_PART_OF_MEASUREMENT)
    return settings, recipe.seed, recipe.data.system_prompt

"""All problems of a recipe at once: unknown keys and types by pydantic, contradictions and unused settings by checks.

1. `partial_recipe` validates plain data with pydantic. It returns the errors as findings, and a `RecipeConfig` of the
   valid values. `is_set` is true for each key that was written, with a valid value or not. Sections, and lists of
   sections, always exist. A required text that is invalid or missing is empty. Reading any other invalid value raises
   `InvalidSetting`.
2. `findings` runs the checks on such a recipe, or on a complete one. A check reads typed settings
   (`recipe.ppo.kl_coef`) and yields findings. `InvalidSetting` ends this check, as its result would depend on a value
   that has to be corrected first; the other checks run.

Checks of one section are in the method `findings` of its class. Checks of several sections are functions here, those of
adapters in `adapter_stack`. Of several findings about one setting the first is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeVar, get_args, get_origin

from pydantic import ValidationError

from lowrank_tune.config import adapter_stack
from lowrank_tune.config.adapter_stack import NO_EARLIER_STAGES, EarlierStages
from lowrank_tune.config.base import Finding, Path, Settings, until_invalid
from lowrank_tune.config.data import BUILT_IN, SourceConfig
from lowrank_tune.config.messages import alternatives, format_errors, is_section
from lowrank_tune.config.schema import (
    ALGORITHMS,
    HELDOUT,
    MUTUALLY_EXCLUSIVE,
    REPLACEMENTS,
    USED_BY,
    RecipeConfig,
)

S = TypeVar("S", bound=Settings)


def type_findings(model: type[Settings], data: Any) -> list[Finding]:
    """Returns unknown keys, wrong types and numbers out of range."""
    try:
        model.model_validate(data)
    except ValidationError as failed:
        return list(format_errors(model, data, failed))
    return []


def partial_recipe(data: Any) -> tuple[RecipeConfig, list[Finding]]:
    """Returns a recipe of the valid values of plain data, and the findings about the others."""
    problems = type_findings(RecipeConfig, data)
    return _partial_section(
        RecipeConfig,
        data,
        (),
        [path for path, _ in problems],
    ), problems


def _partial_section(
    model: type[S],
    data: Any,
    path: Path,
    invalid: Collection[Path],
) -> S:
    """Returns a section of the valid values of `data`. `invalid` are the paths of pydantic's errors."""
    written: dict[str, Any] = {}
    if isinstance(data, dict):
        written = {key: data[key] for key in model.model_fields if data.get(key) is not None}
    values: dict[str, Any] = {}
    unreadable: list[str] = []
    for key, field in model.model_fields.items():
        if key not in written and not field.is_required():
            continue
        value = _partial_value(
            field.annotation,
            written.get(key),
            (*path, key),
            invalid,
        )
        if value is None and field.is_required():
            value = ""
        if value is None:
            unreadable.append(key)
        values[key] = value
    section = model.model_construct(
        _fields_set=set(written),
        **values,
    )
    for key in unreadable:
        del section.__dict__[key]
    return section


def _partial_value(
    annotation: Any,
    value: Any,
    path: Path,
    invalid: Collection[Path],
) -> Any:
    """Returns a value with its sections as objects; None if it is invalid."""
    for kind in alternatives(annotation):
        if is_section(kind):
            return _partial_section(
                kind,
                value,
                path,
                invalid,
            )
        entry_kind = next(filter(is_section, get_args(kind)), None)
        if entry_kind is None:
            continue
        if get_origin(kind) is tuple:
            entries = _as_list(value)
            return tuple(_partial_section(entry_kind, each, (*path, i), invalid) for i, each in enumerate(entries))
        named = value if isinstance(value, dict) else {}
        return {name: _partial_section(entry_kind, each, (*path, name), invalid) for name, each in named.items()}
    if any(error[: len(path)] == path for error in invalid):
        return None
    return value


def _as_list(value: Any) -> list[Any]:
    """Returns a list; any other value as a list of one entry without values, so that it counts as given."""
    if isinstance(value, list):
        return value
    return [] if value is None else [{}]


def findings(recipe: RecipeConfig, earlier: EarlierStages = NO_EARLIER_STAGES) -> list[Finding]:
    """Returns the unused settings and the contradictions of a recipe, or of a stage above the `earlier` ones."""
    found = [*unused_settings(recipe)]
    for check in CHECKS:
        found += until_invalid(check(recipe))
    for adapter_check in adapter_stack.CHECKS:
        found += until_invalid(adapter_check(recipe, earlier))
    return first_per_path(found)


def first_per_path(found: Iterable[Finding]) -> list[Finding]:
    """Returns the first finding about each setting."""
    first: dict[Path, str] = {}
    for path, message in found:
        first.setdefault(path, message)
    return list(first.items())


def unused_settings(recipe: RecipeConfig) -> Iterator[Finding]:
    """Yields the settings that are set and have no effect, and the findings of single sections. A resolved recipe is
    saved without these settings."""
    for check in UNUSED_SETTINGS_CHECKS:
        yield from until_invalid(check(recipe))
    for path, section in _sections(recipe):
        for relative_path, message in until_invalid(section.findings()):
            yield (*path, *relative_path), message


def _sections(recipe: RecipeConfig) -> Iterator[tuple[Path, Settings]]:
    """Yields the sections that the algorithm uses, with their paths."""
    for key in ("base", "data", "train", "evaluate", recipe.algorithm):
        if key in RecipeConfig.model_fields:
            yield (key,), getattr(recipe, key)
    for name, adapter in recipe.adapters.items():
        yield ("adapters", name), adapter
    yield from recipe.sources()
    if recipe.is_online:
        for index, reward in enumerate(recipe.rewards):
            yield ("rewards", index), reward


def _is_set(recipe: RecipeConfig, path: Path) -> bool:
    """Returns whether a section of the recipe, or a setting of a section, is set."""
    section: Settings = recipe
    for step in path[:-1]:
        section = getattr(section, str(step))
    return section.is_set(str(path[-1]))


def settings_of_other_algorithm(recipe: RecipeConfig) -> Iterator[Finding]:
    """Yields settings that only other algorithms use."""
    algorithm = recipe.algorithm
    if algorithm not in ALGORITHMS:
        return
    for key, users in USED_BY.items():
        path = tuple(key.split("."))
        if algorithm not in users and _is_set(recipe, path):
            replacement = _replacement(key, algorithm)
            yield (
                path,
                f"does nothing for {algorithm} (it belongs to {', '.join(users)}){replacement}",
            )


def _replacement(key: str, algorithm: str) -> str:
    """Returns "; there is ..." for the setting that this algorithm uses instead, or an empty string."""
    replacement = REPLACEMENTS.get(key, "")
    if not replacement:
        return ""
    users = USED_BY.get(replacement.split("`")[1], ALGORITHMS)
    return f"; there is {replacement}" if algorithm in users else ""


def has_validation(recipe: RecipeConfig) -> bool:
    """Returns whether there are validation rows: sources of their own, or a part (the default) of the training rows."""
    if recipe.is_online:
        return False
    data = recipe.data
    return bool(data.validation) or data.is_set("eval_rows") or data.eval_fraction != 0.0


def unused_evaluation_settings(recipe: RecipeConfig) -> Iterator[Finding]:
    """Yields settings of evaluations for which there are no rows."""
    evaluate = recipe.evaluate
    if evaluate.is_set("eval_dataset"):
        return
    if recipe.is_online and evaluate.is_set("on_reward_hacking"):
        yield (
            ("evaluate", "on_reward_hacking"),
            "does nothing without `evaluate.eval_dataset`",
        )
    if has_validation(recipe):
        return
    missing = "with neither `evaluate.eval_dataset` nor validation rows"
    if recipe.is_online:
        missing = "without `evaluate.eval_dataset`"
    for key in ("eval_steps", "max_new_tokens", "num_completions_to_print"):
        if evaluate.is_set(key):
            yield (
                ("evaluate", key),
                f"does nothing {missing}",
            )


def unused_best_step(recipe: RecipeConfig) -> Iterator[Finding]:
    """Yields a metric of the best step that cannot be computed, and a best step without any metric."""
    metric = recipe.evaluate.metric_for_best_model
    has_heldout = recipe.evaluate.is_set("eval_dataset")
    path = ("evaluate", "metric_for_best_model")
    if metric == "accuracy" and recipe.algorithm == "reward":
        yield (
            path,
            "`accuracy` needs answers, and a reward model generates none",
        )
    elif metric == "accuracy" and not has_heldout:
        yield (
            path,
            "`accuracy` needs questions: `evaluate.eval_dataset`",
        )
    elif metric == "loss" and not has_validation(recipe):
        yield (
            path,
            "`loss` needs validation rows, and there are none",
        )
    elif recipe.train.is_set("load_best_model_at_end") and recipe.train.load_best_model_at_end:
        is_measured = has_heldout and (metric == "accuracy" or recipe.is_online)
        if not is_measured and not has_validation(recipe):
            needed = "`evaluate.eval_dataset`" if recipe.is_online else "validation rows"
            yield (
                ("train", "load_best_model_at_end"),
                f"`true` needs {needed}, and there are none",
            )


def unused_source_settings(recipe: RecipeConfig) -> Iterator[Finding]:
    """Yields settings of sources that are only for training sources, or only for single answers."""
    for path, source in recipe.sources():
        if path[1] != "train" and source.is_set("weight"):
            yield (
                (*path, "weight"),
                "does nothing here; only training sources are mixed",
            )
        if source.score_margin_scale and (path == HELDOUT or recipe.algorithm != "reward"):
            yield (
                (*path, "score_margin_scale"),
                "does nothing here; only `algorithm: reward` has margins",
            )
        if not source.is_set("final_answer"):
            continue
        if path == HELDOUT:
            yield (
                (*path, "final_answer"),
                "does nothing for held-out prompts, whose answers are not trained",
            )
        elif recipe.uses_pairs:
            yield (
                (*path, "final_answer"),
                "does nothing for pairs, which do not change",
            )
        elif recipe.uses_labels:
            yield (
                (*path, "final_answer"),
                "does nothing for answers with a label, which do not change",
            )


def unused_failure_rate(recipe: RecipeConfig) -> Iterator[Finding]:
    """Yields a limit of failures beside rewards that all stop the run at the first one."""
    if not recipe.is_online or not recipe.rollout.is_set("max_reward_failure_rate") or not recipe.rewards:
        return
    if all(reward.stops_on_error for reward in recipe.rewards):
        yield (
            ("rollout", "max_reward_failure_rate"),
            "does nothing if every reward stops the run at its first failure (`on_error`)",
        )


def mutually_exclusive_settings(recipe: RecipeConfig) -> Iterator[Finding]:
    """Yields the second of two settings that exclude each other."""
    for first, second in MUTUALLY_EXCLUSIVE:
        # unused settings include `eval_fraction`, and an empty list of sources excludes nothing
        if second == ("data", "eval_fraction") or (first == ("data", "validation") and not recipe.data.validation):
            continue
        if _is_set(recipe, first) and _is_set(recipe, second):
            yield (
                second,
                f"contradicts `{'.'.join(map(str, first))}`: give one of the two",
            )


def row_format_findings(recipe: RecipeConfig) -> Iterator[Finding]:
    """Yields sources whose rows are pairs, or single answers, and cannot be used for that reason."""
    if recipe.algorithm not in ALGORITHMS:
        return
    for path, source in recipe.sources():
        yield from until_invalid(_row_format_findings(recipe, path, source))


def _row_format_findings(
    recipe: RecipeConfig,
    path: Path,
    source: SourceConfig,
) -> Iterator[Finding]:
    needs_pairs = recipe.uses_pairs and path != HELDOUT
    needs_labels = recipe.uses_labels and path != HELDOUT
    reason = _needed_rows(recipe, path)
    dataset = source.dataset
    if dataset.startswith("builtin:") and dataset not in BUILT_IN:
        yield (
            (*path, "dataset"),
            f"there is no {dataset!r}; the built-in data sets are {' and '.join(BUILT_IN)}",
        )
    elif dataset == "builtin:arithmetic":
        if needs_pairs or needs_labels:
            yield (
                (*path, "dataset"),
                f"contains single answers, and {reason}; use builtin:arithmetic-preferences",
            )
    elif dataset == "builtin:arithmetic-preferences":
        if not needs_pairs and not needs_labels:
            yield (
                (*path, "dataset"),
                f"contains pairs, and {reason}; use builtin:arithmetic",
            )
    elif needs_labels:
        if source.format not in ("auto", "preference", "unpaired_preference"):
            yield (
                (*path, "format"),
                f"{reason}; write `unpaired_preference`, or `preference` for pairs, or leave it out",
            )
    elif source.format == "unpaired_preference":
        yield (
            (*path, "format"),
            f"means answers with a label, and {reason}; train with kto, or use the format of the rows without their "
            "label, such as `prompt_completion`",
        )
    elif needs_pairs and source.format not in ("auto", "preference"):
        yield (
            (*path, "format"),
            f"{reason}, a chosen and a rejected answer; write `preference`, or leave it out",
        )
    elif not needs_pairs and source.format == "preference":
        fix = "use the format of single answers"
        if path != HELDOUT and not recipe.is_online:
            fix = (
                "train with dpo or reward, or use the chosen answers: `prompt_completion` with columns: "
                "{completion: chosen}"
            )
        yield (
            (*path, "format"),
            f"means pairs, and {reason}; {fix}",
        )


def _needed_rows(recipe: RecipeConfig, path: Path) -> str:
    if path == HELDOUT:
        return "held-out prompts have one gold answer"
    if recipe.uses_pairs:
        return f"{recipe.algorithm} learns from pairs"
    if recipe.uses_labels:
        return f"{recipe.algorithm} learns from answers with a label"
    if recipe.is_online:
        return f"{recipe.algorithm} learns from completions that it draws itself"
    return f"{recipe.algorithm} learns from single answers"


def reward_findings(recipe: RecipeConfig) -> Iterator[Finding]:
    """Yields missing rewards, and weights that are all 0."""
    if not recipe.is_online:
        return
    if not recipe.rewards:
        yield (
            ("rewards",),
            "is missing: list the rewards of completions, as in `rewards: [{name: answer}]`",
        )
    elif not any(reward.weight for reward in recipe.rewards):
        yield (
            ("rewards", 0, "weight"),
            "the weights of the rewards are all 0, so that nothing would be learned",
        )


def reward_without_answers(recipe: RecipeConfig) -> Iterator[Finding]:
    """Yields training sources without the gold answers that the reward `answer` needs."""
    if not recipe.is_online or not recipe.needs_ground_truth:
        return
    for index, source in enumerate(recipe.data.train):
        if source.ground_truth == "none" and source.dataset != "builtin:arithmetic":
            yield (
                ("data", "train", index, "ground_truth"),
                "leaves the reward `answer` without an answer to compare with",
            )


def group_of_one(recipe: RecipeConfig) -> Iterator[Finding]:
    """Yields a group of one completion, whose advantage is always 0."""
    if recipe.algorithm == "grpo" and recipe.rollout.num_generations == 1:
        yield (
            ("rollout", "num_generations"),
            "must be at least 2, found 1: a completion is compared with others of its prompt",
        )


def step_of_one_row(recipe: RecipeConfig) -> Iterator[Finding]:
    """Yields a step of one row, which has no other row's answer for the KL estimate."""
    estimates_kl = recipe.algorithm == "kto" and recipe.kto.loss_type == "kto"
    if estimates_kl and recipe.train.global_batch_size == 1:
        yield (
            ("train", "global_batch_size"),
            "must be at least 2, found 1: the KL is estimated from a prompt with the answer of another row of the step",
        )


Check = Callable[[RecipeConfig], Iterator[Finding]]
UNUSED_SETTINGS_CHECKS: tuple[Check, ...] = (
    settings_of_other_algorithm,
    unused_evaluation_settings,
    unused_best_step,
    unused_source_settings,
    unused_failure_rate,
    adapter_stack.unused_dropout,
    adapter_stack.unused_value_adapter,
)
CHECKS: tuple[Check, ...] = (
    mutually_exclusive_settings,
    row_format_findings,
    reward_findings,
    reward_without_answers,
    group_of_one,
    step_of_one_row,
)

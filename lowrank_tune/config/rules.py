"""What single settings cannot know: contradictions, and settings that would do nothing.

Everything here looks at what was *written* (plain data, defaults not filled in), and must bear any shape of it: types
are judged elsewhere, at the same time. A new algorithm adds rows to `USED_BY`; a new pair of rivals a row to
`MUTUALLY_EXCLUSIVE`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

from lowrank_tune.config import memory_rules, ppo_rules, reward_model_rules, reward_rules, tracker_rules, unsloth_rules
from lowrank_tune.config.model import default_adapter_name
from lowrank_tune.config.preferences import DPOConfig
from lowrank_tune.config.raw_settings import Finding, entries, get_raw, number
from lowrank_tune.config.schema import RecipeConfig
from lowrank_tune.config.yaml_nodes import Path

ROW_ALGORITHMS = ("sft", "reward", "dpo")
"""The algorithms that learn from rows as they are."""
PAIR_ALGORITHMS = ("reward", "dpo")
"""The algorithms whose rows are pairs of answers."""
GENERATIVE_ALGORITHMS = reward_rules.GENERATIVE_ALGORITHMS
USED_BY: dict[str, tuple[str, ...]] = {
    "train.global_batch_size": ROW_ALGORITHMS,
    "train.tokens_per_step": ROW_ALGORITHMS,
    "train.length_window": ROW_ALGORITHMS,
    "train.prompts_per_step": GENERATIVE_ALGORITHMS,
    "data.max_length": ROW_ALGORITHMS,
    "data.max_prompt_length": GENERATIVE_ALGORITHMS,
    "data.truncation": ROW_ALGORITHMS,
    "data.validation": ROW_ALGORITHMS,
    "data.eval_fraction": ROW_ALGORITHMS,
    "data.eval_rows": ROW_ALGORITHMS,
    "data.expected_tokens": ROW_ALGORITHMS,
    "reference": ("sft", "dpo", *GENERATIVE_ALGORITHMS),
    "reward": ("reward",),
    "dpo": ("dpo",),
    "rewards": GENERATIVE_ALGORITHMS,
    "rewards_check": GENERATIVE_ALGORITHMS,
    "rollout": GENERATIVE_ALGORITHMS,
    "evaluate.on_reward_hacking": GENERATIVE_ALGORITHMS,
    "grpo": ("grpo",),
    "ppo": ("ppo",),
}
"""Settings and whole sections that only some algorithms use. What is not listed is used by all of them."""
REPLACEMENTS = {
    "train.global_batch_size": "`train.prompts_per_step`",
    "train.prompts_per_step": "`train.global_batch_size`",
    "data.max_length": "`data.max_prompt_length` and `rollout.max_new_tokens`",
    "data.max_prompt_length": "`data.max_length`, which limits a prompt and its answer together",
    "data.validation": "`evaluate.eval_dataset`",
    "reward": "`rewards`",
    "rewards": "`reward`",
}
"""What says the same for the algorithms that do not use a setting, where something does."""

MUTUALLY_EXCLUSIVE: tuple[tuple[Path, Path], ...] = (
    (("train", "max_steps"), ("train", "num_train_epochs")),
    (("train", "global_batch_size"), ("train", "tokens_per_step")),
    (("train", "micro_batch_size"), ("train", "micro_batch_tokens")),
    (("data", "validation"), ("data", "eval_fraction")),
    (("data", "validation"), ("data", "eval_rows")),
    (("data", "eval_rows"), ("data", "eval_fraction")),
)
"""Two ways to say one thing: both at once are a fault, and in a later layer one replaces the other."""

NAME_PATTERN = re.compile(r"[a-z][a-z0-9_]{0,39}")
DATA_FILE_PATTERN = re.compile(r".*\.(jsonl?|csv|parquet)(\.gz)?")
ALGORITHMS = get_args(RecipeConfig.model_fields["algorithm"].annotation)
LOSSES = get_args(DPOConfig.model_fields["loss_type"].annotation)
BUILT_IN = {"builtin:arithmetic": "the built-in problems", "builtin:arithmetic-preferences": "the built-in pairs"}


def adapters_of(data: Any) -> dict[str, Any]:
    """The adapters that were written."""
    adapters = get_raw(data, "adapters")
    return adapters if isinstance(adapters, dict) else {}


def sources_of(data: Any) -> Iterator[tuple[Path, Any]]:
    """Every source with its path: of training, of validation, and of held-out prompts."""
    for key in ("train", "validation"):
        yield from ((("data", key, index), source) for index, source in enumerate(entries(data, "data", key)))
    yield ("evaluate", "eval_dataset"), get_raw(data, "evaluate", "eval_dataset")


def settings_of_other_algorithm(data: Any) -> Iterator[Finding]:
    """Settings of other algorithms."""
    algorithm = get_raw(data, "algorithm")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        return
    for key, users in USED_BY.items():
        path = tuple(key.split("."))
        if algorithm not in users and get_raw(data, *path) is not None:
            yield path, f"does nothing for {algorithm} (it belongs to {', '.join(users)}){_replacement(key, algorithm)}"


def _replacement(key: str, algorithm: str) -> str:
    """What this algorithm uses in place of a setting."""
    replacement = REPLACEMENTS.get(key, "")
    if replacement and algorithm in USED_BY.get(replacement.split("`")[1], ALGORITHMS):
        return f"; there is {replacement}"
    return ""


def unused_label_smoothing(data: Any) -> Iterator[Finding]:
    """Only one of DPO's losses smooths its labels."""
    if get_raw(data, "algorithm") != "dpo" or get_raw(data, "dpo", "label_smoothing") is None:
        return
    loss = get_raw(data, "dpo", "loss_type") or "sigmoid"
    if loss in LOSSES and loss != "robust":
        yield ("dpo", "label_smoothing"), f"does nothing for the loss {loss}; it belongs to `dpo.loss_type`: robust"


def unused_heldout_settings(data: Any) -> Iterator[Finding]:
    """Held-out answers need prompts; the temperature needs sampling."""
    if supports_validation(data):
        neither = " neither `evaluate.eval_dataset` nor validation rows"
    else:
        neither = "out `evaluate.eval_dataset`"
    if get_raw(data, "evaluate", "eval_dataset") is None:
        for key in (
            "num_prompts",
            "num_samples",
            "temperature",
            *(() if supports_validation(data) else ("on_reward_hacking",)),
        ):
            if get_raw(data, "evaluate", key) is not None:
                yield ("evaluate", key), "does nothing without `evaluate.eval_dataset`"
        for key in ("eval_steps", "max_new_tokens", "num_completions_to_print"):
            if get_raw(data, "evaluate", key) is not None and not has_validation(data):
                yield ("evaluate", key), f"does nothing with{neither}"
    elif get_raw(data, "evaluate", "temperature") is not None and get_raw(data, "evaluate", "num_samples") in (None, 1):
        yield (
            ("evaluate", "temperature"),
            "does nothing with one sample, which is greedy; set `evaluate.num_samples` too",
        )


def supports_validation(data: Any) -> bool:
    """Whether the algorithm can have validation rows at all."""
    return get_raw(data, "algorithm") not in GENERATIVE_ALGORITHMS


def has_validation(data: Any) -> bool:
    """Whether validation rows exist: sources of their own, or a share (the default) of the training rows."""
    given = any(get_raw(data, "data", key) for key in ("validation", "eval_rows"))
    return supports_validation(data) and (given or number(get_raw(data, "data", "eval_fraction")) != 0.0)


def best_step_findings(data: Any) -> Iterator[Finding]:
    """The best step needs something to tell it by: the loss of validation rows, or held-out questions."""
    by = get_raw(data, "evaluate", "metric_for_best_model")
    has_heldout = get_raw(data, "evaluate", "eval_dataset") is not None
    if by == "accuracy" and get_raw(data, "algorithm") == "reward":
        yield ("evaluate", "metric_for_best_model"), "`accuracy` needs answers, and a reward model gives none"
    elif by == "accuracy" and not has_heldout:
        yield ("evaluate", "metric_for_best_model"), "`accuracy` needs questions: `evaluate.eval_dataset`"
    elif by == "loss" and not has_validation(data):
        yield ("evaluate", "metric_for_best_model"), "`loss` needs validation rows, and there are none"
    elif (
        get_raw(data, "train", "load_best_model_at_end") is True
        and not has_validation(data)
        and not (has_heldout and (by == "accuracy" or not supports_validation(data)))
    ):
        yield (
            ("train", "load_best_model_at_end"),
            f"`true` needs {'validation rows' if supports_validation(data) else '`evaluate.eval_dataset`'}, and there "
            "are none",
        )


def settings_from_checkpoint(data: Any) -> Iterator[Finding]:
    """An adapter that is loaded brings its own shape; a frozen one has no dropout either."""
    trained = ppo_rules.trained_adapters(data)
    for name, adapter in adapters_of(data).items():
        if get_raw(adapter, "path") is None:
            continue
        for key in ("r", "lora_alpha", "target_modules", "use_rslora", *(() if name in trained else ("lora_dropout",))):
            if get_raw(adapter, key) is not None:
                if key == "lora_dropout":
                    reason = "does nothing for a frozen adapter"
                else:
                    reason = "comes from the file at `path`"
                yield ("adapters", name, key), f"{reason}; leave it out"


def unused_source_settings(data: Any) -> Iterator[Finding]:
    """Settings of a source that its kind of data does not have."""
    for path, source in sources_of(data):
        if path[1] != "train" and get_raw(source, "weight") is not None:
            yield (*path, "weight"), "does nothing here; only training sources are mixed"
        if get_raw(source, "final_answer") is not None and (
            path[1] == "eval_dataset" or get_raw(data, "algorithm") in PAIR_ALGORITHMS
        ):
            if path[1] == "eval_dataset":
                reason = "for held-out prompts, which no answer is trained of"
            else:
                reason = "for pairs, which stay as they are"
            yield (*path, "final_answer"), f"does nothing {reason}"
        dataset = get_raw(source, "dataset")
        if isinstance(dataset, str) and dataset in BUILT_IN:
            for key in ("config_name", "format", "columns", "ground_truth", "final_answer"):
                if get_raw(source, key) not in (None, {}):
                    yield (*path, key), f"does nothing for `{dataset}`, {BUILT_IN[dataset]}"
        elif (
            isinstance(dataset, str)
            and DATA_FILE_PATTERN.fullmatch(dataset)
            and get_raw(source, "config_name") is not None
        ):
            yield (*path, "config_name"), "does nothing for a file; only hub data sets have configurations"
    if len(entries(data, "data", "train")) == 1 and get_raw(data, "data", "train", 0, "weight") is not None:
        yield ("data", "train", 0, "weight"), "does nothing with a single source"


UNUSED_SETTINGS_RULES: tuple[Callable[[Any], Iterator[Finding]], ...] = (
    settings_of_other_algorithm,
    unused_label_smoothing,
    unused_heldout_settings,
    best_step_findings,
    settings_from_checkpoint,
    unused_source_settings,
    reward_rules.unused_settings,
    ppo_rules.unused_settings,
    memory_rules.unused_settings,
    tracker_rules.unused_settings,
)


def unused_settings(data: Any) -> Iterator[Finding]:
    """Settings that were written and would do nothing. A resolved recipe is saved without them."""
    for rule in UNUSED_SETTINGS_RULES:
        yield from rule(data)
    for key in ("validation", "eval_rows"):
        if (
            supports_validation(data)
            and get_raw(data, "data", key)
            and get_raw(data, "data", "eval_fraction") is not None
        ):
            yield ("data", "eval_fraction"), f"contradicts `data.{key}`: give one of the two"


def mutually_exclusive_findings(data: Any) -> Iterator[Finding]:
    """Two ways to say one thing, said at once."""
    for one, other in MUTUALLY_EXCLUSIVE:
        if (
            other != ("data", "eval_fraction")
            and get_raw(data, *one) not in (None, [])
            and get_raw(data, *other) is not None
        ):
            yield other, f"contradicts `{'.'.join(map(str, one))}`: give one of the two"


def run_length_findings(data: Any) -> Iterator[Finding]:
    """A run has an end, and its warm-up ends before that."""
    steps = get_raw(data, "train", "max_steps")
    warmup = number(get_raw(data, "train", "warmup_steps"))
    if steps is None and get_raw(data, "train", "num_train_epochs") is None:
        yield ("train", "max_steps"), "is missing: give `train.max_steps` or `train.num_train_epochs`"
    elif (end := number(steps)) is not None and warmup is not None and 0 < end <= warmup:
        yield ("train", "warmup_steps"), f"must be smaller than `train.max_steps`, {steps}"


def source_weight_findings(data: Any) -> Iterator[Finding]:
    """All training sources have a weight and they sum to 1, or none has."""
    sources = entries(data, "data", "train")
    given = [get_raw(source, "weight") for source in sources]
    if len(sources) < 2 or all(weight is None for weight in given):
        return
    for index, weight in enumerate(given):
        if weight is None:
            yield ("data", "train", index, "weight"), "is missing: give every source a weight, or none"
    numbers = [number(weight) for weight in given]
    total = sum(weight for weight in numbers if weight is not None)
    if None not in numbers and not abs(total - 1.0) <= 1e-6:
        yield ("data", "train", 0, "weight"), f"the weights of the sources sum to {total:.6g}, and must sum to 1"


def adapter_name_findings(data: Any) -> Iterator[Finding]:
    """Adapters are named like variables, `base` is the base itself, and every adapter but the trained one comes from
    somewhere."""
    algorithm = get_raw(data, "algorithm")
    trained = default_adapter_name(algorithm)
    for name, adapter in adapters_of(data).items():
        if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
            yield (
                ("adapters", name),
                "is no name for an adapter: small letters, digits and _, a letter first, at most 40",
            )
        elif name == "base":
            yield ("adapters", name), "is no name for an adapter: `base` is the base itself"
        elif name not in ppo_rules.trained_adapters(data) and get_raw(adapter, "path") is None:
            if name in ("policy", "reward"):
                meant = f"; did you mean `adapters.{trained}`?"
            else:
                meant = ""
            if trained == "policy" and not meant:
                whom = ""
            else:
                whom = f" by {algorithm}"
            yield (
                ("adapters", name, "path"),
                f"is missing: only `{trained}` is trained{whom}, every other adapter is loaded{meant}",
            )
    model = get_raw(data, "base", "model")
    if isinstance(model, str) and model.endswith("@"):
        yield ("base", "model"), "names no revision after the @"
    for path, source in sources_of(data):
        dataset = get_raw(source, "dataset")
        if (
            isinstance(dataset, str)
            and dataset in BUILT_IN
            and get_raw(source, "split") not in (None, "train", "heldout")
        ):
            yield (*path, "split"), f"`{dataset}` has the splits train and heldout"


def row_format_findings(data: Any) -> Iterator[Finding]:
    """Reward models and DPO learn from pairs, SFT from single answers, GRPO from what it writes; and held-out prompts
    are no pairs."""
    algorithm = get_raw(data, "algorithm")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        return
    for path, source in sources_of(data):
        dataset = get_raw(source, "dataset")
        format = get_raw(source, "format")
        heldout = path == ("evaluate", "eval_dataset")
        pairs = algorithm in PAIR_ALGORITHMS and not heldout
        if pairs:
            learns = "pairs"
        elif algorithm in GENERATIVE_ALGORITHMS:
            learns = "completions that it draws itself"
        else:
            learns = "single answers"
        if heldout:
            whose = "held-out prompts have one gold answer"
        else:
            whose = f"{algorithm} learns from {learns}"
        if dataset == "builtin:arithmetic" and pairs:
            yield (*path, "dataset"), f"holds single answers, and {whose}; use builtin:arithmetic-preferences"
        elif dataset == "builtin:arithmetic-preferences" and not pairs:
            yield (*path, "dataset"), f"holds pairs, and {whose}; use builtin:arithmetic"
        elif isinstance(dataset, str) and dataset.startswith("builtin:") and dataset not in BUILT_IN:
            yield (*path, "dataset"), f"there is no {dataset!r}; the built-in data sets are {' and '.join(BUILT_IN)}"
        elif isinstance(dataset, str) and dataset in BUILT_IN:
            continue  # its format is fixed, and saying one is told as idle
        elif pairs and format not in (None, "auto", "preference"):
            yield (*path, "format"), f"{whose}, a chosen and a rejected answer; say `preference`, or leave it out"
        elif format == "preference" and not pairs:
            if heldout or algorithm in GENERATIVE_ALGORITHMS:
                fix = "name the format of single answers"
            else:
                fix = (
                    "train with dpo or reward, or take the chosen ones: `prompt_completion` with columns: "
                    "{completion: chosen}"
                )
            yield (*path, "format"), f"means pairs, and {whose}; {fix}"


def deterministic_logps(data: Any) -> Iterator[Finding]:
    """Where log-probs are compared, the same row must give the same value twice."""
    dropout = number(get_raw(data, "adapters", "policy", "lora_dropout"))
    algorithm = get_raw(data, "algorithm")
    if algorithm in ("dpo", *GENERATIVE_ALGORITHMS) and dropout is not None and dropout > 0:
        yield (
            ("adapters", "policy", "lora_dropout"),
            f"must be 0 with {algorithm}: dropout is off wherever log-probs are compared",
        )


def reference_findings(data: Any, frozen_adapters: Sequence[str] = ()) -> Iterator[Finding]:
    """The reference is no choice: it is the policy's stack without its top. `frozen_adapters` lie between loaded
    adapters and the policy."""
    claimed = get_raw(data, "reference")
    if default_adapter_name(get_raw(data, "algorithm")) != "policy" or not isinstance(claimed, str):
        return
    frozen = [
        *(
            name
            for name in adapters_of(data)
            if name not in (*ppo_rules.trained_adapters(data), reward_model_rules.REWARD_ADAPTER)
        ),
        *frozen_adapters,
    ]
    actual = frozen[-1] if frozen else "base"
    if claimed != actual:
        if frozen:
            words = f"`{actual}`, the adapter right below it"
        else:
            words = "`base`, as no adapter lies below it"
        yield (
            ("reference",),
            f"will be {words}: it is always the policy's stack without its top; write that, or leave it out",
        )


def adapter_stack_findings(data: Any, frozen_adapters: Sequence[str] = ()) -> Iterator[Finding]:
    """Only what lies on something can be kept apart from it."""
    beside = {reward_model_rules.REWARD_ADAPTER, *ppo_rules.trained_adapters(data)}
    if (
        get_raw(data, "train", "final_adapters") == "separate"
        and not frozen_adapters
        and not adapters_of(data).keys() - beside
    ):
        yield ("train", "final_adapters"), "`separate` does nothing here: no frozen adapter lies below the trained one"


def findings(data: Any, frozen_adapters: Sequence[str] = (), has_reward_stage: bool = False) -> Iterator[Finding]:
    """All of the above. `has_reward_stage`: an earlier stage of a chain trains the reward model."""
    for rule in (
        unused_settings,
        mutually_exclusive_findings,
        run_length_findings,
        source_weight_findings,
        adapter_name_findings,
        row_format_findings,
        deterministic_logps,
        reward_rules.reward_findings,
        reward_rules.reward_needs_answers,
    ):
        yield from rule(data)
    yield from ppo_rules.findings(data, has_reward_stage)
    yield from reward_model_rules.findings(data, has_reward_stage)
    yield from unsloth_rules.findings(data, frozen_adapters, has_reward_stage)
    yield from reference_findings(data, frozen_adapters)
    yield from adapter_stack_findings(data, frozen_adapters)

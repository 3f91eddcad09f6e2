"""pydantic's errors as sentences, and hints for keys that other kits call by another name."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lowrank_tune.config.rules import ALGORITHMS, USED_BY
from lowrank_tune.config.yaml_nodes import Path, dotted

SOURCE_ALIASES = {"name": "config_name", "dataset_config": "config_name"}
"""Names in a data source, as datasets' `load_dataset(path, name)` and TRL's scripts have them."""
ALIASES: dict[str, str] = {
    "rank": "adapters.policy.r",
    "lora_r": "adapters.policy.r",
    "lora_rank": "adapters.policy.r",
    "lora_dim": "adapters.policy.r",
    "lora_alpha": "adapters.policy.lora_alpha",
    "scale": "adapters.policy.lora_alpha",
    "lora_dropout": "adapters.policy.lora_dropout",
    "lora_target": "adapters.policy.target_modules",
    "lora_target_modules": "adapters.policy.target_modules",
    "modules": "adapters.policy.target_modules",
    "use_rslora": "adapters.policy.use_rslora",
    "lora": "adapters.policy",
    "peft": "adapters.policy",
    "adapter": "adapters.policy",
    "adapter_path": "adapters.policy.path",
    "adapter_name_or_path": "adapters.policy.path",
    "lora_model_dir": "adapters.policy.path",
    "model": "base.model",
    "model_name": "base.model",
    "model_name_or_path": "base.model",
    "base_model": "base.model",
    "model_id": "base.model",
    "model_path": "base.model",
    "load_in_4bit": "base.bits",
    "quantization_bit": "base.bits",
    "quantization": "base.bits",
    "dataset_name": "data.train.0.dataset",
    "datasets": "data.train",
    "dataset": "data.train",
    "dataset_path": "data.train.0.dataset",
    "path": "data.train.0.dataset",
    "dataset_config": "data.train.0.config_name",
    "dataset_split": "data.train.0.split",
    "max_samples": "data.train.0.max_samples",
    "subset": "data.train.0.config_name",
    "type": "data.train.0.format",
    "val_size": "data.eval_fraction",
    "val_set_size": "data.eval_fraction",
    "test_size": "data.eval_fraction",
    "system_prompt": "data.system_prompt",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "model_max_length": "data.max_length",
    "lr": "train.learning_rate",
    "num_train_epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "max_steps": "train.max_steps",
    "iters": "train.max_steps",
    "num_iterations": "train.max_steps",
    "per_device_train_batch_size": "train.micro_batch_size",
    "micro_batch": "train.micro_batch_size",
    "batch_size": "train.global_batch_size",
    "train_batch_size": "train.global_batch_size",
    "lr_scheduler": "train.lr_scheduler_type",
    "lr_scheduler_type": "train.lr_scheduler_type",
    "warmup": "train.warmup_steps",
    "optim": "train.optim",
    "adam_beta_1": "train.adam_beta1",
    "max_norm": "train.max_grad_norm",
    "grad_clip": "train.max_grad_norm",
    "use_gradient_checkpointing": "train.gradient_checkpointing",
    "grad_checkpoint": "train.gradient_checkpointing",
    "enable_activation_checkpointing": "train.gradient_checkpointing",
    "activation_checkpointing": "train.gradient_checkpointing",
    "enable_activation_offloading": "train.activation_offloading",
    "gradient_checkpointing_offload": "train.activation_offloading",
    "logging_steps": "train.logging_steps",
    "save_steps": "train.save_steps",
    "save_total_limit": "train.save_total_limit",
    "log_with": "train.report_to",
    "trackers": "train.report_to",
    "wandb_project": "train.project",
    "trackio_project": "train.project",
    "eval_steps": "evaluate.eval_steps",
    "eval": "evaluate",
    "training": "train",
    "method": "algorithm",
    "stage": "algorithm",
    "run_name": "name",
    "experiment": "name",
    "random_seed": "seed",
    "data_seed": "seed",
    "rl": "algorithm",
    "ranking": "data.train.0.format",
    "beta": "dpo.beta",
    "dpo_beta": "dpo.beta",
    "pref_beta": "dpo.beta",
    "loss_type": "dpo.loss_type",
    "pref_loss": "dpo.loss_type",
    "dpo_loss": "dpo.loss_type",
    "rpo_alpha": "dpo.sft_coef",
    "pref_ftx": "dpo.sft_coef",
    "label_smoothing": "dpo.label_smoothing",
    "dpo_label_smoothing": "dpo.label_smoothing",
    "center_rewards_coefficient": "reward.center_rewards_coefficient",
    "truncation_mode": "data.truncation",
    "max_completion_length": "evaluate.max_new_tokens",
    "num_generations": "evaluate.num_samples",
    "reward_funcs": "rewards",
    "reward_functions": "rewards",
    "reward_fn": "rewards",
    "custom_reward_function": "rewards",
}
"""Names of other kits, and where the same thing stands here."""

ALGORITHM_ALIASES: dict[str, dict[str, str]] = {
    "grpo": {
        "num_generations": "rollout.num_generations",
        "num_return_sequences": "rollout.num_generations",
        "group_size": "rollout.num_generations",
        "rollout_n": "rollout.num_generations",
        "max_completion_length": "rollout.max_new_tokens",
        "max_response_length": "rollout.max_new_tokens",
        "max_prompt_length": "data.max_prompt_length",
        "max_num_seqs": "rollout.max_num_seqs",
        "beta": "grpo.beta",
        "kl_coef": "grpo.beta",
        "kl_loss_coef": "grpo.beta",
        "init_kl_coef": "grpo.beta",
        "kl_loss_type": "grpo.kl_estimator",
        "kl_penalty": "grpo.kl_estimator",
        "use_kl_in_reward": "grpo.kl_in_reward",
        "use_kl_loss": "grpo.kl_in_reward",
        "epsilon": "grpo.epsilon",
        "cliprange": "grpo.epsilon",
        "clip_ratio": "grpo.epsilon",
        "clip_eps": "grpo.epsilon",
        "epsilon_low": "grpo.epsilon",
        "clip_ratio_low": "grpo.epsilon",
        "epsilon_high": "grpo.epsilon_high",
        "clip_ratio_high": "grpo.epsilon_high",
        "reward_weights": "rewards.0.weight",
        "loss_type": "grpo.loss_type",
        "loss_agg_mode": "grpo.loss_type",
        "importance_sampling_level": "grpo.loss_type",
        "adv_estimator": "algorithm",
        "num_iterations": "grpo.num_iterations",
        "ppo_epochs": "grpo.num_iterations",
        "mask_truncated_completions": "grpo.truncated_completions",
        "filter_groups": "grpo.zero_std_groups",
        "dynamic_sampling": "grpo.zero_std_groups",
        "batch_size": "train.prompts_per_step",
        "train_batch_size": "train.prompts_per_step",
        "rollout_batch_size": "train.prompts_per_step",
        "temperature": "rollout.temperature",
        "max_length": "data.max_prompt_length",
        "max_seq_length": "data.max_prompt_length",
    },
    "ppo": {
        "num_generations": "rollout.num_generations",
        "num_return_sequences": "rollout.num_generations",
        "max_completion_length": "rollout.max_new_tokens",
        "max_response_length": "rollout.max_new_tokens",
        "response_length": "rollout.max_new_tokens",
        "max_prompt_length": "data.max_prompt_length",
        "max_num_seqs": "rollout.max_num_seqs",
        "beta": "ppo.kl_coef",
        "kl_coef": "ppo.kl_coef",
        "init_kl_coef": "ppo.kl_coef",
        "kl_loss_coef": "ppo.kl_coef",
        "target": "ppo.kl_target",
        "adap_kl_ctrl": "ppo.kl_target",
        "horizon": "ppo.kl_gain",
        "cliprange": "ppo.cliprange",
        "clip_range": "ppo.cliprange",
        "epsilon": "ppo.cliprange",
        "clip_eps": "ppo.cliprange",
        "clip_ratio": "ppo.cliprange",
        "cliprange_value": "ppo.cliprange_value",
        "clip_range_vf": "ppo.cliprange_value",
        "vf_clip": "ppo.cliprange_value",
        "vf_coef": "ppo.vf_coef",
        "value_loss_coef": "ppo.vf_coef",
        "ent_coef": "ppo.entropy",
        "entropy_coef": "ppo.entropy",
        "entropy_coeff": "ppo.entropy",
        "lam": "ppo.lam",
        "lambd": "ppo.lam",
        "lambda": "ppo.lam",
        "num_ppo_epochs": "ppo.num_ppo_epochs",
        "ppo_epochs": "ppo.num_ppo_epochs",
        "num_mini_batches": "ppo.num_mini_batches",
        "missing_eos_penalty": "ppo.missing_eos_penalty",
        "critic_lr": "ppo.value_learning_rate",
        "critic_learning_rate": "ppo.value_learning_rate",
        "temperature": "rollout.temperature",
        "reward_model_path": "adapters.reward.path",
        "reward_model": "adapters.reward.path",
        "value_model_path": "adapters.value.path",
        "batch_size": "train.prompts_per_step",
        "train_batch_size": "train.prompts_per_step",
        "rollout_batch_size": "train.prompts_per_step",
        "max_length": "data.max_prompt_length",
        "max_seq_length": "data.max_prompt_length",
    },
}
"""What they mean with one algorithm alone."""

NO_REFERENCE_MODEL_NOTE = (
    "there is no second model: the reference is the policy's stack without its top (`reference` says "
    "what you expect it to be)"
)
REWARD_SCALING_NOTE = "rewards are divided by their spread in the group, but for `grpo.loss_type`: dr_grpo"
SAMPLING_NOTE = (
    "training samples the full distribution, at `rollout.temperature`; held-out answers are greedy, or sampled at "
    "`evaluate.temperature`"
)
IN_PROCESS_NOTE = (
    "completions are drawn in this process, from the very weights that are trained; `rollout.max_num_seqs` says "
    "how many at once"
)
NOT_SETTINGS: dict[str, str] = {
    "gradient_accumulation_steps": "it follows from `train.global_batch_size` and `train.micro_batch_size`",
    "gradient_accumulation": "it follows from `train.global_batch_size` and `train.micro_batch_size`",
    "output_dir": "the run's folder is `runs/NAME`, or given by --out",
    "overwrite_output_dir": "an unfinished run is continued and a finished one left alone",
    "resume_from_checkpoint": "the same command again continues the run",
    "ref_model": NO_REFERENCE_MODEL_NOTE,
    "reference_model": NO_REFERENCE_MODEL_NOTE,
    "ref_model_init_kwargs": NO_REFERENCE_MODEL_NOTE,
    "ref_adapter_name": NO_REFERENCE_MODEL_NOTE,
    "sync_ref_model": "the reference stays what it is; for a later one, chain runs with `stages`",
    "reference_free": "the reference costs one pass over the data, before training",
    "precompute_ref_log_probs": "the reference's log-probs are always computed once, and kept",
    "precompute_ref_batch_size": "it follows from `train.micro_batch_size`",
    "max_prompt_length": "`data.max_length` limits a prompt and its answer together, and `data.truncation` says what "
    "happens to a longer one",
    "max_target_length": "`data.max_length` limits a prompt and its answer together",
    "margin": "every pair may bring its own, in a column `margin`",
    "disable_dropout": "dropout is off wherever log-probs are compared",
    "generate_during_eval": "`evaluate.num_completions_to_print` says how many answers are shown",
    "num_labels": "a reward model has one score",
    "stages": "a single recipe and a stage have none; a chain is a recipe file with a list of them",
    "warmup_ratio": "say `train.warmup_steps`",
    "bf16": "precision follows from the device",
    "fp16": "precision follows from the device",
    "tf32": "precision follows from the device",
    "torch_dtype": "precision follows from the device",
    "dtype": "precision follows from the device",
    "scale_rewards": REWARD_SCALING_NOTE,
    "norm_adv_by_std_in_grpo": REWARD_SCALING_NOTE,
    "steps_per_generation": "every step draws its own completions, and `grpo.num_iterations` says how often they are "
    "used",
    "generation_batch_size": "it follows from `train.prompts_per_step` and `rollout.num_generations`",
    **dict.fromkeys(
        (
            "top_p",
            "top_k",
            "min_p",
            "typical_p",
            "epsilon_cutoff",
            "eta_cutoff",
            "repetition_penalty",
            "no_repeat_ngram_size",
            "generation_kwargs",
            "sampling_params",
            "do_sample",
        ),
        SAMPLING_NOTE,
    ),
    **dict.fromkeys(
        ("use_vllm", "fast_inference", "gpu_memory_utilization", "tensor_parallel_size", "rollout_engine"),
        IN_PROCESS_NOTE,
    ),
}
"""Names of other kits for what is no setting here, and why."""

MAX_HINTS = 60
"""Looking for the nearest name takes time, and nobody reads more."""

PATTERN_MESSAGES = {
    "name": "may hold letters, digits, `.`, `_` and `-`, a letter or digit first, at most 64",
    "": "must be one line without control characters",
}


def strip_optional(annotation: Any) -> Iterator[Any]:
    """The alternatives of an annotation, without `Optional` and `Annotated`."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        for argument in get_args(annotation):
            yield from strip_optional(argument)
    elif hasattr(annotation, "__metadata__"):
        yield from strip_optional(get_args(annotation)[0])
    elif annotation is not type(None):
        yield annotation


def annotations_at(model: type[BaseModel], path: Path) -> list[Any]:
    """The annotations that a path leads to; none where there is no such path."""
    reached: list[Any] = [model]
    for step in path:
        following: list[Any] = []
        for kind in reached:
            arguments = get_args(kind)
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                if step in kind.model_fields:
                    following += strip_optional(kind.model_fields[str(step)].annotation)
            elif get_origin(kind) is dict:
                following += strip_optional(arguments[1])
            elif get_origin(kind) is tuple and isinstance(step, int):
                following += strip_optional(arguments[0])
        reached = following
    return reached


def keys_at(model: type[BaseModel], path: Path) -> list[str]:
    """The keys that the section at a path knows."""
    return [
        key
        for kind in annotations_at(model, path)
        if isinstance(kind, type) and issubclass(kind, BaseModel)
        for key in kind.model_fields
    ]


def all_paths(model: type[BaseModel], path: Path = ()) -> Iterator[Path]:
    """Every setting's path; for lists the first entry stands, for adapters the policy."""
    for kind in annotations_at(model, path):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for key in kind.model_fields:
                yield (*path, key)
                yield from all_paths(model, (*path, key))
        elif get_origin(kind) is tuple:
            yield from all_paths(model, (*path, 0))
        elif get_origin(kind) is dict and path == ("adapters",):
            yield from all_paths(model, (*path, "policy"))


@functools.cache
def setting_locations(model: type[BaseModel], algorithm: str = "") -> dict[str, str]:
    """Every setting's bare name, and where the first one of that name stands that the algorithm uses."""
    paths = [dotted(setting_path) for setting_path in all_paths(model)]
    unused = {key for key, users in USED_BY.items() if algorithm and algorithm not in users}
    used = [
        setting_path
        for setting_path in paths
        if not any(setting_path == key or setting_path.startswith(f"{key}.") for key in unused)
    ]
    return {setting_path.rpartition(".")[2]: setting_path for setting_path in reversed(used)}


def unknown_key_message(model: type[BaseModel], path: Path, algorithm: str = "") -> str:
    """The sentence for a key that no one knows."""
    section = path[:-1]
    word = str(path[-1])
    own = ALGORITHM_ALIASES.get(algorithm, {}).get(word)
    if own is None and (word in NOT_SETTINGS or word.startswith("vllm_")):
        return f"unknown key; {NOT_SETTINGS.get(word, IN_PROCESS_NOTE)}"
    here = keys_at(model, section)
    alias = ALIASES.get(word)
    near = get_close_matches(word, here, n=1, cutoff=0.6)
    if SOURCE_ALIASES.get(word) in here:
        near = [SOURCE_ALIASES[word]]
    elif own is not None:
        near = [own.rpartition(".")[2] if own.rpartition(".")[0] == dotted(section) else own]
    elif alias is not None:
        last = alias.rpartition(".")[2]
        near = [last] if last in here else near or [alias]
    elif not near:
        names = setting_locations(model, algorithm)
        others = [name for name in names if names[name] != word]
        near = [names[close_match] for close_match in get_close_matches(word, others, n=1, cutoff=0.8)]
    if near:
        return f"unknown key; did you mean `{near[0]}`?"
    if 0 < len(here) <= 12:
        return f"unknown key; there are {', '.join(here)}"
    return "unknown key"


def describe_value(value: Any) -> str:
    """A value in words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, int) and abs(value) >= 10**18:
        return "an endless number"
    if isinstance(value, (int, float, str)):
        if isinstance(value, str) and not value.isprintable():
            text = ascii(value)
        else:
            text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return f"a {type(value).__name__}"


def describe_expected(model: type[BaseModel], path: Path) -> str:
    """What a path wants, in words."""
    words: list[str] = []
    for kind in annotations_at(model, path):
        if get_origin(kind) is Literal:
            words.append("one of " * (len(get_args(kind)) > 1) + ", ".join(map(str, get_args(kind))))
        elif get_origin(kind) is tuple:
            words.append("a list")
        elif get_origin(kind) is dict or (isinstance(kind, type) and issubclass(kind, BaseModel)):
            words.append("a mapping (`key: value` lines)")
        else:
            words.append(
                {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(
                    kind, "another value"
                )
            )
    return " or ".join(words) or "another value"


def suggestion_for(model: type[BaseModel], path: Path, value: Any) -> str:
    """What helps after a value of the wrong type."""
    kinds = annotations_at(model, path)
    if kinds == [str] and isinstance(value, (int, float)):
        return " (put it in quotes)"
    if bool in kinds and isinstance(value, str) and value.lower() in ("yes", "on", "true", "no", "off", "false"):
        return f" (write `{'true' if value.lower() in ('yes', 'on', 'true') else 'false'}`)"
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if isinstance(value, str) and len(choices) > 1:
        near = get_close_matches(value, choices, n=1, cutoff=0.6)
    else:
        near = []
    return f"; did you mean `{near[0]}`?" if near else ""


def format_error(model: type[BaseModel], error: ErrorDetails, path: Path, value: Any) -> str:
    """One of pydantic's errors, for people."""
    kind = error["type"]
    limits = error.get("ctx", {})
    pattern_message = PATTERN_MESSAGES.get(str(path[-1]) if len(path) == 1 else "", PATTERN_MESSAGES[""])
    choices = [kind for kind in annotations_at(model, path) if get_origin(kind) is Literal]
    simple = {
        "missing": f"is missing: {describe_expected(model, path)}" if choices else "is missing",
        "finite_number": f"must be a finite number, found {describe_value(value)}",
        "greater_than": f"must be greater than {limits.get('gt')}, found {describe_value(value)}",
        "greater_than_equal": f"must be at least {limits.get('ge')}, found {describe_value(value)}",
        "less_than": f"must be smaller than {limits.get('lt')}, found {describe_value(value)}",
        "less_than_equal": f"must be at most {limits.get('le')}, found {describe_value(value)}",
        "too_short": "must have at least one entry",
        "string_too_short": "must not be empty",
        "string_too_long": f"must have at most {limits.get('max_length')} letters",
        "string_unicode": "holds half of a surrogate pair, which is no character",
        "string_pattern_mismatch": f"{pattern_message}, found {describe_value(value)}",
        "calendar_day": f"must be a day as YYYY-MM-DD, found {describe_value(value)}",
    }
    return (
        simple.get(kind)
        or f"expected {describe_expected(model, path)}, found {describe_value(value)}"
        f"{suggestion_for(model, path, value)}"
    )


def format_errors(model: type[BaseModel], data: Any, failed: ValidationError) -> Iterator[tuple[Path, str]]:
    """Each error once, with the path in the data as written (pydantic adds the tags of unions to it)."""
    reported: set[Path] = set()
    algorithm = data.get("algorithm") if isinstance(data, dict) else None
    if not (isinstance(algorithm, str) and algorithm in ALGORITHMS):
        algorithm = ""
    for error in failed.errors(include_url=False, include_context=True):
        path: Path = ()
        value = data
        for step in error["loc"]:
            if isinstance(value, dict) and step in value:
                value = value[str(step)]
            elif isinstance(value, list) and isinstance(step, int) and step < len(value):
                value = value[step]
            else:
                break
            path = (*path, step)
        if error["type"] == "missing":
            path = tuple(error["loc"])
        if path in reported:
            continue
        reported.add(path)
        if error["type"] == "extra_forbidden":
            yield path, unknown_key_message(model, path, algorithm) if len(reported) <= MAX_HINTS else "unknown key"
        else:
            yield path, format_error(model, error, path, value)

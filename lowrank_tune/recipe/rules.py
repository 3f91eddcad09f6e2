"""What single settings cannot know: contradictions, and settings that would do nothing.

Everything here looks at what was *written* (plain data, defaults not filled in), and must bear any shape of it: types
are judged elsewhere, at the same time. A new algorithm adds rows to `USED_BY`; a new pair of rivals a row to `RIVALS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

from lowrank_tune.recipe import backend, earned, learned, memory, tracked, valued
from lowrank_tune.recipe.tree import Path
from lowrank_tune.recipe.written import Finding, entries, number, written
from lowrank_tune.settings import Dpo, Recipe, trained_by

ROWS = ("sft", "reward", "dpo")
"""The algorithms that learn from rows as they are."""
PAIRS = ("reward", "dpo")
"""The algorithms whose rows are pairs of answers."""
DRAWS = earned.DRAWS
USED_BY: dict[str, tuple[str, ...]] = {
    "train.rows_per_step": ROWS,
    "train.tokens_per_step": ROWS,
    "train.length_window": ROWS,
    "train.prompts_per_step": DRAWS,
    "data.max_length": ROWS,
    "data.max_prompt_length": DRAWS,
    "data.too_long": ROWS,
    "data.validation": ROWS,
    "data.validation_share": ROWS,
    "data.validation_rows": ROWS,
    "data.expected_tokens": ROWS,
    "reference": ("sft", "dpo", *DRAWS),
    "reward": ("reward",),
    "dpo": ("dpo",),
    "rewards": DRAWS,
    "rollout": DRAWS,
    "evaluate.on_hacking": DRAWS,
    "grpo": ("grpo",),
    "ppo": ("ppo",),
}
"""Settings and whole sections that only some algorithms use. What is not listed is used by all of them."""
INSTEAD = {
    "train.rows_per_step": "`train.prompts_per_step`",
    "train.prompts_per_step": "`train.rows_per_step`",
    "data.max_length": "`data.max_prompt_length` and `rollout.max_new_tokens`",
    "data.max_prompt_length": "`data.max_length`, which limits a prompt and its answer together",
    "data.validation": "`evaluate.heldout`",
    "reward": "`rewards`",
    "rewards": "`reward`",
}
"""What says the same for the algorithms that do not use a setting, where something does."""

RIVALS: tuple[tuple[Path, Path], ...] = (
    (("train", "steps"), ("train", "epochs")),
    (("train", "rows_per_step"), ("train", "tokens_per_step")),
    (("train", "micro_batch_size"), ("train", "micro_batch_tokens")),
    (("data", "validation"), ("data", "validation_share")),
    (("data", "validation"), ("data", "validation_rows")),
    (("data", "validation_rows"), ("data", "validation_share")),
)
"""Two ways to say one thing: both at once are a fault, and in a later layer one replaces the other."""

NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
FILE = re.compile(r".*\.(jsonl?|csv|parquet)(\.gz)?")
ALGORITHMS = get_args(Recipe.model_fields["algorithm"].annotation)
LOSSES = get_args(Dpo.model_fields["loss"].annotation)
BUILT_IN = {"tutor": "the built-in problems", "tutor-preferences": "the built-in pairs"}


def adapters_of(data: Any) -> dict[str, Any]:
    """The adapters that were written."""
    found = written(data, "adapters")
    return found if isinstance(found, dict) else {}


def sources_of(data: Any) -> Iterator[tuple[Path, Any]]:
    """Every source with its path: of training, of validation, and of held-out prompts."""
    for key in ("train", "validation"):
        yield from ((("data", key, index), each) for index, each in enumerate(entries(data, "data", key)))
    yield ("evaluate", "heldout"), written(data, "evaluate", "heldout")


def foreign(data: Any) -> Iterator[Finding]:
    """Settings of other algorithms."""
    algorithm = written(data, "algorithm")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        return
    for key, users in USED_BY.items():
        path = tuple(key.split("."))
        if algorithm not in users and written(data, *path) is not None:
            yield path, f"does nothing for {algorithm} (it belongs to {', '.join(users)}){_instead(key, algorithm)}"


def _instead(key: str, algorithm: str) -> str:
    """What this algorithm uses in place of a setting."""
    meant = INSTEAD.get(key, "")
    return f"; there is {meant}" if meant and algorithm in USED_BY.get(meant.split("`")[1], ALGORITHMS) else ""


def without_robust(data: Any) -> Iterator[Finding]:
    """Only one of DPO's losses smooths its labels."""
    if written(data, "algorithm") != "dpo" or written(data, "dpo", "label_smoothing") is None:
        return
    loss = written(data, "dpo", "loss") or "sigmoid"
    if loss in LOSSES and loss != "robust":
        yield ("dpo", "label_smoothing"), f"does nothing for the loss {loss}; it belongs to `dpo.loss`: robust"


def without_heldout(data: Any) -> Iterator[Finding]:
    """Held-out answers need prompts; the temperature needs sampling."""
    neither = " neither `evaluate.heldout` nor validation rows" if validates(data) else "out `evaluate.heldout`"
    if written(data, "evaluate", "heldout") is None:
        for key in ("prompts", "samples", "temperature", *(() if validates(data) else ("on_hacking",))):
            if written(data, "evaluate", key) is not None:
                yield ("evaluate", key), "does nothing without `evaluate.heldout`"
        for key in ("every", "max_new_tokens", "shown"):
            if written(data, "evaluate", key) is not None and not has_validation(data):
                yield ("evaluate", key), f"does nothing with{neither}"
    elif written(data, "evaluate", "temperature") is not None and written(data, "evaluate", "samples") in (None, 1):
        yield ("evaluate", "temperature"), "does nothing with one sample, which is greedy; set `evaluate.samples` too"


def validates(data: Any) -> bool:
    """Whether the algorithm can have validation rows at all."""
    return written(data, "algorithm") not in DRAWS


def has_validation(data: Any) -> bool:
    """Whether validation rows exist: sources of their own, or a share (the default) of the training rows."""
    given = any(written(data, "data", key) for key in ("validation", "validation_rows"))
    return validates(data) and (given or number(written(data, "data", "validation_share")) != 0.0)


def without_validation(data: Any) -> Iterator[Finding]:
    """The best step needs something to tell it by: the loss of validation rows, or held-out questions."""
    by, asks = written(data, "evaluate", "best_by"), written(data, "evaluate", "heldout") is not None
    if by == "exact" and written(data, "algorithm") == "reward":
        yield ("evaluate", "best_by"), "`exact` needs answers, and a reward model gives none"
    elif by == "exact" and not asks:
        yield ("evaluate", "best_by"), "`exact` needs questions: `evaluate.heldout`"
    elif by == "loss" and not has_validation(data):
        yield ("evaluate", "best_by"), "`loss` needs validation rows, and there are none"
    elif (
        written(data, "train", "final") == "best"
        and not has_validation(data)
        and not (asks and (by == "exact" or not validates(data)))
    ):
        yield (
            ("train", "final"),
            f"`best` needs {'validation rows' if validates(data) else '`evaluate.heldout`'}, and there are none",
        )


def from_the_file(data: Any) -> Iterator[Finding]:
    """An adapter that is loaded brings its own shape; a frozen one has no dropout either."""
    trained = valued.trained(data)
    for name, adapter in adapters_of(data).items():
        if written(adapter, "path") is None:
            continue
        for key in ("r", "alpha", "target_modules", "rslora", *(() if name in trained else ("dropout",))):
            if written(adapter, key) is not None:
                what = "does nothing for a frozen adapter" if key == "dropout" else "comes from the file at `path`"
                yield ("adapters", name, key), f"{what}; leave it out"


def of_sources(data: Any) -> Iterator[Finding]:
    """Settings of a source that its kind of data does not have."""
    for path, source in sources_of(data):
        if path[1] != "train" and written(source, "weight") is not None:
            yield (*path, "weight"), "does nothing here; only training sources are mixed"
        if written(source, "final_answer") is not None and (
            path[1] == "heldout" or written(data, "algorithm") in PAIRS
        ):
            what = (
                "for held-out prompts, which no answer is trained of"
                if path[1] == "heldout"
                else "for pairs, which stay as they are"
            )
            yield (*path, "final_answer"), f"does nothing {what}"
        dataset = written(source, "dataset")
        if isinstance(dataset, str) and dataset in BUILT_IN:
            for key in ("name", "format", "columns", "gold", "final_answer"):
                if written(source, key) not in (None, {}):
                    yield (*path, key), f"does nothing for `{dataset}`, {BUILT_IN[dataset]}"
        elif isinstance(dataset, str) and FILE.fullmatch(dataset) and written(source, "name") is not None:
            yield (*path, "name"), "does nothing for a file; only hub data sets have configurations"
    if len(entries(data, "data", "train")) == 1 and written(data, "data", "train", 0, "weight") is not None:
        yield ("data", "train", 0, "weight"), "does nothing with a single source"


IDLE: tuple[Callable[[Any], Iterator[Finding]], ...] = (
    foreign,
    without_robust,
    without_heldout,
    without_validation,
    from_the_file,
    of_sources,
    earned.idle,
    valued.idle,
    memory.idle,
    tracked.idle,
)


def idle(data: Any) -> Iterator[Finding]:
    """Settings that were written and would do nothing. A resolved recipe is saved without them."""
    for rule in IDLE:
        yield from rule(data)
    for key in ("validation", "validation_rows"):
        if validates(data) and written(data, "data", key) and written(data, "data", "validation_share") is not None:
            yield ("data", "validation_share"), f"contradicts `data.{key}`: give one of the two"


def rivals(data: Any) -> Iterator[Finding]:
    """Two ways to say one thing, said at once."""
    for one, other in RIVALS:
        if (
            other != ("data", "validation_share")
            and written(data, *one) not in (None, [])
            and written(data, *other) is not None
        ):
            yield other, f"contradicts `{'.'.join(map(str, one))}`: give one of the two"


def length(data: Any) -> Iterator[Finding]:
    """A run has an end, and its warm-up ends before that."""
    steps, warmup = written(data, "train", "steps"), number(written(data, "train", "warmup_steps"))
    if steps is None and written(data, "train", "epochs") is None:
        yield ("train", "steps"), "is missing: give `train.steps` or `train.epochs`"
    elif (end := number(steps)) is not None and warmup is not None and 0 < end <= warmup:
        yield ("train", "warmup_steps"), f"must be smaller than `train.steps`, {steps}"


def weights(data: Any) -> Iterator[Finding]:
    """All training sources have a weight and they sum to 1, or none has."""
    sources = entries(data, "data", "train")
    given = [written(source, "weight") for source in sources]
    if len(sources) < 2 or all(weight is None for weight in given):
        return
    for index, weight in enumerate(given):
        if weight is None:
            yield ("data", "train", index, "weight"), "is missing: give every source a weight, or none"
    numbers = [number(weight) for weight in given]
    total = sum(weight for weight in numbers if weight is not None)
    if None not in numbers and not abs(total - 1.0) <= 1e-6:
        yield ("data", "train", 0, "weight"), f"the weights of the sources sum to {total:.6g}, and must sum to 1"


def names(data: Any) -> Iterator[Finding]:
    """Adapters are named like variables, `base` is the base itself, and every adapter but the trained one comes from
    somewhere."""
    algorithm = written(data, "algorithm")
    trained = trained_by(algorithm)
    for name, adapter in adapters_of(data).items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            yield (
                ("adapters", name),
                "is no name for an adapter: small letters, digits and _, a letter first, at most 40",
            )
        elif name == "base":
            yield ("adapters", name), "is no name for an adapter: `base` is the base itself"
        elif name not in valued.trained(data) and written(adapter, "path") is None:
            meant = f"; did you mean `adapters.{trained}`?" if name in ("policy", "reward") else ""
            whom = "" if trained == "policy" and not meant else f" by {algorithm}"
            yield (
                ("adapters", name, "path"),
                f"is missing: only `{trained}` is trained{whom}, every other adapter is loaded{meant}",
            )
    model = written(data, "base", "model")
    if isinstance(model, str) and model.endswith("@"):
        yield ("base", "model"), "names no revision after the @"
    for path, source in sources_of(data):
        dataset = written(source, "dataset")
        if (
            isinstance(dataset, str)
            and dataset in BUILT_IN
            and written(source, "split") not in (None, "train", "heldout")
        ):
            yield (*path, "split"), f"`{dataset}` has the splits train and heldout"


def shapes(data: Any) -> Iterator[Finding]:
    """Reward models and DPO learn from pairs, SFT from single answers, GRPO from what it writes; and held-out prompts
    are no pairs."""
    algorithm = written(data, "algorithm")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        return
    for path, source in sources_of(data):
        dataset, format, asked = written(source, "dataset"), written(source, "format"), path == ("evaluate", "heldout")
        pairs = algorithm in PAIRS and not asked
        learns = "pairs" if pairs else "completions that it draws itself" if algorithm in DRAWS else "single answers"
        whose = "held-out prompts have one gold answer" if asked else f"{algorithm} learns from {learns}"
        if dataset == "tutor" and pairs:
            yield (*path, "dataset"), f"holds single answers, and {whose}; use tutor-preferences"
        elif dataset == "tutor-preferences" and not pairs:
            yield (*path, "dataset"), f"holds pairs, and {whose}; use tutor"
        elif isinstance(dataset, str) and dataset in BUILT_IN:
            continue  # its format is fixed, and saying one is told as idle
        elif pairs and format not in (None, "auto", "preference"):
            yield (*path, "format"), f"{whose}, a chosen and a rejected answer; say `preference`, or leave it out"
        elif format == "preference" and not pairs:
            cure = (
                "name the format of single answers"
                if asked or algorithm in DRAWS
                else (
                    "train with dpo or reward, or take the chosen ones: `prompt_completion` with columns: "
                    "{completion: chosen}"
                )
            )
            yield (*path, "format"), f"means pairs, and {whose}; {cure}"


def steady(data: Any) -> Iterator[Finding]:
    """Where log-probs are compared, the same row must give the same value twice."""
    dropout = number(written(data, "adapters", "policy", "dropout"))
    algorithm = written(data, "algorithm")
    if algorithm in ("dpo", *DRAWS) and dropout is not None and dropout > 0:
        yield (
            ("adapters", "policy", "dropout"),
            f"must be 0 with {algorithm}: dropout is off wherever log-probs are compared",
        )


def reference(data: Any, below: Sequence[str] = ()) -> Iterator[Finding]:
    """The reference is no choice: it is the policy's stack without its top. `below` lies between loaded adapters and
    the policy."""
    claimed = written(data, "reference")
    if trained_by(written(data, "algorithm")) != "policy" or not isinstance(claimed, str):
        return
    frozen = [*(name for name in adapters_of(data) if name not in (*valued.trained(data), learned.ROLE)), *below]
    truth = frozen[-1] if frozen else "base"
    if claimed != truth:
        words = f"`{truth}`, the adapter right below it" if frozen else "`base`, as no adapter lies below it"
        yield (
            ("reference",),
            f"will be {words}: it is always the policy's stack without its top; write that, or leave it out",
        )


def stacked(data: Any, below: Sequence[str] = ()) -> Iterator[Finding]:
    """Only what lies on something can be kept apart from it."""
    beside = {learned.ROLE, *valued.trained(data)}
    if written(data, "train", "final_stack") == "apart" and not below and not adapters_of(data).keys() - beside:
        yield ("train", "final_stack"), "`apart` does nothing here: no frozen adapter lies below the trained one"


def findings(data: Any, below: Sequence[str] = (), lent: bool = False) -> Iterator[Finding]:
    """All of the above. `lent`: an earlier stage of a chain trains the reward model."""
    for rule in (idle, rivals, length, weights, names, shapes, steady, earned.rewards, earned.golds):
        yield from rule(data)
    yield from valued.findings(data, lent)
    yield from learned.findings(data, lent)
    yield from backend.findings(data, below, lent)
    yield from reference(data, below)
    yield from stacked(data, below)

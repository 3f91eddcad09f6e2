"""Rewards of completions."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from lowrank_tune.config.base import Finding, NonEmptyStr, PositiveInt, Settings, StrList
from lowrank_tune.errors import UserError
from lowrank_tune.regex import compile_pattern

REWARD_MODEL: Final = "reward_model"
"""The reward that is the score of the adapter `reward`."""
REWARDS = (
    "answer",
    "math_answer",
    "symbolic",
    "python_tests",
    "smt",
    "lean",
    "format",
    "regex",
    "json_schema",
    "length",
    "repetition",
    REWARD_MODEL,
)
REWARD_SETTINGS = {
    "pattern": (
        ("format", "regex"),
        "the regular expression that the whole completion must match, as '(?s).*Answer: .*'",
    ),
    "target_tokens": (("length",), "up to how many tokens a completion gets 1"),
    "ngram": (("repetition",), ""),
    "json_schema": (("json_schema",), "the schema, or its file, as `./schema.json`"),
    "accept_unsafe_code": (("python_tests",), ""),
    "answer_type": (("smt",), "what a completion contains: `statement`, `witness` or `invariant`"),
    "program": (("lean",), ""),
}
"""Settings of a reward: the rewards that have it, and its description. These rewards require a setting that has a
description."""
REWARD_ALIASES = {
    "accuracy": "answer",
    "accuracy_reward": "answer",
    "correctness": "answer",
    "exact_match": "answer",
    "think_format_reward": "format",
}
"""Names of rewards in other libraries."""
UNSAFE_CODE: Final = "code that a model wrote may do anything on this machine"


class RewardConfig(Settings):
    """One reward. The reward of a completion is the weighted sum of all of them."""

    name: NonEmptyStr
    """`answer` and `math_answer` (the final answer equals the gold one, exactly or as mathematics); `symbolic` (an
    equal expression); `python_tests` (the code passes the tests of the row); `smt` and `lean` (proved); `format`,
    `regex`, `json_schema`, `length`, `repetition` (how the completion is written); `reward_model` (the score of
    `adapters.reward`); or your own function: `./file.py:name`."""
    weight: float = 1.0
    """Factor of this reward in the weighted sum; may be negative."""
    pattern: NonEmptyStr | None = None
    """For `format`: the regular expression that the whole completion must match. For `regex`: the one that must be
    found in it. The engine is RE2."""
    target_tokens: PositiveInt | None = None
    """For `length`: a completion of at most this many tokens gets 1, one of twice as many gets 0, linear in between."""
    on_error: Literal["stop", "drop"] | None = None
    """If the reward itself fails or takes too long: `stop` the run, or `drop` the completion from its group, which is
    counted and reported. Default: `stop` for your own function, `drop` for a built-in reward."""
    ngram: Annotated[int, Field(ge=1, le=64)] | None = None
    """For `repetition`: number of words of the sequences that should not occur twice. Default: 4."""
    json_schema: NonEmptyStr | dict[str, Any] | None = None
    """For `json_schema`: the JSON schema (draft 2020-12, or the one in its `$schema`), inline or as `./file.json`."""
    kind: Literal["verifier", "shaping"] | None = None
    """`verifier`: decides whether an answer is right, and must separate reference answers from wrong ones by itself
    before training. `shaping`: rates how a completion is written. Default: what the built-in reward is made for; your
    own function is a verifier if no other reward of the recipe is one, and then only the weighted sum is checked."""
    answer_type: Literal["statement", "witness", "invariant"] | None = None
    """For `smt`: what a completion contains: `statement` (whether the constraints of the row can be satisfied),
    `witness` (values that satisfy them) or `invariant` (an inductive invariant)."""
    program: StrList | None = None
    """For `lean`: the command that checks a file. Default: `[lean]`; for a project with Mathlib, for example `[lake,
    --dir, ./project, env, lean]`."""
    accept_unsafe_code: Literal["code that a model wrote may do anything on this machine"] | None = None
    """For `python_tests` on a machine that has no sandbox for code: this sentence, word for word, lets code run without
    one."""

    @property
    def is_custom(self) -> bool:
        """Whether this is a function of the user."""
        return ":" in self.name or self.name.endswith(".py")

    @property
    def stops_on_error(self) -> bool:
        """Whether the run stops if the reward fails."""
        if self.on_error is None:
            return self.is_custom
        return self.on_error == "stop"

    def findings(self) -> Iterator[Finding]:
        """Yields an unknown name, settings of other rewards, settings that are missing, and a pattern that is not
        valid."""
        if not self.name:
            return
        if reason := self._invalid_name():
            yield (
                ("name",),
                reason,
            )
        for key, (owners, description) in REWARD_SETTINGS.items():
            if self.name not in owners and self.is_set(key):
                names = " and ".join(f"`{owner}`" for owner in owners)
                yield (
                    (key,),
                    f"does nothing for this reward; it belongs to {names}",
                )
            elif self.name in owners and description and not self.is_set(key):
                yield (
                    (key,),
                    f"is missing: {description}",
                )
        if self.is_set("pattern") and self.name in REWARD_SETTINGS["pattern"][0]:
            try:
                compile_pattern(self.pattern or "")
            except UserError as error:
                yield (
                    ("pattern",),
                    str(error),
                )

    def _invalid_name(self) -> str:
        """Returns why the name is not that of a reward, or an empty string."""
        if self.name in REWARDS:
            return ""
        if self.is_custom:
            file, _, function = self.name.rpartition(":")
            if file.endswith(".py") and function.isidentifier():
                return ""
            return "is not a function in a file; write it as `./file.py:function`"
        if self.name in REWARD_ALIASES:
            return f"is not a reward; did you mean `{REWARD_ALIASES[self.name]}`?"
        near = get_close_matches(
            self.name[:80],
            REWARDS,
            n=1,
            cutoff=0.6,
        )
        if near:
            return f"is not a reward; did you mean `{near[0]}`?"
        return f"is not a reward; there are {', '.join(REWARDS)} and your own, `./file.py:function`"

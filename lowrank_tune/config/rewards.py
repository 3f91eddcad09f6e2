"""Rewards of completions."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from lowrank_tune.config.base import NonEmptyStr, PositiveInt, Settings, StrList

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

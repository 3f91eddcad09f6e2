"""What completions earn."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from lowrank_tune.settings.common import NonEmptyStr, PositiveInt, Settings, StrList

UNSAFE_CODE: Final = "code that a model wrote may do anything on this machine"


class RewardConfig(Settings):
    """One reward of several. What a completion earns is the weighted sum."""

    name: NonEmptyStr
    """`answer` and `math_answer` (the final answer equals the gold one, exactly or as mathematics); `symbolic` (an
    equal expression); `python_tests` (the code passes the row's tests); `smt` and `lean` (proved); `format`, `regex`,
    `json_schema`, `length`, `repetition` (how it is written); `reward_model` (the learned score of `adapters.reward`);
    or your own function: `./file.py:name`."""
    weight: float = 1.0
    """What it counts for; a negative weight punishes."""
    pattern: NonEmptyStr | None = None
    """For `format`: the regular expression that the whole completion must match. For `regex`: that must be found in it.
    The engine is RE2."""
    target_tokens: PositiveInt | None = None
    """For `length`: up to this many tokens earn 1, twice as many 0."""
    on_error: Literal["stop", "drop"] | None = None
    """Where the reward itself fails or takes too long: stop the run, or drop the completion from its group, counted and
    told. By default your own function stops the run, and a verifier of the kit drops."""
    ngram: Annotated[int, Field(ge=1, le=64)] | None = None
    """For `repetition`: of how many words the sequences are that should not come twice; 4 where it is not given."""
    json_schema: NonEmptyStr | dict[str, Any] | None = None
    """For `json_schema`: the JSON schema (draft 2020-12, or what its `$schema` says), written here or as
    `./file.json`."""
    kind: Literal["verifier", "shaping"] | None = None
    """`verifier`: it decides whether an answer is right, so it has to separate reference answers from wrong ones by
    itself before training begins. `shaping`: it only shapes how a completion is written. By default what the reward is
    made for; your own function is a verifier where no other reward of the recipe is one, and only the weighted sum is
    checked."""
    answer_type: Literal["statement", "witness", "invariant"] | None = None
    """For `smt`: what a completion contains: whether the row's constraints can be met, values that meet them, or an
    inductive invariant."""
    program: StrList | None = None
    """For `lean`: the command that checks a file; [lean] where it is not given, [lake, --dir, ./project, env, lean] for
    one with Mathlib."""
    accept_unsafe_code: Literal["code that a model wrote may do anything on this machine"] | None = None
    """For `python_tests`, where the machine has no sandbox for code: this sentence, word for word, lets it run without
    one."""

"""The base and its adapters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from lowrank_tune.config.base import Finding, NonEmptyStr, PositiveInt, Settings, StrList

NAME_PATTERN = re.compile(r"[a-z][a-z0-9_]{0,39}")
"""Names of adapters, and of the stages of a chain."""
NAME_RULE = "small letters, digits and _, a letter first, at most 40"
"""The pattern in words."""
TRAINED_ADAPTER = {"reward": "reward"}
"""The adapter that an algorithm trains, if it is not `policy`."""
EXTRA_ADAPTERS: dict[str, tuple[str, ...]] = {"ppo": ("value",)}
"""Adapters of other roles that an algorithm trains. They are in no policy's stack."""
REWARD_ADAPTER = "reward"
"""The adapter of a reward model. It is in no policy's stack."""
SHAPE_KEYS = ("r", "lora_alpha", "target_modules", "use_rslora")
"""Keys of an adapter that its files contain."""


def default_adapter_name(algorithm: object) -> str:
    """Returns the name of the adapter that an algorithm trains; `policy` for a value that is not an algorithm."""
    if isinstance(algorithm, str):
        return TRAINED_ADAPTER.get(algorithm, "policy")
    return "policy"


def extra_adapters(algorithm: object) -> tuple[str, ...]:
    """Returns the adapters of an algorithm that are not in the stack of its policy."""
    if isinstance(algorithm, str):
        return EXTRA_ADAPTERS.get(algorithm, ())
    return ()


class BaseConfig(Settings):
    """The frozen base."""

    model: NonEmptyStr = "tiny-tutor"
    """A hub id, `id@revision`, a folder, or `tiny-tutor`, which is part of the package."""
    bits: Literal[4, 16] = 4
    """4: NF4 with double quantization. 16: not quantized."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """The dtype of products, and of weights that are not packed: `auto` is bfloat16 on a GPU, float16 on a GPU without
    bfloat16, float32 on the CPU. Adapters are float32."""
    backend: Literal["transformers", "unsloth"] = "transformers"
    """Library that runs the base: `transformers`, or `unsloth` (for sft, and for dpo and grpo with the base as
    reference; in an environment of its own)."""
    trust_remote_code: bool = False
    """Runs Python code that comes with the model, with your permissions. Only for repositories that you trust."""

    def findings(self) -> Iterator[Finding]:
        """Yields a model with an empty revision."""
        if self.model.endswith("@"):
            yield (
                ("model",),
                "has no revision after the @",
            )


class AdapterConfig(Settings):
    """One LoRA adapter. With `path` it is loaded: frozen below the policy, or trained further if it is the policy's
    own."""

    r: PositiveInt = 16
    """Rank."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale: the update is multiplied by lora_alpha / r (lora_alpha / sqrt(r) with `use_rslora`)."""
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the input of the adapter in training."""
    target_modules: Literal["all-linear"] | StrList = "all-linear"
    """Names of the linear modules that get an adapter."""
    use_rslora: bool = False
    """Rank-stabilized scaling (arXiv:2312.03732)."""
    path: NonEmptyStr | None = None
    """Folder of an existing adapter, or of a run."""

    def findings(self) -> Iterator[Finding]:
        """Yields the shape of an adapter whose files contain it."""
        if not self.is_set("path"):
            return
        for key in SHAPE_KEYS:
            if self.is_set(key):
                yield (
                    (key,),
                    "comes from the file at `path`; leave it out",
                )

"""Patterns in the configuration of an adapter: the same modules, ranks and scales as PEFT's own matching selects, and
no time without end."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from models import load_base_of
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lowrank_tune.errors import UserError
from lowrank_tune.model.module_patterns import (
    MAX_NAMES,
    MAX_PATTERNS,
    WITHOUT_REPETITION,
    check_patterns,
    resolve_patterns,
)

NAMES = [name for name, _ in load_base_of().model.named_modules() if name]
NESTED_NAMES = [
    *NAMES,
    "vision.model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.experts.0.up_proj",
]
"""With names that end with the whole name of another module, and with two numbers."""
REDOS = "((((.*)*)*)*)*x!"

HONEST: dict[str, dict[str, Any]] = {
    "pattern": {"target_modules": r".*self_attn\.(q|v)_proj"},
    "anchors": {"target_modules": r"^model\.layers\.\d+\.mlp\.(gate|up)_proj$"},
    "one layer": {"target_modules": r"model\.layers\.[1-9].*_proj"},
    "whole name": {"target_modules": r"model\.layers\.0\.self_attn\.q_proj"},
    "names": {"target_modules": ["q_proj", "mlp.down_proj"]},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0.*"},
    "excluded whole name": {"target_modules": ["q_proj"], "exclude_modules": r"model\.layers\.0\.self_attn\.q_proj"},
    "excluded names": {"target_modules": r".*_proj", "exclude_modules": ["down_proj"]},
    "nothing excluded": {"target_modules": ["q_proj"], "exclude_modules": "nothing"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "layer": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "named layers": {
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [0, 11],
        "layers_pattern": "layers",
    },
    "patterns of layers": {"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "exp.*"]},
    "whole name in any layer": {"target_modules": ["model.layers.0.self_attn.q_proj"], "layers_to_transform": [1]},
}


def selected(config: LoraConfig) -> set[str]:
    """Returns the modules that PEFT's own function selects."""
    return {name for name in NESTED_NAMES if check_target_module_exists(config, name)}


@pytest.mark.parametrize("case", HONEST)
def test_same_modules_as_pefts_own_matching(case: str) -> None:
    config = LoraConfig(**HONEST[case])
    expected = selected(config)
    resolved = resolve_patterns(config, NESTED_NAMES)
    assert selected(resolved) == expected and expected
    assert resolved.layers_pattern is None and resolved.layers_to_transform is None


def test_all_linear_and_names_are_left_to_peft() -> None:
    for targets in ("all-linear", ["q_proj"]):
        config = LoraConfig(target_modules=targets, rank_pattern={"q_proj": 2, "^model.layers.0|up_proj": 3})
        resolved = resolve_patterns(config, NAMES)
        assert resolved.target_modules == config.target_modules and resolved.rank_pattern == config.rank_pattern


VALUES: dict[str, dict[str, int]] = {
    "names": {"q_proj": 2, "mlp.up_proj": 3},
    "alternatives": {"q_proj|mlp.up_proj": 2, "v_proj": 3},
    "anchor": {"^model.layers.0.self_attn.q_proj": 2},
    "the first decides": {r"layers\.0\.(.*)": 2, "q_proj": 3, ".*": 4},
    "groups": {r"(q|k)_proj": 2, r"layers\.[1-9]+\..*up_proj": 3},
    "part of a name": {"proj": 2, "(x_proj)": 3},
    "two patterns in one": {"q_proj|)(v_proj": 2, "(x)*": 3},
}


@pytest.mark.parametrize("case", VALUES)
def test_same_values_as_pefts_own_matching(case: str) -> None:
    config = LoraConfig(target_modules=["q_proj"], rank_pattern=VALUES[case], alpha_pattern=VALUES[case])
    resolved = resolve_patterns(config, NESTED_NAMES)
    for given, exact in ((config.rank_pattern, resolved.rank_pattern), (config.alpha_pattern, resolved.alpha_pattern)):
        for name in NESTED_NAMES:
            expected = given.get(get_pattern_key(list(given), name), 1)
            assert exact.get(get_pattern_key(list(exact), name), 1) == expected, name


HOSTILE: dict[str, dict[str, Any]] = {
    "target_modules": {"target_modules": REDOS},
    "exclude_modules": {"target_modules": ["q_proj"], "exclude_modules": REDOS},
    "layers_pattern": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": [REDOS]},
    "rank_pattern": {"target_modules": ["q_proj"], "rank_pattern": {REDOS: 2}},
    "alpha_pattern": {"target_modules": ["q_proj"], "alpha_pattern": {"x": 1, REDOS: 2}},
}


@pytest.mark.parametrize("key", HOSTILE)
def test_pattern_of_exponential_time_has_an_end(key: str) -> None:
    """Python's `re` does not end on one of these within minutes, so PEFT must not get it."""
    config = LoraConfig(**HOSTILE[key])
    start = time.process_time()
    check_patterns(HOSTILE[key])
    try:
        resolved = resolve_patterns(config, NAMES)
    except UserError as error:
        assert key in ("target_modules", "layers_pattern")
        assert str(error) == "its target_modules match no module"
    else:
        assert REDOS not in repr(resolved)
    assert time.process_time() - start < 1


FAULTY: dict[str, tuple[dict[str, Any], str]] = {
    "broken": ({"target_modules": "(("}, "target_modules '((' is not a regular expression of RE2"),
    "lookahead": (
        {"target_modules": r"^(?!.*visual).*proj"},
        "has lookaround, which the linear-time engine RE2 does not support: list the names of the modules instead",
    ),
    "excluded": ({"exclude_modules": "*("}, "exclude_modules '*('"),
    "layers": ({"layers_pattern": ["layers", "(("]}, "layers_pattern"),
    "rank": ({"rank_pattern": {"((": 4}}, "rank_pattern"),
    "alpha": ({"alpha_pattern": {"q_proj": 1, "[": 4}}, "alpha_pattern"),
    "a long pattern": ({"target_modules": "x" * 3000}, "has 3000 characters, and the limit is 2000"),
    "a large pattern": ({"target_modules": "((x{100}){100}){100}"}, "is not a regular expression of RE2"),
    "many patterns": (
        {"rank_pattern": {f"(x{number})*": 4 for number in range(MAX_PATTERNS + 1)}},
        f"rank_pattern has more than {MAX_PATTERNS} regular expressions",
    ),
    "many patterns, all broken": (
        {"layers_pattern": ["(("] * (MAX_PATTERNS + 1)},
        f"layers_pattern has more than {MAX_PATTERNS} regular expressions",
    ),
    "many names": ({"target_modules": ["x"] * (MAX_NAMES + 1)}, f"target_modules has {MAX_NAMES + 1} entries"),
}


@pytest.mark.parametrize("case", FAULTY)
def test_pattern_that_cannot_be_used_is_refused_with_its_key(case: str) -> None:
    raw, message = FAULTY[case]
    with pytest.raises(UserError, match=re.escape(message)):
        check_patterns(raw)


def test_patterns_with_repetitions_or_groups_are_not_left_to_re() -> None:
    for pattern in ("a*", "a+", "a?", "a{2}", "(a)", "[a]", r"\Z", r"\pN"):
        assert not WITHOUT_REPETITION.fullmatch(pattern)
    for pattern in ("q_proj", "^model.layers.0|up_proj$", r"layers\.0\.q_proj"):
        assert WITHOUT_REPETITION.fullmatch(pattern)

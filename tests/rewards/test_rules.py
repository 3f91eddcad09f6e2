"""Rewards on the text of a completion: patterns, JSON schemas, repetition. Any text gets a score quickly."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from malformed_yaml import MAX_CPU_SECONDS
from scoring import score_items

from lowrank_tune.config import RewardConfig
from lowrank_tune.config.rewards import REWARD_SETTINGS, REWARDS
from lowrank_tune.errors import ConfigError
from lowrank_tune.regex import to_utf8
from lowrank_tune.rewards import Reward, RewardInput, WorkerPool, build_rewards, weighted_sum

MEGABYTE = 1_000_000
HOSTILE = {
    "empty": "",
    "nul": "\x00" * MEGABYTE,
    "surrogates": "\ud800" * MEGABYTE,
    "bidi": "\u202e\u2066abc" * 200_000,
    "letter": "a" * MEGABYTE,
    "lines": "\n" * MEGABYTE,
    "words": "word " * 200_000,
    "braces": "{" * MEGABYTE,
    "brackets": "[" * MEGABYTE,
    "quotes": '"' * MEGABYTE,
    "fences": "```json\n" * 100_000,
    "digits": "9" * MEGABYTE,
    "deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "escapes": "\x1b]52;c;AAAA\x07" * 50_000,
}


def item(completion: str, **row: Any) -> RewardInput:
    return RewardInput("Say it.", completion, None, row, True, 5)


def one(use: str, folder: Path = Path(), **settings: Any) -> Reward:
    return build_rewards([RewardConfig(name=use, **settings)], folder)[0].reward


def values(reward: Reward, *completions: str) -> list[float | None]:
    return [score.value for score in score_items(reward, [item(text) for text in completions])]


def refusal(use: str, folder: Path = Path(), **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        one(use, folder, **settings)
    return str(caught.value)


def test_a_format_is_of_the_whole_completion_and_a_regex_of_any_part() -> None:
    texts = ("So it is 72.", "So it is 72. Yes.", " So it is 72.", "So it is 72.\n", "no")
    assert values(one("format", pattern=r"So it is \d+\."), *texts) == [1, 0, 0, 0, 0]
    assert values(one("regex", pattern=r"So it is \d+\."), *texts) == [1, 1, 1, 1, 0]
    assert values(one("regex", pattern=r"72\.$"), *texts) == [1, 0, 1, 0, 0]
    [passed, failed] = score_items(one("format", pattern="a.c"), [item("abc"), item("a\nc")])
    assert (passed.verdict, failed.verdict, failed.reason) == ("pass", "fail", "does not match the pattern")


def test_patterns_match_letters_of_all_scripts_and_lone_surrogates() -> None:
    assert values(one("format", pattern=r"\pL+"), "\u00e9\u4e2d\U00010400", "a1") == [1, 0]
    assert values(one("format", pattern="(?s)a.b"), "a\ud800b", "a\x00b", "a\U0001f600b", "ab") == [1, 1, 1, 0]
    assert to_utf8("\ud83d\ude00") == "\U0001f600".encode() and to_utf8("\udc00x") == "\ufffdx".encode()


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("a(?=b)", "has lookaround"),
        ("(?<!b)a", "has lookaround"),
        (r"(a)\1", "has backreferences"),
        ("(?P<n>a)(?P=n)", "has backreferences"),
        ("a++", "possessive"),
        ("(?>a)", "possessive"),
        (r"a\Z", r"write `\z`"),
        (r"\u0041", "write the character itself"),
        ("(a", "missing )"),
        ("a{1001}", "invalid repetition size"),
        (r"(\pL{30}){30}", "too large"),
        ("\ud800", "UTF-8"),
    ],
)
def test_patterns_that_re2_cannot_compile_are_refused_with_a_reason(
    pattern: str, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    use = RewardConfig.model_construct(name="regex", pattern=pattern, weight=1.0)  # a recipe holds no surrogate
    with pytest.raises(ConfigError) as caught:
        build_rewards([use], Path())
    assert (
        words in str(caught.value)
        and str(caught.value).startswith("rewards.0: `pattern` ")
        and len(caught.value.problems) == 1
    )
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("(a+)+b", "a" * MEGABYTE),
        ("(a|aa)+$", "a" * MEGABYTE + "!"),
        (r"(\w+\s?)*\.", "word " * 200_000 + "!"),
        ("(.*)*x", "y" * MEGABYTE),
    ],
)
def test_patterns_take_linear_time(pattern: str, text: str) -> None:
    start = time.process_time()
    assert values(one("format", pattern=pattern), text) == values(one("regex", pattern=pattern + "Q"), text) == [0.0]
    assert time.process_time() - start < MAX_CPU_SECONDS


def test_repetition_is_the_share_of_distinct_ngrams() -> None:
    reward = one("repetition", ngram=2)
    # `a b a b a` has (a b) (b a) (a b) (b a), of which 2 are distinct
    assert values(reward, "", "one", "one two", "one two three", "a b a b a", "A b, a B,") == [1, 1, 1, 1, 0.5, 3 / 5]
    assert values(one("repetition"), "a b c d a b c d") == [4 / 5] and values(one("repetition"), "word " * 10_003) == [
        1e-4
    ]
    assert values(one("repetition"), "a" * 1600)[0] == pytest.approx(1 / 97) and values(
        one("repetition"), "\u4e2d" * 103
    ) == [0.01]
    assert score_items(reward, [item("a")])[0].verdict == "graded" and reward.is_verifier is False


SCHEMA = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]+$"},
        "age": {"type": "integer", "minimum": 0},
        "in": {"$ref": "#/$defs/place"},
    },
    "$defs": {"place": {"enum": ["Rome", "Oslo"]}},
}
FENCED = "Here:\n```json\n%s\n```\nThat is all."


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('{"name": "ann"}', 1),
        (' {"name": "ann", "age": 3, "in": "Oslo"}\n', 1),
        (FENCED % '{"name": "ann"}', 1),
        ('{"name": "ann", "age": 3.0}', 1),
        ('```\n{"name": "x"}\n```', 1),
        (FENCED % "{}" + FENCED % '{"name": "ann"}', 1),
        ('{"name": "\\u0061nn"}', 1),
        (FENCED % '{"name": "ann"}' + FENCED % "{}", 0),
        ('```json\n{"name": "ann"}', 0),
        ('It is {"name": "ann"}', 0),
        ('{"name": "ann"} {}', 0),
        ('```python\n{"name": "ann"}\n```', 0),
        ('{"name": "Ann"}', 0),
        ('{"name": "ann", "age": -1}', 0),
        ('{"name": "ann", "in": "Bonn"}', 0),
        ('{"name": "ann", "age": true}', 0),
        ('{"name": "ann", "more": 1}', 0),
        ('{"name": "ann", "age": NaN}', 0),
        ("[]", 0),
        ('"ann"', 0),
        ("", 0),
        ('{"name": "x y", "name": "ann"}', 0),
        ('{"name": "ann", "age": 1e999}', 0),
        ('{"name": "ann", "age": 1%s}' % ("0" * 400), 0),
        ("{'name': 'ann'}", 0),
        ('{"name": "ann",}', 0),
        ('{"name": "\x00"}', 0),
    ],
)
def test_a_completion_is_json_under_a_schema(text: str, right: int, schema_worker: WorkerPool[int]) -> None:
    schema_worker.submit(0, item(text))
    score = schema_worker.collect()[0][0]
    assert (score.value, score.verdict) == (right, "pass" if right else "fail"), score.reason


@pytest.fixture(scope="module")
def schema_worker() -> Iterator[WorkerPool[int]]:
    with WorkerPool[int]([one("json_schema", json_schema=SCHEMA)], workers=1) as scorer:
        yield scorer


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_fails(name: str, schema_worker: WorkerPool[int]) -> None:
    start = time.monotonic()
    for text in (
        HOSTILE[name],
        HOSTILE[name][:190_000],
        FENCED % HOSTILE[name][:190_000],
        FENCED % ('{"name":' * 50 + HOSTILE[name][:90_000]),
    ):
        schema_worker.submit(0, item(text))
        [score] = schema_worker.collect()[0]
        assert (score.value, score.verdict) == (0.0, "fail") and score.reason.isprintable() and len(score.reason) < 500
    assert time.monotonic() - start < 5.0


def test_a_text_for_which_a_pattern_of_the_schema_takes_too_long_fails() -> None:
    reward = one("json_schema", json_schema={"pattern": "^(a+)+b$"})
    with WorkerPool[int]([reward], workers=1, timeout_seconds=0.4) as scorer:
        for number, text in enumerate(('"aab"', '"' + "a" * 60 + '"', '"aac"')):
            scorer.submit(number, item(text))
        scores = [found[0] for found in scorer.collect().values()]
    assert [(score.value, score.verdict) for score in scores] == [(1.0, "pass"), (0.0, "fail"), (0.0, "fail")]
    assert "0.4 s" in scores[1].reason and scores[1].reason.isprintable()


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "strin"}, "is not a JSON schema: at $.type"),
        ({"pattern": "("}, "is not a JSON schema: at $.pattern"),
        ({"$ref": "#"}, "without end"),
        (
            {"$ref": "https://example.com/s.json"},
            "refers to https://example.com/s.json, which is not in it; nothing is fetched",
        ),
        ({"properties": {"a": {"$ref": "other.json"}}}, "refers to other.json"),
        ({"$dynamicRef": "https://example.com/d"}, "nothing is fetched"),
        ({"items": {"$ref": "#/$defs/no"}}, "/$defs/no"),
        ({"$schema": "https://example.com/draft"}, "an unknown `$schema`"),
        ("./none.json", "cannot be read"),
        ("./bad.json", "is not JSON"),
        ("./list.json", "neither an object"),
        ({"minimum": "3"}, "is not a JSON schema"),
    ],
)
def test_a_schema_is_checked_before_anything_runs(
    schema: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("the network was asked"))
    message = refusal("json_schema", tmp_path, json_schema=schema)
    assert words in message and message.startswith("rewards.0: ") and "\n" not in message


def test_schemas_come_from_files_refer_to_themselves_and_name_their_draft(tmp_path: Path) -> None:
    tree = {"$id": "https://example.com/tree", "type": "array", "items": {"$ref": "#"}}
    old = {"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 3, "exclusiveMinimum": True}
    (tmp_path / "tree.json").write_text(json.dumps(tree))
    assert values(
        one("json_schema", tmp_path, json_schema="./tree.json"), "[[], [[]]]", "[[1]]", "[" * 60 + "]" * 60
    ) == [1, 0, 1]
    assert values(one("json_schema", json_schema=old), "3", "4") == [0, 1]


def test_without_its_package_a_reward_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs jsonschema; install it with `pip install 'lowrank-tune[verifiers]'`" in refusal(
        "json_schema", json_schema=SCHEMA
    )


def test_settings_of_rewards_are_fields_and_belong_to_builtin_rewards() -> None:
    assert set(REWARD_SETTINGS) <= set(RewardConfig.model_fields)
    assert {owner for owners, _ in REWARD_SETTINGS.values() for owner in owners} <= set(REWARDS)
    optional = {key for key, (_, required_description) in REWARD_SETTINGS.items() if not required_description}
    assert optional == {"accept_unsafe_code", "ngram", "program"}
    assert not list(RewardConfig(name="repetition").findings())


def test_every_builtin_reward_is_built_under_its_name(tmp_path: Path) -> None:
    needed: dict[str, dict[str, Any]] = {
        "format": {"pattern": "a"},
        "regex": {"pattern": "a"},
        "json_schema": {"json_schema": SCHEMA},
        "length": {"target_tokens": 9},
        "smt": {"answer_type": "witness"},
        "lean": {"program": ("true",)},
    }
    weighted = build_rewards([RewardConfig(name=name, **needed.get(name, {})) for name in REWARDS], tmp_path)
    assert [(each.name, each.reward.name) for each in weighted] == [(name, name) for name in REWARDS]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_completions_are_judged_at_once(name: str) -> None:
    start = time.process_time()
    for reward in (one("format", pattern="(?s)x.*y"), one("regex", pattern=r"\d+ apples|x{3}"), one("repetition")):
        [score] = score_items(reward, [item(HOSTILE[name])])
        assert score.value is not None and 0.0 <= score.value <= 1.0 and score.reason.isprintable()
    assert time.process_time() - start < MAX_CPU_SECONDS


def test_rules_weigh_together_each_under_its_name() -> None:
    weighted = build_rewards(
        [
            RewardConfig(name="regex", pattern="sorry", weight=-0.5),
            RewardConfig(name="format", pattern="(?s).*\\."),
            RewardConfig(name="repetition", weight=0.25),
            RewardConfig(name="regex", pattern="72"),
        ],
        Path(),
    )
    assert [each.name for each in weighted] == ["regex", "format", "repetition", "regex-2"]
    with WorkerPool[int]([each.reward for each in weighted]) as scorer:
        scorer.submit(0, item("I am sorry, it is 72."))
        scorer.submit(1, item("It is 72"))
        scores = scorer.collect()
        assert scorer.pids == []
    weights = [each.weight for each in weighted]
    sums = [weighted_sum([score.value for score in scores[key]], weights) for key in (0, 1)]
    assert sums == [-0.5 + 1 + 0.25 + 1, 0.25 + 1]

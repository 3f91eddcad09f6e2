"""The report of done, interrupted, failed, unfinished and damaged runs: one inert file without an address in it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from malformed_yaml import HOSTILE_TEXTS
from report_pages import check_page, run_started, step_end, write_run
from test_run import quick
from typer.testing import CliRunner

from lowrank_tune import Recipe, UserError, run
from lowrank_tune.cli import app
from lowrank_tune.evaluation.validation import PairScores
from lowrank_tune.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    GroupLogged,
    LogMessage,
    Progress,
    RunEnded,
    SampleLogged,
)
from lowrank_tune.ui.compare import read_runs
from lowrank_tune.ui.compare.figures import rows
from lowrank_tune.ui.formatting import format_tick
from lowrank_tune.ui.report import page, read_chain, read_run_log, write_report
from lowrank_tune.ui.report.plots import histogram_pair, reliability, scatter
from lowrank_tune.ui.svg import Series, downsample, line_chart, smooth
from lowrank_tune.ui.svg_axes import share_axis


def run_page(folder: Path, *events: Event, **files: Any) -> str:
    """Returns the page of a run folder with these events and files."""
    return page(read_run_log(write_run(folder, *events, **files)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "one"
    run(Recipe.from_dict(quick()), out=out, ui="none")
    return out


def test_report_of_a_run_contains_every_section(finished: Path) -> None:
    html = (finished / "report.html").read_text(encoding="utf-8")
    parsed = check_page(html)
    assert len(html) < 400_000
    summary, data = (json.loads((finished / f"{name}.json").read_text()) for name in ("summary", "data"))
    for words in (
        "Held-out questions",
        "Curves",
        "Samples over time",
        "Data",
        "Recipe",
        "Environment",
        "unchanged",
        summary["base_hash"]["end"],
        "validation loss",
        "gradient norm",
        "learning rate",
        "KL to the reference",
        "entropy",
        "weight w",
        "End token trained: yes",
        "torch",
    ):
        assert words in parsed.text, words
    assert f"{data['parts'][0]['tokens']:,}" in parsed.text and data["ends"]["trained"] and data["epoch"]["steps"] > 0
    assert (finished / "recipe.yaml").read_text().strip() in parsed.text
    assert any(attributes.get("class") == "chart lin" for _, attributes in parsed.tags)


def test_report_command_writes_the_same_page_again(finished: Path, tmp_path: Path) -> None:
    before = (finished / "report.html").read_bytes()
    (finished / "report.html").unlink()
    made = CliRunner().invoke(app, ["report", str(finished)])
    assert (
        made.exit_code == 0
        and made.output.strip().endswith("report.html")
        and (finished / "report.html").read_bytes() == before
    )
    made = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert made.exit_code == 2 and "not a run folder" in made.output


def test_failed_run_has_a_report(tmp_path: Path) -> None:
    recipe = quick(learning_rate=1e30, max_grad_norm=1e30, max_nonfinite_steps=1, max_steps=4)
    with pytest.raises(UserError):
        run(Recipe.from_dict(recipe), out=tmp_path / "bad", ui="none")
    assert (
        "the run failed after step" in check_page((tmp_path / "bad" / "report.html").read_text(encoding="utf-8")).text
    )


def test_hostile_text_is_inert_in_every_section(tmp_path: Path) -> None:
    for number, bad in enumerate(HOSTILE_TEXTS):
        events = [
            run_started(name=bad, model=bad, reference=bad, device=bad, versions={bad: bad}),
            LogMessage(message=bad),
            LogMessage(message=bad, level="warning"),
            step_end(1, **{bad: 1.0, "loss": 1.0}),
            Evaluated(step=1, stats={f"heldout/{bad}/accuracy": 0.5, f"eval_{bad}": 2.0}),
            SampleLogged(step=1, prompt=bad, completion=bad, finish_reason="stop", ground_truth=bad, role=bad),
            RunEnded(status="failed", step=1, seconds=1.0, message=bad),
        ]
        data = {
            "parts": [{"name": bad, "format": bad, "rows": bad}],
            "issues": [{"description": bad, "count": 1, "done": bad, "locations": [bad]}],
            "ends": {"trained": True, "tokens": {bad: 1}},
            "weighted_by": bad,
            "examples": [{"location": bad, "segments": [[True, bad], [False, bad]]}],
        }
        summary = {
            "status": "failed",
            "warnings": [bad],
            "heldout_details": {bad: {bad: 0.1, "accuracy": bad}},
            "base_hash": {"start": bad, "end": bad},
            "answers": {bad: [{"prompt": bad, "completion": bad, "ground_truth": bad}]},
        }
        folder = write_run(
            tmp_path / str(number), *events, data=data, summary=summary, base={"revision": bad, "bits": bad}
        )
        (folder / "recipe.yaml").write_bytes(bad.encode("utf-8", "surrogatepass"))
        html = page(read_run_log(folder))
        check_page(html)
        assert len(html) < 400_000


def scored(**changes: Any) -> dict[str, Any]:
    """A `scores.json` as `PairScores.to_dict` writes it."""
    bins = [{"confidence": 0.75, "accuracy": 0.5, "pairs": 2}, {"confidence": 0.98, "accuracy": 1.0, "pairs": 1}]
    found = {
        "version": 1,
        "pairs": 3,
        "chosen": [1.0, 2.0, -1.0],
        "rejected": [0.0, -2.0, 1.5],
        "chosen_tokens": [9, 20, 30],
        "rejected_tokens": [10, 12, 30],
        "reliability": bins,
        "metrics": {
            "accuracy": 0.667,
            "margin": 0.833,
            "calibration_error": 0.123,
            "length_correlation": -0.25,
            "prefers_longer": 0.5,
        },
    }
    return {**found, **changes}


def pair(number: int, score: float = 1.0, text: str = "yes") -> list[SampleLogged]:
    return [
        SampleLogged(step=number, prompt="1+1?", completion=words, finish_reason="stop", role=role, reward=reward)
        for words, role, reward in ((text, "chosen", score), ("no", "rejected", 0.25))
    ]


def test_scores_json_has_the_keys_that_the_report_reads() -> None:
    """The report reads the keys of `PairScores.to_dict`; a change there must not leave it empty."""
    torch = pytest.importorskip("torch")
    sides = {name: torch.tensor(scored()[name]) for name in ("chosen", "rejected", "chosen_tokens", "rejected_tokens")}
    scores = PairScores(**sides).to_dict()
    assert scores.keys() == scored().keys() and scores["metrics"].keys() == scored()["metrics"].keys()
    assert all(each.keys() == {"confidence", "accuracy", "pairs"} for each in scores["reliability"])


@pytest.mark.parametrize(
    ("algorithm", "title", "word"),
    [
        ("reward", "Scores of held-out pairs", "Score of both sides"),
        ("dpo", "Implicit rewards of held-out pairs", "Implicit reward by length"),
    ],
)
def test_report_contains_the_scores_of_pairs(tmp_path: Path, algorithm: str, title: str, word: str) -> None:
    summary = {"status": "done", "heldout_pairs": scored()["metrics"]}
    folder = write_run(
        tmp_path / "a",
        run_started(algorithm=algorithm),
        step_end(1, loss=0.7),
        RunEnded(status="done", step=1, seconds=1.0),
        scores=scored(),
        summary=summary,
    )
    html = page(read_run_log(folder))
    text = check_page(html).text
    for words in (
        title,
        word,
        "3 pairs",
        "Reliability",
        "calibration error 12.3 %",
        "correlation -0.25",
        "66.7 %",
        f"held-out pairs right, {algorithm}",
    ):
        assert words in text, words
    assert "perfectly calibrated" in html and "2 pairs: confidence 75.0 %, right 50.0 %" in html
    assert len(re.findall(r'<rect class="chosen"', html)) == len(re.findall(r'<rect class="rejected"', html)) == 3
    dots = re.findall(r'<path class="dots (\w+)" d="([^"]*)"', html)
    assert [(side, path.count("M")) for side, path in dots] == [("chosen", 3), ("rejected", 3)]
    assert ("reference: the base" in text) is (algorithm == "dpo")


def test_reliability_plot_has_dots_at_their_values() -> None:
    made = reliability([(0.5, 0.5, 4), (1.0, 1.0, 16)])
    ideal = re.search(r'class="ideal" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', made)
    dots = re.findall(r'<circle class="dot" cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)"', made)
    assert ideal is not None and [each[:2] for each in dots] == [ideal.groups()[:2], ideal.groups()[2:]]
    assert float(dots[0][2]) < float(dots[1][2])
    assert (
        reliability([])
        == histogram_pair({"chosen": [], "rejected": []})
        == scatter({"chosen": [], "rejected": []})
        == ""
    )


def test_histogram_pair_counts_every_score() -> None:
    made = histogram_pair({"chosen": [0.0, 1.0, 1.0, 5.0], "rejected": [-3.0]})
    counts = [(int(count), side) for count, side in re.findall(r"<title>(\d+) (chosen|rejected):", made)]
    assert (
        sum(count for count, side in counts if side == "chosen") == 4
        and (2, "chosen") in counts
        and (1, "rejected") in counts
    )
    assert histogram_pair({"chosen": [2.0], "rejected": [2.0]}).count("<rect") == 2


@pytest.mark.parametrize("values", [[0.0], [1e-12, 1e12], [-1e29, 1e29], [5.0] * 2000])
def test_pair_plots_of_extreme_scores_have_finite_coordinates(values: list[float]) -> None:
    points = [(float(place), value) for place, value in enumerate(values)]
    for made in (
        histogram_pair({"chosen": values, "rejected": values}),
        scatter({"chosen": points, "rejected": points}),
    ):
        assert "nan" not in made and "inf" not in made and len(made) < 60_000
        numbers = [
            float(n)
            for path in re.findall(r' (?:d|x|y|cx|cy|height)="([^"]*)"', made)
            for n in re.findall(r"-?[\d.]+", path)
        ]
        assert all(-1 <= n <= 561 for n in numbers)


def test_descriptions_depend_on_the_algorithm(tmp_path: Path) -> None:
    stats = {
        "accuracy": 0.5,
        "rewards/accuracies": 0.5,
        "rewards/margins": 2.0,
        "loss": 0.7,
        "rewards/chosen": 1.0,
        "rewards/rejected": -1.0,
        "logps_per_token/chosen": -1.0,
        "logps_per_token/rejected": -2.0,
        "score_chosen": 1.0,
        "score_rejected": 0.0,
        "margin": 2.0,
        "logps/chosen_delta": 0.0,
    }
    texts = {}
    for algorithm in ("sft", "reward", "dpo"):
        own = {"mean_token_accuracy": 0.5} if algorithm == "sft" else stats
        record = read_run_log(
            write_run(tmp_path / algorithm, run_started(algorithm=algorithm), step_end(1, **own), step_end(2, **own))
        )
        texts[algorithm] = check_page(page(record)).text
    assert "first choice" in texts["sft"] and "first choice" not in texts["reward"] + texts["dpo"]
    assert (
        "whose chosen answer scores higher" in texts["reward"] and "gained more against the reference" in texts["dpo"]
    )
    assert "unlearned" in texts["dpo"] and "implicit reward" in texts["dpo"] and "rewards rejected" not in texts["dpo"]
    assert (
        "score rejected" not in texts["reward"] and "rewards rejected" in texts["reward"]
    )  # a metric of another algorithm is shown


def test_report_contains_the_scores_of_each_pair_over_time(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "a",
        run_started(algorithm="reward"),
        step_end(1, loss=1.0),
        *pair(1, 0.125),
        *pair(1, 3.0, "two"),
        *pair(2, 4.0),
        pair(2)[1],
        pair(2)[0],
    )
    html = page(read_run_log(folder))
    text = check_page(html).text
    assert "Pairs and their scores over time" in text and "Samples over time" not in text
    assert html.count("<summary>1+1?</summary>") == 2 and text.count("wrong") == 1 and text.count("right") == 2
    assert text.index("+0.125") < text.index("+4.000") < text.index("+3.000") and text.count("step 2") == 1


def test_report_contains_the_lengths_of_both_sides_of_training_pairs(tmp_path: Path) -> None:
    data = {
        "sides": {"pairs": 4, "longer": 3, "shorter": 1, "equal": 0, "chosen": 20.5, "rejected": 10.0, "margins": 2}
    }
    text = check_page(run_page(tmp_path / "a", run_started(), step_end(1, loss=1.0), data=data)).text
    assert "chosen is longer" in text and "75.0 %" in text and "20.5 tokens chosen, 10.0 rejected" in text
    assert (
        "Sides of the pairs"
        not in check_page(run_page(tmp_path / "b", run_started(), step_end(1, loss=1.0), data={"sides": None})).text
    )


def group(number: int, **changes: Any) -> GroupLogged:
    completions = [
        {
            "text": f"wrote in {number}",
            "reward": 1.0,
            "advantage": 1.5,
            "finish_reason": "stop",
            "parts": {"answer": 1.0},
        }
    ] * 3
    completions.append(
        {"text": "on and on", "reward": 0.0, "advantage": -0.5, "finish_reason": "length", "parts": {"answer": 0.0}}
    )
    return GroupLogged(
        **{"step": number, "prompt": f"question {number}?", "ground_truth": "2", "completions": completions, **changes}
    )


def rollouts(count: int = 9) -> list[Event]:
    stats = {
        "loss": 1e-4,
        "reward": 0.5,
        "rewards/answer/mean": 0.4,
        "rewards/format/mean": 0.1,
        "reward_std": 0.2,
        "completions/mean_length": 20.0,
        "kl": 0.1,
        "frac_reward_zero_std": 0.0,
        "rollout_seconds": 0.03,
        "reward_seconds": 0.01,
    }
    events: list[Event] = [
        run_started(
            algorithm="grpo", roles={"policy": ["sft", "policy"], "reference": ["sft"]}, reference="the base with sft"
        )
    ]
    for number in range(1, count + 1):
        events += [group(number), step_end(number, **{**stats, "reward": number / 10})]
    return [
        *events,
        Evaluated(step=1, stats={"heldout/policy/accuracy": 0.5}),
        Evaluated(step=9, stats={"heldout/policy/accuracy": 0.75}),
    ]


def test_report_of_grpo_contains_phases_and_groups(tmp_path: Path) -> None:
    final = Evaluated(step=9, stats={"heldout/sft/accuracy": 0.25, "heldout/grpo/accuracy": 0.625})
    html = run_page(tmp_path / "a", *rollouts(), final, RunEnded(status="done", step=9, seconds=1.0))
    text = check_page(html).text
    for words in (
        "0.100 \u2192 0.900",
        "reward, mean of the first and last tenth",
        "held-out exact",
        "answers exactly (pass@1)",
        "tokens of a completion",
        "they give no gradient",
        "this reward by itself",
        "Where the time of the steps went",
        "Groups over time",
        "25.0 % \u2192 62.5 %",
    ):
        assert words in text, words
    # the policy is not a stage
    assert re.findall(r"<th>(\w*)</th>", html[html.index("Held-out questions") :])[:3] == ["", "sft", "grpo"]
    assert (
        re.findall(r"question (\d)\?", text) == ["1", "5", "9"]
        and text.count("3 \u00d7") == 3
        and text.count("cut off by the limit") == 3
    )
    phases = text[text.index("Where the time") : text.index("Groups over time")]
    assert re.findall(r"[\d.]+ %", phases) == ["30.0 %", "10.0 %", "60.0 %"]
    assert "Groups over time" not in check_page(run_page(tmp_path / "b", run_started(), step_end(1, loss=1.0))).text


def test_run_log_of_many_groups_keeps_the_first_and_the_last(tmp_path: Path) -> None:
    record = read_run_log(write_run(tmp_path / "a", *rollouts(1001)))
    kept = list(record.completion_groups)
    assert (
        len(kept) <= 64 and kept[0] == 1 and kept[-1] > 900 and record.newest is not None and record.newest.step == 1001
    )
    text = check_page(page(record)).text
    assert "question 1?" in text and "question 1001?" in text and re.search(r"question 5\d\d\?|question 4\d\d\?", text)


@pytest.mark.parametrize(
    "junk",
    [
        3,
        "x",
        [3],
        [{}],
        [{"text": 3, "reward": "x", "advantage": None, "finish_reason": [], "parts": [1]}],
        [{"reward": 1e308}],
    ],
)
def test_damaged_groups_are_shown_leniently(tmp_path: Path, junk: Any) -> None:
    check_page(
        run_page(
            tmp_path / "a",
            run_started(algorithm="grpo"),
            group(1, completions=junk),
            step_end(1, reward=1.0),
        )
    )


def test_hostile_groups_are_inert(tmp_path: Path) -> None:
    for number, bad in enumerate(HOSTILE_TEXTS):
        completions = [
            {"text": bad, "reward": 1.0, "advantage": 0.5, "finish_reason": bad, "parts": {bad: 1.0, "b": 0.0}},
            {"text": bad, "parts": bad},
        ]
        stats = {"reward": 1.0, f"rewards/{bad[:99]}/mean": 1.0}
        events = [
            run_started(algorithm="grpo"),
            group(1, prompt=bad, ground_truth=bad, completions=completions),
            step_end(1, **stats),
        ]
        html = run_page(tmp_path / str(number), *events)
        check_page(html)
        assert len(html) < 400_000


def test_report_of_a_chain_with_rollouts_has_no_column_for_the_policy(tmp_path: Path) -> None:
    folder = chain_in(tmp_path / "chain", "sft", "grpo")
    write_run(
        folder / "1-sft",
        run_started(stage=1, stages=2),
        step_end(1, loss=2.0),
        RunEnded(status="done", step=1, seconds=60.0),
        summary=stage_summary("sft", {"base": 0.1, "sft": 0.4}),
    )
    write_run(
        folder / "2-grpo",
        *rollouts(),
        Evaluated(step=9, stats={"heldout/grpo/accuracy": 0.9}),
        RunEnded(status="failed", step=9, seconds=1.0),
    )
    html = write_report(folder).read_text(encoding="utf-8")
    text = check_page(html).text
    assert re.findall(r"<th>(\w*)</th>", html[html.index("Held-out questions") :])[:4] == ["", "base", "sft", "grpo"]
    assert "SFT \u2192 GRPO" in text and "reward 0.100 \u2192 0.900" in text and "10.0 % \u2192 90.0 %" in text


def chain_in(folder: Path, *names: str) -> Path:
    folder.mkdir()
    recipe = {"name": "whole", "stages": [{"name": name} for name in names]}
    (folder / "run.json").write_text(json.dumps({"version": 2, "recipe": recipe}))
    return folder


def stage_summary(algorithm: str, who: dict[str, float], **more: Any) -> dict[str, Any]:
    answers = {
        name: [{"prompt": "1+1?", "completion": f"of {name}", "ground_truth": "2", "stopped": True}] for name in who
    }
    details = {name: {"accuracy": share} for name, share in who.items()}
    return {
        "status": "done",
        "algorithm": algorithm,
        "heldout": who,
        "heldout_details": details,
        "answers": answers,
        **more,
    }


def test_report_of_a_chain_contains_all_its_stages(tmp_path: Path) -> None:
    folder = chain_in(tmp_path / "chain", "sft", "dpo", "last")
    with pytest.raises(UserError, match="no stage of this chain has begun"):
        write_report(folder)
    first = [run_started(stage=1, stages=3), step_end(1, loss=2.0), LogMessage(message="mind", level="warning")]
    write_run(
        folder / "1-sft",
        *first,
        RunEnded(status="done", step=1, seconds=60.0),
        summary=stage_summary("sft", {"base": 0.1, "sft": 0.4}),
    )
    text = check_page(write_report(folder).read_text(encoding="utf-8")).text
    assert (
        "not ended" in text
        and "2-dpo: this stage has not begun" in text
        and "10.0 % \u2192 40.0 %" in text
        and "1-sft: mind" in text
    )
    second = [
        run_started(algorithm="dpo", stage=2, stages=3, reference="the base with sft"),
        step_end(1, loss=0.7),
        step_end(2, loss=0.6),
    ]
    write_run(
        folder / "2-dpo",
        *second,
        RunEnded(status="done", step=2, seconds=30.0),
        scores=scored(),
        summary=stage_summary("dpo", {"base": 0.1, "sft": 0.4, "dpo": 0.8}, heldout_pairs=scored()["metrics"]),
    )
    write_run(
        folder / "3-last",
        run_started(name="last", stage=3, stages=3),
        RunEnded(status="failed", step=0, seconds=1.0, message="it fell over"),
    )
    html = write_report(folder).read_text(encoding="utf-8")
    parsed = check_page(html)
    for words in (
        "whole",
        "failed",
        "10.0 % \u2192 80.0 %",
        "of base",
        "of sft",
        "of dpo",
        "Stage 2 of 3: 2-dpo",
        "Implicit rewards",
        "66.7 %",
        "0.700 \u2192 0.600",
        "the base with sft",
        "it fell over",
        "1:31",
    ):
        assert words in parsed.text, words
    assert parsed.text.count("of dpo") == 1  # the questions are shown once, over all stages
    assert [attributes["href"] for tag, attributes in parsed.tags if tag == "a"] == ["#stage-1", "#stage-2", "#stage-3"]
    for name in ("1-sft", "2-dpo", "3-last"):
        assert "<nav>" not in (folder / name / "report.html").read_text(encoding="utf-8")
    record = read_chain(folder)
    assert record.status == "failed" and list(record.stages) == ["1-sft", "2-dpo", "3-last"]


def test_chain_is_done_if_every_stage_is_done(tmp_path: Path) -> None:
    folder = chain_in(tmp_path / "chain", "a", "b")
    for name in ("1-a", "2-b"):
        assert name == "1-a" or read_chain(folder).status == "not ended"
        write_run(folder / name, run_started(), step_end(1, loss=1.0), RunEnded(status="done", step=1, seconds=1.0))
    assert read_chain(folder).status == "done"


def test_hostile_scores_and_stages_are_inert(tmp_path: Path) -> None:
    for number, bad in enumerate(HOSTILE_TEXTS):
        name = (
            "".join(
                letter for letter in bad[:40] if letter not in "/\\\0" and not "\ud800" <= letter <= "\udfff"
            ).strip(".")
            or "x"
        )
        folder = chain_in(tmp_path / str(number), name)
        events = [
            run_started(name=bad, algorithm="reward", roles={"reference": [bad]}),
            step_end(1, loss=1.0),
            SampleLogged(step=1, prompt=bad, completion=bad, finish_reason=bad, role="chosen", reward=1.0),
            SampleLogged(step=1, prompt=bad, completion=bad, finish_reason=bad, role="rejected"),
            SampleLogged(step=0, prompt=bad, completion=bad, finish_reason=bad, role="reference"),
        ]
        scores = scored(pairs=bad, metrics={"accuracy": bad, bad: 1.0}, reliability=[{"confidence": bad, bad: 1}, bad])
        write_run(
            folder / f"1-{name}",
            *events,
            scores=scores,
            data={"sides": {"pairs": 1, "longer": bad, "chosen": bad}},
            summary={"heldout_pairs": {bad: bad}},
        )
        (folder / "run.json").write_text(json.dumps({"recipe": {"name": bad, "stages": [{"name": name}]}}))
        html = write_report(folder).read_text(encoding="utf-8")
        check_page(html)
        assert len(html) < 400_000


@pytest.mark.parametrize(
    "junk",
    [
        {"chosen": 3},
        {"chosen": ["x"]},
        {"chosen": [None]},
        {"chosen": [], "rejected": []},
        {"chosen_tokens": []},
        {"rejected": [math.nan, 1.0, 2.0]},
        {
            "reliability": [
                {"confidence": math.nan, "accuracy": 0.5, "pairs": 1},
                {"confidence": 9, "accuracy": 1, "pairs": 1},
            ]
        },
        {"metrics": []},
        {"reliability": 3},
        {"pairs": math.nan},
        {"chosen": [math.inf, 1.0, 2.0]},
        {"metrics": {"accuracy": math.nan, "length_correlation": None}},
    ],
)
def test_damaged_scores_are_shown_leniently(tmp_path: Path, junk: dict[str, Any]) -> None:
    html = run_page(tmp_path / "a", run_started(algorithm="dpo"), step_end(1, loss=1.0), scores=scored(**junk))
    check_page(html)
    assert "confidence 900" not in html  # an impossible confidence is left out
    assert "nan" not in re.sub(r"<title>.*?</title>", "", html[html.index("<main>") : html.rindex("<footer>")])


def test_report_of_damaged_and_unfinished_folders_contains_what_can_be_read(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "a", run_started(), step_end(1, loss=2.0), step_end(2, loss=math.nan), step_end(3, loss=1.0)
    )
    with (folder / "events.jsonl").open("ab") as file:
        file.write(
            b'{"event": "step_end"}\nnonsense\n[1]\n{"event": "new", "x": 1}\n{"v": 2, "event": "step_end", "step": '
            b'4, "sta'
        )
    for name in ("data", "summary", "base"):
        (folder / f"{name}.json").write_text("[[[")
    text = check_page(page(read_run_log(folder))).text
    assert "has not ended: step 3" in text and "2.000 \u2192 1.000" in text
    for junk in (
        {"parts": 3, "lengths": {"edges": [0, "x"], "counts": [1]}, "epoch": [], "ends": None},
        {"parts": [{}], "examples": [{}]},
    ):
        check_page(run_page(tmp_path / "a", run_started(), data=junk, summary={"warnings": 3, "answers": {"base": 1}}))
    with pytest.raises(UserError, match="contains no events"):
        read_run_log(write_run(tmp_path / "empty"))


LONG_PATH = "/home/me/exports/" + "customer-support-conversations/" * 6 + "rows.jsonl"


def test_long_paths_are_short_with_the_whole_path_as_title(tmp_path: Path) -> None:
    data = {
        "parts": [{"name": LONG_PATH, "format": "alpaca", "rows": 60, "tokens": 7071, "trained": 10, "weight": 1.0}],
        "issues": [{"description": "malformed", "count": 1, "done": "dropped", "locations": [LONG_PATH]}],
    }
    parsed = check_page(run_page(tmp_path / "a", run_started(model=LONG_PATH), step_end(1, loss=1.0), data=data))
    titles = [attributes.get("title") for _, attributes in parsed.tags]
    assert titles.count(LONG_PATH) == 2, "of the base and of the data set"
    words = parsed.text.split()
    assert [len(word) > 190 for word in words if len(word) > 70] == [True], "a location may be wrapped"
    assert "7,071" in parsed.text and "/rows.jsonl alpaca" in parsed.text and "\u2026" in parsed.text
    spans = [attributes.get("class") or "" for tag, attributes in parsed.tags if tag == "span"]
    assert sum("path" in kinds.split() for kinds in spans) == 4


def test_headings_of_prompts_have_no_escaped_line_breaks(tmp_path: Path) -> None:
    prompt = "Question:\nWhat is 2 + 2?\n\nAnswer:"
    sample = SampleLogged(step=1, prompt=prompt, completion="4\n", finish_reason="stop", ground_truth="4")
    html = run_page(tmp_path / "a", run_started(), step_end(1, loss=1.0), sample)
    assert (
        "Question: \u23ce What is 2 + 2? \u23ce Answer:" in check_page(html).text
        and "\\n" not in html.split("<script")[0]
    )


def test_charts_have_the_names_of_the_documentation_percent_and_the_axis_step(tmp_path: Path) -> None:
    stats = {"loss": 1.0, "kl": 0.1, "grad_norm": 2.0, "memory_gib": 1.5, "mean_token_accuracy": 0.5}
    steps = [step_end(number, **stats) for number in (1, 2)]
    html = run_page(tmp_path / "a", run_started(), *steps, Evaluated(step=2, stats={"eval_mean_token_accuracy": 0.25}))
    titles = dict(re.findall(r'<h3 title="([^"]*)">([^<]*)</h3>', html))
    assert titles["kl"] == "KL to the reference" and titles["grad_norm"] == "gradient norm"
    assert titles["memory_gib"] == "peak memory" and titles["mean_token_accuracy"] == "accuracy"
    card = html[html.index('title="mean_token_accuracy"') :]
    card = card[: card.index("</svg>")]
    assert "<output>50.0 %</output>" in card and ">25 %</text>" in card and ">50 %</text>" in card
    assert ">step</text>" in card and "validation accuracy" in card
    assert html.count(">step</text>") == html.count('<svg viewBox="0 0 560') > 4


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.0, 0.0], ["0 %", "20 %", "40 %", "60 %", "80 %", "100 %"]),
        ([1.0, 1.0], ["0 %", "20 %", "40 %", "60 %", "80 %", "100 %"]),
        ([0.97, 1.0], ["97 %", "98 %", "99 %", "100 %"]),
        ([-0.5, 0.5], ["-60 %", "-40 %", "-20 %", "0 %", "20 %", "40 %", "60 %"]),
    ],
)
def test_axis_of_shares_is_in_percent_and_within_them(values: list[float], labels: list[str]) -> None:
    shown = [label for _, label in share_axis(values).labels()]
    assert shown == labels


def test_figures_that_are_not_numbers_are_left_out(tmp_path: Path) -> None:
    steps = [step_end(n, loss=(-1e308, 1e308, 2.0)[n - 1], memory_gib=(math.nan, 1.5, 1.25)[n - 1]) for n in (1, 2, 3)]
    html = run_page(tmp_path / "a", run_started(), *steps)
    text = check_page(html).text
    assert "1.50 GiB" in text and "2.000 \u2192 2.000" in text


def test_report_of_a_run_that_diverged_at_its_last_step(tmp_path: Path) -> None:
    steps = [step_end(n, loss=(1.0, math.nan)[n - 1], mean_token_accuracy=(0.5, math.nan)[n - 1]) for n in (1, 2)]
    html = run_page(
        tmp_path / "a", run_started(), *steps, RunEnded(status="failed", step=2, seconds=1.0, message="nan")
    )
    check_page(html)
    assert html.count("<output>nan</output>") == 2


def test_report_of_a_long_run_is_small(tmp_path: Path) -> None:
    events = [step_end(n, **{f"s{k}": math.sin(n / 50) + n % 7 + 2 for k in range(10)}) for n in range(1, 6001)]
    html = write_report(write_run(tmp_path / "long", run_started(), *events)).read_text(encoding="utf-8")
    assert check_page(html) and len(html) < 1_000_000


def test_downsample_keeps_spikes_and_ends() -> None:
    points = [(float(n), 0.0) for n in range(10_000)]
    points[4321], points[77] = (4321.0, 9.0), (77.0, -9.0)
    kept = downsample(points, 50)
    assert len(kept) <= 102 and {points[0], points[-1], points[4321], points[77]} <= set(kept) and kept == sorted(kept)
    assert downsample(points[:20]) == points[:20]
    assert all(value == pytest.approx(3.0) for _, value in smooth([(float(n), 3.0) for n in range(40)]))


@pytest.mark.parametrize(
    "values",
    [[1.0], [0.0, 0.0], [1e-12, 1e12], [-5.0, 5.0], [math.nan, 1.0, math.inf, 2.0], [5e-324, 1.0], [-1e300, 1e300]],
)
@pytest.mark.parametrize("log", [False, True])
def test_line_chart_of_extreme_values_has_finite_coordinates(values: list[float], log: bool) -> None:
    made = line_chart([Series("x", "smooth", list(enumerate(values)))], log)
    assert "nan" not in made and "inf" not in made
    numbers = [float(n) for path in re.findall(r' d="([^"]*)"', made) for n in re.findall(r"-?[\d.]+", path)]
    assert all(-1 <= n <= 561 for n in numbers)


def test_format_tick_uses_at_most_four_digits() -> None:
    assert [format_tick(v) for v in (0, 0.25, 1234567, 2e-4, 12345, -3.5)] == [
        "0",
        "0.25",
        "1.23e6",
        "2e-4",
        "12,345",
        "-3.5",
    ]


@pytest.mark.parametrize("end", ["interrupted", "killed", "killed while it evaluated"])
def test_wall_time_is_the_sum_of_all_sessions(tmp_path: Path, end: str) -> None:
    """Two sessions of 20 s with an hour between them: the first session counts and the hour does not."""
    stopped = [RunEnded(time=120.0, status="interrupted", step=1, seconds=20.0)] if end == "interrupted" else []
    events = [
        LogMessage(time=100.0, message="loading"),
        replace(run_started(), time=105.0),
        replace(step_end(1, loss=1.0), time=114.0),
        CheckpointSaved(time=115.0 if "while" in end else 120.0, step=1, path="step-1", seconds=1.0),
        *([Progress(time=time, description="", done=1, total=9) for time in (116.0, 120.0)] if "while" in end else []),
        *stopped,
        LogMessage(time=3720.0, message="loading"),
        replace(run_started(), time=3725.0, resumed_from=1),
        replace(step_end(2, loss=1.0), time=3740.0),
    ]
    record = read_run_log(write_run(tmp_path / "going-on", *events))
    assert record.totals.seconds == 40.0 and record.totals.sessions == 2
    finished = read_run_log(
        write_run(tmp_path / "done", *events, RunEnded(time=3741.0, status="done", step=2, seconds=21.0))
    )
    assert finished.totals.seconds == 41.0 and "wall time, 2 sessions" in check_page(page(finished)).text
    compared = dict(rows(read_runs([tmp_path / "done", tmp_path / "going-on"])))
    assert compared["wall time"] == ["0:41 (2 sessions)", "0:40 (2 sessions)"]

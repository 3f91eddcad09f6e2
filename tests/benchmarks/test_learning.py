"""Time to accuracy against TRL: the figures by hand, the reward, the picture, and both sides in seconds."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_benchmarks import FOLDER, run


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module("learning_curves.curves")


def curve(curves: Any, seconds: float, *accuracies: float, prepared: float = 0.0) -> Any:
    """A run of two steps a point, whose steps take so many CPU seconds."""
    steps = [2 * place for place in range(len(accuracies))]
    cpu = [prepared + seconds * (step + 1) for step in range(steps[-1])]
    return curves.Curve(prepared, cpu, cpu, [0.0] * steps[-1], steps, {"sampled": list(accuracies)})


def test_time_to_an_accuracy_is_on_the_line_between_two_evaluations(curves: Any) -> None:
    """Three seconds a step: 0.5 at 0 s, 0.7 at 6 s, 0.6 at 12 s, 1.0 at 18 s."""
    found = curve(curves, 3.0, 0.5, 0.7, 0.6, 1.0)
    times = [found.seconds_to("sampled", accuracy) for accuracy in (0.4, 0.5, 0.6, 0.7, 0.9)]
    assert times == pytest.approx([0.0, 0.0, 3.0, 6.0, 16.5])
    assert curve(curves, 3.0, 0.5, 0.7).seconds_to("sampled", 0.8) is None
    assert curve(curves, 3.0, 0.5, 0.7, prepared=9.0).seconds_to("sampled", 0.6) == pytest.approx(12.0)


def test_ratios_are_those_of_equal_seeds(curves: Any) -> None:
    """Ours takes 1 and 2 seconds a step, TRL 4 and 4; the second seed of TRL ends below 90 %."""
    ours = [curve(curves, 1.0, 0.5, 1.0), curve(curves, 2.0, 0.5, 1.0)]
    trl = [curve(curves, 4.0, 0.5, 1.0), curve(curves, 4.0, 0.5, 0.75)]
    settings = import_module("learning_curves.task").Settings(
        "grpo", 2, (2,), 1, 1, 0.1, "constant", 0.1, thresholds={"sampled": [0.75, 0.9]}
    )
    tables = import_module("learning_curves.tables")
    rows = tables.time_table(settings, {"ours": ours, "trl": trl}).splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert cells[0][1:] == ["1.5 (1.0 to 2.0)", "6.0 (4.0 to 8.0)", "**0.25** (0.25 to 0.25)"]
    assert cells[1][2:] == ["not reached by 1 of 2", "**0.25** (0.25 to 0.25)"]
    assert cells[2][1:] == ["3.0 (2.0 to 4.0)", "8.0 (8.0 to 8.0)", "**0.38** (0.25 to 0.50)"]
    assert cells[3][1:] == ["100.0 % (100.0 % to 100.0 %)", "87.5 % (75.0 % to 100.0 %)", ""]
    assert "sampled answers 12.5 %" in tables.agreement(settings, {"ours": ours, "trl": trl})


def test_picture_has_a_line_for_each_seed_and_a_mean(curves: Any) -> None:
    runs = {"ours": [curve(curves, 1.0, 0.5, 1.0)] * 3, "trl": [curve(curves, 4.0, 0.5, 0.9)] * 3}
    text = import_module("learning_curves.picture").picture([("grpo", "sampled", runs), ("dpo", "sampled", runs)])
    kinds = [path.get("class") for path in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}path")]
    assert [kinds.count(kind) for kind in ("ours-seed", "trl-seed", "ours", "trl")] == [12, 12, 4, 4]


@pytest.mark.parametrize(
    ("text", "end", "expected"),
    [
        ("9+6=15, 30+10=40, 40+15=55. So it is 55.", "<|end_of_turn|>", 1.0),
        ("9+6=15, 30+10=40, 40+15=55. So it is 55.", "", 0.0),
        ("It is 54.", "<|end_of_turn|>", 0.0),
        ("It is 55.<|user|>It is 55.", "<|end_of_turn|>", 0.0),
    ],
)
def test_reward(curves: Any, text: str, end: str, expected: float) -> None:
    """An answer counts only if it is right, ends by itself and has no control token."""
    setup, reward = import_module("learning_curves.setup"), import_module("learning_curves.reward")
    template = setup.template_of(setup.recipe_of("grpo", 0, 1))
    ids = template.tokenizer(text + end, add_special_tokens=False).input_ids
    assert reward.score(template, template.end_ids, ids, "55") == expected


@pytest.mark.slow
def test_both_sides_learn_the_same_task(tmp_path: Path) -> None:
    """Both take their steps from the same adapter; DPO draws nothing, so that its losses are equal."""
    pytest.importorskip("trl")
    file, picture = tmp_path / "learning.json", tmp_path / "learning.svg"
    output = run("learning.py", "--tiny", "--json", str(file), "--picture", str(picture))
    assert output.count("CPU s of all 2 steps") == 2 and picture.read_text().startswith("<svg")
    results = json.loads(file.read_text())
    for curves_of_sides in results.values():
        (ours,), (trl,) = curves_of_sides.values()
        for found in (ours, trl):
            assert found["evaluated"] == [0, 1, 2]
            assert found["prepared"] < found["cpu"][0] < found["cpu"][1]
        for metric, values in ours["accuracies"].items():
            assert values[0] == trl["accuracies"][metric][0]
    (ours,), (trl,) = results["dpo"].values()
    assert ours["prepared"] > 0 and trl["prepared"] > 0
    assert ours["values"] == pytest.approx(trl["values"], abs=1e-5)
    assert ours["accuracies"]["pairs"] == trl["accuracies"]["pairs"]

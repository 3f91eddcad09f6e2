"""`compare`: the table of figures, the common charts, the settings that differ; hostile text and half-written files."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from malformed_yaml import HOSTILE_TEXTS, is_inert
from report_pages import check_page, run_started, step_end, write_run
from typer.testing import CliRunner

from lowrank_tune import UserError
from lowrank_tune.cli import app
from lowrank_tune.events import Evaluated, Event, LogMessage, RunEnded, SampleLogged
from lowrank_tune.ui.compare import TextCanvas, compare, compare_page, read_runs, screen
from lowrank_tune.ui.compare.figures import rows
from lowrank_tune.ui.compare.runs import common_metrics, differences, labels_of
from lowrank_tune.ui.report.run_log import read_run_log
from lowrank_tune.ui.report.tiles import run_tiles
from lowrank_tune.ui.terminal.text_layout import Line, plain_text, width_of

RECORDED = Path(__file__).parents[1] / "recorded"
RECIPE = {"name": "a", "algorithm": "sft", "seed": 0, "train": {"max_steps": 9, "learning_rate": 1e-3}}


def finished(
    folder: Path,
    algorithm: str = "sft",
    exact: float = 0.5,
    recipe: dict[str, Any] | None = None,
    losses: tuple[float, ...] = (3.0, 1.0),
    **facts: Any,
) -> Path:
    """A run that has ended, with its summary and its recipe."""
    events: list[Event] = [run_started(algorithm=algorithm, steps=len(losses))]
    events += [
        step_end(number, loss=loss, kl=0.1 * number, **{"completions/mean_length": 10.0 * number})
        for number, loss in enumerate(losses, 1)
    ]
    details = {"base": {"accuracy": 0.02, "mean_length": 40.0}, algorithm: {"accuracy": exact, "mean_length": 20.0}}
    events.append(RunEnded(status="done", step=len(losses), seconds=61.0))
    files = {
        "summary": {"status": "done", "heldout_details": details, **facts},
        "run": {"version": 2, "recipe": recipe or RECIPE},
    }
    return write_run(folder, *events, **files)


def chain(folder: Path, *algorithms: str, num_started: int = 2) -> Path:
    """A chain of which `num_started` stages have ended."""
    folder.mkdir()
    stages = [{"name": algorithm, "algorithm": algorithm} for algorithm in algorithms]
    (folder / "run.json").write_text(json.dumps({"recipe": {"name": "chained", "stages": stages}}))
    for number, algorithm in list(enumerate(algorithms, 1))[:num_started]:
        finished(
            folder / f"{number}-{algorithm}",
            algorithm,
            0.3 * number,
            {"algorithm": algorithm, "adapters": {"x": {"path": str(folder)}}},
        )
    return folder


def recorded(folder: Path, name: str, keep: int | None = None) -> Path:
    """A real run as it was recorded, or what it had written after so many bytes."""
    folder.mkdir()
    (folder / "events.jsonl").write_bytes((RECORDED / f"{name}.jsonl").read_bytes()[:keep])
    return folder


def table(*folders: Path) -> dict[str, list[str]]:
    return dict(rows(read_runs(folders)))


def drawn(*folders: Path, canvas: TextCanvas = TextCanvas(120)) -> str:  # noqa: B008
    return plain_text(screen(read_runs(folders), canvas))


def test_rows_equal_figures_computed_by_hand(tmp_path: Path) -> None:
    found = table(finished(tmp_path / "a", exact=0.25, losses=(3.0, 2.5, 1.0)), finished(tmp_path / "b", "dpo", 0.75))
    assert (
        found["algorithm"] == ["sft", "dpo"]
        and found["base"] == ["tiny", "tiny"]
        and found["ended"] == ["done", "done"]
    )
    assert found["steps"] == ["3", "2"] and found["wall time"] == ["1:01", "1:01"]
    assert found["held-out exact, before"] == ["2.0 % (base)"] * 2 and found["held-out exact, after"] == [
        "25.0 % (sft)",
        "75.0 % (dpo)",
    ]
    assert found["loss, first and last"] == ["3.000 \u2192 1.000"] * 2 and found["KL to the reference, end"] == [
        "0.300",
        "0.200",
    ]
    assert found["tokens per completion"] == ["10.0 \u2192 30.0", "10.0 \u2192 20.0"] and found[
        "tokens per answer, after"
    ] == ["20.0", "20.0"]
    assert "reward, first and last" not in found and "held-out pairs right" not in found, (
        "a row without a figure is left out"
    )


def test_rows_of_chains_and_unfinished_runs(tmp_path: Path) -> None:
    whole, half = chain(tmp_path / "whole", "sft", "grpo"), chain(tmp_path / "half", "sft", "grpo", num_started=1)
    going = write_run(
        tmp_path / "going",
        run_started(algorithm="grpo"),
        step_end(1, reward=0.2),
        step_end(2, reward=0.4),
        Evaluated(step=2, stats={"heldout/policy/accuracy": 0.4}),
    )
    broken = write_run(
        tmp_path / "broken",
        run_started(),
        step_end(1, loss=1.0),
        RunEnded(status="failed", step=1, seconds=2.0, message="the disk is full"),
    )
    early = finished(tmp_path / "early", hacking={"step": 2, "ended": True})
    found = table(whole, half, going, broken, early)
    assert found["algorithm"] == ["sft \u2192 grpo", "sft", "grpo", "sft", "sft"]
    assert found["ended"] == ["done", "not ended", "not ended", "failed", "done, early"]
    assert found["steps"] == ["2 + 2", "2", "2 of 9", "1 of 9", "2"] and found["wall time"][:2] == ["2:02", "1:01"]
    assert found["held-out exact, after"] == ["60.0 % (grpo)", "30.0 % (sft)", "", "", "50.0 % (sft)"]
    assert (
        found["best while training"] == ["", "", "40.0 % (step 2)", "", ""]
        and found["reward, first and last"][2] == "0.200 \u2192 0.400"
    )
    assert found["loss, first and last"][0] == "" and found["loss, first and last"][3] == "1.000 \u2192 1.000", (
        "the loss of a policy has no meaning"
    )
    assert found["reward hacking"] == ["", "", "", "", "warned at step 2"]
    assert "broken failed: the disk is full" in drawn(whole, broken)
    stage = table(whole / "1-sft", whole / "2-grpo")
    assert stage["algorithm"] == ["sft", "grpo"], "a stage is a run folder too"


def test_common_metrics_contain_only_metrics_with_the_same_meaning(tmp_path: Path) -> None:
    sides = read_runs([recorded(tmp_path / name, name) for name in ("demo", "dpo", "reward", "grpo")])
    charts = [(name, [side.label for side in several]) for name, several in common_metrics(sides)]
    assert ("kl", ["demo", "dpo", "grpo"]) in charts and not any("accurac" in name for name, _ in charts)
    assert not [name for name, _ in charts if name == "loss"], "losses of different algorithms are different things"
    assert ("learning_rate", ["demo", "dpo", "reward", "grpo"]) in charts and all(
        len(several) > 1 for _, several in charts
    )
    twice = read_runs([recorded(tmp_path / "again", "demo"), tmp_path / "demo"])
    assert ("loss", ["again", "demo"]) in [
        (name, [side.label for side in several]) for name, several in common_metrics(twice)
    ]


@pytest.mark.parametrize("keep", [20_000, 40_003])
def test_half_written_events_are_read_up_to_the_last_whole_line(tmp_path: Path, keep: int) -> None:
    found = table(recorded(tmp_path / "whole", "grpo"), recorded(tmp_path / "part", "grpo", keep))
    steps = [
        event["step"]
        for event in map(json.loads, (RECORDED / "grpo.jsonl").read_bytes()[:keep].split(b"\n")[:-1])
        if event["event"] == "step_end"
    ]
    assert found["ended"] == ["done", "not ended"] and found["steps"][1].split(" of ")[0] == str(steps[-1])


def test_differences_contain_each_changed_setting(tmp_path: Path) -> None:
    other = {
        "name": "b",
        "algorithm": "sft",
        "seed": 0,
        "train": {"max_steps": 9, "learning_rate": 2e-3},
        "data": {"train": [{"dataset": "x"}]},
    }
    one, two = finished(tmp_path / "a"), finished(tmp_path / "b", recipe=other)
    assert differences(read_runs([one, two])) == {
        "train.learning_rate": ["0.001", "0.002"],
        "data.train.0.dataset": [None, "x"],
    }
    assert "train.learning_rate  0.001 | 0.002" in drawn(one, two) and "data.train.0.dataset  not set | x" in drawn(
        one, two
    )
    assert "the recipes are the same" in drawn(one, finished(tmp_path / "c"))
    (two / "run.json").write_text("{")
    assert "the settings of b are not known" in drawn(one, two) and "the settings of b are not known" in drawn(
        two, one
    ).replace("\n", " ")
    chains = read_runs([chain(tmp_path / "x", "sft", "dpo"), chain(tmp_path / "y", "sft", "grpo")])
    assert differences(chains) == {"stages": ["sft -> dpo", "sft -> grpo"], "algorithm": ["dpo", "grpo"]}, (
        "paths within the own folder are left out"
    )


def test_labels_are_the_shortest_distinct_paths(tmp_path: Path) -> None:
    assert labels_of([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert labels_of([tmp_path / "a" / "run", tmp_path / "b" / "other"]) == ["run", "other"]


def test_wrong_input_gives_one_sentence(tmp_path: Path) -> None:
    good = finished(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "silent")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "events.jsonl").write_bytes((RECORDED / "demo.jsonl").read_bytes()[:50])
    later = chain(tmp_path / "later", "sft", "grpo", num_started=0)
    for names, message in (
        ([good], "compare needs two runs or more"),
        ([good, good], "is named 2 times"),
        ([good, good / "events.jsonl"], "is named 2 times"),
        ([good, tmp_path / "none"], "none: there is no such run"),
        ([good, tmp_path / "empty"], "empty: not a run folder"),
        ([good, tmp_path / "silent"], "contains no events"),
        ([good, tmp_path / "half"], "contains no events"),
        ([good, later], "no stage of this chain has begun"),
    ):
        made = CliRunner().invoke(app, ["compare", *map(str, names)])
        assert (
            made.exit_code == UserError.exit_code and message in made.output and made.output.strip().count("\n") == 0
        ), made.output
    assert not list(tmp_path.glob("compare*.html"))
    made = CliRunner().invoke(
        app, ["compare", str(good), str(finished(tmp_path / "b")), "--html", str(tmp_path / "no" / "x.html")]
    )
    assert made.exit_code != 0 and "x.html" in made.output and "Traceback" not in made.output


def test_command_prints_plain_text_and_writes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    one, two = finished(tmp_path / "one"), finished(tmp_path / "two", losses=(4.0, 2.0))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    made = CliRunner().invoke(app, ["compare", str(one), str(two)])
    assert (
        made.exit_code == 0
        and "\x1b" not in made.output
        and f"the page: {tmp_path.resolve() / 'compare-one-two.html'}" in made.output
    )
    assert all(len(line) <= 120 for line in made.output.splitlines()[:-1])
    assert before == {path: path.read_bytes() for path in before}, "the runs are only read"
    text = check_page((tmp_path / "compare-one-two.html").read_text(encoding="utf-8")).text
    for words in ("one, two", "held-out exact, after", "50.0 % (sft)", "Curves", "None: the recipes are the same"):
        assert words in text, words
    assert (
        CliRunner().invoke(app, ["compare", str(one), str(two), "--html", str(tmp_path / "here.html")]).exit_code == 0
    )
    assert (tmp_path / "here.html").read_bytes() == (tmp_path / "compare-one-two.html").read_bytes()


def compared_page(*runs: Path) -> Path:
    """The page that is written without `--html`."""
    return compare(runs, None, StringIO(), {})


def test_pages_of_other_runs_stay_and_that_of_the_same_runs_is_replaced(tmp_path: Path) -> None:
    one, two, three = (finished(tmp_path / name) for name in ("one", "two", "one-two"))
    first = compared_page(one, two)
    assert first == tmp_path.resolve() / "compare-one-two.html"
    before = first.read_bytes()
    assert compared_page(two, one).name == "compare-two-one.html" and first.read_bytes() == before
    assert compared_page(one, two) == first and [page.name for page in tmp_path.glob("compare-one-*")] == [first.name]
    (tmp_path / "other").mkdir()
    other = finished(tmp_path / "other" / "two")
    assert compared_page(one, other).name == "compare-one-two-2.html", "another run of the same name"
    assert compared_page(one, other).name == "compare-one-two-2.html" and first.read_bytes() == before
    first.write_bytes(b"\xff")
    assert compared_page(one, two).name == "compare-one-two-3.html", "a file that is not a page of these runs stays"
    assert compared_page(three, one).name == "compare-one-two-one.html"


def test_name_of_a_page_is_short_and_has_no_signs_of_a_shell(tmp_path: Path) -> None:
    runs = [finished(tmp_path / name) for name in ("a b;$(x)&\n", "x" * 180, "y" * 180)]
    name = compared_page(*runs).name
    assert len(name) < 130 and re.fullmatch(r"compare-a-b-x-[\w.+-]+\.html", name)


def test_name_of_a_page_has_at_most_255_bytes(tmp_path: Path) -> None:
    page = compared_page(finished(tmp_path / ("\u7d50\u679c" * 30)), finished(tmp_path / ("\u6bd4\u8f03" * 30)))
    assert page.exists() and re.fullmatch("compare-[\u7d50\u679c]+\\.html", page.name)


def test_report_and_comparison_have_the_same_figures_under_the_same_names(tmp_path: Path) -> None:
    """Forty steps, so that a tenth is not one step."""
    folder = tmp_path / "one"
    events: list[Event] = [run_started(steps=40)]
    for number in range(1, 41):
        stats = {"loss": 40.0 / number, "kl": 0.01 * number, "tokens_per_second": 1000.0 + number % 2}
        events += [step_end(number, **stats), Evaluated(step=number, stats={"eval_loss": 41.0 - number})]
    write_run(folder, *events, RunEnded(status="done", step=40, seconds=61.0), summary={"status": "done"})
    tiles = {tile.label: tile.value for tile in run_tiles(read_run_log(folder))}
    found = {label: cells[0] for label, cells in table(folder, finished(tmp_path / "two")).items()}
    loss = f"{sum(40.0 / n for n in range(1, 5)) / 4:.3f} \u2192 {sum(40.0 / n for n in range(37, 41)) / 4:.3f}"
    assert tiles["loss, mean of the first and last tenth"] == found["loss, first and last"] == loss
    assert tiles["KL to the reference, mean of the last tenth"] == found["KL to the reference, end"] == "0.385"
    assert tiles["tokens per second"] == found["tokens per second"]
    assert tiles["validation loss, best (step 40)"] == "1.000" and found["validation loss, best"] == "1.000 (step 40)"
    html = compare_page(read_runs([folder, tmp_path / "two"]))
    assert "mean over the first or the last tenth of the steps" in html


class Tty(StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_output_has_colors_only_in_a_color_terminal(tmp_path: Path) -> None:
    runs = [finished(tmp_path / "one"), finished(tmp_path / "two")]
    page = tmp_path / "x.html"
    colored, bare, dumb = Tty(), Tty(), Tty()
    compare(runs, page, colored, {"TERM": "xterm-256color", "LANG": "en_GB.UTF-8", "COLUMNS": "80"})
    compare(runs, page, bare, {"TERM": "xterm-256color", "LANG": "en_GB.UTF-8", "NO_COLOR": "1"})
    compare(runs, page, dumb, {"TERM": "dumb", "LANG": "C"})
    assert "\x1b[96m" in colored.getvalue() and re.search("[\u2801-\u28ff]", colored.getvalue())
    assert not re.search(r"\x1b\[(3|9)\d", bare.getvalue()) and not re.search("[\u2801-\u28ff]", bare.getvalue()), (
        "signs distinguish the lines"
    )
    assert "\x1b" not in dumb.getvalue() and dumb.getvalue().isascii()
    assert "*" in bare.getvalue() and "o" in bare.getvalue()


def test_chart_has_a_line_for_each_run(tmp_path: Path) -> None:
    """In a chart each run has its own sign, at the height of its value."""
    sides = read_runs([finished(tmp_path / "high", losses=(4.0,) * 5), finished(tmp_path / "low", losses=(1.0,) * 5)])
    lines = plain_text(screen(sides, TextCanvas(80, signs=True))).splitlines()
    chart = [line[:39] for line in lines[:9]]
    assert "loss" in chart[0] and "*4" in chart[0] and "o1" in chart[0]
    assert "*" in chart[1] and "o" not in chart[1] and "o" in chart[-2] and "*" not in chart[-2]


@pytest.mark.parametrize("width", [40, 80, 120, 200])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_screen_fits_every_width_and_number_of_runs(tmp_path: Path, width: int, count: int) -> None:
    names = [f"run-{number}-{'long' * number}" for number in range(count)]
    sides = read_runs([finished(tmp_path / name) for name in names])
    for canvas in (TextCanvas(width), TextCanvas(width, signs=True), TextCanvas(width, signs=True, ascii_only=True)):
        lines: list[Line] = screen(sides, canvas)
        assert all(width_of(line) <= width for line in lines)
        text = plain_text(lines)
        assert all(name[:8] in text for name in names) and text.count("held-out exact, after") >= 1
        assert not canvas.ascii_only or text.isascii()
    if (width, count) == (80, 2):
        assert len(plain_text(screen(sides, TextCanvas(width))).split("the recipes are the same")[1].splitlines()) <= 24


def test_hostile_text_is_inert_in_page_and_screen(tmp_path: Path) -> None:
    good = finished(tmp_path / "good")
    for number, bad in enumerate(HOSTILE_TEXTS):
        events = [
            run_started(name=bad, model=bad, reference=bad, algorithm=bad),
            LogMessage(message=bad, level="warning"),
            step_end(1, **{bad: 1.0, "loss": 1.0, "kl": 1.0}),
            step_end(2, **{bad: 2.0, "loss": 1.0, "kl": 2.0}),
            Evaluated(step=1, stats={f"heldout/{bad}/accuracy": 0.5, "heldout/base/accuracy": 0.1}),
            SampleLogged(step=1, prompt=bad, completion=bad, finish_reason="stop"),
            RunEnded(status="failed", step=1, seconds=1.0, message=bad),
        ]
        folder = write_run(
            tmp_path / f"<i>&'\x1b\u202e{number}",
            *events,
            run={"recipe": {"algorithm": bad, bad: {bad: bad}}},
            summary={"status": "failed", "heldout_details": {bad: {bad: 0.1, "accuracy": bad}}, "hacking": bad},
        )
        sides = read_runs([folder, good])
        html, text = compare_page(sides), plain_text(screen(sides, TextCanvas(100)))
        check_page(html)
        assert is_inert(text) and "\x1b" not in text and len(html) < 200_000

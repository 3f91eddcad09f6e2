"""The report: one inert file without an address in it, from done, interrupted, failed, unfinished and damaged runs."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hostile import HOSTILE, is_inert
from test_run import quick
from typer.testing import CliRunner

from lowrank_tune import Recipe, UserError, run
from lowrank_tune.cli import app
from lowrank_tune.events import Event, Note, RunEnded, RunStarted, Sampled, StepDone, Validated
from lowrank_tune.sinks import line
from lowrank_tune.ui.report import page, read_record, write_report
from lowrank_tune.ui.report.charts import Line, chart, short, smooth, thin

VOID = {"meta", "input", "br", "img", "line", "path", "rect", "circle"}


class Parsed(HTMLParser):
    """Tags that open and close, attributes, and the text outside of style and script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += data


def check(html: str) -> Parsed:
    """The laws of every report."""
    assert is_inert(html) and html.encode("utf-8")
    parsed = Parsed(html)
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("script") == tags.count("style") == 1 and not {"link", "iframe", "img", "object", "a", "base", "form"} & set(tags)
    for tag, attributes in parsed.tags:
        assert not {"src", "href", "xlink:href", "action"} & set(attributes), tag
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
    own = html[html.index("<style>") : html.index("</style>")] + html[html.rindex("<script>") :]
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|innerHTML", own)
    return parsed


def write(folder: Path, *events: Event, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "events.jsonl").write_bytes(b"".join(map(line, events)))
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    return folder


def started(**changes: Any) -> RunStarted:
    told: dict[str, Any] = {"name": "one", "algorithm": "sft", "model": "tiny", "roles": {"policy": ["policy"]}, "reference": "the base",
                            "steps": 9}  # fmt: skip
    return RunStarted(**{**told, **changes})


def step(number: int, **stats: float) -> StepDone:
    return StepDone(step=number, steps=9, stats=stats, seconds=0.1, tokens=10)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "one"
    run(Recipe.from_dict(quick()), out=out, ui="none")
    return out


def test_a_run_leaves_a_report_with_everything(finished: Path) -> None:
    html = (finished / "report.html").read_text(encoding="utf-8")
    parsed = check(html)
    assert len(html) < 400_000
    summary, data = (json.loads((finished / f"{name}.json").read_text()) for name in ("summary", "data"))
    for words in ("Held-out questions", "Curves", "Samples over time", "Data", "Recipe", "Environment", "unchanged",
                  summary["base_hash"]["end"],
                  "validation loss", "grad norm", "learning rate", "kl", "entropy", "weight w", "End token trained: yes", "torch"):  # fmt: skip
        assert words in parsed.text, words
    assert f"{data['parts'][0]['tokens']:,}" in parsed.text and data["ends"]["trained"] and data["epoch"]["steps"] > 0
    assert (finished / "recipe.yaml").read_text().strip() in parsed.text
    assert any(attributes.get("class") == "chart lin" for _, attributes in parsed.tags)


def test_the_command_writes_it_anew(finished: Path, tmp_path: Path) -> None:
    before = (finished / "report.html").read_bytes()
    (finished / "report.html").unlink()
    made = CliRunner().invoke(app, ["report", str(finished)])
    assert made.exit_code == 0 and made.output.strip().endswith("report.html") and (finished / "report.html").read_bytes() == before
    made = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert made.exit_code == 2 and "no run folder" in made.output


def test_a_run_that_fails_leaves_a_report(tmp_path: Path) -> None:
    recipe = quick(learning_rate=1e30, max_grad_norm=1e30, max_bad_steps=1, steps=4)
    with pytest.raises(UserError):
        run(Recipe.from_dict(recipe), out=tmp_path / "bad", ui="none")
    assert "the run failed after step" in check((tmp_path / "bad" / "report.html").read_text(encoding="utf-8")).text


def test_hostile_text_is_inert_everywhere(tmp_path: Path) -> None:
    for number, bad in enumerate(HOSTILE):
        events = [started(name=bad, model=bad, reference=bad, device=bad, versions={bad: bad}), Note(message=bad),
                  Note(message=bad, level="warning"),
                  step(1, **{bad: 1.0, "loss": 1.0}), Validated(step=1, stats={f"heldout_{bad}_exact": 0.5, f"validation_{bad}": 2.0}),
                  Sampled(step=1, prompt=bad, completion=bad, finish="stop", gold=bad, role=bad),
                  RunEnded(status="failed", step=1, seconds=1.0, message=bad)]  # fmt: skip
        data = {"parts": [{"name": bad, "format": bad, "rows": bad}], "troubles": [{"what": bad, "count": 1, "done": bad, "places": [bad]}],
                "ends": {"trained": True, "tokens": {bad: 1}}, "weighted_by": bad,
                "examples": [{"place": bad, "segments": [[True, bad], [False, bad]]}]}  # fmt: skip
        summary = {"status": "failed", "warnings": [bad], "heldout_details": {bad: {bad: 0.1, "exact": bad}},
                   "base_hash": {"start": bad, "end": bad},
                   "answers": {bad: [{"prompt": bad, "completion": bad, "gold": bad}]}}  # fmt: skip
        folder = write(tmp_path / str(number), *events, data=data, summary=summary, base={"revision": bad, "bits": bad})
        (folder / "recipe.yaml").write_bytes(bad.encode("utf-8", "surrogatepass"))
        html = page(read_record(folder))
        check(html)
        assert len(html) < 400_000


def test_damaged_and_unfinished_folders(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", started(), step(1, loss=2.0), step(2, loss=math.nan), step(3, loss=1.0))
    with (folder / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "step"}\nnonsense\n[1]\n{"event": "new", "x": 1}\n{"v": 1, "event": "step", "step": 4, "sta')
    for name in ("data", "summary", "base"):
        (folder / f"{name}.json").write_text("[[[")
    told = check(page(read_record(folder))).text
    assert "has not ended: step 3" in told and "2.000 \u2192 1.000" in told
    for junk in ({"parts": 3, "lengths": {"edges": [0, "x"], "counts": [1]}, "epoch": [], "ends": None}, {"parts": [{}], "examples": [{}]}):
        check(page(read_record(write(tmp_path / "a", started(), data=junk, summary={"warnings": 3, "answers": {"base": 1}}))))
    with pytest.raises(UserError, match="no events"):
        read_record(write(tmp_path / "empty"))


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    events = [step(n, **{f"s{k}": math.sin(n / 50) + n % 7 + 2 for k in range(10)}) for n in range(1, 6001)]
    html = write_report(write(tmp_path / "long", started(), *events)).read_text(encoding="utf-8")
    assert check(html) and len(html) < 1_000_000


def test_thinning_keeps_spikes_and_ends() -> None:
    points = [(float(n), 0.0) for n in range(10_000)]
    points[4321], points[77] = (4321.0, 9.0), (77.0, -9.0)
    kept = thin(points, 50)
    assert len(kept) <= 102 and {points[0], points[-1], points[4321], points[77]} <= set(kept) and kept == sorted(kept)
    assert thin(points[:20]) == points[:20]
    assert all(value == pytest.approx(3.0) for _, value in smooth([(float(n), 3.0) for n in range(40)]))


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [1e-12, 1e12], [-5.0, 5.0], [math.nan, 1.0, math.inf, 2.0], [5e-324, 1.0],
                                    [-1e300, 1e300]])  # fmt: skip
@pytest.mark.parametrize("log", [False, True])
def test_charts_of_any_numbers(values: list[float], log: bool) -> None:
    made = chart([Line("x", "smooth", list(enumerate(values)))], log)
    assert "nan" not in made and "inf" not in made
    numbers = [float(n) for path in re.findall(r' d="([^"]*)"', made) for n in re.findall(r"-?[\d.]+", path)]
    assert all(-1 <= n <= 561 for n in numbers)


def test_short_numbers() -> None:
    assert [short(v) for v in (0, 0.25, 1234567, 2e-4, 12345, -3.5)] == ["0", "0.25", "1.23e6", "2e-4", "12,345", "-3.5"]

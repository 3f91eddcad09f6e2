"""Report and comparison in a real browser at 1280 and 420 pixels: nothing is cut, and all text can be read. Skipped
where there is no Chromium."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report_pages import run_started, step_end, write_run
from test_compare import finished
from test_report import chain_in, pair, rollouts, scored, stage_summary

from lowrank_tune.events import Evaluated, Event, RunEnded, SampleLogged
from lowrank_tune.ui.compare import compare_page, read_runs
from lowrank_tune.ui.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]
WIDTHS = (1280, 420)
MIN_TEXT_PIXELS = 10
LONG = "/home/me/exports/" + "customer-support-conversations/" * 6 + "rows.jsonl"
OPTIONS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--virtual-time-budget=5000",
    "--window-size=1400,900",
    "--dump-dom",
]
MEASURE = """
addEventListener("load", () => {
  document.querySelectorAll("details").forEach((each) => { each.open = true; });
  requestAnimationFrame(() => setTimeout(() => {
    const faults = [], shown = (element) => element.getClientRects().length > 0;
    const name = (element) => element.textContent.trim().slice(0, 60) || element.className;
    if (document.documentElement.scrollWidth > innerWidth) faults.push("the page is wider than the window");
    for (const box of document.querySelectorAll(".scroll")) {
      if (box.scrollWidth > box.clientWidth + 1) faults.push("scrolls: " + name(box));
    }
    let texts = 0, stacks = 0;
    for (const svg of document.querySelectorAll("svg.chart")) {
      const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
      const card = svg.closest(".card").getBoundingClientRect(), rows = {};
      for (const text of svg.querySelectorAll("text")) {
        if (!shown(text)) continue;
        texts += 1;
        const pixels = parseFloat(getComputedStyle(text).fontSize) * scale, box = text.getBoundingClientRect();
        if (pixels < MIN) faults.push("text of " + pixels.toFixed(1) + " pixels: " + name(text));
        if (box.left < card.left || box.right > card.right) faults.push("outside of its card: " + name(text));
        (rows[text.getAttribute("y")] ??= []).push([box.left, box.right, name(text)]);
      }
      for (const row of Object.values(rows)) {
        row.sort((one, two) => one[0] - two[0]);
        row.forEach((each, index) => {
          if (index && each[0] < row[index - 1][1]) faults.push("overlap: " + row[index - 1][2] + " and " + each[2]);
        });
      }
    }
    for (const element of document.querySelectorAll("h1, h2, h3, p, td, dd, summary, .tile, .alerts li, .legend")) {
      if (!shown(element)) continue;
      if (element.scrollWidth > element.clientWidth + 1) faults.push("is cut: " + name(element));
      if (element.getBoundingClientRect().right > innerWidth) faults.push("out of view: " + name(element));
    }
    for (const cell of document.querySelectorAll(".stack td")) {
      const isBlock = getComputedStyle(cell).display === "block";
      stacks += isBlock;
      if (isBlock && !cell.textContent.trim()) faults.push("a label without a value: " + cell.dataset.label);
    }
    parent.postMessage({ page: NAME, faults, texts, stacks }, "*");
  }, 50));
});
"""
HOST = """<!doctype html><body>{frames}<pre id="out"></pre><script>
const found = [];
addEventListener("message", (event) => {{
  found.push(event.data); document.getElementById("out").textContent = JSON.stringify(found);
}});
</script></body>"""


def sft(folder: Path) -> Path:
    """A run on data with a long path, with long prompts and checked rows."""
    data = {
        "parts": [
            {"name": LONG, "format": "alpaca", "rows": 60, "tokens": 7071, "trained": 3000, "weight": 0.25},
            {"name": "builtin:arithmetic", "format": "question_answer", "rows": 6, "tokens": 70, "trained": 30},
        ],
        "issues": [{"description": "malformed JSON", "count": 3, "done": "dropped", "locations": [f"{LONG}:7"] * 3}],
        "lengths": {
            "edges": [0, *(250 * n for n in range(1, 13))],
            "counts": list(range(12)),
            "limit": 3000,
            "over": 2,
        },
        "ends": {"trained": True, "tokens": {"<|end|>": 9}},
        "examples": [{"location": f"{LONG}:1", "segments": [[False, "Question"], [True, "answer"]]}],
    }
    steps: list[Event] = [
        step_end(n, loss=1234.5 / n, kl=1e-5 * n, grad_norm=0.1, learning_rate=1.25e-4, mean_token_accuracy=0.5)
        for n in range(1, 30)
    ]
    checks = [Evaluated(step=n, stats={"eval_loss": 2.0 / n}, best=True) for n in (10, 20)]
    samples = [
        SampleLogged(step=n, prompt="What?\n" * 9, completion=LONG, finish_reason="stop", ground_truth="4")
        for n in (1, 2)
    ]
    summary = {**stage_summary("sft", {"base": 0.1, "sft": 0.4}), "warnings": [f"{LONG}: 3 rows were dropped"]}
    end = RunEnded(status="done", step=29, seconds=3 * 3600.0)
    started = run_started(model=LONG, name="x" * 70, steps=29)
    return write_run(folder, started, *steps, *checks, *samples, end, data=data, summary=summary)


def chain(folder: Path) -> Path:
    chain_in(folder, "sft", "grpo")
    done = RunEnded(status="done", step=9, seconds=60.0)
    first = stage_summary("sft", {"base": 0.1, "sft": 0.4})
    write_run(folder / "1-sft", run_started(stage=1, stages=2), step_end(1, loss=2.0), done, summary=first)
    write_run(folder / "2-grpo", *rollouts(), Evaluated(step=9, stats={"heldout/grpo/accuracy": 0.9}), done)
    return folder


def dpo(folder: Path) -> Path:
    stats = {"rewards/chosen": 0.1, "rewards/rejected": -1.5, "rewards/accuracies": 0.9, "rewards/margins": 1.6}
    steps = [step_end(n, loss=0.7 / n, **stats) for n in range(1, 9)]
    return write_run(folder, run_started(algorithm="dpo"), *steps, *pair(1), *pair(2), scores=scored())


def pages(folder: Path) -> dict[str, str]:
    """Every page that is measured, by its name."""
    makers = {"sft": sft, "chain": chain, "dpo": dpo}
    made = {name: write_report(make(folder / name)).read_text(encoding="utf-8") for name, make in makers.items()}
    other: dict[str, Any] = {"algorithm": "sft", "data": {"train": [{"dataset": LONG}]}, "train": {"max_steps": 9}}
    runs = [folder / name for name in makers]
    runs += [finished(folder / "plain"), finished(folder / ("long-name-" * 6), recipe=other)]
    return {**made, "compare": compare_page(read_runs(runs))}


def measured(folder: Path, contents: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What a script in each page finds at each width."""
    assert CHROMIUM is not None
    frames = ""
    for name, content in contents.items():
        for width in WIDTHS:
            script = MEASURE.replace("NAME", json.dumps(f"{name} {width}")).replace("MIN", str(MIN_TEXT_PIXELS))
            # the policy of a page forbids other scripts than its own
            allowed = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", content)
            page = allowed.replace("</body>", f"<script>{script}</script></body>")
            frames += f'<iframe width="{width}" height="900" srcdoc="{html.escape(page)}"></iframe>'
    host = folder / "host.html"
    host.write_text(HOST.format(frames=frames), encoding="utf-8")
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={folder / 'profile'}", host.as_uri()]
    shown = subprocess.run(command, capture_output=True, check=True, text=True, timeout=120).stdout
    output = re.search(r'<pre id="out">(.*?)</pre>', shown, re.DOTALL)
    assert output is not None
    return {page["page"]: page for page in json.loads(html.unescape(output[1]))}


def test_pages_are_readable_in_a_wide_and_in_a_narrow_window(tmp_path: Path) -> None:
    contents = pages(tmp_path)
    found = measured(tmp_path, contents)
    assert len(found) == len(WIDTHS) * len(contents)
    assert {name: page["faults"] for name, page in found.items() if page["faults"]} == {}
    assert all(page["texts"] > 10 for page in found.values())
    assert {name for name, page in found.items() if page["stacks"]} == {f"{name} 420" for name in contents}


def test_faults_of_a_page_are_found(tmp_path: Path) -> None:
    page = write_report(sft(tmp_path / "sft")).read_text(encoding="utf-8")
    small = page.replace("svg .tick { font-size: 15px }", "").replace("svg .tick { font-size: 18px }", "")
    wide = page.replace("overflow-wrap: anywhere", "").replace('class="stack"', "")
    found = measured(tmp_path, {"small": small, "wide": wide})
    assert any("pixels" in fault for fault in found["small 420"]["faults"]) and not found["small 1280"]["faults"]
    assert any(fault.startswith("scrolls: ") for fault in found["wide 420"]["faults"])

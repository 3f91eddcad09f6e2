"""Run folders with written events, and what must hold for every page of the report and of `compare`."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from malformed_yaml import is_inert

from lowrank_tune.events import Event, RunStarted, StepEnd
from lowrank_tune.training.sinks import to_json_line

VOID_TAGS = {"meta", "input", "br", "img", "line", "path", "rect", "circle"}


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
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID_TAGS:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += data


def check_page(html: str) -> Parsed:
    """Checks what holds for every page: it is inert, well-formed, and contains no address; returns the parsed page."""
    assert is_inert(html) and html.encode("utf-8")
    parsed = Parsed(html)
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("script") == tags.count("style") == 1 and not {
        "link",
        "iframe",
        "img",
        "object",
        "base",
        "form",
    } & set(tags)
    places = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(places) == len(set(places))
    for tag, attributes in parsed.tags:
        if tag == "a":
            # links lead only to places within the page
            assert (
                attributes.keys() == {"href"}
                and str(attributes["href"])[:1] == "#"
                and str(attributes["href"])[1:] in places
            )
            continue
        assert not {"src", "href", "xlink:href", "action"} & set(attributes), tag
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
    own = html[html.index("<style>") : html.index("</style>")] + html[html.rindex("<script>") :]
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp|innerHTML", own)
    return parsed


def write_run(folder: Path, *events: Event, **files: Any) -> Path:
    """Writes a run folder with these events, and a JSON file for each of `files`."""
    folder.mkdir(exist_ok=True)
    (folder / "events.jsonl").write_bytes(b"".join(map(to_json_line, events)))
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    return folder


def run_started(**changes: Any) -> RunStarted:
    """Returns the event of a small SFT run, with changed fields."""
    fields: dict[str, Any] = {
        "name": "one",
        "algorithm": "sft",
        "model": "tiny",
        "roles": {"policy": ["policy"]},
        "reference": "the base",
        "steps": 9,
    }
    return RunStarted(**{**fields, **changes})


def step_end(number: int, **stats: float) -> StepEnd:
    return StepEnd(step=number, steps=9, stats=stats, seconds=0.1, tokens=10)

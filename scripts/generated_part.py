"""Pages of the documentation with a generated part between two markers; the text around it is written by hand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"


def render(page: Path, generated: str) -> str:
    """Returns a page with another generated part. Exits if the page has no markers."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page}: the markers {BEGIN} and {END} are missing")
    return f"{before}{BEGIN}\n\n{generated}\n\n{END}{after}"


def update_page(
    page: Path,
    generate: Callable[[], str],
    description: str | None,
    arguments: list[str] | None = None,
) -> int:
    """Writes the page, or with `--check` compares it. Returns the exit status."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; return 1 if the page is not up to date")
    options = parser.parse_args(arguments)
    text = render(page, generate())
    if not options.check:
        page.write_text(text, encoding="utf-8")
        return 0
    if text == page.read_text(encoding="utf-8"):
        return 0
    print(f"{page} is not up to date: run {sys.argv[0]}", file=sys.stderr)
    return 1

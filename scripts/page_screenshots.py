"""Screenshots of a page for the documentation, by Chromium: `PREFIX-1280.png`, and `PREFIX-420.png` with three parts of
the page below each other as a narrow window shows it.

    python scripts/page_screenshots.py runs/tiny-dpo/report.html docs/images/report
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--hide-scrollbars",
    "--allow-file-access-from-files",
)
WIDE, NARROW = 1280, 420
WIDE_HEIGHT, NARROW_HEIGHT = 1500, 920
PARTS = 3
GAP = 10
PART = '<div><iframe src="{page}" style="margin-top:-{top}px"></iframe></div>'
SHEET = """<!doctype html><style>
body {{ margin: 0; display: flex; gap: {gap}px; background: #888 }}
div {{ width: {width}px; height: {height}px; overflow: hidden }}
iframe {{ border: 0; width: {width}px; height: {whole}px }}
</style>{parts}"""


def narrow_sheet(page: Path) -> str:
    """Returns a page with the first parts of `page` side by side, each in a narrow frame."""
    parts = [PART.format(page=page.as_uri(), top=number * NARROW_HEIGHT) for number in range(PARTS)]
    return SHEET.format(
        gap=GAP,
        width=NARROW,
        height=NARROW_HEIGHT,
        whole=PARTS * NARROW_HEIGHT,
        parts="".join(parts),
    )


def screenshot(
    browser: str,
    page: Path,
    target: Path,
    width: int,
    height: int,
) -> None:
    """Writes a PNG of the upper part of a page. Raises CalledProcessError if the browser fails."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            *OPTIONS,
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            f"--screenshot={target}",
            page.as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=300)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("prefix", type=Path, help="path of the pictures without -WIDTH.png")
    arguments = parser.parse_args()
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is installed")
    page = arguments.page.resolve()
    prefix = arguments.prefix.resolve()
    screenshot(browser, page, Path(f"{prefix}-{WIDE}.png"), WIDE, WIDE_HEIGHT)
    with tempfile.TemporaryDirectory() as folder:
        sheet = Path(folder) / "sheet.html"
        sheet.write_text(narrow_sheet(page), encoding="utf-8")
        width = PARTS * NARROW + (PARTS - 1) * GAP
        screenshot(browser, sheet, Path(f"{prefix}-{NARROW}.png"), width, NARROW_HEIGHT)


if __name__ == "__main__":
    main()

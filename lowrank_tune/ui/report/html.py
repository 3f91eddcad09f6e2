"""Text for a page: whatever a model, a data file or a recipe wrote comes out escaped and inert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from lowrank_tune.ui import escape_control_chars

NUMERIC = ' class="n"'
LIMIT = 4000  # characters of one text; a page is for reading


def text(value: Any, limit: int = LIMIT) -> str:
    """In one line."""
    return escape(escape_control_chars(str(value), limit), quote=True)


def block(value: Any, limit: int = LIMIT) -> str:
    """With its line breaks."""
    whole = str(value)
    cut = whole[: limit + 1]
    lines = "\n".join(escape(escape_control_chars(line), quote=True) for line in cut[:limit].split("\n"))
    return lines + (f" [... {len(whole) - limit:,} characters more]" if len(cut) > limit else "")


def get_number(data: Mapping[str, Any], name: str, default: float = 0.0) -> float:
    """A number of a file that anyone may have edited."""
    value = data.get(name)
    # nan is no figure either
    if isinstance(value, (int, float)) and abs(value) < 1e300:
        return float(value)
    return default


def entries(data: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The objects of a list in such a file."""
    value = data.get(name)
    if isinstance(value, list):
        return [entry for entry in value if isinstance(entry, Mapping)]
    return []


def get_mapping(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object in such a file."""
    value = data.get(name)
    return value if isinstance(value, Mapping) else {}


def table(head: Iterable[str], rows: Iterable[Iterable[str]], numbers: Iterable[int] = ()) -> str:
    """A table of cells that are HTML already; `numbers` are the columns that stand on the right."""
    right = set(numbers)

    def cells(kind: str, row: Iterable[str]) -> str:
        return "".join(f"<{kind}{NUMERIC if index in right else ''}>{cell}</{kind}>" for index, cell in enumerate(row))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values; the values are HTML already."""
    return "<dl>" + "".join(f"<dt>{text(name)}</dt><dd>{value}</dd>" for name, value in rows) + "</dl>"

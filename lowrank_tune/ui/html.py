"""HTML pages from the templates in `ui/templates`.

A template escapes every value for HTML and, through `finalize`, escapes its control characters and limits its length.
Text of a model, a data file or a recipe is therefore inert without a filter. Only `Markup` is inserted unchanged: other
templates, `block`, the charts of `svg`, the tooltip data of `report.curves`, and the files `page.css` and `page.js`.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lowrank_tune.ui import escape_control_chars, escape_lines
from lowrank_tune.ui.formatting import format_time, percent
from lowrank_tune.ui.svg import bar

MAX_CHARS = 4000
"""Characters of one text. A longer one is cut, so that a page stays readable."""
MAX_PATH = 60
"""Characters of a path that are shown; the whole path is its tooltip."""
LINE_BREAK = "\u23ce"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)


def text(
    value: Any,
    limit: int = MAX_CHARS,
) -> str:
    """Returns `value` in one line, without control characters, in at most `limit` characters; its line breaks are shown
    as signs."""
    written = str(value)[: 8 * limit]
    if "\n" in written:
        written = f" {LINE_BREAK} ".join(line for line in written.splitlines() if line)
    return escape_control_chars(written, limit)


def middle(
    value: Any,
    limit: int = MAX_PATH,
) -> str:
    """Returns `value` in one line; a longer one without its middle. More of the end is kept, because a path ends with
    the name of its file."""
    shown = text(value)
    if len(shown) <= limit:
        return shown
    start = limit // 3
    return f"{shown[:start]}\u2026{shown[len(shown) - (limit - start - 1) :]}"


def block(
    value: Any,
    limit: int = MAX_CHARS,
) -> Markup:
    """Returns the first `limit` characters of `value` with their line breaks, without other control characters."""
    whole = str(value)
    shown = escape(escape_lines(whole[:limit]))
    left = len(whole) - limit
    if left > 0:
        return shown + f" [... {left:,} characters more]"
    return shown


def render(template: str, **values: Any) -> Markup:
    """Returns the HTML of a template."""
    return Markup(_ENVIRONMENT.get_template(f"{template}.html.jinja").render(values))


def document(
    title: str,
    body: Markup,
    source: str,
) -> str:
    """Returns a whole page in one file. It contains no address, and its policy forbids to load anything."""
    style = _read("page.css")
    script = _read("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    html = render(
        "document",
        title=title,
        body=body,
        source=source,
        policy=CONTENT_SECURITY_POLICY.format(digest=digest),
        style=style,
        script=script,
    )
    return str(html)


def style_of(name: str) -> Markup:
    """Returns a style sheet of `ui/templates`."""
    return _read(name)


def _read(name: str) -> Markup:
    return Markup(files("lowrank_tune.ui").joinpath("templates", name).read_text(encoding="utf-8"))


def _inert(value: Any) -> Any:
    if isinstance(value, (int, float, Markup)):
        return value
    return text(value)


_ENVIRONMENT = Environment(
    loader=PackageLoader("lowrank_tune.ui", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=_inert,
)
_ENVIRONMENT.filters |= {
    "text": text,
    "block": block,
    "middle": middle,
    "percent": percent,
    "utc_time": format_time,
}
_ENVIRONMENT.globals["bar"] = bar

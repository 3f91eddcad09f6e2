"""Templates: text is inert and bounded without any filter, and the templates are part of the package."""

from __future__ import annotations

from importlib.resources import files

import pytest
from jinja2 import Environment, UndefinedError
from malformed_yaml import HOSTILE_TEXTS, is_inert
from markupsafe import Markup

from lowrank_tune.ui import html
from lowrank_tune.ui.html import MAX_CHARS, block, middle, text


def rendered(template: str, **values: object) -> str:
    """Returns a template rendered as those of the package are."""
    environment: Environment = html._ENVIRONMENT
    return environment.from_string(template).render(values)


@pytest.mark.parametrize("bad", HOSTILE_TEXTS)
def test_text_without_a_filter_is_inert_and_bounded(bad: str) -> None:
    for shown in (rendered("{{ value }}", value=bad), rendered("{{ value }}", value=[bad])):
        assert is_inert(shown) and "\n" not in shown and not set("<>\"'") & set(shown)
        assert len(shown) <= 6 * MAX_CHARS
    assert rendered('<i title="{{ value }}">', value=bad).count('"') == 2


def test_block_keeps_line_breaks_and_counts_what_is_left_out() -> None:
    assert block("a\n<b>\x1b", 40) == "a\n&lt;b&gt;\\x1b"
    assert block("x" * 12, 10) == "x" * 10 + " [... 2 characters more]"
    assert text("a\nb" * 9, 7) == "a \u23ce ..." and text("\na\n\nb\n") == "a \u23ce b"


def test_middle_keeps_the_beginning_and_the_end() -> None:
    assert middle("data/rows.jsonl") == "data/rows.jsonl"
    shown = middle("/home/me/data/" + "deep/" * 30 + "rows.jsonl", 40)
    assert len(shown) == 40 and shown.startswith("/home/me/data") and shown.endswith("deep/rows.jsonl")
    assert "\n" not in middle("a\n" * 90) and is_inert(middle("\x1b" * 90))


def test_only_markup_is_inserted_unchanged() -> None:
    assert rendered("{{ value }}", value=Markup("<b>\n</b>")) == "<b>\n</b>"
    assert rendered("{{ value | text(2000) }}", value=Markup("<b>")) == "&lt;b&gt;"


def test_missing_value_raises() -> None:
    with pytest.raises(UndefinedError):
        rendered("{{ missing }}")


def test_no_template_marks_a_value_as_safe() -> None:
    templates = [path for path in files("lowrank_tune.ui").joinpath("templates").iterdir() if "jinja" in path.name]
    assert len(templates) > 10
    for template in templates:
        content = template.read_text(encoding="utf-8")
        assert "safe" not in content and "autoescape" not in content, template.name

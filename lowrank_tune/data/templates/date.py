"""The date that a chat template writes, such as Llama 3.2's "Today Date: 26 Jul 2026": fixed, so that no prompt depends
on the clock.

A template that calls `strftime_now` uses the clock. One that only reads `date_string` writes a date of its own if it
gets none, and so does other software. So a date is fixed by default for the first kind alone.

`apply_chat_template` accepts no functions for a template, so the date is fixed in the template's own text: by a first
line that defines `strftime_now` as a macro, or `date_string`.
"""

from __future__ import annotations

import json
import re
from datetime import date, datetime, time

from lowrank_tune.errors import UserError

CLOCK = "strftime_now"
VARIABLE = "date_string"
VARIABLE_FORMAT = "%d %b %Y"
"""The format in which Llama's templates write the date."""
DIRECTIVE = re.compile(r"%[-_^#0:]*\d*[EO]?[A-Za-z+]")
"""A directive of strftime, such as `%d`, `%-d`, `%^b` or `%Od`."""
PERCENT_SIGN = "\0"
"""Replaces `%%` while the directives are replaced."""


def calls_clock(chat_template: str | None) -> bool:
    """Returns whether a template may write the day on which it is rendered."""
    return CLOCK in (chat_template or "")


def fixed_date(chat_template: str | None, template_date: str | None) -> date | None:
    """Returns the date that a template is to write: `template_date`, else today if the template uses the clock. Raises
    UserError if the template would not write `template_date`."""
    if template_date is None:
        if calls_clock(chat_template):
            return date.today()
        return None
    if not calls_clock(chat_template) and VARIABLE not in (chat_template or ""):
        raise UserError(
            f"data.template_date: {template_date}, but the base's chat template writes no date (it uses neither "
            f"`{CLOCK}` nor `{VARIABLE}`); leave it out"
        )
    return date.fromisoformat(template_date)


def with_date(chat_template: str, day: date | None) -> str:
    """Returns the template that writes this day. Templates are compiled with `trim_blocks`, so the first line writes
    nothing."""
    if day is None:
        return chat_template
    midnight = datetime.combine(day, time.min)
    if not calls_clock(chat_template):
        written = json.dumps(midnight.strftime(VARIABLE_FORMAT))
        return f"{{% set {VARIABLE} = {written} %}}\n{chat_template}"
    # All that look like directives anywhere in the template: a format may be defined apart from the call.
    replacements = {"%%": PERCENT_SIGN}
    for directive in DIRECTIVE.findall(chat_template):
        replacements[directive] = midnight.strftime(directive)
    replacements[PERCENT_SIGN] = "%"
    filters = ""
    for directive, written in replacements.items():
        if directive != written:
            filters += f".replace({json.dumps(directive)}, {json.dumps(written)})"
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{chat_template}"

"""The date that a chat template writes, as Llama 3.2's "Today Date: 26 Jul 2026": fixed, so that no prompt depends on
the clock.

A template that calls `strftime_now` uses the clock. One that only reads `date_string` writes a date of its own where it
is given none, and so does other software. So a date is fixed by default for the first kind alone.

`apply_chat_template` takes no functions for a template, so the date is fixed in the template's own text: by a line in
front that defines `strftime_now` as a macro, or `date_string`.
"""

from __future__ import annotations

import json
import re
from datetime import date, datetime, time

from lowrank_tune.errors import UserError

CLOCK = "strftime_now"
VARIABLE = "date_string"
VARIABLE_FORMAT = "%d %b %Y"  # the one in which Llama's templates write it
DIRECTIVE = re.compile(r"%[-_^#0:]*\d*[EO]?[A-Za-z+]")  # as `%d`, `%-d`, `%^b`, `%Od`
PERCENT_SIGN = "\0"  # stands for `%%` while the directives are replaced


def calls_clock(chat_template: str | None) -> bool:
    """Whether a template may write the day on which it is rendered."""
    return CLOCK in (chat_template or "")


def fixed_date(chat_template: str | None, template_date: str | None) -> date | None:
    """The date that a template is to write: the one given, else today where it uses the clock. Raises UserError for a
    given one that it would not write."""
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
    """The template that writes this day. (Templates are compiled with `trim_blocks`: the line in front writes
    nothing.)"""
    if day is None:
        return chat_template
    midnight = datetime.combine(day, time.min)
    if not calls_clock(chat_template):
        return f"{{% set {VARIABLE} = {json.dumps(midnight.strftime(VARIABLE_FORMAT))} %}}\n{chat_template}"
    # All that stands in the template, whether a directive or not: a format may stand apart from the call.
    values = {name: midnight.strftime(name) for name in dict.fromkeys(DIRECTIVE.findall(chat_template))}
    values = {"%%": PERCENT_SIGN, **values, PERCENT_SIGN: "%"}
    replaced = "".join(
        f".replace({json.dumps(name)}, {json.dumps(value)})" for name, value in values.items() if name != value
    )
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{chat_template}"

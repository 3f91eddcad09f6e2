"""Variables of a chat template, such as Qwen3's `enable_thinking`, with values that a recipe sets
(`data.chat_template_kwargs`).

They are defaults in the template's own text, so that other software renders the exported template as it was trained;
an argument of a request still replaces them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from lowrank_tune.errors import UserError

TemplateKwargs = Mapping[str, bool | int | float | str]
"""The value of each variable."""
NO_KWARGS: TemplateKwargs = {}


def with_kwargs(chat_template: str, kwargs: TemplateKwargs) -> str:
    """Returns the template with these values as defaults. Templates are compiled with `trim_blocks`, so the lines write
    nothing."""
    lines = ""
    for name, value in kwargs.items():
        literal = json.dumps(value, ensure_ascii=False)
        lines += f"{{% if {name} is not defined %}}{{% set {name} = {literal} %}}{{% endif %}}\n"
    return lines + chat_template


def check_kwargs(chat_template: str | None, kwargs: TemplateKwargs) -> None:
    """Raises UserError for a variable that the template does not read."""
    unused = [name for name in kwargs if not re.search(rf"\b{name}\b", chat_template or "")]
    if not unused:
        return
    names = ", ".join(f"`{name}`" for name in unused)
    if chat_template is None:
        raise UserError(f"data.chat_template_kwargs: {names}, but the base has no chat template; leave it out")
    raise UserError(f"data.chat_template_kwargs: the base's chat template does not use {names}; leave it out")

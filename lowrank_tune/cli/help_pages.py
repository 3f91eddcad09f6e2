"""The pages of `--help`: commands in panels, without Python types."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

PANELS = {
    "Start": "demo doctor examples schema presets",
    "Train": "data plan run score",
    "Look at runs": "runs watch report compare",
    "Use what was trained": "chat eval merge export",
}
"""The commands by panel of `--help`, in their order there."""


def _no_type(ctx: Any) -> None:
    """Replaces the method that returns the type of a parameter for a help page."""


class _PlainTypes:
    """Leaves the Python types of arguments and flags (`<list[str]>`, `<bool>`) out of a help page."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if isinstance(param, TyperArgument) or (isinstance(param, TyperOption) and param.is_flag):
                vars(param)["display_type_rich"] = _no_type
        return params


class HelpCommand(_PlainTypes, TyperCommand):
    """A command without Python types in its help."""


class HelpGroup(_PlainTypes, TyperGroup):
    """A group of commands without Python types in its help."""


def arrange_commands(app: typer.Typer) -> None:
    """Puts the registered commands of an app into panels, in the order of `PANELS`."""
    panel_of: dict[str, str] = {}
    for panel, names in PANELS.items():
        panel_of |= dict.fromkeys(names.split(), panel)
    order = list(panel_of)
    app.registered_commands.sort(key=lambda command: order.index(command.name or ""))
    for command in app.registered_commands:
        _set_help(command)
        command.rich_help_panel = panel_of[command.name or ""]
    app.registered_groups.sort(key=lambda group: order.index(group.name or ""))
    for group in app.registered_groups:
        group.cls = HelpGroup
        group.rich_help_panel = panel_of[group.name or ""]
        for command in group.typer_instance.registered_commands if group.typer_instance is not None else ():
            _set_help(command)


def _set_help(command: Any) -> None:
    """Sets the help to the docstring as one paragraph, because rich keeps line breaks in a list of commands."""
    command.cls = HelpCommand
    command.help = " ".join((command.callback.__doc__ or "").split())

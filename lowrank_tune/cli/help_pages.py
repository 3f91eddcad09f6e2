"""How `--help` looks: the commands in panels, and no Python types."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

PANELS = {
    "Start": "demo doctor examples schema presets",
    "Train": "data plan run score",
    "Look at runs": "watch report compare",
    "Use what was trained": "chat eval merge export",
}
"""The commands by panel of `--help`, in their order there."""


def _no_type(ctx: Any) -> None:
    """The type of a parameter as a help page shows it: none."""


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
    """Put the registered commands of an app into their panels and their order."""
    panel_of = {name: panel for panel, names in PANELS.items() for name in names.split()}
    order = [*panel_of]
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
    """Take the help from the docstring as one paragraph: in a list of commands rich keeps the line breaks."""
    command.cls = HelpCommand
    command.help = " ".join((command.callback.__doc__ or "").split())

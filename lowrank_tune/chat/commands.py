"""Slash commands of a chat."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowrank_tune.errors import UserError, did_you_mean

HELP = {
    "/base": "[QUESTION] answers come from the base, adapters off",
    "/tuned": "[QUESTION] answers come with the adapters on",
    "/both": "[QUESTION] both answer, side by side where the terminal has 100 columns",
    "/system": "[TEXT|off] show, set or remove the system prompt",
    "/set": "[NAME VALUE] show or change the sampling options: temperature, top_p, top_k, min_p, max_new_tokens, seed",
    "/retry": "ask the last question again",
    "/undo": "take back the last question and its answers",
    "/reset": "delete the conversation",
    "/save": "FILE [base|tuned] add the conversation to FILE as a training row (JSON lines, `messages`)",
    "/help": "this list",
    "/quit": "end, as Ctrl-D does; Ctrl-C stops an answer",
}
ALIASES = {
    "/exit": "/quit",
    "/bye": "/quit",
    "/clear": "/reset",
    "/regenerate": "/retry",
    "/?": "/help",
}
COMMANDS_WITHOUT_ARGUMENT = ("/retry", "/undo", "/reset", "/help", "/quit")


@dataclass(frozen=True)
class Command:
    """A command's name, and the rest of the line."""

    name: str
    rest: str


def parse(line: str) -> Command | str:
    """Returns the command or the question in a line.

    A question that begins with a slash is written with two. Raises UserError for an unknown command.
    """
    text = line.strip()
    if not text.startswith("/"):
        return text
    if text.startswith("//"):
        return text[1:]
    name, _, rest = text.partition(" ")
    name = ALIASES.get(name, name)
    rest = rest.strip()
    if name not in HELP:
        near = did_you_mean(name, [*HELP, *ALIASES])
        raise UserError(
            f"there is no command {name}{near or ';'} /help lists them, and a question that begins with a slash is "
            f"written //..."
        )
    if rest and name in COMMANDS_WITHOUT_ARGUMENT:
        raise UserError(f"{name} takes no argument")
    return Command(name, rest)


def help_lines() -> list[str]:
    """Returns one line for each command, with the descriptions in one column."""
    rows = []
    for name, words in HELP.items():
        takes, rest = re.fullmatch(r"((?:\[[^\]]*\] |[A-Z]+ )*)(.*)", words).groups()  # type: ignore[union-attr]
        rows.append((f"{name} {takes}".rstrip(), rest))
    rows.append(('"""', 'begins a question of many lines, which ends with """'))
    width = max(len(usage) for usage, _ in rows)
    return [f"{usage:{width}}  {rest}" for usage, rest in rows]

"""Conversations that are written as one text: the transcripts of HH-RLHF, and the prompts of HelpSteer2."""

from __future__ import annotations

import re

from lowrank_tune.data.message import Message

HH_START = "\n\nHuman:"
HH_ROLE_PATTERN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
HELPSTEER_MARK = "<extra_id_1>Assistant\n"
HELPSTEER_ROLE_PATTERN = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")


def read_transcript(text: str) -> list[Message]:
    """Returns the messages of a text in the format of HH-RLHF. White space around a message is layout, not content."""
    return _messages(HH_ROLE_PATTERN.split(text)[1:])


def read_prompt_transcript(text: str) -> list[Message] | None:
    """Returns the messages of a prompt that is a transcript, without an empty answer at its end; None for another
    text.

    A prompt of HelpSteer2 begins with the text of the user, without a mark.
    """
    if text.startswith(HH_START):
        messages = read_transcript(text)
    elif HELPSTEER_MARK in text:
        messages = _messages(["User", *HELPSTEER_ROLE_PATTERN.split(text)])
    else:
        return None
    if messages[-1] == Message("assistant", ""):
        messages.pop()
    return messages


def _messages(pieces: list[str]) -> list[Message]:
    """Returns the messages of names and contents in turn."""
    messages = []
    for name, content in zip(pieces[::2], pieces[1::2], strict=True):
        if name == "Assistant":
            messages.append(Message("assistant", content.strip()))
        else:
            messages.append(Message("user", content.strip()))
    return messages

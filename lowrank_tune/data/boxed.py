"""The final answer of a reply in a box, where its end says which it is: after `####` (GSM8K), or `The answer is:`
(MetaMathQA)."""

from __future__ import annotations

import re

from lowrank_tune.data.formats import Conversation
from lowrank_tune.data.gold import last_boxed
from lowrank_tune.types import Message

HASHES = r"####[ \t]*(?P<hashes>[^\n]+)"
TOLD = r"The answer is:[ \t]*(?P<told>[^\n]+)"
END = re.compile(rf"\s*(?:^{HASHES}(?:\n+The answer is:[^\n]*)?|^{TOLD})\s*\Z", re.MULTILINE)


def boxed(reply: str) -> str:
    """The reply with its final answer in a box; as it is where no mark stands at its end. A mark that repeats the last
    box goes."""
    found = END.search(reply)
    if found is None:
        return reply
    answer, before = (found["hashes"] or found["told"]).strip(), reply[: found.start()]
    if last_boxed(answer) is not None:
        return reply
    if found["told"] and last_boxed(before) == answer.strip("$"):
        return before
    told = "The answer is $\\boxed{" + answer.strip("$").replace("\\%", "%").replace("%", "\\%") + "}$."
    return f"{before}\n{told}" if before else told


def with_box(talk: Conversation) -> Conversation:
    """The same of the last reply of a conversation; its gold answer stays what it was."""
    *others, last = talk.messages
    return (
        talk
        if last.role != "assistant"
        else Conversation((*others, Message("assistant", boxed(last.content))), talk.gold)
    )

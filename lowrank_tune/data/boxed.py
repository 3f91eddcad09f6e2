"""The final answer of a reply in a box, where its end says which it is: after `####` (GSM8K), or `The answer is:`
(MetaMathQA)."""

from __future__ import annotations

import re

from lowrank_tune.data.formats import Conversation
from lowrank_tune.data.ground_truth import last_boxed
from lowrank_tune.data.message import Message

HASHES_PATTERN = r"####[ \t]*(?P<hashes>[^\n]+)"
ANSWER_PATTERN = r"The answer is:[ \t]*(?P<told>[^\n]+)"
END_PATTERN = re.compile(rf"\s*(?:^{HASHES_PATTERN}(?:\n+The answer is:[^\n]*)?|^{ANSWER_PATTERN})\s*\Z", re.MULTILINE)


def to_boxed(reply: str) -> str:
    """The reply with its final answer in a box; as it is where no mark stands at its end. A mark that repeats the last
    box goes."""
    match = END_PATTERN.search(reply)
    if match is None:
        return reply
    answer = (match["hashes"] or match["told"]).strip()
    before = reply[: match.start()]
    if last_boxed(answer) is not None:
        return reply
    if match["told"] and last_boxed(before) == answer.strip("$"):
        return before
    sentence = "The answer is $\\boxed{" + answer.strip("$").replace("\\%", "%").replace("%", "\\%") + "}$."
    return f"{before}\n{sentence}" if before else sentence


def box_final_answer(conversation: Conversation) -> Conversation:
    """The same of the last reply of a conversation; its gold answer stays what it was."""
    *others, last = conversation.messages
    if last.role != "assistant":
        return conversation
    return Conversation((*others, Message("assistant", to_boxed(last.content))), conversation.ground_truth)

"""The text of a completion, and whether the completion ended by itself."""

from __future__ import annotations

from lowrank_tune.data import ChatTemplate
from lowrank_tune.generation.outputs import Completion


def decode_completion(completion: Completion, template: ChatTemplate) -> str:
    """Returns the text without the stop token."""
    return template.decode(completion.content_ids)


def has_stopped(completion: Completion, template: ChatTemplate) -> bool:
    """Returns whether the completion ended with a stop token and contains no special token of another turn before."""
    return completion.finish_reason == "stop" and not template.special_tokens_in(completion.content_ids)

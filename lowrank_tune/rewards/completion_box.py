r"""The boxed answer of a completion, which may be of any length and hostile."""

from __future__ import annotations

from lowrank_tune.data.ground_truth import boxed_answer, unclosed_box

# around the place where the last box begins
MAX_CHARS_BEFORE = 4000
MAX_CHARS_BEHIND = 4000


def extract_box(completion: str) -> str | None:
    r"""The contents of the last `\boxed{}`, with those that make one list with it.

    A box that nothing closes is returned as it was written, with its command: no rule reads it, so that the answer is
    wrong, and not a number somewhere inside it. None where there is no box.
    """
    start = completion.rfind("\\boxed")
    if start < 0:
        return None
    around = completion[max(0, start - MAX_CHARS_BEFORE) : start + MAX_CHARS_BEHIND]
    return unclosed_box(around) or boxed_answer(around)

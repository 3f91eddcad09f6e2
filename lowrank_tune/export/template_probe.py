"""A chat template as constant pieces of text, for software that does not read Jinja.

Most templates put the same text around every turn. The pieces are derived from what the template writes for a few probe
conversations, and then checked on others: they are used only if they give exactly the text of the template. A template
with further features (tools, thoughts of earlier turns) is described for plain conversations. White space around a
turn, which some templates trim, is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lowrank_tune.data.formats import InvalidRow

ProbeMessages = Sequence[tuple[str, str]]
"""Roles and contents; the last message is one of the user."""
Render = Callable[[list[dict[str, str]], bool], str]
"""Renders messages, with or without the generation prompt. Raises InvalidRow."""
SYSTEM = "Zq-rule"
USERS = ("Zq-ask-one", "Zq-ask-two")
ANSWER = "Zq-say-one"


@dataclass(frozen=True)
class TemplateTurns:
    """Text before the first question (`opening`), before and after the other ones (`user`), before and after an answer
    (`assistant`), and before a new answer (`generation_prompt`).

    With a system prompt, the text before and after it (`system`) replaces `opening`; None if the template has no system
    prompt. Some templates write it at the last question instead, if that is not the first: `later`.
    """

    opening: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation_prompt: str
    system: tuple[str, str] | None = None
    later: tuple[str, str] | None = None

    def write(self, messages: ProbeMessages) -> str:
        """Returns the text of a conversation, up to the beginning of a new answer."""
        system_texts = [text for role, text in messages if role == "system"]
        turns = [(role, text) for role, text in messages if role != "system"]
        parts: list[str] = []
        for number, (role, text) in enumerate(turns):
            if role == "assistant":
                parts += [
                    self.assistant[0],
                    text,
                    self.assistant[1],
                ]
                continue
            is_first = number == 0
            is_last = number == len(turns) - 1
            around_system = self._around_system(is_first, is_last)
            if system_texts and around_system:
                before, after = around_system
                parts += [before, system_texts[0], after]
            elif is_first:
                parts.append(self.opening)
            else:
                parts.append(self.user[0])
            parts += [text, self.user[1]]
        return "".join([*parts, self.generation_prompt])

    def _around_system(
        self,
        is_first: bool,
        is_last: bool,
    ) -> tuple[str, str] | None:
        """Returns the text around the system prompt, None if this question has no system prompt."""
        if is_first and (is_last or not self.later):
            return self.system
        if is_last and not is_first:
            return self.later
        return None


def derive_turns(render: Render) -> TemplateTurns | None:
    """Returns the pieces of a template, None if constant pieces do not describe it."""
    try:
        turns = _with_system(render, _without_system(render))
        for messages in _probe_conversations(turns.system is not None):
            if turns.write(messages) != _rendered(render, messages, True):
                return None
    except (InvalidRow, AssertionError):
        # the template refuses a conversation, or writes other pieces for it
        return None
    return turns


def keeps_thoughts(render: Render, turns: TemplateTurns) -> bool | None:
    """Returns whether the template writes the thoughts of earlier answers, as the pieces do; None if it refuses
    them."""
    answer = f"<think>\nHm.\n</think>\n\n{ANSWER}"
    messages = [
        ("user", USERS[0]),
        ("assistant", answer),
        ("user", USERS[1]),
    ]
    try:
        rendered = _rendered(render, messages, True)
    except InvalidRow:
        return None
    return turns.write(messages) == rendered


def _without_system(render: Render) -> TemplateTurns:
    """Returns the pieces of conversations without a system prompt. Raises AssertionError if there are none."""
    first_user, second_user = USERS
    question = [("user", first_user)]
    answered = [*question, ("assistant", ANSWER)]
    alone = _rendered(render, question, False)
    with_prompt = _rendered(render, question, True)
    closed = _rendered(render, answered, False)
    whole = _rendered(render, [*answered, ("user", second_user)], True)
    opening, end_of_user = _split(alone, first_user)
    _, end_of_answer = _split(closed, ANSWER)
    before, rest = _split(whole, first_user)
    assert before == opening
    to_answer, rest = _split(rest, ANSWER)
    between, _ = _split(rest, second_user)
    before_user = _strip_prefix(between, end_of_answer)
    before_answer = _strip_prefix(to_answer, end_of_user)
    generation_prompt = _strip_prefix(with_prompt, alone)
    return TemplateTurns(
        opening,
        (before_user, end_of_user),
        (before_answer, end_of_answer),
        generation_prompt,
    )


def _with_system(render: Render, turns: TemplateTurns) -> TemplateTurns:
    """Adds the pieces around a system prompt, if the template has one. Raises AssertionError if they are not
    constant."""
    first_user, second_user = USERS
    question = [("system", SYSTEM), ("user", first_user)]
    try:
        alone = _rendered(render, question, True)
        longer = _rendered(
            render,
            [
                *question,
                ("assistant", ANSWER),
                ("user", second_user),
            ],
            True,
        )
    except InvalidRow:
        # the template refuses system prompts
        return turns
    if SYSTEM not in alone:
        return turns
    before_system, rest = _split(alone, SYSTEM)
    after_system, _ = _split(rest, first_user)
    turns = replace(turns, system=(before_system, after_system))
    before_system, rest = _split(longer, SYSTEM)
    if ANSWER in before_system:
        _, after_answer = _split(before_system, ANSWER)
        after_system, _ = _split(rest, second_user)
        turns = replace(turns, later=(_strip_prefix(after_answer, turns.assistant[1]), after_system))
    return turns


def _probe_conversations(has_system: bool) -> list[ProbeMessages]:
    """Returns other conversations than those that the pieces were derived from."""
    turns = [
        ("user", "What is {{ 2 + 2 }}?\nSay it."),
        ("assistant", "It is 4 <b>."),
        ("user", '"Sure"?'),
        ("assistant", "Yes: 4."),
        ("user", "Thanks, Zoë!"),
    ]
    conversations: list[ProbeMessages] = [
        turns[:1],
        turns[:3],
        turns,
    ]
    if has_system:
        system = ("system", "Be brief.\n\nAnd kind.")
        conversations += [[system, *messages] for messages in conversations]
    return conversations


def _rendered(
    render: Render,
    messages: ProbeMessages,
    add_generation_prompt: bool,
) -> str:
    conversation = [{"role": role, "content": text} for role, text in messages]
    return render(conversation, add_generation_prompt)


def _split(text: str, at: str) -> tuple[str, str]:
    """Returns the text before and after `at`. Raises AssertionError unless it contains it exactly once."""
    before, separator, after = text.partition(at)
    assert separator and at not in after
    return before, after


def _strip_prefix(text: str, prefix: str) -> str:
    """Returns the text without its prefix. Raises AssertionError if it has another one."""
    assert text.startswith(prefix)
    return text[len(prefix) :]

"""A chat template as plain pieces of text, found by asking it, for software that does not read Jinja.

Most templates put the same words around every turn. Which words, is read off from what the template makes of a few
made-up talks, and then tried on others: only where the pieces write exactly what the template writes are they believed.
A template that does more than that (tools, thoughts of earlier turns) is described as far as plain talks go. White
space around a turn, which some templates trim, is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

ProbeMessages = Sequence[tuple[str, str]]
"""Roles and contents, the last one the user's."""
Render = Callable[[list[dict[str, str]], bool], str]
"""What a template makes of messages, with or without the beginning of an answer. May raise anything."""
SYSTEM = "Zq-rule"
USERS = ("Zq-ask-one", "Zq-ask-two")
ANSWER = "Zq-say-one"


@dataclass(frozen=True)
class TemplateTurns:
    """What stands before the first question, before and behind the other ones, before and behind an answer, and where
    an answer begins.

    A system text stands in `system`, before it and behind it, in the place of `opening`; None where the template takes
    none. Some templates say it at the last question, where that is not the first, in `later`.
    """

    opening: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation_prompt: str
    system: tuple[str, str] | None = None
    later: tuple[str, str] | None = None

    def write(self, messages: ProbeMessages) -> str:
        """What the model reads, up to where its answer begins."""
        system_texts = [text for role, text in messages if role == "system"]
        turns = [(role, text) for role, text in messages if role != "system"]
        out = list[str]()
        for number, (role, text) in enumerate(turns):
            first = number == 0
            last = number == len(turns) - 1
            if role == "assistant":
                out += [self.assistant[0], text, self.assistant[1]]
                continue
            if first:
                around = self.system if last or not self.later else None
            elif last:
                around = self.later
            else:
                around = None
            if system_texts and around:
                before = "".join([around[0], system_texts[0], around[1]])
            elif first:
                before = self.opening
            else:
                before = self.user[0]
            out += [before, text, self.user[1]]
        return "".join([*out, self.generation_prompt])


def derive_turns(render: Render) -> TemplateTurns | None:
    """The pieces of a template; None where it is none of this kind."""
    try:
        turns = _without_system(render)
        turns = _with_system(render, turns)
        agree = all(
            turns.write(messages) == _rendered(render, messages, True)
            for messages in _probe_conversations(turns.system is not None)
        )
    except Exception:  # templates raise what they like at talks that they do not take; then they are not of this kind
        return None
    return turns if agree else None


def keeps_thoughts(render: Render, turns: TemplateTurns) -> bool | None:
    """Whether the template writes the thoughts of earlier answers, as the pieces do; None where it refuses them."""
    answer = f"<think>\nHm.\n</think>\n\n{ANSWER}"
    messages = [("user", USERS[0]), ("assistant", answer), ("user", USERS[1])]
    try:
        rendered = _rendered(render, messages, True)
    except Exception:  # a template may raise anything
        return None
    return turns.write(messages) == rendered


def _without_system(render: Render) -> TemplateTurns:
    (first_user, second_user), answer = USERS, ANSWER
    alone = _rendered(render, [("user", first_user)], False)
    with_prompt = _rendered(render, [("user", first_user)], True)
    closed = _rendered(render, [("user", first_user), ("assistant", answer)], False)
    opening, end_of_user = _split(alone, first_user)
    end_of_answer = _split(closed, answer)[1]
    before, rest = _split(
        _rendered(render, [("user", first_user), ("assistant", answer), ("user", second_user)], True), first_user
    )
    to_answer, rest = _split(rest, answer)
    between, _ = _split(rest, second_user)
    assert before == opening
    return TemplateTurns(
        opening,
        (_strip_prefix(between, end_of_answer), end_of_user),
        (_strip_prefix(to_answer, end_of_user), end_of_answer),
        _strip_prefix(with_prompt, alone),
    )


def _with_system(render: Render, turns: TemplateTurns) -> TemplateTurns:
    rule = ("system", SYSTEM)
    question = ("user", USERS[0])
    try:
        alone = _rendered(render, [rule, question], True)
        longer = _rendered(render, [rule, question, ("assistant", ANSWER), ("user", USERS[1])], True)
    except Exception:  # it says that it takes none
        return turns
    if SYSTEM not in alone:
        return turns
    before, behind = _split(alone, SYSTEM)
    system = (before, _split(behind, USERS[0])[0])
    later = None
    before, behind = _split(longer, SYSTEM)
    if ANSWER in before:
        later = (_strip_prefix(_split(before, ANSWER)[1], turns.assistant[1]), _split(behind, USERS[1])[0])
    return replace(turns, system=system, later=later)


def _probe_conversations(system: bool) -> list[ProbeMessages]:
    """Other talks than those that the pieces were read off from."""
    turns = [
        ("user", "What is {{ 2 + 2 }}?\nSay it."),
        ("assistant", "It is 4 <b>."),
        ("user", '"Sure"?'),
        ("assistant", "Yes: 4."),
        ("user", "Thanks, Zoë!"),
    ]
    plain = [turns[:1], turns[:3], turns]
    return [*plain, *([("system", "Be brief.\n\nAnd kind."), *messages] for messages in plain if system)]


def _rendered(render: Render, messages: ProbeMessages, add_generation_prompt: bool) -> str:
    return render([{"role": role, "content": text} for role, text in messages], add_generation_prompt)


def _split(text: str, at: str) -> tuple[str, str]:
    before, separator, behind = text.partition(at)
    assert separator and at not in behind
    return before, behind


def _strip_prefix(text: str, start: str) -> str:
    assert text.startswith(start)
    return text[len(start) :]

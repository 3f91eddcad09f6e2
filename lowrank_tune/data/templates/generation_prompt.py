"""Where an answer begins: after the generation prompt, which is kept unchanged, as all other software uses it.

Most templates render an answer as the generation prompt and a continuation; then the continuation is trained. Others:

- The generation prompt opens a thought (`<think>\\n`), and the template drops the thoughts of the answers that it is
  given (DeepSeek-R1), or writes an empty one with other white space (`<think></think>`, Nemotron) or as its closing tag
  alone (`</think>`, GLM-4.7). Then the text is what a reasoning parser splits into the same thought and the same
  answer: the answer's own thought, its closing tag, and the answer as the template writes it. An answer without a
  thought follows an empty one: as the template writes it, else `<think>\\n\\n</think>\\n\\n`, which DeepSeek-R1 itself
  writes before an answer without a thought. (Without the closing tag, parsers return the whole answer as a thought.)
  An empty thought is context and not trained, also where the generation prompt opens none.
- The template drops the thought of the last answer, and its generation prompt opens none. The thought is trained
  unchanged, tags included, before the answer as the template writes it.
- The generation prompt closes a thought (Qwen3.5 without thinking). An answer with a thought cannot follow: the row is
  dropped.
- The template begins an answer with a fixed text that differs from the end of its generation prompt. The answer is
  trained from its own first character on, after the generation prompt.

Any other template is refused. A template may render earlier answers in any way; an earlier answer is trained only where
the text before it is its own prompt.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Self

from lowrank_tune.data.message import Message

_NAME = r"(?P<name>[\w:]*(?:think|thought|reason)[\w:]*)"
_OPENED = re.compile(rf"<{_NAME}>(?P<space>\s*)\Z")
_CLOSED = re.compile(rf"</{_NAME}>\s*\Z")
_EMPTY = re.compile(rf"(?P<tags>\s*<{_NAME}>\s*</(?P=name)>)\s*")
_CLOSED_AT_ONCE = re.compile(rf"(?P<tags>\s*</{_NAME}>)\s*")
THOUGHT_TAG = re.compile(rf"</?{_NAME}>")
REWRITTEN = "the chat template rewrites the turns before the last answer, so that its prompt does not come out again"
TAG_IN_ANSWER = "an answer with the tag of a thought in its text, at which the base's chat template splits it"
THOUGHT_CLOSED = (
    "its answer has a thought, and the chat template's generation prompt closes the thought before the answer"
)


def closes_thought(prompt: str) -> bool:
    """Returns whether a prompt ends with a thought that it closes."""
    return _CLOSED.search(prompt) is not None


@dataclass(frozen=True)
class OpenedThought:
    """The tag that a generation prompt opens at its end, such as `<think>`, and the white space after it."""

    name: str
    space: str

    @property
    def tag(self) -> str:
        return f"<{self.name}>"

    @property
    def closing(self) -> str:
        return f"</{self.name}>"


@dataclass(frozen=True)
class OwnThought:
    """An answer's own thought: the opening tag `before` it, if it has one, and the answer after the closing tag."""

    before: str
    text: str
    answer: str

    def is_written_in(self, completion: str) -> bool:
        """Returns whether the thought precedes the answer. An empty thought counts as written."""
        start = completion.rfind(self.answer.strip())
        before_answer = completion if start < 0 else completion[:start]
        return self.text.strip() in before_answer


@dataclass(frozen=True)
class GenerationPrompt:
    """How an answer follows a template's generation prompt.

    The prompt ends with `ends_with` where the template begins an answer with `begins_with`. Both are empty if the
    prompt is the beginning of the answered conversation, or opens a thought (`opened`). `header` is what it adds to the
    conversation.
    """

    opened: OpenedThought | None
    ends_with: str = ""
    begins_with: str = ""
    header: str = ""

    @classmethod
    def from_probe(
        cls,
        prompt: str,
        whole: str,
        question: str,
        answer: str,
    ) -> Self | None:
        """Returns how answers follow for a template that renders a question as `prompt`, and the question with its
        answer as `whole`; None for a template that is refused."""
        match = _OPENED.search(prompt)
        if match is not None:
            opened = cls(OpenedThought(match["name"], match["space"]))
            if opened.completion(prompt, whole, Message("assistant", answer)) is not None:
                return opened
            return None
        if whole.startswith(prompt):
            return cls(None)
        common = len(os.path.commonprefix([prompt, whole]))
        begins_with, found, _ = whole[common:].partition(answer)
        ends_with = prompt[common:]
        if found and question not in ends_with + begins_with:
            return cls(None, ends_with, begins_with)
        return None

    def own_thought(self, message: Message) -> OwnThought | None:
        """Returns the reasoning of an answer, or the thought in its content; None if it has neither."""
        if message.reasoning_content:
            return OwnThought("", message.reasoning_content, message.content)
        opened = self.opened or OpenedThought("think", "")
        head, closing, answer = message.content.rpartition(opened.closing)
        if not closing:
            return None
        if head.lstrip().startswith(opened.tag):
            space, tag, text = head.partition(opened.tag)
            return OwnThought(
                space + tag,
                text.removeprefix(opened.space),
                answer,
            )
        # If the prompt opens the thought, the text of a model has no opening tag.
        return OwnThought("", head, answer) if self.opened else None

    def completion(
        self,
        prompt: str,
        whole: str,
        message: Message,
    ) -> str | None:
        """Returns what follows the prompt, if the template renders the messages with this answer as `whole`.

        Returns None if the template writes another prompt or drops the answer's thought, or the prompt closes the
        thought.
        """
        thought = self.own_thought(message)
        if thought is not None and thought.text.strip() and self.refusal(prompt, message) == THOUGHT_CLOSED:
            return None
        direct = self._continuation(prompt, whole)
        if direct is not None and not self._reopens(direct) and self._is_written(message, thought, direct):
            return direct
        if thought is None and self.opened is not None:
            return self._continuation_of_thought(
                self.opened,
                prompt,
                whole,
                None,
            )
        return None

    def _is_written(self, message: Message, thought: OwnThought | None, completion: str) -> bool:
        """Returns whether a completion contains the thought of an answer, or what an answer without one contains before
        a closing tag, which a template may take for a thought."""
        if thought is not None:
            return thought.is_written_in(completion)
        opened = self.opened or OpenedThought("think", "")
        before, closing, _ = message.content.partition(opened.closing)
        return not closing or before.strip() in completion

    def completion_with_thought(
        self,
        prompt: str,
        whole: str,
        message: Message,
    ) -> str | None:
        """Returns the same for an answer whose thought the template does not write: `whole` is the rendering without
        the thought."""
        thought = self.own_thought(message)
        assert thought is not None, "an answer without a thought"
        if self.opened is not None:
            return self._continuation_of_thought(
                self.opened,
                prompt,
                whole,
                thought.text,
            )
        direct = self._continuation(prompt, whole)
        if direct is None or message.reasoning_content:
            return None
        empty = _EMPTY.match(direct)
        if empty is not None:
            direct = direct[empty.end() :]
        return f"{thought.before}{thought.text}</think>{direct}"

    def refusal(
        self,
        prompt: str,
        message: Message,
    ) -> str:
        """Returns why an answer cannot follow the prompt: a phrase by which rows are counted."""
        closed = _CLOSED.search(prompt)
        if closed is not None and (message.reasoning_content or f"</{closed['name']}>" in message.content):
            return THOUGHT_CLOSED
        if self.own_thought(message) is None and THOUGHT_TAG.search(message.content):
            return TAG_IN_ANSWER
        return REWRITTEN

    def num_untrained(self, completion: str, message: Message) -> int:
        """Returns how many characters at the beginning of a completion are not the answer's: a header that the template
        leaves out of the prompt after some messages, and an empty thought."""
        start = 0
        if self.header and completion.startswith(self.header):
            start = len(self.header)
        thought = self.own_thought(message)
        if thought is not None and thought.text.strip():
            return start
        pattern = _EMPTY if self.opened is None else _CLOSED_AT_ONCE
        empty = pattern.match(completion, start)
        if empty is None:
            return start
        # White space behind the tags is the template's, unless the answer begins with it.
        num_spaces = len(message.content) - len(message.content.lstrip())
        answer = empty.end() - num_spaces
        if answer >= empty.end("tags") and completion.startswith(message.content, answer):
            return answer
        return empty.end()

    def with_tag(self, text: str) -> str:
        """Returns a completion as the content of a message: with the tag of the prompt, if it closes the thought."""
        opened = self.opened
        if opened is None or opened.closing not in text or opened.tag in text:
            return text
        return f"{opened.tag}{opened.space}{text}"

    def _continuation(
        self,
        prompt: str,
        whole: str,
    ) -> str | None:
        """Returns what the template writes after the prompt, and instead of its end."""
        start = prompt.removesuffix(self.ends_with) + self.begins_with
        if prompt.endswith(self.ends_with) and whole.startswith(start):
            return whole[len(start) :]
        return None

    def _reopens(self, completion: str) -> bool:
        """Returns whether the template closes the opened thought at once and writes the answer's own after it."""
        if self.opened is None:
            return False
        after_closing = completion.partition(self.opened.closing)[2]
        return after_closing.lstrip().startswith(self.opened.tag)

    def _continuation_of_thought(
        self,
        opened: OpenedThought,
        prompt: str,
        whole: str,
        thought: str | None,
    ) -> str | None:
        """Returns what follows the opened tag, if `whole` is the rendering of an answer without a thought."""
        before = prompt.removesuffix(opened.tag + opened.space)
        if before == prompt or not whole.startswith(before):
            return None
        empty = "\n"
        answer = whole[len(before) :]
        if answer.startswith(opened.tag):
            empty, closing, answer = answer.removeprefix(opened.tag).partition(opened.closing)
            if not closing or empty.strip():
                return None
            empty = empty.removeprefix(opened.space)
        elif answer.startswith(opened.closing):
            empty = ""
            answer = answer.removeprefix(opened.closing)
        elif thought is None:
            answer = f"\n\n{answer}"
        return f"{thought or empty}{opened.closing}{answer}"

"""A conversation with whoever types: questions are answered by one variant or by both, commands are obeyed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from lowrank_tune.chat.chat_model import AnswerStream, ChatModel, Variant
from lowrank_tune.chat.commands import Command, help_lines, parse
from lowrank_tune.chat.conversation import ChatAnswer, Conversation, Exchange, TruncatedConversation, append_row
from lowrank_tune.chat.sampling_options import SamplingOptions
from lowrank_tune.data.message import Message
from lowrank_tune.errors import UserError
from lowrank_tune.functional import step_seed
from lowrank_tune.ui.terminal.chat_screen import AnswerView, ChatScreen

FORCE_QUIT_PRESSES = 3  # times that Ctrl-C is pressed during one answer


class ChatSession:
    """`run` reads until the end. At a terminal a fault is told and the talk goes on; elsewhere it ends with it.

    Ctrl-C stops an answer between two tokens, where nothing is half done.
    """

    def __init__(
        self,
        chat_model: ChatModel,
        screen: ChatScreen,
        options: SamplingOptions,
        variant: str,
        system_prompt: str | None,
    ) -> None:
        self.chat_model = chat_model
        self.screen = screen
        self.options = options
        self.conversation, self.variants = Conversation(), self._parse_variants(variant)
        self._forgotten: dict[Variant, int] = {}
        self._presses = 0  # of Ctrl-C, since the last line was read
        self._set_system(system_prompt)

    def run(self) -> None:
        """Raises UserError where nobody types, KeyboardInterrupt where an answer was to be stopped there, or again and
        again."""
        while True:
            try:
                line = self._read()
                if line is None:
                    return
                with self._stoppable():
                    if line.strip() and not self.handle_line(line):
                        return
            except UserError as error:
                if not self.screen.live:
                    raise
                self.screen.note(str(error), "warning")

    def _read(self) -> str | None:
        """A line; None at the end. Ctrl-C at an empty prompt says how to leave."""
        while True:
            try:
                line = self.screen.input.read()
            except KeyboardInterrupt:
                if not self.screen.live:
                    raise
                self.screen.note("\nCtrl-D or /quit ends")
                continue
            if line is None and self.screen.live:
                self.screen.write("\n")
            return line

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """While a line is obeyed, Ctrl-C is only counted. The third one ends the program: something hangs."""

        def count(number: int, frame: object) -> None:
            self._presses += 1
            if self._presses >= FORCE_QUIT_PRESSES:
                raise KeyboardInterrupt

        self._presses = 0
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may handle signals
            return
        before = signal.signal(signal.SIGINT, count)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def handle_line(self, line: str) -> bool:
        """A question or a command; False where it was to quit. Raises UserError."""
        command = parse(line)
        if isinstance(command, str):
            self.ask(command)
        elif command.name == "/quit":
            return False
        else:
            self._run_command(command)
        return True

    def _run_command(self, command: Command) -> None:
        name = command.name
        rest = command.rest
        if name in ("/base", "/tuned", "/both"):
            self.variants = self._parse_variants(name[1:])
            if rest:
                self.ask(rest)
            else:
                self.screen.note(
                    f"answers come from {' and '.join(_VARIANT_LABELS[variant] for variant in self.variants)}"
                )
        elif name == "/system":
            self._system(rest)
        elif name == "/set":
            self._set(rest)
        elif name == "/retry":
            self._retry()
        elif name == "/save":
            self._save(rest)
        else:
            {"/undo": self._undo, "/reset": self._reset, "/help": self._help}[name]()

    def ask(self, question: str) -> None:
        """A new question. Where nothing at all was answered, it is taken back. Raises UserError."""
        exchange = Exchange(question)
        histories = self._truncate_history(len(self.conversation.exchanges), question)
        self.conversation.exchanges.append(exchange)
        try:
            self._answer(exchange, histories)
        finally:
            if not exchange.answers:
                self.conversation.exchanges.pop()

    def _truncate_history(self, number: int, question: str) -> dict[Variant, TruncatedConversation]:
        """What each variant reads; where that is less of the conversation than before, it is said."""
        chat_model = self.chat_model
        histories = {
            variant: self.conversation.truncate(
                variant,
                number,
                question,
                chat_model.template,
                chat_model.positions,
                self.options.max_new_tokens,
            )
            for variant in self.variants
        }
        for variant, history in histories.items():
            if history.forgotten > self._forgotten.get(variant, 0):
                who = f" by {variant}" if len(histories) > 1 else ""
                self.screen.note(
                    f"the conversation has outgrown the base's {chat_model.positions:,} positions: its first "
                    f"{_pluralize(history.forgotten, 'exchange')} can no longer be heard{who}",
                    "warning",
                )
            self._forgotten[variant] = history.forgotten
        return histories

    def _answer(self, exchange: Exchange, histories: dict[Variant, TruncatedConversation]) -> None:
        seed = step_seed(step_seed(self.options.seed, self.conversation.exchanges.index(exchange)), exchange.attempt)
        streams = [
            AnswerStream(
                self.chat_model,
                variant,
                one.input_ids,
                self.options.sampling(self.chat_model.stop_ids, one.limit, seed),
            )
            for variant, one in histories.items()
        ]
        view = self.screen.answers([one.variant for one in streams])
        with self.screen.without_echo():
            try:
                for batch in [streams] if view.together else [[one] for one in streams]:
                    if not self._presses:
                        self._stream(batch, streams, view, exchange)
            finally:
                for one in streams:
                    one.close()
        if self._presses and not self.screen.live:
            raise KeyboardInterrupt

    def _stream(
        self,
        batch: Sequence[AnswerStream],
        streams: Sequence[AnswerStream],
        view: AnswerView,
        exchange: Exchange,
    ) -> None:
        """Token by token, in turn, until all have ended or it is stopped. What was said counts, however it ended."""
        running = {streams.index(stream): iter(stream) for stream in batch}
        while running and not self._presses:
            for number, pieces in list(running.items()):
                piece = next(pieces, None)
                if piece is not None:
                    view.add(number, piece)
                else:
                    del running[number]
                    self._end(streams[number], number, view, exchange)
        for number in running:
            self._end(streams[number], number, view, exchange)

    def _end(self, stream: AnswerStream, number: int, view: AnswerView, exchange: Exchange) -> None:
        if stream.finish_reason or stream.text:
            content = self.chat_model.template.answer_content(stream.text)
            exchange.answers[stream.variant] = ChatAnswer(content, stream.ended)
        stats, warns = _answer_stats(stream, self.options.max_new_tokens)
        view.end(number, stats, warns)

    def _parse_variants(self, name: str) -> list[Variant]:
        if name != "base" and not self.chat_model.tuned:
            raise UserError(
                "there are no adapters here, so only the base can answer: open a run to hear what it learned"
            )
        if name == "both":
            return ["base", "tuned"]
        return [cast(Variant, name)]

    def _system(self, rest: str) -> None:
        if rest:
            self._set_system(None if rest == "off" else rest)
        self.screen.note(
            f"system prompt: {self.conversation.system_prompt}"
            if self.conversation.system_prompt
            else "no system prompt"
        )

    def _set_system(self, text: str | None) -> None:
        if (
            text
            and (reason := self.chat_model.template.validate_messages([Message("system", text), Message("user", "?")]))
            is not None
        ):
            raise UserError(f"this system prompt cannot be used with this base: {reason}")
        self.conversation.system_prompt = text or None
        self._forgotten = {}

    def _set(self, rest: str) -> None:
        if not rest:
            self.screen.note("\n".join(self.options.lines()))
            return
        name, _, value = rest.replace("=", " ", 1).partition(" ")
        if not value.strip():
            raise UserError(f"/set {name} needs a value, as in `/set temperature 0.7`")
        self.options = self.options.with_value(name, value.strip())
        self.screen.note(self.options.describe(name))

    def _retry(self) -> None:
        if not self.conversation.exchanges:
            raise UserError("there is no question to ask again yet")
        exchange = self.conversation.exchanges[-1]
        number = len(self.conversation.exchanges) - 1
        histories = self._truncate_history(number, exchange.question)
        before = dict(exchange.answers)
        exchange.attempt += 1
        self._answer(exchange, histories)
        if self.options.temperature == 0 and any(
            before.get(variant) == exchange.answers.get(variant) for variant in self.variants
        ):
            self.screen.note(
                "the same again: at temperature 0 it is always the likeliest answer; `/set temperature 0.8` draws "
                "others"
            )

    def _undo(self) -> None:
        if not self.conversation.exchanges:
            raise UserError("there is nothing to take back")
        taken = self.conversation.exchanges.pop()
        self._forgotten = {}
        self.screen.note(f"taken back: {taken.question}")

    def _reset(self) -> None:
        self.conversation.exchanges.clear()
        self._forgotten = {}
        self.screen.note(
            "the conversation is forgotten; the system prompt and the settings stay"
            if self.conversation.system_prompt
            else "the conversation is forgotten; the settings stay"
        )

    def _help(self) -> None:
        self.screen.note("\n".join(help_lines()))

    def _save(self, rest: str) -> None:
        file = rest
        variant = self.variants[-1]
        for named in _VARIANT_LABELS:
            if rest.endswith(f" {named}"):
                file = rest[: -len(named)].strip()
                variant = named
        if not file:
            raise UserError("/save needs a file, as in `/save talks.jsonl`")
        messages, left_out = self.conversation.row(variant)
        if not any(message.role == "assistant" for message in messages):
            if self.conversation.exchanges:
                why = ": no answer came to an end of its own"
            else:
                why = ""
            raise UserError(f"there is nothing to save yet{why}")
        append_row(Path(file).expanduser(), messages)
        saved = len(self.conversation.exchanges) - left_out
        if left_out:
            why = f"; left out from the first answer on that did not end by itself: {_pluralize(left_out, 'exchange')}"
        else:
            why = ""
        self.screen.note(
            f"{file}: one row more, {_pluralize(saved, 'exchange')} as {variant} had it{why}",
            "warning" if left_out else "quiet",
        )


_VARIANT_LABELS: dict[Variant, str] = {"base": "the base, adapters off", "tuned": "the base with its adapters"}


def _pluralize(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _answer_stats(stream: AnswerStream, max_new_tokens: int) -> tuple[str, bool]:
    """What there is to say of an answer below it, and whether it is a warning."""
    if stream.seconds:
        pace = f"{_pluralize(stream.tokens, 'token')}, {stream.tokens / stream.seconds:.0f}/s"
    else:
        pace = _pluralize(stream.tokens, "token")
    if not stream.finish_reason:
        return f"[stopped after {pace}]", False
    if stream.finish_reason == "length":
        if stream.tokens >= max_new_tokens:
            why = "`/set max_new_tokens` to more"
        else:
            why = "the base's positions are used up; `/reset` makes room"
        return f"[cut off after {pace}: {why}]", True
    if not stream.text.strip():
        return "[no words: it ended at once]", True
    return f"[{pace}{', ended where its text begins another turn' if stream.finish_reason == 'turn' else ''}]", False

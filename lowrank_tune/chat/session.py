"""A chat session: reads lines, answers questions with one variant or both, runs slash commands."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lowrank_tune.chat.answers import chosen_variants
from lowrank_tune.chat.chat_model import AnswerStream, ChatModel, Variant
from lowrank_tune.chat.commands import Command, help_lines, parse
from lowrank_tune.chat.conversation import ChatAnswer, Conversation, Exchange, TruncatedConversation, append_row
from lowrank_tune.chat.sampling_options import SamplingOptions
from lowrank_tune.data.message import Message
from lowrank_tune.errors import UserError
from lowrank_tune.functional import step_seed
from lowrank_tune.ui.formatting import plural
from lowrank_tune.ui.terminal.chat_screen import AnswerView, ChatScreen

# Ctrl-C presses during one answer that end the program
FORCE_QUIT_PRESSES = 3


class ChatSession:
    """A session over a loaded model; `run` reads until the end of the input.

    At a terminal an error is printed and the session continues; without one it ends the session. Ctrl-C stops an answer
    between two tokens.
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
        self.conversation = Conversation()
        self.variants = chosen_variants(chat_model, variant)
        # exchanges that no longer fit the context, by variant
        self._forgotten: dict[Variant, int] = {}
        # Ctrl-C presses since the last line was read
        self._presses = 0
        self._set_system(system_prompt)

    def run(self) -> None:
        """Reads and handles lines.

        Without a terminal, raises UserError, and KeyboardInterrupt if an answer is interrupted. At a terminal, raises
        KeyboardInterrupt after repeated Ctrl-C.
        """
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
        """Returns a line, None at the end of the input. Ctrl-C at an empty prompt prints how to quit."""
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
        """Counts Ctrl-C while a line is handled. The third one ends the program, because something hangs."""

        def count(number: int, frame: object) -> None:
            self._presses += 1
            if self._presses >= FORCE_QUIT_PRESSES:
                raise KeyboardInterrupt

        self._presses = 0
        if threading.current_thread() is not threading.main_thread():
            # only the main thread may handle signals
            yield
            return
        before = signal.signal(signal.SIGINT, count)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def handle_line(self, line: str) -> bool:
        """Handles a question or a command. Returns False for /quit. Raises UserError."""
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
        match name:
            case "/base" | "/tuned" | "/both":
                self._select_variants(name[1:], rest)
            case "/system":
                self._system(rest)
            case "/set":
                self._set(rest)
            case "/retry":
                self._retry()
            case "/undo":
                self._undo()
            case "/reset":
                self._reset()
            case "/save":
                self._save(rest)
            case "/help":
                self.screen.note("\n".join(help_lines()))
            case _:
                raise AssertionError(f"{name} is not handled")

    def _select_variants(self, name: str, question: str) -> None:
        self.variants = chosen_variants(self.chat_model, name)
        if question:
            self.ask(question)
        else:
            labels = [_VARIANT_LABELS[variant] for variant in self.variants]
            self.screen.note(f"answers come from {' and '.join(labels)}")

    def ask(self, question: str) -> None:
        """Answers a new question. A question without any answer is removed again. Raises UserError."""
        exchange = Exchange(question)
        histories = self._truncate_history(len(self.conversation.exchanges), question)
        self.conversation.exchanges.append(exchange)
        try:
            self._answer(exchange, histories)
        finally:
            if not exchange.answers:
                self.conversation.exchanges.pop()

    def _truncate_history(self, number: int, question: str) -> dict[Variant, TruncatedConversation]:
        """Returns the prompt of each variant, and prints a note if it has fewer exchanges than before."""
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
                    f"the conversation has outgrown the base's {chat_model.positions:,} positions: "
                    f"{_first_exchanges(history.forgotten)} can no longer be read{who}",
                    "warning",
                )
            self._forgotten[variant] = history.forgotten
        return histories

    def _answer(self, exchange: Exchange, histories: dict[Variant, TruncatedConversation]) -> None:
        seed = step_seed(step_seed(self.options.seed, self.conversation.exchanges.index(exchange)), exchange.attempt)
        streams: list[AnswerStream] = []
        for variant, history in histories.items():
            sampling = self.options.sampling(self.chat_model.stop_ids, history.limit, seed)
            streams.append(
                AnswerStream(
                    self.chat_model,
                    variant,
                    history.input_ids,
                    sampling,
                )
            )
        view = self.screen.answers([stream.variant for stream in streams])
        # side by side, or one after the other
        batches = [streams] if view.together else [[stream] for stream in streams]
        with self.screen.without_echo():
            try:
                for batch in batches:
                    if not self._presses:
                        self._stream(
                            batch,
                            streams,
                            view,
                            exchange,
                        )
            finally:
                for stream in streams:
                    stream.close()
        if self._presses and not self.screen.live:
            raise KeyboardInterrupt

    def _stream(
        self,
        batch: Sequence[AnswerStream],
        streams: Sequence[AnswerStream],
        view: AnswerView,
        exchange: Exchange,
    ) -> None:
        """Streams answers token by token, in turn, until all end or Ctrl-C. A stopped answer keeps its text."""
        running = {streams.index(stream): iter(stream) for stream in batch}
        while running and not self._presses:
            for number, pieces in list(running.items()):
                piece = next(pieces, None)
                if piece is not None:
                    view.add(number, piece)
                else:
                    del running[number]
                    self._end(
                        streams[number],
                        number,
                        view,
                        exchange,
                    )
        for number in running:
            self._end(
                streams[number],
                number,
                view,
                exchange,
            )

    def _end(
        self,
        stream: AnswerStream,
        number: int,
        view: AnswerView,
        exchange: Exchange,
    ) -> None:
        if stream.finish_reason or stream.text:
            content = self.chat_model.template.answer_content(stream.text)
            exchange.answers[stream.variant] = ChatAnswer(content, stream.ended)
        stats, warns = _answer_stats(stream, self.options.max_new_tokens)
        view.end(number, stats, warns)

    def _system(self, rest: str) -> None:
        if rest:
            self._set_system(None if rest == "off" else rest)
        if self.conversation.system_prompt:
            self.screen.note(f"system prompt: {self.conversation.system_prompt}")
        else:
            self.screen.note("no system prompt")

    def _set_system(self, text: str | None) -> None:
        if text:
            messages = [Message("system", text), Message("user", "?")]
            reason = self.chat_model.template.validate_messages(messages)
            if reason is not None:
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
        is_repeated = any(before.get(variant) == exchange.answers.get(variant) for variant in self.variants)
        if self.options.temperature == 0 and is_repeated:
            self.screen.note(
                "the same answer: decoding is greedy at temperature 0; `/set temperature 0.8` samples others"
            )

    def _undo(self) -> None:
        if not self.conversation.exchanges:
            raise UserError("there is no question to remove")
        taken = self.conversation.exchanges.pop()
        self._forgotten = {}
        self.screen.note(f"removed: {taken.question}")

    def _reset(self) -> None:
        self.conversation.exchanges.clear()
        self._forgotten = {}
        kept = "the system prompt and the settings" if self.conversation.system_prompt else "the settings"
        self.screen.note(f"the conversation is deleted; {kept} stay")

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
            why = ": every answer was cut off or stopped" if self.conversation.exchanges else ""
            raise UserError(f"there is nothing to save yet{why}")
        append_row(Path(file).expanduser(), messages)
        saved = len(self.conversation.exchanges) - left_out
        message = f"{file}: one row more, {plural(saved, 'exchange')} of {variant}"
        style = "quiet"
        if left_out:
            message += f"; left out from the first answer on that did not end by itself: {plural(left_out, 'exchange')}"
            style = "warning"
        self.screen.note(message, style)


_VARIANT_LABELS: dict[Variant, str] = {"base": "the base, adapters off", "tuned": "the base with its adapters"}


def _first_exchanges(number: int) -> str:
    return "its first exchange" if number == 1 else f"its first {number} exchanges"


def _answer_stats(stream: AnswerStream, max_new_tokens: int) -> tuple[str, bool]:
    """Returns the line below an answer, and whether it is a warning."""
    pace = plural(stream.tokens, "token")
    if stream.seconds:
        pace += f", {stream.tokens / stream.seconds:.0f}/s"
    if not stream.finish_reason:
        return f"[stopped after {pace}]", False
    if stream.finish_reason == "length":
        if stream.tokens >= max_new_tokens:
            why = "`/set max_new_tokens` to more"
        else:
            why = "the base's positions are used up; `/reset` makes room"
        return f"[cut off after {pace}: {why}]", True
    if not stream.text.strip():
        return "[empty: the answer ended at once]", True
    if stream.finish_reason == "turn":
        return f"[{pace}, ended where its text begins another turn]", False
    return f"[{pace}]", False

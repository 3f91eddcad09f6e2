"""A conversation with whoever types: questions are answered by one voice or by both, commands are obeyed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from lowrank_tune.chat.commands import Command, help_lines, parse
from lowrank_tune.chat.speaker import Answering, Speaker, Voice
from lowrank_tune.chat.talk import Answer, Exchange, Fitted, Talk, append_row
from lowrank_tune.chat.wishes import Wishes
from lowrank_tune.errors import UserError
from lowrank_tune.maths import step_seed
from lowrank_tune.types import Message
from lowrank_tune.ui.talk import Screen, Shown

ENOUGH = 3  # times that Ctrl-C is pressed during one answer


class Session:
    """`run` reads until the end. At a terminal a fault is told and the talk goes on; elsewhere it ends with it.

    Ctrl-C stops an answer between two tokens, where nothing is half done.
    """

    def __init__(self, speaker: Speaker, screen: Screen, wishes: Wishes, voice: str, system: str | None) -> None:
        self.speaker, self.screen, self.wishes = speaker, screen, wishes
        self.talk, self.voices = Talk(), self._voices(voice)
        self._forgotten: dict[Voice, int] = {}
        self._presses = 0  # of Ctrl-C, since the last line was read
        self._set_system(system)

    def run(self) -> None:
        """Raises UserError where nobody types, KeyboardInterrupt where an answer was to be stopped there, or again and
        again."""
        while True:
            try:
                line = self._read()
                if line is None:
                    return
                with self._stoppable():
                    if line.strip() and not self.take(line):
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
            if self._presses >= ENOUGH:
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

    def take(self, line: str) -> bool:
        """A question or a command; False where it was to quit. Raises UserError."""
        wanted = parse(line)
        if isinstance(wanted, str):
            self.ask(wanted)
        elif wanted.name == "/quit":
            return False
        else:
            self._obey(wanted)
        return True

    def _obey(self, command: Command) -> None:
        name, rest = command.name, command.rest
        if name in ("/base", "/tuned", "/both"):
            self.voices = self._voices(name[1:])
            if rest:
                self.ask(rest)
            else:
                self.screen.note(f"answers come from {' and '.join(_WORDS[voice] for voice in self.voices)}")
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
        fitted = self._fit(len(self.talk.exchanges), question)
        self.talk.exchanges.append(exchange)
        try:
            self._answer(exchange, fitted)
        finally:
            if not exchange.answers:
                self.talk.exchanges.pop()

    def _fit(self, number: int, question: str) -> dict[Voice, Fitted]:
        """What each voice reads; where that is less of the conversation than before, it is said."""
        speaker = self.speaker
        found = {
            voice: self.talk.fit(
                voice, number, question, speaker.template, speaker.positions, self.wishes.max_new_tokens
            )
            for voice in self.voices
        }
        for voice, fitted in found.items():
            if fitted.forgotten > self._forgotten.get(voice, 0):
                who = f" by {voice}" if len(found) > 1 else ""
                self.screen.note(
                    f"the conversation has outgrown the base's {speaker.positions:,} positions: its first "
                    f"{_counted(fitted.forgotten, 'exchange')} can no longer be heard{who}",
                    "warning",
                )
            self._forgotten[voice] = fitted.forgotten
        return found

    def _answer(self, exchange: Exchange, fitted: dict[Voice, Fitted]) -> None:
        seed = step_seed(step_seed(self.wishes.seed, self.talk.exchanges.index(exchange)), exchange.attempt)
        drawn = [
            Answering(self.speaker, voice, one.ids, self.wishes.sampling(self.speaker.stop_ids, one.limit, seed))
            for voice, one in fitted.items()
        ]
        shown = self.screen.answers([one.voice for one in drawn])
        with self.screen.speaking():
            try:
                for batch in [drawn] if shown.together else [[one] for one in drawn]:
                    if not self._presses:
                        self._draw(batch, drawn, shown, exchange)
            finally:
                for one in drawn:
                    one.close()
        if self._presses and not self.screen.live:
            raise KeyboardInterrupt

    def _draw(self, batch: Sequence[Answering], drawn: Sequence[Answering], shown: Shown, exchange: Exchange) -> None:
        """Token by token, in turn, until all have ended or it is stopped. What was said counts, however it ended."""
        running = {drawn.index(one): iter(one) for one in batch}
        while running and not self._presses:
            for number, pieces in list(running.items()):
                piece = next(pieces, None)
                if piece is not None:
                    shown.add(number, piece)
                else:
                    del running[number]
                    self._end(drawn[number], number, shown, exchange)
        for number in running:
            self._end(drawn[number], number, shown, exchange)

    def _end(self, one: Answering, number: int, shown: Shown, exchange: Exchange) -> None:
        if one.finish or one.text:
            exchange.answers[one.voice] = Answer(one.text, one.ended)
        told, warns = _facts(one, self.wishes.max_new_tokens)
        shown.end(number, told, warns)

    def _voices(self, name: str) -> list[Voice]:
        if name != "base" and not self.speaker.tuned:
            raise UserError(
                "there are no adapters here, so only the base can answer: open a run to hear what it learned"
            )
        return ["base", "tuned"] if name == "both" else [cast(Voice, name)]

    def _system(self, rest: str) -> None:
        if rest:
            self._set_system(None if rest == "off" else rest)
        self.screen.note(f"system prompt: {self.talk.system}" if self.talk.system else "no system prompt")

    def _set_system(self, text: str | None) -> None:
        if (
            text
            and (reason := self.speaker.template.spoils([Message("system", text), Message("user", "?")])) is not None
        ):
            raise UserError(f"this system prompt cannot be used with this base: {reason}")
        self.talk.system, self._forgotten = text or None, {}

    def _set(self, rest: str) -> None:
        if not rest:
            self.screen.note("\n".join(self.wishes.lines()))
            return
        name, _, value = rest.replace("=", " ", 1).partition(" ")
        if not value.strip():
            raise UserError(f"/set {name} needs a value, as in `/set temperature 0.7`")
        self.wishes = self.wishes.changed(name, value.strip())
        self.screen.note(self.wishes.told(name))

    def _retry(self) -> None:
        if not self.talk.exchanges:
            raise UserError("there is no question to ask again yet")
        exchange, number = self.talk.exchanges[-1], len(self.talk.exchanges) - 1
        fitted = self._fit(number, exchange.question)
        before = dict(exchange.answers)
        exchange.attempt += 1
        self._answer(exchange, fitted)
        if self.wishes.temperature == 0 and any(
            before.get(voice) == exchange.answers.get(voice) for voice in self.voices
        ):
            self.screen.note(
                "the same again: at temperature 0 it is always the likeliest answer; `/set temperature 0.8` draws "
                "others"
            )

    def _undo(self) -> None:
        if not self.talk.exchanges:
            raise UserError("there is nothing to take back")
        taken = self.talk.exchanges.pop()
        self._forgotten = {}
        self.screen.note(f"taken back: {taken.question}")

    def _reset(self) -> None:
        self.talk.exchanges.clear()
        self._forgotten = {}
        self.screen.note(
            "the conversation is forgotten; the system prompt and the settings stay"
            if self.talk.system
            else "the conversation is forgotten; the settings stay"
        )

    def _help(self) -> None:
        self.screen.note("\n".join(help_lines()))

    def _save(self, rest: str) -> None:
        file, voice = rest, self.voices[-1]
        for named in _WORDS:
            if rest.endswith(f" {named}"):
                file, voice = rest[: -len(named)].strip(), named
        if not file:
            raise UserError("/save needs a file, as in `/save talks.jsonl`")
        messages, left_out = self.talk.row(voice)
        if not any(message.role == "assistant" for message in messages):
            why = ": no answer came to an end of its own" if self.talk.exchanges else ""
            raise UserError(f"there is nothing to save yet{why}")
        append_row(Path(file).expanduser(), messages)
        kept = len(self.talk.exchanges) - left_out
        why = (
            f"; left out from the first answer on that did not end by itself: {_counted(left_out, 'exchange')}"
            if left_out
            else ""
        )
        self.screen.note(
            f"{file}: one row more, {_counted(kept, 'exchange')} as {voice} had it{why}",
            "warning" if left_out else "quiet",
        )


_WORDS: dict[Voice, str] = {"base": "the base, adapters off", "tuned": "the base with its adapters"}


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _facts(one: Answering, most: int) -> tuple[str, bool]:
    """What there is to say of an answer below it, and whether it is a warning."""
    pace = (
        f"{_counted(one.tokens, 'token')}, {one.tokens / one.seconds:.0f}/s"
        if one.seconds
        else _counted(one.tokens, "token")
    )
    if not one.finish:
        return f"[stopped after {pace}]", False
    if one.finish == "length":
        why = (
            "`/set max_new_tokens` to more"
            if one.tokens >= most
            else "the base's positions are used up; `/reset` makes room"
        )
        return f"[cut off after {pace}: {why}]", True
    if not one.text.strip():
        return "[no words: it ended at once]", True
    return f"[{pace}{', ended where its text begins another turn' if one.finish == 'turn' else ''}]", False

"""The sample pane: answers to held-out questions, or held-out pairs with their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rich.cells import cell_len

from lowrank_tune.events import SampleLogged
from lowrank_tune.ui.formatting import number, percent, signed
from lowrank_tune.ui.state import ScoredPair, State
from lowrank_tune.ui.terminal.panes import View, heading, labeled, prompt_lines
from lowrank_tune.ui.terminal.text_layout import Block, width_of, wrap

MIN_BLOCK_LINES = 4
"""Lines that a further question or pair needs."""
MIN_TITLE_WIDTH = 23
"""Cells of the pane's title that the note at its right must leave."""
LABEL_WIDTH = 11


@dataclass(frozen=True)
class Answer:
    """An answer and the model that wrote it: a stage, the reference, or a step of the policy."""

    model: str
    sample: SampleLogged


def sample_pane(
    state: State,
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns held-out pairs with their scores if the run has any, else held-out questions with the first and the
    current answer."""
    if state.pairs:
        pairs = [partial(_pair, pair, view, width) for pair in state.pairs.values()]
        return _stack(
            "pair",
            pairs,
            _pairs_note(state),
            view,
            width,
            height,
        )
    note = _heldout_note(state, view, width - MIN_TITLE_WIDTH)
    questions = [partial(_question, state, prompt, view, width) for prompt in {**state.answers, **state.earlier}]
    if not questions:
        return [
            heading(
                "answers",
                width,
                view,
                note,
            ),
            [(" no answers yet", "quiet")],
        ]
    return _stack(
        "question",
        questions,
        note,
        view,
        width,
        height,
    )


def _stack(
    kind: str,
    blocks: Sequence[Callable[[int], Block]],
    note: str,
    view: View,
    width: int,
    height: int,
) -> Block:
    """Returns a title, and below it as many blocks as fit, beginning with the one that the view selects.

    `blocks[index](max_lines)` draws a block. A single block may fill the whole height, others half of it.
    """
    count = len(blocks)
    first = view.sample % count
    title = heading(
        f"{kind} {first + 1} of {count}",
        width,
        view,
        note,
    )
    height -= 1
    max_lines = height
    if count > 1:
        max_lines = max(MIN_BLOCK_LINES, (height + 1) // 2)
    lines = blocks[first](min(height, max_lines))
    for turn in range(1, count):
        room = height - len(lines) - 1
        if room < MIN_BLOCK_LINES:
            break
        lines.append([])
        lines += blocks[(first + turn) % count](min(room, max_lines))
    return [title, *lines]


def _heldout_note(
    state: State,
    view: View,
    width: int,
) -> str:
    """Returns the held-out accuracy of all models; if that is too wide, of the first and the last, or nothing."""
    figures = []
    for model, stats in state.heldout.items():
        if "accuracy" in stats:
            figures.append(f"{view.sanitize(model, 12)} {percent(stats['accuracy'])}")
    if "accuracy" in state.now:
        figures.append(f"now {percent(state.now['accuracy'])} (pass@1)")
    if not figures:
        return ""
    full = ", ".join(figures)
    short = full
    if len(figures) > 2:
        short = f"{figures[0]}, {figures[-1]}"
    for note in (f"held-out exact: {full}", f"exact: {full}", f"exact: {short}"):
        if cell_len(note) <= width:
            return note
    return ""


def _pairs_note(state: State) -> str:
    """Returns the share of right pairs: of all held-out ones if measured, else of those that are shown."""
    algorithm = state.started.algorithm if state.started else ""
    scored = state.scored.get(algorithm, {})
    if "accuracy" in scored:
        return f"held-out pairs right: {percent(scored['accuracy'])}"
    right = sum(pair.margin > 0 for pair in state.pairs.values())
    return f"{right} of {len(state.pairs)} right"


def _answers_of(state: State, prompt: str) -> list[Answer]:
    """Returns the answers to a prompt: of the stages before, of the reference, and the latest one of the policy."""
    current = []
    samples = state.answers.get(prompt, [])
    for sample in dict.fromkeys([*samples[:1], *samples[-1:]]):
        model = f"step {sample.step}"
        if sample.role == "reference":
            model = state.reference_name()
        current.append(Answer(model, sample))
    models = {answer.model for answer in current}
    earlier = [Answer(model, sample) for model, sample in state.earlier.get(prompt, ()) if model not in models]
    return earlier + current


def _question(
    state: State,
    prompt: str,
    view: View,
    width: int,
    max_lines: int,
) -> Block:
    """Returns the prompt and its answers, of which the last ones are kept if there is no room for all."""
    lines = prompt_lines(
        prompt,
        view,
        width,
        max(1, max_lines // 4),
    )
    shown = _answers_of(state, prompt)[-max(1, max_lines - len(lines)) :]
    for left in range(len(shown), 0, -1):
        room = max(1, (max_lines - len(lines)) // left)
        lines += _answer(
            shown[-left],
            view,
            width,
            room,
            is_newest=left == 1,
        )
    return lines


def _answer(
    answer: Answer,
    view: View,
    width: int,
    max_lines: int,
    is_newest: bool,
) -> Block:
    """Returns the model, its answer, and in brackets what else is known of the answer."""
    label = f" {view.sanitize(answer.model, LABEL_WIDTH - 1):<{LABEL_WIDTH - 1}}"
    facts = _facts(answer.sample, view, is_newest)
    text_width = width - len(label) - 1
    text = view.sanitize(answer.sample.completion, max_lines * width)
    facts_width = cell_len(facts)
    rows_width = text_width
    if max_lines == 1:
        rows_width -= facts_width
    rows = wrap(text, rows_width, max_lines) or [""]
    style = "first" if is_newest else ""
    lines = labeled((label, "quiet"), rows, style)
    if not facts:
        return lines
    if width_of(lines[-1]) + facts_width > width:
        if len(lines) < max_lines:
            lines.append([(" " * (len(label) - 2), "")])
        else:
            # no line is left for the facts: the last row is shortened
            shortened = "".join(wrap(rows[-1], text_width + 1 - facts_width, 1))
            lines[-1][1] = (shortened, style)
    lines[-1].append((facts, "quiet"))
    return lines


def _facts(
    sample: SampleLogged,
    view: View,
    is_newest: bool,
) -> str:
    """Returns the end of an answer, its solution and its reward, as far as they are known."""
    facts = []
    if sample.finish_reason != "stop":
        facts.append("cut off")
    if is_newest and sample.ground_truth is not None:
        facts.append(f"gold {view.sanitize(sample.ground_truth, 24)}")
    if sample.reward is not None:
        facts.append(f"reward {number(sample.reward)}")
    return f"  [{', '.join(facts)}]" if facts else ""


def _pair(
    pair: ScoredPair,
    view: View,
    width: int,
    max_lines: int,
) -> Block:
    """Returns the prompt and both answers; the one with the higher score is bright."""
    lines = prompt_lines(
        pair.chosen.prompt,
        view,
        width,
        max(1, max_lines // 4),
    )
    room = max(1, (max_lines - len(lines)) // 2)
    lines += _scored_answer(
        "chosen",
        pair.chosen,
        pair.margin > 0,
        view,
        width,
        room,
    )
    room = max(1, max_lines - len(lines))
    return lines + _scored_answer("rejected", pair.rejected, pair.margin < 0, view, width, room)


def _scored_answer(
    side: str,
    answer: SampleLogged,
    is_preferred: bool,
    view: View,
    width: int,
    max_lines: int,
) -> Block:
    score = ""
    if answer.reward is not None:
        score = signed(answer.reward)
    label = f" {side:<8} {score:>8}  "
    text = view.sanitize(answer.completion, max_lines * width)
    rows = wrap(text, width - len(label) - 1, max_lines) or [""]
    style = "first" if is_preferred else ""
    return labeled((label, side), rows, style)

"""What will be trained on, before anything is: from recipe, tokenizer and rows alone, without the weights of the base.

`examine` reads it for `lowrank-tune data`; `survey` is the same of data that a run has loaded, for its `data.json`. Nothing is drawn here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowrank_tune import settings
from lowrank_tune.build.online import judged_rows
from lowrank_tune.data import Census, Order, Prepared, Prompt, Report, RowFault, Template, TokenStore, census, load, prompts
from lowrank_tune.data.asked import AskedSet, asked_order, load_asked
from lowrank_tune.data.balance import Sides, contradicting, sides
from lowrank_tune.data.pairs import EQUAL
from lowrank_tune.data.report import EXAMPLES, SourceReport
from lowrank_tune.errors import UserError
from lowrank_tune.events import Emit
from lowrank_tune.model.base import load_tokenizer

HEARD = "kept; held-out answers flatter"
BINS = 12  # of the histogram of lengths, about
SHOWN_ROWS, SHOWN_CHARACTERS = 3, 1600
TOO_LONG = ("longer than data.max_length", "longer than data.max_prompt_length")
NO_TARGET = ("nothing in it is trained", "no assistant turn", "no answer", "empty answer", "no turns", "column `answer` is null",
             "column `output` is null", "column `solution` is null", "column `response` is null", "column `completion` is null",
             "column `chosen` is null", "column `rejected` is null", "no column `chosen`", "no column `rejected`")  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A source in the mixture: what lies in it, and what an epoch draws from it. `weight` is its share of the rows drawn.

    With preferences a row is a pair, and its tokens are those of both sides. Where completions are drawn a row is a prompt.
    """

    name: str
    format: str
    read: int
    used: int
    golds: int
    rows: int
    tokens: int
    trained: int
    weight: float
    drawn_tokens: int
    drawn_trained: int


@dataclass(frozen=True)
class Trouble:
    """One thing that is wrong with some rows: how many, what is done with them, and where the first few stand."""

    what: str
    count: int
    done: str
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lengths:
    """Rows by length in tokens: `counts[i]` rows have between `edges[i]` + 1 and `edges[i + 1]` tokens. `over` did not fit the limit.

    Each side of a pair counts as a row of its own; `over` counts pairs.
    """

    limit: int
    edges: tuple[int, ...]
    counts: tuple[int, ...]
    median: int
    p95: int
    longest: int
    over: int


@dataclass(frozen=True)
class Ends:
    """Is the end token trained? `tokens` names each with how often it is; `rows` of all rows have every answer closed by one."""

    trained: bool
    tokens: Mapping[str, int]
    rows: int
    of: int


@dataclass(frozen=True)
class Epoch:
    """What one pass over the mixture has, and the steps that follow."""

    rows: int
    tokens: int
    trained: int
    steps: int
    all_steps: int

    @property
    def passes(self) -> float:
        return self.all_steps / self.steps if self.steps else 0.0


@dataclass(frozen=True)
class Example:
    """A row as the model will read it: stretches of text, each with whether it is trained. The sides of a pair follow each other.

    Of a prompt that completions are drawn for, `gold` is the gold answer, where it has one.
    """

    place: str
    tokens: int
    trained: int
    segments: tuple[tuple[bool, str], ...]
    gold: str | None = None


@dataclass(frozen=True)
class Preflight:
    """The whole picture. `faults`: sentences that say why training must not begin; none where it may. `sides`: only of preferences.

    Where completions are drawn nothing says how an answer ends: `ends` is None, and `draws` says what is drawn.
    """

    report: Report
    template: str
    weighted_by: str
    parts: tuple[Part, ...]
    lengths: Lengths
    troubles: tuple[Trouble, ...]
    ends: Ends | None
    epoch: Epoch
    examples: tuple[Example, ...]
    faults: tuple[str, ...]
    sides: Sides | None = None
    draws: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON: the report's own keys, and the picture beside them."""
        return {**self.report.to_dict(), **{name: value for name, value in asdict(self).items() if name != "report"}}


def examine(recipe: settings.Recipe, emit: Emit, cache: Path | None = None) -> Preflight:
    """Reads and tokenises everything. Raises `UserError` only where there is nothing to show."""
    template = Template.of(load_tokenizer(recipe.base))
    wanted = recipe.evaluate
    heldout = prompts(wanted.heldout, wanted.prompts, recipe.seed, recipe.data.system) if wanted.heldout else []
    if recipe.algorithm in ("grpo", "ppo"):
        asked = load_asked(recipe.data, template, recipe.seed, emit, judge=False, needs_gold=recipe.needs_gold,
                           unusable=judged_rows(recipe))  # fmt: skip
        return survey_asked(recipe, asked, template, heldout)
    return survey(recipe, load(recipe.data, template, recipe.seed, emit, cache, judge=False, pairs=recipe.pairs), template, heldout)


def survey(recipe: settings.Recipe, data: Prepared, template: Template, heldout: Sequence[Prompt] = ()) -> Preflight:
    """The picture of loaded data."""
    counted = census(data.train, template.end_ids)
    ends = _ends(counted, template, data.train.together)
    parts, epoch = _mixture(recipe, data, counted)
    lengths = _lengths(_all_lengths(data), data.report, recipe.data.max_length)
    return Preflight(
        report=data.report, template=template.describe(), weighted_by=_weighted_by(recipe.data.train), parts=parts,
        lengths=lengths, troubles=tuple(_troubles(data, counted, template, heldout)), ends=ends,
        epoch=epoch, examples=tuple(_examples(data.train, template)), faults=tuple(_faults(recipe, data, ends)),
        sides=sides(data.train, counted) if data.train.together > 1 else None)  # fmt: skip


def survey_asked(recipe: settings.Recipe, found: AskedSet, template: Template, heldout: Sequence[Prompt] = ()) -> Preflight:
    """The picture of the prompts that completions are drawn for."""
    parts, epoch = _asked_mixture(recipe, found)
    rollout = recipe.rollout
    return Preflight(
        report=found.report, template=template.describe(), weighted_by=_weighted_by(recipe.data.train, "prompt"), parts=parts,
        lengths=_lengths(found.lengths, found.report, recipe.data.max_prompt_length),
        troubles=tuple(_asked_troubles(found, template, heldout)), ends=None, epoch=epoch, examples=tuple(_asked_examples(found, template)),
        faults=tuple(_too_few(found.report, recipe)),
        draws=f"{rollout.num_generations:,} completions of each prompt, of up to {rollout.max_new_tokens:,} tokens")  # fmt: skip


def _weighted_by(sources: Sequence[settings.Source], unit: str = "row") -> str:
    if len(sources) == 1:
        return "one source"
    return "weights of the recipe" if sources[0].weight is not None else f"{unit} counts: no source has a weight"


def _mixture(recipe: settings.Recipe, data: Prepared, counted: Census) -> tuple[tuple[Part, ...], Epoch]:
    """The parts, and the first epoch exactly as the loop will draw it."""
    train, sources = data.train, data.report.train
    epoch = _drawn(recipe, train)
    rows = epoch[0] if epoch else np.zeros(0, np.int64)
    lengths, trained_of = train.unit_lengths, counted.trained.reshape(-1, train.together).sum(axis=1)
    source_of = train.unit_source_of[rows]

    def sums(values: NDArray[np.int64], of: NDArray[Any]) -> list[int]:
        return [int(value) for value in np.bincount(of, weights=values, minlength=len(sources))]

    inside = zip(*(sums(values, train.unit_source_of) for values in (np.ones(train.units, np.int64), lengths, trained_of)), strict=True)
    in_epoch = zip(sums(lengths[rows], source_of), sums(trained_of[rows], source_of), strict=True)
    weights = [source.weight for source in recipe.data.train]
    parts = tuple(
        Part(told.name, told.format, told.read, told.used, told.golds, count, tokens, trained,
             count / max(1, train.units) if weight is None else weight, *drawn)
        for told, weight, (count, tokens, trained), drawn in zip(sources, weights, inside, in_epoch, strict=True))  # fmt: skip
    steps, all_steps = epoch[1:] if epoch else (0, 0)
    return parts, Epoch(len(rows), int(lengths[rows].sum()), int(trained_of[rows].sum()), steps, all_steps)


def _drawn(recipe: settings.Recipe, train: TokenStore) -> tuple[NDArray[np.int64], int, int] | None:
    """Rows (or pairs) and steps of the first epoch, and the steps of the run; None where the mixture cannot be drawn."""
    weights = [source.weight for source in recipe.data.train]
    if not len(train) or (weights[0] is not None and len(np.unique(train.source_of)) < len(weights)):
        return None
    order = Order(train.unit_lengths, train.unit_source_of, weights, recipe.train, recipe.seed)
    rows = np.concatenate([np.array(order.rows(step)) for step in range(order.steps_per_epoch)])
    return rows, order.steps_per_epoch, recipe.train.steps or order.steps_of(recipe.train.epochs or 1.0)


def _asked_mixture(recipe: settings.Recipe, found: AskedSet) -> tuple[tuple[Part, ...], Epoch]:
    """The same of prompts."""
    weights, total = [source.weight for source in recipe.data.train], max(1, len(found))
    drawn, steps, all_steps = np.zeros(0, np.int64), 0, 0
    if len(found) and (weights[0] is None or all(told.used for told in found.report.train)):
        order = asked_order(found, recipe.data, recipe.train, recipe.seed)
        drawn, steps = np.concatenate([order.rows(step) for step in range(order.steps_per_epoch)]), order.steps_per_epoch
        all_steps = recipe.train.steps or order.steps_of(recipe.train.epochs or 1.0)
    tokens = np.bincount(found.source_of[drawn], weights=found.lengths[drawn], minlength=len(weights))
    parts = tuple(Part(told.name, told.format, told.read, told.used, told.golds, told.used, told.tokens, 0,
                       told.used / total if weight is None else weight, int(tokens[number]), 0)
                  for number, (told, weight) in enumerate(zip(found.report.train, weights, strict=True)))  # fmt: skip
    return parts, Epoch(len(drawn), int(tokens.sum()), 0, steps, all_steps)


def _all_lengths(data: Prepared) -> NDArray[np.int64]:
    return np.concatenate([data.train.lengths, *([data.validation.lengths] if data.validation is not None else [])])


def _lengths(lengths: NDArray[np.int64], report: Report, limit: int) -> Lengths:
    sources = (*report.train, *report.validation)
    dropped = sum(gone.count for source in sources for reason, gone in source.dropped.items() if reason.startswith(TOO_LONG))
    over = dropped + sum(source.truncated for source in sources)
    longest = max([source.longest for source in sources], default=0)
    if not len(lengths):
        return Lengths(limit, (0,), (), 0, 0, longest, over)
    width = _nice(int(lengths.max()) / BINS)
    edges = np.arange(0, int(lengths.max()) + width, width)
    counts, _ = np.histogram(lengths - 0.5, edges)  # a row on an edge belongs to the bin that ends there
    median, p95 = np.percentile(lengths, (50, 95))
    return Lengths(limit, tuple(map(int, edges)), tuple(map(int, counts)), round(median), round(p95), longest, over)


def _nice(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power: int = 10 ** math.floor(math.log10(max(1.0, width)))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= width)


def _troubles(data: Prepared, counted: Census, template: Template, heldout: Sequence[Prompt]) -> list[Trouble]:
    """All that is looked for, found or not: that nothing was found is also news."""
    sources = (*data.report.train, *data.report.validation)
    truncated = tuple(place for source in sources for place in source.truncated_places)[:EXAMPLES]
    unended = _units(np.flatnonzero(counted.unended), data.train)
    found = [
        *_dropped(sources, ("too long", "without a target", *([EQUAL] if data.train.together > 1 else []))),
        Trouble("too long, without the oldest turns of the prompt" if data.train.together > 1 else "too long, shortened to whole turns",
                sum(source.truncated for source in sources), "kept, shortened", truncated),
        Trouble("without an end token behind an answer", len(unended), "kept", _places(data.train, unended)),
        _duplicates(data),
        *([_contradicting(data)] if data.train.together > 1 else []),
        Trouble("in both splits", data.report.shared, "kept in both; the validation loss flatters", _shared(data)),
    ]
    return [*found, _known_questions(data.train, counted, template, heldout)] if heldout else found


def _asked_troubles(found: AskedSet, template: Template, heldout: Sequence[Prompt]) -> list[Trouble]:
    """The same of prompts. One that repeats an earlier prompt is drawn for more often than others."""
    golden = [index for index, one in enumerate(found.asked) if one.gold is None]
    seen: set[tuple[int, ...]] = set()
    again, known = [], []
    heard = _ids_of(heldout, template)
    for index, ids in enumerate(tuple(one.ids) for one in found.asked):
        again += [index] * (ids in seen)
        known += [index] * (ids in heard)
        seen.add(ids)
    told = [
        *_dropped(found.report.train, ("too long",)),
        Trouble("without a gold answer", len(golden), "kept", _asked_places(found, golden)),
        Trouble("repeating an earlier prompt", len(again), "kept; drawn for as often as it stands there", _asked_places(found, again)),
    ]
    return [*told, Trouble("asking a held-out question", len(known), HEARD, _asked_places(found, known))] if heldout else told


def _asked_places(found: AskedSet, numbers: Sequence[int]) -> tuple[str, ...]:
    return tuple(str(found.places[number]) for number in numbers[:EXAMPLES])


def _dropped(sources: Sequence[SourceReport], always: Sequence[str]) -> list[Trouble]:
    """One entry a reason, most frequent first; what is `always` told stands there even where no row is."""
    counts: dict[str, list[Any]] = {}
    for source in sources:
        for reason, gone in source.dropped.items():
            entry = counts.setdefault(_kind(reason, "without a target" in always), [0, []])
            entry[0] += gone.count
            entry[1] += gone.places
    for kind in always:
        if not any(entry.startswith(kind) for entry in counts):
            counts[kind] = [0, []]
    ranked = sorted(counts.items(), key=lambda item: -item[1][0])
    return [Trouble(kind, count, "dropped", tuple(places[:EXAMPLES])) for kind, (count, places) in ranked]


def _kind(reason: str, targets: bool) -> str:
    if reason.startswith(TOO_LONG):
        return f"too long: {reason}"
    return f"without a target: {reason}" if targets and reason.startswith(NO_TARGET) else reason


def _places(rows: TokenStore, units: NDArray[Any]) -> tuple[str, ...]:
    return tuple(rows.place_of(int(unit) * rows.together) for unit in units[:EXAMPLES])


def _units(rows: NDArray[Any], store: TokenStore) -> NDArray[Any]:
    """The units that these rows belong to."""
    return np.unique(rows // store.together)


def _duplicates(data: Prepared) -> Trouble:
    """Equal conversations among the rows of `data.train`: those set aside from them for validation count too."""
    places: tuple[str, ...] = ()
    for rows in _of_train(data):
        order = np.argsort(rows.unit_keys, kind="stable")
        places += _places(rows, np.sort(order[1:][rows.unit_keys[order][1:] == rows.unit_keys[order][:-1]]))
    return Trouble(f"repeating an earlier {data.report.unit}", data.report.duplicates, "kept", places[:EXAMPLES])


def _of_train(data: Prepared) -> list[TokenStore]:
    """The parts of the rows of `data.train`: what is trained on, and what was set aside."""
    parts = (data.train, None if data.report.validation else data.validation)
    return [rows for rows in parts if rows is not None and len(rows)]


def _contradicting(data: Prepared) -> Trouble:
    """Pairs that stand in the data the other way round too."""
    parts = _of_train(data)
    where = contradicting(parts)
    places = [place for rows, units in zip(parts, where, strict=True) for place in _places(rows, units)]
    return Trouble("contradicting: the same answers stand the other way round too", sum(map(len, where)), "kept; together they teach nothing",
                   tuple(places[:EXAMPLES]))  # fmt: skip


def _shared(data: Prepared) -> tuple[str, ...]:
    if data.validation is None or not data.report.shared:
        return ()
    return _places(data.validation, np.flatnonzero(np.isin(data.validation.unit_keys, data.train.unit_keys)))


def _known_questions(rows: TokenStore, counted: Census, template: Template, heldout: Sequence[Prompt]) -> Trouble:
    """Training rows that begin with a held-out question: its answer was seen."""
    asked = _ids_of(heldout, template)
    # Rows whose prompt is as long as one of these, before any is looked at; both sides of a pair have the same.
    likely = np.flatnonzero(np.isin(counted.prompt, list({len(ids) for ids in asked})))
    asking = [row for row in likely if tuple(map(int, rows[int(row)].ids[: counted.prompt[row]])) in asked]
    known = _units(np.array(asking, dtype=np.int64), rows)
    return Trouble("asking a held-out question", len(known), HEARD, _places(rows, known))


def _ids_of(heldout: Sequence[Prompt], template: Template) -> set[tuple[int, ...]]:
    """The held-out questions as the base reads them."""
    asked: set[tuple[int, ...]] = set()
    for prompt in heldout:
        try:
            asked.add(tuple(template.prompt(prompt.messages)))
        except (UserError, RowFault):
            continue  # it will not be asked either
    return asked


def _ends(counted: Census, template: Template, together: int) -> Ends:
    unended = counted.unended.reshape(-1, together).sum(axis=1)
    tokens = {template.decode([token], marks=True): count for token, count in sorted(counted.ends.items())}
    return Ends(bool(counted.ends), tokens, int((unended == 0).sum()), len(unended))


def _examples(rows: TokenStore, template: Template) -> list[Example]:
    """The first row or pair of each source, then those that follow in the first one."""
    names = ("",) if rows.together == 1 else (", chosen", ", rejected")
    return [Example(rows.place_of(row) + name, int(rows.lengths[row]), rows.trained_of(row), _segments(rows, row, template))
            for unit in _picked(rows.unit_source_of) for row, name in enumerate(names, start=unit * rows.together)]  # fmt: skip


def _asked_examples(found: AskedSet, template: Template) -> list[Example]:
    """The same of prompts, with their gold answers."""
    shown = [(str(found.places[number]), found.asked[number]) for number in _picked(found.source_of)]
    return [Example(place, len(one.ids), 0, ((False, _cut(template.decode(list(one.ids), marks=True), SHOWN_CHARACTERS)),), one.gold)
            for place, one in shown]  # fmt: skip


def _picked(source_of: NDArray[Any]) -> list[int]:
    firsts = np.unique(source_of, return_index=True)[1]
    return list(dict.fromkeys([*map(int, firsts), *range(min(len(source_of), SHOWN_ROWS))]))[:SHOWN_ROWS]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most // 2] + " [...] " + text[-most // 2 :]


def _segments(rows: TokenStore, number: int, template: Template) -> tuple[tuple[bool, str], ...]:
    row, left = rows[number], SHOWN_CHARACTERS
    edges = [0, *(int(edge) + 1 for edge in np.flatnonzero(np.diff(np.asarray(row.says, dtype=np.int8)))), len(row.ids)]
    segments: list[tuple[bool, str]] = []
    for start, end in zip(edges, edges[1:], strict=False):
        text = template.decode([int(token) for token in row.ids[start:end]], marks=True)
        segments.append((bool(row.says[start]), _cut(text, left)))
        left = max(200, left - len(text))
    return tuple(segments)


def _faults(recipe: settings.Recipe, data: Prepared, ends: Ends) -> list[str]:
    told = _too_few(data.report, recipe)
    if data.report.train_rows and not ends.trained:
        told.append("no end token is trained: the model would never learn to stop; the chat template closes no answer with one")
    return told


def _too_few(report: Report, recipe: settings.Recipe) -> list[str]:
    return [fault for source in (*report.train, *report.validation) if (fault := source.fault(recipe.data.max_rejected_share))]

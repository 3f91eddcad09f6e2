"""The data report in the terminal: mixture, lengths, unusable rows, the end token, and rows with their loss mask.

For preferences also how the sides differ, and pairs side by side; for answers with a label how many have each; for
online algorithms prompts and their gold answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import (
    Console,
    ConsoleOptions,
    Group,
    RenderableType,
    RenderResult,
)
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lowrank_tune.data.stats import PairBalance
from lowrank_tune.data_report import (
    DataIssue,
    DataReport,
    EosStats,
    Example,
    LabelBalance,
    Lengths,
    MixturePart,
)
from lowrank_tune.ui import escape_control_chars, escape_lines
from lowrank_tune.ui.formatting import percent
from lowrank_tune.ui.metrics import SIDE_COUNTS
from lowrank_tune.ui.views.bar import Bar

LENGTH_BAR_WIDTH = 40
NARROW = 72
"""Columns below which the sides of a pair are shown one below the other."""
GOOD = "green"
BAD = "yellow"
QUIET = "dim"
TRAINED = "bold green"
HEAD = "bold"

Segments = Sequence[tuple[bool, str]]
"""Stretches of text, each with whether it is trained."""


def show(
    data_report: DataReport,
    title: str,
    console: Console,
) -> None:
    """Prints the data report, its faults last, so that they are visible without scrolling; no line ends in blanks."""
    plain = not console.encoding.lower().startswith("utf")
    with console.capture() as captured:
        console.print(
            preflight_view(
                data_report,
                title,
                plain=plain,
            )
        )
    output = captured.get()
    if plain:
        # rich marks a cell that was cut by an ellipsis; names and gold answers may contain other characters
        output = output.replace("…", "~").encode("ascii", "backslashreplace").decode()
    for line in output.split("\n")[:-1]:
        console.file.write(f"{line.rstrip()}\n")


def preflight_view(
    data_report: DataReport,
    title: str,
    plain: bool = False,
) -> RenderableType:
    """Returns the data report as one renderable. `plain`: ASCII alone."""
    parts: list[RenderableType] = [
        Text(escape_control_chars(title), HEAD),
        Text(escape_control_chars(data_report.template), QUIET),
    ]
    for name, body in _sections(data_report, plain):
        parts += [Text(), Text(name, HEAD), _indent(body)]
    return Group(*parts)


def _sections(data_report: DataReport, plain: bool) -> Iterator[tuple[str, RenderableType]]:
    unit = _unit(data_report)
    lengths = data_report.lengths
    yield (
        f"Mixture, by {data_report.weighted_by}",
        _mixture(data_report, unit, plain),
    )
    length_unit = "side" if unit == "pair" else unit
    yield (
        f"Lengths in tokens, limit {lengths.limit:,}",
        _lengths(lengths, length_unit, plain),
    )
    yield f"{unit.title()}s", _issues(data_report.issues)
    if data_report.sides is not None:
        yield "Sides", _sides(data_report.sides, plain)
    if data_report.labels is not None:
        yield "Labels", _labels(data_report.labels, plain)
    if data_report.ends is not None:
        yield "End token", _eos_line(data_report.ends, unit)
    yield "Steps", _steps(data_report, unit)
    if data_report.completions:
        content = "the prompts of the model"
    else:
        opening, closing = _brackets(plain)
        content = f"what the model reads; trained is the text in {opening} {closing}"
    yield f"Examples: {content}", _examples(data_report, plain)
    yield "Verdict", _status_line(data_report.faults)


def _unit(data_report: DataReport) -> str:
    if data_report.completions:
        return "prompt"
    return "row" if data_report.sides is None else "pair"


def _brackets(plain: bool) -> tuple[str, str]:
    return ("[[", "]]") if plain else ("⟦", "⟧")


def _indent(
    body: RenderableType,
    columns: int = 2,
    below: int = 0,
) -> Padding:
    """Returns a block moved to the right, with empty lines below it."""
    return Padding(body, (0, 0, below, columns), expand=False)


def _grid(*justify: str) -> Table:
    """Returns a table with columns of text on the left (`l`) or the right (`r`), and of bars (`b`)."""
    table = Table.grid(padding=(0, 2))
    for side in justify:
        table.add_column(
            justify="right" if side == "r" else "left",
            # Only a column that may wrap gets narrower; a bar is drawn again in the width that is left.
            no_wrap=side != "b",
        )
    return table


def _add_share(
    table: Table,
    name: str,
    count: int,
    total: int,
    plain: bool,
) -> None:
    """Adds a row with the share of a count as a bar and as a number."""
    share = count / total if total else 0.0
    table.add_row(
        name,
        Bar(share, "cyan", plain),
        percent(share),
        f"{count:,}",
    )


def _mixture(
    data_report: DataReport,
    unit: str,
    plain: bool,
) -> RenderableType:
    """Returns for each source its share of the rows, the tokens and the trained tokens, and its weight in the draw."""
    tables: list[RenderableType] = []
    for part in data_report.parts:
        tables.append(_source_line(part, unit))
        tables.append(
            _indent(
                _measures(
                    part,
                    data_report.parts,
                    unit,
                    plain,
                )
            )
        )
    expected = data_report.report.compare_expected_tokens()
    if expected:
        tables.append(Text(expected, QUIET))
    return Group(*tables)


def _source_line(part: MixturePart, unit: str) -> Text:
    line = Text().append(escape_control_chars(part.name, 90), "cyan")
    line.append(
        f"  {part.format}, {part.used:,} of {part.read:,} {unit}s used",
        QUIET,
    )
    num_validation = part.answers - part.rows
    if num_validation > 0:
        line.append(f", {num_validation:,} set aside to validate with", QUIET)
    if part.packs:
        line.append(f", in {part.packs:,} packs", QUIET)
    elif unit != "pair":
        line.append(f", {part.ground_truths:,} with a gold answer", QUIET)
    for count, name in ((part.with_reasoning, "reasoning"), (part.with_tools, "tools")):
        if count:
            line.append(f", {count:,} with {name}", QUIET)
    return line


def _measures(
    part: MixturePart,
    parts: Sequence[MixturePart],
    unit: str,
    plain: bool,
) -> Table:
    table = _grid("l", "b", "r", "r")
    counts = {f"{unit}s": "rows", "tokens": "tokens"}
    if unit != "prompt":
        counts["trained tokens"] = "trained"
    for name, field in counts.items():
        total = sum(getattr(other, field) for other in parts)
        _add_share(
            table,
            name,
            getattr(part, field),
            total,
            plain,
        )
    weight = Bar(part.weight, "magenta", plain)
    table.add_row(
        "weight w_s",
        weight,
        percent(part.weight),
        f"{part.weight:.4f}",
    )
    return table


def _lengths(
    lengths: Lengths,
    unit: str,
    plain: bool,
) -> RenderableType:
    table = _grid("r", "b", "r")
    largest = max(*lengths.counts, lengths.over, 1)

    def add(
        name: str,
        count: int,
        style: str,
        count_style: str,
    ) -> None:
        table.add_row(
            name,
            Bar(count / largest, style, plain, LENGTH_BAR_WIDTH),
            Text(f"{count:,}", count_style),
        )

    for low, high, count in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False):
        add(f"{low + 1:,} to {high:,}", count, "cyan", "")
    add(
        f"over {lengths.limit:,}",
        lengths.over,
        BAD,
        BAD if lengths.over else GOOD,
    )
    summary = (
        f"half of the {unit}s have up to {lengths.median:,} tokens, 95 % up to {lengths.p95:,}; "
        f"the longest read has {lengths.longest:,}"
    )
    return Group(table, Text(summary, QUIET))


def _issues(issues: Iterable[DataIssue]) -> RenderableType:
    lines: list[RenderableType] = []
    for issue in issues:
        line = Text().append(f"{issue.count:7,}", BAD if issue.count else GOOD)
        line.append("  ")
        line.append(
            escape_control_chars(issue.description, 200),
            BAD if issue.count else "",
        )
        if issue.count:
            line.append(f" ({issue.done})", QUIET)
        lines.append(line)
        if issue.locations:
            locations = escape_control_chars(_joined(issue.locations), 600)
            more = ", ..." if issue.count > len(issue.locations) else ""
            lines.append(_indent(Text(locations + more, QUIET), 9))
    return Group(*lines)


def _joined(locations: Sequence[str]) -> str:
    """Returns `rows.jsonl:3, :14, other.jsonl:2`: the name of the file once for consecutive lines of it."""
    texts = []
    last = None
    for location in locations:
        file, _, line = location.rpartition(":")
        texts.append(f":{line}" if file == last else location)
        last = file
    return ", ".join(texts)


def _eos_line(ends: EosStats, unit: str) -> Text:
    if not ends.trained:
        return Text(
            "NO: no end token is trained; the model cannot learn to stop",
            f"{HEAD} red",
        )
    names = ", ".join(f"{escape_control_chars(name)} ({count:,} times)" for name, count in ends.tokens.items())
    line = Text().append("yes", f"{HEAD} {GOOD}")
    line.append(f": {names}; ")
    if not ends.total:
        return line.append("behind each document")
    closed = f"every answer is closed in {ends.rows:,} of {ends.total:,} {unit}s"
    return line.append(closed, "" if ends.rows == ends.total else BAD)


def _steps(data_report: DataReport, unit: str) -> Text:
    epoch = data_report.epoch
    drawn = _drawn_unit(data_report, unit)
    if not epoch.steps:
        return Text("none: there is nothing to train on", BAD)
    rows_per_step = epoch.rows / epoch.steps
    size = f"an epoch has {epoch.rows:,} {drawn}, {epoch.tokens:,} tokens"
    steps = f"in {epoch.steps:,} steps of about {rows_per_step:,.1f} {drawn}"
    run = f"the run has {epoch.all_steps:,} steps, {epoch.passes:.2f} epochs"
    if data_report.completions:
        return Text(f"{size}, {steps}\n{run}; it draws {data_report.completions}")
    share = epoch.trained / epoch.tokens if epoch.tokens else 0.0
    tokens_per_step = epoch.tokens / epoch.steps
    validation_rows = data_report.report.validation_rows
    lines = [
        f"{size}, {epoch.trained:,} of them trained ({percent(share)})",
        f"{steps} and {tokens_per_step:,.0f} tokens; {run}",
        f"{validation_rows:,} {unit}s to validate with",
    ]
    packing = data_report.report.packing
    if packing is not None:
        lines.append(packing.describe())
    return Text("\n".join(lines))


def _drawn_unit(data_report: DataReport, unit: str) -> str:
    """Returns what a step draws, in the plural."""
    if not any(part.packs for part in data_report.parts):
        return f"{unit}s"
    return "packs" if all(part.packs for part in data_report.parts) else f"{unit}s and packs"


def _sides(sides: PairBalance, plain: bool) -> RenderableType:
    """Returns how often the chosen answer is the longer one, and how many pairs have a margin."""
    table = _grid("l", "b", "r", "r")
    for field, name in SIDE_COUNTS.items():
        _add_share(
            table,
            name,
            getattr(sides, field),
            sides.pairs,
            plain,
        )
    summary = (
        f"a chosen answer has {sides.chosen:,.1f} tokens on average, a rejected one {sides.rejected:,.1f}; "
        f"{sides.margins:,} of {sides.pairs:,} pairs have a margin"
    )
    parts: list[RenderableType] = [table, Text(summary, QUIET)]
    if sides.warning:
        parts.append(Text(sides.warning, BAD))
    return Group(*parts)


def _labels(labels: LabelBalance, plain: bool) -> RenderableType:
    """Returns how many answers have each label, their lengths, and the weights of both classes."""
    table = _grid("l", "b", "r", "r")
    counts = {"desirable": labels.desirable, "undesirable": labels.undesirable}
    for name, count in counts.items():
        _add_share(
            table,
            name,
            count,
            max(1, sum(counts.values())),
            plain,
        )
    summary = (
        f"a desirable answer has {labels.desirable_tokens:,.1f} tokens on average, an undesirable one "
        f"{labels.undesirable_tokens:,.1f}; their weights in the loss are {labels.desirable_weight:.4g} and "
        f"{labels.undesirable_weight:.4g}"
    )
    parts: list[RenderableType] = [table, Text(summary, QUIET)]
    if labels.warning:
        parts.append(Text(labels.warning, BAD))
    return Group(*parts)


def _examples(data_report: DataReport, plain: bool) -> RenderableType:
    examples = data_report.examples
    if not examples:
        return Text("none", QUIET)
    parts: list[RenderableType] = []
    if data_report.sides is not None:
        for chosen, rejected in zip(examples[::2], examples[1::2], strict=True):
            parts.append(_PairView(chosen, rejected, plain))
        return Group(*parts)
    for example in examples:
        head = _prompt_head(example) if data_report.completions else _head(example)
        parts += [
            head,
            _indent(_with_mask(example.segments, plain), below=1),
        ]
    return Group(*parts)


def _head(example: Example) -> Text:
    return Text(f"{_location_and_size(example)}, {example.trained:,} trained", QUIET)


def _prompt_head(example: Example) -> Text:
    ground_truth = "no gold answer"
    if example.ground_truth is not None:
        ground_truth = f"gold answer {escape_control_chars(example.ground_truth, 120)}"
    return Text(f"{_location_and_size(example)}, {ground_truth}", QUIET)


def _location_and_size(example: Example) -> str:
    return f"{escape_control_chars(example.location, 120)}, {example.tokens:,} tokens"


def _with_mask(segments: Segments, plain: bool) -> Text:
    """Returns stretches of text, those that are trained in brackets."""
    opening, closing = _brackets(plain)
    text = Text()
    for trained, segment in segments:
        safe = escape_lines(segment)
        if plain:
            safe = safe.encode("ascii", "backslashreplace").decode()
        if trained:
            text.append(f"{opening}{safe}{closing}", TRAINED)
        else:
            text.append(safe)
    return text


@dataclass
class _PairView:
    """The prompt, and below it both answers side by side; in a narrow terminal the rejected answer is below the chosen
    one."""

    chosen: Example
    rejected: Example
    plain: bool

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shared = _shared_prompt(self.chosen.segments, self.rejected.segments)
        if shared:
            yield _indent(_with_mask(shared, self.plain))
        chosen = _with_mask(self.chosen.segments[len(shared) :], self.plain)
        rejected = _with_mask(self.rejected.segments[len(shared) :], self.plain)
        if options.max_width < NARROW:
            yield from (
                _head(self.chosen),
                _indent(chosen),
                _head(self.rejected),
                _indent(rejected),
            )
        else:
            table = Table(
                box=box.ASCII if self.plain else box.MINIMAL,
                show_edge=False,
                expand=True,
            )
            for example in (self.chosen, self.rejected):
                table.add_column(
                    _head(example),
                    ratio=1,
                    overflow="fold",
                )
            table.add_row(chosen, rejected)
            yield table
        yield Text()


def _shared_prompt(chosen: Segments, rejected: Segments) -> Segments:
    """Returns the stretch of text that is not trained and with which both sides begin, as a list of at most one."""
    if not chosen or not rejected or chosen[0] != rejected[0]:
        return ()
    trained, _ = chosen[0]
    return () if trained else chosen[:1]


def _status_line(faults: Sequence[str]) -> Text:
    if not faults:
        return Text("fit to train on", f"{HEAD} {GOOD}")
    lines = [
        Text(
            f"not fit to train on: {escape_control_chars(fault, 1000)}",
            "bold red",
        )
        for fault in faults
    ]
    return Text("\n").join(lines)

"""The preflight in the terminal: mixture, lengths, what is wrong with which rows, the end token, and three rows with
their loss mask.

Of preferences: how the sides differ, and three pairs side by side. Of prompts that completions are drawn for: three
with their gold answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lowrank_tune.data.stats import PairBalance
from lowrank_tune.data_report import DataIssue, DataReport, EosStats, Example, Lengths, MixturePart
from lowrank_tune.ui import escape_control_chars

BAR = 24
NARROW = 72  # columns; below, the sides of a pair stand one below the other
EIGHTHS = " ▏▎▍▌▋▊▉█"
GOOD = "green"
BAD = "yellow"
QUIET = "dim"
TRAINED = "bold green"
HEAD = "bold"


def show(data_report: DataReport, title: str, console: Console) -> None:
    """Prints the whole picture, faults last, where the eye is when it has scrolled by; in a pipe without spaces at the
    ends of lines."""
    plain = not console.encoding.lower().startswith("utf")
    with console.capture() as captured:
        console.print(preflight_view(data_report, title, plain=plain))
    output = captured.get()
    if plain:  # rich's mark of a cell that is cut; names and gold answers may hold more that no ASCII has
        output = output.replace("…", "~").encode("ascii", "backslashreplace").decode()
    console.file.write("".join(f"{line.rstrip()}\n" for line in output.split("\n")[:-1]))


def preflight_view(data_report: DataReport, title: str, plain: bool = False) -> RenderableType:
    """The picture as one renderable. `plain`: ASCII alone."""
    if data_report.completions:
        unit = "prompt"
    elif data_report.sides is None:
        unit = "row"
    else:
        unit = "pair"
    brackets = "[[ ]]" if plain else "⟦ ⟧"
    if data_report.completions:
        reads = "what the model is asked"
    else:
        reads = f"what the model reads; trained is the text in {brackets}"
    parts: list[RenderableType] = [
        Text(escape_control_chars(title), HEAD),
        Text(escape_control_chars(data_report.template), QUIET),
    ]
    for name, body in (
        (f"Mixture, by {data_report.weighted_by}", _mixture(data_report, unit, plain)),
        (
            f"Lengths in tokens, limit {data_report.lengths.limit:,}",
            _lengths(data_report.lengths, "side" if unit == "pair" else unit, plain),
        ),
        (f"{unit.title()}s", _issues(data_report.issues)),
        *([] if data_report.sides is None else [("Sides", _sides(data_report.sides, plain))]),
        *([] if data_report.ends is None else [("End token", _eos_line(data_report.ends, unit))]),
        ("Steps", _steps(data_report, unit)),
        (f"Examples: {reads}", _examples(data_report, plain)),
        ("Verdict", _status_line(data_report.faults)),
    ):
        parts += [Text(), Text(name, HEAD), Padding(body, (0, 0, 0, 2), expand=False)]
    return Group(*parts)


def bar(share: float, width: int = BAR, plain: bool = False) -> str:
    """A bar of this share of `width` cells; what is more than nothing is never drawn as nothing."""
    cells = max(0.0, min(1.0, share)) * width
    if plain:
        return "#" * max(round(cells), int(share > 0))
    whole, rest = divmod(max(round(cells * 8), int(share > 0)), 8)
    return "█" * whole + (EIGHTHS[rest] if rest else "")


def _grid(*justify: str) -> Table:
    table = Table.grid(padding=(0, 2))
    for side in justify:
        table.add_column(justify="right" if side == "r" else "left", no_wrap=True)
    return table


def _mixture(data_report: DataReport, unit: str, plain: bool) -> RenderableType:
    """For each source its share of rows, of tokens, of what is trained, and its weight in the draw."""
    tables: list[RenderableType] = []
    totals = [
        sum(values)
        for values in zip(*((part.rows, part.tokens, part.trained) for part in data_report.parts), strict=True)
    ]
    for part in data_report.parts:
        if unit != "pair":
            ground_truths = f", {part.ground_truths:,} with a gold answer"
        else:
            ground_truths = ""
        tables.append(
            Text.assemble(
                (escape_control_chars(part.name, 90), "cyan"),
                (f"  {part.format}, {part.used:,} of {part.read:,} {unit}s used", QUIET),
                (f", {part.used - part.rows:,} set aside to validate with" if part.used > part.rows else "", QUIET),
                (ground_truths, QUIET),
            )
        )
        tables.append(Padding(_measures(part, totals, unit, plain), (0, 0, 0, 2), expand=False))
    expected = data_report.report.compare_expected_tokens()
    return Group(*tables, *([Text(expected, QUIET)] if expected else []))


def _measures(part: MixturePart, totals: Sequence[int], unit: str, plain: bool) -> Table:
    table = _grid("l", "l", "r", "r")
    for name, value, total in zip(
        (f"{unit}s", "tokens", "trained tokens"),
        (part.rows, part.tokens, part.trained),
        totals,
        strict=True,
    ):
        if unit == "prompt" and name == "trained tokens":
            continue
        share = value / total if total else 0.0
        table.add_row(name, Text(bar(share, plain=plain), "cyan"), f"{100 * share:.1f} %", f"{value:,}")
    table.add_row(
        "weight w_s",
        Text(bar(part.weight, plain=plain), "magenta"),
        f"{100 * part.weight:.1f} %",
        f"{part.weight:.4f}",
    )
    return table


def _lengths(lengths: Lengths, unit: str, plain: bool) -> RenderableType:
    table = _grid("r", "l", "r")
    largest = max(*lengths.counts, lengths.over, 0)
    for low, high, count in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False):
        table.add_row(
            f"{low + 1:,} to {high:,}",
            Text(bar(count / largest if largest else 0.0, 40, plain), "cyan"),
            f"{count:,}",
        )
    shown = Text(bar(lengths.over / largest if largest else 0.0, 40, plain), BAD)
    table.add_row(f"over {lengths.limit:,}", shown, Text(f"{lengths.over:,}", BAD if lengths.over else GOOD))
    words = (
        f"half of the {unit}s have up to {lengths.median:,} tokens, 95 % up to {lengths.p95:,}; the longest read "
        f"has {lengths.longest:,}"
    )
    return Group(table, Text(words, QUIET))


def _issues(issues: Iterable[DataIssue]) -> RenderableType:
    lines: list[RenderableType] = []
    for issue in issues:
        style = BAD if issue.count else GOOD
        done = (f" ({issue.done})", QUIET) if issue.count else ""
        lines.append(
            Text.assemble(
                (f"{issue.count:7,}", style),
                "  ",
                (escape_control_chars(issue.description, 200), style if issue.count else ""),
                done,
            )
        )
        if issue.locations:
            more = ", ..." if issue.count > len(issue.locations) else ""
            lines.append(
                Padding(
                    Text(escape_control_chars(_joined(issue.locations), 600) + more, QUIET),
                    (0, 0, 0, 9),
                    expand=False,
                )
            )
    return Group(*lines)


def _joined(locations: Sequence[str]) -> str:
    """`rows.jsonl:3, :14, other.jsonl:2`: the file's name once for the lines that follow it."""
    texts = []
    last = None
    for location in locations:
        file, _, line = location.rpartition(":")
        texts.append(f":{line}" if file == last else location)
        last = file
    return ", ".join(texts)


def _eos_line(ends: EosStats, unit: str) -> Text:
    if not ends.trained:
        return Text("NO: no end token is trained; the model would never learn to stop", f"{HEAD} red")
    names = ", ".join(f"{escape_control_chars(name)} ({count:,} times)" for name, count in ends.tokens.items())
    line = Text.assemble(("yes", f"{HEAD} {GOOD}"), f": {names}; ")
    return line.append(
        f"every answer is closed in {ends.rows:,} of {ends.total:,} {unit}s", "" if ends.rows == ends.total else BAD
    )


def _steps(data_report: DataReport, unit: str) -> Text:
    epoch = data_report.epoch
    if not epoch.steps:
        return Text("none: there is nothing to train on", BAD)
    if data_report.completions:
        return Text(
            f"an epoch has {epoch.rows:,} prompts, {epoch.tokens:,} tokens, in {epoch.steps:,} steps of about "
            f"{epoch.rows / epoch.steps:,.1f} prompts\n"
            f"the run has {epoch.all_steps:,} steps, {epoch.passes:.2f} epochs; it draws {data_report.completions}"
        )
    share = epoch.trained / epoch.tokens if epoch.tokens else 0.0
    return Text(
        f"an epoch has {epoch.rows:,} {unit}s, {epoch.tokens:,} tokens, {epoch.trained:,} of them trained "
        f"({100 * share:.1f} %)\n"
        f"in {epoch.steps:,} steps of about {epoch.rows / epoch.steps:,.1f} {unit}s and "
        f"{epoch.tokens / epoch.steps:,.0f} tokens; "
        f"the run has {epoch.all_steps:,} steps, {epoch.passes:.2f} epochs\n"
        f"{data_report.report.validation_rows:,} {unit}s to validate with"
    )


def _sides(sides: PairBalance, plain: bool) -> RenderableType:
    """How often the chosen answer is the longer one, and who has a margin."""
    table = _grid("l", "l", "r", "r")
    for name, count in (
        ("chosen is longer", sides.longer),
        ("chosen is shorter", sides.shorter),
        ("equally long", sides.equal),
    ):
        share = count / sides.pairs if sides.pairs else 0.0
        table.add_row(name, Text(bar(share, plain=plain), "cyan"), f"{100 * share:.1f} %", f"{count:,}")
    words = f"a chosen answer has {sides.chosen:,.1f} tokens on average, a rejected one {sides.rejected:,.1f}; "
    words += f"{sides.margins:,} of {sides.pairs:,} pairs have a margin"
    return Group(table, Text(words, QUIET), *([Text(sides.warning, BAD)] if sides.warning else []))


def _examples(data_report: DataReport, plain: bool) -> RenderableType:
    if data_report.sides is not None:
        shown: list[RenderableType] = [
            _PairView(*pair, plain) for pair in zip(data_report.examples[::2], data_report.examples[1::2], strict=True)
        ]
    else:
        shown = [
            part
            for example in data_report.examples
            for part in (
                _head(example, bool(data_report.completions)),
                Padding(_with_mask(example.segments, plain), (0, 0, 1, 2), expand=False),
            )
        ]
    return Group(*shown) if shown else Text("none", QUIET)


def _head(example: Example, is_prompt: bool = False) -> Text:
    if is_prompt:
        if example.ground_truth is None:
            ground_truth = "no gold answer"
        else:
            ground_truth = f"gold answer {escape_control_chars(example.ground_truth, 120)}"
        return Text(f"{escape_control_chars(example.location, 120)}, {example.tokens:,} tokens, {ground_truth}", QUIET)
    return Text(
        f"{escape_control_chars(example.location, 120)}, {example.tokens:,} tokens, {example.trained:,} trained", QUIET
    )


def _with_mask(segments: Iterable[tuple[bool, str]], plain: bool) -> Text:
    """Stretches of text, those that are trained in brackets."""
    opening, closing = ("[[", "]]") if plain else ("⟦", "⟧")
    text = Text()
    for trained, segment in segments:
        safe = "\n".join(escape_control_chars(line) for line in segment.split("\n"))
        if plain:
            safe = safe.encode("ascii", "backslashreplace").decode()
        text.append(f"{opening}{safe}{closing}" if trained else safe, TRAINED if trained else "")
    return text


class _PairView:
    """The prompt, and below it both answers side by side; in a narrow terminal the rejected one below the chosen
    one."""

    def __init__(self, chosen: Example, rejected: Example, plain: bool) -> None:
        self._chosen = chosen
        self._rejected = rejected
        self._plain = plain

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        prompt, answers = self._parts()
        if prompt:
            yield Padding(_with_mask(prompt, self._plain), (0, 0, 0, 2), expand=False)
        heads = [_head(example) for example in (self._chosen, self._rejected)]
        if options.max_width < NARROW:
            for head, answer in zip(heads, answers, strict=True):
                yield from (head, Padding(answer, (0, 0, 0, 2), expand=False))
        else:
            table = Table(box=box.ASCII if self._plain else box.MINIMAL, show_edge=False, expand=True)
            for head in heads:
                table.add_column(head, ratio=1, overflow="fold")
            table.add_row(*answers)
            yield table
        yield Text()

    def _parts(self) -> tuple[list[tuple[bool, str]], list[Text]]:
        """What both begin with, untrained, and what each adds."""
        both = [list(example.segments) for example in (self._chosen, self._rejected)]
        is_shared = all(segments and not segments[0][0] for segments in both) and both[0][0] == both[1][0]
        return both[0][:is_shared], [_with_mask(segments[is_shared:], self._plain) for segments in both]


def _status_line(faults: Sequence[str]) -> Text:
    if not faults:
        return Text("fit to train on", f"{HEAD} {GOOD}")
    return Text("\n").join(
        Text(f"not fit to train on: {escape_control_chars(fault, 1000)}", "bold red") for fault in faults
    )

"""Charts as inline SVG: line charts, histograms and bars. Their colors come from the style sheet of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

from lowrank_tune.ui.formatting import format_tick
from lowrank_tune.ui.metrics import Point
from lowrank_tune.ui.svg_axes import Axis, linear_axis, log_axis, share_axis, step_axis, whole_number_axis

WIDTH = 560
HEIGHT = 250
LEFT = 60
RIGHT = 12
TOP = 10
BOTTOM = 46
PLOT_WIDTH = WIDTH - LEFT - RIGHT
PLOT_HEIGHT = HEIGHT - TOP - BOTTOM
X_LABELS = HEIGHT - BOTTOM + 19
X_TITLE = HEIGHT - 5
"""Heights of the labels below a plot, and of the title of its horizontal axis; their text is larger in narrow cards."""
CHARACTER_WIDTH = 7
MAX_BUCKETS = 300
"""Buckets of a long series; the lowest and the highest point of each are drawn."""
MIN_LOG_VALUE = 1e-300


@dataclass(frozen=True)
class Series:
    """One line of a chart. `kind` is its class in the style sheet: raw, smooth, check, chosen, rejected or run-N."""

    name: str
    kind: str
    points: Sequence[Point]


class Drawing:
    """An SVG to which elements are added, each above the earlier ones."""

    def __init__(
        self,
        kind: str,
        width: int,
        height: int,
    ) -> None:
        self.root = Element(
            "svg",
            {
                "viewBox": f"0 0 {width} {height}",
                "class": kind.rstrip(),
                "role": "img",
            },
        )

    def add(
        self,
        tag: str,
        kind: str,
        title: str = "",
        text: str = "",
        **attributes: float | str,
    ) -> None:
        """Adds an element of class `kind`. `title` is its tooltip; `_` in the name of an attribute replaces `-`."""
        written = {"class": kind}
        for name, value in attributes.items():
            written[name.replace("_", "-")] = f"{value:.1f}" if isinstance(value, float) else str(value)
        element = SubElement(
            self.root,
            tag,
            written,
        )
        if text:
            element.text = text
        if title:
            SubElement(element, "title").text = title

    def svg(self) -> Markup:
        return Markup(tostring(self.root, encoding="unicode"))


class Plot(Drawing):
    """A drawing area with two axes, their labels and a grid."""

    def __init__(
        self,
        x: Axis,
        y: Axis,
        kind: str = "",
        x_title: str = "",
    ) -> None:
        self.x = x
        self.y = y
        super().__init__(
            f"chart {kind}",
            WIDTH,
            HEIGHT,
        )
        for tick, label in y.labels():
            at = self.y_at(tick)
            self.add(
                "line",
                "grid",
                x1=LEFT,
                x2=WIDTH - RIGHT,
                y1=at,
                y2=at,
            )
            self.label(
                label,
                LEFT - 7,
                at + 3.5,
                "end",
            )
        for tick, label in x.labels():
            self.label(
                label,
                self.x_at(tick),
                X_LABELS,
            )
        if x_title:
            self.label(
                x_title,
                LEFT + PLOT_WIDTH / 2,
                X_TITLE,
            )

    def x_at(self, value: float) -> float:
        """Returns the horizontal position of `value` in pixels."""
        return LEFT + self.x.share(value) * PLOT_WIDTH

    def y_at(self, value: float) -> float:
        """Returns the vertical position of `value` in pixels; 0 is the upper edge."""
        return HEIGHT - BOTTOM - self.y.share(value) * PLOT_HEIGHT

    def at(self, point: Point) -> str:
        """Returns the position of a point as path data."""
        x, y = point
        return f"{self.x_at(x):.1f} {self.y_at(y):.1f}"

    def label(
        self,
        text: str,
        x: float,
        y: float,
        anchor: str = "middle",
        kind: str = "tick",
    ) -> None:
        """Adds a text that ends at, or is centered around, a position in pixels."""
        self.add(
            "text",
            kind,
            text=text,
            x=x,
            y=y,
            text_anchor=anchor,
        )

    def path(
        self,
        kind: str,
        data: str,
        title: str,
    ) -> None:
        """Adds a path from its path data."""
        self.add(
            "path",
            kind,
            title,
            d=data,
        )

    def polyline(
        self,
        kind: str,
        points: Sequence[Point],
        title: str,
    ) -> None:
        """Adds straight lines from point to point."""
        self.path(
            kind,
            "M" + "L".join(map(self.at, points)),
            title,
        )

    def dots(
        self,
        kind: str,
        points: Sequence[Point],
        title: str,
    ) -> None:
        """Adds a dot for each point, all of them as one path."""
        moves = [f"M{self.at(point)}h0" for point in points]
        self.path(
            f"dots {kind}".strip(),
            "".join(moves),
            title,
        )

    def circle(
        self,
        kind: str,
        point: Point,
        title: str,
        radius: float = 2.6,
    ) -> None:
        """Adds a circle with a radius in pixels."""
        x, y = point
        self.add(
            "circle",
            kind,
            title,
            cx=self.x_at(x),
            cy=self.y_at(y),
            r=radius,
        )

    def bar(
        self,
        kind: str,
        value: float,
        title: str,
        x: float,
        width: float,
    ) -> None:
        """Adds an upright bar of height `value`; its left edge and its width are in pixels."""
        top = self.y_at(value)
        self.add(
            "rect",
            kind,
            title,
            x=x,
            y=top,
            rx=1.5,
            width=width,
            height=HEIGHT - BOTTOM - top,
        )


def line_chart(
    series: Sequence[Series],
    log: bool = False,
    is_share: bool = False,
) -> Markup:
    """Returns the SVG of a chart by step, empty if nothing can be drawn; the axis of shares is in percent. Values that
    are not finite, and on a logarithmic scale those that are not positive, leave a gap."""
    points = [point for line in series for point in line.points if _is_drawable(point[1], log)]
    if not points:
        return Markup()
    x = step_axis([x for x, _ in points])
    values = [y for _, y in points]
    plot = Plot(
        x,
        _value_axis(
            values,
            log,
            is_share,
        ),
        "log" if log else "lin",
        "step",
    )
    plot.root.set("data-x", f"{x.low:g} {x.high:g}")
    plot.root.set("data-box", f"{LEFT} {TOP} {WIDTH - RIGHT} {HEIGHT - BOTTOM}")
    for line in series:
        _draw_line(plot, line)
    plot.add(
        "line",
        "cross",
        y1=TOP,
        y2=HEIGHT - BOTTOM,
        visibility="hidden",
    )
    return plot.svg()


def _value_axis(
    values: Sequence[float],
    log: bool,
    is_share: bool,
) -> Axis:
    if log:
        return log_axis(values)
    return share_axis(values) if is_share else linear_axis(values)


def _draw_line(
    plot: Plot,
    line: Series,
) -> None:
    path = ""
    command = "M"
    drawn = []
    for point in line.points:
        if not _is_drawable(point[1], plot.y.log):
            command = "M"
            continue
        path += command + plot.at(point)
        command = "L"
        drawn.append(point)
    plot.path(
        line.kind,
        path,
        line.name,
    )
    if line.kind == "check":
        for x, y in drawn:
            plot.circle(
                "check",
                (x, y),
                f"{line.name} {format_tick(y)} after step {x:g}",
            )


def bar(
    share: float,
    kind: str = "",
) -> Markup:
    """Returns a horizontal bar that fills `share` of its track; shares outside of 0 to 1 are limited to that range."""
    width = 100 * max(0.0, min(1.0, share))
    drawing = Drawing(
        f"bar {kind}",
        100,
        8,
    )
    drawing.root.set("preserveAspectRatio", "none")
    drawing.add(
        "rect",
        "track",
        width=100,
        height=8,
    )
    drawing.add(
        "rect",
        "fill",
        width=f"{width:.2f}",
        height=8,
    )
    return drawing.svg()


def length_histogram(
    edges: Sequence[int],
    counts: Sequence[int],
    limit: int,
    over: int,
) -> Markup:
    """Returns upright bars of the lengths between `edges`, and a last one of those over the limit."""
    labels = [f"{edge:,}" for edge in edges[1:]]
    names = [
        f"{low + 1:,} to {high:,} tokens"
        for low, high in zip(
            edges,
            edges[1:],
            strict=False,
        )
    ]
    labels.append(f"> {limit:,}")
    names.append(f"over {limit:,} tokens")
    kinds = ["fill"] * len(counts) + ["over"]
    values = [*counts, over]

    y = whole_number_axis(max([*values, 1]))
    step = PLOT_WIDTH / len(values)
    # so many bars share a label
    every = math.ceil((CHARACTER_WIDTH * max(map(len, labels)) + CHARACTER_WIDTH) / step)
    plot = Plot(
        Axis(0, len(values)),
        y,
        x_title="tokens",
    )
    for index, value in enumerate(values):
        x = LEFT + index * step
        plot.bar(
            kinds[index],
            value,
            f"{names[index]}: {value:,} rows",
            x + step * 0.08,
            step * 0.84,
        )
        shown, from_last = divmod(len(values) - 1 - index, every)
        if from_last == 0:
            # every second one of these is left out of a narrow chart
            plot.label(
                labels[index],
                x + step / 2,
                X_LABELS,
                kind="tick minor" if shown % 2 else "tick",
            )
    return plot.svg()


def downsample(
    points: Sequence[Point],
    buckets: int = MAX_BUCKETS,
) -> list[Point]:
    """Returns at most two points for each bucket, its lowest and its highest, so that spikes stay; and both ends."""
    if len(points) <= 2 * buckets:
        return list(points)

    def value_at(index: int) -> float:
        return points[index][1]

    kept = {0, len(points) - 1}
    for bucket in range(buckets):
        start = bucket * len(points) // buckets
        end = (bucket + 1) * len(points) // buckets
        kept.add(min(range(start, end), key=value_at))
        kept.add(max(range(start, end), key=value_at))
    return [points[index] for index in sorted(kept)]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Returns an exponential mean over about a twentieth of the points, corrected for its start at 0."""
    decay = 1 - 2 / (max(4, len(points) / 20) + 1)
    total = 0.0
    weight = 0.0
    smoothed = []
    for step, value in points:
        total = decay * total + value
        weight = decay * weight + 1
        smoothed.append((step, total / weight))
    return smoothed


def _is_drawable(
    value: float,
    log: bool,
) -> bool:
    return math.isfinite(value) and (not log or value > MIN_LOG_VALUE)

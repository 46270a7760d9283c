"""Pictures of several panels on one sheet: dot plots with whiskers, and small multiples of curves."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_moe.canvas import FAINT, INK, Canvas, Number, Point, text_width, ticks

_ROW, _PLOT_WIDTH, _GAP, _MARGIN = 22, 300, 28, 12
_CURVES_WIDTH, _CURVES_HEIGHT = 210, 130
# quartile ranges beyond the quartiles, from where on a value would flatten all others
_FAR = 4.0
# from where on a curve sets the height of its panel, and how much higher than that a panel is at most
_LATE, _TALLEST = 0.5, 3.0
OTHERS = "#c3c9d0"


@dataclass(frozen=True)
class Dot:
    """A row of a dot plot.

    Args:
        label: what it is of.
        value: where the dot is.
        low: where its whisker begins; nan draws none.
        high: where it ends.
        text: to write at the right.
        colour: of all.
        is_filled: or a ring.
        points: smaller dots, of single seeds.
    """

    label: str
    value: float
    low: float
    high: float
    text: str
    colour: str
    is_filled: bool = True
    points: Sequence[float] = ()


@dataclass(frozen=True)
class DotPanel:
    """One dot plot.

    Args:
        title: above it.
        dots: from top to bottom.
        rules: vertical lines; the first is drawn whole, the others dashed, and nan not at all.
    """

    title: str
    dots: Sequence[Dot]
    rules: Sequence[float]


@dataclass(frozen=True)
class Key:
    """What a mark means.

    Args:
        text: its meaning.
        mark: ``dot``, ``ring``, ``line`` or ``dashes``.
        colour: of the mark.
    """

    text: str
    mark: str
    colour: str


@dataclass(frozen=True)
class CurvePanel:
    """One of the small multiples.

    Args:
        title: above it.
        text: at the right of the title.
        curve: of this panel.
    """

    title: str
    text: str
    curve: Sequence[Point]


def dot_plot(
    panels: Sequence[DotPanel], *, title: str, axis: str, keys: Sequence[Key], columns: int, shared: bool
) -> Canvas:
    """Draws dot plots side by side.

    Args:
        panels: from left to right, and then below.
        title: of the whole.
        axis: what the numbers are.
        keys: what the marks mean.
        columns: panels side by side.
        shared: whether all panels have the same axis.
    """
    columns = min(columns, len(panels))
    left = max((text_width(dot.label) for panel in panels for dot in panel.dots), default=0) + 14
    written = max((text_width(dot.text) for panel in panels for dot in panel.dots), default=0) + 14
    width = left + _PLOT_WIDTH + written
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [84 + _ROW * max(len(panel.dots) for panel in row) for row in rows]
    whole = max(2 * _MARGIN + columns * width + (columns - 1) * _GAP, text_width(title, 16) + 2 * _MARGIN)
    top = 44 + _keys_height(keys, whole)
    canvas = Canvas(whole, top + sum(heights) + _MARGIN)
    canvas.text(_MARGIN, 20, title, size=16)
    _draw_keys(canvas, keys, 44)
    common = _span(panels) if shared else None
    for row, height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            x = _MARGIN + column * (width + _GAP)
            _draw_dots(canvas, panel, x, x + left, top, common or _span([panel]), axis)
        top += height
    return canvas


def curve_panels(
    panels: Sequence[CurvePanel],
    others: Sequence[Sequence[Point]],
    baselines: Sequence[Sequence[Point]],
    *,
    title: str,
    axes: tuple[str, str],
    keys: Sequence[Key],
    colour: str,
    columns: int = 4,
) -> Canvas:
    """Draws each curve in a panel of its own, before all others in grey; all panels have the same axes.

    Args:
        panels: from left to right, and then below.
        others: curves that are grey in each panel.
        baselines: curves in black in each panel; the first is drawn whole, the others dashed.
        title: of the whole.
        axes: what lies along the panel, and what goes up.
        keys: what the marks mean.
        colour: of a panel's own curve.
        columns: panels side by side.
    """
    columns = min(columns, len(panels))
    curves = [*others, *baselines, *(panel.curve for panel in panels)]
    right = max(x for curve in curves for x, _ in curve) or 1.0
    low, high = limits([y for curve in curves for x, y in curve if x >= _LATE * curve[-1][0]])
    # a common fall at the start would flatten what follows
    high = min(limits([y for curve in curves for _, y in curve])[1], low + _TALLEST * (high - low))
    marks = ticks(low, high, 4)
    left = max(text_width(f"{mark:g}") for mark in marks) + _MARGIN + 8
    width, height = _CURVES_WIDTH + 22, _CURVES_HEIGHT + 58
    whole = max(left + columns * width, text_width(title, 16) + 2 * _MARGIN)
    top = 64 + _keys_height(keys, whole)
    canvas = Canvas(whole, top + height * -(-len(panels) // columns))
    canvas.text(_MARGIN, 20, title, size=16)
    _draw_keys(canvas, keys, 44)
    canvas.text(_MARGIN, top - 14, axes[1], colour=FAINT)
    for number, panel in enumerate(panels):
        frame = _Frame(
            left + number % columns * width, top + 26 + number // columns * height, (0.0, right), (low, high)
        )
        room = _CURVES_WIDTH - text_width(panel.text, 12) - 10
        canvas.text(frame.left, frame.top - 11, _cut(panel.title, room))
        canvas.text(frame.left + _CURVES_WIDTH, frame.top - 11, panel.text, anchor="rm", size=12, colour=FAINT)
        _draw_axes(canvas, frame, marks, axes[0], with_numbers=number % columns == 0)
        for curve in others:
            frame.draw(canvas, curve, OTHERS, 1)
        for place, curve in enumerate(baselines):
            frame.draw(canvas, curve, INK, 1.5, dashed=place > 0)
        frame.draw(canvas, panel.curve, colour, 2.5)
        end = panel.curve[-1][1]
        if min(y for _, y in panel.curve) > high:
            canvas.text(frame.left + _CURVES_WIDTH / 2, frame.top + 10, "above this panel", anchor="mm", size=12)
        elif low <= end <= high:
            canvas.dot(*frame.place(*panel.curve[-1]), colour=colour, radius=4)
    return canvas


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest of the numbers with some room, without those that are far from all others.

    Example:
        >>> low, high = limits([1.0, 2.0, 3.0, 4.0, 1000.0])
        >>> low < 1 and 4 < high < 5
        True
    """
    known = np.array([value for value in values if math.isfinite(value)] or [0.0])
    first, third = np.quantile(known, [0.25, 0.75])
    reach = _FAR * max(third - first, 1e-9)
    near = known[(known >= first - reach) & (known <= third + reach)]
    room = 0.06 * max(float(np.ptp(near)), 1e-3 * max(abs(float(near.max())), 1e-3))
    return float(near.min()) - room, float(near.max()) + room


@dataclass(frozen=True)
class _Frame:
    left: float
    top: float
    along: tuple[float, float]
    up: tuple[float, float]

    def place(self, x: float, y: float) -> Point:
        (x0, x1), (y0, y1) = self.along, self.up
        return (
            self.left + (x - x0) / (x1 - x0) * _CURVES_WIDTH,
            self.top + (y1 - y) / (y1 - y0) * _CURVES_HEIGHT,
        )

    def draw(self, canvas: Canvas, curve: Sequence[Point], colour: str, width: Number, *, dashed: bool = False) -> None:
        for piece in _within(curve, *self.up):
            canvas.line([self.place(x, y) for x, y in piece], colour=colour, width=width, dashed=dashed)


def _within(curve: Sequence[Point], low: float, high: float) -> Iterator[list[Point]]:
    # the pieces of a curve that are not above or below the panel
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        crossings = [(bound - y0) / (y1 - y0) for bound in (low, high) if (y0 - bound) * (y1 - bound) < 0]
        at = [0.0, *sorted(crossings), 1.0]
        for one, other in itertools.pairwise(at):
            middle = y0 + (one + other) / 2 * (y1 - y0)
            if low <= middle <= high:
                yield [(x0 + share * (x1 - x0), y0 + share * (y1 - y0)) for share in (one, other)]


def _cut(text: str, room: Number) -> str:
    if text_width(text) <= room:
        return text
    kept = next(end for end in range(len(text), -1, -1) if text_width(f"{text[:end]}...") <= room or end == 0)
    return f"{text[:kept]}..."


def _draw_axes(canvas: Canvas, frame: _Frame, marks: Sequence[float], axis: str, *, with_numbers: bool) -> None:
    bottom = frame.top + _CURVES_HEIGHT
    for mark in marks:
        y = frame.place(0.0, mark)[1]
        canvas.line([(frame.left, y), (frame.left + _CURVES_WIDTH, y)], width=0.5)
        if with_numbers:
            canvas.text(frame.left - 6, y, f"{mark:g}", anchor="rm", size=12)
    canvas.line([(frame.left, bottom), (frame.left + _CURVES_WIDTH, bottom)], colour=FAINT)
    for mark in ticks(*frame.along, 3):
        x = frame.place(mark, 0.0)[0]
        # the last number would reach into the next panel
        if x < frame.left + _CURVES_WIDTH - 40:
            canvas.text(x, bottom + 11, f"{mark:g}", anchor="mm", size=12)
    canvas.text(frame.left + _CURVES_WIDTH, bottom + 11, axis, anchor="rm", size=12, colour=FAINT)


def _span(panels: Sequence[DotPanel]) -> tuple[float, float]:
    dots = [dot for panel in panels for dot in panel.dots]
    rules = [rule for panel in panels for rule in panel.rules]
    low, high = limits([*(v for dot in dots for v in (dot.value, dot.low, dot.high, *dot.points)), *rules])
    # a dot that is far off is an arrow; a line there would stand at a wrong number
    known = [rule for rule in rules if math.isfinite(rule)]
    return min([low, *known]), max([high, *known])


def _draw_dots(
    canvas: Canvas, panel: DotPanel, start: Number, left: Number, top: Number, span: tuple[float, float], axis: str
) -> None:
    low, high = span
    rows_top, bottom = top + 28, top + 34 + _ROW * len(panel.dots)

    def place(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * _PLOT_WIDTH

    canvas.text(start, top + 10, panel.title, size=14)
    for mark in ticks(low, high, 5):
        canvas.line([(place(mark), rows_top), (place(mark), bottom)], width=0.5)
        canvas.text(place(mark), bottom + 12, f"{mark:g}", anchor="mm", size=12)
    canvas.text(left + _PLOT_WIDTH / 2, bottom + 30, axis, anchor="mm", size=12, colour=FAINT)
    for number, rule in enumerate(panel.rules):
        if math.isnan(rule):
            continue
        canvas.line([(place(rule), rows_top), (place(rule), bottom)], colour=INK, width=1.5, dashed=number > 0)
    for number, dot in enumerate(panel.dots):
        y = rows_top + 3 + _ROW * (number + 0.5)
        canvas.text(left - 10, y, dot.label, anchor="rm")
        canvas.text(left + _PLOT_WIDTH + 10, y, dot.text, size=12, colour=FAINT)
        if not math.isnan(dot.low):
            canvas.line([(place(dot.low), y), (place(dot.high), y)], colour=dot.colour, width=2)
        for point in (point for point in dot.points if low <= point <= high):
            canvas.dot(place(point), y, colour=dot.colour, radius=2)
        _draw_mark(canvas, place(dot.value), y, dot.value, span, dot)


def _draw_mark(canvas: Canvas, x: float, y: float, value: float, span: tuple[float, float], dot: Dot) -> None:
    if span[0] <= value <= span[1]:
        canvas.dot(x, y, colour=dot.colour, radius=5)
        if not dot.is_filled:
            canvas.dot(x, y, colour="white", radius=3)
        return
    # an arrow where the dot lies beyond the panel
    back = -7 if value > span[1] else 7
    canvas.line([(x + back, y - 5), (x, y), (x + back, y + 5)], colour=dot.colour, width=2)


def _keys_height(keys: Sequence[Key], width: Number) -> int:
    return 20 * (1 + max((row for _, row in _key_places(keys, width)), default=-1)) + 8


def _key_places(keys: Sequence[Key], width: Number) -> list[tuple[float, int]]:
    places, x, row = [], float(_MARGIN), 0
    for key in keys:
        needed = 30 + text_width(key.text)
        if x > _MARGIN and x + needed > width - _MARGIN:
            x, row = float(_MARGIN), row + 1
        places.append((x, row))
        x += needed + 22
    return places


def _draw_keys(canvas: Canvas, keys: Sequence[Key], top: Number) -> None:
    for key, (x, row) in zip(keys, _key_places(keys, canvas.width), strict=True):
        y = top + 20 * row
        if key.mark in ("dot", "ring"):
            canvas.dot(x + 11, y, colour=key.colour, radius=5)
        if key.mark == "ring":
            canvas.dot(x + 11, y, colour="white", radius=3)
        if key.mark in ("line", "dashes"):
            canvas.line([(x, y), (x + 22, y)], colour=key.colour, width=2, dashed=key.mark == "dashes")
        canvas.text(x + 30, y, key.text)

"""Plots as SVG text: dots in rows, and lines over an axis. Colours come from the page's CSS.

No plotting library: a device has none, and a report must be one file that needs no network.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape


Formatter = Callable[[float], str]

_WIDTH, _HEIGHT = 640, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 92, 20, 16, 46


@dataclass(frozen=True, kw_only=True)
class Row:
    """Samples of one thing; ``apart`` holds those that are shown but not judged."""

    label: str
    samples: tuple[float, ...]
    apart: tuple[float, ...] = ()
    limit: float | None = None  # drawn where it is near enough not to squeeze the rest


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points joined by a line, or the band between two lines."""

    name: str
    points: tuple[tuple[float, float], ...]
    style: str  # a CSS class
    lower: tuple[float, ...] | None = None  # makes it a band; as long as ``points``


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What stands around a plot; both axes start at zero."""

    title: str  # for those who cannot see the plot
    format: Formatter  # writes the values
    across: str = ""  # the name of the lying axis, where it is not the values'
    format_across: Formatter = "{:g}".format
    limit: float | None = None  # drawn where it is near enough not to squeeze the rest
    unit: float = 1  # the marks are round multiples of it


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A linear axis from ``low`` to a round number, mapped to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        share = (value - self.low) / (self.high - self.low or 1)
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float, *, most: int = 6, unit: float = 1) -> list[float]:
    """Return round multiples of ``unit``, from ``low`` to at least ``high``: steps of 1, 2 or 5."""
    if unit != 1:
        return [mark * unit for mark in ticks(low / unit, high / unit, most=most)]
    span = max(high - low, 1e-12)
    rough = span / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.floor(low / step)
    last = math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def dots(rows: Sequence[Row], frame: Frame) -> str:
    """Draw each row's samples as dots along one axis, with their median."""
    reaches = (_reach((*row.samples, *row.apart), row.limit) for row in rows)
    marks = ticks(0, max(reaches, default=1), unit=frame.unit)
    row_height = (_HEIGHT - _TOP - _BOTTOM) / max(1, len(rows))
    axis = Axis(low=0, high=marks[-1], start=_LEFT, end=_WIDTH - _RIGHT)
    parts = [_vertical(axis(mark), frame.format(mark)) for mark in marks]
    for index, row in enumerate(rows):
        parts += _row(row, axis, _TOP + row_height * (index + 0.5), frame.format)
    return _framed(parts, frame.title)


def _row(row: Row, axis: Axis, y: float, format: Formatter) -> Iterator[str]:
    yield _text(_LEFT - 10, y + 4, row.label, "row")
    for style, values in (("dot", row.samples), ("apart", row.apart)):
        for value in values:
            yield _dot(axis(value), y, format(value), style)
    if row.samples:
        x = axis(statistics.median(row.samples))
        yield f'<path class="median" d="M{x:.1f} {y - 13:.1f}v26"/>'
    if row.limit is not None and row.limit <= axis.high:
        x = axis(row.limit)
        yield f'<path class="limit" d="M{x:.1f} {y - 22:.1f}v44"/>'
        yield _text(x - 6, y - 16, "limit", "limit-name")


def lines(series: Sequence[Line], frame: Frame) -> str:
    """Draw lines and bands; a later one lies above an earlier one."""
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    marks = ticks(0, _reach(ys, frame.limit), unit=frame.unit)
    rise = Axis(low=0, high=marks[-1], start=_HEIGHT - _BOTTOM, end=_TOP)
    run = Axis(low=0, high=max(xs, default=1), start=_LEFT, end=_WIDTH - _RIGHT)
    parts = [_horizontal(rise(mark), frame.format(mark)) for mark in marks]
    parts += [
        _text(run(mark), _HEIGHT - _BOTTOM + 18, frame.format_across(mark), "tick")
        for mark in ticks(0, run.high, most=7)
        if mark <= run.high
    ]
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, frame.across, "tick"))
    parts += [_line(line, run, rise) for line in series]
    if frame.limit is not None and frame.limit <= rise.high:
        parts.append(_limit(rise(frame.limit)))
    return _framed(parts, frame.title)


def bar(used: float, samples: Sequence[float], outcome: str, title: str) -> str:
    """Draw how much of a budget is used, 1 being all of it, with a dot for each sample."""
    # The limit stands at three quarters, so that a miss has room to be seen.
    width, height, all_of_it = 400, 26, 300
    x = min(used * all_of_it, width)
    parts = [
        f'<rect class="track" width="{width}" height="10" y="8" rx="5"/>',
        f'<rect class="used {escape(outcome)}" width="{max(x, 3):.1f}" height="10" y="8" rx="5"/>',
    ]
    for sample in samples:
        at = min(sample * all_of_it, width - 3)
        parts.append(f'<circle class="sample" cx="{at:.1f}" cy="13" r="2.2"/>')
    parts.append(f'<path class="limit" d="M{all_of_it} 1v24"/>')
    return (
        f'<svg class="bar" viewBox="0 0 {width} {height}" role="img">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _reach(values: Sequence[float], limit: float | None) -> float:
    """Return how far an axis goes: to the limit, too, unless that would squeeze the samples."""
    highest = max(values, default=1.0)
    return max(highest, limit) if limit is not None and limit <= 2.5 * highest else highest


def _line(line: Line, run: Axis, rise: Axis) -> str:
    if not line.points:
        return ""
    there = [f"{run(x):.1f} {rise(y):.1f}" for x, y in line.points]
    if line.lower is not None:
        lower = zip(line.points, line.lower, strict=True)
        back = [f"{run(x):.1f} {rise(low):.1f}" for (x, _), low in lower]
        there += reversed(back)
    closing = "Z" if line.lower is not None else ""
    path = f'<path class="{line.style}" d="M{"L".join(there)}{closing}">'
    return f"{path}<title>{escape(line.name)}</title></path>"


def _dot(x: float, y: float, label: str, style: str) -> str:
    return (
        f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="4.5">'
        f"<title>{escape(label)}</title></circle>"
    )


def _vertical(x: float, label: str) -> str:
    grid = f'<path class="grid" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>'
    return grid + _text(x, _HEIGHT - _BOTTOM + 18, label, "tick")


def _horizontal(y: float, label: str) -> str:
    grid = f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
    return grid + _text(_LEFT - 10, y + 4, label, "row")


def _limit(y: float) -> str:
    line = f'<path class="limit" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
    return line + _text(_WIDTH - _RIGHT, y - 6, "limit", "limit-name")


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _framed(parts: Sequence[str], title: str) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )

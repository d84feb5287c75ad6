"""A comparison as one page: what each recipe takes against what it costs, and a target's limits.

The page is one file: no network, no script. Names in it come from other people's models, so every
text is escaped.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template

from edgekit import versions
from edgekit.compare import Row
from edgekit.encodings.visible import visible
from edgekit.units import format_bytes


_TEMPLATE = Path(__file__).with_name("comparison_page.html")
_WIDTH, _HEIGHT = 720, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 24, 22, 50
_STYLES = 6  # of models, in the page's CSS
_LEAST_NATS = 1e-3  # what costs less looks free, and would squeeze the rest
_NAME_WIDTH, _NAME_HEIGHT = 80, 11  # room that a dot's name takes
_COLUMNS = ("model", "recipe", "bits per weight", "to download", "memory", "decode", "first token",
            "cost", "fits")  # fmt: skip


def as_html(rows: Sequence[Row]) -> str:
    """Return the page: a picture and a table for each target."""
    models = list(dict.fromkeys(row.model for row in rows))
    by_target = groupby(sorted(rows, key=lambda row: row.target), key=lambda row: row.target)
    sections = [_section(target, list(own), models) for target, own in by_target]
    legend = " ".join(
        f'<span class="name m{index % _STYLES}">{_text(model)}</span>'
        for index, model in enumerate(models)
    )
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        sections="".join(sections), legend=legend, version=escape(versions.EDGEKIT)
    )


def _section(target: str, rows: Sequence[Row], models: Sequence[str]) -> str:
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    body = "".join(_table_row(row) for row in rows)
    return (
        f"<section><h2>{_text(target)}</h2>{_picture(target, rows, models)}"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></section>"
    )


def _table_row(row: Row) -> str:
    cells = (
        row.model,
        f"{row.format} {row.recipe}",
        f"{row.bits_per_weight:.2f}",
        *row.costs,
        "" if row.demo_kl_nats is None else f"{row.demo_kl_nats:.2g} nats",
        row.verdict,
    )
    chosen = " chosen" if row.is_chosen else ""
    return f'<tr class="{row.fits}{chosen}">{"".join(f"<td>{_text(it)}</td>" for it in cells)}</tr>'


def _picture(target: str, rows: Sequence[Row], models: Sequence[str]) -> str:
    """Draw each row as a dot: memory from left to right, the cost of rounding upwards."""
    dots = [
        _Dot(
            row=row, memory_bytes=row.estimate.memory.peak_bytes, cost=math.log10(row.demo_kl_nats)
        )
        for row in rows
        if row.estimate and row.demo_kl_nats and row.demo_kl_nats >= _LEAST_NATS
    ]
    if not dots:
        return ""
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>'
        f"{_text(target)}: memory and what rounding costs</title>"
        f"{''.join(_drawing(dots, models))}</svg>"
    )


@dataclass(frozen=True, kw_only=True)
class _Dot:
    row: Row
    memory_bytes: int
    cost: float  # the logarithm of nats


def _drawing(dots: Sequence[_Dot], models: Sequence[str]) -> Iterator[str]:
    limits, costs = dots[0].row.limits, [dot.cost for dot in dots]
    widest = max(dot.memory_bytes for dot in dots)
    if limits.peak_memory_bytes <= 3 * widest:  # else it would squeeze the dots
        widest = max(widest, limits.peak_memory_bytes)
    low, high = math.floor(min(costs)), math.ceil(max(costs))

    def across(size_bytes: float) -> float:
        return _LEFT + size_bytes / (1.05 * widest) * (_WIDTH - _LEFT - _RIGHT)

    def down(cost: float) -> float:
        return _TOP + (high - cost) / max(1, high - low) * (_HEIGHT - _TOP - _BOTTOM)

    for power in range(low, high + 1):
        y = down(power)
        yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
        yield f'<text class="end" x="{_LEFT - 8}" y="{y + 4:.1f}">{10.0**power:g}</text>'
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = across(share * widest)
        yield (
            f'<text class="middle" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}">'
            f"{format_bytes(share * widest)}</text>"
        )
    yield (
        f'<text class="middle" x="{_WIDTH / 2}" y="{_HEIGHT - 8}">'
        "memory; upwards: the cost in nats</text>"
    )
    if limits.peak_memory_bytes <= widest:
        x = across(limits.peak_memory_bytes)
        yield f'<path class="limit" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>'
        yield f'<text class="end limit-name" x="{x - 5:.1f}" y="{_TOP + 10}">memory limit</text>'
    named: list[tuple[float, float]] = []
    for dot in sorted(dots, key=lambda dot: not dot.row.is_chosen):
        row, x, y = dot.row, across(dot.memory_bytes), down(dot.cost)
        style = f"m{models.index(row.model) % _STYLES} {row.fits}"
        radius = 7 if row.is_chosen else 5
        yield (
            f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
            f"<title>{_text(f'{row.model}, {row.format} {row.recipe}: {row.fits}')}</title>"
            "</circle>"
        )
        if not any(abs(x - a) < _NAME_WIDTH and abs(y - b) < _NAME_HEIGHT for a, b in named):
            named.append((x, y))
            yield (
                f'<text class="dot-name" x="{x + 9:.1f}" y="{y + 4:.1f}">{_text(row.recipe)}</text>'
            )


def _text(text: str) -> str:
    return escape(visible(text))

"""A still of the table, as an SVG document."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from html import escape

from examples.demo_screen import Cell, View

_WIDTH, _MARGIN = 880, 28
_HEAD, _ROW, _LINE = 92, 66, 21
_COLUMNS = (150, 520)
_CHART_WIDTH, _CHART_HEIGHT = 190, 38
_MOMENTS = 24
_TEXT_COLUMNS = 100

_SANS = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
_MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
_BACK, _EDGE, _TEXT, _DIM = "#0d1117", "#30363d", "#e6edf3", "#8b949e"
_GREEN, _AMBER, _RED = "#3fb950", "#d29922", "#ff7b72"


def draw(view: View, title: str, lines: Sequence[str]) -> str:
    """Return the picture of a view, with lines of a terminal below; `$ ` begins what was typed."""
    below = [part for line in lines for part in textwrap.wrap(line, _TEXT_COLUMNS)]
    floor = _HEAD + _ROW * len(view.accounts)
    height = floor + 34 + _LINE * len(below)
    size = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    frame = f'width="{_WIDTH - 1}" height="{height - 1}"'
    said = ", ".join(
        f"{feature} for {tier} {cell.admitted} a second"
        for feature, cells in view.cells.items()
        for tier, cell in cells.items()
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" font-family="{_SANS}" {size}>',
        f"<title>{escape(title)}</title>",
        f"<desc>Admitted: {escape(said)}.</desc>",
        f'<rect x="0.5" y="0.5" {frame} rx="10" fill="{_BACK}" stroke="{_EDGE}"/>',
        _text(_MARGIN, 40, title, size=17, weight=600),
        *_heads(view),
        *_rows(view),
        f'<line x1="0" x2="{_WIDTH}" y1="{floor + 6}" y2="{floor + 6}" stroke="{_EDGE}"/>',
    ]
    for number, line in enumerate(below):
        color = _TEXT if line.startswith("$ ") else _DIM
        y = floor + 36 + _LINE * number
        parts.append(_text(_MARGIN, y, line, size=13, color=color, family=_MONO))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _heads(view: View) -> Iterator[str]:
    for x, feature in zip(_COLUMNS, view.cells, strict=True):
        yield _text(x, 72, f"{feature}s admitted per second", size=13, color=_DIM)


def _rows(view: View) -> Iterator[str]:
    for number, (tier, accounts) in enumerate(view.accounts.items()):
        top = _HEAD + _ROW * number
        yield _text(_MARGIN, top + 22, tier, size=17, weight=600)
        yield _text(_MARGIN, top + 40, f"{accounts} accounts", size=12, color=_DIM)
        for x, cells in zip(_COLUMNS, view.cells.values(), strict=True):
            yield from _cell(x, top, cells[tier])


def _cell(x: int, top: int, cell: Cell) -> Iterator[str]:
    color = _GREEN
    if cell.others:
        color = _AMBER if cell.admitted else _RED
    yield from _chart(x, top + 4, cell)
    left = x + _CHART_WIDTH + 16
    yield _text(left, top + 34 - 8 * bool(cell.others), str(cell.admitted), 26, color, weight=600)
    if cell.others:
        yield _text(left, top + 42, cell.denied, size=12, color=color)


def _chart(x: int, top: int, cell: Cell) -> Iterator[str]:
    history = cell.history[-_MOMENTS:] or [cell.admitted]
    floor, step = top + _CHART_HEIGHT, _CHART_WIDTH / max(1, len(history) - 1)
    points = " ".join(
        f"{x + step * number:.1f},{floor - _height(one, cell.wanted):.1f}"
        for number, one in enumerate(history)
    )
    right = x + _CHART_WIDTH
    yield (
        f'<polygon points="{x},{floor} {points} {right},{floor}" '
        f'fill="{_GREEN}" fill-opacity="0.18"/>'
    )
    yield f'<polyline points="{points}" fill="none" stroke="{_GREEN}" stroke-width="2"/>'
    if cell.others and not cell.admitted:
        closed = next(n for n, _ in enumerate(history) if not any(history[n:]))
        begin = x + step * closed
        yield (
            f'<line x1="{begin:.1f}" x2="{right}" y1="{floor}" y2="{floor}" '
            f'stroke="{_RED}" stroke-width="3"/>'
        )


def _height(admitted: int, wanted: int) -> float:
    return min(1.0, admitted / wanted / 1.1) * _CHART_HEIGHT


def _text(
    x: float,
    y: float,
    text: str,
    size: int,
    color: str = _TEXT,
    *,
    weight: int = 400,
    family: str | None = None,
) -> str:
    family = f' font-family="{family}"' if family else ""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{color}"{family} '
        f'xml:space="preserve">{escape(text)}</text>'
    )

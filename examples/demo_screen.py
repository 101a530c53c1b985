"""What the audience of the fleet sees: a table that stays in place, and a story that scrolls by."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import click

WIDTH = 80
"""The columns that the table needs."""

_BARS = "▁▂▃▄▅▆▇█"
_SHOWN = 16
_DENIED = 11
_LONGEST_LINE = 100


@dataclass(frozen=True, slots=True)
class Cell:
    """Hold what becomes of one tier's requests for one feature.

    Attributes:
        wanted: How many are sent a second.
        admitted: How many were admitted in the second before.
        others: How many of them had which other status.
        history: How many a second were admitted at moments until now, oldest first.
    """

    wanted: int
    admitted: int
    others: Mapping[int, int]
    history: Sequence[int]

    @property
    def denied(self) -> str:
        """Spell the others, such as `40 x 403`; a status of 0 is no answer."""
        others = sorted(self.others.items())
        return ", ".join(f"{count} x {status or 'lost'}" for status, count in others)


@dataclass(frozen=True, slots=True)
class View:
    """Hold what is to be seen at one moment.

    Attributes:
        title: The line above the table.
        accounts: How many accounts each tier has; their order is that of the rows.
        cells: By feature, by tier.
    """

    title: str
    accounts: Mapping[str, int]
    cells: Mapping[str, Mapping[str, Cell]]


class Screen:
    """Show views and tell a story, on a terminal or as plain lines, from `with` until its end."""

    def __init__(self) -> None:
        self.live = _can_redraw()
        self._drawn: list[str] = []
        self._began_at = time.monotonic()

    def __enter__(self) -> Self:
        if self.live:
            _write("\x1b[?25l")  # no cursor, which would flicker
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            _write("\x1b[?25h")

    def begin(self) -> None:
        """Count the time from now on."""
        self._began_at = time.monotonic()

    def show(self, view: View) -> None:
        """Show this view in the place of the one before."""
        if self.live:
            self._redraw([], list(_table(view, self._elapsed())))
        else:
            _write(f"{self._clock()}admitted/s  {_plain(view)}\n")

    def say(self, text: str, *, color: str | None = None, bold: bool = False) -> None:
        """Tell what happens, above the table."""
        width = min(_LONGEST_LINE, shutil.get_terminal_size((_LONGEST_LINE, 24)).columns)
        width = max(20, width - len(self._clock()))
        wrapped = textwrap.wrap(text, width, break_on_hyphens=False) or [""]
        lines = [click.style(line, fg=color, bold=bold or None) for line in wrapped]
        indent = " " * len(self._clock())
        self._redraw(
            [self._clock() + lines[0], *(indent + line for line in lines[1:])], self._drawn
        )

    def _redraw(self, lines: Sequence[str], table: list[str]) -> None:
        """Print lines where the table is, and a table below them, all at once: nothing flickers."""
        erase = f"\x1b[{len(self._drawn)}A\x1b[J" if self._drawn else ""
        _write(erase + "".join(f"{line}\n" for line in (*lines, *table)))
        self._drawn = table

    def _elapsed(self) -> float:
        return time.monotonic() - self._began_at

    def _clock(self) -> str:
        return f"{self._elapsed():5.1f} s  "


def _table(view: View, elapsed: float) -> Iterator[str]:
    yield ""
    yield click.style(f"{view.title} · {elapsed:.0f} s", bold=True)
    head = "".join(f"{feature + 's admitted per second':<34}" for feature in view.cells)
    yield click.style(f"{'tier':<8}{head}".rstrip(), dim=True)
    for tier in view.accounts:
        row = [_spell(cells[tier]) for cells in view.cells.values()]
        yield f"{tier:<8}{''.join(row)}"


def _spell(cell: Cell) -> str:
    shown = cell.history[-_SHOWN:]
    top = len(_BARS) - 1
    bars = "".join(_BARS[min(top, round(top * one / cell.wanted))] for one in shown)
    color = "green"
    if cell.others:
        color = "yellow" if cell.admitted else "red"
    denied = cell.denied if len(cell.denied) <= _DENIED else f"{cell.denied[: _DENIED - 1]}…"
    number = f"{cell.admitted:4}  {denied:<{_DENIED}}"
    return click.style(f"{bars:>{_SHOWN}}{number}", fg=color) + " "


def _plain(view: View) -> str:
    """Return a view on one line."""
    features = []
    for feature, cells in view.cells.items():
        tiers = [
            f"{tier} {cell.admitted}" + (f" ({cell.denied})" if cell.others else "")
            for tier, cell in cells.items()
        ]
        features.append(f"{feature}: {', '.join(tiers)}")
    return " · ".join(features)


def _can_redraw() -> bool:
    """Say whether this is a terminal that is wide enough, and shows more than ASCII."""
    return (
        sys.stdout.isatty()
        and os.environ.get("TERM", "dumb") != "dumb"
        and shutil.get_terminal_size().columns >= WIDTH
        and sys.stdout.encoding.lower().replace("-", "") == "utf8"
    )


def _write(text: str) -> None:
    click.echo(text, nl=False)

"""Rows under headings, or one below the other where the terminal is too narrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click

from tieredlimit.cli.terminal import display_width, pad, printable, width

_GAP = "  "


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table."""
    texts = [[printable(text) for text in row] for row in rows]
    widths = [max(map(display_width, column)) for column in zip(heads, *texts, strict=True)]
    if sum(widths) + len(_GAP) * (len(widths) - 1) <= width():
        yield click.style(_line(heads, widths), bold=True)
        yield from (_line(row, widths) for row in texts)
        return
    margin = max(map(display_width, heads))
    for i, row in enumerate(texts):
        if i:
            yield ""
        for head, text in zip(heads, row, strict=True):
            if text:
                yield f"{click.style(pad(head, margin), bold=True)}{_GAP}{text}"


def _line(texts: Sequence[str], widths: Sequence[int]) -> str:
    parts = [pad(text, columns) for text, columns in zip(texts, widths, strict=True)]
    return _GAP.join(parts).rstrip()

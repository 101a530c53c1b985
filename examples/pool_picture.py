"""Draw what a pool does, minute by minute: `python -m examples.pool_picture docs/pool.svg`.

Nothing is made up: a limiter on the embedded backend decides every request, on a clock of its own.
Three tiers ask for a feature whose pool refills at 60 a minute and holds 60. Takes of `new`
accounts must leave half of it, those of `free` ones a fifth, `pro` may take the last.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tieredlimit import Account, Limiter
from tieredlimit.backends import MemoryBackend

LEAVE = {"new": 30, "free": 12, "pro": 0}
CAPACITY = 60
POLICY = {
    "order": ["new", "pro", "free"],
    "features": {
        "video": {"pool": {"rate": "60/minute", "leave": {"new": "50%", "free": "20%"}}},
    },
    "defaults": {"quotas": {"video": "unlimited"}},
    "tiers": {"new": {"when": {"plan": "new"}}, "pro": {"when": {"plan": "pro"}}, "free": {}},
}
PHASES = (
    (3, "a quiet day", {"pro": 20, "free": 10, "new": 10}),
    (5, "new and free accounts flood", {"pro": 20, "free": 200, "new": 400}),
    (5, "pro accounts flood", {"pro": 400, "free": 10, "new": 10}),
    (3, "quiet again", {"pro": 20, "free": 10, "new": 10}),
)
"""Minutes, what happens, and how many requests a minute each tier makes."""

_SECOND = 1_000_000
_STEP = 10  # seconds that one point of the picture stands for
_COLOURS = {"pro": "#0b6e99", "free": "#d98a00", "new": "#9a3d6f"}
_WIDTH, _PANEL, _LEFT, _TOP, _GAP = 760, 170, 56, 46, 64


class Clock:
    """A clock that is told what time it is, in microseconds."""

    def __init__(self) -> None:
        self.now = 1_790_000_000 * _SECOND

    def __call__(self) -> int:
        """Return what it was told."""
        return self.now


def requests() -> Iterator[tuple[int, str]]:
    """Yield when each request is made, in microseconds from the start, and by which tier."""
    begin = 0
    for minutes, _, demand in PHASES:
        length = minutes * 60 * _SECOND
        made = [
            (begin + i * 60 * _SECOND // per_minute, tier)
            for tier, per_minute in demand.items()
            for i in range(per_minute * minutes)
        ]
        yield from sorted(made)
        begin += length


async def play() -> tuple[list[Counter[str]], list[int]]:
    """Let everything be decided; return who was admitted in each step, and the pool's levels."""
    clock = Clock()
    start = clock.now
    limiter = Limiter(POLICY, MemoryBackend(clock=clock))
    steps = sum(minutes for minutes, _, _ in PHASES) * 60 // _STEP
    admitted: list[Counter[str]] = [Counter() for _ in range(steps)]
    levels = [CAPACITY] * steps
    for i, (at, tier) in enumerate(requests()):
        clock.now = start + at
        decision = await limiter.take(Account(f"{tier}{i}", plan=tier), "video")
        step = at // (_STEP * _SECOND)
        admitted[step][tier] += decision.allowed
        pool = decision.pool
        if pool is not None and pool.remaining is not None:
            levels[step] = pool.remaining
    return admitted, levels


def drawn(admitted: Sequence[Counter[str]], levels: Sequence[int]) -> str:
    """Return the picture as SVG."""
    minutes = sum(length for length, _, _ in PHASES)
    across = _WIDTH / minutes
    parts = [_phases(across)]
    parts.append(_label(_TOP - 10, "tokens in the pool"))
    for tier, left in LEAVE.items():
        y = _TOP + _PANEL * (1 - left / CAPACITY)
        told = f"{tier} takes down to here" if left else f"{tier} takes the last"
        parts.append(
            f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="{_COLOURS[tier]}" stroke-dasharray="5 4"/>'
            f'<text x="{_LEFT + 6}" y="{y - 5:.1f}" '
            f'fill="{_COLOURS[tier]}">{told}</text>'
        )
    points = [
        (_LEFT + (i + 0.5) * _STEP / 60 * across, _TOP + _PANEL * (1 - level / CAPACITY))
        for i, level in enumerate(levels)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#222" stroke-width="2"/>')
    parts.append(_bars(admitted, across))
    height = _TOP + 2 * _PANEL + _GAP + 40
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 16} {height}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img">'
        "<title>A pool under a flood of lower tiers, and under one of the highest</title>"
        f'<rect width="100%" height="100%" fill="#fff"/>'
    )
    return "\n".join([head, *parts, "</svg>", ""])


def _phases(across: float) -> str:
    parts, begin = [], 0
    bottom = _TOP + 2 * _PANEL + _GAP
    for i, (minutes, told, _) in enumerate(PHASES):
        x = _LEFT + begin * across
        parts.append(
            f'<rect x="{x:.1f}" y="{_TOP}" width="{minutes * across:.1f}" '
            f'height="{bottom - _TOP}" fill="{"#f4f4f1" if i % 2 else "#fbfbfa"}"/>'
            f'<text x="{x + minutes * across / 2:.1f}" y="{bottom + 34}" text-anchor="middle" '
            f'fill="#222">{told}</text>'
        )
        begin += minutes
    under = f'y="{bottom + 16}" fill="#777"'
    parts += [
        f'<text x="{_LEFT + minute * across:.1f}" {under} text-anchor="middle">{minute}</text>'
        for minute in range(begin + 1)
    ]
    parts.append(f'<text x="{_LEFT - 8}" {under} text-anchor="end">min</text>')
    return "\n".join(parts)


def _bars(admitted: Sequence[Counter[str]], across: float) -> str:
    top = _TOP + _PANEL + _GAP
    most = max(sum(step.values()) for step in admitted)
    wide = across * _STEP / 60
    parts = [_label(top - 24, f"admitted in {_STEP} seconds, by tier")]
    for i, (tier, colour) in enumerate(_COLOURS.items()):
        parts.append(
            f'<rect x="{_LEFT + 240 + 70 * i}" y="{top - 34}" width="11" height="11" '
            f'fill="{colour}"/><text x="{_LEFT + 256 + 70 * i}" y="{top - 24}" '
            f'fill="#222">{tier}</text>'
        )
    for i, step in enumerate(admitted):
        y = float(top + _PANEL)
        for tier, colour in _COLOURS.items():
            tall = _PANEL * step[tier] / most
            y -= tall
            if tall:
                parts.append(
                    f'<rect x="{_LEFT + i * wide + 0.5:.1f}" y="{y:.1f}" width="{wide - 1:.1f}" '
                    f'height="{tall:.1f}" fill="{colour}"/>'
                )
    return "\n".join(parts)


def _label(y: float, text: str) -> str:
    return f'<text x="{_LEFT}" y="{y}" fill="#222" font-weight="600">{text}</text>'


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(drawn(*asyncio.run(play())), "utf-8")

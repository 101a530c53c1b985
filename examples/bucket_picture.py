"""Draw what a bucket does, second by second: `python -m examples.bucket_picture docs/bucket.svg`.

Nothing is made up: a limiter on the embedded backend decides every request, on a clock of its own,
and the level between two requests follows from the instant at which the bucket will be full.
The quota is 6 a minute, in a bucket of 6: a token flows in every ten seconds.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path

from examples.pool_picture import Clock
from tieredlimit import Account, Limiter
from tieredlimit.backends import MemoryBackend

CAPACITY = 6
INTERVAL = 10  # seconds
POLICY = {
    "features": {"image": {}},
    "tiers": {"everyone": {"quotas": {"image": f"{CAPACITY}/minute"}}},
}
SECONDS = 180
REQUESTS = (
    *((second, 1) for second in range(10, 26, 2)),
    *((second, 1) for second in range(40, 81, 10)),
    (135, 4),
    (145, 4),
    (155, 4),
)
"""At which second, and how many tokens a request costs."""
TOLD = (
    (17, "a burst of eight"),
    (60, "one every 10 s"),
    (108, "silence fills it"),
    (145, "requests that cost 4"),
)

_SECOND = 1_000_000
_WIDTH, _TALL, _LEFT, _TOP = 760, 190, 56, 56
_ALLOWED, _DENIED, _INK, _GREY = "#0b6e99", "#b3261e", "#222", "#777"


@dataclass(frozen=True)
class Asked:
    """One request: when, what it cost, what became of it, and the level just before and after."""

    second: int
    cost: int
    allowed: bool
    retry_after: float | None
    before: float
    after: float


async def play() -> list[Asked]:
    """Let every request be decided."""
    clock = Clock()
    start = clock.now
    limiter = Limiter(POLICY, MemoryBackend(clock=clock))
    account = Account("u1")
    asked = []
    for second, cost in REQUESTS:
        clock.now = start + second * _SECOND
        before = _level((await limiter.peek(account, "image")).debts[0])
        decision = await limiter.take(account, "image", cost)
        after = _level((await limiter.peek(account, "image")).debts[0])
        asked.append(Asked(second, cost, decision.allowed, decision.retry_after, before, after))
    return asked


def drawn(asked: list[Asked]) -> str:
    """Return the picture as SVG."""
    parts = [_paper()]
    points = [(0.0, float(CAPACITY))]
    for one in asked:
        points += _refilled(points[-1], one.second)
        points.append((one.second, one.after))
    points += _refilled(points[-1], SECONDS)
    line = " ".join(f"{_x(second):.1f},{_y(level):.1f}" for second, level in points)
    under = f"{_x(SECONDS):.1f},{_y(0):.1f} {_x(0):.1f},{_y(0):.1f}"
    parts.append(f'<polygon points="{line} {under}" fill="#0b6e99" fill-opacity="0.12"/>')
    parts.append(f'<polyline points="{line}" fill="none" stroke="{_INK}" stroke-width="2"/>')
    parts += [_mark(one) for one in asked]
    parts += [_waits(one) for one in asked if _tells(one, asked)]
    parts.append(_legend())
    height = _TOP + _TALL + 100
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 16} {height}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img">'
        "<title>The level of one bucket through a burst, a steady use, a pause and dear requests"
        '</title><rect width="100%" height="100%" fill="#fff"/>'
    )
    return "\n".join([head, *parts, "</svg>", ""])


def _level(debt_us: int) -> float:
    return CAPACITY - debt_us / (INTERVAL * _SECOND)


def _refilled(last: tuple[float, float], until: int) -> list[tuple[float, float]]:
    """Return the corner at which the bucket is full, if it gets so far, and the end."""
    second, level = last
    full = second + (CAPACITY - level) * INTERVAL
    corner = [(full, float(CAPACITY))] if second < full < until else []
    return [*corner, (float(until), min(CAPACITY, level + (until - second) / INTERVAL))]


def _x(second: float) -> float:
    return _LEFT + second * _WIDTH / SECONDS


def _y(level: float) -> float:
    return _TOP + _TALL * (1 - level / CAPACITY)


def _paper() -> str:
    parts = [
        f'<text x="{_LEFT}" y="26" fill="{_INK}" font-weight="600">tokens in the bucket</text>'
    ]
    parts += [
        f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{_y(level):.1f}" y2="{_y(level):.1f}" '
        f'stroke="#e6e6e2"/><text x="{_LEFT - 10}" y="{_y(level) + 4:.1f}" fill="{_GREY}" '
        f'text-anchor="end">{level}</text>'
        for level in range(CAPACITY + 1)
    ]
    parts += [
        f'<text x="{_x(second):.1f}" y="{_y(0) + 46:.1f}" fill="{_GREY}" '
        f'text-anchor="middle">{second}</text>'
        for second in range(0, SECONDS + 1, 10)
    ]
    parts.append(
        f'<text x="{_LEFT - 10}" y="{_y(0) + 46:.1f}" fill="{_GREY}" text-anchor="end">s</text>'
    )
    parts += [
        f'<text x="{_x(second):.1f}" y="{_y(0) + 66:.1f}" fill="{_INK}" '
        f'text-anchor="middle">{told}</text>'
        for second, told in TOLD
    ]
    return "\n".join(parts)


def _mark(one: Asked) -> str:
    x, y, r = _x(one.second), _y(0) + 20, 3.5 + 0.8 * (one.cost - 1)
    if one.allowed:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" fill="{_ALLOWED}"/>'
    return (
        f'<path d="M{x - r:.1f} {y - r:.1f} l{2 * r:.1f} {2 * r:.1f} m0 {-2 * r:.1f} '
        f'l{-2 * r:.1f} {2 * r:.1f}" stroke="{_DENIED}" stroke-width="2"/>'
    )


def _tells(one: Asked, asked: list[Asked]) -> bool:
    """Say whether the picture shows how long this one has to wait: the last denied of a series."""
    later = asked[asked.index(one) + 1 :]
    return not one.allowed and (not later or later[0].allowed or later[0].second > one.second + 9)


def _waits(one: Asked) -> str:
    seconds = one.retry_after or 0.0
    begin, end, y = _x(one.second), _x(one.second + seconds), _y(one.before + 2)
    return (
        f'<path d="M{begin:.1f} {y:.1f} m0 -4 v8 m0 -4 H{end:.1f} m0 -4 v8" stroke="{_DENIED}" '
        'fill="none"/>'
        f'<text x="{end + 6:.1f}" y="{y + 4:.1f}" fill="{_DENIED}">fits in {seconds:g} s</text>'
    )


def _legend() -> str:
    y = _TOP + _TALL + 90
    return (
        f'<circle cx="{_LEFT + 4}" cy="{y - 4}" r="3.5" fill="{_ALLOWED}"/>'
        f'<text x="{_LEFT + 14}" y="{y}" fill="{_INK}">allowed</text>'
        f'<path d="M{_LEFT + 78.5} {y - 7.5} l7 7 m0 -7 l-7 7" stroke="{_DENIED}" '
        'stroke-width="2"/>'
        f'<text x="{_LEFT + 94}" y="{y}" fill="{_INK}">denied, and charged nothing</text>'
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(drawn(asyncio.run(play())), "utf-8")

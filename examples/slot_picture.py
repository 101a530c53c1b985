"""Draw what leases do, minute by minute: `python -m examples.slot_picture docs/slots.svg`.

Nothing is made up: a limiter on the embedded backend decides every take, renewal and release, on a
clock of its own. An account may run two jobs at once, and a slot is held for ten minutes unless its
job renews it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.pool_picture import Clock
from tieredlimit import Account, Lease, Limiter
from tieredlimit.backends import MemoryBackend

SLOTS = 2
LEASE = 10  # minutes
MINUTES = 30
POLICY = {
    "features": {"video": {}},
    "tiers": {
        "everyone": {
            "quotas": {
                "video": {"rate": "200/day", "concurrency": SLOTS, "lease": f"{LEASE} minutes"}
            }
        }
    },
}
JOBS = (
    ("A", 1, 19, "released"),
    ("B", 2, 7, "crashed"),
    ("C", 5, 0, ""),
    ("D", 14, 0, ""),
    ("E", 16, 27, "released"),
    ("F", 20, 26, "released"),
)
"""A job's name, the minutes at which it asks and ends, and how it ends."""

_MINUTE = 60_000_000
_RENEWED_EVERY = LEASE / 3
_STEP = 1 / 6  # minutes between two looks at who holds what
_LEFT, _WIDTH, _TOP, _LANE = 70, 746, 56, 64
_COLOURS = {"A": "#0b6e99", "B": "#9a3d6f", "E": "#d98a00", "F": "#5b6b5b"}
_DENIED, _INK, _GREY = "#b3261e", "#222", "#777"


@dataclass
class Job:
    """One job: when it asked, what it was told, and for how long it ran and held its slot."""

    name: str
    asked: float
    ended: float
    how: str
    allowed: bool = False
    held_until: float = 0.0
    lane: int = 0
    lease: Lease | None = None
    renewed: float = 0.0


async def play() -> list[Job]:
    """Let everything be decided, looking every ten seconds who still holds a slot."""
    clock = Clock()
    start = clock.now
    limiter = Limiter(POLICY, MemoryBackend(clock=clock))
    account = Account("u1")
    jobs = [Job(*job) for job in JOBS]
    for step in range(round(MINUTES / _STEP) + 1):
        minute = step * _STEP
        clock.now = start + round(minute * _MINUTE)
        for job in jobs:
            await _live(job, minute)
        holding = [job for job in jobs if job.allowed and not job.held_until]
        held = (await limiter.peek(account, "video")).slots[0].held
        for job in holding:
            # Whoever crashed is the one whose slot can be free without a release.
            if held < len(holding) and job.how == "crashed":
                job.held_until = minute
        for job in jobs:
            if abs(job.asked - minute) < _STEP / 2:
                await _ask(job, limiter, account, jobs)
    return jobs


async def _live(job: Job, minute: float) -> None:
    if job.lease is None or job.held_until:
        return
    running = minute < job.ended
    if running and minute - job.renewed >= _RENEWED_EVERY:
        await job.lease.renew()
        job.renewed = minute
    if not running and job.how == "released":
        await job.lease.release()
        job.held_until = job.ended


async def _ask(job: Job, limiter: Limiter, account: Account, jobs: Sequence[Job]) -> None:
    decision = await limiter.take(account, "video")
    job.allowed = decision.allowed
    job.lease, job.renewed = decision.lease, job.asked
    taken = {other.lane for other in jobs if other is not job and _holds(other)}
    job.lane = min(set(range(SLOTS)) - taken, default=0)


def _holds(job: Job) -> bool:
    return job.allowed and not job.held_until


def drawn(jobs: Sequence[Job]) -> str:
    """Return the picture as SVG."""
    height = _TOP + (SLOTS + 1) * _LANE + 56
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 16} {height}" '
            'font-family="system-ui, sans-serif" font-size="12" role="img">'
            "<title>Jobs that hold two slots, one of which crashes, and jobs that find none free"
            "</title>"
            '<defs><pattern id="gone" width="7" height="7" patternUnits="userSpaceOnUse" '
            'patternTransform="rotate(45)"><rect width="7" height="7" fill="#fff"/>'
            f'<rect width="3" height="7" fill="{_COLOURS["B"]}"/></pattern></defs>'
            '<rect width="100%" height="100%" fill="#fff"/>'
        ),
        (
            f'<text x="{_LEFT}" y="28" fill="{_INK}" font-weight="600">'
            f"{SLOTS} at once, leases of {LEASE} minutes</text>"
        ),
    ]
    lanes = [*(f"slot {lane + 1}" for lane in range(SLOTS)), "denied"]
    for lane, name in enumerate(lanes):
        y = _TOP + lane * _LANE
        parts.append(
            f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH}" height="{_LANE - 10}" fill="#f7f7f5"/>'
            f'<text x="{_LEFT - 10}" y="{y + 31}" fill="{_INK}" text-anchor="end">{name}</text>'
        )
    parts += [_bar(job) if job.allowed else _cross(job) for job in jobs]
    y = _TOP + (SLOTS + 1) * _LANE + 12
    parts += [
        f'<text x="{_x(minute):.1f}" y="{y}" fill="{_GREY}" text-anchor="middle">{minute}</text>'
        for minute in range(0, MINUTES + 1, 2)
    ]
    parts.append(f'<text x="{_LEFT - 10}" y="{y}" fill="{_GREY}" text-anchor="end">min</text>')
    parts.append(
        f'<text x="{_LEFT}" y="{y + 28}" fill="{_INK}">white ticks: the job renews its lease · '
        "hatched: its process has crashed, and the slot is held until the lease is over</text>"
    )
    return "\n".join([*parts, "</svg>", ""])


def _x(minute: float) -> float:
    return _LEFT + minute * _WIDTH / MINUTES


def _bar(job: Job) -> str:
    y, tall, colour = _TOP + job.lane * _LANE + 5, _LANE - 20, _COLOURS[job.name]
    parts = [
        (
            f'<rect x="{_x(job.asked):.1f}" y="{y}" width="{_x(job.ended) - _x(job.asked):.1f}" '
            f'height="{tall}" fill="{colour}"/>'
            f'<text x="{_x(job.asked) + 8:.1f}" y="{y + 27}" fill="#fff" font-weight="600">'
            f"{job.name}</text>"
        )
    ]
    renewal = job.asked + _RENEWED_EVERY
    while renewal < job.ended:
        parts.append(f'<path d="M{_x(renewal):.1f} {y + 32} v8" stroke="#fff" stroke-width="2"/>')
        renewal += _RENEWED_EVERY
    if job.held_until > job.ended:
        parts.append(
            f'<rect x="{_x(job.ended):.1f}" y="{y}" '
            f'width="{_x(job.held_until) - _x(job.ended):.1f}" height="{tall}" fill="url(#gone)"/>'
        )
    return "\n".join(parts)


def _cross(job: Job) -> str:
    x, y = _x(job.asked), _TOP + SLOTS * _LANE + 27
    return (
        f'<path d="M{x - 6:.1f} {y - 6} l12 12 m0 -12 l-12 12" stroke="{_DENIED}" '
        'stroke-width="2.5"/>'
        f'<text x="{x + 12:.1f}" y="{y + 4}" fill="{_DENIED}">{job.name}: no slot is free</text>'
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(drawn(asyncio.run(play())), "utf-8")

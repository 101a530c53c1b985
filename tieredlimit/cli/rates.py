"""What the workers count, per second: from two heartbeats of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tieredlimit._core.rate import SECOND_US
from tieredlimit.backends.heartbeat import Heartbeat
from tieredlimit.cli.session import Session

Pair = tuple[str, str]
"""A feature and a tier."""

_LONGEST_NAME = 32


@dataclass(frozen=True, slots=True)
class Beats:
    """Hold the heartbeats at an instant.

    Attributes:
        now: The instant, in microseconds.
        workers: The latest heartbeat of each worker.
    """

    now: int
    workers: Sequence[Heartbeat]

    def at(self, worker: Heartbeat) -> float:
        """Return when a worker was heard, in seconds."""
        return self.now / SECOND_US - worker.age


@dataclass(frozen=True, slots=True)
class Sample:
    """Hold rates per second.

    Attributes:
        rates: By feature and tier, and then by outcome.
        workers: How many workers they come from: those that were heard twice.
        live: How many there are.
    """

    rates: Mapping[Pair, Mapping[str, float]]
    workers: int
    live: int

    def of(self, feature: str, tiers: Iterable[str], outcome: str) -> float:
        """Return the sum over tiers."""
        return sum(self.rates.get((feature, tier), {}).get(outcome, 0.0) for tier in tiers)


async def listen(session: Session) -> Beats:
    """Return the latest heartbeats."""
    return Beats(await session.store.now(), await session.store.workers())


async def sample(session: Session, seconds: float = 1.0) -> Sample:
    """Listen for so long, and return what the workers have counted meanwhile."""
    before = await listen(session)
    if before.workers:
        await session.place.pace.pause(seconds)
    return between(before, await listen(session))


def between(before: Beats, after: Beats) -> Sample:
    """Return what was counted from one heartbeat of each worker to a later one, per second."""
    rates: defaultdict[Pair, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    first = {(worker.id, worker.started_us): worker for worker in before.workers}
    heard = 0
    for worker in after.workers:
        earlier = first.get((worker.id, worker.started_us))
        seconds = after.at(worker) - before.at(earlier) if earlier else 0.0
        if earlier is None or seconds < 0.001:
            continue
        heard += 1
        was = counted(earlier)
        for pair, outcomes in counted(worker).items():
            for outcome, count in outcomes.items():
                more = count - was.get(pair, {}).get(outcome, 0)
                if more > 0:
                    rates[pair][outcome] += more / seconds
    return Sample(rates, heard, len(after.workers))


def counted(worker: Heartbeat, kind: str = "cells") -> dict[Pair, dict[str, int]]:
    """Return a worker's counters, without what another release may say in another way."""
    counters = worker.counters.get(kind)
    found: dict[Pair, dict[str, int]] = {}
    if not isinstance(counters, Mapping):
        return found
    for name, outcomes in counters.items():
        feature, slash, tier = str(name).partition("/")
        if (
            slash
            and max(len(feature), len(tier)) <= _LONGEST_NAME
            and isinstance(outcomes, Mapping)
        ):
            found[feature, tier] = {
                str(outcome): count for outcome, count in outcomes.items() if type(count) is int
            }
    return found


def admitted_since(workers: Iterable[Heartbeat], feature: str, tiers: Iterable[str]) -> int:
    """Return what workers have admitted since each of them adopted its revision."""
    cells = [counted(worker, "since") for worker in workers]
    return sum(cell.get((feature, tier), {}).get("allowed", 0) for tier in tiers for cell in cells)


def spell_rate(rate: float) -> str:
    """Return a rate as operators read it."""
    return f"{rate:,.0f} req/s" if rate >= 10 or rate == 0 else f"{rate:.1f} req/s"

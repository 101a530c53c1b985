"""Pools: capacity that all accounts of some features share, the last part kept for some of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tieredlimit._core.quota import MAX_AMOUNT, Quota, parse_quota_rate
from tieredlimit._core.reading import Reading, did_you_mean, join, spell
from tieredlimit._core.slots import WORDS as SLOTS_WORDS
from tieredlimit._core.slots import read_slots

if TYPE_CHECKING:
    from fractions import Fraction

WORDS = ("rate", "capacity", "leave", "slices", *SLOTS_WORDS)

MAX_SLICES = 1_024
"""The most parts that a pool may be cut into."""

ROOM_OF_A_SLICE = 10
"""How many of the largest cost a slice must hold beyond what has to stay in it."""

_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,4})?) ?%")


@dataclass(frozen=True, slots=True)
class Leave:
    """Say what a tier's takes must leave: a share of tokens and slots, or so many tokens."""

    tokens: int = 0
    share: Fraction | int = 0

    def of(self, whole: int) -> int:
        """Return the tokens that must stay of so many; parts of a token count as one."""
        return max(self.tokens, -(-self.share.numerator * whole // self.share.denominator))

    def of_slots(self, whole: int) -> int:
        """Return the slots that must stay free of so many."""
        return -(-self.share.numerator * whole // self.share.denominator)

    def __str__(self) -> str:
        return f"{float(self.share * 100):g}%" if self.share else str(self.tokens)


_NOTHING = Leave()


@dataclass(frozen=True, slots=True)
class Pool:
    """Describe a bucket that is shared by all accounts of its features.

    Attributes:
        name: The feature's name, or the one under [pools].
        quota: The whole bucket.
        leave: What a tier's takes must leave in it, by tier; a tier that is not there, nothing.
        slices: Into how many equal parts it is cut, each on a shard of its own.
    """

    name: str
    quota: Quota
    leave: Mapping[str, Leave]
    slices: int = 1

    @property
    def slice(self) -> Quota:
        """One of the equal parts, as a bucket."""
        if self.slices == 1:
            return self.quota
        quota = self.quota
        concurrency = None if quota.concurrency is None else quota.concurrency // self.slices
        return replace(
            quota,
            capacity=quota.capacity // self.slices,
            interval_us=quota.interval_us * self.slices,
            concurrency=concurrency,
        )

    def left_by(self, tier: str) -> int:
        """Return the tokens that takes of a tier must leave in the whole pool."""
        return self.leave.get(tier, _NOTHING).of(self.quota.capacity)

    def reach(self, tier: str) -> int:
        """Return the tokens of the whole pool that takes of a tier get at, at most."""
        return self.quota.capacity - self.left_by(tier)

    def seen_by(self, tier: str) -> Quota:
        """Return a slice as a tier's takes see it: with what they must leave in it."""
        part = self.slice
        leave = -(-self.left_by(tier) // self.slices)
        limit = part.concurrency
        if limit is not None:
            limit -= self.leave.get(tier, _NOTHING).of_slots(limit)
        return replace(part, leave=leave, concurrency=limit)

    def spell(self) -> str:
        """Return the pool as an operator reads it."""
        quota = self.quota
        text = f"{quota.rate} cap {quota.capacity}"
        if quota.concurrency is not None:
            text = f"{text}, {quota.concurrency} at once"
        if self.leave:
            told = ", ".join(f"{tier} {left}" for tier, left in self.leave.items())
            text = f"{text}, leaving {told}"
        return text if self.slices == 1 else f"{text}, in {self.slices} slices"


def read_pools(reading: Reading, value: Any, tiers: Collection[str]) -> dict[str, Pool | None]:
    """Read [pools], by name; None is one with a fault."""
    pools = {}
    for name, table in reading.table("pools", value).items():
        place = join("pools", name)
        reading.name(place, name)
        if isinstance(name, str):
            pools[name] = read_pool(reading, place, name, table, tiers)
    return pools


def read_pool(
    reading: Reading, path: str, name: str, value: Any, tiers: Collection[str]
) -> Pool | None:
    """Read the table of one pool; None where it has a fault."""
    before = len(reading.faults)
    table = reading.table(path, value)
    if len(reading.faults) > before:
        return None
    reading.known(path, table, WORDS)
    slots = read_slots(reading, path, table)
    slices = reading.whole(join(path, "slices"), table.get("slices", 1), 1, MAX_SLICES)
    leave = _read_leave(reading, join(path, "leave"), table.get("leave", {}), tiers)
    quota = _read_quota(reading, path, name, table, slots)
    if quota is None or slices is None or len(reading.faults) > before:
        return None
    pool = Pool(name, quota, leave, slices)
    _check_leave(reading, join(path, "leave"), pool)
    return pool if len(reading.faults) == before else None


def check_pool(reading: Reading, path: str, pool: Pool, costs: Iterable[tuple[str, int]]) -> None:
    """Note what takes of the pool's features can never get from it.

    `costs` are the routes of its features with what they cost; one that is said nowhere is 1.
    """
    costs = list(costs)
    largest = max((cost for _, cost in costs), default=1)
    if pool.slices > 1:
        _check_slices(reading, path, pool, largest)
    capacity = pool.quota.capacity
    reaches = {tier: pool.reach(tier) for tier in pool.leave}
    for route, cost in costs:
        told = f"{spell(route)} costs {cost:,}"
        if cost > capacity:
            reading.warn(path, f"{told}, never fits a pool of {capacity:,}")
            continue
        for tier, reach in reaches.items():
            if cost > reach:
                reading.warn(path, f"{told}, and tier {tier} gets at {reach:,} at most")


def _check_slices(reading: Reading, path: str, pool: Pool, largest: int) -> None:
    capacity, concurrency = pool.quota.capacity, pool.quota.concurrency
    most_left = max(pool.left_by(tier) for tier in ["", *pool.leave])
    largest_share = Leave(share=max((left.share for left in pool.leave.values()), default=0))
    needed = ROOM_OF_A_SLICE * largest

    def room(slices: int) -> int:
        return capacity // slices - -(-most_left // slices)

    def free(slices: int) -> int | None:
        if concurrency is None:
            return None
        limit = concurrency // slices
        return limit - largest_share.of_slots(limit)

    def works(slices: int) -> bool:
        return room(slices) >= needed and free(slices) != 0

    if works(pool.slices):
        return
    if room(pool.slices) < needed:
        lacks = (
            f"{max(room(pool.slices), 0):,} tokens beyond what must be left in it, and needs "
            f"{needed:,}: {ROOM_OF_A_SLICE} times the largest cost"
        )
    else:
        lacks = "no slot to take"
    most = max(filter(works, range(2, pool.slices)), default=1)
    instead = f"{most} slices work" if most > 1 else "leave it whole"
    reading.fault(join(path, "slices"), f"one of {pool.slices:,} slices has {lacks}; {instead}")


def _read_quota(
    reading: Reading,
    path: str,
    name: str,
    table: Mapping[Any, Any],
    slots: tuple[int | None, int | None],
) -> Quota | None:
    """Read the bucket of a pool; None where it has a fault."""
    capacity = None
    if "capacity" in table:
        place = join(path, "capacity")
        # With a wrong one the window is not known: the rate is read all the same, for its faults.
        capacity = reading.whole(place, table["capacity"], 1, MAX_AMOUNT) or 1
    place, rate = join(path, "rate"), table.get("rate")
    if "rate" not in table:
        reading.fault(place, 'is missing; write a rate such as "600/minute"')
        return None
    if not isinstance(rate, str):
        reading.fault(place, f'got {spell(rate)}; write a rate such as "600/minute"')
        return None
    parsed = reading.parse(place, lambda text: parse_quota_rate(text, capacity), rate)
    if parsed is None:
        return None
    _, tokens, interval_us, warning = parsed
    if warning:
        reading.warn(place, warning)
    return Quota(name, rate, tokens, interval_us, None, *slots)


def _read_leave(
    reading: Reading, path: str, value: Any, tiers: Collection[str]
) -> dict[str, Leave]:
    leave = {}
    for tier, said in reading.table(path, value).items():
        place = join(path, tier)
        if tier not in tiers:
            reading.fault(place, f"unknown tier {spell(tier)}{did_you_mean(tier, tiers)}")
            continue
        left = reading.parse(place, _parse_leave, said)
        if left is not None:
            leave[tier] = left
    return leave


def _check_leave(reading: Reading, path: str, pool: Pool) -> None:
    """Note tiers that must leave all there is."""
    capacity, concurrency = pool.quota.capacity, pool.quota.concurrency
    for tier, left in pool.leave.items():
        place = join(path, tier)
        if left.of(capacity) >= capacity:
            reading.fault(
                place,
                f"{left} of {capacity:,} leaves nothing to take; for never, write 0 in the tier's "
                "quotas",
            )
        elif concurrency is not None and left.of_slots(concurrency) >= concurrency:
            reading.fault(place, f"{left} of {concurrency:,} slots leaves none to take")


def _parse_leave(value: Any) -> Leave:
    if type(value) is int and 0 <= value <= MAX_AMOUNT:
        return Leave(tokens=value)
    share = parse_percent(value)
    if share is None:
        raise ValueError(f'got {spell(value)}; write a number of tokens, or a share such as "50%"')
    return Leave(share=share)


def parse_percent(value: object) -> Fraction | None:
    """Read a share such as "50%", None if it is none: more than 100, or no percentage at all."""
    from fractions import Fraction  # most processes read no share, and it brings decimal

    match = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    if match is None or Fraction(match[1]) > 100:
        return None
    return Fraction(match[1]) / 100

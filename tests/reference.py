"""What the backends must do, written from what a token bucket is and not from how they do it.

A bucket holds at most `capacity` tokens, and one more flows in every `interval_us`, continuously.
All arithmetic is in fractions: nothing is ever rounded. Three rules go beyond the textbook:

- A bucket that owes more than one capacity (a level below minus it) is lifted to owing just that,
  even where the take is denied.
- A clock that steps back takes away what had flowed in since: levels belong to instants.
- Where a quota's numbers change, the time until its bucket is full stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from tieredlimit._core.quota import Quota
from tieredlimit.backends import Charge


@dataclass(frozen=True)
class Bucket:
    """Hold `level` tokens at the instant `at`, of at most `capacity`."""

    capacity: int
    interval_us: int
    level: Fraction
    at: Fraction

    def level_at(self, now: int) -> Fraction:
        flowed = (now - self.at) / self.interval_us
        return min(Fraction(self.capacity), self.level + flowed)

    def time_to_full(self, now: int) -> Fraction:
        return (self.capacity - self.level_at(now)) * self.interval_us

    def full_at(self) -> Fraction:
        return self.at + (self.capacity - self.level) * self.interval_us


@dataclass
class Reference:
    """Decide takes, one after another, by the definition."""

    buckets: dict[tuple[str, str], Bucket] = field(default_factory=dict)

    def take(self, charges: Sequence[Charge], now: int) -> tuple[bool, list[int]]:
        """Return whether all fits, and every bucket's time to full afterwards, in charge order."""
        costs: dict[tuple[str, str], int] = {}
        quotas: dict[tuple[str, str], Quota] = {}
        order = [((key, quota.name), quota) for key, shelf, _ in charges for quota in shelf.quotas]
        for name, quota in order:
            costs[name] = 0
            quotas[name] = quota
        for key, shelf, cost in charges:
            for quota in shelf.quotas:
                costs[key, quota.name] += cost

        found = {name: self._bucket(name, quota, now) for name, quota in quotas.items()}
        allowed = all(found[name].level_at(now) >= cost for name, cost in costs.items())

        seen = {}
        for name, cost in costs.items():
            bucket = found[name]
            seen[name] = _less(bucket, cost, now) if allowed else bucket
            known = name in self.buckets
            if cost and (allowed or (known and bucket.full_at() < self.buckets[name].full_at())):
                self.buckets[name] = seen[name]
        return allowed, [_whole(seen[name].time_to_full(now)) for name, _ in order]

    def last_turned_full(self, now: int) -> Fraction:
        """Return the latest instant up to now at which a bucket turned full.

        A backend may forget a bucket that is full: what a clock that steps back beyond this
        instant should find is not defined.
        """
        return max(
            (bucket.full_at() for bucket in self.buckets.values() if bucket.full_at() <= now),
            default=Fraction(0),
        )

    def _bucket(self, name: tuple[str, str], quota: Quota, now: int) -> Bucket:
        """Return the bucket as a take finds it, by today's numbers; a new one is full."""
        capacity, interval_us = quota.capacity, quota.interval_us
        full = Bucket(capacity, interval_us, Fraction(capacity), Fraction(now))
        old = self.buckets.get(name)
        if old is None:
            return full
        level = capacity - old.time_to_full(now) / interval_us
        if level == capacity:
            return full
        return Bucket(capacity, interval_us, max(level, Fraction(-capacity)), Fraction(now))


def _whole(us: Fraction) -> int:
    # Tokens come in fractions, microseconds do not: a remainder would be a fault of this file.
    if us.denominator != 1:
        raise ValueError(f"{us} is no whole number of microseconds")
    return us.numerator


def _less(bucket: Bucket, cost: int, now: int) -> Bucket:
    level = bucket.level_at(now) - cost
    return Bucket(bucket.capacity, bucket.interval_us, level, Fraction(now))

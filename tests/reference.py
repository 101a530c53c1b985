"""What the backends must do, written from what it means and not from how they do it.

A bucket holds at most `capacity` tokens, and one more flows in every `interval_us`, continuously.
All arithmetic is in fractions: nothing is ever rounded. Three rules go beyond the textbook:

- A bucket that owes more than one capacity (a level below minus it) is lifted to owing just that,
  even where the take is denied.
- A clock that steps back takes away what had flowed in since: levels belong to instants.
- Where a quota's numbers change, the time until its bucket is full stays as it is.

A slot is held until an instant, or until it is released. Where all seem taken, one that is held for
longer from now than its own lease, and than the one that is asked for, is held for its own: the
clock has stepped back.

A record says what a take has charged, until an instant, and until it was settled once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from tieredlimit._core.quota import Quota
from tieredlimit.backends import Charge, Claim
from tieredlimit.backends.holds import Correction, Hold


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


Name = tuple[str, bytes]
"""A bucket: the key it stands under, and what stands for its quota's name."""

Holder = tuple[bytes, int]
"""Who holds a slot: the id, and for how long it is held unless renewed."""


@dataclass
class Reference:
    """Decide takes, one after another, by the definition."""

    buckets: dict[Name, Bucket] = field(default_factory=dict)
    slots: dict[str, dict[Holder, int]] = field(default_factory=dict)
    records: dict[str, tuple[int, list[int]]] = field(default_factory=dict)

    def take(self, charges: Sequence[Charge], now: int) -> tuple[bool, list[int]]:
        """Return whether all fits, and every bucket's time to full afterwards, in charge order."""
        return self.claim(charges, Claim(b"", ()), now)[:2]

    def claim(
        self, charges: Sequence[Charge], claim: Claim, now: int
    ) -> tuple[bool, list[int], list[int]]:
        """Return the same, and how many others hold each slot; all of it is taken, or none."""
        costs: dict[Name, int] = {}
        quotas: dict[Name, Quota] = {}
        order = [((key, quota.tag), quota) for key, shelf, _ in charges for quota in shelf.quotas]
        for name, quota in order:
            costs[name] = 0
            quotas[name] = quota
        for key, shelf, cost in charges:
            for quota in shelf.quotas:
                costs[key, quota.tag] += cost

        found = {name: self._bucket(name, quota, now) for name, quota in quotas.items()}
        held = [self._held(slot.key, slot.limit, slot.lease_us, now) for slot in claim.slots]
        allowed = all(
            found[name].level_at(now) - cost >= quotas[name].leave for name, cost in costs.items()
        ) and all(n < slot.limit for n, slot in zip(held, claim.slots, strict=True))

        seen = {}
        for name, cost in costs.items():
            bucket = found[name]
            seen[name] = _less(bucket, cost, now) if allowed else bucket
            known = name in self.buckets
            if cost and (allowed or (known and bucket.full_at() < self.buckets[name].full_at())):
                self.buckets[name] = seen[name]
        if allowed and claim.id:
            for slot in claim.slots:
                holders = self.slots.setdefault(slot.key, {})
                holders[claim.id, slot.lease_us] = now + slot.lease_us
        if allowed and claim.record:
            charged = [
                cost * quota.interval_us for _, shelf, cost in charges for quota in shelf.quotas
            ]
            self.records[claim.record] = now + claim.keep_us, charged
        return allowed, [_whole(seen[name].time_to_full(now)) for name, _ in order], held

    def renew(self, hold: Hold, now: int) -> bool:
        """Hold every slot from now on, if all of them are held."""
        if not all(self._holds(key, (hold.id, lease_us), now) for key, lease_us in hold.slots):
            return False
        for key, lease_us in hold.slots:
            self.slots[key][hold.id, lease_us] = now + lease_us
        return True

    def release(self, hold: Hold, now: int) -> bool:
        """Free every slot; say whether one of them was held."""
        held = any(self._holds(key, (hold.id, lease_us), now) for key, lease_us in hold.slots)
        for key, lease_us in hold.slots:
            self.slots.get(key, {}).pop((hold.id, lease_us), None)
        return held

    def settle(
        self, record: str, corrections: Sequence[Correction], now: int
    ) -> tuple[bool, list[int]]:
        """Correct what a record says was charged, once; return whether, and the times to full."""
        until, charged = self.records.get(record, (now, []))
        if until <= now:
            return False, [self._owed(one, now) for one in corrections]
        del self.records[record]
        return True, [
            self._correct(one, max(one.us, -most), now)
            for one, most in zip(corrections, charged, strict=True)
        ]

    def refund(self, corrections: Sequence[Correction], now: int) -> list[int]:
        """Give back without a record; return the times to full."""
        return [self._correct(one, one.us, now) for one in corrections]

    def last_turned_full(self, now: int) -> Fraction:
        """Return the latest instant up to now at which a bucket turned full.

        A backend may forget a bucket that is full: what a clock that steps back beyond this
        instant should find is not defined.
        """
        return max(
            (bucket.full_at() for bucket in self.buckets.values() if bucket.full_at() <= now),
            default=Fraction(0),
        )

    def defined_from(self, now: int) -> int:
        """Return the instant before which a clock must not step back: the same, for all there is.

        As with a bucket that is full, a slot that is free, or a record that is over, is forgotten.
        """
        instants = [at for holders in self.slots.values() for at in holders.values()]
        instants += [until for until, _ in self.records.values()]
        over = max((at for at in instants if at <= now), default=0)
        return max(over, -int(-self.last_turned_full(now) // 1))

    def clear_of(self, now: int) -> int:
        """Return the first instant from now on at which it is defined how many slots seem taken.

        A slot that is over may still seem taken, or not any more. Which of both decides whether
        one that is held for too long, since the clock stepped back, is held for its lease only.
        """
        clear = now
        for holders in self.slots.values():
            if any(at <= now for at in holders.values()):
                clear = max(clear, *(at - lease_us for (_, lease_us), at in holders.items()))
        return now if clear == now else self.clear_of(clear)

    def _bucket(self, name: Name, quota: Quota, now: int) -> Bucket:
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

    def _held(self, key: str, limit: int, lease_us: int, now: int) -> int:
        """Return how many slots are held, after lowering what is held for too long."""
        holders = self.slots.get(key, {})
        held = [holder for holder, at in holders.items() if at > now]
        if len(held) >= limit:
            for holder in held:
                if holders[holder] > now + max(holder[1], lease_us):
                    holders[holder] = now + holder[1]
        return len(held)

    def _holds(self, key: str, holder: Holder, now: int) -> bool:
        return self.slots.get(key, {}).get(holder, now) > now

    def _owed(self, one: Correction, now: int) -> int:
        bucket = self.buckets.get((one.key, one.tag))
        return 0 if bucket is None else _whole(bucket.time_to_full(now))

    def _correct(self, one: Correction, us: int, now: int) -> int:
        """Move a bucket away from full by so much time, or towards it; return what is left."""
        before = self._owed(one, now)
        after = max(before + us, 0)
        if us > 0:
            # Down to one capacity below empty; what was further down already stays there.
            after = max(before, min(after, one.clamp_us))
        if after == before:
            return after
        if after == 0:
            del self.buckets[one.key, one.tag]
        else:
            # A token that flows in for so long: only the time to full matters from now on.
            self.buckets[one.key, one.tag] = Bucket(1, after, Fraction(0), Fraction(now))
        return after


def _whole(us: Fraction) -> int:
    # Tokens come in fractions, microseconds do not: a remainder would be a fault of this file.
    if us.denominator != 1:
        raise ValueError(f"{us} is no whole number of microseconds")
    return us.numerator


def _less(bucket: Bucket, cost: int, now: int) -> Bucket:
    level = bucket.level_at(now) - cost
    return Bucket(bucket.capacity, bucket.interval_us, level, Fraction(now))

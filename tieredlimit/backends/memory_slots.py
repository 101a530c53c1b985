"""Slots and reservations in this process: a bounded number, forgotten once their time is over."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from tieredlimit._core.slots import Slot
from tieredlimit.errors import BackendError

_SWEEP = 16
_SWEEP_WHEN_FULL = 1_000
_SLACK = 1_000


class SlotRoom:
    """Hold slots: by key and holder's id, the instant at which one is free, and its lease.

    The lease is part of what names a slot, as it is in Redis.
    """

    __slots__ = ("_count", "_due", "_full", "_held", "_maximum")

    def __init__(self, maximum: int) -> None:
        self._held: dict[str, dict[tuple[bytes, int], int]] = {}
        # Where all seemed held: from when until when they are, so that not every denial counts; and
        # for which lease it was asked.
        self._full: dict[str, tuple[int, int, int]] = {}
        self._due: list[tuple[int, str, tuple[bytes, int]]] = []
        self._count = 0
        self._maximum = maximum

    def __len__(self) -> int:
        """Return how many slots are kept, those included that are free since a moment ago."""
        return self._count

    def held(self, slot: Slot, now: int) -> int:
        """Return how many slots are held; free ones count as long as there are enough."""
        holders = self._held.get(slot.key)
        if holders is None or len(holders) < slot.limit:
            return len(holders or ())
        since, until, lease_us = self._full.get(slot.key, (0, 0, 0))
        if since <= now < until and lease_us <= slot.lease_us:
            return len(holders)
        for holder, free_at in holders.items():
            # The clock was set back, or the lease was longer: each is held for its own, counted
            # from now.
            if free_at > now + max(holder[1], slot.lease_us):
                self._put(slot.key, holders, holder, now + holder[1])
        held = sum(free_at > now for free_at in holders.values())
        if held == len(holders):
            self._full[slot.key] = now, min(holders.values()), slot.lease_us
        return held

    def require_space(self, new: int, now: int) -> None:
        """Make sure that so many more slots fit.

        Raises:
            BackendError: As many are held as may be.
        """
        if self._count + new > self._maximum:
            self.sweep(now, _SWEEP_WHEN_FULL)
            if self._count + new > self._maximum:
                raise BackendError(f"memory holds {self._count} slots, max_keys allows no more")

    def take(self, slot: Slot, id_: bytes, now: int) -> None:
        """Hold one more."""
        holders = self._held.setdefault(slot.key, {})
        self._count += 1
        self._put(slot.key, holders, (id_, slot.lease_us), now + slot.lease_us)

    def renew(self, id_: bytes, slots: tuple[tuple[str, int], ...], now: int) -> bool:
        """Hold all of these for their whole lease again; False if one is not held any more."""
        for key, lease_us in slots:
            if self._held.get(key, {}).get((id_, lease_us), now) <= now:
                return False
        for key, lease_us in slots:
            self._put(key, self._held[key], (id_, lease_us), now + lease_us)
        return True

    def release(self, id_: bytes, slots: tuple[tuple[str, int], ...], now: int) -> bool:
        """Free all of these; False if none was held any more."""
        freed = [self._drop(key, (id_, lease_us)) for key, lease_us in slots]  # each of them
        return any(free_at > now for free_at in freed if free_at is not None)

    def sweep(self, now: int, most: int = _SWEEP) -> None:
        """Forget slots that are free, looking at so many."""
        while self._due and self._due[0][0] <= now and most:
            most -= 1
            _, key, holder = heappop(self._due)
            free_at = self._held.get(key, {}).get(holder)
            if free_at is None:
                continue
            if free_at <= now:
                self._drop(key, holder)
            else:
                heappush(self._due, (free_at, key, holder))

    def _put(
        self, key: str, holders: dict[tuple[bytes, int], int], holder: tuple[bytes, int], at: int
    ) -> None:
        # One entry each: what is renewed moves on when its old time is over.
        if holder not in holders or at < holders[holder]:
            heappush(self._due, (at, key, holder))
        holders[holder] = at
        self._full.pop(key, None)
        if len(self._due) > 2 * self._count + _SLACK:
            # Most were released before their time.
            self._due = [
                (free_at, key, holder)
                for key, holders in self._held.items()
                for holder, free_at in holders.items()
            ]
            heapify(self._due)

    def _drop(self, key: str, holder: tuple[bytes, int]) -> int | None:
        """Forget a holder; return the instant at which its slot is free, None if it had none."""
        holders = self._held.get(key)
        free_at = None if holders is None else holders.pop(holder, None)
        if holders is None or free_at is None:
            return None
        self._count -= 1
        self._full.pop(key, None)
        if not holders:
            del self._held[key]
        return free_at


class Records:
    """Hold what reservations were charged, by key: per bucket the tag and the microseconds."""

    __slots__ = ("_due", "_held", "_maximum")

    def __init__(self, maximum: int) -> None:
        self._held: dict[str, tuple[int, list[tuple[bytes, int]]]] = {}
        self._due: list[tuple[int, str]] = []
        self._maximum = maximum

    def __len__(self) -> int:
        """Return how many are kept."""
        return len(self._held)

    def require_space(self, now: int) -> None:
        """Make sure that one more fits.

        Raises:
            BackendError: As many are kept as may be.
        """
        self.sweep(now)
        if len(self._held) >= self._maximum:
            self.sweep(now, _SWEEP_WHEN_FULL)
            if len(self._held) >= self._maximum:
                raise BackendError(
                    f"memory holds {len(self._held)} reservations, max_keys allows no more"
                )

    def put(self, key: str, charged: list[tuple[bytes, int]], until: int) -> None:
        """Note what was charged, until an instant."""
        self._held[key] = until, charged
        heappush(self._due, (until, key))
        if len(self._due) > 2 * len(self._held) + _SLACK:
            # Most were settled before their time.
            self._due = [(until, key) for key, (until, _) in self._held.items()]
            heapify(self._due)

    def get(self, key: str, now: int) -> list[tuple[bytes, int]] | None:
        """Return what was charged, None where that is not known any more."""
        until, charged = self._held.get(key, (now, []))
        return charged if until > now else None

    def drop(self, key: str) -> None:
        """Forget it."""
        self._held.pop(key, None)

    def sweep(self, now: int, most: int = _SWEEP) -> None:
        """Forget what is kept too long, looking at so many."""
        while self._due and self._due[0][0] <= now and most:
            most -= 1
            self._held.pop(heappop(self._due)[1], None)

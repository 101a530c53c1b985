"""Buckets in this process: the embedded default, exact within it, bounded in memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from threading import Lock
from weakref import WeakSet

from tieredlimit._core.bucket import debit, settle_instant
from tieredlimit._core.table import Shelf
from tieredlimit.backends.backend import Charge, Reply
from tieredlimit.errors import BackendError, UsageError

MAX_KEYS = 1_000_000
MAX_CATCH_ALL_KEYS = 100_000

_SLOT_BITS = (
    20  # keys that fill up within the same 2**20 microseconds, about a second, share a slot
)
_SWEEP = 8
_SWEEP_WHEN_FULL = 1_000

_Held = tuple[tuple[str, ...], tuple[int, ...]]
"""The names of a key's buckets, shared by all keys of a shelf, and the instant of each."""


_living: WeakSet[MemoryBackend] = WeakSet()
_held_by_fork: list[Lock] = []


def system_clock() -> int:
    """Return the wall clock in microseconds since 1970."""
    return time.time_ns() // 1000


class MemoryBackend:
    """Keep buckets in this process.

    Nothing is shared between processes: with N workers each account has its quotas N times. Safe
    to use from several threads and event loops.

    Args:
        clock: Returns integer microseconds since 1970; for tests and replay. It may step back.
        max_keys: The most keys kept, one per subject, feature and tier. A key leaves by itself
            once its buckets are full. A subject for which there is no room gets the feature's
            outage answer: a bucket that is not full is never forgotten.
        max_catch_all_keys: The same for subjects of the last of several tiers, kept apart so that
            strangers cannot crowd out accounts.

    Raises:
        UsageError: A maximum is below 1.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], int] = system_clock,
        max_keys: int = MAX_KEYS,
        max_catch_all_keys: int = MAX_CATCH_ALL_KEYS,
    ) -> None:
        for name, value in (("max_keys", max_keys), ("max_catch_all_keys", max_catch_all_keys)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        self.now = clock
        self._accounts = _Room(max_keys, "max_keys")
        self._strangers = _Room(max_catch_all_keys, "max_catch_all_keys")
        self._lock = Lock()
        _living.add(self)

    def __len__(self) -> int:
        """Return the number of keys kept."""
        return len(self._accounts.held) + len(self._strangers.held)

    async def open(self) -> None:
        """Do nothing: memory is always ready."""

    async def close(self) -> None:
        """Do nothing: buckets outlive event loops."""

    async def take(self, charges: Sequence[Charge]) -> Reply:
        """Charge every bucket, or none of them.

        Raises:
            BackendError: There is no room for a subject not yet known; nothing was charged.
        """
        with self._lock:
            return self._take(charges, self.now())

    def _take(self, charges: Sequence[Charge], now: int) -> Reply:
        read: dict[str, tuple[_Room, Shelf, list[int], bool]] = {}
        for key, shelf, _ in charges:
            if key not in read:
                room = self._room(key, shelf)
                read[key] = (room, shelf, *room.read(key, shelf, now))
        debited = self._debit(charges, read, now)
        # A charge of cost 0 only reads.
        written = {key for key, _, cost in charges if cost}
        if debited is not None:
            self._make_room(written, read, now)
        for key in written:
            room, shelf, before, lowered = read[key]
            if debited is not None:
                room.write(key, shelf, debited[key], now, reschedule=lowered)
            elif lowered:
                # Full stays full: "full as of now" would be a debt once the clock stepped back.
                instants = [at if at > now else 0 for at in before]
                room.write(key, shelf, instants, now, reschedule=True)
        debts: list[int] = []
        for key, _, _ in charges:
            debts += [at - now for at in (read[key][2] if debited is None else debited[key])]
        return Reply(debited is not None, now, debts)

    def _make_room(
        self, written: set[str], read: dict[str, tuple[_Room, Shelf, list[int], bool]], now: int
    ) -> None:
        """Make sure that all new keys fit before any is written: else nothing is charged."""
        for room in (self._accounts, self._strangers):
            room.sweep(now)
            new = sum(read[key][0] is room and key not in room.held for key in written)
            if new:
                room.require_space(new, now)

    def _debit(
        self,
        charges: Sequence[Charge],
        read: dict[str, tuple[_Room, Shelf, list[int], bool]],
        now: int,
    ) -> dict[str, list[int]] | None:
        """Return the instants after charging, by key, or None where a charge does not fit."""
        debited = {key: list(instants) for key, (_, _, instants, _) in read.items()}
        for key, shelf, cost in charges:
            instants = debited[key]
            for i, quota in enumerate(shelf.quotas):
                candidate = debit(quota, instants[i], now, cost)
                if candidate is None:
                    return None
                instants[i] = candidate
        return debited

    def _room(self, key: str, shelf: Shelf) -> _Room:
        """Return the room a key belongs to, moving it there if a new policy calls for that."""
        room, other = self._accounts, self._strangers
        if shelf.catch_all:
            room, other = other, room
        if key not in room.held and key in other.held:
            room.adopt(key, other.held.pop(key))
        return room


class _Room:
    """Hold keys up to a maximum, and forget the full ones.

    Each key stands in the slot of the instant at which it was going to be full when it was put
    there. When that has passed it is either full and leaves, or moves to the slot of its instant
    today: so work is bounded by what expires, whatever the number of keys.
    """

    __slots__ = ("_heap", "_maximum", "_name", "_slots", "held")

    def __init__(self, maximum: int, name: str) -> None:
        self.held: dict[str, _Held] = {}
        self._maximum = maximum
        self._name = name
        self._slots: dict[int, list[str]] = {}
        self._heap: list[int] = []

    def read(self, key: str, shelf: Shelf, now: int) -> tuple[list[int], bool]:
        """Return the instant of each quota's bucket, and whether a clamp lowered one."""
        held = self.held.get(key)
        if held is None:
            return [now] * len(shelf.quotas), False
        names, stored = held
        if names is not shelf.names:
            by_name = dict(zip(names, stored, strict=True))
            stored = tuple(by_name.get(name, now) for name in shelf.names)
        instants = [
            settle_instant(at, now, quota.clamp_us)
            for at, quota in zip(stored, shelf.quotas, strict=True)
        ]
        lowered = any(at < was for at, was in zip(instants, stored, strict=True))
        return instants, lowered

    def write(
        self, key: str, shelf: Shelf, instants: list[int], now: int, *, reschedule: bool
    ) -> None:
        """Keep a key's instants, together with buckets of other names that are not yet full."""
        names, kept = shelf.names, tuple(instants)
        held = self.held.get(key)
        if held is None:
            reschedule = True
        elif held[0] is not names:
            others = [
                (name, at)
                for name, at in zip(*held, strict=True)
                if name not in shelf.names and at > now
            ]
            if others:
                names += tuple(name for name, _ in others)
                kept += tuple(at for _, at in others)
        self.held[key] = (names, kept)
        if reschedule:
            self._schedule(key, max(kept))

    def adopt(self, key: str, held: _Held) -> None:
        """Take over a key from another room, even beyond the maximum: it is not full."""
        self.held[key] = held
        self._schedule(key, max(held[1]))

    def require_space(self, new: int, now: int) -> None:
        """Make sure that so many more keys fit.

        Raises:
            BackendError: Every key is in use.
        """
        if len(self.held) + new > self._maximum:
            self.sweep(now, _SWEEP_WHEN_FULL)
            if len(self.held) + new > self._maximum:
                raise BackendError(
                    f"memory holds {len(self.held)} buckets in use, {self._name} allows no more"
                )

    def sweep(self, now: int, most: int = _SWEEP) -> None:
        """Forget keys that are full, looking at `most` keys."""
        current = now >> _SLOT_BITS
        while self._heap and self._heap[0] < current and most:
            most -= 1
            slot = self._heap[0]
            keys = self._slots[slot]
            key = keys.pop()
            if not keys:
                del self._slots[slot]
                heappop(self._heap)
            held = self.held.get(key)
            if held is not None:
                full_at = max(held[1])
                if full_at <= now:
                    del self.held[key]
                else:
                    self._schedule(key, full_at)

    def _schedule(self, key: str, full_at: int) -> None:
        slot = full_at >> _SLOT_BITS
        keys = self._slots.get(slot)
        if keys is None:
            self._slots[slot] = [key]
            heappush(self._heap, slot)
        else:
            keys.append(key)


def _before_fork() -> None:
    # Nobody may be in the middle of a take: in the child, which has no other thread, a lock that
    # was held would never be released.
    for backend in list(_living):
        backend._lock.acquire()  # noqa: SLF001 -- of this module
        _held_by_fork.append(backend._lock)  # noqa: SLF001 -- of this module


def _after_fork() -> None:
    while _held_by_fork:
        _held_by_fork.pop().release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)

"""Buckets in this process: the embedded default, exact within it, bounded in memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from threading import Lock
from weakref import WeakSet

from tieredlimit._core.bucket import debit
from tieredlimit._core.shelf import Shelf
from tieredlimit._core.stamp import Stamp
from tieredlimit.backends.backend import Charge, Claim, Claimed, Reply
from tieredlimit.backends.memory_slots import Records, SlotRoom
from tieredlimit.backends.rooms import Room, charge_held, charge_new
from tieredlimit.errors import UsageError

MAX_KEYS = 1_000_000
MAX_CATCH_ALL_KEYS = 100_000

# What a named tuple's own constructor does, at half its cost.
new_tuple = tuple.__new__

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
            outage answer: a bucket that is not full is never forgotten. As many are kept apart
            for cells in shadow, of slots, and of reservations, if there are any.
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
        self._accounts = Room(max_keys, "max_keys")
        self._strangers = Room(max_catch_all_keys, "max_catch_all_keys")
        self.lock: Lock = Lock()
        self._bounds = max_keys, max_catch_all_keys
        self._measured: MemoryBackend | None = None
        self.slots: SlotRoom = SlotRoom(max_keys)
        self.records: Records = Records(max_keys)
        _living.add(self)

    def __len__(self) -> int:
        """Return the number of keys kept."""
        return len(self._accounts.held) + len(self._strangers.held)

    async def open(self) -> None:
        """Do nothing: memory is always ready."""

    async def close(self) -> None:
        """Do nothing: buckets outlive event loops."""

    async def take(self, charges: Sequence[Charge]) -> Reply:
        """Charge every bucket, or none of them; as `take_now`."""
        return self.take_now(charges)

    def take_now(self, charges: Sequence[Charge]) -> Reply:
        """Charge every bucket, or none of them.

        Raises:
            BackendError: There is no room for a subject not yet known; nothing was charged.
        """
        with self.lock:
            now = self.now()
            if len(charges) == 1:
                key, shelf, cost = charges[0]
                room, other = self._accounts, self._strangers
                if shelf.catch_all:
                    room, other = other, room
                held = room.held.get(key)
                debts = None
                if held is not None and cost:
                    debts = charge_held(room, key, held, shelf, cost, now)
                elif cost and key not in other.held:
                    if other.due <= now:
                        other.sweep(now)
                    debts = charge_new(room, key, shelf, cost, now)
                if debts is not None:
                    return new_tuple(Reply, (True, now, debts))
            return Reply(*self._take(charges, now, None)[:3])

    async def claim(
        self,
        charges: Sequence[Charge],
        claim: Claim,
        stamp: Stamp | None = None,  # noqa: ARG002 -- as stores have it that compare revisions
        times: tuple[int, int] | None = None,  # noqa: ARG002 -- the same
    ) -> Claimed:
        """Charge every bucket and take what is claimed, or none of it; as `claim_now`."""
        return self.claim_now(charges, claim)

    def claim_now(self, charges: Sequence[Charge], claim: Claim) -> Claimed:
        """Charge every bucket and take what is claimed, or none of it.

        Raises:
            BackendError: There is no room for something not yet known; nothing was charged.
        """
        with self.lock:
            return self._take(charges, self.now(), claim)

    def measure_now(self, charges: Sequence[Charge]) -> Reply:
        """Do what `take_now` does, on buckets apart: what only measures takes nobody's room.

        Raises:
            BackendError: As `take_now`.
        """
        measured = self._measured
        if measured is None:
            with self.lock:
                measured = self._measured
                if measured is None:
                    most, most_catch_all = self._bounds
                    measured = self._measured = MemoryBackend(
                        clock=self.now, max_keys=most, max_catch_all_keys=most_catch_all
                    )
        return measured.take_now(charges)

    def _take(self, charges: Sequence[Charge], now: int, claim: Claim | None) -> Claimed:
        read: dict[str, tuple[Room, Shelf, list[int], bool]] = {}
        for key, shelf, _ in charges:
            if key not in read:
                room = self._room(key, shelf)
                read[key] = (room, shelf, *room.read(key, shelf, now))
        debited = self._debit(charges, read, now)
        held: list[int] = []
        if claim is not None:
            held = [self.slots.held(slot, now) for slot in claim.slots]
            if any(n >= slot.limit for n, slot in zip(held, claim.slots, strict=True)):
                debited = None
        # A charge of cost 0 only reads.
        written = {key for key, _, cost in charges if cost}
        if debited is not None:
            self._make_room(written, read, now)
            if claim is not None and claim.id:
                self._claim(claim, charges, now)
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
        return Claimed(debited is not None, now, debts, held)

    def _claim(self, claim: Claim, charges: Sequence[Charge], now: int) -> None:
        """Take what is claimed: where there is no room for it, nothing is charged either."""
        self.slots.sweep(now)
        self.slots.require_space(len(claim.slots), now)
        if claim.record:
            self.records.require_space(now)
            charged = [
                (quota.tag, cost * quota.interval_us)
                for _, shelf, cost in charges
                for quota in shelf.quotas
            ]
            self.records.put(claim.record, charged, now + claim.keep_us)
        for slot in claim.slots:
            self.slots.take(slot, claim.id, now)

    def note(self, charges: Sequence[Charge]) -> None:
        """Charge what was decided elsewhere: down to empty, never below.

        Where there is no room for a subject not yet known, it stays unknown.
        """
        with self.lock:
            now = self.now()
            for key, shelf, cost in charges:
                room = self._room(key, shelf)
                room.sweep(now)
                if key not in room.held and not room.has_space(now):
                    continue
                changes = [
                    (tag, cost * interval_us, quota.window_us)
                    for tag, (interval_us, _, _), quota in zip(
                        shelf.tags, shelf.steps, shelf.quotas, strict=True
                    )
                ]
                room.correct(key, changes, now)

    def room_of(self, key: str) -> Room:
        """Return where a key is held, or where one goes that nobody knows; the lock is held."""
        return self._strangers if key in self._strangers.held else self._accounts

    def _make_room(
        self, written: set[str], read: dict[str, tuple[Room, Shelf, list[int], bool]], now: int
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
        read: dict[str, tuple[Room, Shelf, list[int], bool]],
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

    def _room(self, key: str, shelf: Shelf) -> Room:
        """Return the room a key belongs to, moving it there if a new policy calls for that."""
        room, other = self._accounts, self._strangers
        if shelf.catch_all:
            room, other = other, room
        if key not in room.held and key in other.held:
            room.adopt(key, other.held.pop(key))
        return room


def _before_fork() -> None:
    # Nobody may be in the middle of a take: in the child, which has no other thread, a lock that
    # was held would never be released.
    for backend in list(_living):
        backend.lock.acquire()
        _held_by_fork.append(backend.lock)


def _after_fork() -> None:
    while _held_by_fork:
        _held_by_fork.pop().release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)

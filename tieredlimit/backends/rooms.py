"""Keys in memory: a bounded number, each as small as it can be, forgotten once full."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any

from tieredlimit._core.bucket import settle_instant
from tieredlimit._core.shelf import Shelf
from tieredlimit.errors import BackendError

Held = int | tuple[Any, ...]
"""A key's buckets: `full_at << 32 | tag` of a single one, else the tags and each `full_at`."""

TAG_MASK = 2**32 - 1

# Keys that fill up within the same 2**20 microseconds, about a second, share a slot.
_SLOT_BITS = 20

_SWEEP = 8
_SWEEP_WHEN_FULL = 1_000
_SLACK = 1_000
_NEVER = 2**63


def fold(tags: tuple[int, ...], instants: list[int]) -> Held:
    """Return what is held for buckets of these tags and instants."""
    if len(tags) == 1:
        return instants[0] << 32 | tags[0]
    return (tags, *instants)


def unfold(held: Held) -> tuple[tuple[int, ...], list[int]]:
    """Return the tags and the instants of what is held."""
    if isinstance(held, int):
        return (held & TAG_MASK,), [held >> 32]
    tags, *instants = held
    return tags, instants


class Room:
    """Hold keys up to a maximum, and forget the full ones.

    Each key stands in the slot of the instant at which it was going to be full when it was put
    there. When that has passed it is either full and leaves, or moves to the slot of its instant
    today: so work is bounded by what expires, whatever the number of keys.

    Attributes:
        held: What is held, by key.
        due: The instant from which a sweep may find something.
    """

    __slots__ = ("_heap", "_maximum", "_name", "_slots", "_stale", "due", "held")

    def __init__(self, maximum: int, name: str) -> None:
        self.held: dict[str, Held] = {}
        self.due: int = _NEVER
        self._maximum = maximum
        self._name = name
        self._slots: dict[int, list[str]] = {}
        self._heap: list[int] = []
        self._stale = 0

    def read(self, key: str, shelf: Shelf, now: int) -> tuple[list[int], bool]:
        """Return the instant of each quota's bucket, and whether a clamp lowered one."""
        held = self.held.get(key)
        if held is None:
            return [now] * len(shelf.quotas), False
        by_tag = dict(zip(*unfold(held), strict=True))
        stored = [by_tag.get(tag, now) for tag in shelf.tags]
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
        tags, kept = shelf.tags, instants
        held = self.held.get(key)
        if held is None:
            reschedule = True
        else:
            others = [
                (tag, at)
                for tag, at in zip(*unfold(held), strict=True)
                if tag not in tags and at > now
            ]
            if others:
                tags = (*tags, *[tag for tag, _ in others])
                kept = [*kept, *[at for _, at in others]]
        self.held[key] = fold(tags, kept)
        if reschedule:
            self._schedule(key, max(kept))

    def add(self, key: str, tags: tuple[int, ...], debts: list[int], now: int) -> bool:
        """Keep a new key's debts; False where there might be no space."""
        if len(self.held) >= self._maximum:
            return False
        self.held[key] = fold(tags, [now + debt for debt in debts])
        self._schedule(key, now + max(debts))
        return True

    def correct(self, key: str, changes: Sequence[tuple[int, int, int]], now: int) -> list[int]:
        """Change a key's buckets by tag, microseconds and clamp each; return their debts since.

        As the store's script `settle` does. A new key is kept even beyond the maximum.
        """
        held = self.held.get(key)
        instants = {} if held is None else dict(zip(*unfold(held), strict=True))
        debts = []
        for tag, us, clamp in changes:
            before = max(instants.get(tag, now), now)
            after = max(before + us, now)
            if us > 0:
                after = max(before, min(after, now + clamp))
            instants[tag] = after
            debts.append(after - now)
        kept = {tag: at for tag, at in instants.items() if at > now}
        if kept:
            self.held[key] = fold(tuple(kept), list(kept.values()))
        elif held is not None:
            del self.held[key]
        if held is None:
            if kept:
                self._schedule(key, max(kept.values()))
        elif max(kept.values(), default=now) < max(unfold(held)[1]):
            # It leaves earlier than it was going to; where it stood, it still does.
            if kept:
                self._schedule(key, max(kept.values()))
            self._count_stale()
        return debts

    def adopt(self, key: str, held: Held) -> None:
        """Take over a key from another room, even beyond the maximum: it is not full."""
        self.held[key] = held
        self._schedule(key, max(unfold(held)[1]))

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

    def has_space(self, now: int) -> bool:
        """Say whether one more key fits."""
        if len(self.held) >= self._maximum:
            self.sweep(now, _SWEEP_WHEN_FULL)
        return len(self.held) < self._maximum

    def sweep(self, now: int, most: int = _SWEEP) -> None:
        """Forget keys that are full, looking at `most` keys."""
        while self.due <= now and most:
            most -= 1
            slot = self._heap[0]
            keys = self._slots[slot]
            key = keys.pop()
            if not keys:
                del self._slots[slot]
                heappop(self._heap)
                self.due = (self._heap[0] + 1) << _SLOT_BITS if self._heap else _NEVER
            held = self.held.get(key)
            if held is not None:
                full_at = max(unfold(held)[1])
                if full_at <= now:
                    del self.held[key]
                else:
                    self._schedule(key, full_at)

    def _count_stale(self) -> None:
        """Count that a key stands where it need not, and put all anew where most do."""
        self._stale += 1
        if self._stale > 2 * len(self.held) + _SLACK:
            self._stale = 0
            self._slots, self._heap, self.due = {}, [], _NEVER
            for key, held in self.held.items():
                self._schedule(key, max(unfold(held)[1]))

    def _schedule(self, key: str, full_at: int) -> None:
        slot = full_at >> _SLOT_BITS
        keys = self._slots.get(slot)
        if keys is None:
            self._slots[slot] = [key]
            heappush(self._heap, slot)
            self.due = (self._heap[0] + 1) << _SLOT_BITS
        else:
            keys.append(key)


def charge_new(room: Room, key: str, shelf: Shelf, cost: int, now: int) -> list[int] | None:
    """Charge full buckets, whose key is not held.

    Return the debts; None where they do not fit, or where there might be no room, and then nothing
    was done.
    """
    if room.due <= now:
        room.sweep(now)
    debts = [cost * step[0] for step in shelf.steps]
    for debt, step in zip(debts, shelf.steps):  # noqa: B905 -- one made of the other
        if debt > step[1]:
            return None
    return debts if room.add(key, shelf.tags, debts, now) else None


def charge_held(
    room: Room, key: str, held: Held, shelf: Shelf, cost: int, now: int
) -> list[int] | None:
    """Charge what almost every held key holds: the one or two buckets of its shelf.

    Return the debts; None where it is not so, or where it does not fit, and then nothing was done.
    """
    if isinstance(held, int):
        if len(shelf.tags) != 1 or held & TAG_MASK != shelf.tags[0]:
            return None
        full_at = held >> 32
        ((interval, window, clamp),) = shelf.steps
        debt = full_at - now if full_at > now else 0
        if debt > clamp:
            return None
        debt += cost * interval
        if debt > window:
            return None
        room.held[key] = now + debt << 32 | shelf.tags[0]
        debts = [debt]
    elif len(held) == 3:
        tags, first_at, second_at = held
        if tags is not shelf.tags and tags != shelf.tags:
            return None
        (interval, window, clamp), (interval2, window2, clamp2) = shelf.steps
        first = first_at - now if first_at > now else 0
        second = second_at - now if second_at > now else 0
        if first > clamp or second > clamp2:
            return None
        first += cost * interval
        second += cost * interval2
        if first > window or second > window2:
            return None
        room.held[key] = (tags, now + first, now + second)
        debts = [first, second]
    else:
        return None
    if room.due <= now:
        room.sweep(now)
    return debts

"""Whether what was admitted is more than the limits say, by the notes of all workers together.

Per bucket, two ways that know nothing of each other nor of the package, in whole microseconds:

- by intervals: for every admission at `b` and every instant `a` before, what was admitted from `a`
  to `b`, times the interval, is at most `reach + (b - a)`; that is `capacity + floor((b - a) /
  interval)` tokens. With `S` the sum of all that was charged before, the worst `a` is where
  `S(a) - a` was least: one pass over the admissions sees every interval.
- by replay: a bucket fills at its rate, every admission must find room in it.

What settling gives back counts from its instant on. Where a worker was killed, or got no answer,
nobody knows whether a settling or a release happened; then it counts as what excuses most: a bucket
may hold that much more from the earliest to the latest instant at which it can have happened. What
settling charges in addition narrows the replay; the intervals leave it out.

Everything is read as a stream: only what is open is in memory.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from benchmarks.audit_limits import FEATURES, LEASE_US, Bucket, tier_of
from benchmarks.audit_log import (
    ADMITTED,
    ASKED,
    DENIED,
    FAILED,
    RELEASE,
    RENEW,
    SETTLE,
    End,
    Files,
    Take,
    read_ends,
    read_takes,
)

_MOST_SHOWN = 10


class LogError(Exception):
    """The notes cannot be what they should be: nothing can be said."""


@dataclass(slots=True)
class Findings:
    """Hold what was counted, and what is wrong.

    Attributes:
        counts: Takes by outcome, `remembered` denials, ends by kind, and what is unknown.
        buckets: How many buckets were charged.
        closest_us: The least room that an admission left below its bound, None without any.
        at_bound: Admissions that left no room for one more token.
        most_held: The most slots that an account held at once.
        over_intervals: Admissions beyond the bound of some interval.
        over_replay: Admissions that found no room in the replay.
        over_slots: Takes that held one slot too many, and renewals of what was over.
        unasked: Admissions without the server's word.
        excess: By bucket, the most tokens by which an interval was exceeded.
        told: The first of what is wrong, in words.
        silence_us: The longest time without a decision.
    """

    counts: Counter[str] = field(default_factory=Counter)
    buckets: int = 0
    closest_us: int | None = None
    at_bound: int = 0
    most_held: int = 0
    over_intervals: int = 0
    over_replay: int = 0
    over_slots: int = 0
    unasked: int = 0
    excess: dict[str, tuple[Bucket, int]] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    silence_us: int = 0

    @property
    def over(self) -> int:
        """How often too much was admitted, by whichever way says more."""
        return max(self.over_intervals, self.over_replay) + self.over_slots + self.unasked


class Room(NamedTuple):
    """Say how far an admission stayed below its bound, in microseconds; below zero is too much."""

    by_intervals: int
    by_replay: int


class Level:
    """Follow one bucket."""

    __slots__ = ("_charged", "_full_at", "_least", "_spare")

    def __init__(self) -> None:
        self._charged = 0
        self._least: int | None = None
        self._full_at = 0
        self._spare = 0

    def admit(self, now: int, us: int, reach_us: int) -> Room:
        """Charge an admission, which may leave the bucket `reach_us` from full."""
        start = self._charged - now
        if self._least is None or start < self._least:
            self._least = start
        self._charged += us
        self._full_at = max(self._full_at, now) + us
        bound = reach_us + self._spare
        return Room(
            bound - (self._charged - now - self._least),
            bound - (self._full_at - now),
        )

    def give_back(self, at: int, us: int) -> None:
        """Give back what was not used."""
        self._charged -= us
        self._full_at = max(self._full_at - us, at)

    def charge_more(self, at: int, us: int, clamp_us: int) -> None:
        """Charge what settling adds, whatever is there."""
        full_at = max(self._full_at, at)
        self._full_at = max(full_at, min(full_at + us, at + clamp_us))

    def spare(self, us: int) -> None:
        """Excuse so much more; below zero, so much less again."""
        self._spare += us


class Held:
    """Follow the slots of one account."""

    __slots__ = ("_until",)

    def __init__(self) -> None:
        self._until: dict[bytes, int] = {}

    def take(self, now: int, id_: bytes) -> int:
        """Hold one more; return how many there are then."""
        for over in [other for other, until in self._until.items() if until <= now]:
            del self._until[over]
        self._until[id_] = now + LEASE_US
        return len(self._until)

    def renew(self, at: int, id_: bytes) -> bool:
        """Hold one for its whole time again; say whether it was held at all."""
        held = self._until.get(id_, 0) > at
        self._until[id_] = at + LEASE_US
        return held

    def release(self, id_: bytes) -> None:
        """Free one, if it is held."""
        self._until.pop(id_, None)


class _Event(NamedTuple):
    """Order a note by its instant; within one, in the order that excuses most."""

    at: int
    rank: int
    note: Take | End
    excused: int = 0
    """1 where an unknown end may begin to have happened, -1 where it must have."""


def check(workers: Mapping[int, Files], gone: Mapping[int, int]) -> Findings:
    """Check the notes of all workers.

    Args:
        workers: The files of each, by its number.
        gone: By worker, an instant on the server's clock at which nothing that it had asked for
            could happen any more.

    Raises:
        LogError: A worker's notes are not in the order of the server's clock.
    """
    checking = _Checking()
    streams: list[Iterator[_Event]] = []
    unknown: list[_Event] = []
    for worker, files in workers.items():
        unknown += checking.unknown(files, gone[worker])
        streams.append(_in_order(f"takes of worker {worker}", checking.takes(files)))
        streams.append(_in_order(f"ends of worker {worker}", checking.ends(files)))
    streams.append(iter(sorted(unknown, key=_order)))
    latest: int | None = None
    for event in heapq.merge(*streams, key=_order):
        checking.apply(event)
        if latest is not None:
            silence_us = event.at - latest
            checking.findings.silence_us = max(checking.findings.silence_us, silence_us)
        latest = event.at
    checking.findings.buckets = len(checking.levels)
    return checking.findings


def _order(event: _Event) -> tuple[int, int]:
    return event.at, event.rank


def _at(event: _Event) -> int:
    return event.at


def _in_order(whose: str, events: Iterator[_Event]) -> Iterator[_Event]:
    """Yield events by instant and rank, where they come by instant.

    Raises:
        LogError: They do not.
    """
    latest = 0
    for at, together in groupby(events, _at):
        if at < latest:
            raise LogError(f"{whose}: {at} after {latest}")
        latest = at
        yield from sorted(together, key=_order)


class _Checking:
    def __init__(self) -> None:
        self.findings = Findings()
        self.levels: dict[tuple[str, int], Level] = {}
        self._held: dict[tuple[int, int], Held] = {}

    def takes(self, files: Files) -> Iterator[_Event]:
        """Yield what was admitted; count the rest."""
        counts = self.findings.counts
        names = {ADMITTED: "admitted", DENIED: "denied", FAILED: "failed"}
        asked = answered = remembered = 0
        for note in read_takes(files):
            if note.outcome == ASKED:
                asked += 1
                continue
            counts[names[note.outcome]] += 1
            remembered = note.remembered
            if note.outcome == ADMITTED and not note.now:
                self._tell(f"{_spell(note)}: without the server's word")
                self.findings.unasked += 1
                continue
            answered += 1
            if note.outcome == ADMITTED:
                # Of one call, and one instant: those first that must leave more.
                yield _Event(note.now, 1 + (tier_of(note.account) != "new"), note)
        counts["asked"] += asked
        counts["lost"] += asked - answered
        counts["remembered"] += remembered

    def ends(self, files: Files) -> Iterator[_Event]:
        """Yield what was answered and done."""
        counts = self.findings.counts
        names = {SETTLE: "settled", RENEW: "renewed", RELEASE: "released"}
        for note in read_ends(files):
            if note.answered and note.done:
                counts[names[note.kind]] += 1
                yield _Event(note.first, 0, note)

    def unknown(self, files: Files, gone: int) -> list[_Event]:
        """Return what may or may not have happened, twice: when it begins and when it ends."""
        asked: dict[int, End] = {}
        for note in read_ends(files):
            if note.answered:
                del asked[note.number]
            else:
                asked[note.number] = note
        self.findings.counts["unknown"] += len(asked)
        return [
            _Event(at, 0, note, excused)
            for note in asked.values()
            for at, excused in ((note.first, 1), (max(note.first, gone), -1))
        ]

    def apply(self, event: _Event) -> None:
        """Take the next event into account."""
        note = event.note
        if isinstance(note, Take):
            self._admit(note)
        elif event.excused:
            self._excuse(note, event)
        else:
            self._end(note)

    def _admit(self, note: Take) -> None:
        findings = self.findings
        feature = FEATURES[note.feature]
        for bucket in feature.buckets:
            us = note.cost * bucket.interval_us
            reach_us = bucket.reach_us(tier_of(note.account))
            room = self._level(bucket, note.account).admit(note.now, us, reach_us)
            findings.over_intervals += room.by_intervals < 0
            findings.over_replay += room.by_replay < 0
            least = min(room)
            if findings.closest_us is None or least < findings.closest_us:
                findings.closest_us = least
            findings.at_bound += 0 <= least < bucket.interval_us
            if least < 0:
                self._exceeded(bucket, note, -(least // bucket.interval_us))
        if feature.slots is not None:
            held = self._held_by(note).take(note.now, note.id)
            findings.most_held = max(findings.most_held, held)
            if held > feature.slots:
                findings.over_slots += 1
                self._tell(f"{_spell(note)}: holds {held} slots of {feature.slots}")

    def _exceeded(self, bucket: Bucket, note: Take, tokens: int) -> None:
        name = bucket.name if bucket.shared else f"{bucket.name} of account {note.account}"
        _, most = self.findings.excess.get(name, (bucket, 0))
        self.findings.excess[name] = bucket, max(most, tokens)
        self._tell(f"{_spell(note)}: {tokens} too many from {name}")

    def _end(self, note: End) -> None:
        if note.kind == RELEASE:
            self._held_by(note).release(note.id)
        elif note.kind == RENEW:
            if not self._held_by(note).renew(note.first, note.id):
                self.findings.over_slots += 1
                self._tell(f"{_spell(note)}: a lease was renewed that was over")
        else:
            for bucket in FEATURES[note.feature].buckets:
                level = self._level(bucket, note.account)
                more_us = (note.actual - note.cost) * bucket.interval_us
                if more_us < 0:
                    level.give_back(note.first, -more_us)
                else:
                    clamp_us = 2 * bucket.capacity * bucket.interval_us
                    level.charge_more(note.first, more_us, clamp_us)

    def _excuse(self, note: End, event: _Event) -> None:
        if note.kind == RELEASE:
            self._held_by(note).release(note.id)
        elif note.kind == SETTLE and note.actual < note.cost:
            for bucket in FEATURES[note.feature].buckets:
                level = self._level(bucket, note.account)
                us = (note.cost - note.actual) * bucket.interval_us
                level.spare(event.excused * us)
                if event.excused < 0:
                    level.give_back(event.at, us)

    def _level(self, bucket: Bucket, account: int) -> Level:
        key = bucket.name, -1 if bucket.shared else account
        level = self.levels.get(key)
        if level is None:
            level = self.levels[key] = Level()
        return level

    def _held_by(self, note: Take | End) -> Held:
        return self._held.setdefault((note.feature, note.account), Held())

    def _tell(self, what: str) -> None:
        if len(self.findings.told) < _MOST_SHOWN:
            self.findings.told.append(what)


def _spell(note: Take | End) -> str:
    at = note.now if isinstance(note, Take) else note.first
    return f"at {at}, {FEATURES[note.feature].name} for account {note.account}"

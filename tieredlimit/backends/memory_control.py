"""Revisions, heartbeats and the label of a namespace in this process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary, WeakSet

from tieredlimit._core.revision import NOTHING, Revision
from tieredlimit.backends.memory import MemoryBackend
from tieredlimit.backends.revisions import (
    KEPT_REVISIONS,
    LISTED_REVISIONS,
    Published,
    check_label,
    check_succession,
    newer_of,
    repaired,
    same,
)
from tieredlimit.errors import BackendError, ConflictError

if TYPE_CHECKING:
    from tieredlimit.backends.heartbeat import Heartbeat


class Adopting(Protocol):
    """Who follows revisions."""

    def adopt(self, revision: Revision) -> None:
        """Follow this one, unless it is older."""
        ...


class MemoryControl:
    """Keep revisions in this process, beside the buckets of a backend and by its clock.

    All that are made for the same backend and namespace share them. Safe to use from several
    threads and event loops.

    Args:
        backend: Whose revisions these are.
        namespace: The same.
        shards: What `Published` says; all of them hear at once.
    """

    def __init__(self, backend: MemoryBackend, namespace: str, shards: int) -> None:
        self._backend = backend
        self._shards = shards
        with _lock:
            self._held = _held.setdefault(backend, {}).setdefault(namespace, _Held())

    def follow(self, follower: Adopting) -> None:
        """Have somebody adopt the head now, and every later one before its publisher goes on.

        So no decision has to ask. It is forgotten with whoever holds it.
        """
        with self._held.lock:
            self._held.followers.add(follower)
            head = self._held.head
        follower.adopt(head)

    async def head(self) -> Revision:
        """Return the revision in force; `NOTHING` if none was ever published."""
        return self._held.head

    async def revision(self, number: int) -> Revision | None:
        """Return one of the last 200 revisions; None if it is not kept."""
        with self._held.lock:
            return self._held.revisions.get(number)

    async def history(self, most: int = LISTED_REVISIONS) -> list[Revision]:
        """Return the latest revisions that are kept, newest first."""
        with self._held.lock:
            return list(reversed(self._held.revisions.values()))[: max(most, 1)]

    async def publish(self, revision: Revision, *, seen: Revision) -> Published:
        """Make a revision the head; as `ControlStore.publish`."""
        check_succession(revision, seen)
        revision.to_json()  # what one store takes the other does, too
        held = self._held
        with held.lock:
            if not same(held.head, revision):
                if not same(held.head, seen):
                    raise ConflictError(seen.number, held.head.number)
                held.put(revision)
        held.tell()
        return Published(revision, self._shards, 0)

    async def complete(self, revision: Revision) -> Published:
        """Do nothing but compare: all heard at once."""
        head = self._held.head
        if not same(head, revision):
            raise ConflictError(revision.number, head.number)
        return Published(revision, self._shards, 0)

    async def seed(self, revision: Revision) -> Revision:
        """Put back a revision that is newer than the head; return the head."""
        held = self._held
        with held.lock:
            if revision.number > held.head.number:
                held.put(revision)
        held.tell()
        return held.head

    async def repair(self, shard_number: int, revision: Revision) -> Revision:
        """Get above a number; as `ControlStore.repair`."""
        held = self._held
        with held.lock:
            if held.head.number < shard_number:
                newest = newer_of(held.head, revision)
                held.put(repaired(newest, shard_number, self._backend.now()))
        held.tell()
        return held.head

    async def beat(self, heartbeat: Heartbeat) -> None:
        """Note that a worker lives; as `ControlStore.beat`."""
        from tieredlimit.backends.heartbeat import MAX_WORKERS

        content = heartbeat.to_json()
        now = self._backend.now()
        held = self._held
        with held.lock:
            for other in [one for one, (at, _) in held.beats.items() if _silent(now - at)]:
                del held.beats[other]
            if heartbeat.id not in held.beats and len(held.beats) >= MAX_WORKERS:
                raise BackendError(f"{MAX_WORKERS:,} workers are noted already")
            held.beats[heartbeat.id] = now, content

    async def retire(self, worker: str) -> None:
        """Forget a worker that has ended; as `ControlStore.retire`."""
        with self._held.lock:
            self._held.beats.pop(worker, None)

    async def workers(self) -> list[Heartbeat]:
        """Return the latest heartbeats of the workers heard within the last 5 s, by id."""
        from tieredlimit.backends.heartbeat import Heartbeat

        now = self._backend.now()
        with self._held.lock:
            beats = sorted(self._held.beats.items())
        return [
            Heartbeat.from_json(content, age=max(now - at, 0) / 1e6)
            for _, (at, content) in beats
            if not _silent(now - at)
        ]

    async def watch(self, heard: Callable[[int], None]) -> None:
        """Tell the head's number now and whenever the head changes; runs until cancelled."""
        held = self._held
        news = asyncio.Event()
        watcher = asyncio.get_running_loop(), news
        with held.lock:
            held.watchers.add(watcher)
        told: Revision | None = None
        try:
            while True:
                news.clear()
                head = held.head
                if told is None or not same(told, head):
                    told = head
                    heard(head.number)
                await news.wait()
        finally:
            with held.lock:
                held.watchers.discard(watcher)

    async def label(self) -> str:
        """Return what the namespace is called; empty if nothing."""
        return self._held.label

    async def set_label(self, text: str) -> None:
        """Name the namespace; an empty text takes the label away."""
        check_label(text)
        self._held.label = text

    async def now(self) -> int:
        """Return the backend's clock."""
        return self._backend.now()

    async def close(self) -> None:
        """Do nothing: revisions outlive event loops."""


class _Held:
    """Hold what all that share a namespace know."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.head = NOTHING
        self.revisions: dict[int, Revision] = {}
        self.beats: dict[str, tuple[int, bytes]] = {}
        self.label = ""
        self.watchers: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()
        self.followers: WeakSet[Adopting] = WeakSet()
        _all.add(self)

    def put(self, revision: Revision) -> None:
        """Make a revision the head. Whoever calls has the lock."""
        self.revisions[revision.number] = self.head = revision
        while len(self.revisions) > KEPT_REVISIONS:
            del self.revisions[next(iter(self.revisions))]

    def tell(self) -> None:
        """Have all adopt the head, and wake the watchers of all event loops."""
        with self.lock:
            watchers, followers, head = list(self.watchers), list(self.followers), self.head
        for follower in followers:
            follower.adopt(head)
        for loop, news in watchers:
            try:
                loop.call_soon_threadsafe(news.set)
            except RuntimeError:  # an event loop that was closed under its watcher
                with self.lock:
                    self.watchers.discard((loop, news))


_lock = Lock()
_all: WeakSet[_Held] = WeakSet()
_held: WeakKeyDictionary[MemoryBackend, dict[str, _Held]] = WeakKeyDictionary()


def _silent(age_us: int) -> bool:
    from tieredlimit.backends.heartbeat import SILENCE_US

    # Also from the future: that is what a clock that was set back leaves behind.
    return abs(age_us) > SILENCE_US


def _after_fork() -> None:
    # Another thread may have held them, and is not there to let go. Nothing is changed by halves.
    global _lock
    _lock = Lock()
    for held in list(_all):
        held.lock = Lock()
        held.watchers = set()


os.register_at_fork(after_in_child=_after_fork)

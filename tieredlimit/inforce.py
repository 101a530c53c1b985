"""What is in force in this process: a policy, the overrides above it, and the table of both."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from tieredlimit._core.keys import IdSecret
from tieredlimit._core.override import Override
from tieredlimit._core.policy import Policy
from tieredlimit._core.ranking import Unknowns
from tieredlimit._core.revision import FORMAT, NOTHING, Revision
from tieredlimit._core.table import Table
from tieredlimit._core.tally import Samples, Tallies
from tieredlimit.backends import Backend, MemoryBackend
from tieredlimit.backends.backend import StaleError
from tieredlimit.backends.control import ControlStore, MemoryControl, control_store
from tieredlimit.backends.shared import is_over_redis
from tieredlimit.closures import Closures
from tieredlimit.complaints import Complaints
from tieredlimit.errors import BackendError, TieredLimitError, UsageError
from tieredlimit.follow import Follower
from tieredlimit.forking import anew_after_fork

if TYPE_CHECKING:
    from tieredlimit.backends.heartbeat import Heartbeat

__all__ = ["InForce", "Stored", "stored"]

# The most cells that a heartbeat tells of; the busiest come first.
_MOST_CELLS = 100
_FILE_INTERVAL = 0.5

_OVERRULED = "tieredlimit: the stored policy of revision %d is in force, and not the one given here"
_GIVEN_AGAIN = "tieredlimit: revision %d stores no policy, and the one given here is in force again"

_log = logging.getLogger("tieredlimit")


class Stored:
    """Stand for the policy that was pushed to the store; see `stored`."""

    __slots__ = ()


def stored() -> Stored:
    """Take the policy that an operator has pushed, instead of a file beside the code.

    A limiter that is given this has no policy until it was opened: opening fails where none was
    pushed, or the store cannot be reached.
    """
    return Stored()


class InForce:
    """Hold the table that decides, and follow the revisions that change it.

    Attributes:
        table: What decides; None until a stored policy was loaded.
        revision: What is followed: its number may be ahead of what could be read of it.
        store: Where revisions live; None where the backend has no such thing.
        unknowns: The plans and ages that billing did not say.
        followed: Whether this process follows what is in force, where there is anything to follow.
    """

    def __init__(
        self,
        policy: Policy | Stored,
        backend: Backend,
        namespace: str,
        shards: int,
        *,
        close: str | None,
        close_file: str | Path | None,
        secret: IdSecret | None = None,
        tallies: Tallies,
        samples: Samples,
        complaints: Complaints,
        changed: Callable[[Revision], None],
    ) -> None:
        self._given = policy if isinstance(policy, Policy) else None
        self._backend = backend
        self._namespace = namespace
        self._shards = shards
        self._secret = secret
        self._tallies = tallies
        self._samples = samples
        self._complaints = complaints
        self._changed = changed
        self._lock = RLock()
        self._followers: WeakKeyDictionary[asyncio.AbstractEventLoop, Follower] = (
            WeakKeyDictionary()
        )
        self._worker: tuple[int, str, int] | None = None
        self.unknowns: Unknowns = Unknowns()
        self.revision: Revision = NOTHING
        self._overrides: tuple[Override, ...] = ()
        self._ever: set[str] = set()
        self._closures = Closures(close, close_file, self._given, complaints)
        self.store: ControlStore | None = None
        if isinstance(backend, MemoryBackend) or is_over_redis(backend):
            self.store = control_store(backend, namespace, shards)
        elif self._given is None:
            raise UsageError(
                "a stored policy needs a MemoryBackend, RedisBackend or ClusterBackend, "
                f"got {type(backend).__name__}"
            )
        self.table: Table | None = None
        if self._given is not None:
            self.table = self._build(self._given, ())
            self._closures.check(self._given)
        in_memory = isinstance(self.store, MemoryControl)
        self._watched = self.store is not None and not (in_memory and self._closures.file is None)
        self.followed: bool = not self._watched and self.table is not None
        if isinstance(self.store, MemoryControl):
            self.store.follow(self)
        if is_over_redis(backend):
            backend.entered.append(self._entered)
            backend.leaving.append(self.close)
        self._left = False
        anew_after_fork(self)

    def leave_to_parent(self) -> None:
        """In the child of a fork wait for no thread of the parent, and follow anew."""
        self._lock = RLock()
        self.followed = not self._watched

    def table_at(self, now: int) -> Table:
        """Return the table that is for this instant.

        Raises:
            BackendError: No policy was loaded yet.
        """
        table = self.table
        if table is None:
            raise BackendError("the stored policy was not loaded yet")
        if not table.holds(now):
            with self._lock:
                # Another thread may have adopted a revision meanwhile, or done the same.
                latest = self.table or table
                if not latest.holds(now):
                    latest = self._build(latest.policy, self._overrides, self.revision, now)
                    self.table = latest
                table = latest
        return table

    def standing(self) -> Revision:
        """Return the revision that is followed."""
        return self.revision

    def dropped(self, feature: object) -> bool:
        """Say whether an earlier policy of this process had a feature that this one has not."""
        table = self.table
        if table is None or not isinstance(feature, str):  # of a request's body it may be anything
            return False
        return feature in self._ever and feature not in table.policy.features

    def adopt(self, revision: Revision) -> None:
        """Follow a revision, unless it is older; what cannot be read changes nothing."""
        with self._lock:
            followed = self.revision
            if revision.number < followed.number or (
                (revision.number, revision.digest) == (followed.number, followed.digest)
            ):
                return
            try:
                policy = self._given
                if revision.base is not None:
                    policy = Policy.from_dict(revision.base)
                if policy is None:
                    raise UsageError(f"revision {revision.number} has no stored policy")
                table = self._build(policy, revision.overrides, revision)
            except TieredLimitError as exc:
                kept = "what was in force stays"
                self._complaints.log(f"revision {revision.number} cannot be used: {kept}", exc)
                if self.table is None:
                    return
                # Under the new number: it was published, and there is nothing else to decide by.
                table = self._rest_of(revision, self.table.policy)
            else:
                self._overrides = revision.overrides
            if self._given is not None and (revision.base is None) != (followed.base is None):
                told = _GIVEN_AGAIN if revision.base is None else _OVERRULED
                _log.warning(told, revision.number)
            self.revision, self.table = revision, table
            self._closures.check(table.policy)
            self._tallies.mark()
        self._changed(revision)

    async def compare(self) -> None:
        """Learn the store's time, even where every request is denied without asking it."""
        backend, table = self._backend, self.table
        if table is not None and is_over_redis(backend):
            # Whoever needs an answer says that there is none.
            with suppress(BackendError):
                try:
                    await backend.take((), table.stamp(0))
                except StaleError as exc:
                    if exc.why != "time":
                        await self.catch_up(exc)

    def complain(self, what: str, error: Exception) -> None:
        """Log what went wrong."""
        self._complaints.log(what, error)

    def heartbeat(self) -> Heartbeat:
        """Return what to tell others of this process."""
        worker = self._worker
        if worker is None or worker[0] != os.getpid():
            host = socket.gethostname()[:32] or "host"
            name = "".join(c if c.isalnum() or c in "._-" else "-" for c in host)
            name = name.encode("ascii", "replace").decode().replace("?", "-")
            worker = (
                os.getpid(),
                f"{name}-{os.getpid()}-{secrets.token_hex(3)}",
                self._backend.now(),
            )
            self._worker = worker
        pid, name, started_us = worker
        counters = {
            "cells": self._tallies.snapshot(_MOST_CELLS),
            "since": self._tallies.since(_MOST_CELLS),
            "denied": self._samples.snapshot(),
        }
        from tieredlimit.backends.heartbeat import Heartbeat

        return Heartbeat(
            id=name,
            host=socket.gethostname(),
            pid=pid,
            version=_version(),
            format=FORMAT,
            revision=self.revision.number,
            digest=self.revision.digest,
            started_us=started_us,
            counters=counters,
        )

    def follow(self) -> None:
        """Watch the store from this event loop, if that is not done already."""
        self.followed, self._left = True, False
        if self.store is None or not self._watched:
            return
        loop = asyncio.get_running_loop()
        with self._lock:
            if loop in self._followers:
                return
            # A follower's tasks hold its event loop, which would stay for ever.
            for ended in [other for other in self._followers if other.is_closed()]:
                del self._followers[ended]
            follower = self._followers[loop] = Follower(self, self.store)
        follower.start(self._watch_file() if self._closures.file is not None else None)

    def _entered(self) -> None:
        """Follow from an event loop in which the backend is asked, unless this was closed.

        Others may share the backend, and go on asking it.
        """
        if not self._left:
            self.follow()

    async def open(self) -> None:
        """Follow, and load what is in force now.

        Raises:
            BackendError: A stored policy could not be loaded. Where there is another, the failure
                is only logged.
        """
        if self.store is None:
            return
        self.follow()
        try:
            if not isinstance(self.store, MemoryControl):
                await self._followers[asyncio.get_running_loop()].refresh()
        except BackendError as exc:
            if self.table is None:
                raise
            self._complaints.log("the revision in force could not be loaded", exc)
        if self.table is None:
            raise BackendError(
                f'no policy is stored in the namespace "{self._namespace}"; push one: '
                "tieredlimit policy push policy.toml"
            )

    async def catch_up(self, stale: StaleError) -> None:
        """Load what is in force, after a shard has said that it is something else.

        Raises:
            BackendError: It cannot be loaded.
        """
        if stale.why == "newer" and stale.number <= self.revision.number:
            return  # somebody else has, meanwhile
        self.follow()
        follower = self._followers[asyncio.get_running_loop()]
        await follower.refresh(stale.number, other=stale.why == "other")

    async def close(self) -> None:
        """Stop following from this event loop."""
        with self._lock:
            follower = self._followers.pop(asyncio.get_running_loop(), None)
            self._left = not self._followers
            self.followed = not self._watched or not self._left
        if follower is not None:
            await follower.stop()
        elif self.store is not None:
            await self.store.close()  # whoever changed something here has used it

    def _rest_of(self, revision: Revision, policy: Policy) -> Table:
        """Return what can be had of a revision that is broken: its overrides, if not the policy."""
        try:
            table = self._build(policy, revision.overrides, revision)
        except TieredLimitError:
            return self._build(policy, self._overrides, revision)
        self._overrides = revision.overrides
        return table

    def _build(
        self,
        policy: Policy,
        overrides: Sequence[Override],
        revision: Revision = NOTHING,
        now: int | None = None,
    ) -> Table:
        table = Table(
            policy,
            self._namespace,
            self._shards,
            overrides=(*overrides, *self._closures.all()),
            standing=(revision.number, revision.digest),
            now=self._backend.now() if now is None else now,
            tallies=self._tallies,
            unknowns=self.unknowns,
            secret=self._secret,
        )
        self._ever.update(policy.features)
        return table

    async def _watch_file(self) -> None:
        while True:
            await asyncio.sleep(_FILE_INTERVAL)
            self._read_file()

    def _read_file(self) -> None:
        """Take in the closures that a local file names, if it has changed."""
        if not self._closures.look():
            return
        with self._lock:
            if self.table is not None:
                self.table = self._build(self.table.policy, self._overrides, self.revision)
                self._closures.check(self.table.policy)
        self._changed(self.revision)


@cache
def _version() -> str:
    return version("tieredlimit")

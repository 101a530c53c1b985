"""Keeping one event loop on the newest revision, and telling others that this process lives."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from tieredlimit._core.override import MAX_TEXT
from tieredlimit._core.revision import Revision
from tieredlimit.backends.control import ControlStore
from tieredlimit.errors import BackendError, ConflictError, TieredLimitError

if TYPE_CHECKING:
    from tieredlimit.backends.heartbeat import Heartbeat

__all__ = ["Follower", "Leader", "sound_head"]

BEAT_INTERVAL = 1.0
"""Seconds between two heartbeats."""
LOAD_TIMEOUT = 0.5
"""Seconds from the begin of a load for which anybody waits for it."""
# Seconds that others have to put back what a shard has heard of, before it is given up as lost.
_LOST_AFTER = 2.0
_GIVEN_UP_AFTER = 30.0
# Seconds, from and to, after which whoever has seen a new revision makes sure that all shards have.
_COMPLETE_AFTER = (0.5, 1.5)


class Leader(Protocol):
    """What a follower keeps up to date."""

    def standing(self) -> Revision:
        """Return the revision that is followed now."""
        ...

    def adopt(self, revision: Revision) -> None:
        """Follow this one, unless it is older."""
        ...

    def heartbeat(self) -> Heartbeat:
        """Return what to tell of this process."""
        ...

    async def compare(self) -> None:
        """Ask the store whether it follows the same, and so for the time."""
        ...

    def complain(self, what: str, error: Exception) -> None:
        """Say what went wrong."""
        ...


class Follower:
    """Watch the head for one event loop, load what is new, and beat.

    Args:
        leader: Is told what is new.
        store: Where revisions live; closed with the follower.
    """

    def __init__(self, leader: Leader, store: ControlStore) -> None:
        self._leader = leader
        self._store = store
        self._loading: asyncio.Task[None] | None = None
        self._began = 0.0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._lost: int | None = None
        self._completing = False
        self._behind = False
        self._catching = False

    def start(self, beside: Coroutine[Any, Any, None] | None = None) -> None:
        """Watch and beat from now on, in the running event loop; `beside` runs as long."""
        self._spawn(self._store.watch(self._hear))
        self._spawn(self._beat())
        if beside is not None:
            self._spawn(beside)

    async def stop(self) -> None:
        """Stop, and close the store's connections."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            # Else an operator would wait for it, and be told that it does not follow.
            async with asyncio.timeout(LOAD_TIMEOUT):
                await self._store.retire(self._leader.heartbeat().id)
        except (TieredLimitError, TimeoutError):
            pass  # it falls silent, and is forgotten all the same
        await self._store.close()

    async def refresh(self, number: int = 0, *, other: bool = False) -> None:
        """Load the head; whoever comes while that is under way waits for the same.

        Nobody waits for what has taken too long already: it goes on, and helps who comes later.

        `number` is what a shard is on: where no head comes that far, what it heard of is lost, and
        what is followed here is published anew above it, in a while. With `other` the shard has
        another revision of that number: where it is not the head's, the head's is put there.

        Raises:
            BackendError: It cannot be loaded.
        """
        loading, loop = self._loading, asyncio.get_running_loop()
        if loading is None or loading.done():
            loading, self._began = loop.create_task(self._load()), loop.time()
            self._loading = loading
            self._keep(loading)
        try:
            async with asyncio.timeout_at(self._began + LOAD_TIMEOUT):
                await asyncio.shield(loading)
        except TimeoutError as exc:
            raise BackendError(f"the head was not loaded within {LOAD_TIMEOUT:g} s") from exc
        standing = self._leader.standing()
        if self._lost is None and number > standing.number:
            self._lost = number
            self._spawn(self._find(number))
        elif other and number == standing.number and not self._completing:
            self._completing = True
            self._spawn(self._complete(standing))

    async def _load(self) -> None:
        head = await sound_head(self._store, self._leader.standing)
        standing = self._leader.standing()
        if (head.number, head.digest) != (standing.number, standing.digest):
            self._leader.adopt(head)

    def _hear(self, number: int) -> None:
        standing = self._leader.standing().number
        if number or standing:
            self._behind = True
            if not self._catching:
                self._catching = True
                self._spawn(self._catch_up())

    async def _catch_up(self) -> None:
        """Load what was heard of, until that has worked: nobody tells twice."""
        try:
            while self._behind:
                self._behind = False
                before = self._leader.standing().number
                try:
                    await self.refresh()
                except TieredLimitError as exc:
                    self._leader.complain("a revision was published, and cannot be loaded", exc)
                    self._behind = True
                    await asyncio.sleep(BEAT_INTERVAL)
                    continue
                if self._leader.standing().number > before:
                    self._spawn(self._see_through(self._leader.standing()))
        finally:
            self._catching = False

    async def _see_through(self, standing: Revision) -> None:
        """Tell an operator who waits, and make sure that all shards have heard."""
        try:
            await self._store.beat(self._leader.heartbeat())
            await asyncio.sleep(random.uniform(*_COMPLETE_AFTER))  # noqa: S311 -- to spread
            await self._store.complete(standing)
        except ConflictError:
            pass  # there is a newer one, which somebody else completes
        except TieredLimitError as exc:
            self._leader.complain(f"not all shards obey revision {standing.number}", exc)

    async def _find(self, number: int) -> None:
        try:
            # Who follows nothing has nothing to put there, but for others to lose.
            await asyncio.sleep(_LOST_AFTER if self._leader.standing().number else _GIVEN_UP_AFTER)
            if self._leader.standing().number < number:
                await self.refresh()
            standing = self._leader.standing()
            if standing.number < number:
                self._leader.adopt(await self._store.repair(number, standing))
        except TieredLimitError as exc:
            self._leader.complain(f"revision {number} is lost, and cannot be replaced", exc)
        finally:
            self._lost = None

    async def _complete(self, standing: Revision) -> None:
        try:
            await self._store.complete(standing)
        except ConflictError:
            pass  # there is a newer one, which somebody else completes
        except TieredLimitError as exc:
            self._leader.complain(f"not all shards obey revision {standing.number}", exc)
        finally:
            self._completing = False

    async def _beat(self) -> None:
        try:
            while True:
                try:
                    await self._store.beat(self._leader.heartbeat())
                except TieredLimitError as exc:
                    self._leader.complain("this process could not say that it lives", exc)
                await self._leader.compare()
                await asyncio.sleep(BEAT_INTERVAL)
        finally:
            # Also where an event loop ends that nobody closed the limiter in.
            await self._store.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._keep(asyncio.get_running_loop().create_task(work))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits for it has it


async def sound_head(store: ControlStore, followed: Callable[[], Revision]) -> Revision:
    """Return the head; where the store has lost what is followed, put that back first.

    Raises:
        BackendError: The store cannot be asked, or nobody knows whether it was put back.
    """
    head = await store.head()
    standing = followed()
    if not head.number < standing.number:
        return head
    if head.number == 0 or head.made_us <= standing.made_us:
        return await store.seed(standing)  # emptied, or lost by a failover
    # Published on an emptied store, before anybody had put back what stood: it is newer.
    change = f"revision {head.number}, over what Redis had lost: {head.change}"
    again = replace(head, number=standing.number + 1, change=change[:MAX_TEXT])
    try:
        return (await store.publish(again, seen=head)).revision
    except ConflictError:
        return await store.head()  # another worker was first

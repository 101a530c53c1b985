"""Leases: slots that a take holds until its job is done, renewed meanwhile by any process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self
from weakref import WeakKeyDictionary

from tieredlimit._core.rate import SECOND_US
from tieredlimit._core.taken import Taken
from tieredlimit.backends.holds import Hold, Holds
from tieredlimit.complaints import Complaints
from tieredlimit.errors import BackendError, UsageError

__all__ = ["Lease", "Leases"]

MOST_ABANDONED = 10_000
"""The most leases whose release is tried again and again; beyond, the oldest end by themselves."""

# How many times a lease is renewed in its time; and how soon again where that went wrong.
_RENEWALS = 3
_SOONER = 4
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
# A take that was given up may still reach Redis, over a connection that broke: this much later.
_STRAGGLING = 1.0
# How many of these are tried at once: a store that is down is not asked for all of them.
_TOGETHER = 128


class Lease:
    """Hold one slot of each concurrency limit that a take has passed.

    It is free at the end of its time, unless it is renewed. `async with lease:` renews it three
    times in that time for as long as the block runs, and releases it at its end. The middleware
    does the same for as long as a response runs.

    Attributes:
        lost: True once the store has said, or so much time has passed without a word of it, that
            the slot is not held any more. The job may be over the limit.
    """

    __slots__ = (
        *("_held_until", "_kept", "_leases", "_over", "_since", "_timer", "_work"),
        *("lost", "taken"),
    )

    def __init__(self, leases: Leases, taken: Taken, *, since: float | None = None) -> None:
        self._leases = leases
        self.taken = taken
        self.lost: bool = False
        self._over = False
        self._kept = False
        self._timer: asyncio.TimerHandle | None = None
        self._work: asyncio.Task[None] | None = None
        # Of a token nobody knows how much of its time is left.
        self._since = since
        self._held_until = (time.monotonic() if since is None else since) + self.seconds

    @property
    def seconds(self) -> float:
        """How long it is held unless it is renewed: the shortest of its slots' leases."""
        return min(lease_us for _, lease_us in self.taken.slots) / SECOND_US

    @property
    def token(self) -> str:
        """What `limiter.leases` of another process knows it by, and `limiter.settle`."""
        return self.taken.token()

    @property
    def over(self) -> bool:
        """Whether it was released or detached here."""
        return self._over

    def detach(self) -> str:
        """Leave it to somebody else: neither renew nor release it here; return its token.

        It is held for what is left of its time: who takes over renews it before.
        """
        self._stop()
        return self.token

    async def renew(self) -> bool:
        """Hold it for its whole time again; False if it is not held any more.

        Raises:
            BackendError: The store could not answer; it may or may not be renewed.
        """
        asked_at = time.monotonic()
        held = await self._leases.holds.renew(hold_of(self.taken))
        if held:
            self._held_until = asked_at + self.seconds
        else:
            self.lost = True
        return held

    async def release(self) -> bool:
        """Free it; harmless when repeated. False if it was not held any more.

        Raises:
            BackendError: The store could not answer. It is tried again in the background.
        """
        self._stop()
        try:
            return await self._leases.holds.release(hold_of(self.taken))
        except BaseException:
            self._leases.abandon(self.taken)
            raise

    def keep(self) -> None:
        """Renew it from now on, until it is released, detached or lost."""
        if not self._over and not self._kept:
            self._kept = True
            due = 0.0
            if self._since is not None:
                due = self._since + self.seconds / _RENEWALS - time.monotonic()
            self._renew_in(max(due, 0.0))

    async def __aenter__(self) -> Self:
        if self._since is not None or self._kept or self._over:
            self.keep()
        else:
            # Whoever takes over knows from the start whether it is lost.
            self._kept = True
            await self._renew()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._over:
            # Whoever takes next finds the slot free; a store that is down keeps nobody waiting.
            await asyncio.wait([self._leases.release_soon(self)], timeout=self._leases.patience)

    def _stop(self) -> None:
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _renew_in(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(seconds, self._start)

    def _start(self) -> None:
        # Referred to, or the garbage collector may take it.
        self._work = asyncio.get_running_loop().create_task(self._renew())

    async def _renew(self) -> None:
        pause = self.seconds / _RENEWALS
        try:
            await self.renew()
        except BackendError as exc:
            self.lost = self.lost or time.monotonic() > self._held_until
            self._leases.complaints.log("a lease could not be renewed; trying again", exc)
            pause /= _SOONER
        self._work = None
        if self._over:
            return
        if self.lost:
            # Not over: one of its slots is lost, and others may be held until the job's end.
            told = BackendError("its time was over before it was renewed, or the store was emptied")
            self._leases.complaints.log("a lease was lost: its job may be over the limit", told)
        else:
            self._renew_in(pause)


class Leases:
    """Renew and release leases by their tokens, from any process of the namespace.

    Args:
        holds: Where they are held; None where the backend has no such thing.
        namespace: The limiter's.
        complaints: Where trouble is logged.
        patience: Seconds to wait for a release that nobody needs to hear of.
    """

    def __init__(
        self, holds: Holds | None, namespace: str, complaints: Complaints, patience: float
    ) -> None:
        self._holds = holds
        self._namespace = namespace
        self.complaints = complaints
        self.patience = patience
        self._abandoned: WeakKeyDictionary[asyncio.AbstractEventLoop, _Abandoned] = (
            WeakKeyDictionary()
        )

    @property
    def holds(self) -> Holds:
        """What renews and releases.

        Raises:
            UsageError: The backend is one of your own.
        """
        if self._holds is None:
            raise UsageError("leases and reservations need one of our backends")
        return self._holds

    def ask_at(self, holds: Holds | None) -> None:
        """Renew and release there from now on."""
        self._holds = holds

    def hold(self, token: str) -> Lease:
        """Return the lease of a token, to be kept: `async with limiter.leases.hold(token):`.

        Raises:
            UsageError: It is no token of this namespace, or no slot is held by it.
        """
        taken = Taken.read(token, self._namespace)
        if not taken.slots:
            raise UsageError(f"the token {token!r:.40} is of a take that holds no slot")
        return Lease(self, taken, since=None)

    async def renew(self, token: str) -> bool:
        """Hold a lease for its whole time again; False if it is not held any more.

        Raises:
            UsageError: It is no token of this namespace, or no slot is held by it.
            BackendError: The store could not answer; it may or may not be renewed.
        """
        return await self.hold(token).renew()

    async def release(self, token: str) -> bool:
        """Free a lease; harmless when repeated. False if it was not held any more.

        Raises:
            UsageError: It is no token of this namespace, or no slot is held by it.
            BackendError: The store could not answer. It is tried again in the background.
        """
        return await self.hold(token).release()

    def release_soon(self, lease: Lease) -> asyncio.Task[bool]:
        """Free a lease without waiting; what goes wrong is tried again."""
        releasing = asyncio.get_running_loop().create_task(lease.release())
        self._here().releasing.add(releasing)
        releasing.add_done_callback(self._released)
        return releasing

    def abandon(self, taken: Taken) -> None:
        """Release what may or may not be held, as soon as the store can be asked."""
        if taken.slots:
            self._here().add(taken)

    async def close(self) -> None:
        """Wait for what is being released in this event loop; what is kept goes on."""
        abandoned = self._abandoned.pop(asyncio.get_running_loop(), None)
        if abandoned is not None:
            await abandoned.end()
        if self._holds is not None:
            await self._holds.close()

    def _here(self) -> _Abandoned:
        loop = asyncio.get_running_loop()
        here = self._abandoned.get(loop)
        if here is None:
            here = self._abandoned[loop] = _Abandoned(self)
        return here

    def _released(self, releasing: asyncio.Task[bool]) -> None:
        here = self._abandoned.get(releasing.get_loop())
        if here is not None:
            here.releasing.discard(releasing)
        if not releasing.cancelled():
            releasing.exception()  # it was abandoned, which is all that can be done


class _Abandoned:
    """Release what nobody waits for, again and again, in one event loop."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        # By id: the lease, the instant at which it is over, and when it was first said to be free.
        self._left: dict[bytes, tuple[Taken, float, float | None]] = {}
        self._task: asyncio.Task[None] | None = None
        self.releasing: set[asyncio.Task[bool]] = set()

    def add(self, taken: Taken) -> None:
        """Take care of one more."""
        if len(self._left) >= MOST_ABANDONED:
            # The oldest: most of its time is over.
            del self._left[next(iter(self._left))]
        longest = max(lease_us for _, lease_us in taken.slots) / SECOND_US
        self._left[taken.id] = taken, time.monotonic() + longest, None
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def end(self) -> None:
        """Try once more, and give up."""
        if self.releasing:
            await asyncio.wait(self.releasing)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._left:
            await self._release_all()

    async def _work(self) -> None:
        pause = _FIRST_PAUSE
        try:
            while self._left:
                await self._release_all()
                if self._left:
                    await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        finally:
            self._task = None

    async def _release_all(self) -> None:
        """Try each once, some at a time, as long as the store says anything."""
        ids = list(self._left)
        for first in range(0, len(ids), _TOGETHER):
            if not await self._release_some(ids[first : first + _TOGETHER]):
                break

    async def _release_some(self, ids: Sequence[bytes]) -> bool:
        """Try these; say whether the store has answered at all."""
        some = [self._left[id_] for id_ in ids if id_ in self._left]
        freed = await asyncio.gather(
            *(self._leases.holds.release(hold_of(taken)) for taken, _, _ in some),
            return_exceptions=True,
        )
        now = time.monotonic()
        for (taken, over_at, free_since), said in zip(some, freed, strict=True):
            if said is False and free_since is None:
                free_since = now
            straggling = free_since is None or now - free_since < _STRAGGLING
            # What is left goes to the end: others have their turn before it is tried again.
            self._left.pop(taken.id, None)
            if said is not True and now < over_at and straggling:
                self._left[taken.id] = taken, over_at, free_since
        return any(type(said) is bool for said in freed)


def hold_of(taken: Taken) -> Hold:
    """Return what the store knows a lease by."""
    return Hold(taken.id, taken.slots)

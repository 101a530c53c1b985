"""Looked-up accounts, remembered for a moment: a database is asked once, not at every request."""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from itertools import chain
from threading import RLock
from typing import Generic, TypeVar

from starlette.requests import HTTPConnection

from tieredlimit._core.account import Account
from tieredlimit._core.kept import Kept
from tieredlimit.errors import BackendError, UsageError
from tieredlimit.forking import anew_after_fork

__all__ = ["Remembered", "remember"]

K = TypeVar("K", bound=Hashable)

_LONGEST = 86_400.0
_MOST = 1_000_000
_MISSING_SECONDS = 5.0


def remember(
    lookup: Callable[[K], Account | Awaitable[Account | None] | None],
    seconds: float = 30.0,
    *,
    missing_seconds: float | None = None,
    most: int = 10_000,
    patience: float | None = 10.0,
    clock: Callable[[], float] = time.monotonic,
) -> Remembered[K]:
    """Ask a lookup once in so many seconds for each key, as in `api_key(remember(lookup))`.

    Overrides and the policy are not affected: they decide anew at every request. What billing
    says is: a change of plan shows after at most `seconds`, counted from when the lookup was asked,
    or at once after `forget(key)`.

    Args:
        lookup: From a key (an API key, a user's id) to its account or None, sync or async. While
            it is asked for a key, others of the same event loop that want the same wait for that
            answer; when the last of them has left, it is cancelled. What it raises is raised, and
            not remembered.
        seconds: How long an account is remembered, more than 0 and at most 86,400.
        missing_seconds: How long it is remembered that there is none, from 0 (not at all) to
            `seconds`; None is 5 seconds, or `seconds` if that is less.
        most: The most accounts remembered, 1 to 1,000,000; the one least recently asked for makes
            room. As many keys without an account are kept apart, so that strangers who try keys
            cannot crowd out accounts. While so many keys are asked for in an event loop, others
            are neither shared nor remembered.
        patience: Seconds that those who wait for an async lookup wait at most, more than 0 and at
            most 86,400, counted from when it was asked. Then they get a `BackendError`, which the
            middleware takes for "cannot tell", and who comes next asks anew. None is no limit.
        clock: Returns seconds that never step back; for tests.

    Raises:
        UsageError: An argument is out of bounds.
    """
    if not _is_number(seconds) or not 0 < seconds <= _LONGEST:
        raise UsageError(f"seconds must be more than 0, at most {_LONGEST:,.0f}, got {seconds!r}")
    if missing_seconds is None:
        missing_seconds = min(seconds, _MISSING_SECONDS)
    if not _is_number(missing_seconds) or not 0 <= missing_seconds <= seconds:
        raise UsageError(
            f"missing_seconds must be from 0 to seconds ({seconds:g}), got {missing_seconds!r:.80}"
        )
    if type(most) is not int or not 1 <= most <= _MOST:
        raise UsageError(f"most must be from 1 to {_MOST:,}, got {most!r:.80}")
    if patience is not None and not (_is_number(patience) and 0 < patience <= _LONGEST):
        told = f"patience must be more than 0, at most {_LONGEST:,.0f}, or None"
        raise UsageError(f"{told}, got {patience!r:.80}")
    if not callable(lookup):
        raise UsageError(f"remember takes a lookup, got {lookup!r:.80}")
    return Remembered(lookup, seconds, missing_seconds, most, patience, clock)


class Remembered(Generic[K]):
    """Answer as a lookup did a moment ago; what `remember` makes.

    Called as the lookup is: it answers at once with what it remembers, and else as the lookup does.
    It may be used from several threads and event loops; the child of a fork begins with nothing.
    """

    def __init__(
        self,
        lookup: Callable[[K], Account | Awaitable[Account | None] | None],
        seconds: float,
        missing_seconds: float,
        most: int,
        patience: float | None,
        clock: Callable[[], float],
    ) -> None:
        self._lookup = lookup
        self._seconds = seconds
        self._missing_seconds = missing_seconds
        self._most = most
        self._patience = patience
        self._clock = clock
        self._left_to_parent: list[object] = []
        self._begin()
        anew_after_fork(self)

    def _begin(self) -> None:
        # The garbage collector may end what waited for a lookup while this very thread holds it.
        self._lock = RLock()
        self._accounts: Kept[K, Account] = Kept(self._most)
        self._missing: Kept[K, None] = Kept(self._most)
        self._underway: dict[asyncio.AbstractEventLoop | None, dict[K, list[_Asking]]] = {}

    def leave_to_parent(self) -> None:
        """Remember nothing yet in the child of a fork, and wait for nothing of the parent's."""
        self._left_to_parent.append(self._underway)
        self._begin()

    def __len__(self) -> int:
        """Return how many keys are remembered, those whose time is over included."""
        return len(self._accounts) + len(self._missing)

    def __call__(self, key: K) -> Account | Awaitable[Account | None] | None:
        """Return the account of a key, None where there is none, or what leads to either.

        Raises:
            UsageError: The key is a whole connection, which never comes a second time.
        """
        if isinstance(key, HTTPConnection):
            raise UsageError("remember goes around a lookup, not an identify: api_key(remember(…))")
        loop = _running_loop()
        with self._lock:
            now = self._clock()
            found = self._accounts.get(key, now) or self._missing.get(key, now)
            if found is not None:
                return found[0]
            underway = self._underway_in(loop)
            others = underway.get(key, ())
            for one in others:
                if one.answer is not None and not one.is_late():
                    return self._join(key, one, one.answer)
            asking = _Asking(loop, now, self._patience)
            if others or len(underway) < self._most:
                underway.setdefault(key, []).append(asking)
            else:
                asking.counts = False
        try:
            answer = self._lookup(key)
        except BaseException:
            self._end(key, asking)
            raise
        if not inspect.isawaitable(answer):
            self._keep(key, asking, answer)
            return answer
        if loop is None:
            self._end(key, asking)
            return answer  # to be awaited on a loop that is not known yet
        asking.answer = asyncio.ensure_future(answer)
        asking.answer.add_done_callback(partial(self._answered, key, asking))
        return self._join(key, asking, asking.answer)

    def forget(self, key: K) -> None:
        """Ask anew from now on, as after a change of plan; what is being asked does not count."""
        with self._lock:
            self._accounts.drop(key)
            self._missing.drop(key)
            for loop, underway in list(self._underway.items()):
                for one in underway.pop(key, ()):
                    one.counts = False
                if not underway:
                    del self._underway[loop]

    def clear(self) -> None:
        """Forget every key."""
        with self._lock:
            self._accounts.clear()
            self._missing.clear()
            for underway in self._underway.values():
                for one in chain.from_iterable(underway.values()):
                    one.counts = False
            self._underway.clear()

    def _underway_in(self, loop: asyncio.AbstractEventLoop | None) -> dict[K, list[_Asking]]:
        """Return what is being asked in an event loop."""
        underway = self._underway.get(loop)
        if underway is None:
            # What waits on a loop that is gone is never answered.
            for gone in [one for one in self._underway if one is not None and one.is_closed()]:
                del self._underway[gone]
            underway = self._underway[loop] = {}
        return underway

    async def _join(
        self, key: K, asking: _Asking, shared: asyncio.Future[Account | None]
    ) -> Account | None:
        """Wait for an answer together with others; the last who leaves before it takes it away."""
        if asking.left:
            # All the others were gone before this one began to wait.
            answer = self(key)
            return await answer if inspect.isawaitable(answer) else answer
        asking.waiting += 1
        try:
            done, _ = await asyncio.wait((shared,), timeout=asking.seconds_left())
        finally:
            asking.waiting -= 1
            if not asking.waiting and not shared.done():
                asking.left = True
                self._end(key, asking)
                if not shared.get_loop().is_closed():
                    shared.cancel()
        if not done:
            told = f"the lookup of an account did not answer within {self._patience:g} s"
            raise BackendError(told)
        return shared.result()

    def _answered(self, key: K, asking: _Asking, done: asyncio.Future[Account | None]) -> None:
        # Whoever waits is told of a failure; where nobody does any more, nobody has to be.
        if done.cancelled() or done.exception() is not None:
            self._end(key, asking)
        else:
            self._keep(key, asking, done.result())

    def _keep(self, key: K, asking: _Asking, account: object) -> None:
        """Remember an answer, unless it was forgotten before it came, or is none."""
        with self._lock:
            if asking.counts:
                # Since it was asked: what came later may not be in it.
                if isinstance(account, Account):
                    self._missing.drop(key)
                    self._accounts.put(key, account, asking.at + self._seconds)
                elif account is None and self._missing_seconds:
                    self._accounts.drop(key)
                    self._missing.put(key, None, asking.at + self._missing_seconds)
        self._end(key, asking)

    def _end(self, key: K, asking: _Asking) -> None:
        with self._lock:
            underway = self._underway.get(asking.loop, {})
            others = underway.get(key)
            if others is not None:
                others[:] = [one for one in others if one is not asking]
                if not others:
                    del underway[key]
            if not underway:
                self._underway.pop(asking.loop, None)


class _Asking:
    """Stand for one question to a lookup, from `at` on; `counts` unless it was forgotten since.

    `until` is the instant of the event loop's clock until which somebody waits, None for ever;
    `left` says that the last who waited has left.
    """

    __slots__ = ("answer", "at", "counts", "left", "loop", "until", "waiting")

    def __init__(
        self, loop: asyncio.AbstractEventLoop | None, at: float, patience: float | None
    ) -> None:
        self.loop = loop
        self.at = at
        self.until = None if loop is None or patience is None else loop.time() + patience
        self.counts = True
        self.left = False
        self.waiting = 0
        self.answer: asyncio.Future[Account | None] | None = None

    def seconds_left(self) -> float | None:
        """Return for how long somebody waits for it, None for ever."""
        if self.loop is None or self.until is None:
            return None
        return max(0.0, self.until - self.loop.time())

    def is_late(self) -> bool:
        """Return whether nobody waits for it any more."""
        return self.seconds_left() == 0


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)

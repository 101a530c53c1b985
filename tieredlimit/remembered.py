"""Looked-up accounts, remembered for a moment: a database is asked once, not at every request."""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Awaitable, Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

from starlette.requests import HTTPConnection

from tieredlimit._core.account import Account
from tieredlimit._core.kept import Kept
from tieredlimit.errors import UsageError

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
    clock: Callable[[], float] = time.monotonic,
) -> Remembered[K]:
    """Ask a lookup once in so many seconds for each key, as in `api_key(remember(lookup))`.

    Overrides and the policy are not affected: they decide anew at every request. What billing
    says is: a change of plan shows after at most `seconds`, counted from when the lookup was asked,
    or at once after `forget(key)`.

    Args:
        lookup: From a key (an API key, a user's id) to its account or None, sync or async. While
            it is asked for a key, others of the same event loop that want the same wait for that
            answer. What it raises is raised, and not remembered.
        seconds: How long an account is remembered, more than 0 and at most 86,400.
        missing_seconds: How long it is remembered that there is none, from 0 (not at all) to
            `seconds`; None is 5 seconds, or `seconds` if that is less.
        most: The most accounts remembered, 1 to 1,000,000; the one least recently asked for makes
            room. As many keys without an account are kept apart, so that strangers who try keys
            cannot crowd out accounts.
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
    if not callable(lookup):
        raise UsageError(f"remember takes a lookup, got {lookup!r:.80}")
    return Remembered(lookup, seconds, missing_seconds, most, clock)


class Remembered(Generic[K]):
    """Answer as a lookup did a moment ago; what `remember` makes.

    Called as the lookup is: it answers at once with what it remembers, and else as the lookup does.
    It may be used from several threads and event loops.
    """

    def __init__(
        self,
        lookup: Callable[[K], Account | Awaitable[Account | None] | None],
        seconds: float,
        missing_seconds: float,
        most: int,
        clock: Callable[[], float],
    ) -> None:
        self._lookup = lookup
        self._seconds = seconds
        self._missing_seconds = missing_seconds
        self._clock = clock
        self._lock = Lock()
        self._accounts: Kept[K, Account] = Kept(most)
        self._missing: Kept[K, None] = Kept(most)
        self._underway: dict[K, list[_Asking]] = {}

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
            others = self._underway.setdefault(key, [])
            # What waits on a loop that is gone is never answered.
            others[:] = [one for one in others if one.loop is None or not one.loop.is_closed()]
            for one in others:
                if one.loop is loop and one.answer is not None:
                    return _joined(one.answer)
            asking = _Asking(loop, now)
            others.append(asking)
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
        asking.answer = asyncio.ensure_future(self._await(key, asking, answer))
        # Whoever waits is told; where nobody does any more, nobody has to be.
        asking.answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        return _joined(asking.answer)

    def forget(self, key: K) -> None:
        """Ask anew from now on, as after a change of plan; what is being asked does not count."""
        with self._lock:
            self._accounts.drop(key)
            self._missing.drop(key)
            for one in self._underway.pop(key, ()):
                one.counts = False

    def clear(self) -> None:
        """Forget every key."""
        with self._lock:
            self._accounts.clear()
            self._missing.clear()
            for several in self._underway.values():
                for one in several:
                    one.counts = False
            self._underway.clear()

    async def _await(
        self, key: K, asking: _Asking, answer: Awaitable[Account | None]
    ) -> Account | None:
        try:
            account = await answer
        except BaseException:
            self._end(key, asking)
            raise
        self._keep(key, asking, account)
        return account

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
            others = self._underway.get(key)
            if others is not None:
                others[:] = [one for one in others if one is not asking]
                if not others:
                    del self._underway[key]


class _Asking:
    """Stand for one question to a lookup, from `at` on; `counts` unless it was forgotten since."""

    __slots__ = ("answer", "at", "counts", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop | None, at: float) -> None:
        self.loop = loop
        self.at = at
        self.counts = True
        self.answer: asyncio.Future[Account | None] | None = None


async def _joined(answer: asyncio.Future[Account | None]) -> Account | None:
    # Who leaves, leaves: the others still wait for it.
    return await asyncio.shield(answer)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)

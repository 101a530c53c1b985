"""Buckets in Redis: shared by every process, decided by one script in one call."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from hashlib import sha1
from importlib.resources import files
from threading import Lock
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, ReadOnlyError, RedisError, ResponseError

from tieredlimit.backends.backend import Charge, Reply
from tieredlimit.backends.link import Link
from tieredlimit.backends.memory import system_clock
from tieredlimit.errors import BackendError, UsageError

DEFAULT_TIMEOUT = 0.1
CONNECT_TIMEOUT = 2.0
STALL_TIMEOUT = 1.0

_SCHEMES = ("redis", "rediss", "unix")
_TAKE = files("tieredlimit.backends").joinpath("lua/take.lua").read_text("utf-8")
_TAKE_SHA = sha1(_TAKE.encode(), usedforsecurity=False).hexdigest()

_living: WeakSet[RedisBackend] = WeakSet()

_log = logging.getLogger("tieredlimit")


class RedisBackend:
    """Keep buckets in Redis 6.2 or later.

    The server's clock decides; no clock of this host is ever sent. One connection per event loop
    carries all calls. A call that may have run is never repeated. Safe to use from several event
    loops and after a fork.

    Args:
        client: A `redis.asyncio.Redis` with its retries off. Only its connection settings
            are used, for connections of our own; it stays yours to close.
        clock: Returns integer microseconds since 1970 to decide by instead of the server's time;
            for tests and replay. Keys then live at least an hour.
        timeout: Seconds a decision may take, from its arrival, before it fails.

    Raises:
        UsageError: The client is of another kind or repeats commands by itself, or `timeout` is
            not above zero.
    """

    def __init__(
        self,
        client: Redis,
        *,
        clock: Callable[[], int] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        if not isinstance(client, Redis):
            raise UsageError(f"client must be a redis.asyncio.Redis, got {type(client).__name__}")
        retry = client.get_retry()
        retries = retry.get_retries() if retry else 0
        if retries != 0:
            raise UsageError(
                f"the Redis client repeats a command up to {retries} times, which would charge an "
                "account again for a reply that got lost; make it with "
                "retry=redis.asyncio.retry.Retry(redis.backoff.NoBackoff(), 0)"
            )
        if not timeout > 0:
            raise UsageError(f"timeout must be above 0 seconds, got {timeout}")
        self._pool = client.connection_pool
        self._clock = clock
        self._timeout = timeout
        self._offset_us: int | None = None
        self._links: WeakKeyDictionary[asyncio.AbstractEventLoop, Link] = WeakKeyDictionary()
        self._lock = Lock()
        self._left_to_parent: list[object] = []
        _living.add(self)

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        clock: Callable[[], int] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        **options: Any,
    ) -> RedisBackend:
        """Use the server at `redis://`, `rediss://` (TLS) or `unix://`.

        `options` are those of `redis.asyncio.Redis.from_url`, such as `ssl_ca_certs`.

        Raises:
            UsageError: The URL is of another kind or malformed.
        """
        scheme = url.partition("://")[0]
        if scheme not in _SCHEMES:
            raise UsageError(
                f'the Redis URL starts with "{scheme:.20}"; '
                f"known are {', '.join(f'{known}://' for known in _SCHEMES)}"
            )
        settings: dict[str, Any] = {
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
            "socket_connect_timeout": CONNECT_TIMEOUT,
            "client_name": "tieredlimit",
            **options,
        }

        try:
            client = Redis.from_url(url, **settings)
            # Made, not connected: an option that connections do not know shows here.
            pool: Any = client.connection_pool
            pool.make_connection()
        except (RedisError, TypeError) as exc:
            raise UsageError(f"the options of the Redis client cannot be used: {exc}") from exc
        except ValueError:
            # Neither the text nor the cause: both may show a part of a password.
            raise UsageError(
                "the Redis URL cannot be read; write redis://user:password@host:6379/0, with any "
                "of :/?#[]@ in user or password as %3A and so on"
            ) from None
        return cls(client, clock=clock, timeout=timeout)

    def now(self) -> int:
        """Return the server's clock in microseconds, carried on from its latest reply.

        Before the first reply it is this host's clock.
        """
        if self._clock is not None:
            return self._clock()
        if self._offset_us is None:
            return system_clock()
        return time.monotonic_ns() // 1000 + self._offset_us

    async def open(self) -> None:
        """Connect, load the script and learn the server's clock; log where that fails."""
        try:
            await self._link().open()
        except BackendError as exc:
            _log.warning("tieredlimit: %s; trying again with each decision", exc)

    async def close(self) -> None:
        """Close this event loop's connection. A client handed to the constructor stays open."""
        link = self._links.pop(asyncio.get_running_loop(), None)
        if link is not None:
            await link.close()

    async def take(self, charges: Sequence[Charge]) -> Reply:
        """Charge every bucket, or none of them, in one EVALSHA.

        Raises:
            BackendError: Redis did not answer within the timeout, refused, or cannot be reached.
                The charges may or may not have been applied.
        """
        arguments = [
            len(charges),
            *[charge.key for charge in charges],
            "" if self._clock is None else str(self._clock()),
            *[charge.shelf.packed_for(charge.cost) for charge in charges],
        ]
        link = self._link()
        try:
            async with _Patience(self._timeout):
                await link.open()
                try:
                    reply = await link.send("EVALSHA", _TAKE_SHA, *arguments)
                except NoScriptError:
                    # The one refusal that proves that nothing ran. EVAL also loads the script.
                    reply = await link.send("EVAL", _TAKE, *arguments)
        except TimeoutError as exc:
            link.check_pulse()
            raise BackendError(f"Redis did not answer within {self._timeout:g} s") from exc
        except ResponseError as exc:
            # Redis 6 wraps the refusal in the script's error.
            if isinstance(exc, ReadOnlyError) or "read only replica" in str(exc):
                # This was the primary once: the next call asks for the way again.
                link.drop("the server became a replica")
            raise BackendError(f"Redis refused: {exc}") from exc
        expected = 2 + sum(len(charge.shelf.quotas) for charge in charges)
        if type(reply) is not list or [type(part) for part in reply] != [int] * expected:
            link.drop("a reply of another kind than was asked for")
            raise BackendError(f"Redis answered what is no decision: {reply!r:.80}")
        allowed, now, *debts = reply
        self._learn_clock(now)
        return Reply(allowed == 1, now, debts)

    def _link(self) -> Link:
        loop = asyncio.get_running_loop()
        link = self._links.get(loop)
        if link is None:
            link = Link(
                self._pool.make_connection,
                self._greet,
                connect_timeout=CONNECT_TIMEOUT,
                stall_timeout=STALL_TIMEOUT,
            )
            with self._lock:  # other threads have loops of their own
                for ended in [other for other in self._links if other.is_closed()]:
                    del self._links[ended]
                self._links[loop] = link
        return link

    async def _greet(self, link: Link) -> None:
        try:
            await link.send("SCRIPT", "LOAD", _TAKE)
            seconds, microseconds = await link.send("TIME")
            self._learn_clock(int(seconds) * 1_000_000 + int(microseconds))
        except ResponseError as exc:
            # A user that may run scripts but not load them is served by EVAL.
            _log.warning("tieredlimit: Redis refused a greeting: %s", exc)

    def _learn_clock(self, now: int) -> None:
        self._offset_us = now - time.monotonic_ns() // 1000

    def leave_to_parent(self) -> None:
        """Start anew in the child of a fork."""
        # Kept and never closed: the parent still talks over these sockets.
        self._left_to_parent.append(self._links)
        self._links = WeakKeyDictionary()
        self._lock = Lock()


class _Patience:
    """Raise TimeoutError in its block after so many seconds, unless a reply has come by then.

    An event loop that was busy wakes up to an expired timer and an unread reply at once. The reply
    counts: Redis did answer, and may have charged. So the loop reads first.
    """

    # From a readable socket to a running caller: the parser, the reader's task, the caller's.
    _TURNS = 3

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._limit = asyncio.timeout(None)

    async def __aenter__(self) -> None:
        await self._limit.__aenter__()
        loop = asyncio.get_running_loop()
        self._next: asyncio.Handle = loop.call_later(self._seconds, self._turn, self._TURNS)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._next.cancel()
        await self._limit.__aexit__(kind, error, traceback)

    def _turn(self, left: int) -> None:
        loop = asyncio.get_running_loop()
        if left:
            self._next = loop.call_soon(self._turn, left - 1)
        else:
            self._limit.reschedule(loop.time())


def _after_fork() -> None:
    for backend in list(_living):
        backend.leave_to_parent()


os.register_at_fork(after_in_child=_after_fork)

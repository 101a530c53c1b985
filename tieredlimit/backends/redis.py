"""Buckets in Redis: shared by every process, decided by one script in one call."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from redis.asyncio import Redis

from tieredlimit.backends.backend import Charge, Reply
from tieredlimit.backends.calls import Calls
from tieredlimit.backends.link import Link, connection_of
from tieredlimit.backends.server import (
    CONNECT_TIMEOUT,
    DEFAULT_TIMEOUT,
    STALL_TIMEOUT,
    TAKE,
    ServerClock,
    client_of,
    greet,
)
from tieredlimit.errors import BackendError, UsageError

IN_FLIGHT = 2
"""The most calls that may wait for their reply."""

_SCHEMES = ("redis", "rediss", "unix")

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

    default_shards = 1

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
        self._clock = ServerClock(clock)
        self._timeout = timeout
        self._namespaces: dict[str, int] = {}
        self._sessions: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Link, Calls]] = (
            WeakKeyDictionary()
        )
        # The session used last: almost every take's.
        self._latest: tuple[asyncio.AbstractEventLoop, tuple[Link, Calls]] | None = None
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
        return cls(client_of(url, options), clock=clock, timeout=timeout)

    def now(self) -> int:
        """Return the server's clock in microseconds, carried on from its latest reply.

        Before the first reply it is this host's clock.
        """
        return self._clock.now()

    def join(self, namespace: str, shards: int) -> None:
        """Take note of the shards of a namespace, to be compared with what Redis holds."""
        self._namespaces[namespace] = shards

    async def open(self) -> None:
        """Connect, load the script and learn the server's clock; log where that fails.

        Raises:
            UsageError: A namespace is laid out in another way than this process has it.
        """
        try:
            await self._session()[0].open()
        except BackendError as exc:
            if isinstance(exc.__cause__, UsageError):
                raise exc.__cause__ from None
            _log.warning("tieredlimit: %s; trying again with each decision", exc)

    async def close(self) -> None:
        """Close this event loop's connection. A client handed to the constructor stays open."""
        with self._lock:
            session = self._sessions.pop(asyncio.get_running_loop(), None)
        self._latest = None
        if session is not None:
            await session[0].close()

    async def take(self, charges: Sequence[Charge]) -> Reply:
        """Charge every bucket, or none of them, in one EVALSHA shared with concurrent takes.

        Raises:
            BackendError: Redis did not answer within the timeout, refused, or cannot be reached.
                The charges may or may not have been applied.
        """
        link, calls = self._session()
        future = calls.add(charges)
        link.offer()
        return await future

    def _session(self) -> tuple[Link, Calls]:
        loop = asyncio.get_running_loop()
        latest = self._latest
        if latest is not None and latest[0] is loop:
            return latest[1]
        session = self._sessions.get(loop)
        if session is None:
            calls = Calls(
                TAKE,
                clock=self._clock.explicit,
                timeout=self._timeout,
                learn_clock=self._clock.learn,
                expired=lambda: link.check_pulse(),
            )
            link = Link(
                lambda: connection_of(self._pool),
                self._greet,
                calls,
                in_flight=IN_FLIGHT,
                connect_timeout=CONNECT_TIMEOUT,
                # Not while somebody may still be waiting for a reply, however patient.
                stall_timeout=max(STALL_TIMEOUT, self._timeout),
            )
            session = link, calls
            with self._lock:  # other threads have loops of their own
                for ended in [other for other in self._sessions if other.is_closed()]:
                    del self._sessions[ended]
                self._sessions[loop] = session
        self._latest = loop, session
        return session

    async def _greet(self, connection: Any) -> None:
        await greet(connection, self._clock, self._namespaces)

    def leave_to_parent(self) -> None:
        """Start anew in the child of a fork."""
        # Kept and never closed: the parent still talks over these sockets.
        self._left_to_parent.append(self._sessions)
        self._sessions = WeakKeyDictionary()
        self._latest = None
        self._lock = Lock()


def _after_fork() -> None:
    for backend in list(_living):
        backend.leave_to_parent()


os.register_at_fork(after_in_child=_after_fork)

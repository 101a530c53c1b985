"""Buckets in Redis: shared by every process, decided by one script in one call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from redis.asyncio import Redis

from tieredlimit._core.stamp import Stamp
from tieredlimit.backends.backend import Charge, Claim, Claimed, Reply
from tieredlimit.backends.calls import Calls
from tieredlimit.backends.link import Link, connection_of
from tieredlimit.backends.server import (
    CONNECT_TIMEOUT,
    DEFAULT_TIMEOUT,
    STALL_TIMEOUT,
    ServerClock,
    client_of,
    greet,
    take_script,
)
from tieredlimit.backends.shared import OverRedis
from tieredlimit.errors import BackendError, UsageError

IN_FLIGHT = 2
"""The most calls that may wait for their reply."""

_SCHEMES = ("redis", "rediss", "unix")


class RedisBackend(OverRedis[Link]):
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
        super().__init__(timeout, self._link)
        take_script()  # not first in an event loop, since it reads a file
        self._pool = client.connection_pool
        self._clock = ServerClock(clock)

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

    @property
    def explicit_clock(self) -> Callable[[], int] | None:
        """What is decided by instead of the server's time; None for that."""
        return self._clock.explicit

    def now(self) -> int:
        """Return the server's clock in microseconds, carried on from its latest reply.

        Before the first reply it is this host's clock.
        """
        return self._clock.now()

    async def take(
        self,
        charges: Sequence[Charge],
        stamp: Stamp | None = None,
        times: tuple[int, int] | None = None,
    ) -> Reply:
        """Charge every bucket, or none of them, in one EVALSHA shared with concurrent takes.

        Raises:
            StaleError: The stamp is not in force. Nothing was charged.
            BackendError: Redis did not answer within the timeout, refused, or cannot be reached.
                The charges may or may not have been applied.
        """
        link = self._sessions.here()
        try:
            future: asyncio.Future[Reply] = link.calls.add(charges, stamp, times)
        except BackendError:
            await asyncio.sleep(0)  # whoever asks again and again must let the probe have its turn
            raise
        link.offer()
        return await future

    async def claim(
        self,
        charges: Sequence[Charge],
        claim: Claim,
        stamp: Stamp | None = None,
        times: tuple[int, int] | None = None,
    ) -> Claimed:
        """Do what `take` does, and what is claimed in the same call: all of it or none.

        Raises:
            StaleError: As `take`.
            BackendError: As `take`. What is claimed may be held: release it by its id.
        """
        link = self._sessions.here()
        try:
            future: asyncio.Future[Claimed] = link.calls.add(charges, stamp, times, claim)
        except BackendError:
            await asyncio.sleep(0)  # as `take`
            raise
        link.offer()
        return await future

    def measure(
        self,
        charges: Sequence[Charge],
        stamp: Stamp | None = None,
        times: tuple[int, int] | None = None,
    ) -> asyncio.Future[Reply]:
        """Do what `take` does, behind what is taken in the same turn of the event loop.

        It is a call of its own, in the same round trip as a rule; what it writes may be refused.

        Raises:
            BackendError: Too many wait already.
        """
        link = self._sessions.here()
        future = link.calls.add(charges, stamp, times, shadow=True)
        link.offer_later()
        return future

    def _link(self) -> Link:
        calls = Calls(
            take_script(),
            clock=self._clock.explicit,
            timeout=self.timeout,
            learn_clock=self._clock.learn,
            expired=lambda: link.check_pulse(),
            stats=self.call_stats,
        )
        link = Link(
            lambda: connection_of(self._pool),
            self._greet,
            calls,
            in_flight=IN_FLIGHT,
            connect_timeout=CONNECT_TIMEOUT,
            # Not while somebody may still be waiting for a reply, however patient.
            stall_timeout=max(STALL_TIMEOUT, self.timeout),
        )
        return link

    def _session(self) -> tuple[Link, Calls]:
        link = self._sessions.here()
        return link, link.calls

    async def _greet(self, connection: Any) -> None:
        await greet(connection, self._clock, self.namespaces)

"""What one server and a cluster of them have in common: how to connect, the clock, the script."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from tieredlimit._core.keys import Layout
from tieredlimit.backends.call import Script
from tieredlimit.backends.memory import system_clock
from tieredlimit.errors import UsageError

DEFAULT_TIMEOUT = 0.1
"""Seconds that a decision may take."""
CONNECT_TIMEOUT = 2.0
"""Seconds that a connection may take to be made."""
STALL_TIMEOUT = 1.0
"""Seconds without a reply after which a connection is given up."""

_log = logging.getLogger("tieredlimit")


@cache
def take_script() -> Script:
    """Return the script that decides. It is read once, when a backend is made."""
    from importlib.resources import files

    return Script(files("tieredlimit.backends").joinpath("lua/take.lua").read_text("utf-8"))


def client_of(url: str, options: Mapping[str, Any]) -> Redis:
    """Return a client of one server whose connections repeat nothing.

    Raises:
        UsageError: The URL or an option cannot be used.
    """
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
    return client


class ServerClock:
    """Carry on the server's clock from its latest reply, by this process' monotonic clock.

    `explicit` is a clock to decide by instead, None for the server's. Of `several` servers the one
    that is ahead counts, so that nobody grows younger with the next reply.
    """

    def __init__(self, explicit: Callable[[], int] | None, *, several: bool = False) -> None:
        self.explicit = explicit
        self._several = several
        self._offset_us: int | None = None

    def learn(self, now: int) -> None:
        """Take in the instant of a reply."""
        offset_us = now - time.monotonic_ns() // 1000
        if self._several and self._offset_us is not None:
            offset_us = max(offset_us, self._offset_us)
        self._offset_us = offset_us

    def now(self) -> int:
        """Return the instant in microseconds; before the first reply it is this host's."""
        if self.explicit is not None:
            return self.explicit()
        if self._offset_us is None:
            return system_clock()
        return time.monotonic_ns() // 1000 + self._offset_us


async def greet(connection: Any, clock: ServerClock, namespaces: Mapping[str, Layout]) -> None:
    """Get a new connection ready: load the script, learn the clock, compare the namespaces' layout.

    Raises:
        UsageError: A namespace holds keys of another format, number of shards, or id secret.
    """
    await connection.send_command("SCRIPT", "LOAD", take_script().text)
    try:
        await connection.read_response()
    except ResponseError as exc:
        # A user that may run scripts but not load them is served by EVAL.
        _log.warning("tieredlimit: Redis refused to load a script: %s", exc)
    await connection.send_command("TIME")
    seconds, microseconds = await connection.read_response()
    clock.learn(int(seconds) * 1_000_000 + int(microseconds))
    for namespace, layout in namespaces.items():
        await _check_layout(connection, namespace, layout)


async def _check_layout(connection: Any, namespace: str, layout: Layout) -> None:
    """Compare how this process lays out a namespace with how the first one did."""
    key = f"tl:{{{namespace}}}:layout"
    ours = layout.record()
    try:
        await connection.send_command("SET", key, ours, "NX")
        await connection.read_response()
        await connection.send_command("GET", key)
        theirs = await connection.read_response(disable_decoding=True)
    except ResponseError as exc:
        # A replica, or a user that may not: the takes will say what is wrong, if anything.
        _log.warning("tieredlimit: Redis refused to compare the layout: %s", exc)
        return
    if theirs is not None and theirs != ours.encode():
        spelled = theirs.decode("utf-8", "replace")
        held, same = Layout.read(theirs), "shards"
        if held is not None and held.ids != layout.ids:
            same = "id_secret" if held.shards == layout.shards else "shards and id_secret"
        raise UsageError(
            f'the namespace "{namespace}" in Redis is laid out as "{spelled:.80}", this '
            f'process has "{ours}": give all its processes the same {same}, or another namespace'
        )

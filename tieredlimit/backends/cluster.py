"""Buckets in a Redis Cluster: one connection per primary, each call on one hash slot."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from tieredlimit.backends.backend import Charge, Reply
from tieredlimit.backends.fleet import Fleet
from tieredlimit.backends.link import connection_of
from tieredlimit.backends.nodecalls import Address
from tieredlimit.backends.server import (
    DEFAULT_TIMEOUT,
    ServerClock,
    client_of,
)
from tieredlimit.errors import BackendError, UsageError

_SCHEMES = {"redis+cluster": "redis", "rediss+cluster": "rediss"}
_NODE = re.compile(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\[\]:@\s]+)):([0-9]{1,5})", re.ASCII)

_living: WeakSet[ClusterBackend] = WeakSet()

_log = logging.getLogger("tieredlimit")


class ClusterBackend:
    """Keep buckets in a Redis Cluster, 6.2 or later.

    Works as `RedisBackend` does, with a connection to each primary. Follows slots that move and
    replicas that are promoted; what may have run is never repeated: only a redirection, which
    proves that nothing ran, sends a decision elsewhere. While a slot moves, a decision that charges
    several keys waits, up to its timeout, for those that are apart or new to be together. Every
    decision's keys share a hash tag, so `Limiter(shards=…)` says over how many tags, and so nodes,
    the load spreads.

    Args:
        url: `redis+cluster://` or `rediss+cluster://` (TLS), with one or more nodes that know the
            rest: `redis+cluster://user:password@host:7000,other:7001`.
        clock: As for `RedisBackend`.
        timeout: As for `RedisBackend`.
        options: Those of `redis.asyncio.Redis.from_url`.

    Raises:
        UsageError: The URL is of another kind or malformed, or an option is unknown.
    """

    default_shards = 64

    def __init__(
        self,
        url: str,
        *,
        clock: Callable[[], int] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        **options: Any,
    ) -> None:
        if not timeout > 0:
            raise UsageError(f"timeout must be above 0 seconds, got {timeout}")
        self.server_clock = ServerClock(clock, several=True)
        self.timeout = timeout
        one_node, self.seeds = _read_url(url)
        # Never connected: it holds the settings that all nodes share.
        self._pool = client_of(one_node, options).connection_pool
        self._fleets: WeakKeyDictionary[asyncio.AbstractEventLoop, Fleet] = WeakKeyDictionary()
        self._lock = Lock()
        self._left_to_parent: list[object] = []
        self.namespaces: dict[str, int] = {}
        _living.add(self)

    def connection_to(self, address: Address) -> Any:
        """Return a new connection to a node, not yet connected."""
        host, port = address
        return connection_of(self._pool, host=host, port=port)

    def now(self) -> int:
        """Return the servers' clock in microseconds, carried on from the latest reply."""
        return self.server_clock.now()

    def join(self, namespace: str, shards: int) -> None:
        """Take note of the shards of a namespace, to be compared with what the cluster holds."""
        self.namespaces[namespace] = shards

    async def open(self) -> None:
        """Find the nodes and learn their clock; log where that fails.

        Raises:
            UsageError: A namespace is laid out in another way than this process has it.
        """
        try:
            await self._fleet().open()
        except BackendError as exc:
            if isinstance(exc.__cause__, UsageError):
                raise exc.__cause__ from None
            _log.warning("tieredlimit: %s; trying again with each decision", exc)

    async def close(self) -> None:
        """Close this event loop's connections."""
        with self._lock:
            fleet = self._fleets.pop(asyncio.get_running_loop(), None)
        if fleet is not None:
            await fleet.close()

    async def take(self, charges: Sequence[Charge]) -> Reply:
        """Charge every bucket, or none of them, on the node that has them.

        The keys of all charges have the same hash tag.

        Raises:
            BackendError: The node did not answer within the timeout, refused, or is not there. The
                charges may or may not have been applied.
        """
        fleet = self._fleet()
        if fleet.ready:
            return await fleet.add(charges)
        try:
            async with asyncio.timeout(self.timeout):
                await fleet.open()
                return await fleet.add(charges)
        except TimeoutError as exc:
            raise BackendError(
                f"the Redis Cluster did not answer within {self.timeout:g} s"
            ) from exc

    def _fleet(self) -> Fleet:
        loop = asyncio.get_running_loop()
        fleet = self._fleets.get(loop)
        if fleet is None:
            fleet = Fleet(self)
            with self._lock:  # other threads have loops of their own
                for ended in [other for other in self._fleets if other.is_closed()]:
                    del self._fleets[ended]
                self._fleets[loop] = fleet
        return fleet

    def leave_to_parent(self) -> None:
        """Start anew in the child of a fork."""
        # Kept and never closed: the parent still talks over these sockets.
        self._left_to_parent.append(self._fleets)
        self._fleets = WeakKeyDictionary()
        self._lock = Lock()


def _read_url(url: str) -> tuple[str, list[Address]]:
    """Return the same URL for the first node alone, and all the nodes that it names.

    Raises:
        UsageError: It is of another kind, or malformed.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in _SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        raise UsageError(f'the Redis URL starts with "{scheme:.20}"; known are {known}')
    # By hand: urlsplit refuses an IPv6 address that is not the first node.
    nodes, query = re.fullmatch(r"([^/?#]*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]  # matches all
    credentials, at, nodes = nodes.rpartition("@")
    addresses = []
    for i, node in enumerate(nodes.split(","), 1):
        found = _NODE.fullmatch(node)
        if found is None or not 0 < int(found[3]) < 65_536:
            # Without its text: an unquoted password may have ended up here.
            raise UsageError(
                f"node {i} of the Redis URL is not host:port; write redis+cluster://user:password@"
                "host:7000,other:7001, with any of :/?#[]@ in user or password as %3A and so on"
            )
        addresses.append((found[1] or found[2], int(found[3])))
    if re.match(r"/0*[^0?]", query):
        raise UsageError("a Redis Cluster has database 0 only; the Redis URL names another")
    return f"{_SCHEMES[scheme]}://{credentials}{at}{nodes.partition(',')[0]}{query}", addresses


def _after_fork() -> None:
    for backend in list(_living):
        backend.leave_to_parent()


os.register_at_fork(after_in_child=_after_fork)

"""Buckets in a Redis Cluster: one connection per primary, each call on one hash slot."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Any

from tieredlimit._core.stamp import Stamp
from tieredlimit.backends.backend import Charge, Claim, Claimed, NotAskedError, Reply
from tieredlimit.backends.fleet import Fleet
from tieredlimit.backends.link import connection_of
from tieredlimit.backends.nodecalls import Address
from tieredlimit.backends.server import (
    DEFAULT_TIMEOUT,
    ServerClock,
    client_of,
    take_script,
)
from tieredlimit.backends.shared import OverRedis
from tieredlimit.errors import BackendError, UsageError

_SCHEMES = {"redis+cluster": "redis", "rediss+cluster": "rediss"}
_NODE = re.compile(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\[\]:@\s]+)):([0-9]{1,5})", re.ASCII)


class ClusterBackend(OverRedis[Fleet]):
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
        super().__init__(timeout, lambda: Fleet(self))
        take_script()  # not first in an event loop, since it reads a file
        self.server_clock: ServerClock = ServerClock(clock, several=True)
        self.seeds: list[Address]
        one_node, self.seeds = _read_url(url)
        # Never connected: it holds the settings that all nodes share.
        self._pool = client_of(one_node, options).connection_pool

    def connection_to(self, address: Address) -> Any:
        """Return a new connection to a node, not yet connected."""
        host, port = address
        return connection_of(self._pool, host=host, port=port)

    @property
    def explicit_clock(self) -> Callable[[], int] | None:
        """What is decided by instead of the server's time; None for that."""
        return self.server_clock.explicit

    def now(self) -> int:
        """Return the servers' clock in microseconds, carried on from the latest reply."""
        return self.server_clock.now()

    async def take(
        self,
        charges: Sequence[Charge],
        stamp: Stamp | None = None,
        times: tuple[int, int] | None = None,
    ) -> Reply:
        """Charge every bucket, or none of them, on the node that has them.

        The keys of all charges have the same hash tag.

        Raises:
            StaleError: The stamp is not in force. Nothing was charged.
            BackendError: The node did not answer within the timeout, refused, or is not there. The
                charges may or may not have been applied.
        """
        reply: Reply = await self._ask(charges, stamp, times, None)
        return reply

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
        claimed: Claimed = await self._ask(charges, stamp, times, claim)
        return claimed

    def measure(
        self,
        charges: Sequence[Charge],
        stamp: Stamp | None = None,
        times: tuple[int, int] | None = None,
    ) -> asyncio.Future[Reply]:
        """Do what `take` does, behind what is taken in the same turn of the event loop.

        Raises:
            BackendError: Too many wait already, or the nodes are not known yet.
        """
        return self._fleet().measure(charges, stamp, times)

    async def _ask(
        self,
        charges: Sequence[Charge],
        stamp: Stamp | None,
        times: tuple[int, int] | None,
        claim: Claim | None,
    ) -> Any:
        fleet = self._fleet()
        if fleet.ready:
            try:
                future = fleet.add(charges, stamp, times, claim)
            except BackendError:
                # Whoever asks again and again must let the probe have its turn.
                await asyncio.sleep(0)
                raise
            return await future
        if fleet.breaker.open:
            await asyncio.sleep(0)
            raise NotAskedError(f"the Redis Cluster is not asked for now: {fleet.breaker.why}")
        try:
            async with asyncio.timeout(self.timeout):
                await fleet.open()
                return await fleet.add(charges, stamp, times, claim)
        except TimeoutError as exc:
            fleet.late(f"it did not answer within {self.timeout:g} s")
            raise BackendError(
                f"the Redis Cluster did not answer within {self.timeout:g} s"
            ) from exc

    def _fleet(self) -> Fleet:
        return self._sessions.here()


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

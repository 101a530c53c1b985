"""The store of revisions, heartbeats and the label that belongs to a backend."""

from __future__ import annotations

from tieredlimit._core.keys import revision_key as shard_key
from tieredlimit.backends.backend import Backend
from tieredlimit.backends.cluster import ClusterBackend
from tieredlimit.backends.heartbeat import Heartbeat
from tieredlimit.backends.link import connection_of
from tieredlimit.backends.memory import MemoryBackend
from tieredlimit.backends.memory_control import MemoryControl
from tieredlimit.backends.nodecalls import Address
from tieredlimit.backends.nodes import Route
from tieredlimit.backends.redis import RedisBackend
from tieredlimit.backends.redis_control import RedisControl
from tieredlimit.backends.revisions import POLL_INTERVAL, ControlStore, Published
from tieredlimit.errors import UsageError

__all__ = [
    "ControlStore",
    "Heartbeat",
    "MemoryControl",
    "Published",
    "RedisControl",
    "control_store",
    "shard_key",
]


def control_store(
    backend: Backend,
    namespace: str,
    shards: int,
    *,
    poll_interval: float | None = POLL_INTERVAL,
) -> ControlStore:
    """Return the store that goes with a backend; it asks nothing yet.

    Args:
        backend: Where the namespace's buckets live. Of a Redis backend the way to the servers is
            used, over connections of the store's own, and never an explicit clock.
        namespace: Whose revisions these are.
        shards: As the limiters of the namespace have it.
        poll_interval: Seconds between two looks of `watch` at the head, in case no news comes
            through; None never looks without.

    Raises:
        UsageError: The backend is of another kind.
    """
    if isinstance(backend, MemoryBackend):
        return MemoryControl(backend, namespace, shards)
    if isinstance(backend, RedisBackend):
        pool = backend._pool  # noqa: SLF001 -- of this package
        route = Route(lambda _: connection_of(pool))
    elif isinstance(backend, ClusterBackend):
        cluster = backend
        route = Route(lambda node: cluster.connection_to(_named(node)), tuple(cluster.seeds))
    else:
        raise UsageError(
            "live control needs a MemoryBackend, RedisBackend or ClusterBackend, "
            f"got {type(backend).__name__}"
        )
    return RedisControl(route, namespace, shards, poll_interval=poll_interval)


def _named(node: Address | None) -> Address:
    if node is None:
        raise UsageError("a Redis Cluster has no node without an address")
    return node

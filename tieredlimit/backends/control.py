"""The stores that belong to a backend: of revisions and heartbeats, and of what takes hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tieredlimit._core.keys import revision_key as shard_key
from tieredlimit.backends.backend import Backend
from tieredlimit.backends.holds import Holds
from tieredlimit.backends.link import connection_of
from tieredlimit.backends.memory import MemoryBackend
from tieredlimit.backends.memory_control import MemoryControl
from tieredlimit.backends.memory_holds import MemoryHolds
from tieredlimit.backends.redis import RedisBackend
from tieredlimit.backends.revisions import POLL_INTERVAL, ControlStore, Published
from tieredlimit.backends.shared import is_over_redis
from tieredlimit.errors import UsageError

if TYPE_CHECKING:
    from tieredlimit.backends.nodecalls import Address
    from tieredlimit.backends.nodes import Route

__all__ = [
    "ControlStore",
    "MemoryControl",
    "Published",
    "control_store",
    "holds_of",
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
    from tieredlimit.backends.redis_control import RedisControl

    return RedisControl(_route(backend), namespace, shards, poll_interval=poll_interval)


def holds_of(backend: Backend) -> Holds | None:
    """Return what looks after slots and reservations in a backend; None where it has none."""
    if isinstance(backend, MemoryBackend):
        return MemoryHolds(backend)
    if is_over_redis(backend):
        from tieredlimit.backends.redis_holds import RedisHolds

        return RedisHolds(_route(backend), backend.explicit_clock)
    return None


def _route(backend: Backend) -> Route:
    from tieredlimit.backends.nodes import Route

    if isinstance(backend, RedisBackend):
        pool = backend._pool  # noqa: SLF001 -- of this package
        return Route(lambda _: connection_of(pool))
    from tieredlimit.backends.cluster import ClusterBackend

    if isinstance(backend, ClusterBackend):
        cluster = backend
        return Route(lambda node: cluster.connection_to(_named(node)), tuple(cluster.seeds))
    raise UsageError(
        "live control needs a MemoryBackend, RedisBackend or ClusterBackend, "
        f"got {type(backend).__name__}"
    )


def _named(node: Address | None) -> Address:
    if node is None:
        raise UsageError("a Redis Cluster has no node without an address")
    return node

"""Where buckets live: in this process, or in Redis."""

from typing import TYPE_CHECKING

from tieredlimit._core.slots import Slot
from tieredlimit.backends.backend import Backend, Charge, Claim, Claimed, Reply
from tieredlimit.backends.memory import MemoryBackend
from tieredlimit.backends.redis import RedisBackend

__all__ = [
    "Backend",
    "Charge",
    "Claim",
    "Claimed",
    "ClusterBackend",
    "MemoryBackend",
    "RedisBackend",
    "Reply",
    "Slot",
]

if TYPE_CHECKING:
    from tieredlimit.backends.cluster import ClusterBackend
else:

    def __getattr__(name: str) -> object:
        # Most processes know one server: they do without what finds its way in a cluster.
        if name == "ClusterBackend":
            from tieredlimit.backends.cluster import ClusterBackend

            return ClusterBackend
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

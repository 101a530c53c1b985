"""Where buckets live: in this process, or in Redis."""

from tieredlimit._core.slots import Slot
from tieredlimit.backends.backend import Backend, Charge, Claim, Claimed, Reply
from tieredlimit.backends.cluster import ClusterBackend
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

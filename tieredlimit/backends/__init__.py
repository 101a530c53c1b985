"""Where buckets live: in this process, or in Redis."""

from tieredlimit.backends.backend import Backend, Charge, Reply
from tieredlimit.backends.cluster import ClusterBackend
from tieredlimit.backends.memory import MemoryBackend
from tieredlimit.backends.redis import RedisBackend

__all__ = ["Backend", "Charge", "ClusterBackend", "MemoryBackend", "RedisBackend", "Reply"]

"""From a Redis URL to the backend that it means."""

from __future__ import annotations

from tieredlimit.backends.backend import Backend
from tieredlimit.backends.redis import RedisBackend


def backend_at(url: str) -> Backend:
    """Return a backend for one server, or for a cluster where the scheme says so.

    Raises:
        UsageError: The URL is of another kind or malformed.
    """
    if "+cluster://" not in url:
        return RedisBackend.from_url(url)
    from tieredlimit.backends.cluster import ClusterBackend

    return ClusterBackend(url)

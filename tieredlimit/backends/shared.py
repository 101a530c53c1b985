"""What the backends of one server and of a cluster have in common."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Generic, Protocol, TypeGuard, TypeVar

from tieredlimit._core.keys import Layout
from tieredlimit._core.tally import CallStats
from tieredlimit.backends.breaker import Breaker
from tieredlimit.backends.perloop import PerLoop
from tieredlimit.errors import BackendError, UsageError

if TYPE_CHECKING:
    from tieredlimit.backends.cluster import ClusterBackend
    from tieredlimit.backends.redis import RedisBackend

_log = logging.getLogger("tieredlimit")


class Session(Protocol):
    """What an event loop keeps of a server, or of several."""

    async def open(self) -> None:
        """Connect, if that has not been done."""
        ...

    @property
    def breakers(self) -> list[Breaker]:
        """The breaker of each server that it talks to."""
        ...

    async def close(self) -> None:
        """Close for good."""
        ...


S = TypeVar("S", bound=Session)


class OverRedis(Generic[S]):
    """Keep a session for each event loop, and the namespaces that use it.

    Attributes:
        compares_revisions: Each call compares the revision under which its decisions were prepared.
        timeout: Seconds that a decision may take.
        namespaces: How each namespace is laid out.
        call_stats: The calls to Redis, from all event loops.
        entered: Called in each event loop in which it is used for the first time.
        leaving: Awaited in an event loop before what it holds there is given back.
    """

    compares_revisions = True

    def __init__(self, timeout: float, connect: Callable[[], S]) -> None:
        if not timeout > 0:
            raise UsageError(f"timeout must be above 0 seconds, got {timeout}")
        self.timeout = timeout
        self.namespaces: dict[str, Layout] = {}
        self.call_stats: CallStats = CallStats()
        self.entered: list[Callable[[], None]] = []
        self.leaving: list[Callable[[], Awaitable[None]]] = []
        self._connect = connect
        self._sessions: PerLoop[S] = PerLoop(self._enter)

    def join(self, namespace: str, layout: Layout) -> None:
        """Take note of how a namespace is laid out, to be compared with what Redis holds.

        Raises:
            UsageError: It is laid out in another way here already.
        """
        known = self.namespaces.setdefault(namespace, layout)
        if known.shards != layout.shards:
            raise UsageError(
                f'the namespace "{namespace}" has {known.shards} shards on this backend already, '
                f"got {layout.shards}"
            )
        if known != layout:
            raise UsageError(
                f'the namespace "{namespace}" has another id_secret on this backend already'
            )

    @property
    def breakers(self) -> list[Breaker]:
        """The breakers of all servers, in all event loops."""
        return [breaker for session in self._sessions.all() for breaker in session.breakers]

    async def open(self) -> None:
        """Connect, load the script and learn the server's clock; log where that fails.

        Raises:
            UsageError: A namespace is laid out in another way than this process has it.
        """
        try:
            await self._sessions.here().open()
        except BackendError as exc:
            if isinstance(exc.__cause__, UsageError):
                raise exc.__cause__ from None
            _log.warning("tieredlimit: %s; trying again with each decision", exc)

    async def close(self) -> None:
        """Close this event loop's connections. A client that was handed over stays open."""
        for leave in self.leaving:
            await leave()
        session = self._sessions.pop()
        if session is not None:
            await session.close()

    def _enter(self) -> S:
        session = self._connect()
        for hear in self.entered:
            hear()
        return session


def is_over_redis(backend: object) -> TypeGuard[RedisBackend | ClusterBackend]:
    """Say whether it is one of the two over Redis, and load neither."""
    return isinstance(backend, OverRedis)

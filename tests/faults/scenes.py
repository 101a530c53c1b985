"""What stands between the application and its buckets: a server, a proxy, sentinels, a cluster."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.clusters import RedisCluster, RedisSentinels
from tests.proxy import Proxy
from tests.servers import RedisServer
from tieredlimit.backends import ClusterBackend, RedisBackend

NAME = "redis.test"
"""A host that only `Scene.names` knows."""
PASSWORD = "word"


@dataclass
class Scene:
    """Hold what a fault is done to.

    Attributes:
        backend: What the application decides by, over all that is here.
        names: Whether the server's name resolves.
        ending: What was begun and is to be awaited where the fault ends.
    """

    backend: RedisBackend | ClusterBackend
    server: RedisServer = None  # type: ignore[assignment]  # where there is one server
    proxy: Proxy = None  # type: ignore[assignment]  # where there is one
    sentinels: RedisSentinels = None  # type: ignore[assignment]  # where there are any
    cluster: RedisCluster = None  # type: ignore[assignment]  # where there is one
    names: bool = True
    ending: list[asyncio.Future[Any]] = field(default_factory=list)

    async def tell(self, *words: str) -> object:
        """Run a command on the server, out of the event loop's way."""
        return await asyncio.to_thread(self.server.command, *words)

    async def tell_as_operator(self, *words: str) -> object:
        """Run a command where the server asks for a password: `PASSWORD`."""

        def tell() -> object:
            options: Any = {"retry": Retry(NoBackoff(), 0), "password": PASSWORD}
            with redis.Redis(port=self.server.port, **options) as client:
                said: object = client.execute_command(*words)
                return said

        return await asyncio.to_thread(tell)

    def meanwhile(self, do: Callable[..., object], *args: object) -> None:
        """Do something from now on, until the fault ends."""
        self.ending.append(asyncio.ensure_future(asyncio.to_thread(do, *args)))

    async def end_it(self) -> list[object]:
        """Wait for what is done meanwhile."""
        ended = await asyncio.gather(*self.ending, return_exceptions=True)
        self.ending.clear()
        return ended


Setting = Callable[[float], AbstractAsyncContextManager[Scene]]
"""Makes a scene whose decisions may take so many seconds."""
Act = Callable[[Scene], Awaitable[object]]


def one_server(*options: str) -> Setting:
    """Return what makes a scene of one server."""

    @asynccontextmanager
    async def scene(patience: float) -> AsyncIterator[Scene]:
        with RedisServer(*options) as server:
            yield Scene(RedisBackend.from_url(server.url, timeout=patience), server=server)

    return scene


@asynccontextmanager
async def behind_proxy(patience: float) -> AsyncIterator[Scene]:
    """Make a scene of a server and a proxy before it."""
    with RedisServer() as server:
        async with Proxy(server.port) as proxy:
            yield Scene(
                RedisBackend.from_url(proxy.url, timeout=patience), server=server, proxy=proxy
            )


@asynccontextmanager
async def by_name(patience: float) -> AsyncIterator[Scene]:
    """Make a scene of a server that is known by its name, through a proxy."""
    with RedisServer() as server:
        async with Proxy(server.port) as proxy:
            url = proxy.url.replace("127.0.0.1", NAME)
            scene = Scene(RedisBackend.from_url(url, timeout=patience), server=server, proxy=proxy)
            loop: Any = asyncio.get_running_loop()
            resolve = loop.getaddrinfo

            async def getaddrinfo(host: str, *args: Any, **options: Any) -> Any:
                if host == NAME and not scene.names:
                    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
                where = "127.0.0.1" if host == NAME else host
                return await resolve(where, *args, **options)

            loop.getaddrinfo = getaddrinfo
            try:
                yield scene
            finally:
                del loop.getaddrinfo


@asynccontextmanager
async def sentinels(patience: float) -> AsyncIterator[Scene]:
    """Make a scene of a primary, its replica and three sentinels."""
    with RedisSentinels() as watched:
        client = watched.client()
        try:
            yield Scene(RedisBackend(client, timeout=patience), sentinels=watched)
        finally:
            await client.aclose()


def cluster(replicas: int) -> Setting:
    """Return what makes a scene of a cluster of three masters."""

    @asynccontextmanager
    async def scene(patience: float) -> AsyncIterator[Scene]:
        with RedisCluster(replicas=replicas) as nodes:
            yield Scene(ClusterBackend(nodes.url, timeout=patience), cluster=nodes)

    return scene

"""Stand between a client and a server, and do to their bytes what networks do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Proxy:
    """Forward a loopback port to another, from `async with` until its end.

    Attributes:
        treat: Is given what the server sends and returns what the client gets, b"" for nothing.
        cut: Close a connection as soon as the client got something.
        gate: Connections are accepted, but led on only while this is set.
        flow: Replies are held back while this is not set.
        connections: How many there have been.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.connections = 0
        self.accepted = asyncio.Event()
        self.gate = asyncio.Event()
        self.flow = asyncio.Event()
        self.heal()

    @property
    def url(self) -> str:
        port: int = self._server.sockets[0].getsockname()[1]
        return f"redis://127.0.0.1:{port}/0"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        self.break_connections()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._server.wait_closed()

    def heal(self) -> None:
        """Forward everything; end the connections that missed something."""
        self.treat: Callable[[bytes], bytes] = lambda reply: reply
        self.cut = False
        self.gate.set()
        self.flow.set()
        self.break_connections()

    def break_connections(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.accepted.set()
        writers = [writer]
        try:
            await self.gate.wait()
            upstream, onward = await asyncio.open_connection("127.0.0.1", self._port)
            writers.append(onward)
            async with asyncio.TaskGroup() as both:
                both.create_task(_pump(reader, onward))
                both.create_task(self._answer(upstream, writer))
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            pass
        finally:
            for one in writers:
                one.close()
            self._tasks.discard(task)

    async def _answer(self, upstream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while reply := await upstream.read(65536):
            await self.flow.wait()
            treated = self.treat(reply)
            writer.write(treated)
            if self.cut and treated:
                break
        raise ConnectionResetError


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while some := await reader.read(65536):
        writer.write(some)
        await writer.drain()
    raise ConnectionResetError

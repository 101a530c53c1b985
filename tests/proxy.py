"""Stand between a client and a server, and do to their bytes what networks do."""

from __future__ import annotations

import asyncio
import socket
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
        hole: What is sent meanwhile, either way, and over connections made meanwhile, is lost, and
            so is all that follows it over the same connection, in silence.
        late: Seconds by which each reply is delayed.
        drip: Seconds between two bytes of a reply, 0 for all at once.
        connections: How many there have been.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._held: socket.socket | None = None
        self.connections = 0
        self.accepted = asyncio.Event()
        self.gate = asyncio.Event()
        self.flow = asyncio.Event()
        self.heal()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        if self._held is not None:
            self._held.close()
        self.break_connections()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._server.wait_closed()

    def heal(self) -> None:
        """Forward everything; end the connections that missed something."""
        self.mend()
        self.break_connections()

    def mend(self) -> None:
        """Forward everything from now on, also over the connections that there are."""
        self.treat: Callable[[bytes], bytes] = lambda reply: reply
        self.cut = self.hole = False
        self.late = self.drip = 0.0
        self.gate.set()
        self.flow.set()

    def refuse(self) -> None:
        """End all connections and refuse new ones, as where nobody listens; keep the port."""
        self._server.close()
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", self.port))
        self.break_connections()

    async def listen(self) -> None:
        """Accept connections again."""
        self._server = await asyncio.start_server(self._serve, sock=self._held)
        self._held = None

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
        lost = asyncio.Event()
        try:
            await self.gate.wait()
            if self.hole:
                lost.set()
            upstream, onward = await asyncio.open_connection("127.0.0.1", self._port)
            writers.append(onward)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._ask(reader, onward, lost))
                both.create_task(self._answer(upstream, writer, lost))
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            pass
        finally:
            for one in writers:
                one.close()
            self._tasks.discard(task)

    async def _ask(
        self, reader: asyncio.StreamReader, onward: asyncio.StreamWriter, lost: asyncio.Event
    ) -> None:
        while some := await reader.read(65536):
            if not self._is_lost(lost):
                onward.write(some)
                await onward.drain()
        raise ConnectionResetError

    async def _answer(
        self, upstream: asyncio.StreamReader, writer: asyncio.StreamWriter, lost: asyncio.Event
    ) -> None:
        while reply := await upstream.read(65536):
            await self.flow.wait()
            if self.late:
                await asyncio.sleep(self.late)
            if self._is_lost(lost):
                continue
            treated = self.treat(reply)
            if self.drip:
                await self._drip(treated, writer)
            else:
                writer.write(treated)
            if self.cut and treated:
                break
        raise ConnectionResetError

    async def _drip(self, reply: bytes, writer: asyncio.StreamWriter) -> None:
        for i in range(len(reply)):
            writer.write(reply[i : i + 1])
            await asyncio.sleep(self.drip)

    def _is_lost(self, lost: asyncio.Event) -> bool:
        if self.hole:
            lost.set()
        return lost.is_set()

"""One connection to Redis, shared by every call of an event loop.

Calls are written as they come and answered in their order (Redis answers a connection's commands
in the order in which it received them). Nothing is ever sent twice: a call whose connection breaks
may have run, and fails.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from tieredlimit.errors import BackendError

MAX_WAITING = 10_000
"""The most calls that may wait for their reply; further ones fail at once."""


class Link:
    """Hold one connection, made at the first call and again after it broke.

    Args:
        connect: Returns a new redis-py connection object, not yet connected.
        greet: Run on each new connection before any call, with the link itself.
        connect_timeout: Seconds a connection may take to be made, however impatient the calls are.
        stall_timeout: Seconds without a reply after which the connection is given up as dead.
    """

    def __init__(
        self,
        connect: Callable[[], AbstractConnection],
        greet: Callable[[Link], Awaitable[None]],
        *,
        connect_timeout: float,
        stall_timeout: float,
    ) -> None:
        self._make_connection = connect
        self._greet = greet
        self._connect_timeout = connect_timeout
        self._stall_timeout = stall_timeout
        self._connection: AbstractConnection | None = None
        self._abort: Callable[[], None] = lambda: None
        self._reader: asyncio.Task[None] | None = None
        self._opening: asyncio.Task[None] | None = None
        self._waiting: deque[tuple[asyncio.Future[Any], float]] = deque()

    async def open(self) -> None:
        """Connect, if that has not been done; callers that give up leave the attempt running.

        Raises:
            BackendError: The server could not be reached.
        """
        if self._connection is not None:
            return
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(self._open())
            self._opening.add_done_callback(self._opened)
        opening = self._opening
        await asyncio.wait([opening])
        if opening.cancelled():
            raise BackendError("the connection to Redis was closed while it was made")
        opening.result()

    async def send(self, *command: Any) -> Any:
        """Send one command on the connection there is and return its reply.

        Raises:
            ResponseError: Redis refused the command.
            BackendError: There is no connection, or it broke before the reply: the command may
                have run.
        """
        connection = self._connection
        if connection is None:
            raise BackendError("no connection to Redis")
        if len(self._waiting) >= MAX_WAITING:
            raise BackendError(f"{MAX_WAITING} calls are waiting for Redis already")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._waiting.append((future, loop.time()))
        try:
            # No await stands between the line above and the write: replies come in this order.
            await connection.send_packed_command(
                connection.pack_command(*command), check_health=False
            )
        except (RedisError, OSError) as exc:
            self._drop(connection, exc)
        except asyncio.CancelledError:
            # Redis reads too slowly and the caller gave up in mid-write: redis-py has closed the
            # connection, and would make another one under our feet at the next write.
            future.cancel()
            self._drop(connection, RedisConnectionError("a write was interrupted"))
            raise
        return await future

    def check_pulse(self) -> None:
        """Give the connection up if its oldest call has had no reply for too long."""
        if self._connection is not None and self._waiting:
            waited = asyncio.get_running_loop().time() - self._waiting[0][1]
            if waited > self._stall_timeout:
                self.drop(f"no reply for {waited:.1f} s")

    def drop(self, why: str) -> None:
        """Give the connection up; what waits on it fails, the next call connects anew."""
        if self._connection is not None:
            self._drop(self._connection, RedisConnectionError(why))

    async def close(self) -> None:
        """Close the connection; what waits on it fails."""
        ending = [task for task in (self._opening, self._reader) if task is not None]
        if self._opening is not None:
            self._opening.cancel()
        self.drop("closed")
        if ending:
            await asyncio.wait(ending)

    async def _open(self) -> None:
        connection = self._make_connection()
        # Reads wait for calls, for as long as it takes: `check_pulse` is what bounds a reply.
        connection.socket_timeout = None
        try:
            async with asyncio.timeout(self._connect_timeout):
                await connection.connect()  # type: ignore[no-untyped-call]  # redis-py has no types here
                writer: Any = connection._writer  # noqa: SLF001 -- there is no other way to abort
                self._abort = writer.transport.abort
                self._connection = connection
                self._reader = asyncio.get_running_loop().create_task(self._read(connection))
                await self._greet(self)
        except BaseException as exc:
            if self._connection is connection:
                self._drop(connection, exc)
            else:
                await connection.disconnect(nowait=True)
            if isinstance(exc, Exception):
                why = str(exc) or type(exc).__name__
                raise BackendError(f"cannot connect to Redis: {why}") from exc
            raise

    def _opened(self, opening: asyncio.Task[None]) -> None:
        self._opening = None
        if not opening.cancelled():
            opening.exception()  # whoever still waits has it; nobody else needs a warning

    async def _read(self, connection: AbstractConnection) -> None:
        try:
            while True:
                try:
                    reply = await connection.read_response(disable_decoding=True)
                except ResponseError as exc:
                    reply = exc
                future, _ = self._waiting.popleft()
                if future.done():
                    continue  # its caller gave up; the reply had to be read all the same
                if isinstance(reply, ResponseError):
                    future.set_exception(reply)
                else:
                    future.set_result(reply)
        except Exception as exc:  # noqa: BLE001 -- redis-py's parsers raise all sorts for garbage
            # Also for a reply that nobody asked for: the order is lost, so is the connection.
            self._drop(connection, exc)
        finally:
            await connection.disconnect(nowait=True)

    def _drop(self, connection: AbstractConnection, cause: BaseException) -> None:
        if self._connection is not connection:
            return
        self._connection = None
        # Not closed: that would wait, for ever perhaps, until Redis has read what is unsent.
        self._abort()
        waiting, self._waiting = self._waiting, deque()
        for future, _ in waiting:
            if not future.done():
                why = str(cause) or type(cause).__name__
                error = BackendError(f"the connection to Redis broke: {why}")
                error.__cause__ = cause
                future.set_exception(error)
        if self._reader is not None and self._reader is not asyncio.current_task():
            self._reader.cancel()
        self._reader = None

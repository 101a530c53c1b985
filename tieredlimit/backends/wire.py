"""One connection to a node, for commands that are not in a hurry."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from redis.exceptions import ResponseError

from tieredlimit.backends.server import CONNECT_TIMEOUT
from tieredlimit.errors import BackendError

Command = tuple[bytes, ...]


class UnreachableError(BackendError):
    """Report that a node could not be connected to: nothing was sent."""


class Wire:
    """Hold one connection to a node, made when it is needed, and ask over it in turn."""

    def __init__(self, make_connection: Callable[[], Any]) -> None:
        self._make_connection = make_connection
        self._connection: Any = None
        self._made = 0
        self._lock = asyncio.Lock()

    async def ask(self, commands: Sequence[Command], deadline: float) -> list[Any]:
        """Send commands in one go and return the replies, a refusal as the exception that it is.

        Raises:
            UnreachableError: There is no connection; nothing was sent.
            BackendError: There was no reply until the deadline, or the connection broke: what was
                sent may have run.
        """
        sent = False
        try:
            async with asyncio.timeout_at(deadline), self._lock:
                connection = await self._ready()
                sent = True
                try:
                    packed = connection.pack_commands(commands)
                    await connection.send_packed_command(packed, check_health=False)
                    replies = [await reply_of(connection) for _ in commands]
                except BaseException:
                    # Half a reply may be left: the order is lost, so is the connection.
                    await self.drop()
                    raise
                if any(_is_of_replica(reply) for reply in replies):
                    await self.drop()  # the primary once: ask for the way again
                return replies
        except TimeoutError as exc:
            kind = BackendError if sent else UnreachableError
            raise kind("Redis did not answer in time") from exc
        except BackendError:
            raise
        except Exception as exc:  # redis-py's parsers raise all sorts for garbage
            why = str(exc) or type(exc).__name__
            raise BackendError(f"the connection to Redis broke: {why}") from exc

    async def replicas(self, *, patience: float) -> int:
        """Return how many replicas have what was sent over this connection, after up to 1 s.

        `patience` is the seconds that the node itself may take to answer.
        """
        loop = asyncio.get_running_loop()
        try:
            (info,) = await self.ask([(b"INFO", b"replication")], loop.time() + patience)
            number = _number_of_replicas(info)
            if number == 0:
                return 0
            wait = (b"WAIT", b"%d" % number, b"1000")
            (followed,) = await self.ask([wait], loop.time() + patience + 1.0)
        except BackendError:
            return 0
        # WAIT counts for what its own connection wrote: on another one it says nothing.
        return followed if type(followed) is int and self._made == 1 else 0

    async def drop(self) -> None:
        """Close the connection; the next command makes another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)

    async def _ready(self) -> Any:
        connection = self._connection
        # One that the server closed while nobody used it: nothing was sent over it.
        if connection is not None and connection.transport.is_closing():
            await self.drop()
        if self._connection is None:
            self._connection = await connected(self._make_connection())
            self._made += 1
        return self._connection


async def connected(connection: Any) -> Any:
    """Connect and return a connection whose reads wait as long as it takes.

    Raises:
        UnreachableError: It could not be made.
    """
    connection.socket_timeout = None
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            await connection.connect()
    except BaseException as exc:
        await connection.disconnect(nowait=True)
        if isinstance(exc, Exception):
            why = str(exc) or type(exc).__name__
            raise UnreachableError(f"cannot connect to Redis: {why}") from exc
        raise
    return connection


async def reply_of(connection: Any) -> Any:
    """Return the next reply, a refusal as the exception that it is."""
    try:
        return await connection.read_response(disable_decoding=True)
    except ResponseError as exc:
        return exc


def _is_of_replica(reply: Any) -> bool:
    # Redis 6 wraps the refusal in the script's error.
    return isinstance(reply, ResponseError) and "read only replica" in str(reply)


def _number_of_replicas(info: Any) -> int:
    for line in info.splitlines() if isinstance(info, bytes) else ():
        name, _, value = line.partition(b":")
        if name == b"connected_slaves" and value.isdigit():
            return int(value)
    return 0

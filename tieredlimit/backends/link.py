"""One connection to Redis, over which an event loop's calls are pipelined.

Redis answers a connection's commands in the order in which it received them. Nothing is ever sent
twice: a call whose connection breaks may have run, and fails. What was not sent yet waits for the
next connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from redis.asyncio.connection import ConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from tieredlimit.backends.calls import Call, Calls
from tieredlimit.errors import BackendError

_CLOSED = "the connection to Redis was closed"


def connection_of(pool: ConnectionPool, **where: Any) -> Any:
    """Return a new connection of the pool's kind, outside the pool, that `Link` can drive.

    `where` are settings that differ from the pool's.
    """

    class Connection(pool.connection_class):  # type: ignore[misc, name-defined]  # known when run
        @property
        def transport(self) -> asyncio.WriteTransport:
            """What to write to, and to abort."""
            return self._writer.transport  # type: ignore[no-any-return]  # redis-py's is untyped

    return Connection(**{**pool.connection_kwargs, **where})


class Link:
    """Hold one connection, made when there is a call to send and made anew after it broke.

    Args:
        connect: Returns a new connection object of `connection_of`, not yet connected.
        greet: Run on each new connection before any call.
        calls: What is to be sent.
        in_flight: The most calls that may wait for their reply.
        connect_timeout: Seconds a connection may take to be made, however impatient callers are.
        stall_timeout: Seconds without a reply after which the connection is given up as dead.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        greet: Callable[[Any], Any],
        calls: Calls,
        *,
        in_flight: int,
        connect_timeout: float,
        stall_timeout: float,
    ) -> None:
        self._make_connection = connect
        self._greet = greet
        self._calls = calls
        self._in_flight = in_flight
        self._connect_timeout = connect_timeout
        self._stall_timeout = stall_timeout
        self._connection: Any = None
        self._transport: asyncio.WriteTransport | None = None
        self._reader: asyncio.Task[None] | None = None
        self._opening: asyncio.Task[None] | None = None
        self._soon: asyncio.Handle | None = None
        self._sent: deque[tuple[Call, float]] = deque()

    async def open(self) -> None:
        """Connect, if that has not been done; callers that give up leave the attempt running.

        Raises:
            BackendError: The server could not be reached.
        """
        if self._connection is not None:
            return
        opening = self._opening = self._opening or self._start_opening()
        await asyncio.wait([opening])
        if opening.cancelled():
            raise BackendError(_CLOSED)
        if error := opening.exception():
            # An error each: callers add their own traceback to it.
            raise BackendError(str(error)) from (error.__cause__ or error)

    def offer(self) -> None:
        """Send what waits, unless the calls in flight are enough or more is about to come."""
        if self._soon is None and len(self._sent) < self._in_flight:
            self.pump()

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._connection is not None

    @property
    def busy(self) -> bool:
        """Whether a call waits for its reply."""
        return bool(self._sent)

    def pump(self) -> None:
        """Send what waits, as far as there may be more in flight; connect first where needed."""
        transport, sent = self._transport, self._sent
        if transport is None:
            self._opening = self._opening or self._start_opening()
            return
        if transport.is_closing():
            # The reader has yet to hear of it. What waits was not sent: it gets another connection.
            self.drop("closed by the server")
            return
        while len(sent) < self._in_flight:
            call = self._calls.next_call()
            if call is None:
                return
            sent.append((call, asyncio.get_running_loop().time()))
            # Not drained: the few calls in flight fit any buffer.
            transport.write(call.command)

    def check_pulse(self) -> None:
        """Give the connection up if its oldest call has had no reply for too long."""
        if self._sent:
            waited = asyncio.get_running_loop().time() - self._sent[0][1]
            if waited > self._stall_timeout:
                self.drop(f"no reply for {waited:.1f} s")

    def drop(self, why: str) -> None:
        """Give the connection up: what was sent fails, what waits is sent over a new one."""
        if self._connection is not None:
            self._drop(self._connection, RedisConnectionError(why))

    async def close(self) -> None:
        """Close the connection for good; what was sent and what waits fails."""
        # First of all, so that nothing is left for which another connection would be made.
        self._calls.fail_waiting(_CLOSED)
        ending = [task for task in (self._opening, self._reader) if task is not None]
        if self._opening is not None:
            self._opening.cancel()
        connection = self._connection
        self.drop("closed")
        if ending:
            await asyncio.wait(ending)
        if connection is not None:
            # A reader that was cancelled before its first step has not done it.
            await connection.disconnect(nowait=True)

    def _pump_soon(self) -> None:
        self._soon = None
        if self._calls.waiting:
            self.pump()

    def _start_opening(self) -> asyncio.Task[None]:
        opening = asyncio.get_running_loop().create_task(self._open())
        opening.add_done_callback(self._opened)
        return opening

    async def _open(self) -> None:
        connection = None
        try:
            connection = self._make_connection()
            # Reads wait for calls, for as long as it takes: `check_pulse` is what bounds a reply.
            connection.socket_timeout = None
            async with asyncio.timeout(self._connect_timeout):
                await connection.connect()
                await self._greet(connection)
            transport = connection.transport
        except BaseException as exc:
            if connection is not None:
                await connection.disconnect(nowait=True)
            if isinstance(exc, Exception):
                why = str(exc) or type(exc).__name__
                raise BackendError(f"cannot connect to Redis: {why}") from exc
            raise
        self._connection = connection
        self._transport = transport
        self._reader = asyncio.get_running_loop().create_task(self._read(connection))

    def _opened(self, opening: asyncio.Task[None]) -> None:
        self._opening = None
        if opening.cancelled():
            self._calls.fail_waiting(_CLOSED)
        elif error := opening.exception():
            self._calls.fail_waiting(str(error), error.__cause__)
        elif self._calls.waiting:
            # Even if the connection broke already: then this makes another one.
            self.pump()

    async def _read(self, connection: Any) -> None:
        asked = False
        try:
            while True:
                try:
                    reply = await connection.read_response(disable_decoding=True)
                except ResponseError as exc:
                    reply = exc
                call, _ = self._sent[0]
                if call.asking and not asked:
                    asked = True  # this was the reply to that; the call's own is next
                    continue
                asked = False
                self._sent.popleft()
                wrong = self._calls.answer(call, reply)
                # Redis 6 wraps the refusal in the script's error.
                if isinstance(reply, ResponseError) and "read only replica" in str(reply):
                    # This was the primary once: the next call asks for the way again.
                    wrong = "the server became a replica"
                if wrong is not None:
                    self.drop(wrong)
                    return
                if self._soon is None:
                    # Whom the reply wakes up comes back within this turn of the loop, as a rule:
                    # sent after it, they share a call.
                    self._soon = asyncio.get_running_loop().call_soon(self._pump_soon)
        except asyncio.CancelledError as exc:
            if connection is self._connection:
                # Not by `_drop`: the event loop ends, and no task may be started any more.
                self._calls.fail_waiting(_CLOSED)
                self._drop(connection, exc)
            raise
        except Exception as exc:  # noqa: BLE001 -- redis-py's parsers raise all sorts for garbage
            # Also for a reply that nobody asked for: the order is lost, so is the connection.
            self._drop(connection, exc)
        finally:
            await connection.disconnect(nowait=True)

    def _drop(self, connection: Any, cause: BaseException) -> None:
        if self._connection is not connection or self._transport is None:
            return
        # Not closed: that would wait, for ever perhaps, until Redis has read what is unsent.
        self._transport.abort()
        self._connection = self._transport = None
        sent, self._sent = self._sent, deque()
        why = str(cause) or type(cause).__name__
        for call, _ in sent:
            self._calls.fail(call, f"the connection to Redis broke: {why}", cause)
        if self._reader is not None and self._reader is not asyncio.current_task():
            self._reader.cancel()
        self._reader = None
        if self._calls.waiting:
            self.pump()

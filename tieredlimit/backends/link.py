"""One connection to Redis, over which an event loop's calls are pipelined.

Redis answers a connection's commands in the order in which it received them. Nothing is ever sent
twice: a call whose connection breaks may have run, and fails. What was not sent yet waits for the
next connection.

redis-py makes a connection, with its TLS, user and database. Then its stream is taken over: between
a readable socket and the decisions that wait there is one callback, and no task.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from redis.asyncio.connection import ConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError

from tieredlimit.backends.backend import Reply
from tieredlimit.backends.breaker import Breaker
from tieredlimit.backends.call import Call
from tieredlimit.backends.calls import Calls
from tieredlimit.backends.replies import Answer, Refusal, read_replies
from tieredlimit.errors import BackendError

_CLOSED = "the connection to Redis was closed"


def connection_of(pool: ConnectionPool, **where: Any) -> Any:
    """Return a new connection of the pool's kind, outside the pool, that `Link` can take over.

    `where` are settings that differ from the pool's.
    """

    class Connection(pool.connection_class):  # type: ignore[misc, name-defined]  # known when run
        @property
        def transport(self) -> asyncio.WriteTransport:
            """What to abort, where waiting for the server is no option."""
            stream: Any = getattr(self, "_writer")  # noqa: B009 -- redis-py's has no known type
            return cast(asyncio.WriteTransport, stream.transport)

        def hand_over(self) -> asyncio.StreamWriter:
            """Give up the stream, which is somebody else's to close from now on."""
            stream: Any = getattr(self, "_writer")  # noqa: B009 -- redis-py's has no known type
            self._reader = self._writer = None
            return cast(asyncio.StreamWriter, stream)

        async def disconnect(self, nowait: bool = False, **given: Any) -> None:
            """Close it; with `nowait` at once, where TLS would go on to say goodbye."""
            if nowait and self.is_connected:
                self.transport.abort()
            await super().disconnect(nowait=nowait, **given)

    connection = Connection(**{**pool.connection_kwargs, **where})
    # No CLIENT SETINFO: two commands more for each connection, which no ACL for all servers from
    # Redis 6.2 on can allow by name.
    connection.driver_info = connection.lib_name = connection.lib_version = None
    return connection


class Line(asyncio.Protocol):
    """Hold the stream of a connection that was made, and read what comes over it.

    Args:
        stream: As redis-py made it; nothing is to be read from it any more.
        heard: Is given the replies that came, in their order.
        lost: Is told why the connection is of no use any more, once or more often.
    """

    def __init__(
        self,
        stream: asyncio.StreamWriter,
        heard: Callable[[Line, list[Answer]], None],
        lost: Callable[[Line, BaseException], None],
    ) -> None:
        # Kept: a writer that is forgotten closes its transport.
        self._stream = stream
        self._heard = heard
        self._lost = lost
        self._unread = b""
        self.transport = stream.transport
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport.set_protocol(self)

    def data_received(self, data: bytes) -> None:
        """Read the replies that are whole."""
        try:
            replies, self._unread = read_replies(self._unread + data if self._unread else data)
        except ValueError as exc:
            self._lost(self, exc)
        else:
            self._heard(self, replies)

    def connection_lost(self, exc: Exception | None) -> None:
        """Say so."""
        if not self.closed.done():
            self.closed.set_result(None)
        self._lost(self, exc or RedisConnectionError("closed by the server"))


class Link:
    """Hold one connection, made when there is a call to send and made anew after it broke.

    Args:
        connect: Returns a new connection object of `connection_of`, not yet connected.
        greet: Run on each new connection before any call.
        calls: What is to be sent.
        in_flight: How many writes may wait for their replies, each of one call or a few. One more
            of what only measures may, too.
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
        self.calls = calls
        self._in_flight = in_flight
        self._connect_timeout = connect_timeout
        self._stall_timeout = stall_timeout
        self._line: Line | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._opening: asyncio.Task[None] | None = None
        self._soon: asyncio.Handle | None = None
        self._sent: deque[tuple[Call, float]] = deque()
        self._flights = 0
        self._measures = False
        self._later: asyncio.Handle | None = None
        self._next_probe: asyncio.TimerHandle | None = None
        self._closed = False
        calls.opened = self._probe_later

    async def open(self) -> None:
        """Connect, if that has not been done; callers that give up leave the attempt running.

        Raises:
            BackendError: The server could not be reached.
        """
        if self._line is not None:
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
        if self._soon is None and self._flights < self._in_flight:
            self.pump()

    def offer_later(self) -> None:
        """Send what only measures: behind what is sent next, or else in the loop's next turn."""
        if self._later is None and not self._measures:
            self._later = asyncio.get_running_loop().call_soon(self._measure)

    @property
    def breakers(self) -> list[Breaker]:
        """What says whether the server is asked."""
        return [self.calls.breaker]

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._line is not None

    @property
    def busy(self) -> bool:
        """Whether a call waits for its reply."""
        return bool(self._sent)

    def pump(self) -> None:
        """Send what waits, as far as there may be more in flight; connect first where needed."""
        line, sent = self._line, self._sent
        if line is None:
            self._opening = self._opening or self._start_opening()
            return
        transport = line.transport
        if transport.is_closing():
            # We have yet to hear of it. What waits was not sent: it gets another connection.
            self.drop("closed by the server")
            return
        while self._flights < self._in_flight:
            flight = self.calls.next_flight(self._in_flight - self._flights)
            if not flight:
                break
            self._flights += 1
            flight[-1].lands = True
            now = asyncio.get_running_loop().time()
            sent.extend([(call, now) for call in flight])
            # Not drained: the few calls in flight fit any buffer.
            transport.write(b"".join([call.command for call in flight]))
        if self.calls.measuring:
            self._write_measuring(transport)

    def check_pulse(self) -> None:
        """Give the connection up if its oldest call has had no reply for too long."""
        if self._sent:
            waited = asyncio.get_running_loop().time() - self._sent[0][1]
            if waited > self._stall_timeout:
                self.drop(f"no reply for {waited:.1f} s")

    def drop(self, why: str) -> None:
        """Give the connection up: what was sent fails, what waits is sent over a new one."""
        if self._line is not None:
            self._drop(self._line, RedisConnectionError(why))

    async def close(self) -> None:
        """Close the connection for good; what was sent and what waits fails."""
        # First of all, so that nothing is left for which another connection would be made.
        self._closed = True
        self._stop_probing()
        self.calls.fail_waiting(_CLOSED)
        ending = [task for task in (self._opening, self._keeper) if task is not None]
        if self._opening is not None:
            self._opening.cancel()
        self.drop("closed")
        if ending:
            await asyncio.wait(ending)

    def _probe_later(self) -> None:
        """Find out in a moment whether the server is back; nobody waits for it."""
        self._stop_probing()
        if not self._closed:
            pause = self.calls.breaker.pause()
            self._next_probe = asyncio.get_running_loop().call_later(pause, self._probe)

    def _stop_probing(self) -> None:
        if self._next_probe is not None:
            self._next_probe.cancel()
            self._next_probe = None

    def _probe(self) -> None:
        self._next_probe = None
        if not self.calls.breaker.open:
            return  # the answer to an earlier call has closed it
        self.check_pulse()
        try:
            probe = self.calls.probe()
        except BackendError:  # as many wait as may
            self._probe_later()
            return
        probe.add_done_callback(self._probed)
        self.pump()

    def _probed(self, probe: asyncio.Future[Reply]) -> None:
        if probe.cancelled():
            return
        if probe.exception() is not None:
            self._probe_later()
        else:
            # Where a node of a cluster has sent it to another, that one has answered.
            self.calls.answered()

    def _pump_soon(self) -> None:
        self._soon = None
        if self.calls.waiting:
            self.pump()

    def _measure(self) -> None:
        self._later = None
        if not self.calls.measuring:
            return
        line = self._line
        if line is None or line.transport.is_closing():
            self.pump()
        else:
            # Not what else waits: whoever gave it has said when that is to be sent.
            self._write_measuring(line.transport)

    def _write_measuring(self, transport: asyncio.WriteTransport) -> None:
        """Send what only measures, unless that is on its way already: it takes nobody's turn."""
        calls = [] if self._measures else self.calls.next_measuring()
        if calls:
            self._measures = calls[-1].measured = True
            now = asyncio.get_running_loop().time()
            self._sent.extend([(call, now) for call in calls])
            transport.write(b"".join([call.command for call in calls]))

    def _start_opening(self) -> asyncio.Task[None]:
        opening = asyncio.get_running_loop().create_task(self._open())
        opening.add_done_callback(self._opened)
        return opening

    async def _open(self) -> None:
        connection = None
        try:
            connection = self._make_connection()
            async with asyncio.timeout(self._connect_timeout):
                await connection.connect()
                await self._greet(connection)
            line = Line(connection.hand_over(), self._heard, self._drop)
        except BaseException as exc:
            if connection is not None:
                await connection.disconnect(nowait=True)
            if isinstance(exc, Exception):
                why = str(exc) or type(exc).__name__
                raise BackendError(f"cannot connect to Redis: {why}") from exc
            raise
        self._line = line
        self._keeper = asyncio.get_running_loop().create_task(self._keep(line))

    def _opened(self, opening: asyncio.Task[None]) -> None:
        self._opening = None
        if opening.cancelled():
            self.calls.fail_waiting(_CLOSED)
        elif error := opening.exception():
            self.calls.fail_waiting(str(error), error.__cause__)
        elif self.calls.waiting:
            # Even if the connection broke already: then this makes another one.
            self.pump()

    async def _keep(self, line: Line) -> None:
        """Wait until a connection is closed, and close it where the event loop ends before."""
        try:
            await asyncio.shield(line.closed)
        except asyncio.CancelledError as exc:
            if line is self._line:
                # Before `_drop`: no connection may be made any more.
                self.calls.fail_waiting(_CLOSED)
                self._drop(line, exc)
            raise

    def _heard(self, line: Line, replies: list[Answer]) -> None:
        now = asyncio.get_running_loop().time()
        for reply in replies:
            if line is not self._line:
                return  # what came before was a reason to drop it
            if not self._sent:
                self._drop(line, RedisConnectionError("a reply that nobody asked for"))
                return
            call = self._sent[0][0]
            call.unheard -= 1
            if call.unheard:
                continue  # this was the reply to ASKING; the call's own is next
            _, sent_at = self._sent.popleft()
            self._flights -= call.lands
            self.calls.stats.observe(now - sent_at, len(call.decisions))
            if call.measured:
                self._measures = False
            wrong = self.calls.answer(call, reply)
            # Redis 6 wraps the refusal in the script's error.
            if isinstance(reply, Refusal) and "read only replica" in reply.text:
                # This was the primary once: the next call asks for the way again.
                wrong = "the server became a replica"
            if wrong is not None:
                self.drop(wrong)
                return
        if self._soon is None:
            # Whom the reply wakes up comes back within the next turn of the loop, as a rule: sent
            # after it, they share a call.
            self._soon = asyncio.get_running_loop().call_soon(self._pump_soon)

    def _drop(self, line: Line, cause: BaseException) -> None:
        # Not closed: that would wait, for ever perhaps, until Redis has read what is unsent.
        line.transport.abort()
        if self._line is not line:
            return
        self._line = None
        sent, self._sent = self._sent, deque()
        self._flights = 0
        self._measures = False
        why = str(cause) or type(cause).__name__
        now = asyncio.get_running_loop().time() if sent else 0.0
        for call, sent_at in sent:
            self.calls.stats.observe(now - sent_at, len(call.decisions))
            self.calls.fail(call, f"the connection to Redis broke: {why}", cause)
        if self.calls.waiting:
            self.pump()

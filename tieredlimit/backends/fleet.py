"""The nodes of a Redis Cluster as one event loop knows them: who serves which slot."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from redis.crc import key_slot

from tieredlimit._core.stamp import Stamp
from tieredlimit.backends.backend import Charge, Claim, Reply
from tieredlimit.backends.breaker import Breaker
from tieredlimit.backends.call import Call, Waiting, fail_all, tag_of
from tieredlimit.backends.calls import MAX_WAITING
from tieredlimit.backends.link import Link
from tieredlimit.backends.nodecalls import Address, NodeCalls
from tieredlimit.backends.replies import Refusal
from tieredlimit.backends.server import CONNECT_TIMEOUT, STALL_TIMEOUT, greet
from tieredlimit.errors import BackendError, UsageError

if TYPE_CHECKING:
    from tieredlimit.backends.cluster import ClusterBackend

IN_FLIGHT = 4
"""The most calls that may wait for their reply on one primary."""

MAX_REDIRECTIONS = 8
"""The most nodes in a row that may send a decision on to another."""

CLOSED = "the connection to the Redis Cluster was closed"

_SLOTS = 16_384
# Seconds to wait before a decision whose keys are between two nodes is sent again.
_TRY_AGAIN = 0.005
# Seconds between two looks at the cluster's slots, however many calls fail meanwhile.
_REFRESH_INTERVAL = 0.1
# What stands for a host that the node itself does not know: the one that it was asked at.
_NO_HOST = ("", "?")

_log = logging.getLogger("tieredlimit")


class Fleet:
    """Know which node serves which slot, in one event loop."""

    def __init__(self, backend: ClusterBackend) -> None:
        self.backend = backend
        self.ready = False
        self._owners: list[Address | None] = [None] * _SLOTS
        self._members: dict[Address, Member] = {}
        self._slots: dict[str, int] = {}
        self._opening: asyncio.Task[None] | None = None
        self._queueing = 0
        self._refreshing: asyncio.Task[None] | None = None
        self._best_informed: Address | None = None
        self._between: list[Waiting] = []
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        # Of learning which node serves which slot: without that nobody can be asked.
        self.breaker: Breaker = Breaker()
        self._next_look: asyncio.TimerHandle | None = None

    @property
    def breakers(self) -> list[Breaker]:
        """What says whether each primary is asked, and whether the slots are known."""
        return [self.breaker, *(member.calls.breaker for member in self._members.values())]

    async def open(self) -> None:
        """Learn the slots, if that has not been done; who gives up leaves the attempt running.

        Raises:
            BackendError: No node could be reached, or the namespace is laid out differently.
        """
        if self.ready:
            return
        if self._queueing >= MAX_WAITING:
            raise BackendError(f"{MAX_WAITING} decisions are waiting for Redis already")
        opening = self._start_opening()
        self._queueing += 1
        try:
            await asyncio.wait([opening])
        finally:
            self._queueing -= 1
        if opening.cancelled():
            raise BackendError(CLOSED)
        if (error := opening.exception()) is not None:
            # An error each: callers add their own traceback to it.
            raise BackendError(str(error)) from error.__cause__

    def add(
        self,
        charges: Sequence[Charge],
        stamp: Stamp | None = None,
        times: tuple[int, int] | None = None,
        claim: Claim | None = None,
    ) -> asyncio.Future[Any]:
        """Let a decision wait for the next call to the primary that has its keys.

        Raises:
            BackendError: No primary has, or too many decisions wait for it.
        """
        if self._closed:
            raise BackendError(CLOSED)
        member = self._member_of(tag_of(charges, stamp))
        future = member.calls.add(charges, stamp, times, claim)
        member.link.offer()
        return future

    def measure(
        self,
        charges: Sequence[Charge],
        stamp: Stamp | None = None,
        times: tuple[int, int] | None = None,
    ) -> asyncio.Future[Reply]:
        """Let a decision that only measures wait for what is sent next to its primary.

        Raises:
            BackendError: No primary has its keys, none is known yet, or too many wait for it.
        """
        if self._closed:
            raise BackendError(CLOSED)
        if not self.ready:
            _ = self._start_opening()
            raise BackendError("the nodes of the Redis Cluster are not known yet")
        member = self._member_of(tag_of(charges, stamp))
        future = member.calls.add(charges, stamp, times, shadow=True)
        member.link.offer_later()
        return future

    def redirect(self, call: Call, where: Refusal, source: Address) -> str | None:
        """Send a call's decisions to the node that a MOVED or an ASK names.

        Say what is wrong with it, None if nothing.
        """
        for one in call.decisions:
            one.redirected += 1
        if self._closed:
            fail_all(call.decisions, CLOSED, None)
            return None
        try:
            code, slot, address = _read_redirection(where.text, source[0])
        except ValueError:
            fail_all(call.decisions, f"Redis refused: {where.text}", None)
            return "a redirection to nowhere"
        circling = [one for one in call.decisions if one.redirected > MAX_REDIRECTIONS]
        fail_all(circling, f"more than {MAX_REDIRECTIONS} nodes sent a decision on", None)
        member = self._member(address)
        if code == "MOVED":
            self._owners[slot] = self._best_informed = address
            self.refresh_soon()
            member.calls.take_over(call.decisions)
        else:
            # Each alone: some keys of the call may be there, and others not.
            for one in call.decisions:
                member.calls.take_over([one], asking=True)
        member.link.pump()
        return None

    def try_again(self, call: Call) -> None:
        """Send decisions again whose keys were between two nodes: each alone, a little later."""
        if self._closed:
            fail_all(call.decisions, CLOSED, None)
            return
        self._between += call.decisions
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_TRY_AGAIN, self._send_again)

    def refresh_soon(self) -> None:
        """Look at the slots again, in a moment and not more than so often."""
        refreshing = self._refreshing is not None and not self._refreshing.done()
        if not refreshing and not self._closed:
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh())

    async def greet(self, connection: Any, address: Address) -> None:
        """Get a connection ready; the primary that has a namespace's record is asked for it."""
        held = {
            namespace: layout
            for namespace, layout in self.backend.namespaces.items()
            if self._owners[key_slot(namespace.encode())] == address
        }
        try:
            await greet(connection, self.backend.server_clock, held)
        except UsageError:
            self.ready = False  # on the other nodes, too
            raise

    def check_pulses(self) -> None:
        """Give up the connections that are dead."""
        # All: what was redirected expires where it arrived first.
        for member in self._members.values():
            member.link.check_pulse()

    async def close(self) -> None:
        """Close all connections; what waits fails."""
        self._closed = True
        if self._next_look is not None:
            self._next_look.cancel()
        if self._timer is not None:
            self._timer.cancel()
        fail_all(self._between, CLOSED, None)
        tasks = [task for task in (self._opening, self._refreshing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(member.link.close() for member in self._members.values()))

    def _send_again(self) -> None:
        self._timer = None
        decisions, self._between = self._between, []
        for one in decisions:
            # The wait bounds how often this may go on, until the decision's deadline.
            one.redirected = 0
            try:
                member = self._member_of(tag_of(one.charges, one.stamp))
            except BackendError as exc:
                fail_all([one], str(exc), exc)
                continue
            member.calls.take_over([one])
            member.link.pump()

    def _member_of(self, tag: str) -> Member:
        """Return the primary that serves a hash tag.

        Raises:
            BackendError: No primary does.
        """
        slot = self._slots.get(tag)
        if slot is None:
            if len(self._slots) >= _SLOTS:
                self._slots.clear()
            slot = self._slots[tag] = key_slot(tag.encode())
        address = self._owners[slot]
        if address is None:
            self.refresh_soon()
            raise BackendError(f"no node of the Redis Cluster serves slot {slot}")
        return self._member(address)

    def _member(self, address: Address) -> Member:
        member = self._members.get(address)
        if member is None:
            member = self._members[address] = Member(self, address)
        return member

    def _start_opening(self) -> asyncio.Task[None]:
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(self._open())
            self._opening.add_done_callback(self._opened)
        return self._opening

    async def _open(self) -> None:
        await self._learn_slots()
        for address in dict.fromkeys(self._owners):
            if address is not None:
                self._member(address).link.pump()  # connect, so that no decision has to wait for it
        for namespace in self.backend.namespaces:
            address = self._owners[key_slot(namespace.encode())]
            if address is None:
                continue
            try:
                await self._member(address).link.open()
            except BackendError as exc:
                if isinstance(exc.__cause__, UsageError):
                    raise
                # The other nodes can serve; the record is compared once this one is back.
                _log.warning("tieredlimit: %s; trying again with each decision", exc)
        self.ready = True

    def _opened(self, opening: asyncio.Task[None]) -> None:
        self._opening = None
        if opening.cancelled() or self._closed:
            return
        error = opening.exception()  # whoever still waits has it; nobody else needs a warning
        if error is None:
            if self.breaker.answered():
                _log.warning("tieredlimit: the Redis Cluster answers again, and is asked again")
        else:
            self.late(str(error))
            if self.breaker.open:
                self._look_later()

    def late(self, why: str) -> None:
        """Count a decision that failed because the slots are not known."""
        self.backend.call_stats.failures += 1
        if self.breaker.failed(why) and not self._closed:
            _log.warning("tieredlimit: the Redis Cluster is not asked any more: %s", why)
            if self._opening is None:
                self._look_later()

    def _look_later(self) -> None:
        if self._next_look is not None:
            self._next_look.cancel()
        pause = self.breaker.pause()
        self._next_look = asyncio.get_running_loop().call_later(pause, self._look)

    def _look(self) -> None:
        self._next_look = None
        if self.breaker.open and not self._closed:
            _ = self._start_opening()

    async def _refresh(self) -> None:
        try:
            await self._learn_slots()
        except BackendError as exc:
            _log.debug("tieredlimit: %s", exc)
        await asyncio.sleep(_REFRESH_INTERVAL)
        serving = set(self._owners)
        left = [address for address in self._members if address not in serving]
        busy = False
        for address in left:
            # Looked at one by one: while one closes, a redirection may give another work.
            if self._members[address].busy:
                busy = True
            else:
                await self._members.pop(address).link.close()
        self._refreshing = None
        if busy:
            self.refresh_soon()

    async def _learn_slots(self) -> None:
        """Ask the nodes one after the other, until one tells.

        Raises:
            BackendError: None did.
        """
        first = [] if self._best_informed is None else [self._best_informed]
        connected = [address for address, one in self._members.items() if one.link.connected]
        nodes = [*first, *connected, *self.backend.seeds, *self._members]
        why: Exception = BackendError("no node is known")
        for address in dict.fromkeys(nodes):
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT):
                    self._owners = await self._ask_slots(address)
            except Exception as exc:  # noqa: BLE001 -- redis-py's parsers raise all sorts for garbage
                why = exc
            else:
                return
        raise BackendError(
            f"cannot connect to the Redis Cluster: {str(why) or type(why).__name__}"
        ) from why

    async def _ask_slots(self, address: Address) -> list[Address | None]:
        connection = self.backend.connection_to(address)
        try:
            await connection.connect()
            await connection.send_command("CLUSTER", "SLOTS")
            told = await connection.read_response(disable_decoding=True)
        finally:
            await connection.disconnect(nowait=True)
        owners: list[Address | None] = [None] * _SLOTS
        for first, last, (told_host, port, *_), *_ in told:
            host = (told_host or b"").decode()
            owner = (host if host not in _NO_HOST else address[0], port)
            owners[first : last + 1] = [owner] * (last + 1 - first)
        if not told:
            raise BackendError(f"{address[0]}:{address[1]} knows of no slots")
        return owners


class Member:
    """Hold the connection to one primary and what waits for it."""

    def __init__(self, fleet: Fleet, address: Address) -> None:
        backend = fleet.backend
        self.calls: NodeCalls = NodeCalls(fleet, address)
        self.link: Link = Link(
            lambda: backend.connection_to(address),
            lambda connection: fleet.greet(connection, address),
            self.calls,
            in_flight=IN_FLIGHT,
            connect_timeout=CONNECT_TIMEOUT,
            # Not while somebody may still be waiting for a reply, however patient.
            stall_timeout=max(STALL_TIMEOUT, backend.timeout),
        )

    @property
    def busy(self) -> bool:
        """Whether anybody waits for it."""
        return self.calls.waiting or self.link.busy


def _read_redirection(text: str, own_host: str) -> tuple[str, int, Address]:
    """Return the code, the slot and the node of `MOVED 3999 127.0.0.1:6381` and the like.

    Raises:
        ValueError: It is not of that form.
    """
    code, slot, address = text.split()
    host, _, port = address.rpartition(":")
    if not 0 <= int(slot) < _SLOTS or not 0 < int(port) < 65_536:
        raise ValueError(text)
    return code, int(slot), (own_host if host in _NO_HOST else host, int(port))

"""Commands to one server or to the nodes of a cluster, for what is not in a hurry.

Nothing that may have run is sent again: only a redirection, which proves that nothing did, or a
node that could not even be reached, sends a command elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from redis.crc import key_slot
from redis.exceptions import AskError, MovedError, TryAgainError

from tieredlimit.backends.perloop import PerLoop
from tieredlimit.backends.wire import Command, UnreachableError, Wire, connected
from tieredlimit.errors import BackendError

if TYPE_CHECKING:
    from tieredlimit.backends.nodecalls import Address

_MAX_REDIRECTIONS = 8
# Seconds that what all share may take, however patient: a dead connection is in everybody's way.
_SHARED_TIMEOUT = 2.0
# Seconds to wait before a command whose keys are between two nodes is sent again.
_TRY_AGAIN = 0.01
# What stands for a host that the node itself does not know: the one that it was asked at.
_NO_HOST = ("", "?")


@dataclass(frozen=True, slots=True)
class Route:
    """Say how to get to the servers.

    Attributes:
        connect: Returns a new connection to a node, not yet connected; None is the only server.
        seeds: Nodes of a cluster that know the rest; none where there is one server.
    """

    connect: Callable[[Address | None], Any]
    seeds: tuple[Address, ...] = ()


class Nodes:
    """Hold a connection to each node that was asked, in one event loop.

    Which node has a key is learned from those that say that they have it not.

    Args:
        route: How to get to the servers.
        timeout: Seconds that commands may take, connecting and redirections included.
        owners: Which node has a slot, as far as is known; shared, and added to.
    """

    def __init__(self, route: Route, timeout: float, owners: dict[int, Address]) -> None:
        self._route = route
        self._timeout = timeout
        self._wires: dict[Address | None, Wire] = {}
        self._owners = owners
        self._served: set[Address | None] = set()

    async def ask(self, key: str, *words: str | bytes | int) -> Any:
        """Run a command where its key is and return the reply.

        Raises:
            BackendError: The node refused, did not answer in time or cannot be reached.
        """
        (reply,) = await self.ask_all([(key, words)])
        if isinstance(reply, BackendError):
            raise reply
        return reply

    async def ask_all(self, asked: Sequence[tuple[str, Sequence[str | bytes | int]]]) -> list[Any]:
        """Run commands, each where its key is; return their replies, or their BackendErrors."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        commands = [tuple(_encoded(word) for word in words) for _, words in asked]
        slots = [key_slot(key.encode()) if self._route.seeds else 0 for key, _ in asked]
        replies: list[Any] = [None] * len(asked)
        away: dict[Address | None, UnreachableError] = {}
        todo = {i: (self._address_of(slots[i], away), False) for i in range(len(asked))}
        redirections = 0
        while todo and redirections < _MAX_REDIRECTIONS and loop.time() < deadline:
            again: dict[int, tuple[Address | None, bool]] = {}
            for i, address, reply in await self._ask_nodes(todo, commands, deadline):
                replies[i] = reply
                if isinstance(reply, UnreachableError):
                    away[address] = reply
                    self._forget(address)
                    elsewhere = self._address_of(slots[i], away)
                    if elsewhere not in away:
                        again[i] = elsewhere, False
                elif isinstance(reply, AskError) and address is not None:
                    target = (reply.host if reply.host not in _NO_HOST else address[0], reply.port)
                    if target in away:
                        replies[i] = _again(away[target])
                        continue
                    if isinstance(reply, MovedError):
                        self._owners[slots[i]] = target
                    again[i] = target, not isinstance(reply, MovedError)
                elif isinstance(reply, TryAgainError):
                    again[i] = address, False
            todo = again
            if any(isinstance(replies[i], TryAgainError) for i in todo):
                await asyncio.sleep(_TRY_AGAIN)
            else:
                redirections += 1
        return [_translated(reply) for reply in replies]

    async def replicas(self) -> int:
        """Wait up to 1 s for all replicas of the nodes that served; return the fewest that follow.

        A node that would not say counts as one without.
        """
        counts = await asyncio.gather(
            *(self._wires[address].replicas(patience=self._timeout) for address in self._served)
        )
        return min(counts, default=0)

    async def connect(self, key: str) -> Any:
        """Return a connection of the caller's own, to the node that has a key as far as is known.

        Raises:
            BackendError: No node can be reached.
        """
        away: dict[Address | None, UnreachableError] = {}
        slot = key_slot(key.encode()) if self._route.seeds else 0
        while (address := self._address_of(slot, away)) not in away:
            try:
                return await connected(self._route.connect(address))
            except UnreachableError as exc:
                away[address] = exc
                self._forget(address)
        raise away[address]

    async def close(self) -> None:
        """Close all connections."""
        # Not gathered: where this is cancelled, tasks that had not begun would close nothing.
        for wire in list(self._wires.values()):
            await wire.drop()

    def _forget(self, address: Address | None) -> None:
        # Of a copy: event loops in other threads may add to it.
        for slot, owner in self._owners.copy().items():
            if owner == address:
                self._owners.pop(slot, None)

    def _address_of(self, slot: int, away: Iterable[Address | None]) -> Address | None:
        """Return the node to ask; one that is `away` where there is no other."""
        if not self._route.seeds:
            return None
        known = [self._owners[slot]] if slot in self._owners else []
        known += [address for address in self._wires if address is not None]
        known += [*self._route.seeds, *set(self._owners.copy().values())]
        return next((address for address in known if address not in away), known[0])

    async def _ask_nodes(
        self,
        todo: dict[int, tuple[Address | None, bool]],
        commands: list[Command],
        deadline: float,
    ) -> list[tuple[int, Address | None, Any]]:
        """Send each node its commands in one go, all nodes at once."""
        batches: dict[Address | None, list[tuple[int, bool]]] = {}
        for i, (address, asking) in todo.items():
            batches.setdefault(address, []).append((i, asking))

        async def ask(address: Address | None, batch: list[tuple[int, bool]]) -> list[Any]:
            if address not in self._wires:
                self._wires[address] = Wire(lambda: self._route.connect(address))
            sent: list[Command] = []
            for i, asking in batch:
                sent += [(b"ASKING",), commands[i]] if asking else [commands[i]]
            try:
                told = iter(await self._wires[address].ask(sent, deadline))
            except BackendError as exc:
                # An error each: callers add their own traceback to it.
                return [(i, address, _again(exc)) for i, _ in batch]
            answers = [
                (i, address, (next(told), next(told))[1] if asking else next(told))
                for i, asking in batch
            ]
            if not all(isinstance(reply, Exception) for _, _, reply in answers):
                self._served.add(address)
            return answers

        answers = await asyncio.gather(*(ask(address, batch) for address, batch in batches.items()))
        return [answer for of_node in answers for answer in of_node]


class Sessions:
    """Give each event loop connections of its own."""

    def __init__(self, route: Route, timeout: float) -> None:
        self._route = route
        self._timeout = timeout
        self._owners: dict[int, Address] = {}
        shared = min(timeout, _SHARED_TIMEOUT)
        self._nodes = PerLoop(lambda: Nodes(route, shared, self._owners))

    def nodes(self) -> Nodes:
        """Return those that the running event loop keeps."""
        return self._nodes.here()

    @asynccontextmanager
    async def own_nodes(self) -> AsyncIterator[Nodes]:
        """Give some that nobody else uses: WAIT holds them up, and speaks for them alone."""
        nodes = Nodes(self._route, self._timeout, self._owners)
        try:
            yield nodes
        finally:
            await nodes.close()

    async def close(self) -> None:
        """Close the running event loop's connections."""
        nodes = self._nodes.pop()
        if nodes is not None:
            await nodes.close()


def _encoded(word: str | bytes | int) -> bytes:
    """Return a word of a command as bytes, whatever encoding a client was given."""
    return word if isinstance(word, bytes) else str(word).encode()


def _again(error: BackendError) -> BackendError:
    another = type(error)(str(error))
    another.__cause__ = error.__cause__
    return another


def _translated(reply: Any) -> Any:
    if isinstance(reply, Exception) and not isinstance(reply, BackendError):
        error = BackendError(f"Redis refused: {reply}")
        error.__cause__ = reply
        return error
    return reply

"""A worker of the audit: callers that ask for everything at once, and note what became of it.

    python -m benchmarks.audit_worker FOLDER NUMBER SEED URL
    python -m benchmarks.audit_worker FOLDER NUMBER SEED sentinel:NAME:PORT,PORT,...

It goes on until SIGTERM, or SIGKILL. What it notes are the decisions of a `Limiter`, with the
instants that the server says; for the ends, which the server answers without one, these are asked
for in the same transaction.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from benchmarks.audit_limits import ACCOUNTS, ESTIMATE, FEATURES, policy, tier_of
from benchmarks.audit_log import (
    ADMITTED,
    ASKED,
    CALLERS,
    DENIED,
    FAILED,
    NOBODY,
    RELEASE,
    RENEW,
    SETTLE,
    End,
    Files,
    Log,
    Take,
)
from tieredlimit import Account, BackendError, Decision, Limiter
from tieredlimit.backends import Charge, RedisBackend, Reply
from tieredlimit.backends.backend import Claim, Claimed
from tieredlimit.backends.control import holds_of
from tieredlimit.backends.nodes import Nodes
from tieredlimit.backends.perloop import PerLoop
from tieredlimit.backends.redis_holds import RedisHolds, _Queue

TIMEOUT = 5.0
NAMESPACE = "audit"

# How many ends a caller puts off before it comes to the first of them.
_PUT_OFF = 3
_COSTS = (1, 1, 1, 2)
# Seconds until a caller asks again that got no answer.
_OUTAGE_PAUSE = 0.02
_NOT_ASKED, _NO_ANSWER = 0, -1

_told: ContextVar[int] = ContextVar("told")
"""The instant of the running take on the server's clock, or that there is none."""


class TellingBackend(RedisBackend):
    """Tell the instant of each decision, and note that it is asked for.

    Attributes:
        seen: The latest instant that the server has told.
    """

    seen = 0

    def __init__(self, client: Redis, log: Log) -> None:
        super().__init__(client, timeout=TIMEOUT)
        self._log = log

    async def take(self, charges: Sequence[Charge], *more: Any) -> Reply:
        """Do what `RedisBackend.take` does."""
        if not charges:
            return await super().take(charges, *more)  # only compares the revision
        self._ask()
        reply = await super().take(charges, *more)
        self._answered(reply.now)
        return reply

    async def claim(self, charges: Sequence[Charge], claim: Claim, *more: Any) -> Claimed:
        """Do what `RedisBackend.claim` does."""
        self._ask()
        reply = await super().claim(charges, claim, *more)
        self._answered(reply.now)
        return reply

    def _ask(self) -> None:
        self._log.take(Take(ASKED))
        _told.set(_NO_ANSWER)

    def _answered(self, now: int) -> None:
        self.seen = max(self.seen, now)
        _told.set(now)


class BracketedNodes:
    """Run commands in one transaction, between two looks at the server's clock.

    Attributes:
        bracket: Both instants of the latest commands. They stand until whoever waited for these
            has been woken up: the next reply comes in a later turn of the event loop.
    """

    bracket = (0, 0)

    def __init__(self, nodes: Callable[[], Nodes]) -> None:
        self._nodes = nodes

    async def ask_all(self, asked: Sequence[tuple[str, Sequence[str | bytes | int]]]) -> list[Any]:
        """Do what `Nodes.ask_all` does."""
        key = asked[0][0]
        time = (key, ("TIME",))
        words = [(key, ("MULTI",)), time, *asked, time, (key, ("EXEC",))]
        told = (await self._nodes().ask_all(words))[-1]
        if isinstance(told, BackendError):
            return [BackendError(str(told)) for _ in asked]
        first, *replies, last = told
        self.bracket = _microseconds(first), _microseconds(last)
        return [_refused(one) if isinstance(one, Exception) else one for one in replies]


class TimedHolds(RedisHolds):
    """Settle, renew and release as `RedisHolds` does, and know when the server did."""

    def __init__(self, holds: RedisHolds) -> None:
        self._clock = holds._clock
        self._sessions = holds._sessions
        self._nodes = BracketedNodes(self._sessions.nodes)
        nodes: Any = self._nodes
        self._queues = PerLoop(lambda: _Queue(lambda: nodes))

    @property
    def bracket(self) -> tuple[int, int]:
        """The server's instants around what was answered in this turn of the event loop."""
        return self._nodes.bracket


def _microseconds(time: Sequence[bytes | str]) -> int:
    return int(time[0]) * 1_000_000 + int(time[1])


def _refused(reply: Exception) -> BackendError:
    error = BackendError(str(reply))
    error.__cause__ = reply  # by which a script is known to be missing
    return error


class Worker:
    """Ask, and note."""

    def __init__(self, client: Redis, log: Log, seed: str) -> None:
        self._log = log
        self._random = random.Random(seed)
        self._backend = TellingBackend(client, log)
        self._limiter = Limiter(policy(), self._backend, namespace=NAMESPACE)
        holds = holds_of(self._backend)
        if not isinstance(holds, RedisHolds):
            raise TypeError(f"the ends of takes are looked after by {holds!r}")
        self._holds = TimedHolds(holds)
        self._limiter.leases._holds = self._holds
        self._accounts = [Account(f"account-{i}", plan=tier_of(i)) for i in range(ACCOUNTS)]
        self._shares = [feature.share for feature in FEATURES]
        self._remembered = 0
        self._ends = 0
        self.stopping = asyncio.Event()

    async def work(self) -> None:
        """Let all callers ask until it is time to stop."""
        async with self._limiter, asyncio.TaskGroup() as callers:
            for _ in range(CALLERS):
                callers.create_task(self._call())

    async def _call(self) -> None:
        later: deque[Callable[[], Awaitable[None]]] = deque()
        chosen = self._random
        while not self.stopping.is_set():
            # Some accounts are asked for far more often than others.
            account = int(ACCOUNTS * chosen.random() ** 2)
            (feature,) = chosen.choices(range(len(FEATURES)), self._shares)
            await self._take(account, feature, later)
            if len(later) > _PUT_OFF:
                await later.popleft()()

    async def _take(
        self, account: int, feature: int, later: deque[Callable[[], Awaitable[None]]]
    ) -> None:
        """Take once; what is to be done about it afterwards is put off."""
        asked = FEATURES[feature]
        cost = ESTIMATE if asked.settled else self._random.choice(_COSTS)
        _told.set(_NOT_ASKED)
        settle: Callable[[int], Awaitable[bool]] | None = None
        if asked.settled:
            reservation = self._limiter.reserve(self._accounts[account], asked.name, cost)
            decision = await reservation.take()
            settle = reservation.settle
        else:
            decision = await self._limiter.take(self._accounts[account], asked.name, cost)
        now = _told.get()
        if decision.reason == "outage":
            await asyncio.sleep(_OUTAGE_PAUSE)
        elif now == _NOT_ASKED and not decision.allowed:
            self._remembered += 1
            await asyncio.sleep(0)  # the others have had no turn meanwhile
        if now == _NOT_ASKED and not decision.allowed:
            return
        taken = decision.taken if decision.allowed and (asked.settled or asked.slots) else None
        id_ = NOBODY if taken is None else taken.id
        outcome = ADMITTED if decision.allowed else FAILED if now < 0 else DENIED
        note = Take(outcome, feature, account, cost, self._remembered, max(now, 0), id_)
        self._log.take(note)
        if outcome == ADMITTED and settle is not None and self._random.random() < 0.8:
            actual = self._random.randint(0, ESTIMATE + 1)
            later.append(partial(self._end, SETTLE, note, partial(settle, actual), actual))
        elif outcome == ADMITTED and decision.lease is not None:
            later.extend(self._leased(note, decision))

    def _leased(self, note: Take, decision: Decision) -> list[Callable[[], Awaitable[None]]]:
        """Return what is to be done about a lease: half of them are left to run out."""
        lease, chosen = decision.lease, self._random
        ends = []
        if lease is not None and chosen.random() < 0.3:
            ends.append(partial(self._end, RENEW, note, lease.renew))
        if lease is not None and chosen.random() < 0.5:
            ends.append(partial(self._end, RELEASE, note, lease.release))
        return list(ends)

    async def _end(
        self, kind: int, take: Take, work: Callable[[], Awaitable[bool]], actual: int = 0
    ) -> None:
        number = self._ends = self._ends + 1
        _, feature, account, cost, _, _, id_ = take
        # Not before what was answered so far, or a release seems to precede its lease's renewal.
        seen = max(self._backend.seen, self._holds.bracket[1])
        note = End(0, kind, 0, feature, account, cost, actual, number, seen, seen, id_)
        self._log.end(note)
        try:
            done = await work()
        except BackendError:
            return  # nobody knows whether it happened, as if this process had been killed
        first, last = self._holds.bracket
        self._log.end(note._replace(answered=1, done=int(done), first=first, last=last))


def client_of(target: str, name: str) -> Redis:
    """Return a client of a URL, or of the primary that sentinels name."""
    options: dict[str, Any] = {
        "retry": Retry(NoBackoff(), 0),
        "socket_connect_timeout": 1.0,
        "client_name": name,
    }
    if not target.startswith("sentinel:"):
        client: Redis = Redis.from_url(target, **options)
        return client
    _, primary, ports = target.split(":")
    sentinel: Any = Sentinel(  # type: ignore[no-untyped-call]  # redis-py's is untyped
        [("127.0.0.1", int(port)) for port in ports.split(",")],
        sentinel_kwargs={"retry": Retry(NoBackoff(), 0), "socket_timeout": 1.0},
    )
    watched: Redis = sentinel.master_for(primary, **options)
    return watched


async def main(folder: str, number: str, seed: str, target: str) -> None:
    """Work until SIGTERM."""
    log = Log(Files.of(Path(folder), int(number)))
    client = client_of(target, f"audit-{number}")
    worker = Worker(client, log, f"{seed}:{number}")
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stopping.set)
    await worker.work()
    await client.aclose()
    log.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

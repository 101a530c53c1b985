"""What waits for one primary of a Redis Cluster."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tieredlimit._core.stamp import Stamp
from tieredlimit.backends.backend import Charge, Claim, NotAskedError
from tieredlimit.backends.call import (
    MAX_DECISIONS,
    MAX_KEYS,
    Call,
    Waiting,
    fail_all,
    gather,
    tag_of,
)
from tieredlimit.backends.calls import MAX_WAITING, MIN_SHARE, Calls
from tieredlimit.backends.replies import Answer, Refusal
from tieredlimit.backends.server import take_script

if TYPE_CHECKING:
    from tieredlimit.backends.fleet import Fleet

Address = tuple[str, int]


class NodeCalls(Calls):
    """Gather decisions into calls of one hash tag each, and follow redirections."""

    def __init__(self, fleet: Fleet, address: Address) -> None:
        backend = fleet.backend
        super().__init__(
            take_script(),
            clock=backend.server_clock.explicit,
            timeout=backend.timeout,
            learn_clock=backend.server_clock.learn,
            expired=fleet.check_pulses,
            stats=backend.call_stats,
        )
        self._fleet = fleet
        self._address = address
        self._redirected: deque[tuple[list[Waiting], bool, bool]] = deque()
        self._by_tag: dict[str, deque[Waiting]] = {}
        self._sorted = 0

    def add(
        self,
        charges: Sequence[Charge],
        stamp: Stamp | None = None,
        times: tuple[int, int] | None = None,
        claim: Claim | None = None,
        *,
        shadow: bool = False,
        probes: bool = False,
    ) -> asyncio.Future[Any]:
        """Let a decision wait for the next call of its tag; as `Calls.add`.

        Raises:
            BackendError: Too many wait already, or the decision has too many keys.
        """
        if not shadow and self._sorted + len(self._queue) >= MAX_WAITING:
            raise NotAskedError(f"{MAX_WAITING} decisions are waiting for Redis already")
        return super().add(charges, stamp, times, claim, shadow=shadow, probes=probes)

    def take_over(
        self, decisions: list[Waiting], *, asking: bool = False, again: bool = False
    ) -> None:
        """Send decisions that were refused elsewhere, as one call and before all others."""
        if len(self._redirected) >= MAX_WAITING:
            fail_all(decisions, f"{MAX_WAITING} decisions are waiting for Redis already", None)
        else:
            self._redirected.append((decisions, asking, again))

    @property
    def waiting(self) -> bool:
        """Whether there is something to send."""
        return bool(self._redirected or self._by_tag) or super().waiting

    def next_flight(self, slots: int) -> list[Call]:
        """Return calls of as many tags as one call may carry decisions; so many writes follow."""
        waiting = len(self._queue) + self._sorted
        share = min(MAX_DECISIONS, max(MIN_SHARE, -(-waiting // slots)))
        flight: list[Call] = []
        decisions = keys = 0
        while decisions < share and keys < MAX_KEYS and (call := self.next_call()) is not None:
            flight.append(call)
            decisions += len(call.decisions)
            keys += sum([one.keys for one in call.decisions])
        return flight

    def next_call(self, slots: int = 1) -> Call | None:  # noqa: ARG002 -- a flight has its share
        """Return the next call to send, None if nobody waits; the tags take turns."""
        while self._redirected:
            waiting, asking, again = self._redirected.popleft()
            decisions = [one for one in waiting if not one.future.done()]
            if decisions:
                return self._call(decisions, again=again, asking=asking)
        call = self._call_again()
        if call is not None:
            return call
        while self._queue:
            one = self._queue.popleft()
            if not one.future.done():
                tag = tag_of(one.charges, one.stamp)
                self._by_tag.setdefault(tag, deque()).append(one)
                self._sorted += 1
        while self._by_tag:
            tag = next(iter(self._by_tag))
            queue = self._by_tag.pop(tag)
            before = len(queue)
            decisions = gather(queue)
            self._sorted -= before - len(queue)
            if queue:
                self._by_tag[tag] = queue
            if decisions:
                return self._call(decisions, again=False)
        return None

    def next_measuring(self) -> list[Call]:
        """Return the calls to write next that only measure: each of one tag and one revision."""
        by_tag: dict[str, deque[Waiting]] = {}
        for _ in range(min(len(self.measuring), MAX_DECISIONS)):
            one = self.measuring.popleft()
            by_tag.setdefault(tag_of(one.charges, one.stamp), deque()).append(one)
        calls = []
        for queue in by_tag.values():
            while decisions := gather(queue):
                calls.append(self._call(decisions, again=False, measures=True))
        return calls

    def answer(self, call: Call, reply: Answer) -> str | None:
        """Give each decision its part of the reply, or send it where the node says."""
        code = reply.code if isinstance(reply, Refusal) else ""
        # All of these prove that nothing ran.
        if isinstance(reply, Refusal) and code in ("MOVED", "ASK"):
            return self._fleet.redirect(call, reply, self._address)
        if code == "TRYAGAIN":
            self._fleet.try_again(call)
        elif code == "NOSCRIPT" and call.asking and not call.again:
            self.take_over(call.decisions, asking=True, again=True)
        else:
            return super().answer(call, reply)
        return None

    def fail(self, call: Call, why: str, cause: BaseException | None = None) -> None:
        """Fail every decision of a call; whoever serves its slot may have changed."""
        self._look_around(cause)
        super().fail(call, why, cause)

    def fail_waiting(self, why: str, cause: BaseException | None = None) -> None:
        """Fail every decision that waits for a call; as `fail`."""
        self._look_around(cause)
        waiting = [one for decisions, _, _ in self._redirected for one in decisions]
        waiting += [one for queue in self._by_tag.values() for one in queue]
        self._redirected.clear()
        self._by_tag.clear()
        self._sorted = 0
        if fail_all(waiting, why, cause) and isinstance(cause, Exception):
            self.failed(why, waiting[-1:])
        super().fail_waiting(why, cause)

    def _look_around(self, cause: BaseException | None) -> None:
        # Not where we are closed or cancelled: an event loop that ends must not start any task.
        if isinstance(cause, Exception):
            self._fleet.refresh_soon()

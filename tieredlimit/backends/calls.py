"""Concurrent decisions share calls.

Under load the Python client is the cost, not Redis: writing a command, parsing a reply and waking
a task take longer than the script does for a decision. So what arrives while calls are in flight
waits for the next one and travels together; an idle limiter sends a decision at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from struct import pack
from typing import Any, Final, Literal

from tieredlimit._core.keys import nameless, probe_key
from tieredlimit._core.quota import Quota
from tieredlimit._core.shelf import Shelf
from tieredlimit._core.stamp import Stamp, prepared_for
from tieredlimit._core.tally import CallStats
from tieredlimit.backends.backend import Charge, Claim, Claimed, NotAskedError, Reply, StaleError
from tieredlimit.backends.breaker import Breaker
from tieredlimit.backends.call import (
    ASKING,
    Call,
    Script,
    Waiting,
    bulk,
    fail_all,
    gather,
    tag_of,
)
from tieredlimit.backends.replies import Answer, Refusal
from tieredlimit.errors import BackendError

MIN_SHARE = 16
"""Decisions for which a call of their own is worth its cost."""
MAX_KEYS_OF_ONE = 65_535
"""The most keys of one decision, as the script counts them."""
MAX_WAITING = 10_000
"""The most decisions that may wait for a call; further ones fail at once."""
MAX_MEASURING = 1_000
"""The same for those that only measure."""

_PROBE_TAG = "tieredlimit"
# A token each millisecond: what it leaves behind is gone at once.
_PROBED = Shelf((Quota("probe", "1000/second", 1_000, 1_000),), None, "", catch_all=False)

_log = logging.getLogger("tieredlimit")

# What the script says instead of decisions.
_STALE: Final[dict[int, Literal["newer", "other", "time"]]] = {2: "newer", 3: "other", 4: "time"}

# From a readable socket to a reply that is given out: the parser, then the reader's task.
_TURNS = 3
# Seconds by which a timer must be late for the event loop to have been busy.
_BUSY = 0.01


class Calls:
    """Gather the decisions of an event loop into calls, in order of arrival.

    A decision fails at its own deadline, counted from its arrival, whatever becomes of its call. A
    caller that gives up leaves the others alone: before its call is made it is left out of it,
    afterwards its part of the reply is dropped.

    Decisions that only measure wait apart and travel behind the others, in calls of their own: not
    even what Redis refuses to do for them may be in the others' way.

    Args:
        script: What decides.
        clock: Returns the instant to decide by, None for the server's time.
        timeout: Seconds from a decision's arrival to its deadline.
        learn_clock: Is given the instant of each reply.
        stats: Where calls are counted.
        expired: Run whenever a deadline has passed, to look after what is in flight.
    """

    def __init__(
        self,
        script: Script,
        *,
        clock: Callable[[], int] | None,
        timeout: float,
        learn_clock: Callable[[int], None],
        expired: Callable[[], None],
        stats: CallStats | None = None,
    ) -> None:
        self.stats: CallStats = stats or CallStats()
        self.breaker: Breaker = Breaker()
        self.opened: Callable[[], None] | None = None
        """Called when the breaker opens."""
        self._probe_tag = _PROBE_TAG
        self._script = script
        self._clock = clock
        self._timeout = timeout
        self._late = f"Redis did not answer within {timeout:g} s"
        self._learn_clock = learn_clock
        self._expired = expired
        self._queue: deque[Waiting] = deque()
        self.measuring: deque[Waiting] = deque()
        """What only measures and is to be sent."""
        self._again: deque[list[Waiting]] = deque()
        self._deadlines: deque[tuple[float, asyncio.Future[Any]]] = deque()
        self._timer: asyncio.Handle | None = None
        self._due = 0.0
        self._loop: Any = None  # the event loop, from the first decision on

    @property
    def waiting(self) -> bool:
        """Whether there is something to send."""
        return bool(self._queue or self._again or self.measuring)

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
        """Let a decision wait for the next call; one in `shadow` only measures.

        Its result is a `Reply`, or a `Claimed` where there is a claim.

        Raises:
            BackendError: The breaker is open and this is none that `probes`, too many wait already,
                or the decision has too many keys.
        """
        if self.breaker.open and not probes:
            raise NotAskedError(f"Redis is not asked for now: {self.breaker.why}")
        queue, most = (self.measuring, MAX_MEASURING) if shadow else (self._queue, MAX_WAITING)
        if len(queue) >= most:
            raise NotAskedError(f"{most} decisions are waiting for Redis already")
        if len(charges) > MAX_KEYS_OF_ONE:
            raise NotAskedError(
                f"a decision may have at most {MAX_KEYS_OF_ONE} keys, got {len(charges)}"
            )
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        queue.append(Waiting(future, charges, stamp, times, claim))
        deadlines = self._deadlines
        # What is decided need not be kept until its deadline.
        while deadlines and deadlines[0][1].done():
            deadlines.popleft()
        deadline = loop.time() + self._timeout
        deadlines.append((deadline, future))
        if self._timer is None:
            self._wake_at(deadline)
        return future

    def probe(self) -> asyncio.Future[Reply]:
        """Let a decision wait that is nobody's: it writes, and so tells whether others could."""
        key = probe_key(self._probe_tag)
        return self.add((Charge(key, _PROBED, 1),), probes=True)

    def next_flight(self, slots: int) -> list[Call]:
        """Return the calls to write next, none if nobody waits; so many writes may follow."""
        call = self.next_call(slots)
        return [] if call is None else [call]

    def next_call(self, slots: int = 1) -> Call | None:
        """Return the next call to send, None if nobody waits.

        Of `slots` calls that may be sent now it carries a share: while Redis decides one, this
        process works on the reply to another.
        """
        call = self._call_again()
        share = max(MIN_SHARE, -(-len(self._queue) // slots))
        if call is None and (decisions := gather(self._queue, share)):
            call = self._call(decisions, again=False)
        return call

    def next_measuring(self) -> list[Call]:
        """Return the calls to write next that only measure, none if there is nothing to measure."""
        decisions = gather(self.measuring)
        return [self._call(decisions, again=False, measures=True)] if decisions else []

    def answer(self, call: Call, reply: Answer) -> str | None:
        """Give each decision its part of the reply; say what is wrong with it, None if nothing."""
        if isinstance(reply, Refusal):
            if reply.code == "NOSCRIPT" and not call.again:
                # The one refusal that proves that nothing ran. EVAL also loads the script.
                self._again.append(call.decisions)
            else:
                self.fail(call, f"Redis refused: {reply.text}", BackendError(reply.text))
            return None
        decisions = call.decisions
        if self.breaker.shaken and not all(one.future.done() for one in decisions):
            # An answer that is too late for everybody is none.
            self.answered()
        if type(reply) is list and len(reply) == 3 and reply[1] in _STALE:
            self._learn_clock(reply[0])
            for one in decisions:
                if not one.future.done():
                    one.future.set_exception(StaleError(_STALE[reply[1]], reply[2], reply[0]))
            return None
        if type(reply) is not list or len(reply) != 1 + sum([one.parts for one in decisions]):
            self.fail(call, f"Redis answered what is no decision: {reply!r:.80}")
            return "a reply of another kind than was asked for"
        now = reply[0]
        self._learn_clock(now)
        end = 1
        for one in decisions:
            at, end = end, end + one.parts
            future = one.future
            if future.done():
                continue
            said = reply[at]
            if said < 0:
                cell = nameless(one.key(-said - 1))
                error = BackendError(f"Redis holds what is no bucket under a key of {cell}")
                future.set_exception(error)
            elif one.claim is None:
                future.set_result(Reply(said == 1, now, reply[at + 1 : end]))
            else:
                first = end - len(one.claim.slots)
                held = reply[first:end]
                future.set_result(Claimed(said == 1, now, reply[at + 1 : first], held))
        return None

    def fail(self, call: Call, why: str, cause: BaseException | None = None) -> None:
        """Fail every decision of a call."""
        undecided = fail_all(call.decisions, why, cause)
        # One failure, however many shared it; none where we gave up ourselves.
        if undecided and not call.measures and not isinstance(cause, asyncio.CancelledError):
            self.failed(why, call.decisions[-1:])

    def fail_waiting(self, why: str, cause: BaseException | None = None) -> None:
        """Fail every decision that waits for a call."""
        waiting = [*(one for decisions in self._again for one in decisions), *self._queue]
        measuring = list(self.measuring)
        self._queue.clear()
        self.measuring.clear()
        self._again.clear()
        fail_all(measuring, why, cause)
        if fail_all(waiting, why, cause) and isinstance(cause, Exception):
            self.failed(why, waiting[-1:])

    def failed(self, why: str, latest: Sequence[Waiting] = (), times: int = 1) -> None:
        """Count failures; where they are too many, nobody else has to wait."""
        self.stats.failures += times
        for one in latest:
            self._probe_tag = tag_of(one.charges, one.stamp) or _PROBE_TAG
        if self.breaker.failed(why, times):
            _log.warning("tieredlimit: Redis is not asked any more, only probed: %s", why)
            self.fail_waiting(f"Redis is not asked for now: {why}")
            if self.opened is not None:
                self.opened()

    def answered(self) -> None:
        """Take note that Redis has answered."""
        if self.breaker.answered():
            _log.warning("tieredlimit: Redis answers again, and is asked again")

    def _call_again(self) -> Call | None:
        """Return the next call that Redis did not know the script of."""
        while self._again:
            decisions = [one for one in self._again.popleft() if not one.future.done()]
            if decisions:
                return self._call(decisions, again=True)
        return None

    def _call(
        self,
        decisions: list[Waiting],
        *,
        again: bool,
        asking: bool = False,
        measures: bool = False,
    ) -> Call:
        layout = [one.keys for one in decisions]
        keys = sum(layout)
        stamp = decisions[0].stamp
        # Of one server any shard's will do: a revision is published once all have it.
        revision = b"" if stamp is None else stamp.revision.encode()
        names = [] if stamp is None else [bulk(stamp.key.encode())]
        now = b"" if self._clock is None else b"%d" % self._clock()
        command = b"".join(
            [
                ASKING if asking else b"",
                b"*%d\r\n" % (7 + len(names) + 2 * keys),
                self._script.eval if again else self._script.evalsha,
                bulk(b"%d" % (len(names) + keys)),
                *names,
                *[one.names for one in decisions],
                bulk(now),
                bulk(revision),
                bulk(prepared_for(stamp, [one.times for one in decisions if one.times])),
                bulk(pack(f"<{len(layout)}H", *layout)),
                *[one.numbers for one in decisions],
            ]
        )
        return Call(command, decisions, again=again, asking=asking, measures=measures)

    def _wake_at(self, instant: float) -> None:
        self._due = instant
        self._timer = self._loop.call_at(instant, self._expire)

    def _expire(self, turns: int = _TURNS) -> None:
        """Fail the decisions whose time is up, and wake up again for the next one's.

        An event loop that was busy wakes up to an expired timer and an unread reply at once. The
        reply counts, Redis may have charged: so the loop reads first.
        """
        loop = self._loop
        if turns:
            busy = loop.time() - self._due if turns == _TURNS else 0.0
            if busy > _BUSY:
                # Nor does the time count in which the loop sent nothing either; but a process that
                # was frozen must not wait as long again.
                self._timer = loop.call_later(min(busy, self._timeout), self._expire, turns - 1)
            else:
                self._timer = loop.call_soon(self._expire, turns - 1)
            return
        now = loop.time()
        deadlines = self._deadlines
        self._timer = None
        late = 0
        while deadlines:
            deadline, future = deadlines[0]
            if not future.done():
                if deadline > now:
                    self._wake_at(deadline)
                    break
                future.set_exception(BackendError(self._late))
                late += 1
            deadlines.popleft()
        # While nothing is sent, what was given up must not take the place of others.
        for queue in (self._queue, self.measuring):
            while queue and queue[0].future.done():
                queue.popleft()
        if late:
            self.failed(self._late, times=late)
        # Also where nobody waited that long: impatient callers leave a dead connection behind.
        self._expired()

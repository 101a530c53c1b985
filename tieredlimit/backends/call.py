"""One call of the script, and the decisions that it carries."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from hashlib import sha1
from struct import pack
from typing import Any

from tieredlimit._core.stamp import Stamp
from tieredlimit.backends.backend import Charge, Claim
from tieredlimit.errors import BackendError

MAX_DECISIONS = 128
"""The most decisions in one call."""
MAX_KEYS = 320
"""The most keys in one call; a call must not hold Redis for more than about two milliseconds.
A decision that has more by itself is a call of its own."""


def bulk(value: bytes) -> bytes:
    """Return a bulk string of the Redis serialization protocol (RESP)."""
    return b"$%d\r\n%b\r\n" % (len(value), value)


ASKING = b"*1\r\n" + bulk(b"ASKING")
"""What goes before a command for a slot that is on its way to the node."""


class Script:
    """Hold a script, and the beginning of the commands that run it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha: str = sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.evalsha: bytes = bulk(b"EVALSHA") + bulk(self.sha.encode())
        self.eval: bytes = bulk(b"EVAL") + bulk(text.encode())


class Waiting:
    """Hold a decision that somebody waits for, ready to be sent."""

    __slots__ = (
        *("charges", "claim", "future", "keys", "names", "numbers", "parts", "redirected"),
        *("stamp", "times"),
    )

    def __init__(
        self,
        future: asyncio.Future[Any],
        charges: Sequence[Charge],
        stamp: Stamp | None,
        times: tuple[int, int] | None,
        claim: Claim | None = None,
    ) -> None:
        self.future = future
        self.charges = charges
        self.claim = claim
        self.stamp = stamp
        self.times = times
        if len(charges) == 1 and claim is None:
            key, shelf, cost = charges[0]
            name = key.encode()
            self.names = b"$%d\r\n%b\r\n" % (len(name), name)
            self.numbers = shelf.packed if cost == 1 else shelf.packed_for(cost)
            self.keys = 1
            self.parts = shelf.parts
        else:
            self._spell(charges, claim)
        """How many numbers of a reply are its own."""
        self.redirected = 0
        """How often in a row a node of a cluster has sent it to another."""

    def key(self, at: int) -> str:
        """Return one of its keys, in the order in which they are sent."""
        if at < len(self.charges):
            return self.charges[at].key
        return self.claim.slots[at - len(self.charges)].key if self.claim else ""

    def _spell(self, charges: Sequence[Charge], claim: Claim | None) -> None:
        names, numbers, parts = [], [], 1
        for key, shelf, cost in charges:
            if shelf.spelled:
                names.append(shelf.spelled)
            else:
                name = key.encode()
                names.append(b"$%d\r\n%b\r\n" % (len(name), name))
            numbers.append(shelf.packed if cost == 1 else shelf.packed_for(cost))
            parts += shelf.parts - 1
        if claim is not None:
            id_, slots, record, keep_us = claim
            for key, limit, lease_us in slots:
                name = key.encode()
                names.append(b"$%d\r\n%b\r\n" % (len(name), name))
                if id_:
                    numbers.append(b"$32\r\n%b\r\n" % pack("<16sdd", id_, limit, lease_us))
                else:
                    numbers.append(b"$16\r\n%b\r\n" % pack("<dd", limit, lease_us))
                parts += 1
            if record:
                names.append(bulk(record.encode()))
                numbers.append(bulk(pack("<d", keep_us)))
        self.names, self.numbers = b"".join(names), b"".join(numbers)
        self.keys, self.parts = len(names), parts


class Call:
    """Hold one command and the decisions that it carries.

    `again` is true where Redis said before that it does not know the script; `asking` where a node
    of a cluster is asked about a slot that is on its way to it, which takes a reply of its own.
    """

    __slots__ = (
        *("again", "asking", "command", "decisions", "lands", "measured", "measures", "unheard"),
    )

    def __init__(
        self,
        command: bytes,
        decisions: list[Waiting],
        *,
        again: bool,
        asking: bool,
        measures: bool = False,
    ) -> None:
        self.command = command
        self.decisions = decisions
        self.again = again
        self.asking = asking
        self.measures = measures
        """Whether its decisions are in shadow."""
        self.unheard = 2 if asking else 1
        """How many replies are still to come."""
        self.lands = False
        """Whether it is the last of those that were written together."""
        self.measured = False
        """The same, among those that only measure."""


def gather(queue: deque[Waiting], share: int = MAX_DECISIONS) -> list[Waiting]:
    """Take from a queue what one call may carry, a share at most."""
    decisions: list[Waiting] = []
    keys = 0
    most = min(share, MAX_DECISIONS)
    revision = None
    while queue and len(decisions) < most:
        waiting = queue[0]
        if not waiting.future.done():
            keys += waiting.keys
            stamp = waiting.stamp
            if decisions:
                if keys > MAX_KEYS:
                    break
                if stamp is not revision and not _alike(stamp, revision):
                    break
            revision = stamp
            decisions.append(waiting)
        queue.popleft()
    return decisions


def _alike(one: Stamp | None, other: Stamp | None) -> bool:
    """Say whether decisions of two stamps may share a call of one server."""
    if one is None or other is None:
        return one is other
    # Nor of two tables of one revision, or of two namespaces: each has shards of its own.
    return (one.revision, one.since, one.before, one.tag.partition(":")[0]) == (
        *(other.revision, other.since, other.before, other.tag.partition(":")[0]),
    )


def fail_all(decisions: Iterable[Waiting], why: str, cause: BaseException | None) -> int:
    """Fail the decisions that are not decided yet; return how many there were."""
    # An error each: callers add their own traceback to it.
    failed = 0
    for one in decisions:
        if not one.future.done():
            error = BackendError(why)
            error.__cause__ = cause
            one.future.set_exception(error)
            failed += 1
    return failed


def tag_of(charges: Sequence[Charge], stamp: Stamp | None = None) -> str:
    """Return the hash tag of a decision's keys, without its braces; empty where there is none."""
    if stamp is not None:
        return stamp.tag
    key = charges[0].key if charges else ""
    return key.partition("{")[2].partition("}")[0]

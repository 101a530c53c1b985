"""Who works in a namespace, and which revision each of them follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import click

from tieredlimit._core.revision import FORMAT, Revision
from tieredlimit.backends.control import shard_key
from tieredlimit.backends.heartbeat import Heartbeat
from tieredlimit.cli.session import Failure, Session
from tieredlimit.cli.terminal import printable
from tieredlimit.errors import BackendError

PATIENCE = 3.0
"""Seconds to wait for workers."""
POLL = 0.1
"""Seconds between two looks at them."""
# Seconds in which every worker that lives has come back to a Redis that was emptied.
_UNHEARD = 1.5

_PRODUCTION = ("production", "prod")
_NAMED = 5


@dataclass(frozen=True, slots=True)
class Fleet:
    """Hold what a namespace is called, what is in force, and who works there."""

    namespace: str
    label: str
    head: Revision
    workers: Sequence[Heartbeat]

    @property
    def production(self) -> bool:
        """Whether the label asks for care."""
        return self.label.casefold() in _PRODUCTION

    def followers(self) -> list[Heartbeat]:
        """Return the workers on the head, or on what came after it."""
        return [worker for worker in self.workers if follows(worker, self.head)]

    def behind(self) -> list[Heartbeat]:
        """Return the others."""
        return [worker for worker in self.workers if not follows(worker, self.head)]

    def banner(self) -> str:
        """Return the line that stands above every change."""
        label = printable(self.label) or "no label"
        told = click.style(label, fg="red", bold=True) if self.production else label
        return f"{self.namespace} · {told} · {self.count()}"

    def count(self) -> str:
        """Return how many workers follow, as operators read it."""
        if not self.workers:
            return f"no worker · revision {self.head.number}"
        live = len(self.workers)
        return f"{len(self.followers())}/{live} workers on revision {self.head.number}"


async def look(session: Session, head: Revision | None = None) -> Fleet:
    """Return the fleet as it is; `head` is what it should follow, the head unless given."""
    store = session.store
    label = await store.label()
    head = head or await store.head()
    return Fleet(session.place.namespace, label, head, await store.workers())


async def sound_head(session: Session) -> Revision:
    """Return the head, once no live worker holds a later one that Redis has lost.

    Where no worker is heard, some may not have been yet: Redis may have come back empty just now.

    Raises:
        Failure: Redis still had not got it back after `PATIENCE`.
    """
    pace = session.place.pace
    began = pace.clock()
    while True:
        # In this order: a worker may adopt what is published in between.
        workers = await session.store.workers()
        head = await session.store.head()
        ahead = [worker for worker in workers if worker.revision > head.number]
        waited = pace.clock() - began
        if not ahead and (workers or waited >= _UNHEARD):
            return head
        if ahead and waited >= PATIENCE:
            latest = max(worker.revision for worker in ahead)
            raise Failure(
                f"Redis holds revision {head.number}, and {named(ahead)} revision {latest}: it "
                "was emptied, or a failover has lost it. Nothing was done. A running worker puts "
                "it back; look again with tieredlimit status"
            )
        await pace.pause(POLL)


async def unfinished_shards(session: Session, head: Revision) -> int:
    """Return how many shards have not heard of the head."""
    if head.number == 0:
        return 0
    keys = [shard_key(session.place.namespace, shard) for shard in range(session.shards)]
    told = await session.nodes.ask_all([(key, ("GET", key)) for key in keys])
    numbers = [shard_number(reply) for reply in told]
    return sum(number is None or number < head.number for number in numbers)


def shard_number(reply: object) -> int | None:
    """Return the number that a shard holds, None where it holds what is none or would not say."""
    if reply is None:
        return 0
    first = reply.partition(b" ")[0] if isinstance(reply, bytes) else b""
    return int(first) if first.isdigit() and len(first) <= 16 else None


async def wait_for_followers(session: Session, head: Revision) -> Fleet:
    """Return the fleet once all of it follows the head, or after `PATIENCE`."""
    pace = session.place.pace
    until = pace.clock() + PATIENCE
    while True:
        fleet = await look(session, head)
        if (fleet.workers and not fleet.behind()) or pace.clock() >= until:
            return fleet
        await pace.pause(POLL)


async def how_far(session: Session, head: Revision, error: BackendError) -> str | None:
    """Return how far a publication got that failed, None where nothing was published."""
    try:
        found = await session.store.head()
    except BackendError:
        return f"nobody knows how far revision {head.number} has got: {error}"
    return str(error) if (found.number, found.digest) == (head.number, head.digest) else None


def follows(worker: Heartbeat, head: Revision) -> bool:
    """Say whether a worker decides by the head, or by what came after it."""
    if worker.revision == head.number:
        return head.number == 0 or worker.digest == head.digest
    return worker.revision > head.number


def too_old(workers: Sequence[Heartbeat]) -> list[Heartbeat]:
    """Return the workers that cannot read what this release publishes."""
    return [worker for worker in workers if worker.format < FORMAT]


def named(workers: Sequence[Heartbeat]) -> str:
    """Return a few of the workers by name, and how many more there are."""
    texts = [f"{printable(one.host)}:{one.pid}" for one in workers[:_NAMED]]
    more = len(workers) - len(texts)
    return ", ".join(texts) + (f" and {more} more" if more else "")

"""What is asked of a place where revisions live."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from tieredlimit._core.revision import Revision
from tieredlimit.errors import BackendError, UsageError

if TYPE_CHECKING:
    from tieredlimit.backends.heartbeat import Heartbeat

KEPT_REVISIONS = 200
"""The most documents kept; older ones are dropped when publishing."""
LISTED_REVISIONS = 50
"""How many `ControlStore.history` lists unless told."""
POLL_INTERVAL = 0.5
"""Seconds between two looks of a watcher at the head."""
LABEL_CHARACTERS = 64
"""The most characters of a label."""

MAX_NUMBER = 2**53 - 1
"""The highest number of a revision: Lua and JSON readers count no further."""


@dataclass(frozen=True, slots=True)
class Published:
    """Say how far a revision has got.

    Attributes:
        revision: The one that is in force. Its number is higher than that of the one given where
            shards were ahead of a head that Redis had lost.
        shards: How many shards have heard of it, or of a newer one: all of them.
        replicas: How many replicas hold it at least, on whichever node has the fewest; 0 also where
            Redis would not say.
    """

    revision: Revision
    shards: int
    replicas: int


class ControlStore(Protocol):
    """Where the revisions, the heartbeats and the label of one namespace live.

    The head is the revision in force; each shard holds its number and digest as well, for every
    decision to compare. Everything but `watch` raises `BackendError` where the store cannot be
    reached, does not answer in time, or holds what it cannot have been given.
    """

    async def head(self) -> Revision:
        """Return the revision in force; `NOTHING` if none was ever published.

        Raises:
            BackendError: Also where its document is lost or cannot be read; then the cause is the
                `RevisionError`.
        """
        ...

    async def revision(self, number: int) -> Revision | None:
        """Return one of the last 200 revisions; None if it is not kept."""
        ...

    async def history(self, most: int = LISTED_REVISIONS) -> list[Revision]:
        """Return the latest revisions that are kept, newest first; never `NOTHING`."""
        ...

    async def publish(self, revision: Revision, *, seen: Revision) -> Published:
        """Make a revision the head, if that still is `seen`, and have all shards obey it.

        Once it has returned, no decision of any shard is made by an older revision. Publishing the
        very same revision once more completes what was left undone.

        Raises:
            ConflictError: The head is another than was seen; nothing was changed.
            BackendError: Nobody knows whether it is published; or it is, and some shards have not
                heard of it: then the message says how many. Run it again, or `complete`.
            RevisionError: It is too large to be stored; nothing was changed.
            UsageError: The number is not above that of `seen`.
        """
        ...

    async def complete(self, revision: Revision) -> Published:
        """Have all shards obey the head, which `revision` is, as its publisher should have.

        Raises:
            ConflictError: The head is another; nothing was changed.
            BackendError: As for `publish`.
        """
        ...

    async def seed(self, revision: Revision) -> Revision:
        """Put the head back where the store has lost it, or any part of it; return the head.

        A head of a higher number, or of the same number and another digest, stays and is returned.
        """
        ...

    async def repair(self, shard_number: int, revision: Revision) -> Revision:
        """Get out of a number that a shard holds and that no document has; return the head.

        Publishes the head, or `revision` if that is newer, once more under `shard_number` + 1.
        Changes nothing where the head has come that far by itself.
        """
        ...

    async def beat(self, heartbeat: Heartbeat) -> None:
        """Note that a worker lives; to be called each second.

        Raises:
            BackendError: Also where 10,000 workers are noted already.
            UsageError: Its id is not 1 to 64 of letters, digits and `._:@-`, or it is too long.
        """
        ...

    async def retire(self, worker: str) -> None:
        """Forget a worker that has ended, by its id; harmless if it is not known."""
        ...

    async def workers(self) -> list[Heartbeat]:
        """Return the latest heartbeats of the workers heard within the last 5 s, by id."""
        ...

    async def watch(self, heard: Callable[[int], None]) -> None:
        """Tell the head's number now and whenever the head changes; runs until it is cancelled.

        The number may be lower than the last: where Redis was emptied (0), or a failover lost a
        head. Outages are waited out and logged; only what `heard` itself raises is raised.
        """
        ...

    async def label(self) -> str:
        """Return what the namespace is called, such as `PRODUCTION`; empty if nothing."""
        ...

    async def set_label(self, text: str) -> None:
        """Name the namespace; an empty text takes the label away.

        Raises:
            UsageError: It is longer than 64 characters, or does not print on one line.
        """
        ...

    async def now(self) -> int:
        """Return the store's clock in microseconds since 1970."""
        ...

    async def close(self) -> None:
        """Close this event loop's connections, once no `watch` runs. What is stored stays."""
        ...


def check_succession(revision: Revision, seen: Revision) -> None:
    """Check that one revision may follow another.

    Raises:
        UsageError: It may not.
    """
    if revision.number <= seen.number:
        raise UsageError(
            f"a revision's number must be above {seen.number}, which it follows, "
            f"got {revision.number}"
        )
    if revision.number > MAX_NUMBER:
        raise UsageError(f"a revision's number may be {MAX_NUMBER} at most")


def check_label(text: str) -> None:
    """Check that a text can be a label.

    Raises:
        UsageError: It cannot.
    """
    if len(text) > LABEL_CHARACTERS or not text.isprintable():
        raise UsageError(
            f"a label has at most {LABEL_CHARACTERS} printable characters, got {text!r:.100}"
        )


def same(one: Revision, other: Revision) -> bool:
    """Return whether two revisions have the same number and the same content."""
    return (one.number, one.digest) == (other.number, other.digest)


def newer_of(head: Revision, held: Revision) -> Revision:
    """Return the one with the higher number; of two with the same number the head wins."""
    return held if held.number > head.number else head


def repaired(revision: Revision, shard_number: int, now: int) -> Revision:
    """Return a revision with the same content, above a number that a shard holds.

    Raises:
        BackendError: There is none above.
    """
    if shard_number >= MAX_NUMBER:
        raise BackendError(f"a shard holds revision {shard_number}, and numbers end there")
    change = f"restored revision {revision.number}: what followed it up to {shard_number} was lost"
    return replace(revision, number=shard_number + 1, made_us=now, change=change)

"""What the limiter asks of a store."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from tieredlimit._core.shelf import Shelf
from tieredlimit._core.slots import Slot
from tieredlimit._core.stamp import Stamp
from tieredlimit.errors import BackendError


class Charge(NamedTuple):
    """Ask for `cost` tokens from every bucket of one subject under one key.

    `shelf` says which buckets these are, and their numbers as the caller's policy has them. Charges
    of one take with the same key have the same shelf.
    """

    key: str
    shelf: Shelf
    cost: int


class Claim(NamedTuple):
    """Ask for what lasts longer than a take, together with its charges: all of it or none.

    Attributes:
        id: 16 bytes that name what is taken. The caller makes them, so that what it never heard of
            can be released; empty only counts the slots that are held.
        slots: One slot of each of these.
        record: The key under which is noted what was charged, so that it can be settled; empty for
            none.
        keep_us: Microseconds for which that is kept.
    """

    id: bytes
    slots: Sequence[Slot]
    record: str = ""
    keep_us: int = 0


class Reply(NamedTuple):
    """Say what became of the charges.

    Attributes:
        allowed: True if every charge was applied, False if none was.
        now: The instant of the decision in microseconds on the backend's clock.
        debts: Per charge and quota, in their order, the microseconds until the bucket is full:
            after charging where `allowed`, as it stands otherwise.
    """

    allowed: bool
    now: int
    debts: list[int]


class Claimed(NamedTuple):
    """Say what became of the charges and a claim: the same, and per slot how many others hold."""

    allowed: bool
    now: int
    debts: list[int]
    held: list[int]


class NotAskedError(BackendError):
    """Report that the store was not asked, and so that nothing was charged or claimed."""


class StaleError(BackendError):
    """A decision was prepared under a revision that is not in force, or for another time.

    Nothing was charged: prepare it anew.

    Attributes:
        why: What is wrong: the shard is on a newer revision, on another one of the same number, or
            the time is another.
        number: The shard's revision, for the first two.
        now: The instant of the reply in microseconds on the backend's clock.
    """

    def __init__(self, why: Literal["newer", "other", "time"], number: int, now: int) -> None:
        super().__init__(f"prepared under a revision that is not in force ({why}: {number})")
        self.why = why
        self.number = number
        self.now = now


class Backend(Protocol):
    """Where buckets live."""

    def now(self) -> int:
        """Return the backend's clock in microseconds since 1970, as well as is known; no I/O."""
        ...

    async def open(self) -> None:
        """Get ready in the running event loop. Harmless when repeated.

        A store that cannot be reached now is tried again by each `take`.

        Raises:
            UsageError: The store holds a namespace that is laid out in another way.
        """
        ...

    async def close(self) -> None:
        """Give back what `open` or `take` got in the running event loop. Buckets stay."""
        ...

    async def take(self, charges: Sequence[Charge]) -> Reply:
        """Charge every bucket, or none of them.

        Concurrent calls behave as if run one after another. Charges on the same bucket are summed.
        A charge of cost 0 peeks: it reads the bucket and writes nothing. A denial writes nothing,
        except that a bucket further ahead than its clamp is lowered to it. What is full is
        forgotten by itself, what is not is kept.

        Raises:
            BackendError: The store could not answer. The charges may or may not have been applied.
        """
        ...


class ComparingBackend(Backend, Protocol):
    """A store that also holds revisions, and compares them in the same call."""

    compares_revisions: bool

    async def take(
        self,
        charges: Sequence[Charge],
        stamp: Stamp | None = None,
        times: tuple[int, int] | None = None,
    ) -> Reply:
        """Do what `Backend.take` does, if `stamp` is in force.

        `times` are the instants, the last one excluded, for which this decision was prepared, None
        for all. Without a stamp no revision is compared. Without charges nothing but that is done.

        Raises:
            StaleError: The stamp is not in force. Nothing was charged.
            BackendError: As for `Backend.take`.
        """
        ...

    async def claim(
        self,
        charges: Sequence[Charge],
        claim: Claim,
        stamp: Stamp | None = None,
        times: tuple[int, int] | None = None,
    ) -> Claimed:
        """Do what `take` does, and what is claimed in the same call: all of it or none.

        All keys share a hash tag.

        Raises:
            StaleError: As `take`. Nothing was charged or claimed.
            BackendError: As `take`. What is claimed may be held: release it by its id.
        """
        ...

    def measure(
        self,
        charges: Sequence[Charge],
        stamp: Stamp | None = None,
        times: tuple[int, int] | None = None,
    ) -> asyncio.Future[Reply]:
        """Do what `take` does, behind what is taken in the same turn of the event loop.

        It never delays, fails or outweighs a take, and is the first to be given up.

        Raises:
            BackendError: Too many wait already, or it is not known yet whom to ask.
        """
        ...

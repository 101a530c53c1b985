"""What the limiter asks of a store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from tieredlimit._core.table import Shelf


class Charge(NamedTuple):
    """Ask for `cost` tokens from every bucket of one subject under one key.

    `shelf` says which buckets these are, and their numbers as the caller's policy has them. Charges
    of one take with the same key have the same shelf.
    """

    key: str
    shelf: Shelf
    cost: int


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

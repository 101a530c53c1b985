"""What a take leaves behind: slots that are held, what may be settled, what may be given back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from tieredlimit._core.quota import Quota


class Hold(NamedTuple):
    """Name what a take holds: its caller's id, and of each slot the key and the lease (us)."""

    id: bytes
    slots: tuple[tuple[str, int], ...]


class Correction(NamedTuple):
    """Change what one bucket was charged.

    Attributes:
        key: The key it stands under.
        tag: The four bytes that stand for its quota's name.
        us: Microseconds to charge in addition; below zero, to give back.
        clamp_us: How far from full it may get.
    """

    key: str
    tag: bytes
    us: int
    clamp_us: int


class Settled(NamedTuple):
    """Say what became of a settling.

    Attributes:
        settled: False where there was nothing to settle any more: it was done, or too late.
        debts: Per bucket, the microseconds until it is full now.
    """

    settled: bool
    debts: Sequence[int]


class Holds(Protocol):
    """Renew, release, settle and refund, where the buckets are.

    All keys of a call share a hash tag. Any of them may raise a BackendError: then it may or may
    not have happened. All but `refund` may be repeated.
    """

    async def renew(self, hold: Hold) -> bool:
        """Hold all slots for their whole lease again; False, and nothing done, if one is lost."""
        ...

    async def release(self, hold: Hold) -> bool:
        """Free the slots; False if none was held any more."""
        ...

    async def settle(self, record: str, corrections: Sequence[Correction]) -> Settled:
        """Correct what was charged under a record, in its order, and forget the record.

        What is given back never fills a bucket beyond full, and is no more than was charged. What
        is charged in addition may leave one below empty, down to one capacity.
        """
        ...

    async def refund(self, corrections: Sequence[Correction]) -> list[int]:
        """Give back without a record, never beyond full; return each bucket's debt since."""
        ...

    async def level(self, key: str, quota: Quota) -> int:
        """Return the debt of one bucket, in microseconds."""
        ...

    async def close(self) -> None:
        """Give back what the running event loop holds; nothing that is held is released."""
        ...


class NoHolds:
    """Ask nobody, where the limiter is not enabled: what others took goes on; as `Holds`."""

    async def renew(self, hold: Hold) -> bool:  # noqa: ARG002 -- as `Holds` has it, and below
        """Say that it is held: nobody is to stop for a limit that is off."""
        return True

    async def release(self, hold: Hold) -> bool:  # noqa: ARG002
        """Leave it to its time."""
        return False

    async def settle(self, record: str, corrections: Sequence[Correction]) -> Settled:  # noqa: ARG002
        """Leave what was charged."""
        return Settled(False, [])

    async def refund(self, corrections: Sequence[Correction]) -> list[int]:  # noqa: ARG002
        """Give back nothing."""
        return []

    async def level(self, key: str, quota: Quota) -> int:  # noqa: ARG002
        """Return the debt of a full bucket."""
        return 0

    async def close(self) -> None:
        """Do nothing."""


def by_key(corrections: Sequence[Correction]) -> dict[str, list[Correction]]:
    """Return corrections by the key of their buckets, in their order."""
    grouped: dict[str, list[Correction]] = {}
    for one in corrections:
        grouped.setdefault(one.key, []).append(one)
    return grouped

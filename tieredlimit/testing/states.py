"""States to put a limiter in: a quota that is used up, a closed feature, a store that is down."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Unpack, cast

from tieredlimit._core.account import Account
from tieredlimit.backends import Backend
from tieredlimit.backends.holds import Holds
from tieredlimit.decision import Decision
from tieredlimit.errors import BackendError, UsageError
from tieredlimit.limiter import Limiter

if TYPE_CHECKING:
    from tieredlimit.control import Given

__all__ = ["broken", "closed", "exhaust"]

_ATTEMPTS = 8
_WHO = ("account", "tier", "when", "everyone")


async def exhaust(limiter: Limiter, account: Account, feature: str) -> Decision:
    """Take what is left to an account, so that its next request is denied; return that denial.

    No whole token is left in its tightest bucket. With a clock that goes on one may be back soon:
    give the limiter a `Clock`. It is taken through the limiter: observers see it, and what the
    feature's pool loses by it is lost. Where the tier has zero there is nothing to do.

    Raises:
        UsageError: It cannot be exhausted: nothing limits it, it is closed, something else denies
            it, or the feature is unknown. The message says what.
    """
    for _ in range(_ATTEMPTS):
        decision = await limiter.peek(account, feature)
        left = decision.remaining
        if decision.reason == "zero" or (left == 0 and not decision.allowed):
            return decision
        if decision.reason in ("closed", "outage"):
            raise _inexhaustible(decision, "its buckets cannot be asked")
        if left is None:
            what = "the limiter is not enabled" if not limiter.enabled else "it is unlimited"
            raise _inexhaustible(decision, what)
        taken = await limiter.take(account, feature, left)
        if taken.lease is not None:
            await taken.lease.release()
        if not taken.allowed and taken.reason != "quota":
            raise _inexhaustible(taken, f"{left} tokens are left to the account")
    raise UsageError(f'"{feature}" refills as fast as it is emptied: give the limiter a Clock')


@asynccontextmanager
async def closed(
    limiter: Limiter, feature: str, *, no_exceptions: bool = False, **given: Unpack[Given]
) -> AsyncIterator[None]:
    """Close a feature within a block, and open it again at its end.

    As in `async with closed(limiter, "video", tier="new"):`. Who is meant and `message` are as for
    `limiter.control.close`; nobody named is everyone. What closed the same accounts before is
    lifted as well.

    Raises:
        UsageError: As `limiter.control.close`.
    """
    if not any(word in given for word in _WHO):
        given["everyone"] = True
    who: dict[str, Any] = {word: value for word, value in given.items() if word in _WHO}
    await limiter.control.close(feature, no_exceptions=no_exceptions, **given)
    try:
        yield
    finally:
        with suppress(UsageError):  # the block has opened it already
            await limiter.control.open(feature, **who)


@contextmanager
def broken(limiter: Limiter) -> Iterator[None]:
    """Let the limiter's store not answer within a block: each decision is an outage answer.

    What needs no store is decided all the same, as in a real outage: zero, and what is closed. To
    settle, refund, renew or release is a `BackendError`; a release is made up for after the block.
    """
    backend, leases = limiter.backend, limiter.leases
    # Of a backend of somebody else's there are none.
    holds = leases._holds  # noqa: SLF001
    limiter._denials.held.clear()  # noqa: SLF001 -- what it remembers it would not have to ask
    limiter._ask_at(cast(Backend, _Down(backend)), holds and _DownHolds(holds))  # noqa: SLF001 -- by each of its methods
    try:
        yield
    finally:
        limiter._ask_at(backend, holds)  # noqa: SLF001


class _Down:
    """A store that does not answer; all else is as of the one in whose place it stands."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property  # type: ignore[misc]  # so that it is asked as that one is
    def __class__(self) -> type:
        return self._backend.__class__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def now(self) -> int:
        """Return the clock of the store."""
        return self._backend.now()

    async def open(self) -> None:
        """Do nothing: a store that is down is tried again by each take."""

    async def close(self) -> None:
        """Give back what the store has got."""
        await self._backend.close()

    async def take(self, *_: Any) -> Any:
        """Fail."""
        raise _down()

    async def claim(self, *_: Any) -> Any:
        """Fail."""
        raise _down()

    def measure(self, *_: Any) -> Any:
        """Fail."""
        raise _down()


class _DownHolds:
    """The same of what looks after slots and reservations."""

    def __init__(self, holds: Holds) -> None:
        self._holds = holds

    async def renew(self, *_: Any, **__: Any) -> Any:
        """Fail."""
        raise _down()

    async def release(self, *_: Any, **__: Any) -> Any:
        """Fail."""
        raise _down()

    async def settle(self, *_: Any, **__: Any) -> Any:
        """Fail."""
        raise _down()

    async def refund(self, *_: Any, **__: Any) -> Any:
        """Fail."""
        raise _down()

    async def level(self, *_: Any, **__: Any) -> Any:
        """Fail."""
        raise _down()

    async def close(self) -> None:
        """Give back what the store has got."""
        await self._holds.close()


def _down() -> BackendError:
    return BackendError("the store does not answer, since a test said so")


def _inexhaustible(decision: Decision, why: str) -> UsageError:
    denied = "" if decision.allowed else f", and denied ({decision.reason})"
    return UsageError(
        f'"{decision.feature}" cannot be exhausted in tier {decision.tier}: {why}{denied}'
    )

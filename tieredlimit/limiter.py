"""The front of it all: from an account and a feature to a decision."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tieredlimit._core.account import Account
from tieredlimit._core.denials import Denials
from tieredlimit._core.policy import Policy
from tieredlimit._core.rate import DAY_US, SECOND_US
from tieredlimit._core.table import Table
from tieredlimit._core.taken import Taken
from tieredlimit._core.tally import CallStats, Samples, Tallies
from tieredlimit._core.tier import Feature
from tieredlimit.backends import (
    Backend,
    Charge,
    Claimed,
    ClusterBackend,
    MemoryBackend,
    RedisBackend,
    Reply,
)
from tieredlimit.backends.backend import ComparingBackend, StaleError
from tieredlimit.backends.control import holds_of
from tieredlimit.backends.server import DEFAULT_TIMEOUT
from tieredlimit.complaints import Complaints
from tieredlimit.control import Control
from tieredlimit.deciding import Deciding
from tieredlimit.decision import Decision
from tieredlimit.environment import DEFAULT_NAMESPACE, from_environment
from tieredlimit.errors import BackendError, UsageError
from tieredlimit.inforce import InForce, Stored
from tieredlimit.judging import checked, named
from tieredlimit.leases import Leases
from tieredlimit.observe import Observer, Observers
from tieredlimit.settling import Reservation, check_actual, corrections
from tieredlimit.shadow import Shadows

__all__ = ["Complaints", "Limiter"]

MAX_SHARDS = 1_024

SETTLE_WITHIN = 86_400.0
"""Seconds for which a reservation may be settled, unless it says otherwise."""

_LONGEST_SETTLE_US = 30 * DAY_US

_NAMESPACE = re.compile(r"[a-z0-9_-]{1,32}")
_MOST_REDECISIONS = 3


class Limiter(Deciding):
    """Decide whether an account may use a feature now, and charge it if so.

    Open it with `async with`, or let the middleware, or the first take, open it; it may be used in
    several event loops and after a fork, and again after it was closed.

    Args:
        policy: A `Policy`, a document as a mapping, the path of a TOML file, or `stored()`.
        backend: A Redis URL, or a `Backend`; None keeps buckets in this process.
        namespace: Keeps the buckets of several applications on one Redis apart; 1 to 32 of
            `a-z`, `0-9`, `_` and `-`.
        shards: The number of hash tags that keys are spread over, 1 to 1,024, so that a Redis
            Cluster can share the load: 64 there, else 1, where it is None. All processes of a
            namespace must say the same.
        enabled: False allows everything and never asks the backend.
        observers: Who is shown each decision, outage and revision.
        close: What is closed in this process whatever is published, and even where the store is
            down: `video:new, image` is a feature for a tier, and another for everyone.
        close_file: A file with lines of the same, looked at twice a second while the limiter is
            open; it need not exist.

    Raises:
        PolicyError: The policy has faults.
        UsageError: The backend or the namespace cannot be used.
    """

    def __init__(
        self,
        policy: Policy | Mapping[str, Any] | str | Path | Stored,
        backend: Backend | str | None = None,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        shards: int | None = None,
        enabled: bool = True,
        observers: Iterable[Observer] = (),
        close: str = "",
        close_file: str | Path | None = None,
    ) -> None:
        if not _NAMESPACE.fullmatch(namespace):
            raise UsageError(f"a namespace is 1 to 32 of a-z, 0-9, _ and -, got {namespace!r:.80}")
        if isinstance(policy, (str, Path)):
            policy = Policy.load(policy)
        elif not isinstance(policy, (Policy, Stored)):
            policy = Policy.from_dict(policy)
        if backend is None:
            backend = MemoryBackend()
        elif isinstance(backend, str):
            kind = ClusterBackend if "+cluster://" in backend else RedisBackend.from_url
            backend = kind(backend)
        self.enabled = enabled
        self.namespace = namespace
        self.backend = backend
        if shards is None:
            shards = getattr(backend, "default_shards", 1)
        if type(shards) is not int or not 1 <= shards <= MAX_SHARDS:
            raise UsageError(f"shards must be from 1 to {MAX_SHARDS:,}, got {shards!r:.80}")
        if isinstance(backend, RedisBackend | ClusterBackend):
            backend.join(namespace, shards)
        self.complaints = Complaints()
        self.observers = Observers(observers)
        self._observed = bool(self.observers)
        self.tallies = Tallies()
        self.samples = Samples(namespace)
        self._denials = Denials()
        self.leases = Leases(holds_of(backend), namespace, self.complaints, self.patience)
        self._shadows = Shadows(backend, self.observers)
        self._force = InForce(
            policy,
            backend,
            namespace,
            shards,
            close=close,
            close_file=close_file,
            tallies=self.tallies,
            samples=self.samples,
            complaints=self.complaints,
            changed=self._changed,
        )
        # Each call of these also says whether what it was prepared by is still in force.
        self._comparing: ComparingBackend | None = None
        self._claim: Callable[..., Awaitable[Claimed]] = _nobody
        if isinstance(backend, RedisBackend | ClusterBackend):
            self._comparing = backend
            self._claim = backend.claim
        # What answers without waiting is asked so, unless a subclass has its own way.
        self._take_now: Callable[[Sequence[Charge]], Reply] | None = None
        self._memory = backend if isinstance(backend, MemoryBackend) else None
        if self._memory is not None:
            self._claim = self._memory.claim
        if isinstance(backend, MemoryBackend) and type(backend).take is MemoryBackend.take:
            self._take_now = backend.take_now

    @classmethod
    def from_env(cls) -> Self:
        """Build a limiter from the environment.

        `TIEREDLIMIT_POLICY` names the policy file, or several joined by the system's path
        separator, each laid over the ones before; `stored` is the one that was pushed.
        `TIEREDLIMIT_REDIS` is a Redis URL; without one buckets are kept in this process.
        `TIEREDLIMIT_NAMESPACE`, `TIEREDLIMIT_ENABLED` (0 or 1), `TIEREDLIMIT_CLOSE` and
        `TIEREDLIMIT_CLOSE_FILE` are what the arguments of those names are.

        Raises:
            PolicyError: The policy has faults.
            UsageError: A variable is missing or cannot be used.
        """
        return cls(**from_environment())

    @property
    def policy(self) -> Policy:
        """The policy in force, below the overrides.

        Raises:
            BackendError: It is a stored one, and was not loaded yet.
        """
        return self._table.policy

    @property
    def revision(self) -> tuple[int, str]:
        """The number and the digest of the revision that is followed; 0 if none was published."""
        return self._force.revision.number, self._force.revision.digest

    @property
    def control(self) -> Control:
        """What changes things live, for all processes of the namespace.

        Raises:
            UsageError: The backend is one of your own, which has no such thing.
        """
        if self._force.store is None:
            kind = type(self.backend).__name__
            raise UsageError(f"live control needs one of our backends, got {kind}")
        return Control(self._force.store, lambda: self.policy, self._force.standing)

    @property
    def unknown_plans(self) -> int:
        """How often an account had a plan that no tier names."""
        return self._force.unknowns.plans

    @property
    def unknown_ages(self) -> int:
        """How often an account's age was asked for, and not known."""
        return self._force.unknowns.ages

    @property
    def call_stats(self) -> CallStats | None:
        """The calls to the store, None where there are none."""
        return getattr(self.backend, "call_stats", None)

    @property
    def patience(self) -> float:
        """The seconds that a decision may take."""
        return getattr(self.backend, "timeout", DEFAULT_TIMEOUT)

    @property
    def refunds(self) -> bool:
        """Whether the end of a request may give back what it was charged."""
        table = self._force.table
        return table is not None and table.refunds

    def feature(self, name: str) -> Feature | None:
        """Return what the policy in force says of a feature, None if it has none of that name."""
        table = self._force.table
        return None if table is None else table.policy.features.get(name)

    @property
    def _table(self) -> Table:
        return self._force.table_at(self.backend.now())

    def outage(self, feature: str, cost: int, error: Exception) -> Decision:
        """Return the feature's outage answer, for who could not even be identified.

        Zero in every tier denies all the same: then it does not matter who it is.

        Raises:
            UsageError: The feature is unknown.
        """
        table = self._table
        entries = [named(table, tier.name, feature) for tier in table.policy.tiers]
        last = entries[-1]
        if not self.enabled or all(entry.cell.zero and not entry.variants for entry in entries):
            decision = self._without_asking(table, last, cost, None, 0)
            if decision is not None:
                return self._said(last, decision, None)
        return self._outage(last, cost, error, None)

    async def open(self) -> None:
        """Get the backend ready in this event loop; a backend that is down is only logged.

        Raises:
            BackendError: The policy is a stored one, and cannot be loaded.
        """
        if self.enabled:
            await self.backend.open()
            await self._force.open()

    async def close(self) -> None:
        """Give back what this event loop holds. Buckets stay; a later take opens again."""
        await self._force.close()
        await self.leases.close()
        self._shadows.close()
        await self.backend.close()

    @property
    def ready(self) -> bool:
        """Whether there is a policy to decide by: false where a stored one was not loaded yet."""
        return self._force.table is not None

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def match(
        self, method: str, path: str, *, outside_root: bool = False
    ) -> tuple[str, int] | None:
        """Return the feature and the cost that a request is metered as, None if it is not.

        `path` is decoded and below the application's root path; `outside_root` says that there is
        one and that the path does not begin with it.
        """
        return self._table.match(method, path, outside_root=outside_root)

    async def take(
        self,
        account: Account,
        feature: str,
        cost: int = 1,
        *,
        rematch: Callable[[], tuple[str, int]] | None = None,
        settle_within: float | None = None,
    ) -> Decision:
        """Charge `cost` tokens to every quota of the account's cell and its pool, or to none.

        A cost of 0 charges nothing. Where the backend cannot answer, the decision is the feature's
        outage answer, with reason `outage`; zero denies all the same. A denial is remembered until
        its time, a second at most: the same cost or more is denied meanwhile without asking.

        Where the policy says `concurrency`, an allowed take holds a slot: `decision.lease`, which
        is yours to renew and release. With `settle_within`, in seconds, the cost may be corrected
        for so long, as `reserve` says; None makes it final.

        `rematch` returns the feature and the cost of the request anew where a newer policy came
        into force meanwhile; what it raises is raised.

        Raises:
            BackendError: There is no policy yet, as `ready` tells.
            UsageError: The feature is unknown, the cost is no whole number from 0 to 10**9, or an
                id cannot be stored. Nothing was charged.
        """
        error: BackendError
        reply: Any  # a `Reply`, or a `Claimed`
        at = 0
        keep_us = 0 if settle_within is None else _kept_us(settle_within)
        for _ in range(1 + _MOST_REDECISIONS):
            decision, entry, subject, charges, stamp, times, claim = self._ask(
                account, feature, cost, at, keep_us
            )
            if decision is not None:
                return decision
            try:
                if claim is not None:
                    reply = await self._claim(charges, claim, stamp, times)
                elif self._take_now is not None:
                    reply = self._take_now(charges)
                elif self._comparing is None:
                    reply = await self.backend.take(charges)
                else:
                    reply = await self._comparing.take(charges, stamp, times)
            except StaleError as exc:
                error = exc
                # By its own clock: the nodes of a cluster need not agree on the time.
                at = exc.now if exc.why == "time" else 0
                if not await self._catch_up(exc):
                    break
                if rematch is not None:
                    feature, cost = rematch()
            except (BackendError, asyncio.CancelledError) as exc:
                return self._given_up(entry, cost, charges, claim, exc, account)
            else:
                return self._conclude(entry, cost, subject, reply, account, charges, claim)
        return self._outage(entry, cost, error, account)

    def take_now(self, account: Account, feature: str, cost: int = 1) -> Decision | None:
        """Do what `take` does, where that needs no waiting; None where it does.

        Raises:
            UsageError: As `take`.
        """
        if self._take_now is None:
            return None
        decision, entry, subject, charges, _, _, claim = self._ask(account, feature, cost)
        if decision is not None:
            return decision
        reply: Any  # a `Reply`, or a `Claimed`
        try:
            if claim is None or self._memory is None:
                reply = self._take_now(charges)
            else:
                reply = self._memory.claim_now(charges, claim)
        except BackendError as exc:
            return self._outage(entry, cost, exc, account)
        return self._conclude(entry, cost, subject, reply, account, charges, claim)

    def reserve(
        self,
        account: Account,
        feature: str,
        cost: int = 1,
        *,
        settle_within: float = SETTLE_WITHIN,
    ) -> Reservation:
        """Charge an estimate now, to be corrected once the true cost is known.

        `async with limiter.reserve(account, "video", cost=30) as r: ... await r.settle(seconds)`,
        or `limiter.settle(r.token, seconds)` in another process. Within `settle_within` seconds,
        and once: then, and where nobody settles, the estimate stands.

        Raises:
            UsageError: As `take`, or `settle_within` is out of bounds.
        """
        _kept_us(settle_within)

        async def take() -> Decision:
            return await self.take(account, feature, cost, settle_within=settle_within)

        return Reservation(take, self._settle)

    async def settle(self, token: str, actual: int) -> bool:
        """Correct the cost of a reservation of any process to `actual` tokens, once.

        False where there is nothing to settle any more: it was done, or it is too late. Less is
        given back: what was charged, at most at today's price. More is charged, and may leave a
        bucket below empty, by one capacity at most.

        Raises:
            UsageError: It is no token of this namespace, or `actual` is no whole number from 0 to
                10**9.
            BackendError: The store could not answer. It may or may not be settled; once more does
                no harm.
        """
        check_actual(actual)
        return bool(token) and await self._settle(Taken.read(token, self.namespace), actual)

    async def refund(self, decision: Decision) -> Decision:
        """Give back what a take was charged, and return the decision as it stands then.

        Only of features with `refund_on` or `refund_on_exception`, and of reservations: of others
        it is not known any more what was charged, and nothing is done. Never beyond full. It is not
        for you to repeat: a refund that got no answer may have happened.

        Raises:
            BackendError: The store could not answer.
        """
        taken = decision.taken
        if taken is None or not taken.buckets or not taken.cost:
            return decision
        back = corrections(taken, 0, self._force.table)
        if taken.record:
            debts = (await self.leases.holds.settle(taken.record, back)).debts
        else:
            debts = await self.leases.holds.refund(back)
        own = len(decision.limits)
        return decision._replace(debts=debts[:own], demanded=None)

    async def _settle(self, taken: Taken, actual: int) -> bool:
        if not taken.record:
            return False
        corrected = corrections(taken, actual, self._force.table)
        return (await self.leases.holds.settle(taken.record, corrected)).settled

    async def peek(self, account: Account, feature: str, cost: int = 1) -> Decision:
        """Return what `take` would decide now, charging nothing.

        `remaining` is what is there, before the cost.

        Raises:
            UsageError: As `take`.
        """
        now = self.backend.now()
        table = self._force.table_at(now)
        entry = checked(table, account, feature, cost, now)
        return (await self._peek_all(table, account, [entry], cost, now))[0]

    async def usage(self, account: Account) -> dict[str, Decision]:
        """Return what a take of cost 1 would decide for every feature, charging nothing.

        One call to the backend at most, whatever the number of features.

        Raises:
            UsageError: An id of the account cannot be stored.
        """
        now = self.backend.now()
        table = self._force.table_at(now)
        row = table.row(table.tier_of(account, now))
        entries = [table.find(account, feature, now) or entry for feature, entry in row.items()]
        decisions = await self._peek_all(table, account, entries, 1, now)
        return dict(zip(row, decisions, strict=True))

    def tier_of(self, account: Account) -> str:
        """Return the name of the tier that the account falls in now, by the backend's clock."""
        return self._table.tier_of(account, self.backend.now())


async def _nobody(*_: object) -> Claimed:
    raise UsageError("concurrency and reservations need one of our backends")


def _kept_us(settle_within: float) -> int:
    """Return for how long a reservation is kept, in microseconds.

    Raises:
        UsageError: It is out of bounds.
    """
    most = _LONGEST_SETTLE_US // SECOND_US
    if type(settle_within) not in (int, float) or not 1 <= settle_within <= most:
        raise UsageError(f"settle_within must be from 1 to {most:,} s, got {settle_within!r:.80}")
    return round(settle_within * SECOND_US)

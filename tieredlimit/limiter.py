"""The front of it all: from an account and a feature to a decision."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tieredlimit._core.account import Account
from tieredlimit._core.denials import Denials
from tieredlimit._core.keys import IdSecret, Layout
from tieredlimit._core.policy import Policy
from tieredlimit._core.table import Table
from tieredlimit._core.tally import CallStats, Samples, Tallies
from tieredlimit.backends import Backend, Charge, Claimed, MemoryBackend, Reply
from tieredlimit.backends.backend import ComparingBackend, StaleError
from tieredlimit.backends.breaker import Breaker
from tieredlimit.backends.control import holds_of
from tieredlimit.backends.holds import Holds, NoHolds
from tieredlimit.backends.server import DEFAULT_TIMEOUT
from tieredlimit.backends.shared import is_over_redis
from tieredlimit.backends.urls import backend_at
from tieredlimit.complaints import Complaints
from tieredlimit.decision import Decision
from tieredlimit.environment import DEFAULT_NAMESPACE, from_environment
from tieredlimit.errors import BackendError, UsageError
from tieredlimit.inforce import InForce, Stored
from tieredlimit.judging import require_account, unlimited
from tieredlimit.leases import Leases
from tieredlimit.local import Local
from tieredlimit.observe import Observer, Observers
from tieredlimit.peeking import Peeking
from tieredlimit.reserving import SETTLE_WITHIN, Reserving, kept_us
from tieredlimit.shadow import Shadows

if TYPE_CHECKING:
    from tieredlimit.control import Control

__all__ = ["SETTLE_WITHIN", "Complaints", "Limiter"]

MAX_SHARDS = 1_024

_NAMESPACE = re.compile(r"[a-z0-9_-]{1,32}")
_MOST_REDECISIONS = 3


class Limiter(Peeking, Reserving):
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
        enabled: False allows everything and never asks the backend, nor about what others took.
        observers: Who is shown each decision, outage and revision.
        close: What is closed in this process whatever is published, and even where the store is
            down: `video:new, image` is a feature for a tier, and another for everyone. None is
            what `TIEREDLIMIT_CLOSE` says.
        close_file: A file with lines of the same, looked at twice a second while the limiter is
            open; it need not exist. None is what `TIEREDLIMIT_CLOSE_FILE` names.
        id_secret: Ids are hashed with it wherever a bucket or a slot is named: in the store, in
            tokens, in what heartbeats tell. At least 16 characters; all processes of a namespace
            must have the same. None leaves ids readable.

    Raises:
        PolicyError: The policy has faults.
        UsageError: The backend, the namespace or the secret cannot be used.
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
        close: str | None = None,
        close_file: str | Path | None = None,
        id_secret: str | None = None,
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
            backend = backend_at(backend)
        secret = IdSecret(id_secret) if id_secret is not None else None
        self.enabled = enabled
        self.namespace = namespace
        self.backend: Backend = backend
        if shards is None:
            shards = getattr(backend, "default_shards", 1)
        if type(shards) is not int or not 1 <= shards <= MAX_SHARDS:
            raise UsageError(f"shards must be from 1 to {MAX_SHARDS:,}, got {shards!r:.80}")
        if is_over_redis(backend):
            backend.join(namespace, Layout(shards, "" if secret is None else secret.fingerprint))
        self.complaints: Complaints = Complaints()
        self.observers: Observers = Observers(observers)
        self._observed = bool(self.observers)
        self.tallies: Tallies = Tallies()
        self.samples: Samples = Samples(namespace, secret=secret)
        self._denials = Denials()
        self._local = Local(backend.now)
        self.leases: Leases = Leases(None, namespace, self.complaints, self.patience)
        self._shadows = Shadows(backend, self.observers)
        self._force = InForce(
            policy,
            backend,
            namespace,
            shards,
            close=close,
            close_file=close_file,
            secret=secret,
            tallies=self.tallies,
            samples=self.samples,
            complaints=self.complaints,
            changed=self._changed,
        )
        self._ask_at(backend, holds_of(backend) if enabled else NoHolds())

    @classmethod
    def from_env(cls, *, observers: Iterable[Observer] = ()) -> Self:
        """Build a limiter from the environment, shown to these observers.

        `TIEREDLIMIT_POLICY` names the policy file, or several joined by the system's path
        separator, each laid over the ones before; `stored` is the one that was pushed.
        `TIEREDLIMIT_REDIS` is a Redis URL; without one buckets are kept in this process.
        `TIEREDLIMIT_NAMESPACE`, `TIEREDLIMIT_ENABLED` (0 or 1), `TIEREDLIMIT_CLOSE`,
        `TIEREDLIMIT_CLOSE_FILE` and `TIEREDLIMIT_ID_SECRET` are what the arguments of those names
        are.

        Raises:
            PolicyError: The policy has faults.
            UsageError: A variable is missing or cannot be used.
        """
        return cls(**from_environment(), observers=observers)

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
        # What never changes anything does without all that lays overrides and compares policies.
        from tieredlimit.control import Control

        return Control(self._force.store, lambda: self.policy, self._force.standing)

    @property
    def unknown_plans(self) -> int:
        """How often an account had a plan that no tier names, peeks included."""
        return self._force.unknowns.plans

    @property
    def unknown_ages(self) -> int:
        """How often an account's age was asked for, and not known, peeks included."""
        return self._force.unknowns.ages

    @property
    def call_stats(self) -> CallStats | None:
        """The calls to the store, None where there are none."""
        return getattr(self.backend, "call_stats", None)

    @property
    def breaker_open(self) -> bool | None:
        """Whether a server is not asked for now, after it failed so often in a row.

        Requests then get the outage answer at once, until a probe is answered. None where there is
        no server to ask.
        """
        breakers: list[Breaker] | None = getattr(self.backend, "breakers", None)
        return None if breakers is None else any(breaker.open for breaker in breakers)

    @property
    def patience(self) -> float:
        """The seconds that a decision may take."""
        return getattr(self.backend, "timeout", DEFAULT_TIMEOUT)

    @property
    def refunds(self) -> bool:
        """Whether the end of a request may give back what it was charged."""
        table = self._force.table
        return table is not None and table.refunds

    @property
    def _table(self) -> Table:
        return self._force.table_at(self.backend.now())

    async def open(self) -> None:
        """Get the backend ready in this event loop; a backend that is down is only logged.

        Raises:
            BackendError: The policy is a stored one, and cannot be loaded.
        """
        if self.enabled:
            await self.backend.open()
            await self._force.open()

    def follow(self) -> None:
        """Follow what is in force from this event loop, without waiting for it, if it is enabled.

        The middleware and the first take see to it where nobody has opened the limiter.
        """
        if self.enabled:
            self._force.follow()

    def _let_all_through(self) -> bool:
        """Follow from now on; say whether there is neither a policy nor a need for one."""
        self.follow()
        return self._switched_off

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

    @property
    def following(self) -> bool:
        """Whether there is a policy, and what changes it is followed; false once it is closed."""
        return self._force.followed and self._force.table is not None

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

    async def take(  # noqa: C901 -- in parts it would cost each take a coroutine more
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
        at, by = 0, 0.0
        arrived = time.monotonic()
        keep_us = 0 if settle_within is None else kept_us(settle_within)
        if type(account) is not Account:
            require_account(account)
        if not self._force.followed and self._let_all_through():
            return unlimited(feature, cost)
        for _ in range(1 + _MOST_REDECISIONS):
            decision, entry, subject, charges, stamp, times, claim = self._ask(
                account, feature, cost, at, keep_us
            )
            if decision is not None:
                return decision
            try:
                if claim is None and self._take_now is not None:
                    reply = self._take_now(charges)
                else:
                    if claim is not None:
                        asked: Awaitable[Any] = self._claim(charges, claim, stamp, times)
                    elif self._comparing is not None:
                        asked = self._comparing.take(charges, stamp, times)
                    else:
                        asked = self.backend.take(charges)
                    reply = await (self._in_time(asked, by) if by else asked)
            except StaleError as exc:
                error = exc
                by = arrived + self.patience
                # By its own clock: the nodes of a cluster need not agree on the time.
                at = exc.now if exc.why == "time" else 0
                if not await self._catch_up(exc, by):
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
        if self._take_now is None or type(account) is not Account or not self._force.followed:
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

    async def _take_kept(
        self, account: Account, feature: str, cost: int, settle_within: float
    ) -> Decision:
        return await self.take(account, feature, cost, settle_within=settle_within)

    def _ask_at(self, backend: Backend, holds: Holds | None) -> None:
        """Ask this store from now on, and `holds` about what is taken of it."""
        self.backend = backend
        self.leases.ask_at(holds)
        self._shadows.ask_at(backend)
        # Each call of these also says whether what it was prepared by is still in force.
        self._comparing: ComparingBackend | None = None
        self._claim: Callable[..., Awaitable[Claimed]] = _nobody
        if is_over_redis(backend):
            self._comparing = backend
            self._claim = backend.claim
        # What answers without waiting is asked so, unless a subclass has its own way.
        self._take_now: Callable[[Sequence[Charge]], Reply] | None = None
        self._memory = backend if isinstance(backend, MemoryBackend) else None
        if self._memory is not None:
            self._claim = self._memory.claim
        if isinstance(backend, MemoryBackend) and type(backend).take is MemoryBackend.take:
            self._take_now = backend.take_now


async def _nobody(*_: object) -> Claimed:
    raise UsageError("concurrency and reservations need one of our backends")

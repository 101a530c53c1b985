"""The front of it all: from an account and a feature to a decision."""

from __future__ import annotations

import logging
import math
import os
import random
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tieredlimit._core.account import Account
from tieredlimit._core.bucket import wait_us
from tieredlimit._core.denials import Denials
from tieredlimit._core.policy import Policy
from tieredlimit._core.quota import MAX_AMOUNT
from tieredlimit._core.rate import SECOND_US
from tieredlimit._core.reading import did_you_mean
from tieredlimit._core.table import Entry, Table
from tieredlimit.backends import (
    Backend,
    Charge,
    ClusterBackend,
    MemoryBackend,
    RedisBackend,
    Reply,
)
from tieredlimit.backends.memory import new_tuple
from tieredlimit.decision import Decision
from tieredlimit.errors import BackendError, UsageError

__all__ = ["Complaints", "Limiter"]

DEFAULT_NAMESPACE = "default"
MAX_SHARDS = 1_024

_NAMESPACE = re.compile(r"[a-z0-9_-]{1,32}")
_SWITCH = {
    "1": True, "true": True, "yes": True, "on": True,
    "0": False, "false": False, "no": False, "off": False,
}  # fmt: skip
# Denied clients of an outage come back within these seconds, not all at once.
_OUTAGE_RETRY = (1.0, 5.0)
_LOG_INTERVAL = 1.0
_LONGEST_COMPLAINT = 500
_LONGEST_NAME = 32
_MOST_PLACES = 8

_log = logging.getLogger("tieredlimit")


class Limiter:
    """Decide whether an account may use a feature now, and charge it if so.

    Open it with `async with`, or let the middleware, or the first take, open it; it may be used in
    several event loops and after a fork, and again after it was closed.

    Args:
        policy: A `Policy`, a document as a mapping, or the path of a TOML file.
        backend: A Redis URL, or a `Backend`; None keeps buckets in this process.
        namespace: Keeps the buckets of several applications on one Redis apart; 1 to 32 of
            `a-z`, `0-9`, `_` and `-`.
        shards: The number of hash tags that keys are spread over, 1 to 1,024, so that a Redis
            Cluster can share the load: 64 there, else 1, where it is None. All processes of a
            namespace must say the same.
        enabled: False allows everything and never asks the backend.

    Raises:
        PolicyError: The policy has faults.
        UsageError: The backend or the namespace cannot be used.
    """

    def __init__(
        self,
        policy: Policy | Mapping[str, Any] | str | Path,
        backend: Backend | str | None = None,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        shards: int | None = None,
        enabled: bool = True,
    ) -> None:
        if not _NAMESPACE.fullmatch(namespace):
            raise UsageError(f"a namespace is 1 to 32 of a-z, 0-9, _ and -, got {namespace!r:.80}")
        if isinstance(policy, (str, Path)):
            policy = Policy.load(policy)
        elif not isinstance(policy, Policy):
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
        self._table = Table(policy, namespace, shards)
        # What answers without waiting is asked so, unless a subclass has its own way.
        self._take_now: Callable[[Sequence[Charge]], Reply] | None = None
        if isinstance(backend, MemoryBackend) and type(backend).take is MemoryBackend.take:
            self._take_now = backend.take_now
        self._denials = Denials()
        self.complaints = Complaints()

    @classmethod
    def from_env(cls) -> Self:
        """Build a limiter from the environment.

        `TIEREDLIMIT_POLICY` names the policy file, or several joined by the system's path
        separator, each laid over the ones before. `TIEREDLIMIT_REDIS` is a Redis URL; without one
        buckets are kept in this process. `TIEREDLIMIT_NAMESPACE` and `TIEREDLIMIT_ENABLED` (0 or
        1) are what the arguments of those names are.

        Raises:
            PolicyError: The policy has faults.
            UsageError: A variable is missing or cannot be used.
        """
        paths = [
            path for path in os.environ.get("TIEREDLIMIT_POLICY", "").split(os.pathsep) if path
        ]
        if not paths:
            raise UsageError("TIEREDLIMIT_POLICY must name a policy file, and is not set")
        switch = os.environ.get("TIEREDLIMIT_ENABLED") or "1"
        if switch.lower() not in _SWITCH:
            raise UsageError(f"TIEREDLIMIT_ENABLED must be 0 or 1, got {switch!r:.80}")
        return cls(
            Policy.load(*paths),
            os.environ.get("TIEREDLIMIT_REDIS") or None,
            namespace=os.environ.get("TIEREDLIMIT_NAMESPACE") or DEFAULT_NAMESPACE,
            enabled=_SWITCH[switch.lower()],
        )

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._table.policy

    def outage(self, feature: str, cost: int, error: Exception) -> Decision:
        """Return the feature's outage answer, for who could not even be identified.

        Zero in every tier denies all the same: then it does not matter who it is.

        Raises:
            UsageError: The feature is unknown.
        """
        tiers = [tier.name for tier in self.policy.tiers]
        entries = [self._named(tier, feature) for tier in tiers]
        decision = None
        if not self.enabled or all(entry.cell.zero for entry in entries):
            decision = self._without_asking(entries[-1], cost)
        return decision or self._outage(entries[-1], cost, error)

    async def open(self) -> None:
        """Get the backend ready in this event loop; a backend that is down is only logged."""
        if self.enabled:
            await self.backend.open()

    async def close(self) -> None:
        """Give back what this event loop holds. Buckets stay; a later take opens again."""
        await self.backend.close()

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

    async def take(self, account: Account, feature: str, cost: int = 1) -> Decision:
        """Charge `cost` tokens to every quota of the account's cell, or to none.

        A cost of 0 charges nothing. Where the backend cannot answer, the decision is the feature's
        outage answer, with reason `outage`; zero denies all the same. A denial is remembered until
        its time, a second at most: the same cost or more is denied meanwhile without asking.

        Raises:
            UsageError: The feature is unknown, the cost is no whole number from 0 to 10**9, or an
                id cannot be stored. Nothing was charged.
        """
        decision, entry, subject, charges = self._ask(account, feature, cost)
        if decision is not None:
            return decision
        try:
            now = self._take_now
            reply = await self.backend.take(charges) if now is None else now(charges)
        except BackendError as exc:
            return self._outage(entry, cost, exc)
        return self._conclude(entry, cost, subject, reply)

    def take_now(self, account: Account, feature: str, cost: int = 1) -> Decision | None:
        """Do what `take` does, where that needs no waiting; None where it does.

        Raises:
            UsageError: As `take`.
        """
        if self._take_now is None:
            return None
        decision, entry, subject, charges = self._ask(account, feature, cost)
        if decision is not None:
            return decision
        try:
            reply = self._take_now(charges)
        except BackendError as exc:
            return self._outage(entry, cost, exc)
        return self._conclude(entry, cost, subject, reply)

    def _ask(
        self, account: Account, feature: str, cost: int
    ) -> tuple[Decision | None, Entry, object, Sequence[Charge]]:
        """Return the decision if it needs no backend, the cell, and what to charge for whom."""
        table = self._table
        now = self.backend.now() if table.asks_age else 0
        entry = None
        if type(cost) is int and 0 <= cost <= MAX_AMOUNT and type(feature) is str:
            entry = table.find(account, feature, now)
        if entry is None:
            entry = self._entry(account, feature, cost)
        if not self.enabled or entry.most is None or cost > entry.most:
            decision = self._without_asking(entry, cost)
            if decision is not None:
                return decision, entry, None, ()
        shelves = entry.shelves
        shard = table.shard_of(account) if table.shards > 1 else 0
        subject: object
        if len(shelves) == 1:
            shelf = shelves[0]
            subject = key = shelf.key(account, shard)
            charges: Sequence[Charge] = (new_tuple(Charge, (key, shelf, cost)),)
        else:
            charges = [Charge(shelf.key(account, shard), shelf, cost) for shelf in shelves]
            subject = tuple(charge.key for charge in charges)
        denials = self._denials
        if denials.held:
            debts = denials.recall(subject, cost, self.backend.now(), _local_us())
            if debts is not None:
                return _denial(entry, cost, debts), entry, subject, ()
        return None, entry, subject, charges

    def _conclude(self, entry: Entry, cost: int, subject: object, reply: Reply) -> Decision:
        """Return the decision that a reply means."""
        allowed, now, debts = reply
        if allowed:
            # As `Decision(…)`, at half its cost.
            return new_tuple(
                Decision,
                (
                    True, "allowed", entry.cell, cost, None,
                    entry.quotas, debts, entry.policy_field,
                ),
            )  # fmt: skip
        denial = _denial(entry, cost, debts)
        wait_us = round((denial.retry_after or 0) * SECOND_US)
        self._denials.remember(subject, cost, now, wait_us, debts, _local_us())
        return denial

    async def peek(self, account: Account, feature: str, cost: int = 1) -> Decision:
        """Return what `take` would decide now, charging nothing.

        `remaining` is what is there, before the cost.

        Raises:
            UsageError: As `take`.
        """
        entry = self._entry(account, feature, cost)
        return (await self._peek_all(account, [entry], cost))[0]

    async def usage(self, account: Account) -> dict[str, Decision]:
        """Return what a take of cost 1 would decide for every feature, charging nothing.

        One call to the backend at most, whatever the number of features.

        Raises:
            UsageError: An id of the account cannot be stored.
        """
        row = self._table.row(self._table.tier_of(account, self._now()))
        decisions = await self._peek_all(account, list(row.values()), 1)
        return dict(zip(row, decisions, strict=True))

    def tier_of(self, account: Account) -> str:
        """Return the name of the tier that the account falls in now, by the backend's clock."""
        return self._table.tier_of(account, self._now())

    def _now(self) -> int:
        return self.backend.now() if self._table.asks_age else 0

    def _entry(self, account: Account, feature: str, cost: int) -> Entry:
        if type(cost) is not int or not 0 <= cost <= MAX_AMOUNT:
            raise UsageError(
                f"cost must be a whole number from 0 to {MAX_AMOUNT:,}, got {_spell_cost(cost)}"
            )
        table = self._table
        now = self.backend.now() if table.asks_age else 0
        found = table.find(account, feature, now) if type(feature) is str else None
        return found or self._named(table.tier_of(account, now), feature)

    def _named(self, tier: str, feature: str) -> Entry:
        # A feature may come from a request's body: of any type, of any length.
        if type(feature) is not str:
            raise UsageError(f"a feature's name is a string, got {type(feature).__name__}")
        try:
            return self._table.entry(tier, feature)
        except KeyError:
            known = list(self.policy.features)
            hint = did_you_mean(feature[:_LONGEST_NAME], known)
            raise UsageError(
                f'unknown feature "{feature:.80}"{hint}; known are {", ".join(known)}'
            ) from None

    def _without_asking(self, entry: Entry, cost: int) -> Decision | None:
        """Return the decision that no bucket can change, None where buckets decide."""
        cell = entry.cell
        if not self.enabled:
            return Decision(True, "allowed", cell, cost)
        if entry.most is None:
            return Decision(cell.unlimited, "allowed" if cell.unlimited else "zero", cell, cost)
        if cost > entry.most:
            return Decision(False, "quota", cell, cost, None, entry.quotas)
        return None

    def _outage(self, entry: Entry, cost: int, error: Exception) -> Decision:
        """Return the feature's outage answer, and say so in the log."""
        name, answer = entry.feature.name, entry.feature.outage
        self.complaints.log(f'no decision could be made: "{name}" gets "{answer}"', error)
        if answer == "allow":
            return Decision(True, "outage", entry.cell, cost)
        retry_after = random.uniform(*_OUTAGE_RETRY)  # noqa: S311 -- to spread, not to hide
        return Decision(False, "outage", entry.cell, cost, retry_after)

    async def _peek_all(
        self, account: Account, entries: Sequence[Entry], cost: int
    ) -> list[Decision]:
        known = [self._without_asking(entry, cost) for entry in entries]
        asked = [entry for entry, decision in zip(entries, known, strict=True) if not decision]
        shard = self._table.shard_of(account)
        charges = [
            Charge(shelf.key(account, shard), shelf, 0)
            for entry in asked
            for shelf in entry.shelves
        ]
        decided = []
        if charges:
            try:
                debts = list((await self.backend.take(charges)).debts)
            except BackendError as exc:
                decided = [self._outage(entry, cost, exc) for entry in asked]
            else:
                for entry in asked:
                    own, debts = debts[: len(entry.quotas)], debts[len(entry.quotas) :]
                    decided.append(_judge(entry, cost, own))
        rest = iter(decided)
        return [decision or next(rest) for decision in known]


def _local_us() -> int:
    return time.monotonic_ns() // 1000


def _denial(entry: Entry, cost: int, debts: Sequence[int]) -> Decision:
    """Return the denial of a cost by buckets as they stand."""
    # A cost that never fits is denied before any bucket is asked: every wait is known here.
    waits = (wait_us(quota, debt, cost) for quota, debt in zip(entry.quotas, debts, strict=True))
    latest = max(wait or 0 for wait in waits)
    return Decision(False, "quota", entry.cell, cost, latest / SECOND_US, entry.quotas, debts)


def _judge(entry: Entry, cost: int, debts: Sequence[int]) -> Decision:
    """Return what a take would decide of buckets as they stand."""
    decision = _denial(entry, cost, debts)
    if decision.retry_after:
        return decision
    policy = entry.policy_field
    return Decision(True, "allowed", entry.cell, cost, None, entry.quotas, debts, policy)


def _spell_cost(cost: object) -> str:
    if type(cost) is int and abs(cost) > MAX_AMOUNT**2:
        return f"one of {cost.bit_length()} bits"  # which Python may refuse to spell
    return f"{cost!r:.80}"


class Complaints:
    """Log what went wrong on the way to a decision, one line a second at most.

    Args:
        clock: Returns seconds; for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._quiet_until = -math.inf
        self._unsaid = 0

    def log(self, what: str, error: Exception) -> None:
        """Log it with the error, and with where it was raised, if not by the store."""
        now = self._clock()
        if now < self._quiet_until:
            self._unsaid += 1
            return
        from_store = isinstance(error, BackendError)
        places = [] if from_store else traceback.format_tb(error.__traceback__)
        _log.log(
            logging.WARNING if from_store else logging.ERROR,
            "tieredlimit: %s: %s%s%s",
            what,
            f"{type(error).__name__}: {error}"[:_LONGEST_COMPLAINT],
            f" ({self._unsaid} more since the last line)" if self._unsaid else "",
            # Without the exception: its text may quote all that a client sent.
            "".join(["\n", *places[-_MOST_PLACES:]]) if places else "",
        )
        self._quiet_until, self._unsaid = now + _LOG_INTERVAL, 0

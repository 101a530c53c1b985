"""The way from an account and a cell to a decision, around the one question to the store."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from os import urandom
from typing import Any

from tieredlimit._core.account import Account
from tieredlimit._core.denials import Denials
from tieredlimit._core.keys import reservation_key
from tieredlimit._core.quota import MAX_AMOUNT
from tieredlimit._core.rate import SECOND_US
from tieredlimit._core.revision import Revision
from tieredlimit._core.stamp import Stamp
from tieredlimit._core.table import Entry, Table
from tieredlimit._core.tally import Samples
from tieredlimit.backends import Backend, Charge, Claim, Claimed, MemoryBackend, Reply, Slot
from tieredlimit.backends.backend import ComparingBackend, NotAskedError, StaleError
from tieredlimit.backends.memory import new_tuple
from tieredlimit.complaints import Complaints
from tieredlimit.decision import Decision
from tieredlimit.demanded import Demanded, taken_by
from tieredlimit.errors import BackendError
from tieredlimit.inforce import InForce
from tieredlimit.judging import (
    checked,
    closed,
    demanding_denial,
    denial_of,
    pool_denial,
    settled,
)
from tieredlimit.leases import Leases
from tieredlimit.local import Local
from tieredlimit.observe import Observers
from tieredlimit.shadow import Shadows

# Denied clients of an outage come back within these seconds, not all at once.
_OUTAGE_RETRY = (1.0, 5.0)

Asked = tuple[
    Decision | None,
    Entry,
    object,
    Sequence[Charge],
    Stamp | None,
    tuple[int, int] | None,
    Claim | None,
]
"""A decision, or what to ask for it; see `Deciding._ask`."""


class Deciding:
    """What `Limiter` does before and after it asks the store.

    `_ask` returns the decision, or what to ask; `_conclude` makes a decision of the reply,
    `_outage` of its absence.
    """

    backend: Backend
    enabled: bool
    namespace: str
    complaints: Complaints
    leases: Leases
    observers: Observers
    samples: Samples
    _comparing: ComparingBackend | None
    _denials: Denials
    _force: InForce
    _local: Local
    _observed: bool
    _shadows: Shadows
    _take_now: Callable[[Sequence[Charge]], Reply] | None
    _memory: MemoryBackend | None
    _claim: Callable[..., Awaitable[Claimed]]

    def _ask(
        self, account: Account, feature: str, cost: int, at: int = 0, keep_us: int = 0
    ) -> Asked:
        """Return the decision if it needs no backend, or what to ask of it, and by which cell.

        That is under what a denial is remembered, the charges, the revision, the instants for
        which it is asked, and what is claimed beside the charges. `at` is the instant to decide by,
        0 for the backend's; `keep_us` for how long it may be settled.
        """
        force = self._force
        table = force.table
        now = at
        if table is None or table.bounded:
            now = now or self.backend.now()
            table = force.table_at(now)
        entry: Entry | None = None
        times: tuple[int, int] | None = None
        if type(cost) is int and 0 <= cost <= MAX_AMOUNT and type(feature) is str:
            if table.timed:
                now = now or self.backend.now()
                entry, times = table.look_up(account, feature, now)
            else:
                entry = table.rows[table.ranking.first(account, 0)].get(feature)
        if entry is None:
            entry = checked(table, account, feature, cost, now or self.backend.now())
        if entry.shadow is not None and self.enabled:
            self._shadows.measure(table, entry.shadow, account, cost, times)
        if not self.enabled or entry.most is None or cost > entry.most:
            decision = self._without_asking(table, entry, cost, account, now)
            if decision is not None:
                return self._said(entry, decision, account), entry, None, (), None, None, None
        if entry.demands is not None or keep_us:
            return self._ask_more(table, entry, account, cost, times, keep_us)
        shelves = entry.shelves
        shard = table.shard_of(account) if table.shards > 1 else 0
        stamp = None if self._comparing is None else table.stamp(shard)
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
            debts = denials.recall(subject, cost, self.backend.now(), _local_us(), entry.quotas)
            if debts is not None:
                denial = denial_of(entry, cost, debts)
                return self._said(entry, denial, account), entry, subject, (), None, None, None
        return None, entry, subject, charges, stamp, times, None

    def _ask_more(
        self,
        table: Table,
        entry: Entry,
        account: Account,
        cost: int,
        times: tuple[int, int] | None,
        keep_us: int,
    ) -> Asked:
        """Do what `_ask` does for what asks for a pool, for slots, or to be settled."""
        shard, charges, slots = demanded(table, entry, account, cost)
        if self._denials.held:
            denial = self._recalled(entry, cost, tuple([charge.key for charge in charges]))
            if denial is not None:
                return self._said(entry, denial, account), entry, None, (), None, None, None
        claim = None
        if slots or (keep_us and charges):
            id_ = urandom(16)
            record = reservation_key(f"{self.namespace}:{shard}", id_) if keep_us else ""
            claim = new_tuple(Claim, (id_, slots, record, keep_us))
        stamp = None if self._comparing is None else table.stamp(shard)
        return None, entry, None, charges, stamp, times, claim

    def _recalled(self, entry: Entry, cost: int, subject: tuple[str, ...]) -> Decision | None:
        """Return the denial that a cell which asks for more had a moment ago, None for none."""
        denials, pool = self._denials, entry.demands and entry.demands.pool
        now, local_us = self.backend.now(), _local_us()
        debts = denials.recall(subject, cost, now, local_us, entry.quotas)
        if debts is not None:
            return demanding_denial(entry, cost, debts)
        if pool is not None:
            # A pool that has denied a tier's take denies all its accounts, until it has refilled.
            debts = denials.recall((subject[-1], entry.cell.tier), cost, now, local_us, pool.pool)
            if debts is not None:
                return pool_denial(entry, cost, debts[0])
        return None

    def _conclude_more(
        self,
        entry: Entry,
        cost: int,
        reply: Reply | Claimed,
        account: Account,
        charges: Sequence[Charge],
        claim: Claim | None,
    ) -> Decision:
        """Do what `_conclude` does for what `_ask_more` has asked for."""
        debts, held = reply.debts, held_of(reply)
        if not reply.allowed:
            return self._remembered(entry, cost, charges, reply, account)
        if self._denials.held:
            self._denials.forget(tuple([charge.key for charge in charges]))
        demands = entry.demands
        if demands is not None and demands.local is not None:
            self._local.note(entry, account, cost)
        own = debts
        pool_debt = None
        if len(debts) > len(entry.quotas):
            own, pool_debt = debts[:-1], debts[-1]
        demanded = Demanded(entry, cost, True, pool_debt, held, charges, claim, self.leases)
        entry.tally.allowed += 1
        quotas, policy = entry.quotas, entry.policy_field
        decision = Decision(True, "allowed", entry.cell, cost, None, quotas, own, policy, demanded)
        if self._observed:
            self.observers.on_decision(decision, account, shadow=False)
        return decision

    def _remembered(
        self,
        entry: Entry,
        cost: int,
        charges: Sequence[Charge],
        reply: Reply | Claimed,
        account: Account,
    ) -> Decision:
        """Return the denial that a reply means, and remember it where that is safe."""
        now, debts, held = reply.now, reply.debts, held_of(reply)
        denial = demanding_denial(entry, cost, debts, held)
        wait_us = round((denial.retry_after or 0) * SECOND_US)
        pool = entry.demands and entry.demands.pool
        # Never where a slot was missing: it may be free the next moment.
        if wait_us and not any(one.denies for one in denial.slots):
            remember = self._denials.remember
            subject = tuple([charge.key for charge in charges])
            if denial.reason == "pool" and pool is not None:
                key, local_us = (subject[-1], entry.cell.tier), _local_us()
                remember(key, cost, now, wait_us, debts[-1:], local_us, pool.pool)
            else:
                remember(subject, cost, now, wait_us, debts, _local_us(), entry.quotas)
        return self._said(entry, denial, account)

    def _conclude(
        self,
        entry: Entry,
        cost: int,
        subject: object,
        reply: Any,
        account: Account,
        charges: Sequence[Charge],
        claim: Claim | None,
    ) -> Decision:
        """Return the decision that a reply means: a `Reply`, or a `Claimed` to a claim."""
        if claim is not None or entry.demands is not None:
            return self._conclude_more(entry, cost, reply, account, charges, claim)
        allowed, now, debts = reply
        if allowed:
            if self._denials.held:
                self._denials.forget(subject)
            entry.tally.allowed += 1
            # As `Decision(…)`, at half its cost.
            decision = new_tuple(
                Decision,
                (
                    True, "allowed", entry.cell, cost, None,
                    entry.quotas, debts, entry.policy_field, None,
                ),
            )  # fmt: skip
            if self._observed:
                self.observers.on_decision(decision, account, shadow=False)
            return decision
        denial = denial_of(entry, cost, debts)
        wait_us = round((denial.retry_after or 0) * SECOND_US)
        self._denials.remember(subject, cost, now, wait_us, debts, _local_us(), entry.quotas)
        return self._said(entry, denial, account)

    async def _catch_up(self, stale: StaleError, deadline: float) -> bool:
        """Get hold of what is in force, by an instant of `time.monotonic`; say if that worked."""
        if stale.why == "time":
            return True  # the clock was learned from the reply
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                await self._force.catch_up(stale)
        except (BackendError, TimeoutError) as exc:
            late = BackendError("it was not loaded in the decision's time")
            error = exc if isinstance(exc, BackendError) else late
            self.complaints.log("a newer revision is in force, and cannot be loaded", error)
            return False
        return True

    @staticmethod
    async def _in_time(asked: Awaitable[Any], by: float) -> Any:
        """Wait for what is asked, until an instant of `time.monotonic`.

        Raises:
            BackendError: That time is over. What was asked may run all the same.
        """
        try:
            async with asyncio.timeout(by - time.monotonic()):
                return await asked
        except TimeoutError as exc:
            late = "Redis did not answer in what was left of the decision's time"
            raise BackendError(late) from exc

    def _changed(self, revision: Revision) -> None:
        self._denials.held.clear()
        self._shadows.forget()
        if self._observed:
            self.observers.on_revision(revision.number, revision.digest)

    def _said(self, entry: Entry, decision: Decision, account: Account | None) -> Decision:
        """Count a decision, and show it to whoever watches."""
        entry.tally.count(decision.allowed, decision.reason)
        if account is not None:
            if not decision.allowed:
                now = self.backend.now()
                self.samples.add(now, account, decision.feature, decision.tier, decision.reason)
            if self._observed:
                self.observers.on_decision(decision, account, shadow=False)
        return decision

    def _without_asking(
        self,
        table: Table,
        entry: Entry,
        cost: int,
        account: Account | None,
        now: int,
        *,
        peek: bool = False,
    ) -> Decision | None:
        """Return the decision that no bucket can change, None where the backend has a word."""
        if not self.enabled:
            return Decision(True, "allowed", entry.cell, cost)
        if entry.closure is not None:
            now = now or self.backend.now()
            return closed(table, entry, entry.closure, cost, account, now)
        # An unlimited cell limits nothing, but whether that still holds is for the store to say.
        return settled(entry, cost, asks=self._comparing is not None and not peek)

    def _given_up(
        self,
        entry: Entry,
        cost: int,
        charges: Sequence[Charge],
        claim: Claim | None,
        error: BaseException,
        account: Account,
    ) -> Decision:
        """Return the outage answer to a take without a word of the store; a cancelled one goes on.

        What it claimed may be held, and nobody would ever hear of it: it is released.
        """
        if claim is not None and not isinstance(error, NotAskedError):
            self.leases.abandon(taken_by(entry, cost, charges, claim))
        if not isinstance(error, BackendError):
            raise error
        return self._outage(entry, cost, error, account)

    def _outage(
        self, entry: Entry, cost: int, error: Exception, account: Account | None
    ) -> Decision:
        """Return the feature's outage answer, count it, and say so in the log."""
        feature = entry.feature
        if self._observed:
            self.observers.on_outage(feature.name, error)
        own = None
        if feature.outage == "local" and account is not None:
            own = self._local.take(entry, account, cost)
        return self._said(entry, self._unsaid_outage(entry, cost, error, own), account)

    def _unsaid_outage(
        self,
        entry: Entry,
        cost: int,
        error: Exception,
        own: tuple[bool, float | None] | None = None,
    ) -> Decision:
        """Return the feature's outage answer, and say so in the log.

        `own` is what this process lets through by itself, and else the seconds until it does.
        """
        name, answer = entry.feature.name, entry.feature.outage
        self.complaints.log(f'no decision could be made: "{name}" gets "{answer}"', error)
        allowed, retry_after = own or (answer == "allow", None)
        if not allowed and retry_after is None:
            retry_after = random.uniform(*_OUTAGE_RETRY)  # noqa: S311 -- to spread, not to hide
        return Decision(allowed, "outage", entry.cell, cost, retry_after)


def demanded(
    table: Table, entry: Entry, account: Account, cost: int
) -> tuple[int, list[Charge], Sequence[Slot]]:
    """Return the shard, the charges and the slots of a take: its own, then its pool's."""
    shard, part = table.place_of(account, entry)
    charges = [
        new_tuple(Charge, (shelf.key(account, shard), shelf, cost)) for shelf in entry.shelves
    ]
    demands = entry.demands
    if demands is None:
        return shard, charges, ()
    if demands.pool is not None:
        shelf = demands.pool.shelves[part]
        charges.append(new_tuple(Charge, (shelf.prefix, shelf, cost)))
    slots = demands.slots(account, shard, part) if demands.lease_us is not None else ()
    return shard, charges, slots


def held_of(reply: Reply | Claimed) -> list[int]:
    """Return how many slots others hold, of each that was claimed."""
    return reply.held if isinstance(reply, Claimed) else []


def _local_us() -> int:
    return time.monotonic_ns() // 1000

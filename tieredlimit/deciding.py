"""The way from an account and a cell to a decision, around the one question to the store."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from tieredlimit._core.account import Account
from tieredlimit._core.denials import Denials
from tieredlimit._core.quota import MAX_AMOUNT
from tieredlimit._core.rate import SECOND_US
from tieredlimit._core.revision import Revision
from tieredlimit._core.stamp import Stamp
from tieredlimit._core.table import Entry, Table
from tieredlimit._core.tally import Samples
from tieredlimit.backends import Backend, Charge, Reply
from tieredlimit.backends.backend import ComparingBackend, StaleError
from tieredlimit.backends.memory import new_tuple
from tieredlimit.complaints import Complaints
from tieredlimit.decision import Decision
from tieredlimit.errors import BackendError
from tieredlimit.inforce import InForce
from tieredlimit.judging import checked, closed, denial_of, judged, settled
from tieredlimit.observe import Observers
from tieredlimit.shadow import Shadows

# Denied clients of an outage come back within these seconds, not all at once.
_OUTAGE_RETRY = (1.0, 5.0)


class Deciding:
    """What `Limiter` does before and after it asks the store.

    `_ask` returns the decision, or what to ask; `_conclude` makes a decision of the reply,
    `_outage` of its absence.
    """

    backend: Backend
    enabled: bool
    complaints: Complaints
    observers: Observers
    samples: Samples
    _comparing: ComparingBackend | None
    _denials: Denials
    _force: InForce
    _observed: bool
    _shadows: Shadows

    def _ask(
        self, account: Account, feature: str, cost: int, at: int = 0
    ) -> tuple[
        Decision | None, Entry, object, Sequence[Charge], Stamp | None, tuple[int, int] | None
    ]:
        """Return the decision if it needs no backend, or what to ask of it, and by which cell.

        That is under what a denial is remembered, the charges, the revision, and the instants for
        which it is asked. `at` is the instant to decide by, 0 for the backend's.
        """
        force = self._force
        table = force.table
        now = at
        if table is None or table.timed:
            now = now or self.backend.now()
            table = force.table_at(now)
        entry: Entry | None = None
        times: tuple[int, int] | None = None
        if type(cost) is int and 0 <= cost <= MAX_AMOUNT and type(feature) is str:
            if table.timed:
                entry, times = table.look_up(account, feature, now)
            else:
                entry = table.rows[table.ranking.first(account, 0)].get(feature)
        if entry is None:
            entry = checked(table, account, feature, cost, now)
        if entry.shadow is not None and self.enabled:
            self._shadows.measure(table, entry.shadow, account, cost, times)
        if not self.enabled or entry.most is None or cost > entry.most:
            decision = self._without_asking(table, entry, cost, account, now)
            if decision is not None:
                return self._said(entry, decision, account), entry, None, (), None, None
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
                return self._said(entry, denial, account), entry, subject, (), None, None
        return None, entry, subject, charges, stamp, times

    def _conclude(
        self, entry: Entry, cost: int, subject: object, reply: Reply, account: Account
    ) -> Decision:
        """Return the decision that a reply means."""
        allowed, now, debts = reply
        if allowed:
            entry.tally.allowed += 1
            # As `Decision(…)`, at half its cost.
            decision = new_tuple(
                Decision,
                (
                    True, "allowed", entry.cell, cost, None,
                    entry.quotas, debts, entry.policy_field,
                ),
            )  # fmt: skip
            if self._observed:
                self.observers.on_decision(decision, account, shadow=False)
            return decision
        denial = denial_of(entry, cost, debts)
        wait_us = round((denial.retry_after or 0) * SECOND_US)
        self._denials.remember(subject, cost, now, wait_us, debts, _local_us(), entry.quotas)
        return self._said(entry, denial, account)

    async def _catch_up(self, stale: StaleError) -> bool:
        """Get hold of what is in force; say whether that has worked."""
        if stale.why == "time":
            return True  # the clock was learned from the reply
        try:
            await self._force.catch_up(stale)
        except BackendError as exc:
            self.complaints.log("a newer revision is in force, and cannot be loaded", exc)
            return False
        return True

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

    def _outage(
        self, entry: Entry, cost: int, error: Exception, account: Account | None
    ) -> Decision:
        """Return the feature's outage answer, and say so in the log."""
        name, answer = entry.feature.name, entry.feature.outage
        self.complaints.log(f'no decision could be made: "{name}" gets "{answer}"', error)
        if self._observed:
            self.observers.on_outage(name, error)
        retry_after = None
        if answer != "allow":
            retry_after = random.uniform(*_OUTAGE_RETRY)  # noqa: S311 -- to spread, not to hide
        decision = Decision(answer == "allow", "outage", entry.cell, cost, retry_after)
        return self._said(entry, decision, account)

    async def _peek_all(
        self, table: Table, account: Account, entries: Sequence[Entry], cost: int, now: int
    ) -> list[Decision]:
        known = [self._without_asking(table, one, cost, account, now, peek=True) for one in entries]
        asked = [entry for entry, decision in zip(entries, known, strict=True) if not decision]
        shard = table.shard_of(account)
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
                decided = [self._outage(entry, cost, exc, None) for entry in asked]
            else:
                for entry in asked:
                    own, debts = debts[: len(entry.quotas)], debts[len(entry.quotas) :]
                    decided.append(judged(entry, cost, own))
        rest = iter(decided)
        return [decision or next(rest) for decision in known]


def _local_us() -> int:
    return time.monotonic_ns() // 1000

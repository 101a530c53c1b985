"""Asking without taking: what would be decided, and what is left."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tieredlimit._core.account import Account
from tieredlimit._core.quota import MAX_AMOUNT
from tieredlimit._core.table import Entry, Table
from tieredlimit._core.tier import Feature
from tieredlimit.backends import Charge, Claim, Claimed, Reply, Slot
from tieredlimit.deciding import Deciding, demanded, held_of
from tieredlimit.decision import Decision
from tieredlimit.errors import BackendError, UsageError
from tieredlimit.judging import checked, judged, judged_demanding, named, unlimited

__all__ = ["Peeking"]


class Peeking(Deciding):
    """What `Limiter` answers without charging anything; a peek is not counted, nor shown."""

    def feature(self, name: str) -> Feature | None:
        """Return what the policy in force says of a feature, None if it has none of that name."""
        table = self._force.table
        return None if table is None else table.policy.features.get(name)

    def match(
        self, method: str, path: str, *, outside_root: bool = False
    ) -> tuple[str, int] | None:
        """Return the feature and the cost that a request is metered as, None if it is not.

        `path` is decoded and below the application's root path; `outside_root` says that there is
        one and that the path does not begin with it.
        """
        # Whichever instant a table is for, its routes are the policy's.
        table = self._force.table or self._force.table_at(self.backend.now())
        return table.match(method, path, outside_root=outside_root)

    def tier_of(self, account: Account) -> str:
        """Return the name of the tier that the account falls in now, by the backend's clock."""
        now = self.backend.now()
        return self._force.table_at(now).tier_of(account, now)

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

        One call to the backend at most, whatever the number of features; where pools are on shards
        of their own, one for each of these shards, all at once.

        Raises:
            UsageError: An id of the account cannot be stored.
        """
        now = self.backend.now()
        table = self._force.table_at(now)
        row = table.row(table.tier_of(account, now))
        entries = [table.find(account, feature, now) or entry for feature, entry in row.items()]
        decisions = await self._peek_all(table, account, entries, 1, now)
        return dict(zip(row, decisions, strict=True))

    def outage(self, feature: str, cost: int, error: Exception, *, peek: bool = False) -> Decision:
        """Return the feature's outage answer, for who could not even be identified.

        Zero or closed in every tier denies all the same, whoever it is: an exception that was made
        for some is not for whom nobody knows. With `peek` it is not counted, and shown to nobody.

        Raises:
            UsageError: The feature is unknown.
        """
        if self._switched_off:
            return unlimited(feature, cost)
        now = self.backend.now()
        table = self._force.table_at(now)
        found = [named(table, tier.name, feature) for tier in table.policy.tiers]
        entries = [one.variants.of_nobody(now) if one.variants else one for one in found]
        last = entries[-1]
        if not self.enabled or all(entry.cell.zero for entry in entries):
            decision = self._without_asking(table, last, cost, None, 0)
            if decision is not None:
                return decision if peek else self._said(last, decision, None)
        if peek:
            return self._unsaid_outage(last, cost, error)
        return self._outage(last, cost, error, None)

    def unmetered(self, feature: str, cost: int) -> Decision | None:
        """Return the decision for a feature that the policy in force has no more; None of others.

        An earlier one of this process had it, and an application that charges it may not have been
        deployed since. As what matches no route it is not limited: allowed, in no tier (""), and
        counted nowhere. The log says so.
        """
        if not self._force.dropped(feature) or type(cost) is not int or not 0 <= cost <= MAX_AMOUNT:
            return None
        told = UsageError("take it out of the application, or keep it in the policy as unlimited")
        gone = f'the policy in force has no feature "{feature}" any more: it is not limited'
        self.complaints.log(gone, told)
        return unlimited(feature, cost)

    @property
    def _switched_off(self) -> bool:
        """Whether all is let through, and there is no policy to name a tier by."""
        return not self.enabled and self._force.table is None

    async def _peek_all(
        self, table: Table, account: Account, entries: Sequence[Entry], cost: int, now: int
    ) -> list[Decision]:
        known = [self._without_asking(table, one, cost, account, now, peek=True) for one in entries]
        asked = [entry for entry, decision in zip(entries, known, strict=True) if not decision]
        by_shard: dict[int, list[Entry]] = {}
        for entry in asked:
            by_shard.setdefault(table.place_of(account, entry)[0], []).append(entry)
        decided: dict[int, Decision] = {}
        # All at once: of one server they share a call, as a pool's features do anywhere.
        groups = [self._peek_shard(table, account, some, cost) for some in by_shard.values()]
        for found in await asyncio.gather(*groups):
            decided.update(found)
        return [
            decision or decided[id(entry)] for entry, decision in zip(entries, known, strict=True)
        ]

    async def _peek_shard(
        self, table: Table, account: Account, entries: Sequence[Entry], cost: int
    ) -> dict[int, Decision]:
        """Return what takes of cells on one shard would decide, by the cells' identities."""
        charges: list[Charge] = []
        slots: list[Slot] = []
        parts: list[tuple[int, int]] = []
        for entry in entries:
            _, own, held_by = demanded(table, entry, account, 0)
            charges += own
            slots += held_by
            parts.append((sum(len(shelf.quotas) for _, shelf, _ in own), len(held_by)))
        claim = Claim(b"", tuple(slots)) if slots else None
        reply: Reply | Claimed = Reply(True, 0, [])
        try:
            if claim is not None:
                reply = await self._claim(charges, claim)
            elif charges:
                reply = await self.backend.take(charges)
        except BackendError as exc:
            return {id(entry): self._unsaid_outage(entry, cost, exc) for entry in entries}
        debts, held = list(reply.debts), held_of(reply)
        decided = {}
        for entry, (buckets, places) in zip(entries, parts, strict=True):
            own_debts, debts = debts[:buckets], debts[buckets:]
            own_held, held = held[:places], held[places:]
            if entry.demands is None:
                decided[id(entry)] = judged(entry, cost, own_debts)
            else:
                decided[id(entry)] = judged_demanding(entry, cost, own_debts, own_held)
        return decided

"""Asking without taking: what would be decided, and what is left."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tieredlimit._core.account import Account
from tieredlimit._core.table import Entry, Table
from tieredlimit.backends import Charge, Claim, Claimed, Reply, Slot
from tieredlimit.deciding import Deciding, demanded, held_of
from tieredlimit.decision import Decision
from tieredlimit.errors import BackendError
from tieredlimit.judging import checked, judged, judged_demanding

__all__ = ["Peeking"]


class Peeking(Deciding):
    """What `Limiter` answers without charging anything: it is not counted, and shown to nobody."""

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

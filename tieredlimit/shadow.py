"""Cells in shadow: decided beside the rule in force, counted and shown, never enforced."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from tieredlimit._core.account import Account
from tieredlimit._core.denials import Denials
from tieredlimit._core.rate import SECOND_US
from tieredlimit._core.table import Entry, Table
from tieredlimit.backends import (
    Backend,
    Charge,
    MemoryBackend,
    Reply,
)
from tieredlimit.backends.backend import ComparingBackend
from tieredlimit.backends.shared import is_over_redis
from tieredlimit.decision import Decision
from tieredlimit.errors import BackendError
from tieredlimit.judging import denial_of, settled
from tieredlimit.observe import Observers

__all__ = ["Shadows"]

# The most decisions that a backend of somebody else's may be busy with.
_MOST_TASKS = 1_000


class Shadows:
    """Measure what cells in shadow would decide.

    Nobody waits for it, and whatever goes wrong is the end of that one measurement: it is counted
    nowhere, and the rule in force knows nothing of it.

    Args:
        backend: Where their buckets are.
        observers: Who is shown each decision.
    """

    def __init__(self, backend: Backend, observers: Observers) -> None:
        self._observers = observers
        self._denials = Denials()
        self._tasks: set[asyncio.Task[Reply]] = set()
        self.ask_at(backend)

    def ask_at(self, backend: Backend) -> None:
        """Measure there from now on."""
        self._backend = backend
        self._comparing: ComparingBackend | None = None
        if is_over_redis(backend):
            self._comparing = backend
        self._memory: MemoryBackend | None = None
        # Like takes: a subclass may have its own way.
        if isinstance(backend, MemoryBackend) and type(backend).take is MemoryBackend.take:
            self._memory = backend

    def measure(
        self,
        table: Table,
        entry: Entry,
        account: Account,
        cost: int,
        times: tuple[int, int] | None,
    ) -> None:
        """Decide a cell in shadow for a take that is being decided.

        `times` are the instants for which the cell was found.
        """
        # Whatever it is: the rule in force stands.
        with suppress(Exception):
            self._measure(table, entry, account, cost, times)

    def forget(self) -> None:
        """Forget the denials that are remembered: a new revision is in force."""
        self._denials.held.clear()

    def close(self) -> None:
        """Give up what this event loop still asks a backend of somebody else's."""
        loop = asyncio.get_running_loop()
        for task in [task for task in self._tasks if task.get_loop() is loop]:
            task.cancel()

    def _measure(
        self,
        table: Table,
        entry: Entry,
        account: Account,
        cost: int,
        times: tuple[int, int] | None,
    ) -> None:
        decision = settled(entry, cost, asks=False)
        if decision is not None:
            self._said(entry, decision, account)
            return
        shard = table.measured_shard_of(account)
        charges = [Charge(shelf.key(account, shard), shelf, cost) for shelf in entry.shelves]
        subject = tuple(charge.key for charge in charges)
        if self._denials.held:
            debts = self._denials.recall(
                subject, cost, self._backend.now(), _local_us(), entry.quotas
            )
            if debts is not None:
                self._said(entry, denial_of(entry, cost, debts), account)
                return
        if self._memory is not None:
            self._conclude(entry, cost, account, subject, self._memory.measure_now(charges))
            return
        future: asyncio.Future[Reply]
        if self._comparing is not None:
            future = self._comparing.measure(charges, table.stamp(shard), times)
        else:
            future = self._start(charges)
        future.add_done_callback(partial(self._heard, entry, cost, account, subject))

    def _start(self, charges: Sequence[Charge]) -> asyncio.Task[Reply]:
        """Ask a backend of somebody else's.

        Raises:
            BackendError: It is busy with too many already.
        """
        if len(self._tasks) >= _MOST_TASKS:
            raise BackendError(f"{_MOST_TASKS} decisions in shadow are waiting already")
        task = asyncio.ensure_future(self._backend.take(charges))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _heard(
        self,
        entry: Entry,
        cost: int,
        account: Account,
        subject: tuple[str, ...],
        future: asyncio.Future[Reply],
    ) -> None:
        # Asked for, so that nobody is told of an error that was never looked at.
        if not future.cancelled() and future.exception() is None:
            self._conclude(entry, cost, account, subject, future.result())

    def _conclude(
        self, entry: Entry, cost: int, account: Account, subject: tuple[str, ...], reply: Reply
    ) -> None:
        allowed, now, debts = reply
        if allowed:
            policy = entry.policy_field
            decision = Decision(
                True, "allowed", entry.cell, cost, None, entry.quotas, debts, policy
            )
        else:
            decision = denial_of(entry, cost, debts)
            wait_us = round((decision.retry_after or 0) * SECOND_US)
            self._denials.remember(subject, cost, now, wait_us, debts, _local_us(), entry.quotas)
        self._said(entry, decision, account)

    def _said(self, entry: Entry, decision: Decision, account: Account) -> None:
        entry.tally.count(decision.allowed, decision.reason, shadow=True)
        if self._observers:
            self._observers.on_decision(decision, account, shadow=True)


def _local_us() -> int:
    return time.monotonic_ns() // 1000

"""From a change that somebody wants to a fleet that follows it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import click

from tieredlimit._core.change import Change
from tieredlimit._core.override import Override
from tieredlimit._core.revision import NOTHING, Revision
from tieredlimit.backends.control import Published
from tieredlimit.backends.wire import UnreachableError
from tieredlimit.cli.confirm import require_consent
from tieredlimit.cli.fleet import (
    Fleet,
    how_far,
    look,
    named,
    sound_head,
    too_old,
    unfinished_shards,
    wait_for_followers,
)
from tieredlimit.cli.rates import Sample, admitted_since, sample
from tieredlimit.cli.report import Report, preview
from tieredlimit.cli.session import Failure, Place, Session, session
from tieredlimit.cli.terminal import echo_json, printable
from tieredlimit.errors import BackendError, ConflictError, TieredLimitError, UsageError

DONE, NOBODY_FOLLOWS, PARTLY = 0, 3, 4


@dataclass(frozen=True, slots=True)
class Plan:
    """Say what a command wants to publish.

    Attributes:
        verb: What has been done once it is done, such as `closed`.
        compute: Returns the change, from the head and the server's time; always the same one.
        lines: What to show beside the change, from the head and the server's time.
        cells: The feature and the tiers concerned, for a sample; None for no sample.
        counts_admitted: Whether what the cells admit afterwards should be nothing.
        as_seen: Whether a head that changed while the operator thought is a conflict.
        loads_policy: Whether workers have to read another policy.
    """

    verb: str
    compute: Callable[[Revision, int], Awaitable[Change]]
    lines: Callable[[Revision, int], Sequence[str]] = field(default=lambda _head, _now: ())
    cells: Callable[[Revision, int], tuple[str, Sequence[str]] | None] = field(
        default=lambda _head, _now: None
    )
    counts_admitted: bool = False
    as_seen: bool = False
    loads_policy: bool = False


@dataclass(frozen=True, slots=True)
class Manner:
    """Say how a command was asked to go about it."""

    yes: bool = False
    dry_run: bool = False
    as_json: bool = False


async def carry_out(place: Place, plan: Plan, manner: Manner) -> int:
    """Show what would change, ask, publish it, and report how far it got; return the exit code.

    Raises:
        Failure: It was not done, and why.
    """
    async with session(place) as opened:
        return await Publisher(opened, plan, manner).run()


class Publisher:
    """Carry one change through."""

    def __init__(self, opened: Session, plan: Plan, manner: Manner) -> None:
        self._session = opened
        self._store = opened.store
        self._plan = plan
        self._manner = manner

    async def run(self) -> int:
        """Show, ask, publish, wait and report; return the exit code."""
        head = await sound_head(self._session)
        if finished := await self._finish(head):
            return await self._report(*finished)
        now = await self._store.now()
        change = await self._plan.compute(head, now)
        fleet = await look(self._session, head)
        self._check_formats(fleet)
        cells = self._plan.cells(head, now)
        taken = await sample(self._session) if cells else None
        self._show(fleet, change, now, taken)
        if self._manner.dry_run:
            return self._end_dry(fleet, change, now, taken)
        aside = self._manner.as_json
        require_consent(self._session.place, fleet, yes=self._manner.yes, aside=aside)
        seen = await sound_head(self._session)
        if self._plan.as_seen and (seen.number, seen.digest) != (head.number, head.digest):
            raise await self._conflict()
        # Again: a ramp has climbed meanwhile, and a time to run counts from now.
        change = await self._plan.compute(seen, await self._store.now())
        try:
            published = await self._store.publish(change.revision, seen=seen)
        except asyncio.CancelledError:
            click.echo("nobody knows how far it got: run the same command again", err=True)
            raise
        except ConflictError:
            raise await self._conflict() from None
        except UnreachableError:
            raise
        except BackendError as exc:
            return await self._failed(change, exc)
        return await self._report(change, published, taken)

    async def _finish(self, head: Revision) -> tuple[Change, Published] | None:
        """Finish what a publisher has left; return it if that was this very command."""
        behind = await unfinished_shards(self._session, head)
        if not behind or self._manner.dry_run:
            return None
        self._say(
            f"revision {head.number} ({printable(head.change)}) had not reached {behind} of "
            f"{self._session.shards} shards: going on with it"
        )
        try:
            published = await self._store.complete(head)
        except (BackendError, ConflictError) as exc:
            self._say(printable(f"it still has not: {exc}"))
            return None
        again = await self._replay(head)
        return (again, published) if again else None

    async def _replay(self, head: Revision) -> Change | None:
        """Return what this command would have made of the revision before, if that is the head."""
        previous = await self._store.revision(head.number - 1) if head.number > 1 else NOTHING
        try:
            change = await self._plan.compute(previous or NOTHING, head.made_us)
        except TieredLimitError:
            return None
        return change if change.revision == head else None

    def _check_formats(self, fleet: Fleet) -> None:
        old = too_old(fleet.workers)
        if old and self._plan.loads_policy:
            raise Failure(
                f"{named(old)} cannot read what this release would publish: upgrade them first. "
                "Nothing was done"
            )
        if old:
            self._say(f"note: {named(old)} cannot read it, and will answer as in an outage")

    def _show(self, fleet: Fleet, change: Change, now: int, taken: Sample | None) -> None:
        self._say(fleet.banner())
        for line in self._plan.lines(change.revision, now):
            self._say(line)
        cells = self._plan.cells(change.revision, now)
        for line in preview(change, now, taken, cells, self._plan.verb):
            self._say(line)

    def _end_dry(self, fleet: Fleet, change: Change, now: int, taken: Sample | None) -> int:
        report = self._reported(change, fleet, taken, None, None)
        if self._manner.as_json:
            echo_json(report.document(now))
        else:
            click.echo("dry run: nothing was done")
        return DONE

    async def _conflict(self) -> Failure:
        found = await self._store.head()
        who = printable(found.actor) or "somebody"
        why = f" ({printable(found.reason)})" if found.reason else ""
        return Failure(
            f"{who} has published revision {found.number} meanwhile: "
            f"{printable(found.change) or 'an unnamed change'}{why}. Nothing was done: look at "
            "it, then run the command again"
        )

    async def _failed(self, change: Change, error: BackendError) -> int:
        told = await how_far(self._session, change.revision, error)
        if told is None:
            raise error
        try:
            published = await self._store.complete(change.revision)
        except (BackendError, ConflictError):
            click.echo(f"partly done: {printable(told)}", err=True)
            click.echo("run the same command again: it finishes what is left", err=True)
            return PARTLY
        return await self._report(change, published)

    async def _report(
        self, change: Change, published: Published, taken: Sample | None = None
    ) -> int:
        now = await self._store.now()
        try:
            fleet = await wait_for_followers(self._session, published.revision)
        except asyncio.CancelledError:
            number = published.revision.number
            click.echo(f"revision {number} is published: see tieredlimit status", err=True)
            raise
        cells = self._plan.cells(published.revision, now)
        admitted = None
        if cells and self._plan.counts_admitted:
            exactly = [one for one in fleet.workers if one.revision == published.revision.number]
            admitted = admitted_since(exactly, *cells)
        report = self._reported(change, fleet, taken, published, admitted)
        if self._manner.as_json:
            echo_json(report.document(now))
        else:
            for line in report.lines():
                click.echo(line)
        if not fleet.followers():
            return NOBODY_FOLLOWS
        return PARTLY if fleet.behind() else DONE

    def _reported(
        self,
        change: Change,
        fleet: Fleet,
        taken: Sample | None,
        published: Published | None,
        admitted: int | None,
    ) -> Report:
        cells = None
        if taken is not None:
            cells = self._plan.cells(change.revision, change.revision.made_us)
        suffix = self._session.place.suffix
        return Report(self._plan.verb, change, fleet, published, admitted, taken, cells, suffix)

    def _say(self, line: str) -> None:
        click.echo(line, err=self._manner.as_json)


def scheduled(overrides: Sequence[Override], now: int) -> bool:
    """Say whether all that is added begins later."""
    return bool(overrides) and not any(one.active(now) for one in overrides)


def require(found: Revision | None, number: int) -> Revision:
    """Return a revision that is kept.

    Raises:
        UsageError: It is not.
    """
    if found is None:
        raise UsageError(f"revision {number} is not kept: see tieredlimit history")
    return found

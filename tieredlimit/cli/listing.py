"""`tieredlimit overrides`, `history` and `undo`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from tieredlimit import overrides as changes
from tieredlimit._core.change import Change
from tieredlimit._core.revision import NOTHING, Revision
from tieredlimit.backends.control import ControlStore
from tieredlimit.cli import confirm, whom
from tieredlimit.cli.grid import grid
from tieredlimit.cli.policy import differences
from tieredlimit.cli.publishing import Manner, Plan, Publisher, require
from tieredlimit.cli.session import Place, connects, run, session
from tieredlimit.cli.spelled import brief, override_document, revision_document, state, what
from tieredlimit.cli.terminal import echo_json
from tieredlimit.errors import UsageError

_HISTORY = 20
_KEPT = 200


@click.command("overrides")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connects
def overrides(_ctx: click.Context, place: Place, /, *, as_json: bool) -> None:
    """List what is in force above the policy, and what is scheduled."""
    head, now = run(_head(place))
    standing = [one for one in head.overrides if state(one, now) != "over"]
    if as_json:
        listed = [override_document(one, now) for one in standing]
        echo_json({"revision": head.number, "overrides": listed})
        return
    if not standing:
        click.echo(f"no overrides · revision {head.number}")
        return
    heads = ["id", "feature", "what", "who", "from", "until", "by", "why"]
    rows = [
        [
            one.id,
            one.feature,
            what(one, now),
            one.who.spell(),
            brief(one.made_us if one.begin_us is None else one.begin_us)
            + ("" if one.active(now) else " (scheduled)"),
            "further notice" if one.end_us is None else brief(one.end_us),
            one.actor,
            one.reason,
        ]
        for one in standing
    ]
    for line in grid(heads, rows):
        click.echo(line)


@click.command("history")
@click.argument("most", type=click.IntRange(1, _KEPT), default=_HISTORY, metavar="[N]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connects
def history(_ctx: click.Context, place: Place, /, *, most: int, as_json: bool) -> None:
    """List the last N revisions, the newest first: what changed, when, by whom and why.

    The last 200 are kept.
    """
    revisions = run(_history(place, most))
    if as_json:
        echo_json({"revisions": [revision_document(one) for one in revisions]})
        return
    if not revisions:
        click.echo("nothing was ever published")
        return
    heads = ["revision", "at", "by", "change", "why"]
    rows = [
        [str(one.number), brief(one.made_us), one.actor, one.change, one.reason]
        for one in revisions
    ]
    for line in grid(heads, rows):
        click.echo(line)


@click.command("undo")
@click.option(
    "--to", "number", type=click.IntRange(0), metavar="N", help="To this revision; the last one."
)
@click.option("--actor", metavar="NAME", help="Who does it; your login name @ host.")
@confirm.flag
@click.option("--dry-run", is_flag=True, help="Only say what would change.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connects
def undo(
    ctx: click.Context,
    place: Place,
    /,
    *,
    number: int | None,
    actor: str | None,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Bring back what was in force before the last change, policy and overrides.

    It is published as a new revision, and so can be undone as well. Exit codes as for close.
    """
    manner = Manner(yes, dry_run, as_json)
    ctx.exit(run(_undo(place, number, whom.actor_of(actor), manner)))


commands = (overrides, history, undo)


async def _head(place: Place) -> tuple[Revision, int]:
    async with session(place) as opened:
        return await opened.store.head(), await opened.store.now()


async def _history(place: Place, most: int) -> list[Revision]:
    async with session(place) as opened:
        return await opened.store.history(most)


async def _undo(place: Place, number: int | None, actor: str, manner: Manner) -> int:
    async with session(place) as opened:
        seen: list[Revision] = []

        async def compute(head: Revision, now: int) -> Change:
            seen[:] = [head]
            if head.number == 0:
                raise UsageError("nothing was ever published: there is nothing to undo")
            previous = await _before(opened.store, head, number)
            return changes.undo(head, previous, now=now, actor=actor)

        def told(new: Revision, _now: int) -> Sequence[str]:
            return [] if new.base == seen[0].base else differences(seen[0], new, place)

        plan = Plan("undone", compute, lines=told, as_seen=True, loads_policy=True)
        return await Publisher(opened, plan, manner).run()


async def _before(store: ControlStore, head: Revision, number: int | None) -> Revision:
    """Return the revision to go back to; unless named, the latest that is kept.

    Raises:
        UsageError: It is not kept.
    """
    if number == 0 or (number is None and head.number == 1):
        return NOTHING
    if number is not None:
        return require(await store.revision(number), number)
    kept = await store.revision(head.number - 1)
    # Numbers are skipped where Redis had lost some.
    older = [one for one in await store.history(_KEPT) if one.number < head.number]
    return require(kept or (older[0] if older else None), head.number - 1)

"""`tieredlimit policy`: the document that is stored for all workers."""

from __future__ import annotations

import tomllib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from tieredlimit import overrides
from tieredlimit._core.change import Change
from tieredlimit._core.difference import Difference
from tieredlimit._core.overlay import overlay
from tieredlimit._core.policy import Policy
from tieredlimit._core.revision import Revision
from tieredlimit.cli import confirm, pools, whom
from tieredlimit.cli import policies as policy_files
from tieredlimit.cli.publishing import Manner, Plan, Publisher, require
from tieredlimit.cli.session import Failure, Place, Session, connects, policy_of, run, session
from tieredlimit.cli.spelled import brief
from tieredlimit.cli.table import lines
from tieredlimit.cli.terminal import count, echo_json, printable, width
from tieredlimit.cli.toml import to_toml
from tieredlimit.errors import TieredLimitError, UsageError

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_files = click.argument(
    "files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=str)
)


@click.group("policy")
def command() -> None:
    """Store a policy for all workers, look at it, and go back.

    Where FILE is several, each is laid over the ones before. Overrides lie above whatever is
    stored, and stay.
    """


def _changes(inner: Callable[..., None]) -> Callable[..., None]:
    dry_run = click.option("--dry-run", is_flag=True, help="Only say what would change.")
    return whom.explained(confirm.flag(dry_run(_json(inner))))


@command.command("push")
@_files
@_changes
@connects
def push(ctx: click.Context, place: Place, /, *, files: tuple[str, ...], **given: Any) -> None:
    """Store FILE as the policy of all workers, in place of what each was deployed with.

    Shows what changes, for whom, and how many tokens that hands out. Exit codes as for close.
    """
    policy_files.load(files)
    document = _document(files)
    source = " + ".join(Path(name).name for name in files)
    actor = whom.actor_of(given["actor"])

    async def compute(_opened: Session, head: Revision, now: int) -> Change:
        reason = given["reason"]
        return overrides.push(head, document, now=now, source=source, reason=reason, actor=actor)

    ctx.exit(run(_publish(place, "pushed", compute, given)))


@command.command("rollback")
@click.argument("number", type=click.IntRange(1), metavar="N")
@_changes
@connects
def rollback(ctx: click.Context, place: Place, /, *, number: int, **given: Any) -> None:
    """Store the policy of revision N again; the overrides of today stay.

    Exit codes as for close.
    """
    actor = whom.actor_of(given["actor"])

    async def compute(opened: Session, head: Revision, now: int) -> Change:
        old = require(await opened.store.revision(number), number)
        return overrides.rollback(head, old, now=now, reason=given["reason"], actor=actor)

    ctx.exit(run(_publish(place, "rolled back", compute, given)))


@command.command("pull")
@click.option("--revision", "number", type=click.IntRange(1), metavar="N", help="Of revision N.")
@_json
@connects
def pull(_ctx: click.Context, place: Place, /, *, number: int | None, as_json: bool) -> None:
    """Print the stored policy, as a file to keep or to edit.

    \b
    tieredlimit policy pull > policy.toml
    """  # noqa: D301 -- click reads the backspace
    revision = run(_revision(place, number))
    if revision.base is None:
        raise Failure(f"revision {revision.number} stores no policy: workers use their own file")
    if as_json:
        echo_json(revision.base)
    else:
        click.echo(to_toml(revision.base), nl=False)


@command.command("show")
@_json
@connects
def show(_ctx: click.Context, place: Place, /, *, as_json: bool) -> None:
    """Print the table of the policy below the overrides, where it comes from, and its pools."""
    head = run(_revision(place, None))
    policy = _policy(head, place)
    features, tiers = list(policy.features), [tier.name for tier in policy.tiers]
    known = run(_levels(place, policy))
    stored = head.base is not None
    source = f"stored, revision {head.number}" if stored else printable(" + ".join(place.paths))
    cells = {
        tier.name: {name: tier.cells[name].spell() for name in policy.features}
        for tier in policy.tiers
    }
    if as_json:
        told = {"revision": head.number, "stored": stored, "source": source, "cells": cells}
        told_of_pools = pools.document(policy, features, tiers, known)
        echo_json({**told, "pools": told_of_pools, "overrides": len(head.overrides)})
        return
    click.echo(f"{place.namespace} · {source}")
    grid = {tier: {name: printable(t) for name, t in row.items()} for tier, row in cells.items()}
    for line in lines(grid, features, width()):
        click.echo(line)
    for line in pools.lines(policy, features, tiers, known):
        click.echo(line)
    if head.overrides:
        told_of = count(len(head.overrides), "override")
        click.echo(f"{told_of} above it: see tieredlimit overrides")


@command.command("diff")
@_files
@_json
@connects
def diff(_ctx: click.Context, place: Place, /, *, files: tuple[str, ...], as_json: bool) -> None:
    """Say what would change with FILE, for whom, and how many tokens that hands out."""
    new = policy_files.load(files)
    head = run(_revision(place, None))
    found = overrides.diff(_policy(head, place), new)
    if as_json:
        echo_json({"revision": head.number, "differences": [_difference(one) for one in found]})
        return
    for one in found:
        click.echo(printable(str(one)))
    if not found:
        click.echo("nothing differs")


async def _publish(
    place: Place,
    verb: str,
    compute: Callable[[Session, Revision, int], Awaitable[Change]],
    given: Mapping[str, Any],
) -> int:
    async with session(place) as opened:
        before: list[Revision] = []

        async def change_of(head: Revision, now: int) -> Change:
            before[:] = [head]
            return await compute(opened, head, now)

        def told(new: Revision, _now: int) -> Sequence[str]:
            return differences(before[0], new, place)

        plan = Plan(verb, change_of, lines=told, as_seen=True, loads_policy=True)
        manner = Manner(given["yes"], given["dry_run"], given["as_json"])
        return await Publisher(opened, plan, manner).run()


async def _revision(place: Place, number: int | None) -> Revision:
    async with session(place) as opened:
        if number is None:
            return await opened.store.head()
        return require(await opened.store.revision(number), number)


async def _levels(place: Place, policy: Policy) -> pools.Known:
    found = pools.pools_of(policy)
    if not found:
        return {}
    async with session(place) as opened:
        return await pools.levels(opened, found.values())


def _policy(head: Revision, place: Place) -> Policy:
    try:
        return policy_of(head, place)
    except TieredLimitError as exc:
        raise Failure(str(exc)) from exc


def differences(head: Revision, new: Revision, place: Place) -> list[str]:
    """Return what a new base changes, as far as it can be told."""
    if new.base is None:
        return ["workers go back to the file that each of them has"]
    if head.base is None and not place.paths:
        return [f"nothing is stored under revision {head.number}: every cell is new"]
    try:
        old = policy_of(head, place)
    except TieredLimitError:
        return [f"this release cannot read the policy of revision {head.number}"]
    found = overrides.diff(old, Policy.from_dict(new.base))
    compared = "" if head.base is not None else f" ({' + '.join(place.paths)}, as yet)"
    listed = [printable(str(one)) for one in found] or ["no cell differs"]
    stood = f"revision {head.number}, {brief(head.made_us)}" if head.base is not None else "files"
    told = [f"compared with {stood}{printable(compared)}:", *(f"  {line}" for line in listed)]
    if head.base is None:
        told.append("it takes the place of the files that workers were given, until it is undone")
    return told


def _difference(one: Difference) -> dict[str, Any]:
    return {"path": one.path, "before": one.before, "after": one.after, "grants": one.grants}


def _document(files: Sequence[str]) -> dict[str, Any]:
    """Return the document of files that were checked a moment ago.

    Raises:
        UsageError: They have changed since.
    """
    document: dict[str, Any] = {}
    for name in files:
        try:
            document = overlay(document, tomllib.loads(Path(name).read_text("utf-8-sig")))
        except (OSError, ValueError) as exc:
            raise UsageError(f"{name} changed while it was read: {exc}") from exc
    return document

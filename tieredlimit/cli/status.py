"""`tieredlimit status` and `label`: what a namespace is, and who follows."""

from __future__ import annotations

import click

from tieredlimit.cli import confirm
from tieredlimit.cli.fleet import Fleet, follows, look, named, unfinished_shards
from tieredlimit.cli.session import Place, connects, run, session
from tieredlimit.cli.spelled import override_document, revision_document, sentence, state
from tieredlimit.cli.terminal import count, echo_json, printable


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connects
def status(ctx: click.Context, place: Place, /, *, as_json: bool) -> None:
    """Say what is in force, and how many workers follow.

    Exit codes: 0 told, 1 Redis does not answer, 2 wrong usage.
    """
    fleet, now, behind = run(_status(place))
    standing = [one for one in fleet.head.overrides if state(one, now) != "over"]
    if as_json:
        echo_json(
            {
                "namespace": fleet.namespace,
                "label": fleet.label,
                "revision": revision_document(fleet.head),
                "shards_behind": behind,
                "workers": {
                    "live": len(fleet.workers),
                    "following": len(fleet.followers()),
                    "list": [
                        {
                            "id": one.id,
                            "host": one.host,
                            "pid": one.pid,
                            "version": one.version,
                            "format": one.format,
                            "revision": one.revision,
                            "follows": follows(one, fleet.head),
                            "age": round(one.age, 3),
                        }
                        for one in fleet.workers
                    ],
                },
                "overrides": [override_document(one, now) for one in standing],
            }
        )
        ctx.exit(0)
    label = printable(fleet.label) or "no label"
    told = count(len(standing), "override") if standing else "no overrides"
    click.echo(f"{fleet.namespace} · {label} · redis ok · {fleet.count()} · {told}")
    for one in standing:
        later = "" if state(one, now) == "in force" else " (scheduled)"
        click.echo(printable(f"  {sentence(one, now)}{later}"))
    if stragglers := fleet.behind():
        click.echo(f"not on it: {named(stragglers)}")
    if lost := [one for one in fleet.workers if one.revision > fleet.head.number]:
        latest = max(one.revision for one in lost)
        click.echo(f"Redis has lost revision {latest}, which {named(lost)} holds and puts back")
    if behind:
        told = f"not heard by {count(behind, 'shard')} yet"
        click.echo(f"{told}: a worker, or the next change, finishes that")


@click.command("label")
@click.argument("text", required=False)
@confirm.flag
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connects
def label(
    _ctx: click.Context, place: Place, /, *, text: str | None, yes: bool, as_json: bool
) -> None:
    """Show what the namespace is called, or call it TEXT; "" takes the label away.

    A namespace called PRODUCTION asks for its name before anything changes.
    """
    told = run(_label(place, text, yes=yes, aside=as_json))
    if as_json:
        echo_json({"namespace": place.namespace, "label": told})
    else:
        click.echo(f"{place.namespace} · {printable(told) or 'no label'}")


async def _status(place: Place) -> tuple[Fleet, int, int]:
    async with session(place) as opened:
        fleet = await look(opened)
        behind = await unfinished_shards(opened, fleet.head)
        return fleet, await opened.store.now(), behind


async def _label(place: Place, text: str | None, *, yes: bool, aside: bool) -> str:
    async with session(place) as opened:
        if text is not None:
            fleet = await look(opened)
            if fleet.production:
                confirm.require_consent(place, fleet, yes=yes, aside=aside)
            await opened.store.set_label(text)
        return await opened.store.label()


commands = (status, label)

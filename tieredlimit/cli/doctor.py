"""`tieredlimit doctor`: is this Redis fit to be relied upon?"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import click

from tieredlimit._core.keys import KEY_FORMAT
from tieredlimit.backends.control import shard_key
from tieredlimit.backends.nodecalls import Address
from tieredlimit.backends.redis_control import TIMEOUT
from tieredlimit.backends.server import take_script
from tieredlimit.backends.wire import Wire
from tieredlimit.cli.checks import (
    LATENCIES,
    Finding,
    Stopwatch,
    clock_finding,
    latency_finding,
    outage_finding,
    permission_findings,
    read_config,
    read_info,
    server_findings,
)
from tieredlimit.cli.fleet import look, named, shard_number
from tieredlimit.cli.session import Place, Session, connects, policy_of, run, session
from tieredlimit.cli.terminal import count, echo_json
from tieredlimit.errors import BackendError

OK, WEAKNESSES = 0, 5

_COLOURS = {"ok": "green", "weakness": "yellow", "unknown": "yellow"}
_SETTINGS = ("maxmemory", "maxmemory-policy", "min-replicas-to-write", "appendonly", "save")
_WIDEST = max(map(len, _COLOURS))


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connects
def command(ctx: click.Context, place: Place, /, *, as_json: bool) -> None:
    """Look at the server, the namespace and its workers, and say what each weakness means.

    Writes one key that lives for a second. Exit codes: 0 all is well, 1 Redis does not answer,
    2 wrong usage, 5 there are weaknesses.
    """
    servers, namespace = run(_examine(place))
    everything = [finding for found in servers.values() for finding in found] + namespace
    weak = [finding for finding in everything if finding.level == "weakness"]
    if as_json:
        echo_json(
            {
                "ok": not weak,
                "servers": {name: _documents(found) for name, found in servers.items()},
                "namespace": {"name": place.namespace, "findings": _documents(namespace)},
            }
        )
        ctx.exit(WEAKNESSES if weak else OK)
    for name, found in servers.items():
        click.echo(click.style(name, bold=True))
        _show(found)
    click.echo(click.style(f"namespace {place.namespace}", bold=True))
    _show(namespace)
    click.echo("1 weakness" if len(weak) == 1 else f"{len(weak)} weaknesses")
    ctx.exit(WEAKNESSES if weak else OK)


async def _examine(place: Place) -> tuple[dict[str, list[Finding]], list[Finding]]:
    async with session(place) as opened:
        servers = {}
        for name, address in (await _primaries(opened)).items():
            wire = Wire(lambda address=address: opened.route.connect(address))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
            try:
                servers[name] = await _server(wire, opened)
            finally:
                await wire.drop()
        return servers, await _namespace(opened)


async def _primaries(opened: Session) -> dict[str, Address | None]:
    if not opened.route.seeds:
        return {"server": None}
    told = await opened.nodes.ask(opened.place.namespace, "CLUSTER", "SLOTS")
    seed = opened.route.seeds[0][0]
    found = {(_text(row[2][0]) or seed, int(row[2][1])) for row in told}
    return {f"{host}:{port}": (host, port) for host, port in sorted(found)}


async def _server(wire: Wire, opened: Session) -> list[Finding]:
    await _ask(wire, "PING")
    findings = [Finding("ok", "ping", "it answers")]
    info = {
        **read_info(await _ask(wire, "INFO", "server")),
        **read_info(await _ask(wire, "INFO", "replication")),
    }
    # One by one: releases before 7 take one name at a time.
    settings = [await _ask(wire, "CONFIG", "GET", setting) for setting in _SETTINGS]
    findings += server_findings(info, read_config(settings))
    taken = []
    time: Any = None
    for _ in range(LATENCIES):
        watch = Stopwatch()
        time = await _ask(wire, "TIME")
        taken.append(watch.stop())
    if isinstance(time, list):
        server_us = int(time[0]) * 1_000_000 + int(time[1])
        findings.append(clock_finding(server_us, watch.before_us, watch.after_us))
    findings.append(latency_finding(taken))
    if not opened.route.seeds:
        findings += await _permissions(wire, opened)
    return findings


async def _permissions(wire: Wire, opened: Session) -> Iterator[Finding]:
    namespace = opened.place.namespace
    probe = f"tl{KEY_FORMAT}:{{{namespace}:0}}:doctor"
    script = "return redis.call('SET', KEYS[1], redis.call('TIME')[1], 'PX', 1000)"
    replies = {
        "scripts": await _ask(wire, "EVAL", script, "1", probe),
        "WAIT": await _ask(wire, "WAIT", "0", "0"),
        # Whoever hears it looks at the head, and finds nothing new.
        "PUBLISH": await _ask(wire, "PUBLISH", f"tl:{{{namespace}}}:news", "0"),
        "SCRIPT LOAD": await _ask(wire, "SCRIPT", "LOAD", take_script().text),
    }
    return permission_findings(replies)


async def _namespace(opened: Session) -> list[Finding]:
    findings = [_layout(opened)]
    try:
        fleet = await look(opened)
    except BackendError as exc:
        means = "workers go on with what they have, and nothing can be changed"
        return [*findings, Finding("weakness", "revision", str(exc), means)]
    head = fleet.head
    if head.base is not None or opened.place.paths:
        findings.append(outage_finding(policy_of(head, opened.place)))
    if head.number:
        findings.append(await _shards(opened, head.number))
    else:
        findings.append(Finding("ok", "revision", "nothing was ever published"))
    if not fleet.workers:
        means = "a change reaches nobody; if there are workers, they use another namespace"
        findings.append(Finding("weakness", "workers", "none lives", means))
    elif behind := fleet.behind():
        means = "they obey it with their next decision, or cannot read it"
        told = f"{fleet.count()}; not {named(behind)}"
        findings.append(Finding("weakness", "workers", told, means))
    else:
        findings.append(Finding("ok", "workers", fleet.count()))
    return findings


async def _shards(opened: Session, number: int) -> Finding:
    keys = [shard_key(opened.place.namespace, shard) for shard in range(opened.shards)]
    told = await opened.nodes.ask_all([(key, ("GET", key)) for key in keys])
    numbers = [shard_number(reply) for reply in told]
    right = sum(one == number for one in numbers)
    stands = f"{number}, on {right} of {count(len(keys), 'shard')}"
    if right == len(keys):
        return Finding("ok", "revision", stands)
    if any(one is not None and one > number for one in numbers):
        means = "Redis has lost a revision: workers answer as in an outage until one restores it"
    else:
        means = "a publisher died half-way: the next change, or any busy worker, finishes it"
    return Finding("weakness", "revision", stands, means)


def _layout(opened: Session) -> Finding:
    if opened.layout is None:
        told = f"not noted yet, {count(opened.shards, 'shard')} assumed"
        means = "no worker has ever connected to this namespace: is its name right?"
        return Finding("weakness", "layout", told, means)
    return Finding("ok", "layout", opened.layout.decode("utf-8", "replace"))


async def _ask(wire: Wire, *words: str) -> Any:
    """Return the reply, a refusal as the exception that it is."""
    deadline = asyncio.get_running_loop().time() + TIMEOUT
    return (await wire.ask([tuple(word.encode() for word in words)], deadline))[0]


def _show(findings: Sequence[Finding]) -> None:
    for finding in findings:
        level = click.style(finding.level.ljust(_WIDEST), fg=_COLOURS[finding.level])
        click.echo(f"  {level}  {finding.line}")


def _documents(findings: Sequence[Finding]) -> list[dict[str, str]]:
    return [
        {"level": one.level, "name": one.name, "told": one.told, "means": one.means}
        for one in findings
    ]


def _text(value: Any) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else ""
    return "" if text == "?" else text

"""`tieredlimit watch`: what is asked for right now, what is left of pools, and who is denied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import click

from tieredlimit._core.pool import Pool
from tieredlimit._core.rate import SECOND_US, spell_instant
from tieredlimit._core.revision import Revision
from tieredlimit._core.share import MAX_INSTANT_US
from tieredlimit.backends.heartbeat import Heartbeat
from tieredlimit.cli.fleet import Fleet, look
from tieredlimit.cli.grid import grid
from tieredlimit.cli.pools import Known, Level, Share, level_document, levels, pools_of, state
from tieredlimit.cli.rates import Beats, Sample, between, spell_rate
from tieredlimit.cli.session import Failure, Place, Session, connects, policy_of, run, session
from tieredlimit.cli.spelled import brief
from tieredlimit.cli.terminal import echo_json, printable
from tieredlimit.errors import BackendError, PolicyError

_SHOWN = 10
_TEXTS = ("feature", "tier", "reason", "account")


@dataclass(frozen=True, slots=True)
class Denied:
    """Hold one denial of those that the workers have picked out; the account is hashed."""

    at: int
    feature: str
    tier: str
    reason: str
    account: str


@dataclass(frozen=True, slots=True)
class Glance:
    """Hold what is to be seen in one second; the policy's pools, where that is known."""

    now: int
    fleet: Fleet
    sample: Sample
    denied: Sequence[Denied]
    pools: Known
    tiers: Sequence[str]


@click.command("watch")
@click.option("--seconds", type=click.IntRange(1), metavar="N", help="End after so many.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON each second.")
@connects
def command(_ctx: click.Context, place: Place, /, *, seconds: int | None, as_json: bool) -> None:
    """Show the requests per second by feature, tier and outcome, until it is interrupted.

    Below them each pool of the policy: its level, what each tier can take of it now, and its slots.
    Then the latest denials, of which each worker picks out a few: accounts are hashed, the same
    account to the same word on every worker.
    """
    try:
        run(_watch(place, seconds, as_json))
    except KeyboardInterrupt:
        click.echo("", err=True)


async def _watch(place: Place, seconds: int | None, as_json: bool) -> None:
    left = seconds
    async with session(place) as opened:
        watched = _Watched(opened)
        before = await _listen(opened)
        told = set(_denied(before[0].workers))
        while left is None or left > 0:
            left = None if left is None else left - 1
            await place.pace.pause(1.0)
            try:
                after = await _listen(opened)
                pools = await watched.levels(after[1].head)
            except BackendError as exc:
                # Redis may come back, and this is watched to see it.
                click.echo(printable(f"no answer: {exc}"), err=True)
                continue
            beats, fleet = after
            denied = _denied(beats.workers)
            sample = between(before[0], beats)
            glance = Glance(beats.now, fleet, sample, denied, pools, watched.tiers)
            if as_json:
                fresh = [one for one in denied if one not in told]
                echo_json(_document(replace(glance, denied=fresh)), indent=None)
            else:
                _show(glance, clear=place.pace.attended())
            before, told = after, set(denied)


class _Watched:
    """Read the pools of the policy in force; where none is known, say so once.

    Attributes:
        tiers: The policy's tiers.
    """

    def __init__(self, opened: Session) -> None:
        self.tiers: list[str] = []
        self._opened = opened
        self._pools: list[Pool] = []
        self._read: tuple[int, str] | None = None
        self._told = ""

    async def levels(self, head: Revision) -> Known:
        """Return how all pools stand under a revision.

        Raises:
            BackendError: Redis does not answer.
        """
        if self._read != (head.number, head.digest):
            self._read = head.number, head.digest
            try:
                policy = policy_of(head, self._opened.place)
            except (Failure, PolicyError) as exc:
                self._pools = []
                if str(exc) != self._told:
                    click.echo(printable(f"pools are not shown: {exc}"), err=True)
                self._told = str(exc)
            else:
                self._pools = list(pools_of(policy).values())
                self.tiers = [tier.name for tier in policy.tiers]
        return await levels(self._opened, self._pools) if self._pools else {}


async def _listen(opened: Session) -> tuple[Beats, Fleet]:
    now = await opened.store.now()
    fleet = await look(opened)
    return Beats(now, fleet.workers), fleet


def _show(glance: Glance, *, clear: bool) -> None:
    if clear:
        click.clear()
    click.echo(f"{glance.fleet.banner()} · {spell_instant(glance.now // SECOND_US * SECOND_US)}")
    outcomes = _outcomes(glance.sample)
    rows = [
        [feature, tier, *(_rate(rates.get(outcome, 0.0)) for outcome in outcomes)]
        for (feature, tier), rates in sorted(glance.sample.rates.items())
    ]
    if rows:
        for line in grid(["feature", "tier", *(f"{one}/s" for one in outcomes)], rows):
            click.echo(line)
    else:
        click.echo("no requests" if glance.fleet.workers else "no worker")
    for name, level in glance.pools.items():
        click.echo(printable(f"pool {name}: {_pool(level, glance.tiers)}"))
    for one in list(glance.denied)[:_SHOWN]:
        told = f"{brief(one.at)} {one.account} {one.feature} in tier {one.tier}: {one.reason}"
        click.echo(printable(f"  denied {told}"))


def _pool(level: Level | BackendError, tiers: Sequence[str]) -> str:
    """Return how a pool stands; tiers that can take the same stand together."""
    if isinstance(level, BackendError):
        return state(level)
    alike: dict[Share, list[str]] = {}
    for tier in tiers:
        alike.setdefault(level.free(tier), []).append(tier)
    shares = "; ".join(f"{', '.join(names)} {share}" for share, names in alike.items())
    return f"{state(level)} · can take now: {shares}"


def _outcomes(sample: Sample) -> list[str]:
    """Return the outcomes that there were, the allowed first."""
    seen = {outcome for rates in sample.rates.values() for outcome in rates}
    return ["allowed", *sorted(seen - {"allowed"})]


def _rate(rate: float) -> str:
    return spell_rate(rate).removesuffix(" req/s") if rate else "-"


def _denied(workers: Sequence[Heartbeat]) -> list[Denied]:
    """Return the denials that workers have picked out, the latest first."""
    found = [one for worker in workers for one in _of(worker)]
    return sorted(found, key=lambda one: -one.at)


def _of(worker: Heartbeat) -> Iterator[Denied]:
    listed = worker.counters.get("denied")
    for one in listed if isinstance(listed, list) else []:
        if not isinstance(one, Mapping) or not all(type(one.get(name)) is str for name in _TEXTS):
            continue
        at = one.get("at", one.get("at_us"))
        if type(at) is int and 0 <= at <= MAX_INSTANT_US:
            yield Denied(at, *(one[name] for name in _TEXTS))


def _document(glance: Glance) -> dict[str, Any]:
    fleet = glance.fleet
    cells: dict[str, dict[str, float]] = {
        f"{feature}/{tier}": {outcome: round(rate, 3) for outcome, rate in rates.items()}
        for (feature, tier), rates in sorted(glance.sample.rates.items())
    }
    return {
        "at": spell_instant(glance.now),
        "namespace": fleet.namespace,
        "revision": fleet.head.number,
        "workers": {"live": len(fleet.workers), "following": len(fleet.followers())},
        "per_second": cells,
        "pools": {
            name: level_document(level, glance.tiers) for name, level in glance.pools.items()
        },
        "denied": [
            {
                "at": spell_instant(one.at),
                "feature": one.feature,
                "tier": one.tier,
                "reason": one.reason,
                "account": one.account,
            }
            for one in glance.denied
        ],
    }

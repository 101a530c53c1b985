"""`tieredlimit reset` and `refund`: give an account its tokens back, and its slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import reduce
from importlib.resources import files
from struct import pack
from typing import Any

import click

from tieredlimit._core.account import Account
from tieredlimit._core.demands import Demands, PoolPart
from tieredlimit._core.explanation import spell_about
from tieredlimit._core.keys import LEASES, key_prefix, name_by
from tieredlimit._core.pool import Pool
from tieredlimit._core.quota import MAX_AMOUNT
from tieredlimit._core.reading import did_you_mean
from tieredlimit._core.revision import Revision
from tieredlimit._core.shelf import subject_key
from tieredlimit._core.table import Table
from tieredlimit.cli import confirm
from tieredlimit.cli.accounts import account_of
from tieredlimit.cli.fleet import look
from tieredlimit.cli.inforce import cell_under, pers_of, rule
from tieredlimit.cli.instants import instant
from tieredlimit.cli.pools import count_held
from tieredlimit.cli.session import Failure, Place, Session, connects, policy_of, run, session
from tieredlimit.cli.terminal import count, echo_json, printable
from tieredlimit.errors import BackendError, UsageError

_REFUND = files("tieredlimit.backends").joinpath("lua/refund.lua").read_text("utf-8")

_ACCOUNT = (
    click.option("--account", "account_id", metavar="ID", required=True, help="The account."),
    click.option("--tier", metavar="NAME", help="Only its buckets of this tier."),
    click.option("--plan", metavar="PLAN", help="Its plan, to find its tier."),
    click.option("--created", "created_at", type=instant, metavar="INSTANT", help="When made."),
    click.option("--tag", "tags", multiple=True, metavar="TAG", help="Its tag; repeatable."),
    click.option(
        "--within", multiple=True, metavar="NAME=ID", help="A subject around it; repeatable."
    ),
    click.option("--anonymous", is_flag=True, help="The id is a client address."),
    confirm.flag,
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
)


@dataclass(frozen=True, slots=True)
class Target:
    """Say whose buckets are meant, and of which tiers.

    Attributes:
        feature: The feature.
        account: The account.
        tiers: The tiers.
        sure: Whether these tiers were asked for, and are not just all there are.
        keys: By tier and charged subject, the key in Redis; all share a hash tag.
        slots: The keys of the slots that these subjects may hold; the same hash tag.
        pool: The pool that the feature takes from as well, None for none.
    """

    feature: str
    account: Account
    tiers: Sequence[str]
    sure: bool
    keys: Mapping[tuple[str, str | None], str]
    slots: Sequence[str]
    pool: Pool | None


def _options(command: Callable[..., None]) -> Callable[..., None]:
    return reduce(lambda inner, option: option(inner), reversed(_ACCOUNT), command)


@click.command("reset")
@click.argument("feature")
@click.option("--slots", is_flag=True, help="Free its slots too: running jobs go on, uncounted.")
@_options
@connects
def reset(_ctx: click.Context, place: Place, /, *, feature: str, **given: Any) -> None:
    """Fill all buckets that an account has for FEATURE, in every tier or the one that is named.

    With --plan, --created or --tag: those of the tier that it falls in. Buckets that it shares,
    such as its organisation's, are filled where --within names them; so are slots freed. A pool is
    left as it is, with its slots.
    """
    run(_reset(place, feature, given))


@click.command("refund")
@click.argument("feature")
@click.option("--tokens", type=click.IntRange(1, MAX_AMOUNT), required=True, metavar="N")
@_options
@connects
def refund(
    _ctx: click.Context, place: Place, /, *, feature: str, tokens: int, **given: Any
) -> None:
    """Give an account N tokens of FEATURE back, never beyond full. A pool gets nothing back.

    Its tier is the one that is named, or that its --plan, --created and --tag say; without these,
    the only one in which it has used anything.
    """
    run(_refund(place, feature, tokens, given))


commands = (reset, refund)


async def _reset(place: Place, feature: str, given: Mapping[str, Any]) -> None:
    frees = given["slots"]
    async with session(place) as opened:
        head = await opened.store.head()
        target = await _target(opened, head, feature, given)
        held = await _held(opened, target)
        told = f"fill the buckets of {_named(target)} for {feature} in {_tiers(target)}"
        if frees:
            told = f"{told}, and free {count(held, 'slot')}"
        await _agree(opened, told, given)
        keys = list(target.keys.values())
        removed = await opened.nodes.ask(keys[0], "DEL", *keys)
        if frees:
            held = await _held(opened, target)  # since the question, some jobs may have ended
            await opened.nodes.ask(target.slots[0], "DEL", *target.slots)
    if given["as_json"]:
        listed = [{"tier": tier, "per": per} for tier, per in target.keys]
        echo_json({"feature": feature, "account": target.account.id, "filled": removed,
                   "slots_held": held, "slots_freed": held if frees else 0,
                   "looked_at": listed})  # fmt: skip
        return
    if removed:
        told = f"{_named(target)} is full again for {feature}"
        click.echo(f"reset · {told} · {count(removed, 'key')} of buckets dropped")
    else:
        click.echo(f"nothing to reset · {_named(target)} {_unused(target)}")
    for line in _slot_lines(target, held, frees=frees):
        click.echo(line)


async def _held(opened: Session, target: Target) -> int:
    """Return how many slots are held.

    Raises:
        BackendError: Redis does not answer, or something else stands there.
    """
    now = await opened.store.now()
    told = await opened.nodes.ask_all([(key, count_held(key, now)) for key in target.slots])
    for reply in told:
        if isinstance(reply, BackendError):
            raise reply
    return sum(told)


def _slot_lines(target: Target, held: int, *, frees: bool) -> Iterator[str]:
    if held and not frees:
        yield f"slots · {held:,} held, and left so: --slots frees them, too"
    elif frees:
        yield f"slots · {held:,} freed" if held else "slots · none was held"
    if held and frees and target.pool is not None and target.pool.quota.concurrency is not None:
        yield f"pool {target.pool.name} · its slots stay held until their jobs or leases end"


async def _refund(place: Place, feature: str, tokens: int, given: Mapping[str, Any]) -> None:
    async with session(place) as opened:
        head = await opened.store.head()
        target = await _target(opened, head, feature, given)
        told = f"give {count(tokens, 'token')} of {feature} back to {_named(target)}"
        if target.pool is not None:
            told = f"{told}, and none to pool {target.pool.name}"
        await _agree(opened, told, given)
        tier = await _only_tier(opened, target)
        rows = [] if tier is None else await _give_back(opened, head, target, tier, tokens)
    if given["as_json"]:
        echo_json({"feature": feature, "account": target.account.id, "tier": tier, "quotas": rows,
                   "pool": None if target.pool is None else target.pool.name})  # fmt: skip
        return
    if not any(row["debt_before"] for row in rows):
        click.echo(f"nothing to refund · {_named(target)} {_unused(target)}")
    for row in rows:
        left = row["debt_after"]
        full = "full" if not left else f"full in {spell_about(round(left * 1e6))}"
        if row["debt_before"]:
            click.echo(f"refunded · {row['quota']} in tier {tier}: {full}")
    if target.pool is not None and any(row["debt_before"] for row in rows):
        click.echo(f"pool {target.pool.name} · stays as it is: only the account was given back to")


async def _target(
    opened: Session, head: Revision, feature: str, given: Mapping[str, Any]
) -> Target:
    policy = policy_of(head, opened.place)
    _check("feature", feature, list(policy.features))
    names = [tier.name for tier in policy.tiers]
    tier, created_at = given["tier"], given["created_at"]
    account = account_of(
        given["account_id"],
        given["plan"],
        created_at if isinstance(created_at, datetime) else None,
        given["tags"],
        given["within"],
        given["anonymous"],
    )
    namespace, now = opened.place.namespace, await opened.store.now()
    name_of = name_by(opened.secret)
    table = Table(policy, namespace, opened.shards, overrides=head.overrides, now=now)
    described = account.plan is not None or account.created_at is not None or account.tags
    if tier is not None:
        _check("tier", tier, names)
        names = [tier]
    elif described:
        names = [table.tier_of(account, now)]
    pers = pers_of(policy, head.overrides)
    pool = policy.features[feature].pool
    together = opened.shards == 1 or (pool is not None and pool.slices == 1)
    if pers and not account.within and not together:
        raise UsageError(
            f"buckets are charged per {', '.join(sorted(pers))} as well, and lie where that is: "
            "say which with --within NAME=ID"
        )
    for per in account.within:
        if per not in pers:
            raise UsageError(f'no quota is charged per "{per}"{did_you_mean(per, pers)}')
    shard = _shard(table, namespace, account, feature, names[0])
    subjects = (None, *sorted(pers))

    def key(tier: str, per: str | None) -> str:
        prefix = key_prefix(namespace, 0, feature, tier, per)
        return subject_key(prefix, per, account, shard, name_of)

    keys = {(name, per): key(name, per) for name in names for per in subjects}
    slots = [key(name + LEASES, per) for name in names for per in subjects]
    return Target(feature, account, names, bool(tier or described), keys, slots, pool)


def _shard(table: Table, namespace: str, account: Account, feature: str, tier: str) -> int:
    """Return the shard of all that takes of a feature charge to an account.

    Where there is a pool it is the pool's, even of a tier whose cell is 0: an override may have
    let it in.
    """
    entry = table.entry(tier, feature)
    pool = entry.feature.pool
    if pool is None:
        return table.shard_of(account)
    part = PoolPart.of(pool, tier, namespace, table.shards)
    demands = Demands(part, (), refunds=False)
    return table.place_of(account, replace(entry, demands=demands))[0]


async def _agree(opened: Session, told: str, given: Mapping[str, Any]) -> None:
    fleet = await look(opened)
    aside = given["as_json"]
    click.echo(fleet.banner(), err=aside)
    click.echo(printable(told), err=aside)
    confirm.require_consent(opened.place, fleet, yes=given["yes"], aside=aside)


async def _only_tier(opened: Session, target: Target) -> str | None:
    """Return the tier to refund in, None where nothing is used.

    Raises:
        Failure: It is not clear which.
    """
    if target.sure:
        return target.tiers[0]
    asked = [(key, ("EXISTS", key)) for key in target.keys.values()]
    told = await opened.nodes.ask_all(asked)
    used = {tier for (tier, _), there in zip(target.keys, told, strict=True) if there == 1}
    if len(used) > 1:
        raise Failure(
            f"{_named(target)} has used {target.feature} in the tiers "
            f"{', '.join(tier for tier in target.tiers if tier in used)}: say which with --tier. "
            "Nothing was done"
        )
    return used.pop() if used else None


async def _give_back(
    opened: Session, head: Revision, target: Target, tier: str, tokens: int
) -> list[dict[str, Any]]:
    """Give tokens back to every bucket of a tier's cell; return what became of each."""
    policy, now = policy_of(head, opened.place), await opened.store.now()
    override, _ = rule(head, target.feature, target.account, tier, now)
    quotas = cell_under(policy, tier, target.feature, override).quotas
    if not quotas:
        return []
    by_key: dict[str, list[Any]] = {}
    for quota in quotas:
        by_key.setdefault(target.keys[tier, quota.per], []).append(quota)
    packed = [
        b"".join(pack("<4sd", quota.tag, float(tokens * quota.interval_us)) for quota in group)
        for group in by_key.values()
    ]
    keys = list(by_key)
    told = await opened.nodes.ask(keys[0], "EVAL", _REFUND, len(keys), *keys, *packed, "")
    ordered = [quota for group in by_key.values() for quota in group]
    return [
        {
            "quota": quota.name,
            "per": quota.per,
            "debt_before": told[2 * i] / 1e6,
            "debt_after": told[2 * i + 1] / 1e6,
        }
        for i, quota in enumerate(ordered)
    ]


def _check(kind: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        hint = did_you_mean(name, known) or f"; the policy has {', '.join(known)}"
        raise UsageError(f"unknown {kind} {name!r:.80}{hint}")


def _named(target: Target) -> str:
    return f"account {printable(target.account.id)}"


def _unused(target: Target) -> str:
    where = f" in {_tiers(target)}" if target.sure else ""
    return f"has used nothing of {target.feature}{where}"


def _tiers(target: Target) -> str:
    return f"tier {target.tiers[0]}" if len(target.tiers) == 1 else "every tier"

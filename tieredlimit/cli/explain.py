"""`tieredlimit explain`: what would become of this request, and why."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from datetime import datetime

import click
from click.core import ParameterSource

from tieredlimit._core.account import Account
from tieredlimit._core.explanation import choose_tier, find_route, nearest_route
from tieredlimit._core.force import reopens_in
from tieredlimit._core.override import Override
from tieredlimit._core.policy import Policy
from tieredlimit._core.quota import MAX_AMOUNT
from tieredlimit._core.rate import SECOND_US, parse_instant
from tieredlimit._core.reading import did_you_mean
from tieredlimit._core.revision import NOTHING, Revision
from tieredlimit._core.tier import Cell
from tieredlimit.backends.memory import MemoryBackend, system_clock
from tieredlimit.cli import policies as policy_files
from tieredlimit.cli.accounts import account_of
from tieredlimit.cli.explained import Explanation, document, page, request_document
from tieredlimit.cli.inforce import Ruling, cell_under, policy_under, rule
from tieredlimit.cli.instants import instant
from tieredlimit.cli.requests import Request, split_words
from tieredlimit.cli.session import (
    NAMED,
    POLICY,
    REDIS,
    Place,
    place_of,
    policy_of,
    run,
    session,
)
from tieredlimit.cli.standing import Standing, asked, demanding, unasked
from tieredlimit.cli.terminal import echo_json, printable
from tieredlimit.decision import Decision
from tieredlimit.errors import UsageError
from tieredlimit.limiter import Limiter


@click.command("explain")
@click.argument("words", nargs=-1, metavar="[POLICY]... [METHOD PATH]")
@click.option("--feature", metavar="NAME", help="Ask about a feature, instead of METHOD PATH.")
@click.option(
    "--cost",
    type=click.IntRange(0, MAX_AMOUNT),
    metavar="TOKENS",
    help="With --feature: the tokens asked for; 1 if not given.",
)
@click.option("--account", "account_id", metavar="ID", help="The account's id.")
@click.option("--plan", metavar="PLAN", help="What billing calls its plan; unknown if not given.")
@click.option(
    "--created-at",
    "--created",
    "created_at",
    type=instant,
    metavar="INSTANT",
    help="When it was made: a date (midnight in UTC) or RFC 3339; unknown, if not given, is new.",
)
@click.option("--tag", "tags", metavar="TAG", multiple=True, help="A tag it carries; repeatable.")
@click.option("--within", metavar="NAME=ID", multiple=True, help="A subject around it; repeatable.")
@click.option("--anonymous", is_flag=True, help="It is no account, but a client address.")
@click.option("--at", type=instant, metavar="INSTANT", help="As of this instant, instead of now.")
@REDIS
@NAMED
@POLICY
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    words: tuple[str, ...],
    *,
    url: str | None,
    namespace: str,
    paths: tuple[str, ...],
    feature: str | None,
    cost: int | None,
    account_id: str | None,
    plan: str | None,
    created_at: datetime | None,
    tags: tuple[str, ...],
    within: tuple[str, ...],
    anonymous: bool,
    at: datetime | None,
    as_json: bool,
) -> None:
    """Say what becomes of a request, and why.

    PATH is below the application's root path, as a client sends it; a query is ignored. METHOD of
    a WebSocket is WS. The account's own buckets count as full.

    With --redis, or without POLICY: by the policy that is stored there, else by POLICY, and with
    the overrides in force; and, unless --at is another instant, with the feature's pool and slots
    as they stand now. Without --redis only POLICY is read, wherever TIEREDLIMIT_REDIS points.

    \b
    tieredlimit explain policy.toml --plan free --created-at 2026-11-20 POST /v1/videos
    tieredlimit explain policy.toml --plan pro --within org=o7 --feature video --cost 8
    tieredlimit explain --redis redis://localhost --account u1 --plan free POST /v1/videos
    """  # noqa: D301 -- click reads the backspace
    explicit = ctx.get_parameter_source("url") is ParameterSource.COMMANDLINE
    connected = explicit or (url is not None and not _has_file(words, feature))
    files, request = split_words(words, feature, fileless=connected)
    if request is not None and cost is not None:
        raise click.UsageError("--cost goes with --feature: a request costs what its route says.")
    account = account_of(account_id, plan, created_at, tags, within, anonymous)
    head = NOTHING
    server_now = system_clock()
    if connected:
        place = place_of(ctx, url, namespace, tuple(files) or paths)
        head, server_now = run(_look(place))
        policy = policy_of(head, place)
    else:
        policy = policy_files.load(files)
    now = server_now // SECOND_US * SECOND_US if at is None else parse_instant(at)
    metered = find_route(policy, request.method, request.path) if request else None
    if metered is not None:
        name, cost = metered.feature, metered.cost
    elif request is not None:
        _echo_unmetered(policy, request, as_json)
        return
    else:
        name, cost = _known_feature(policy, str(feature)), 1 if cost is None else cost
    choice = choose_tier(policy, account, now)
    winner, rulings = rule(head, name, account, choice.tier, now)
    cell = cell_under(policy, choice.tier, name, winner)
    decision = _decide(policy, account, now, cell, cost)
    standing = unasked(policy, cell, cost)
    if connected and at is None and demanding(policy, cell):
        anybody = account_id is None
        standing = run(_stand(place, policy, head, cell, account, cost, anybody=anybody))
        if decision.allowed and standing.decision and not standing.decision.allowed:
            decision = standing.decision
    if winner is not None and winner.action == "close":
        decision = _closed(head, winner, decision.cell, account, cost, now)
    explanation = Explanation(
        request,
        metered,
        account,
        account_id is None,
        now,
        choice,
        policy.features[name],
        decision,
        [
            *_notes(policy, account, request, decision),
            *_notes_on(head, bool(files), account_id, rulings),
        ],
        head.number if connected else None,
        rulings,
        standing,
    )
    if as_json:
        echo_json(document(explanation))
    else:
        for line in page(explanation):
            click.echo(line)


def _has_file(words: Sequence[str], feature: str | None) -> bool:
    """Say whether there are more words than a request has."""
    return len(words) > (2 if feature is None else 0)


async def _look(place: Place) -> tuple[Revision, int]:
    async with session(place) as opened:
        return await opened.store.head(), await opened.store.now()


async def _stand(
    place: Place,
    policy: Policy,
    head: Revision,
    cell: Cell,
    account: Account,
    cost: int,
    *,
    anybody: bool,
) -> Standing:
    async with session(place) as opened:
        return await asked(opened, policy, head, cell, account, cost, anybody=anybody)


def _known_feature(policy: Policy, name: str) -> str:
    if name in policy.features:
        return name
    known = list(policy.features)
    hint = did_you_mean(name, known) or f"; known are {', '.join(known)}"
    raise click.BadParameter(f"got {name!r:.80}{hint}", param_hint="'--feature'")


def _decide(policy: Policy, account: Account, now: int, cell: Cell, cost: int) -> Decision:
    """Return the decision of a store in which every bucket is full."""
    limiter = Limiter(policy_under(policy, cell), MemoryBackend(clock=lambda: now))
    try:
        return asyncio.run(limiter.take(account, cell.feature, cost))
    except UsageError as exc:
        raise click.UsageError(printable(str(exc))) from exc


def _closed(
    head: Revision, closure: Override, cell: Cell, account: Account, cost: int, now: int
) -> Decision:
    """Return what a worker answers while an override closes a cell."""
    overrides = [one for one in head.overrides if one.feature == cell.feature]
    wait = reopens_in(closure, overrides, account, cell.tier, now)
    return Decision(False, "closed", cell, cost, None if wait is None else wait / SECOND_US)


def _echo_unmetered(policy: Policy, request: Request, as_json: bool) -> None:
    nearest = nearest_route(policy, request.method, request.path)
    if as_json:
        route = nearest and str(nearest.route)
        hint = nearest and {"route": route, "feature": nearest.feature, "why": nearest.why}
        told = {"request": request_document(request), "metered": False, "nearest": hint}
        echo_json(told)
        return
    click.echo(f"{printable(str(request))} matches no feature: it passes untouched.")
    if nearest is not None:
        why = printable(nearest.why)
        click.echo(f"nearest   {nearest.route}, metered as {nearest.feature}: {why}")


def _notes(
    policy: Policy, account: Account, request: Request | None, decision: Decision
) -> Iterator[str]:
    """Yield what is easily overlooked: words that no tier knows, and what a transport cannot do."""
    whens = [tier.when for tier in policy.tiers if tier.when is not None]
    plans = {plan for when in whens for plan in when.plan or ()}
    if account.plan is not None and account.plan not in plans:
        yield f'no tier asks for the plan "{account.plan}"{did_you_mean(account.plan, plans)}'
    tags = {tag for when in whens for tag in when.tags}
    for tag in sorted(set(account.tags) - tags):
        yield f'no tier asks for the tag "{tag}"{did_you_mean(tag, tags)}'
    cells = [cell for tier in policy.tiers for cell in tier.cells.values()]
    pers = {quota.per for cell in cells for quota in cell.quotas if quota.per}
    for per in account.within:
        if per not in pers:
            yield f'no quota is charged per "{per}"{did_you_mean(per, pers)}'
    if request is not None and request.method == "OPTIONS":
        yield "a CORS preflight is never charged, nor denied"
    if request is not None and request.websocket and not decision.allowed:
        yield "a server that cannot answer a WebSocket closes it before accepting: a plain 403"


def _notes_on(
    head: Revision, has_files: bool, account_id: str | None, rulings: Sequence[Ruling]
) -> Iterator[str]:
    """Yield what is easily overlooked of a place in Redis."""
    if has_files and head.base is not None:
        yield f"a policy is stored in Redis (revision {head.number}), and counts instead of POLICY"
    if account_id is None and any(
        ruling.override.share is not None or ruling.override.who.account is not None
        for ruling in rulings
    ):
        yield "an override depends on the account's id: say which with --account"

"""`tieredlimit explain`: what would become of this request, and why."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from datetime import datetime

import click

from tieredlimit._core.account import Account
from tieredlimit._core.explanation import choose_tier, find_route, nearest_route
from tieredlimit._core.policy import Policy
from tieredlimit._core.quota import MAX_AMOUNT
from tieredlimit._core.rate import SECOND_US, parse_instant
from tieredlimit._core.reading import did_you_mean
from tieredlimit.backends.memory import MemoryBackend, system_clock
from tieredlimit.cli import policies as policy_files
from tieredlimit.cli.explained import Explanation, document, page, request_document
from tieredlimit.cli.instants import instant
from tieredlimit.cli.requests import Request, split_words
from tieredlimit.cli.terminal import echo_json, printable
from tieredlimit.decision import Decision
from tieredlimit.errors import UsageError
from tieredlimit.limiter import Limiter

_ANYBODY = "anybody"


@click.command("explain")
@click.argument("words", nargs=-1, required=True, metavar="POLICY... [METHOD PATH]")
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
    type=instant,
    metavar="INSTANT",
    help="When it was made: a date (midnight in UTC) or RFC 3339; unknown, if not given, is new.",
)
@click.option("--tag", "tags", metavar="TAG", multiple=True, help="A tag it carries; repeatable.")
@click.option("--within", metavar="NAME=ID", multiple=True, help="A subject around it; repeatable.")
@click.option("--anonymous", is_flag=True, help="It is no account, but a client address.")
@click.option("--at", type=instant, metavar="INSTANT", help="As of this instant, instead of now.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    words: tuple[str, ...],
    *,
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
    a WebSocket is WS. Only the policy is read: buckets count as full.

    \b
    tieredlimit explain policy.toml --plan free --created-at 2026-11-20 POST /v1/videos
    tieredlimit explain policy.toml --plan pro --within org=o7 --feature video --cost 8
    """  # noqa: D301 -- click reads the backspace
    paths, request = split_words(words, feature)
    if request is not None and cost is not None:
        raise click.UsageError("--cost goes with --feature: a request costs what its route says.")
    account = _account(account_id, plan, created_at, tags, within, anonymous)
    policy = policy_files.load(paths)
    now = system_clock() // SECOND_US * SECOND_US if at is None else parse_instant(at)
    metered = find_route(policy, request.method, request.path) if request else None
    if metered is not None:
        name, cost = metered.feature, metered.cost
    elif request is not None:
        _echo_unmetered(policy, request, as_json)
        return
    else:
        name, cost = _known_feature(policy, str(feature)), 1 if cost is None else cost
    decision = _decide(policy, account, now, name, cost)
    explanation = Explanation(
        request,
        metered,
        account,
        account_id is None,
        now,
        choose_tier(policy, account, now),
        policy.features[name],
        decision,
        list(_notes(policy, account, request, decision)),
    )
    if as_json:
        echo_json(document(explanation))
    else:
        for line in page(explanation):
            click.echo(line)


def _account(
    account_id: str | None,
    plan: str | None,
    created_at: datetime | None,
    tags: Iterable[str],
    within: Iterable[str],
    anonymous: bool,
) -> Account:
    name = _ANYBODY if account_id is None else account_id
    subjects = dict(_subject(text) for text in within)
    try:
        return Account(name, plan, created_at, frozenset(tags), subjects, anonymous=anonymous)
    except UsageError as exc:
        raise click.UsageError(printable(str(exc))) from exc


def _subject(text: str) -> tuple[str, str]:
    name, equals, subject = text.partition("=")
    if not (name and equals and subject):
        wanted = "write NAME=ID, such as org=o7"
        raise click.BadParameter(f"got {text!r:.80}; {wanted}", param_hint="'--within'")
    return name, subject


def _known_feature(policy: Policy, name: str) -> str:
    if name in policy.features:
        return name
    known = list(policy.features)
    hint = did_you_mean(name, known) or f"; known are {', '.join(known)}"
    raise click.BadParameter(f"got {name!r:.80}{hint}", param_hint="'--feature'")


def _decide(policy: Policy, account: Account, now: int, feature: str, cost: int) -> Decision:
    """Return the decision of a store in which every bucket is full."""
    limiter = Limiter(policy, MemoryBackend(clock=lambda: now))
    try:
        return asyncio.run(limiter.take(account, feature, cost))
    except UsageError as exc:
        raise click.UsageError(printable(str(exc))) from exc


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

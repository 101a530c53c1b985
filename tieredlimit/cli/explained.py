"""Everything that can be said of one take, as a page and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus

import click

from tieredlimit._core.account import Account
from tieredlimit._core.explanation import (
    Metered,
    TierChoice,
    spell_about,
    spell_age,
)
from tieredlimit._core.quota import Quota
from tieredlimit._core.rate import SECOND_US, spell_duration, spell_instant
from tieredlimit._core.tier import Cell, Feature
from tieredlimit.cli.checks import spell_share
from tieredlimit.cli.inforce import Ruling
from tieredlimit.cli.requests import Request
from tieredlimit.cli.spelled import override_document
from tieredlimit.cli.standing import (
    Standing,
    pool_paragraphs,
    refund_paragraph,
    slot_paragraphs,
    standing_document,
)
from tieredlimit.cli.table import quota_document
from tieredlimit.cli.terminal import count, folded, printable, width
from tieredlimit.decision import Decision

_LABEL = 10
_NARROWEST = 20


@dataclass(frozen=True, slots=True)
class Explanation:
    """Hold a take from full buckets of the account's own, with its reasons.

    Attributes:
        request: What was asked about, None where it was a feature.
        metered: How the request is metered, None where it was a feature.
        account: Who asks.
        anybody: True where the account's id was not given, and so is not shown.
        now: The instant of the take.
        choice: The account's tier.
        feature: What the request is metered as.
        decision: The outcome.
        notes: What is easily overlooked.
        revision: The number of the revision in force, None where only files were read.
        rulings: What becomes of each override of the feature.
        standing: The pool and the slots that it asks for.
    """

    request: Request | None
    metered: Metered | None
    account: Account
    anybody: bool
    now: int
    choice: TierChoice
    feature: Feature
    decision: Decision
    notes: Sequence[str]
    revision: int | None
    rulings: Sequence[Ruling]
    standing: Standing


def page(explanation: Explanation) -> Iterator[str]:
    """Yield the lines of an explanation, for a terminal."""
    decision, choice = explanation.decision, explanation.choice
    yield click.style(printable(_heading(explanation)), bold=True)
    yield ""
    yield from _section("account", _account(explanation))
    tier = [f"{choice.tier}: {', '.join(choice.holds) or 'takes everybody else'}"]
    if choice.change is not None:
        at, then = choice.change.at, choice.change.tier
        left = spell_about(at - explanation.now)
        tier.append(f'leaves "{choice.tier}" at {spell_instant(at)}, in {left}, for "{then}"')
    yield from _section("tier", tier)
    yield from _section("skipped", [f"{p.tier}: {p.asks}; {p.has}" for p in choice.passed])
    lines = [ruling.line(explanation.now) for ruling in explanation.rulings]
    if explanation.revision is not None:
        yield from _section("override", lines or [f"none, under revision {explanation.revision}"])
    yield from _section("quotas", list(_quotas(explanation)))
    standing = explanation.standing
    yield from _section("pool", list(pool_paragraphs(standing)))
    yield from _section("slots", slot_paragraphs(standing))
    yield from _section("shadow", _shadow(decision.cell))
    answer = _answer(decision, standing)
    yield from _section("answer", [answer], "green" if decision.allowed else "red")
    if not decision.allowed:
        yield from _section("", _texts(decision))
    fields = _fields(decision)
    yield from (f"{'':{_LABEL}}{name.decode()}: {value.decode()}" for name, value in fields)
    if decision.allowed and _limited(explanation) and decision.cell.messages:
        yield from _section("used up", ["429 Too Many Requests, with:", *_texts(decision)])
    refund = None if decision.cell.zero else refund_paragraph(explanation.feature)
    yield from _section("refund", [] if refund is None else [refund])
    yield from _section("outage", [_outage(explanation)])
    yield from _section("note", explanation.notes, "yellow")


def _heading(explanation: Explanation) -> str:
    decision, metered = explanation.decision, explanation.metered
    if metered is None:
        return f"{decision.feature}, cost {decision.cost:,}"
    told = f"{explanation.request} is metered as {decision.feature}, cost {decision.cost:,}"
    return f"{told} (route {metered.route})"


def _account(explanation: Explanation) -> list[str]:
    account, now = explanation.account, explanation.now
    created_us = account.created_us()
    parts = [] if explanation.anybody else [account.id]
    if account.anonymous:
        parts.append("anonymous")
    parts.append(f"plan {'unknown' if account.plan is None else account.plan}")
    age = spell_age(account, now).removeprefix("is ")
    parts.append(age if created_us is None else f"created {spell_instant(created_us)}, {age}")
    if account.tags:
        parts.append(f"tags {', '.join(sorted(account.tags))}")
    parts += (f"{per} {subject}" for per, subject in account.within.items())
    return [" · ".join(parts), f"as of {spell_instant(now)}"]


def _quotas(explanation: Explanation) -> Iterator[str]:
    cell = explanation.decision.cell
    if cell.unlimited:
        yield "unlimited"
    elif cell.zero and explanation.decision.reason != "closed":
        yield "0: closed to this tier"
    for quota in cell.quotas:
        text = " ".join(replace(cell, quotas=(quota,)).spell().split())
        yield f"{quota.name}: {text}, charged to {_charged(quota, explanation.account)}"
        interval, window = spell_about(quota.interval_us), spell_about(quota.window_us)
        held = f"holds {quota.capacity:,}, one more every {interval}"
        yield f"  {held}, empty to full in {window}"
        if quota.concurrency is not None and quota.lease_us is not None:
            lease = spell_duration(quota.lease_us)
            yield f"  {count(quota.concurrency, 'slot')}, each free {lease} after its last renewal"


def _charged(quota: Quota, account: Account) -> str:
    itself = "the client's address" if account.anonymous else "the account"
    if quota.per is None:
        return itself
    subject = account.within.get(quota.per)
    if subject is None:
        return f"{itself} alone, since it is within no {quota.per}"
    return f"{quota.per} {subject}"


def _shadow(cell: Cell) -> list[str]:
    if cell.shadow is None:
        return []
    text = " ".join(cell.shadow.spell().split())
    return [f"{text}: measured beside it on buckets of its own, never enforced"]


def _limited(explanation: Explanation) -> bool:
    """Say whether anything limits the account's takes."""
    return bool(explanation.decision.cell.quotas) or explanation.standing.pool is not None


def _answer(decision: Decision, standing: Standing) -> str:
    if decision.allowed:
        return _allowed(decision, standing)
    status = HTTPStatus(decision.response().status_code)
    return f"{status.value} {status.phrase}: {_why(decision, standing)}"


def _allowed(decision: Decision, standing: Standing) -> str:
    cell, cost, pool = decision.cell, decision.cost, standing.pool
    if cell.unlimited and pool is None:
        return "allowed: nothing limits it, and the response says nothing of limits"
    rooms = [quota.capacity for quota in cell.quotas]
    full = ["the bucket" if len(cell.quotas) == 1 else "all buckets"] if cell.quotas else []
    as_it_stands = ""
    if pool is not None and standing.room is not None:
        rooms.append(standing.room)
        if standing.debt is None:
            full.append(f"pool {pool.name}")
        else:
            as_it_stands = f" as pool {pool.name} stands now"
    told = "allowed"
    if full:
        verb = "is" if full[:1] != ["all buckets"] and len(full) == 1 else "are"
        told = f"allowed if {' and '.join(full)} {verb} full"
    if any(one.held is None for one in standing.slots) or (
        standing.decision is None and _has_slots(decision, standing)
    ):
        told = f"{told} and a slot is free"
    if as_it_stands:
        told = f"{told},{as_it_stands}" if full else f"{told}{as_it_stands}"
    return f"{told}, {count(min(rooms) // cost, 'time')} in a row" if cost else told


def _has_slots(decision: Decision, standing: Standing) -> bool:
    pool = standing.pool
    own = any(quota.concurrency is not None for quota in decision.cell.quotas)
    return own or (pool is not None and pool.quota.concurrency is not None)


def _why(decision: Decision, standing: Standing) -> str:
    """Return why it is denied."""
    cell, cost, pool = decision.cell, decision.cost, decision.pool
    if decision.reason == "closed":
        wait = decision.retry_after
        ends = "until further notice" if wait is None else f"for {_about(wait)}"
        return f"an override closes it {ends}"
    if cell.zero:
        return "this tier has 0, and no waiting helps"
    if decision.reason == "quota":
        smallest = min(cell.quotas, key=lambda quota: quota.capacity)
        held = f"{smallest.name} never holds more than {smallest.capacity:,}"
        return f"it costs {cost:,}, and {held}: it never fits"
    if decision.reason == "pool" and pool is not None and pool.denies:
        if decision.retry_after is None:
            most = f"tier {cell.tier} never gets at more than {pool.capacity - pool.leave:,}"
            return f"it costs {cost:,}, and {most} of pool {pool.name}: it never fits"
        held = f"pool {pool.name} holds {pool.remaining:,}, of which tier {cell.tier} must leave"
        fits = f"it fits in {_about(decision.retry_after)}, if nobody takes any"
        return f"it costs {cost:,}, and {held} {pool.leave:,}: {fits}"
    full = next(one for one in standing.slots if one.denies)
    if full.pool:
        may = f"all {count(full.limit, 'slot')} that tier {cell.tier} may fill in"
        return f"{may} pool {full.name} are held"
    return f"{full.name} has {count(full.limit, 'slot')}, and {full.held:,} are held"


def _about(seconds: float) -> str:
    return spell_about(round(seconds * SECOND_US))


def _texts(decision: Decision) -> list[str]:
    """Return what a denied user reads, per language; the first is for all other languages."""
    messages = decision.cell.messages or {"en": decision.message()}
    default = " (default)" if len(messages) > 1 else ""
    first = next(iter(messages))
    return [
        f"{tag or 'any language'}{default if tag == first else ''}: {text}"
        for tag, text in messages.items()
    ]


def _outage(explanation: Explanation) -> str:
    decision = explanation.decision
    if decision.reason in ("zero", "closed") or _never_fits(decision):
        return "the same while Redis cannot answer: it is not asked"
    if explanation.feature.outage == "local" and not _limited(explanation):
        return "allowed, for nothing limits it, while Redis cannot answer"
    if explanation.feature.outage == "allow":
        return "allowed, and not counted, while Redis cannot answer"
    if explanation.feature.outage == "local":
        share = spell_share(explanation.feature.outage_share)
        return f"each process gives out {share} of the quotas by itself while Redis cannot answer"
    return "503 Service Unavailable while Redis cannot answer"


def _never_fits(decision: Decision) -> bool:
    if decision.reason == "pool":
        return decision.pool is None or decision.pool.remaining is None
    return decision.reason == "quota"


def _section(label: str, paragraphs: Sequence[str], colour: str | None = None) -> Iterator[str]:
    room = max(_NARROWEST, width() - _LABEL)
    for paragraph in paragraphs:
        for line in folded(paragraph, room):
            yield click.style(label.ljust(_LABEL), bold=True) + click.style(line, fg=colour)
            label = ""


def document(explanation: Explanation) -> dict[str, object]:
    """Return an explanation as JSON shows it; instants are RFC 3339, durations seconds."""
    account, choice, decision = explanation.account, explanation.choice, explanation.decision
    request, metered, change = explanation.request, explanation.metered, choice.change
    created_us = account.created_us()
    live = {} if explanation.revision is None else _live_document(explanation)
    return {
        "request": request and request_document(request),
        "metered": True,
        "route": str(metered.route) if metered else None,
        "feature": decision.feature,
        "cost": decision.cost,
        "at": spell_instant(explanation.now),
        "account": {
            "id": None if explanation.anybody else account.id,
            "plan": account.plan,
            "created_at": None if created_us is None else spell_instant(created_us),
            "tags": sorted(account.tags),
            "within": dict(account.within),
            "anonymous": account.anonymous,
        },
        "tier": {
            "name": choice.tier,
            "holds": list(choice.holds),
            "skipped": [
                {"tier": p.tier, "word": p.word, "asks": p.asks, "has": p.has}
                for p in choice.passed
            ],
            "changes": change and {"at": spell_instant(change.at), "tier": change.tier},
        },
        "cell": {
            "text": decision.cell.spell(),
            "zero": decision.cell.zero,
            "unlimited": decision.cell.unlimited,
            "quotas": [
                {**quota_document(quota), "charged": _charged(quota, account)}
                for quota in decision.cell.quotas
            ],
            "messages": dict(decision.cell.messages),
            "shadow": decision.cell.shadow and decision.cell.shadow.spell(),
        },
        **standing_document(explanation.standing),
        "refund_on": sorted(explanation.feature.refund_on),
        "refund_on_exception": explanation.feature.refund_on_exception,
        "answer": _answer_document(decision),
        "outage": explanation.feature.outage,
        "notes": list(explanation.notes),
        **live,
    }


def _live_document(explanation: Explanation) -> dict[str, object]:
    """Return what lies above the policy; only a namespace in Redis has it."""
    return {
        "revision": explanation.revision,
        "overrides": [
            {
                **override_document(ruling.override, explanation.now),
                "decides": ruling.wins,
                "why": ruling.why,
            }
            for ruling in explanation.rulings
        ],
    }


def request_document(request: Request) -> dict[str, object]:
    """Return a request as JSON shows it."""
    return {"method": request.method, "path": request.path, "websocket": request.websocket}


def _fields(decision: Decision) -> list[tuple[bytes, bytes]]:
    """Return what a client reads of the decision in the head of its response."""
    if decision.allowed:
        return decision.fields()
    headers = decision.response().raw_headers
    return [(name, value) for name, value in headers if name != b"content-length"]


def _answer_document(decision: Decision) -> dict[str, object]:
    fields = _fields(decision)
    return {
        "allowed": decision.allowed,
        "reason": decision.reason,
        "status": None if decision.allowed else decision.response().status_code,
        "headers": {name.decode(): value.decode() for name, value in fields},
        "body": None if decision.allowed else json.loads(decision.response().document()[1]),
    }

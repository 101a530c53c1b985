"""Overrides and revisions, as operators and their scripts read them."""

from __future__ import annotations

import json
from typing import Any

from tieredlimit._core.change import options
from tieredlimit._core.draft import spell_percent
from tieredlimit._core.override import Override
from tieredlimit._core.rate import SECOND_US, spell_instant
from tieredlimit._core.revision import Revision
from tieredlimit._core.share import ALL_BP


def what(one: Override, now: int) -> str:
    """Return what an override does."""
    if one.action == "close":
        return "closed" + (", no exceptions" if one.no_exceptions else "")
    if one.action == "set":
        told = one.quotas if isinstance(one.quotas, str) else json.dumps(one.quotas)
        return f"set to {told}" + (", no exceptions" if one.no_exceptions else "")
    if one.share is None:
        return "open"
    share = one.share
    reached = share.bp_at(now)
    told = f"open for {spell_percent(reached)}"
    if share.duration_us and reached < ALL_BP:
        return f"{told}, for all by {brief(share.begin_us + share.duration_us)}"
    return told


def state(one: Override, now: int) -> str:
    """Return whether an override counts yet, and still."""
    if one.active(now):
        return "in force"
    return "scheduled" if one.begin_us is not None and now < one.begin_us else "over"


def sentence(one: Override, now: int) -> str:
    """Return an override in one line."""
    parts = [f"{one.id}: {one.feature} {what(one, now)} for {one.who.spell()}"]
    if one.begin_us is not None and now < one.begin_us:
        parts.append(f"from {brief(one.begin_us)}")
    if one.end_us is not None:
        parts.append(f"until {brief(one.end_us)}")
    return ", ".join(parts)


def brief(at: int) -> str:
    """Return an instant to the second."""
    return spell_instant(at // SECOND_US * SECOND_US)


def override_document(one: Override, now: int) -> dict[str, Any]:
    """Return an override as JSON shows it; instants are RFC 3339, shares percent."""
    share = one.share
    return {
        "id": one.id,
        "state": state(one, now),
        "action": one.action,
        "feature": one.feature,
        "who": one.who.spell(),
        "options": options(one.who),
        "from": None if one.begin_us is None else spell_instant(one.begin_us),
        "until": None if one.end_us is None else spell_instant(one.end_us),
        "percent": None if share is None else share.bp_at(now) / 100,
        "full_at": spell_instant(share.begin_us + share.duration_us)
        if share and share.duration_us
        else None,
        "quotas": one.quotas,
        "messages": dict(one.messages),
        "no_exceptions": one.no_exceptions,
        "actor": one.actor,
        "reason": one.reason,
        "made_at": spell_instant(one.made_us),
        "revision": one.sequence,
    }


def revision_document(revision: Revision) -> dict[str, Any]:
    """Return a revision as JSON shows it, without its contents."""
    return {
        "number": revision.number,
        "digest": revision.digest,
        "at": spell_instant(revision.made_us) if revision.number else None,
        "actor": revision.actor,
        "change": revision.change,
        "reason": revision.reason,
        "stored_policy": revision.base is not None,
        "overrides": len(revision.overrides),
    }

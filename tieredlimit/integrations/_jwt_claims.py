"""From the claims of a verified token to an account. Reads a mapping, and needs no library."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeAlias

from tieredlimit._core.account import Account
from tieredlimit.errors import UsageError

__all__ = ["Claim", "Claims"]

Claim: TypeAlias = str | Sequence[str]
"""The name of a claim, or the names on the way to one: `("app_metadata", "plan")`."""

_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Claims:
    """Say which claims of a token make which part of an account; None reads none.

    Attributes:
        id: Who it is: a string, or a whole number as its digits. A token without it is nobody's.
        plan: A string.
        created_at: RFC 3339, or seconds since 1970.
        tags: A list of strings, or one string with spaces between them, as `scope` has it.
        within: For each subject around the account, from the inside out, the claim with its id.
            Subjects that a token does not name are left out.
    """

    id: Claim = "sub"
    plan: Claim | None = "plan"
    created_at: Claim | None = "created_at"
    tags: Claim | None = "tags"
    within: Mapping[str, Claim] = field(default_factory=lambda: {"org": "org"})

    def account(self, claims: Mapping[str, Any]) -> Account | None:
        """Return the account of a token's claims, None where they do not say who it is.

        Raises:
            UsageError: A claim is there and cannot be what it is read as. It is named, not quoted.
        """
        id_ = _id_of(claims, self.id)
        if id_ is None:
            return None
        within = {
            subject: found
            for subject, claim in self.within.items()
            if (found := _id_of(claims, claim)) is not None
        }
        plan = _at(claims, self.plan)
        if plan is not None and not isinstance(plan, str):
            raise _unreadable(self.plan, "a string", plan)
        return Account(
            id_,
            plan=plan,
            created_at=_instant_of(claims, self.created_at),
            tags=_tags_of(claims, self.tags),
            within=within,
        )


def _at(claims: Mapping[str, Any], claim: Claim | None) -> Any:
    """Return the value of a claim, None where it is absent."""
    if claim is None:
        return None
    found: Any = claims
    for name in (claim,) if isinstance(claim, str) else claim:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _id_of(claims: Mapping[str, Any], claim: Claim) -> str | None:
    value = _at(claims, claim)
    if type(value) is int:
        return str(value)
    if value is not None and not isinstance(value, str):
        raise _unreadable(claim, "a string or a whole number", value)
    return value or None


def _instant_of(claims: Mapping[str, Any], claim: Claim | None) -> datetime | None:
    value = _at(claims, claim)
    if value is None:
        return None
    try:
        if isinstance(value, str) and _RFC_3339.fullmatch(value):
            return datetime.fromisoformat(value.upper())
        if isinstance(value, int | float) and type(value) is not bool:
            return datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError):
        pass
    raise _unreadable(claim, "RFC 3339 or seconds since 1970", value)


def _tags_of(claims: Mapping[str, Any], claim: Claim | None) -> frozenset[str]:
    value = _at(claims, claim)
    if value is None:
        return frozenset()
    if isinstance(value, str):
        return frozenset(value.split())
    if isinstance(value, list) and all(isinstance(tag, str) for tag in value):
        return frozenset(value)
    raise _unreadable(claim, "a list of strings, or a string", value)


def _unreadable(claim: Claim | None, wanted: str, value: object) -> UsageError:
    spelled = claim if isinstance(claim, str) else ".".join(claim or ())
    return UsageError(f"the claim {spelled!r:.80} must be {wanted}, got {type(value).__name__}")

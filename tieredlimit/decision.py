"""The outcome of a take, and the answer that a denied client gets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal, NamedTuple

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tieredlimit._core.bucket import next_token_us, remaining, wait_us
from tieredlimit._core.fields import (
    Field,
    fields_of_debts,
    legacy_fields,
    policy_field,
    rate_limit_fields,
    whole_seconds,
    zero_fields,
)
from tieredlimit._core.messages import choose
from tieredlimit._core.quota import Quota
from tieredlimit._core.rate import SECOND_US
from tieredlimit._core.taken import Taken
from tieredlimit._core.tier import Cell
from tieredlimit.demanded import Demanded, PoolState, SlotState
from tieredlimit.errors import Denied, UsageError

if TYPE_CHECKING:
    from tieredlimit.leases import Lease

__all__ = ["Decision", "Denial", "PoolState", "QuotaState", "Reason", "SlotState"]

Reason = Literal["allowed", "quota", "zero", "closed", "pool", "concurrency", "outage"]

STATUSES: Mapping[Reason, int] = {
    "quota": 429,
    "zero": 403,
    "closed": 403,
    "pool": 429,
    "concurrency": 429,
    "outage": 503,
}
"""The status of a denial, by reason."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_UNITS = (("day", 86_400), ("hour", 3_600), ("minute", 60), ("second", 1))

# What `json.dumps` makes anew at each call.
_to_json = json.JSONEncoder(ensure_ascii=False).encode

_TYPES = "https://iana.org/assignments/http-problem-types#"
_EXCEEDED = (
    f"{_TYPES}quota-exceeded",
    "Request cannot be satisfied as assigned quota has been exceeded",
)
_REDUCED = (
    f"{_TYPES}temporary-reduced-capacity",
    "Request cannot be satisfied due to temporary server capacity constraints",
)
# RFC 9457, section 4.2.1: with about:blank, the title is the status' own phrase.
_PROBLEMS = {"quota": _EXCEEDED, "concurrency": _EXCEEDED, "zero": ("about:blank", "")}


@dataclass(frozen=True, slots=True)
class QuotaState:
    """Show one quota's bucket at the instant of a decision.

    Attributes:
        name: The quota's name.
        capacity: Tokens in a full bucket.
        remaining: Whole tokens in it now, None where the store was not asked.
        denies: True if this bucket stands in the way of the cost.
        retry_after: Seconds until the cost fits, 0 if it does, None where it never will.
        per: The subject around the account that is charged, None for the account itself.
        window_us: Microseconds from empty to full.
        next_token_us: Microseconds until there is one more whole token, None in a full bucket.
    """

    name: str
    capacity: int
    remaining: int | None
    denies: bool
    retry_after: float | None
    per: str | None
    window_us: int
    next_token_us: int | None


class Decision(NamedTuple):
    """Hold the outcome of a take.

    Attributes:
        allowed: Whether the request may go on.
        reason: `allowed`, or why not; `outage` either way where the store could not be asked.
        cell: What the policy says for this tier and feature.
        cost: The tokens asked for.
        retry_after: Seconds until this cost fits, the latest over the denying quotas; None where
            it is allowed, where no time is known, and where it never fits.
        limits: The quotas that were asked, in the order of `debts`.
        debts: Per quota, the microseconds until its bucket is full; empty where the store was not
            asked.
        policy: What `RateLimit-Policy` says of `limits`, if that was made beforehand.
        demanded: What was asked for beside the account's own buckets, None where nothing was.
    """

    allowed: bool
    reason: Reason
    cell: Cell
    cost: int
    retry_after: float | None = None
    limits: tuple[Quota, ...] = ()
    debts: Sequence[int] = ()
    policy: bytes = b""
    demanded: Demanded | None = None

    @property
    def pool(self) -> PoolState | None:
        """The feature's pool, None where it has none."""
        return None if self.demanded is None else self.demanded.pool

    @property
    def slots(self) -> tuple[SlotState, ...]:
        """The slots that were asked for; empty where nobody was asked."""
        return () if self.demanded is None else self.demanded.slots

    @property
    def lease(self) -> Lease | None:
        """What holds the slots now, None where there are none or it was denied."""
        return None if self.demanded is None else self.demanded.lease

    @property
    def taken(self) -> Taken | None:
        """What can be settled or given back, None where what was charged is final."""
        return None if self.demanded is None else self.demanded.taken

    @property
    def token(self) -> str:
        """What `limiter.leases` and `Limiter.settle` of any process know it by; may be empty."""
        return "" if self.taken is None else self.taken.token()

    @property
    def feature(self) -> str:
        """What was asked for."""
        return self.cell.feature

    @property
    def tier(self) -> str:
        """The row of the policy that the account fell in."""
        return self.cell.tier

    @property
    def closed_until(self) -> datetime | None:
        """When the override ends that closes the feature, as it was announced.

        None where it is not closed, or until further notice. Those who wait for the same end are
        told to come back a little later, each at a time of its own: see `retry_after`.
        """
        end_us = self.cell.closed_until_us
        if self.reason != "closed" or end_us is None:
            return None
        return _EPOCH + timedelta(microseconds=end_us)

    @property
    def remaining(self) -> int | None:
        """Whole tokens in the account's tightest bucket; None where there is none or none asked."""
        if self.reason == "zero":
            return 0
        if not self.debts:
            return None
        return min(remaining(q, debt) for q, debt in zip(self.limits, self.debts, strict=True))

    @property
    def quotas(self) -> tuple[QuotaState, ...]:
        """Every quota of the cell with its bucket; empty for zero, unlimited, closed, an outage."""
        debts: Sequence[int | None] = self.debts or [None] * len(self.limits)
        return tuple(
            self._state(quota, debt) for quota, debt in zip(self.limits, debts, strict=True)
        )

    def message(self, accept_language: str | None = None, *, countdown: bool = True) -> str:
        """Return the sentence for whoever was denied, in a language they accept; "" if allowed.

        Without `countdown` ours does not say in how many seconds to try again.
        """
        return "" if self.allowed else self._message(accept_language, countdown=countdown)[1]

    def raise_if_denied(self) -> None:
        """Go on if allowed.

        Raises:
            Denied: It was not; `TieredLimitMiddleware` renders it as it renders its own denials.
        """
        if not self.allowed:
            raise Denied(self)

    def response(
        self, *, statuses: Mapping[Reason, int] | None = None, legacy_fields: bool = False
    ) -> Denial:
        """Return the answer to this denial, over HTTP or WebSocket.

        It is an ASGI application, and a Starlette response that a handler may return.

        `statuses` replaces the status of the reasons it names, `legacy_fields` adds
        `X-RateLimit-*`.

        Raises:
            UsageError: The decision is to allow.
        """
        if self.allowed:
            raise UsageError(f"{self.feature} was allowed: there is no denial to answer with")
        return Denial(self, (statuses or {}).get(self.reason, STATUSES[self.reason]), legacy_fields)

    def fields(self, *, legacy: bool = False) -> list[Field]:
        """Return the response fields that tell a client where it stands, as raw ASGI headers.

        A denial shows only the quotas that deny, so that no `t` is later than its Retry-After.
        """
        if self.allowed and self.debts and not legacy:
            return fields_of_debts(
                self.policy or policy_field(self.limits), self.limits, self.debts
            )
        shown = self.quotas
        return _fields_of(self, shown if self.allowed else _denying(shown), legacy=legacy)

    def _state(self, quota: Quota, debt: int | None) -> QuotaState:
        never_fits = self.cost > quota.capacity
        if debt is None:
            wait: int | None = None if never_fits else 0
            left, next_us = None, None
        else:
            # Where it was allowed the debts stand after charging: the cost did fit.
            wait = 0 if self.allowed else wait_us(quota, debt, self.cost)
            left, next_us = remaining(quota, debt), next_token_us(quota, debt)
        return QuotaState(
            quota.name,
            quota.capacity,
            left,
            wait is None or wait > 0,
            None if wait is None else wait / SECOND_US,
            quota.per,
            quota.window_us,
            next_us,
        )

    def _message(self, accept_language: str | None, *, countdown: bool = True) -> tuple[str, str]:
        # An outage is ours, not the policy's: what it says to denied users would mislead.
        if self.cell.messages and self.reason != "outage":
            return choose(self.cell.messages, accept_language)
        return "en", self._plain_message(self._until() if countdown else "")

    def _plain_message(self, until: str) -> str:
        feature = self.feature
        match self.reason:
            case "zero":
                return f"{feature} is not available to this account."
            case "closed":
                return f"{feature} is closed for now.{until}"
            case "outage":
                return f"{feature} cannot be served right now. Please try again in a moment."
            case "concurrency":
                return f"As many jobs of {feature} are running as may at once."
            case "pool" if self.retry_after is None and self._fits_pool():
                return f"{feature} is busy right now. Please try again in a moment."
            case "pool" if self.retry_after is not None:
                return f"{feature} is busy right now.{until}"
            case _ if self.retry_after is None:
                return f"This request costs {self.cost}, more than {feature} ever allows at once."
            case _:
                return f"The quota for {feature} is used up.{until}"

    def _fits_pool(self) -> bool:
        """Say whether the cost would fit a full pool."""
        pool = self.pool
        return pool is not None and self.cost <= pool.capacity - pool.leave

    def _until(self) -> str:
        if self.retry_after is None:
            return ""
        return f" Try again in {_spell_wait(whole_seconds(round(self.retry_after * SECOND_US)))}."


def _spell_wait(seconds: int) -> str:
    """Return seconds as people say them: from two minutes on in minutes, from a day on in hours.

    Rounded up: never a moment too early.
    """
    least = 1 if seconds < 120 else 60 if seconds < 86_400 else 3_600
    left = -(-seconds // least) * least
    told = []
    for unit, length in _UNITS:
        count, left = divmod(left, length)
        if count:
            told.append(f"{count} {unit}{'' if count == 1 else 's'}")
    return " ".join(told)


class Denial(Response):
    """Answer a denied request: problem details (RFC 9457) over HTTP, a refusal over WebSocket.

    An ASGI application, and a Starlette response that handlers may return.
    """

    media_type = "application/problem+json"

    def __init__(self, decision: Decision, status: int, legacy: bool) -> None:
        self.decision = decision
        self._retry_after: int | None = None
        if decision.retry_after is not None:
            self._retry_after = whole_seconds(round(decision.retry_after * SECOND_US))
        self._denying = _denying(decision.quotas)
        self.status_code = status
        language, body = self.document()
        super().__init__(body, status)
        self.raw_headers.append((b"cache-control", b"no-store"))
        if language:
            self.raw_headers.append((b"content-language", language.encode()))
        if self._retry_after is not None:
            self.raw_headers.append((b"retry-after", b"%d" % self._retry_after))
        if len(decision.cell.messages) > 1:
            self.raw_headers.append((b"vary", b"accept-language"))
        self.raw_headers += _fields_of(decision, self._denying, legacy=legacy)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, in a language that the request accepts."""
        if scope["type"] == "websocket" and "websocket.http.response" not in (
            scope.get("extensions") or {}
        ):
            # Closing before accepting is all that is left: servers turn it into a plain 403.
            await send({"type": "websocket.close", "code": 1008, "reason": ""})
            return
        if len(self.decision.cell.messages) > 1:
            language, body = self.document(_accept_language(scope))
            self.body: bytes = body
            self.headers["content-length"] = str(len(self.body))
            if language:
                self.headers["content-language"] = language
        await super().__call__(scope, receive, send)

    def document(self, accept_language: str | None = None) -> tuple[str, bytes]:
        """Return the language tag ("" for unsaid) and the problem document, as UTF-8 JSON."""
        decision = self.decision
        language, detail = decision._message(accept_language)  # noqa: SLF001 -- its other half
        kind, title = _PROBLEMS.get(decision.reason, _REDUCED)
        violated = [quota.name for quota in self._denying]
        violated += [one.name for one in decision.slots if one.denies and not one.pool]
        problem = {
            "type": kind,
            "title": title or _phrase(self.status_code),
            "status": self.status_code,
            "detail": detail,
            "violated-policies": [decision.feature] if decision.reason == "zero" else violated,
            "reason": decision.reason,
            "feature": decision.feature,
            "tier": decision.tier,
            "retry_after": self._retry_after,
        }
        return language, _to_json(problem).encode()


def _denying(quotas: Sequence[QuotaState]) -> list[QuotaState]:
    return [quota for quota in quotas if quota.denies]


def _fields_of(decision: Decision, shown: Sequence[QuotaState], *, legacy: bool) -> list[Field]:
    if decision.reason == "zero":
        return zero_fields([decision.feature])
    return rate_limit_fields(shown) + (legacy_fields(shown) if legacy else [])


def _accept_language(scope: Scope) -> str | None:
    headers = scope.get("headers", ())
    values = [value for name, value in headers if name.lower() == b"accept-language"]
    return b",".join(values).decode("latin-1") if values else None


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Denied"

"""What an account may still do, as JSON: so that a front end greys out a button beforehand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from tieredlimit._core.account import Account
from tieredlimit._core.rate import SECOND_US
from tieredlimit.decision import Decision
from tieredlimit.errors import Denied
from tieredlimit.identity import Identify, client_address
from tieredlimit.limiter import Limiter
from tieredlimit.opening import get_ready, lifespan, unready
from tieredlimit.request import RequestLimits, limits_in

__all__ = ["usage_app"]

_METHODS = ("GET", "HEAD")
_LONGEST_TAGS = 4_096
# What a tier may be in an outage, where nobody can say.
_ANSWERS: Mapping[str, bool | None] = {"allow": True, "deny": False, "local": None}


def usage_app(
    limiter: Limiter, identify: Identify | None = None, *, anonymous: Identify | None = None
) -> ASGIApp:
    """Return an ASGI application that shows whoever asks what is left to them, and takes nothing.

    It answers GET and HEAD at whatever path it is put, and asks as `limiter.usage` does. The answer
    is JSON, as docs/usage.md has it; it has an ETag, and names no account.

    Args:
        limiter: What decides.
        identify: Who a connection belongs to. None asks `TieredLimitMiddleware` where that is in
            front, and else takes the client for one without an account. What it raises is treated
            as the middleware does: an `HTTPException` is the answer, anything else an outage.
        anonymous: How to name a client without an account, as for the middleware.
    """
    return _Usage(limiter, identify, anonymous)


class _Usage:
    """Answer with what is left; what `usage_app` makes.

    An object, since routers take a function for an endpoint of theirs.
    """

    def __init__(
        self, limiter: Limiter, identify: Identify | None, anonymous: Identify | None
    ) -> None:
        self._limiter = limiter
        self._identify = identify
        self._anonymous = anonymous

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; open and close the limiter where this is the whole application."""
        if scope["type"] == "lifespan":
            await lifespan(self._limiter, _started, scope, receive, send)
        elif scope["type"] == "http":
            await (await self._answer(scope))(scope, receive, send)
        elif scope["type"] == "websocket":
            await WebSocketClose(1008)(scope, receive, send)

    async def _answer(self, scope: Scope) -> ASGIApp:
        if scope["method"] not in _METHODS:
            return PlainTextResponse("Method Not Allowed", 405, {"allow": ", ".join(_METHODS)})
        await get_ready(self._limiter, "usage is")
        if not self._limiter.ready:
            return unready  # switched off, there may never be one
        connection = HTTPConnection(scope)
        accept_language = connection.headers.get("accept-language")
        limits = self._limits(scope)
        try:
            account = await limits.account()
            document = await self._document(account, accept_language)
        except HTTPException as answer:
            if answer.status_code in (204, 304):
                return Response(status_code=answer.status_code, headers=answer.headers)
            return JSONResponse({"detail": answer.detail}, answer.status_code, answer.headers)
        except Denied as denied:
            return denied.decision.response()
        except Exception as exc:  # noqa: BLE001 -- our own trouble must never be a 500
            document = self._unknown(exc, accept_language)
        finally:
            if limits is not limits_in(scope, self._limiter):
                limits.end()
        return _cached(document, connection, head=scope["method"] == "HEAD")

    def _limits(self, scope: Scope) -> RequestLimits:
        """Return what knows who asks, and asks for that once."""
        limits = limits_in(scope, self._limiter) if self._identify is None else None
        if limits is not None:
            return limits
        anonymous = self._anonymous or client_address()
        return RequestLimits(self._limiter, scope, self._identify, anonymous)

    async def _document(self, account: Account, accept_language: str | None) -> dict[str, Any]:
        limiter = self._limiter
        decisions = await limiter.usage(account)
        now = limiter.backend.now()
        features = {
            name: self._shown(decision, now, accept_language)
            for name, decision in decisions.items()
        }
        tiers = {decision.tier for decision in decisions.values()}
        return {"tier": tiers.pop(), "features": features}

    def _unknown(self, error: Exception, accept_language: str | None) -> dict[str, Any]:
        """Return what there is to say where nobody knows who asks."""
        limiter = self._limiter
        decisions = {
            name: limiter.outage(name, 1, error, peek=True) for name in limiter.policy.features
        }
        features = {
            name: self._shown(decision, 0, accept_language) for name, decision in decisions.items()
        }
        return {"tier": None, "features": features}

    def _shown(self, decision: Decision, now: int, accept_language: str | None) -> dict[str, Any]:
        """Return how a feature stands, in instants: a countdown would be another one each time."""
        known = decision.reason != "outage"
        allowed: bool | None = decision.allowed
        retry_at = None
        if not known:
            feature = self._limiter.feature(decision.feature)
            allowed = None if feature is None else _ANSWERS[feature.outage]
        elif decision.retry_after is not None:
            retry_at = _instant(now + round(decision.retry_after * SECOND_US))
        debts: Sequence[int | None] = decision.debts or [None] * len(decision.limits)
        quotas = [
            {
                "name": quota.name,
                "per": quota.per,
                "capacity": quota.capacity,
                "window": quota.window_us / SECOND_US,
                "remaining": quota.remaining,
                "full_at": _instant(now + debt) if debt else None,
            }
            for quota, debt in zip(decision.quotas, debts, strict=True)
        ]
        tightest = min(
            (one for one in decision.quotas if one.remaining is not None),
            key=lambda one: one.remaining or 0,
            default=None,
        )
        zero = 0 if decision.reason == "zero" else None
        until = decision.closed_until
        return {
            "state": decision.reason if known else "unknown",
            "allowed": allowed,
            "remaining": decision.remaining,
            "capacity": zero if tightest is None else tightest.capacity,
            "retry_at": retry_at,
            "until": until and _spelled(until),
            "message": decision.message(accept_language, countdown=False) or None,
            "quotas": quotas,
            # Those of a pool are everybody's, and nobody's business.
            "slots": [
                {"name": slot.name, "limit": slot.limit, "held": slot.held}
                for slot in decision.slots
                if not slot.pool
            ],
        }


async def _started(_: Scope, receive: Receive, send: Send) -> None:
    """Have nothing to start but the limiter, where this is the whole application."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


def _cached(document: Mapping[str, Any], connection: HTTPConnection, *, head: bool) -> Response:
    """Return a document with its tag, or nothing to whoever has the same one already."""
    body = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {
        "etag": tag,
        # Kept by nobody but the browser, which asks each time whether it still holds.
        "cache-control": "private, no-cache",
        "vary": "Accept-Language, Authorization, Cookie",
    }
    given = ",".join(connection.headers.getlist("if-none-match"))[:_LONGEST_TAGS]
    tags = {one.strip().removeprefix("W/") for one in given.split(",")}
    if tag in tags or "*" in tags:
        return Response(status_code=304, headers=headers)
    answer = Response(b"" if head else body, headers=headers, media_type="application/json")
    if head:
        answer.headers["content-length"] = str(len(body))
    return answer


def _instant(us: int) -> str:
    """Spell an instant in microseconds, never an earlier one, as a whole second."""
    return _spelled(datetime.fromtimestamp(-(-us // SECOND_US), UTC))


def _spelled(instant: datetime) -> str:
    whole = instant.isoformat(timespec="seconds" if not instant.microsecond else "microseconds")
    return whole.replace("+00:00", "Z")

"""The door: every request enters here and leaves with its limits, or with a denial."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tieredlimit._core.fields import Field
from tieredlimit.decision import Decision, Reason
from tieredlimit.errors import Denied
from tieredlimit.identity import Identify, client_address
from tieredlimit.limiter import Limiter
from tieredlimit.request import STATE_KEY, RequestLimits

__all__ = ["OnDenied", "TieredLimitMiddleware"]

OnDenied = Callable[[Scope, Decision], ASGIApp | Awaitable[ASGIApp | None] | None]
"""From a denied request to the ASGI application that answers it; None for the built-in answer."""

_log = logging.getLogger("tieredlimit")


class TieredLimitMiddleware:
    """Charge each request of a metered route, and answer for the application where that is denied.

    Requests that match no feature pass untouched, as do preflights and every other kind of scope.
    Handlers find a `RequestLimits` at `request.state.tieredlimit`; a `Denied` that they raise is
    answered as the middleware's own denials are. Lifespan is forwarded, and the limiter opened and
    closed around it.

    Args:
        app: The application behind.
        limiter: What decides.
        identify: Who a connection belongs to; asked only when something is to be charged. None, or
            an identify that answers None, is an anonymous client, charged by address. It may raise
            Starlette's `HTTPException` to answer the request itself.
        anonymous: How to name an anonymous client; behind proxies, give
            `client_address(trusted_hops=…)`.
        on_denied: Returns the application that answers a denial instead of ours, or None for ours.
        statuses: Statuses of denials by reason, where they should not be the usual ones.
        legacy_fields: Whether `X-RateLimit-*` are sent as well.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limiter: Limiter,
        identify: Identify | None = None,
        anonymous: Identify | None = None,
        on_denied: OnDenied | None = None,
        statuses: Mapping[Reason, int] | None = None,
        legacy_fields: bool = False,
    ) -> None:
        self.app = app
        self.limiter = limiter
        self._identify = identify
        self._anonymous = anonymous or client_address()
        self._on_denied = on_denied
        self._statuses = statuses
        self._legacy_fields = legacy_fields

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a connection on, charge it, or answer it."""
        if scope["type"] not in ("http", "websocket"):
            if scope["type"] == "lifespan":
                await self._lifespan(scope, receive, send)
            else:
                await self.app(scope, receive, send)
            return
        if _is_preflight(scope):
            await self.app(scope, receive, send)
            return

        limits = self._limits(scope)
        matched = self.limiter.match(scope.get("method", "GET"), _route_path(scope))
        if matched is not None:
            try:
                decision = await self._decide(limits, *matched)
            except HTTPException as answer:
                await _render(answer, scope, receive, send)
                return
            if not decision.allowed:
                await self._deny(decision, scope, receive, send)
                return

        started = False

        async def send_with_limits(message: Message) -> None:
            nonlocal started
            if message["type"] in ("http.response.start", "websocket.accept"):
                started = True
                fields = limits.fields(legacy=self._legacy_fields)
                if fields:
                    message = {**message, "headers": _replace(message.get("headers", ()), fields)}
            await send(message)

        try:
            await self.app(scope, receive, send_with_limits)
        except Denied as denied:
            if started:
                raise
            await self._deny(denied.decision, scope, receive, send)

    def _limits(self, scope: Scope) -> RequestLimits:
        """Return what the request takes with; another door of the same limiter shares it."""
        state: dict[str, Any] = scope.setdefault("state", {})
        limits = state.get(STATE_KEY)
        if isinstance(limits, RequestLimits) and limits.limiter is self.limiter:
            return limits
        limits = RequestLimits(self.limiter, HTTPConnection(scope), self._identify, self._anonymous)
        state[STATE_KEY] = limits
        return limits

    async def _decide(self, limits: RequestLimits, feature: str, cost: int) -> Decision:
        decision = limits.decisions.get(feature)
        if decision is not None:
            return decision
        try:
            return await limits.take_first(feature, cost, None)
        except HTTPException:
            raise
        except Exception as exc:  # noqa: BLE001 -- our own trouble must never be a 500
            decision = limits.decisions[feature] = self.limiter.outage(feature, cost, exc)
            return decision

    async def _deny(self, decision: Decision, scope: Scope, receive: Receive, send: Send) -> None:
        answer: Any = None
        if self._on_denied is not None:
            try:
                answer = self._on_denied(scope, decision)
                if inspect.isawaitable(answer):
                    answer = await answer
            except Exception:
                _log.exception("on_denied failed; the built-in denial is sent instead")
        if answer is None:
            answer = decision.response(statuses=self._statuses, legacy_fields=self._legacy_fields)
        await answer(scope, receive, send)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_and_open() -> Message:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.limiter.open()
            return message

        async def close_and_send(message: Message) -> None:
            if message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
                await self.limiter.close()
            await send(message)

        await self.app(scope, receive_and_open, close_and_send)


def _route_path(scope: Scope) -> str:
    """Return the path that the router behind us will match: decoded, below the root path."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if not root or not path.startswith(root):
        return path
    below = path[len(root) :]
    # A root path that ends in mid-segment is none of the router's, and so none of ours.
    return below if not below or below[0] == "/" else path


def _is_preflight(scope: Scope) -> bool:
    return scope.get("method") == "OPTIONS" and any(
        name.lower() == b"access-control-request-method" for name, _ in scope["headers"]
    )


def _replace(headers: Any, fields: list[Field]) -> list[Field]:
    """Return the headers with our fields in place of the application's of the same names."""
    ours = {name for name, _ in fields}
    return [header for header in headers if header[0].lower() not in ours] + fields


async def _render(answer: HTTPException, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer as Starlette's exception middleware, which is behind us, would have."""
    offered = scope.get("extensions") or {}
    if scope["type"] == "websocket" and "websocket.http.response" not in offered:
        await send({"type": "websocket.close", "code": 1008, "reason": ""})
        return
    response = PlainTextResponse(answer.detail, answer.status_code, headers=answer.headers)
    await response(scope, receive, send)

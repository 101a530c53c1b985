"""The door: every request enters here and leaves with its limits, or with a denial."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from functools import partial
from typing import Any, cast

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from tieredlimit.answering import Answering, rendered
from tieredlimit.decision import STATUSES, Decision, Reason
from tieredlimit.ending import being_cancelled
from tieredlimit.errors import BackendError, Denied, UsageError
from tieredlimit.identity import Identify, client_address
from tieredlimit.limiter import Limiter
from tieredlimit.opening import get_ready, lifespan, unready
from tieredlimit.request import STATE_KEY, RequestLimits, is_preflight, limits_in

__all__ = ["OnDenied", "TieredLimitMiddleware"]

OnDenied = Callable[[Scope, Decision], ASGIApp | Awaitable[ASGIApp | None] | None]
"""From a denied request to the ASGI application that answers it; None for the built-in answer."""

AnyASGIApp = Callable[[Any, Any, Any], Awaitable[None]]
"""An ASGI application, in whichever framework's types."""

_MOST_WRAPPED = 32


class _UnmeteredError(Exception):
    """A newer policy does not meter the request any more."""


class TieredLimitMiddleware:
    """Charge each request of a metered route, and answer for the application where that is denied.

    Requests that match no feature pass untouched, as do preflights and every other kind of scope.
    Handlers find a `RequestLimits` at `request.state.tieredlimit`; a `Denied` that they raise, and
    what `identify` raised there to answer the request, is answered as at the middleware itself.
    Lifespan is forwarded, and the limiter opened and closed around it.

    Args:
        app: The application behind.
        limiter: What decides.
        identify: Who a connection belongs to; asked only when something is to be charged. None, or
            an identify that answers None, is an anonymous client, charged by address. It may raise
            Starlette's `HTTPException` to answer the request itself.
        anonymous: How to name an anonymous client; behind proxies, give
            `client_address(trusted_hops=…)`.
        on_denied: Returns the application that answers a denial instead of ours, with whatever
            headers that one sends, or None for ours. WebSockets that were not accepted come too.
        statuses: Statuses of denials by reason, where they should not be the usual ones.
        legacy_fields: Whether `X-RateLimit-*` are sent as well.

    Raises:
        UsageError: `statuses` names an unknown reason, or a status that is no denial.
    """

    def __init__(
        self,
        app: AnyASGIApp,
        *,
        limiter: Limiter,
        identify: Identify | None = None,
        anonymous: Identify | None = None,
        on_denied: OnDenied | None = None,
        statuses: Mapping[Reason, int] | None = None,
        legacy_fields: bool = False,
    ) -> None:
        for reason, status in (statuses or {}).items():
            if reason not in STATUSES:
                known = ", ".join(STATUSES)
                raise UsageError(f"statuses: unknown reason {reason!r:.80}; known are {known}")
            if type(status) is not int or not 400 <= status <= 599:
                raise UsageError(
                    f"statuses[{reason!r}] must be from 400 to 599, got {status!r:.80}"
                )
        self.app = app
        self.limiter = limiter
        self._root_path = _own_root_path(app)
        self._identify = identify
        self._anonymous = anonymous or client_address()
        self._on_denied = on_denied
        self._statuses = statuses
        self._legacy_fields = legacy_fields

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a connection on, charge it, or answer it."""
        if scope["type"] not in ("http", "websocket"):
            if scope["type"] == "lifespan":
                await lifespan(self.limiter, self.app, scope, receive, send)
            else:
                await self.app(scope, receive, send)
            return

        # Where another door of the same limiter has let it in, what it took counts here, too.
        limits = limits_in(scope, self.limiter) if STATE_KEY in scope else None
        first = limits is None
        if limits is None:
            limits = self._limits(scope)
        try:
            if not self.limiter.following and not await get_ready(self.limiter, "requests are"):
                await unready(scope, receive, send)
                return
            metered = self._metered(scope)
            if metered is not None and not limits.lets_in(*metered):
                answer = await self._charge(limits, scope, *metered, first=first)
                if answer is not None:
                    await answer(scope, receive, send)
                    return
            await self._run(limits, scope, receive, send)
        finally:
            if first:
                limits.end()

    async def _run(self, limits: RequestLimits, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; show its limits on the way back, and see to its end."""
        if self.limiter.refunds:
            receive = limits.see_to_end().watch(receive)
        answer = Answering(limits, scope, receive, send, self._denial, legacy=self._legacy_fields)
        try:
            await self.app(scope, receive, answer.send_with_limits)
            if limits.refusal is not None:
                await answer.refuse()
        except Exception as exc:
            if answer.started:
                raise
            if not limits.answers(exc):
                if limits.ending is not None:
                    await limits.ending.failed(exc)
                raise
            # Its status counts as any: what else was taken may be given back.
            if isinstance(exc, Denied):
                instead = await self._denial(limits, exc.decision, scope)
            else:
                instead = rendered(exc, scope)
            await instead(scope, receive, answer.send_with_limits)

    def _limits(self, scope: Scope) -> RequestLimits:
        """Return what a request takes with, where its handlers find it."""
        # The scope is the request's own. Its state need not be: Hypercorn shares one among all
        # requests of a connection, and what an earlier one has taken must not pay for this one.
        limits = RequestLimits(self.limiter, scope, self._identify, self._anonymous)
        limits.outer = scope.get(STATE_KEY)
        scope[STATE_KEY] = limits
        state: Any = scope.get("state")
        if state is None:
            scope["state"] = {STATE_KEY: limits}
        elif isinstance(state, (dict, MutableMapping)):
            if STATE_KEY in state:
                state = scope["state"] = {**state}
            state[STATE_KEY] = limits
        return limits

    def _metered(self, scope: Scope) -> tuple[str, int] | None:
        """Return the feature and the cost that a request is metered as, None if it is not."""
        limiter = self.limiter
        method = scope.get("method", "GET")
        if not limiter.enabled or (method == "OPTIONS" and is_preflight(scope)):
            return None
        root = self._root_path or scope.get("root_path")
        if not root:
            return limiter.match(method, scope["path"])
        path, outside_root = _route_path(scope["path"], root)
        metered = limiter.match(method, path, outside_root=outside_root)
        if metered is None and root in path:
            # Litestar and Quart cut the root path off in mid-segment, and anywhere.
            metered = limiter.match(method, f"/{path.split(root, 1)[1]}")
        if metered is None and "path_template" in scope:
            # Litestar has cut it off already, where we are among its own middleware.
            metered = limiter.match(method, scope["path"])
        return metered

    def _rematch(self, scope: Scope) -> tuple[str, int]:
        metered = self._metered(scope)
        if metered is None:
            raise _UnmeteredError
        return metered

    async def _charge(
        self, limits: RequestLimits, scope: Scope, feature: str, cost: int, *, first: bool
    ) -> ASGIApp | None:
        """Charge the request, and return its answer where it must not go on."""
        limits.metered = feature
        decision = limits.decisions.get(feature)
        if decision is None:
            try:
                rematch = partial(self._rematch, scope)
                if first:
                    decision = await limits.take_first(feature, cost, None, rematch)
                else:
                    decision = await limits.take_beside(feature, cost, rematch)
                limits.metered = decision.feature
            except _UnmeteredError:
                limits.metered = None
                return None
            except HTTPException as answer:
                return rendered(answer, scope)
            except Denied as denied:
                decision = denied.decision
            except Exception as exc:  # noqa: BLE001 -- our own trouble must never be a 500
                decision = limits.decisions[feature] = self.limiter.outage(feature, cost, exc)
        return None if decision.allowed else await self._denial(limits, decision, scope)

    async def _denial(self, limits: RequestLimits, decision: Decision, scope: Scope) -> ASGIApp:
        """Return the application that answers a denial."""
        limits.denied = True
        answer: Any = None
        failure: Exception | None = None
        if self._on_denied is not None:
            try:
                answer = self._on_denied(scope, decision)
                if inspect.isawaitable(answer):
                    answer = await answer
                if answer is not None and not callable(answer):
                    kind = type(answer).__name__
                    raise UsageError(f"it must return an ASGI application or None, got a {kind}")
            except asyncio.CancelledError:
                if being_cancelled():
                    raise
                failure = BackendError("what it waited for was cancelled")
            except Exception as exc:  # noqa: BLE001 -- a denial stays one, whatever goes wrong
                failure = exc
        if failure is not None:
            answer = None
            self.limiter.complaints.log("on_denied failed; the built-in answer was sent", failure)
        if answer is None:
            return decision.response(statuses=self._statuses, legacy_fields=self._legacy_fields)
        return cast(ASGIApp, answer)  # `inspect.isawaitable` tells a type checker too little


def _own_root_path(app: AnyASGIApp) -> str:
    """Return the root path that the application itself gives each request, "" where none does.

    FastAPI with a `root_path` does so, and its router then matches below it what comes with it.
    Quart's is something else, the folder of the module that it was made in.
    """
    for _ in range(_MOST_WRAPPED):
        root = getattr(app, "root_path", "")
        if root and isinstance(root, str) and not hasattr(app, "import_name"):
            return root
        app = getattr(app, "app", None)  # type: ignore[assignment]  # None has neither
    return ""


def _route_path(path: str, root: str) -> tuple[str, bool]:
    """Return the path that the router behind us will match, and whether it is outside the root.

    It is decoded, and below the root path where it begins with that.
    """
    below = path[len(root) :]
    # A root path that ends in mid-segment is none of the router's, and so none of ours.
    if path.startswith(root) and (not below or below[0] == "/"):
        return below, False
    return path, True

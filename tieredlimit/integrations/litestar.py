"""Litestar: quotas as guards, for features that are charged by handlers.

Needs `pip install "tieredlimit[litestar]"`, and `TieredLimitMiddleware` around the application. A
feature that is only ever taken here needs no `routes` in the policy.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from tieredlimit.errors import Denied
from tieredlimit.identity import Answer
from tieredlimit.integrations.endpoints import Door, feature_of, limits_of

try:
    from litestar import Request, Response
    from litestar.connection import ASGIConnection
    from litestar.exceptions import HTTPException
    from litestar.handlers import BaseRouteHandler
    from litestar.routes import HTTPRoute
except ImportError as exc:
    raise ImportError('Litestar is missing: pip install "tieredlimit[litestar]"') from exc

__all__ = ["denied", "feature_of", "limited", "limits_of"]

# Where the handlers of OPTIONS are from that Litestar adds, below the guards of what is around.
_ROUTES = HTTPRoute.__module__


def limited(
    feature: str,
    *,
    cost: int | Callable[[Any], int | Awaitable[int]] = 1,
    account: Callable[[Any], Answer] | None = None,
) -> Callable[[ASGIConnection[Any, Any, Any, Any], BaseRouteHandler], Awaitable[None]]:
    """Return a guard that charges a feature before a handler runs, or denies the request.

    Give it as `guards=[limited("video")]` to a handler, a controller, a router or the application;
    a WebSocket is charged before it is accepted, a browser's preflight only where a handler of
    yours would answer it. A feature is charged once per request: where the
    middleware or another guard has charged it, that stands.

    Args:
        feature: The feature's name.
        cost: The tokens to charge, or a function of the connection that gives them, async or not.
        account: A function of the connection that gives the account to charge, async or not. None,
            or what gives None, leaves it to the middleware's `identify`.

    Raises:
        UsageError: The cost cannot be one. When called: the middleware is missing, or the feature
            unknown.
    """
    door: Door[Any] = Door(feature, cost, account)

    async def guard(
        connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler
    ) -> None:
        own = handler.fn.__module__ == _ROUTES
        asked = door.asked(connection, connection, answers_preflights=own)
        status = await door.charge(connection, asked)
        if status is not None:
            # The middleware answers instead. Guards can but raise, and this is no error to log.
            raise HTTPException(status_code=status)

    return guard


def denied(request: Request[Any, Any, Any], exc: Denied) -> Response[None]:
    """Answer what a handler's `decision.raise_if_denied()` raised, where Litestar would answer 500.

    `Litestar(…, exception_handlers={Denied: denied})` is all that it takes.
    """
    return Response(None, status_code=limits_of(request).refuse(exc))

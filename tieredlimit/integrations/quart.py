"""Quart: quotas as a decorator of views, for features that are charged there.

Needs `pip install "tieredlimit[quart]"`, and `TieredLimitMiddleware` around `app.asgi_app`. A
feature that is only ever taken here needs no `routes` in the policy.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, TypeVar, cast

from starlette.exceptions import HTTPException

from tieredlimit.errors import Denied, UsageError
from tieredlimit.identity import Answer
from tieredlimit.integrations.endpoints import Door, feature_of, limits_of, refused

try:
    from quart import Response, current_app, has_websocket_context, request, websocket
except ImportError as exc:
    raise ImportError('Quart is missing: pip install "tieredlimit[quart]"') from exc

__all__ = ["denied", "feature_of", "limited", "limits_of"]

_View = TypeVar("_View", bound=Callable[..., Any])


def limited(
    feature: str,
    *,
    cost: int | Callable[[Any], int | Awaitable[int]] = 1,
    account: Callable[[Any], Answer] | None = None,
) -> Callable[[_View], _View]:
    """Return a decorator that charges a feature before a view runs, or denies the request.

    It goes below `@app.get(…)` and `@app.websocket(…)`, on views async or not; a WebSocket is
    charged before it is accepted. A feature is charged once per request: where the middleware or
    another decorator has charged it, that stands.

    Args:
        feature: The feature's name.
        cost: The tokens to charge, or a function of Quart's `request` that gives them, async or
            not (of `websocket` where that is one).
        account: A function of the same that gives the account to charge, async or not. None, or
            what gives None, leaves it to the middleware's `identify`.

    Raises:
        UsageError: The cost cannot be one. When called: the middleware is missing, or the feature
            unknown.
    """
    door: Door[Any] = Door(feature, cost, account)

    def decorate(view: _View) -> _View:
        if not callable(view):
            raise UsageError(f'limited("{feature}") decorates a view, got {view!r:.80}')

        @wraps(view)
        async def limited_view(*args: Any, **kwargs: Any) -> Any:
            of_websocket = has_websocket_context()
            connection = websocket if of_websocket else request
            status = await door.charge(connection, door.asked(connection, connection))
            if status is not None:
                # The middleware answers instead, as soon as Quart begins to: newer ones do not,
                # for a WebSocket's view that returns nothing before it accepts.
                return Response(status=status)
            return await current_app.ensure_async(view)(*args, **kwargs)

        return cast(_View, limited_view)  # called as it was

    return decorate


async def denied(error: Denied | HTTPException) -> Response:
    """Answer what a view's take raised, where Quart would answer 500.

    `app.register_error_handler(Denied, denied)` is for `decision.raise_if_denied()`. An `identify`
    that raises Starlette's `HTTPException`, to answer the request itself, needs the same line for
    that class; one that a view raises by itself is raised on.
    """
    connection = websocket if has_websocket_context() else request
    status = refused(connection, error)
    if status is None:
        raise error
    return Response(status=status)

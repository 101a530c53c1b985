"""Starlette: quotas as a decorator of endpoints, for features that are charged there.

Needs `TieredLimitMiddleware` on the application, and no extra. A feature that is only ever taken
here needs no `routes` in the policy.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, TypeVar, cast

from starlette.concurrency import run_in_threadpool
from starlette.endpoints import HTTPEndpoint, WebSocketEndpoint
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.websockets import WebSocket

from tieredlimit.errors import Denied, UsageError
from tieredlimit.identity import Answer
from tieredlimit.integrations.endpoints import Door, feature_of, limits_of

__all__ = ["denied", "feature_of", "limited", "limits_of"]

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])

# OPTIONS only says what there is, as a rule.
_METHODS = ("get", "head", "post", "put", "patch", "delete", "query")


def limited(
    feature: str,
    *,
    cost: int | Callable[[Any], int | Awaitable[int]] = 1,
    account: Callable[[Any], Answer] | None = None,
) -> Callable[[_Endpoint], _Endpoint]:
    """Return a decorator that charges a feature before an endpoint runs, or denies the request.

    It goes below the decorators that register the endpoint, on functions (async or not) of a
    `Request` or a `WebSocket`, on methods such as `get`, and on classes: of an `HTTPEndpoint` all
    methods are charged but `options`, a `WebSocketEndpoint` before it accepts; of those that
    inherit from it, too. A feature is charged once per request: where the middleware or another
    decorator has charged it, that stands.

    Args:
        feature: The feature's name.
        cost: The tokens to charge, or a function of the request that gives them, async or not.
        account: A function of the request that gives the account to charge, async or not. None, or
            what gives None, leaves it to the middleware's `identify`.

    Raises:
        UsageError: The cost cannot be one, or what is decorated is no endpoint. When called: the
            middleware is missing, or the feature unknown.
    """
    door: Door[Any] = Door(feature, cost, account)

    def decorate(endpoint: _Endpoint) -> _Endpoint:
        if isinstance(endpoint, type):
            return cast(_Endpoint, _limited_class(door, endpoint))  # the class itself
        return cast(_Endpoint, _limited_function(door, endpoint))  # called as it was

    return decorate


async def denied(request: Request, exc: Exception) -> Response:
    """Answer what a handler's `decision.raise_if_denied()` raised.

    `app.add_exception_handler(Denied, denied)` is needed only where the middleware is wrapped
    around the application from outside, and Starlette would answer 500 before it.
    """
    if not isinstance(exc, Denied):
        raise exc
    return Response(status_code=limits_of(request, "denied").refuse(exc))


def _limited_function(door: Door[Any], endpoint: Callable[..., Any]) -> Callable[..., Any]:
    if not callable(endpoint):
        raise UsageError(f'limited("{door.feature}") decorates an endpoint, got {endpoint!r:.80}')

    @wraps(endpoint)
    async def limited_endpoint(*args: Any, **kwargs: Any) -> Any:
        connection = _connection(door, args, kwargs)
        status = await door.charge(connection, door.asked(connection, connection))
        if status is not None:
            # The middleware answers instead; before a WebSocket is accepted, for it as well.
            return None if isinstance(connection, WebSocket) else Response(status_code=status)
        if inspect.iscoroutinefunction(endpoint):
            return await endpoint(*args, **kwargs)
        answer = await run_in_threadpool(endpoint, *args, **kwargs)
        return await answer if inspect.isawaitable(answer) else answer

    return limited_endpoint


def _limited_class(door: Door[Any], endpoint: type) -> type:
    if issubclass(endpoint, HTTPEndpoint):
        if any(hasattr(endpoint, name) for name in _METHODS):
            return _limited_methods(door, endpoint)
    elif issubclass(endpoint, WebSocketEndpoint):
        dispatch = endpoint.dispatch

        @wraps(dispatch)
        async def limited_dispatch(self: WebSocketEndpoint) -> None:
            websocket = WebSocket(self.scope, self.receive, self.send)
            if await door.charge(websocket, door.asked(websocket, websocket)) is None:
                await dispatch(self)

        # Of this class, not of the one that it may have inherited it from.
        setattr(endpoint, "dispatch", limited_dispatch)  # noqa: B010 -- mypy has methods be final
        return endpoint
    raise UsageError(
        f'limited("{door.feature}") decorates endpoints: functions, or classes of HTTPEndpoint '
        f"with a method or of WebSocketEndpoint, got the class {endpoint.__qualname__:.80}"
    )


def _limited_methods(door: Door[Any], endpoint: type[HTTPEndpoint]) -> type:
    awaited = endpoint.__await__

    @wraps(awaited)
    def limited_await(self: HTTPEndpoint) -> Any:
        # Its method is looked up only now: whichever class below this one has it, it is charged.
        name = self.scope["method"].lower()
        if name == "head" and not hasattr(self, name):
            name = "get"
        method = getattr(type(self), name, None)
        if callable(method) and name != "options" and not hasattr(HTTPEndpoint, name):
            setattr(self, name, _limited_function(door, getattr(self, name)))
        try:
            return (yield from awaited(self))
        finally:
            # It refers to the endpoint: left so, that would wait for the garbage collector.
            vars(self).pop(name, None)

    # Of this class, not of the one that it may have inherited it from.
    setattr(endpoint, "__await__", limited_await)  # noqa: B010 -- mypy has methods be final
    return endpoint


def _connection(door: Door[Any], args: Any, kwargs: Any) -> HTTPConnection:
    """Return the request among the arguments of an endpoint: the first, or the one after `self`."""
    for one in (*args[:2], *kwargs.values()):
        if isinstance(one, HTTPConnection):
            return one
    raise UsageError(
        f'limited("{door.feature}") found no request among the arguments: is it below the '
        "decorator that registers the endpoint?"
    )

"""Django under ASGI: quotas as a decorator of views, for features that are charged there.

Needs `pip install "tieredlimit[django]"`, and `TieredLimitMiddleware` around
`get_asgi_application()`. A feature that is only ever taken here needs no `routes` in the policy.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from asgiref.sync import async_to_sync, iscoroutinefunction, markcoroutinefunction

from tieredlimit.errors import UsageError
from tieredlimit.identity import Answer
from tieredlimit.integrations import endpoints
from tieredlimit.integrations.endpoints import Asked, Connection, Door, refused
from tieredlimit.request import RequestLimits

try:
    from django.http import HttpRequest, HttpResponse
    from django.views import View
except ImportError as exc:
    raise ImportError('Django is missing: pip install "tieredlimit[django]"') from exc

if TYPE_CHECKING:
    from django.http.response import HttpResponseBase

__all__ = ["DeniedMiddleware", "feature_of", "limited", "limits_of"]

_View = TypeVar("_View", bound=Callable[..., Any])


def limited(
    feature: str,
    *,
    cost: int | Callable[[Any], int | Awaitable[int]] = 1,
    account: Callable[[Any], Answer] | None = None,
) -> Callable[[_View], _View]:
    """Return a decorator that charges a feature before a view runs, or denies the request.

    For views async or not, and by Django's `method_decorator` for classes:
    `@method_decorator(limited("video"), name="dispatch")`, or on single methods. Django runs a
    function for every method, and every one is charged, a preflight too: `@require_POST` above this
    answers the others before they are. Only a class that leaves OPTIONS to Django has preflights
    for nothing. A plain view stays one, and runs in its thread; what is charged for it is asked on
    the event loop. A feature is charged once per request: where the middleware or another decorator
    has charged it, that stands.

    Args:
        feature: The feature's name.
        cost: The tokens to charge, or a function of the request that gives them, async or not.
        account: A function of the request that gives the account to charge, async or not. None, or
            what gives None, leaves it to the middleware's `identify`. Both functions are called
            where the view is: for a plain one in its thread, where they may use the database.

    Raises:
        UsageError: The cost cannot be one. When called: the middleware is missing, as it is under
            WSGI, or the feature unknown.
    """
    door: Door[Any] = Door(feature, cost, account)

    def decorate(view: _View) -> _View:
        if isinstance(view, type) or not callable(view):
            raise UsageError(
                f'limited("{feature}") decorates a view, got {view!r:.80}; for a class, write '
                '@method_decorator(limited(…), name="dispatch")'
            )

        def asked(request: Any) -> Asked | None:
            return door.asked(request, request, answers_preflights=answers_preflights)

        async def awaited(request: Any, *args: Any, **kwargs: Any) -> Any:
            status = await door.charge(_connection(request), asked(request))
            if status is not None:
                return HttpResponse(status=status)  # the middleware answers instead
            answer = view(request, *args, **kwargs)
            return await answer if inspect.isawaitable(answer) else answer

        @wraps(view)
        def limited_view(request: Any, *args: Any, **kwargs: Any) -> Any:
            if of_coroutines or _is_on_event_loop():
                # The latter is a class of async methods, whose `dispatch` is a plain one.
                return awaited(request, *args, **kwargs)
            status = async_to_sync(door.charge)(_connection(request), asked(request))
            if status is not None:
                return HttpResponse(status=status)
            return view(request, *args, **kwargs)

        answers_preflights = _leaves_options(view)
        of_coroutines = iscoroutinefunction(view)
        if of_coroutines:
            markcoroutinefunction(limited_view)
        return cast(_View, limited_view)  # called as it was

    return decorate


def feature_of(request: HttpRequest) -> str | None:
    """Return the feature that the middleware has metered a request as.

    None where it matched no route of the policy, or did not pass the middleware. What views take
    themselves is not counted.
    """
    return endpoints.feature_of(_connection(request))


def limits_of(request: HttpRequest) -> RequestLimits:
    """Return what takes for one request.

    As in `decision = await limits_of(request).take("video", cost=8)`.

    Raises:
        UsageError: The request did not pass `TieredLimitMiddleware`.
    """
    return endpoints.limits_of(_connection(request))


class DeniedMiddleware:
    """Answer what a view's take raised, where Django would answer 500.

    That is a denial, by `decision.raise_if_denied()`, and the `HTTPException` that an `identify`
    raises to answer the request itself. Name it in `MIDDLEWARE`:
    `"tieredlimit.integrations.django.DeniedMiddleware"`.
    """

    sync_capable = True
    async_capable = True

    def __init__(
        self, get_response: Callable[[HttpRequest], HttpResponseBase | Awaitable[HttpResponseBase]]
    ) -> None:
        self.get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        """Pass the request on."""
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        """Return the answer to what the middleware answers, None for any other exception."""
        status = refused(_connection(request), exception)
        return None if status is None else HttpResponse(status=status)


def _connection(request: Any) -> Connection:
    """Return what has a scope under ASGI; Django's types know of none."""
    connection: Connection = request
    return connection


def _leaves_options(view: Any) -> bool:
    """Say whether a view is a class's whose OPTIONS Django answers itself: listing its methods."""
    of_class = getattr(view, "view_class", None)  # what `as_view` made
    if of_class is None:
        dispatch = getattr(view, "func", None)  # bound, as `method_decorator` hands it on
        of_class = type(getattr(dispatch, "__self__", None))
        way = getattr(dispatch, "__func__", None)
    else:
        way = getattr(of_class, "dispatch", None)
    # One of its own may do anything.
    return way is View.dispatch and getattr(of_class, "options", None) is View.options


def _is_on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True

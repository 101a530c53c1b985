"""What the frameworks' ways of charging in an endpoint have in common.

Needs `TieredLimitMiddleware` around the application: it answers what is denied, so that a client
sees the same whichever door denied it, and adds the response fields.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, cast

from starlette.exceptions import HTTPException

from tieredlimit._core.account import Account
from tieredlimit._core.quota import MAX_AMOUNT
from tieredlimit.errors import Denied, UsageError
from tieredlimit.identity import Answer, resolve
from tieredlimit.request import STATE_KEY, RequestLimits, is_preflight

__all__ = ["Asked", "Connection", "Door", "feature_of", "limits_of", "refused"]


class _HasScope(Protocol):
    @property
    def scope(self) -> Any:
        """The ASGI scope."""
        ...


Connection: TypeAlias = _HasScope | Mapping[str, Any]
"""An ASGI scope, or whatever has one at `.scope`: the request objects of all frameworks here."""

Asked: TypeAlias = tuple[int | Awaitable[int], Answer]
"""The cost and the account that an application's functions gave, now or later."""

R = TypeVar("R")


def feature_of(connection: Connection) -> str | None:
    """Return the feature that the middleware has metered this connection as.

    None where it matched no route of the policy, or did not pass the middleware. What endpoints
    take themselves is not counted. An `identify` may ask, too: it is called after the match.

    Raises:
        UsageError: The connection has no ASGI scope, as under WSGI.
    """
    limits = _found(connection)
    return None if limits is None else limits.metered


def limits_of(connection: Connection, asker: str = "this") -> RequestLimits:
    """Return what takes for one request.

    As in `decision = await limits_of(request).take("video", cost=8)`; Starlette has the same at
    `request.state.tieredlimit`. `asker` is who the error says needs it.

    Raises:
        UsageError: The connection did not pass `TieredLimitMiddleware`, or has no ASGI scope, as
            under WSGI.
    """
    limits = _found(connection)
    if limits is None:
        raise UsageError(f"{asker} needs TieredLimitMiddleware on the application")
    return limits


def refused(connection: Connection, error: Exception) -> int | None:
    """Have the middleware answer with what an endpoint has raised, if that is an answer of ours.

    That is a denial, and what `identify` raised to answer the request. Return the status that the
    application's own answer should have, None for any other exception.

    Raises:
        UsageError: It is a denial, and the connection did not pass `TieredLimitMiddleware`.
    """
    limits = _found(connection)
    if limits is None and isinstance(error, Denied):
        limits = limits_of(connection)
    return limits.refuse(error) if limits is not None and limits.answers(error) else None


@dataclass(frozen=True, slots=True)
class Door(Generic[R]):
    """Charge a feature for what a framework calls a request, or have the middleware answer it.

    Attributes:
        feature: The feature's name.
        cost: The tokens to charge, or how to tell from the request, now or later.
        account: Who is charged, from the request, now or later; None, or an answer that is None,
            leaves it to the middleware's `identify`.
    """

    feature: str
    cost: int | Callable[[R], int | Awaitable[int]] = 1
    account: Callable[[R], Answer] | None = None

    def __post_init__(self) -> None:
        if type(self.feature) is not str:
            raise UsageError(f"limited: a feature is a string, got {self.feature!r:.80}")
        if not callable(self.cost) and not _is_cost(self.cost):
            raise UsageError(
                f'limited("{self.feature:.80}"): cost must be an integer from 0 to {MAX_AMOUNT:,}, '
                f"or a function of the request, got {self.cost!r:.80}"
            )
        if self.account is not None and not callable(self.account):
            raise UsageError(
                f'limited("{self.feature:.80}"): account must be a function of the request, '
                f"got {self.account!r:.80}"
            )

    def asked(
        self, connection: Connection, request: R, *, answers_preflights: bool = False
    ) -> Asked | None:
        """Return what the application's functions say, called here, in the thread of who asks.

        None for a browser's preflight where the framework `answers_preflights`. Elsewhere one that
        comes this far has passed whatever does so, and would run the endpoint like any request.
        """
        if answers_preflights:
            scope = _scope(connection)
            if scope.get("method") == "OPTIONS" and is_preflight(scope):
                return None
        cost = self.cost(request) if callable(self.cost) else self.cost
        return cost, None if self.account is None else self.account(request)

    async def charge(self, connection: Connection, asked: Asked | None) -> int | None:
        """Charge the feature, once in a request; return None where the request may go on.

        Else the middleware answers in place of the application, whose own answer should have the
        status that is returned.

        Raises:
            UsageError: The connection did not pass the middleware, the feature is unknown, or the
                application's functions gave what is no cost or no account.
        """
        limits = limits_of(connection, f'limited("{self.feature}")')
        if asked is None:
            return None
        cost, account = asked
        amount = await cost if inspect.isawaitable(cost) else cost
        subject = account if isinstance(account, Account) else await resolve(account)
        try:
            decision = await limits.take(self.feature, amount, account=subject)
            decision.raise_if_denied()
        except (Denied, HTTPException) as refusal:
            return limits.refuse(refusal)
        return None


def _found(connection: Connection) -> RequestLimits | None:
    limits = _scope(connection).get(STATE_KEY)
    return limits if isinstance(limits, RequestLimits) else None


def _scope(connection: Connection) -> MutableMapping[str, Any]:
    # Starlette's own connections are mappings, too, and have one all the same.
    scope: Any = getattr(connection, "scope", connection)
    if not isinstance(scope, Mapping):
        raise UsageError(
            "tieredlimit needs an ASGI scope, or a request that has one, got "
            f"{type(connection).__name__:.80}: is the application served under WSGI?"
        )
    return cast(MutableMapping[str, Any], scope)  # as all of them are


def _is_cost(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_AMOUNT

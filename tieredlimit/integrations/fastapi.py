"""FastAPI: quotas as dependencies, for applications that authenticate in dependencies.

Needs `pip install "tieredlimit[fastapi]"`, and `TieredLimitMiddleware` on the application, which
renders the denials. A feature that is only ever taken here needs no `routes` in the policy.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeAlias

from starlette.requests import HTTPConnection

from tieredlimit._core.account import Account
from tieredlimit.decision import STATUSES, Decision, Reason
from tieredlimit.identity import Answer
from tieredlimit.integrations.endpoints import feature_of, limits_of
from tieredlimit.integrations.starlette import denied
from tieredlimit.limiter import Limiter

try:
    from fastapi import Depends, FastAPI, routing
except ImportError as exc:  # pragma: no cover -- the tests have FastAPI
    raise ImportError('FastAPI is missing: pip install "tieredlimit[fastapi]"') from exc

__all__ = ["denied", "document_denials", "feature_of", "limited", "limits_of"]

_Dependency: TypeAlias = Callable[
    ..., Answer | Iterator[Account | None] | AsyncIterator[Account | None]
]
"""What FastAPI takes a value from: a function, async or not, or one that yields it."""

_FEATURE = "tieredlimit_feature"
_PROBLEM = "TieredLimitProblem"


def limited(
    feature: str, *, account: _Dependency | None = None, cost: int = 1
) -> Callable[..., Awaitable[Decision]]:
    """Return a dependency that charges a feature, or denies the request.

    Use it as `Depends(limited("video", account=current_account))`. `account` is a dependency of
    yours that returns an `Account`, or None for a client without one; without it, the middleware's
    `identify` is asked. The dependency's value is the `Decision`. A feature is charged once per
    request: where the middleware or another dependency has charged it, that decision stands.

    Raises:
        Denied: When called, if the request is denied; the middleware renders it.
        UsageError: When called, without the middleware or with an unknown feature.
    """

    async def charge(connection: HTTPConnection, subject: Account | None) -> Decision:
        limits = limits_of(connection, f'limited("{feature}")')
        decision = await limits.take(feature, cost, account=subject)
        decision.raise_if_denied()
        return decision

    if account is None:

        async def dependency(connection: HTTPConnection) -> Decision:
            return await charge(connection, None)

    else:

        async def dependency(  # type: ignore[misc]  # FastAPI reads the parameters of either
            connection: HTTPConnection,
            subject: Account | None = Depends(account),  # noqa: B008 -- how FastAPI is told
        ) -> Decision:
            return await charge(connection, subject)

    setattr(dependency, _FEATURE, feature)
    return dependency


def document_denials(app: FastAPI, limiter: Limiter | None = None) -> None:
    """Let the application's OpenAPI document show the denials of every limited operation.

    These are the operations with a `limited` dependency and, where a limiter is given, those that
    its policy meters by route; a stored one does once it was loaded.
    """
    original = app.openapi

    def openapi() -> dict[str, Any]:
        document = original()
        for path, method, features in _operations(app):
            operation = document.get("paths", {}).get(path, {}).get(method.lower())
            matched = limiter is not None and limiter.ready and limiter.match(method, path)
            if operation is not None and (features or matched):
                _describe(operation)
                schemas = document.setdefault("components", {}).setdefault("schemas", {})
                schemas.setdefault(_PROBLEM, _SCHEMA)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # how FastAPI's guide extends it


def _operations(app: FastAPI) -> Iterator[tuple[str, str, list[str]]]:
    """Yield path, method and limited features of each operation, those of routers included."""
    # Newer versions keep included routers nested, and bring the walk through them.
    walk: Callable[[Any], Any] = getattr(routing, "iter_route_contexts", iter)
    for route in walk(app.routes):
        dependant = getattr(route, "dependant", None)
        if dependant is not None:
            features = list(_features(dependant))
            for method in sorted(route.methods or ()):
                yield route.path_format, method, features


def _features(dependant: Any) -> Iterator[str]:
    for below in dependant.dependencies:
        feature = getattr(below.call, _FEATURE, None)
        if feature is not None:
            yield feature
        yield from _features(below)


def _describe(operation: dict[str, Any]) -> None:
    content = {"application/problem+json": {"schema": {"$ref": f"#/components/schemas/{_PROBLEM}"}}}
    responses = operation.setdefault("responses", {})
    for reason, description in _DENIALS.items():
        denial = {"description": description, "headers": _HEADERS, "content": content}
        responses.setdefault(str(STATUSES[reason]), denial)


_DENIALS: dict[Reason, str] = {
    "quota": "The quota is used up, all slots are taken, or all accounts together ask for too "
    "much; try again after Retry-After.",
    "zero": "The feature is not open to this account.",
    "outage": "The feature cannot be served at the moment; try again after Retry-After.",
}

_HEADERS = {
    "Retry-After": {
        "description": "Seconds until this request fits; absent where no time is known.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "RateLimit": {
        "description": "The quotas that deny: r tokens left, t seconds until the next.",
        "schema": {"type": "string"},
    },
    "RateLimit-Policy": {
        "description": "These quotas: q tokens in a full bucket, w seconds from empty to full.",
        "schema": {"type": "string"},
    },
}

_SCHEMA = {
    "title": "Denial",
    "description": "Problem details (RFC 9457) of a denied request.",
    "type": "object",
    "required": ["type", "title", "status", "detail", "reason", "feature", "tier"],
    "properties": {
        "type": {"type": "string", "format": "uri-reference"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "The sentence for the user."},
        "violated-policies": {"type": "array", "items": {"type": "string"}},
        "reason": {"type": "string", "enum": list(STATUSES)},
        "feature": {"type": "string"},
        "tier": {"type": "string"},
        "retry_after": {"type": ["integer", "null"]},
    },
}

"""The media API as the demonstration serves it: a crowd of accounts, and an operator's door."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from examples.demo_load import CROWD
from examples.media_api import ACCOUNTS, LONG_AGO, NOW, app, limiter
from tieredlimit import Account, UsageError

ACCOUNTS.update(
    (f"key-{tier}-{number}", Account(f"{tier}-{number}", plan=plan, created_at=created_at))
    for tier, plan, created_at in (
        ("new", "free", NOW - timedelta(days=2)),
        ("free", "free", LONG_AGO),
        ("pro", "pro", LONG_AGO),
    )
    for number in range(CROWD[tier])
)


async def operate(request: Request) -> Response:
    """Do what the operator asks for: the body is what `limiter.control`'s function takes.

    An application of yours would ask who that is; this one listens on the loopback interface only.
    """
    functions: dict[str, Any] = {
        "close": limiter.control.close,
        "open": limiter.control.open,
    }
    try:
        change = await functions[request.path_params["verb"]](**await request.json())
    except UsageError as exc:
        return JSONResponse({"detail": str(exc)}, status_code=400)
    return JSONResponse({"revision": change.revision.number, "change": change.revision.change})


async def follows(request: Request) -> Response:  # noqa: ARG001 -- a handler
    """Tell which revision this process follows."""
    return JSONResponse({"revision": limiter.revision[0]})


app.router.routes.append(Route("/operator/{verb}", operate, methods=["POST"]))
app.router.routes.append(Route("/operator", follows, methods=["GET"]))

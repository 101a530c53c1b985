"""The application of the end-to-end benchmark, in a process of its own.

    python -m benchmarks.served KIND QUOTAS PORT REDIS_URL

KIND is bare, tieredlimit or slowapi. One uvicorn worker with httptools and uvloop.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from benchmarks.peers import LIMIT
from benchmarks.policies import POLICY, TIMEOUT
from tieredlimit import Account, Limiter, TieredLimitMiddleware
from tieredlimit.backends import RedisBackend

PATHS = {1: "/v1/images", 2: "/v1/videos"}
"""The path that is metered with so many quotas."""


def main() -> None:
    """Serve until killed."""
    kind, quotas, port, url = sys.argv[1:]
    uvicorn.run(
        application(kind, int(quotas), url),
        host="127.0.0.1",
        port=int(port),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )


def application(kind: str, quotas: int, url: str) -> Starlette:
    """Return the application, limited or not."""
    app = Starlette(routes=[Route(path, _answer, methods=["POST"]) for path in PATHS.values()])
    if kind == "tieredlimit":
        limiter = Limiter(POLICY, RedisBackend.from_url(url, timeout=TIMEOUT))
        app.add_middleware(TieredLimitMiddleware, limiter=limiter, identify=_identify)
    elif kind == "slowapi":
        limits = [f"{LIMIT}/minute", f"{LIMIT}/day"][:quotas]
        slowapi: Any = import_module("slowapi")
        middleware: Any = import_module("slowapi.middleware").SlowAPIASGIMiddleware
        app.state.limiter = slowapi.Limiter(
            key_func=lambda request: request.headers["x-account"],
            default_limits=limits,
            headers_enabled=True,
            storage_uri=url,
        )
        app.add_middleware(middleware)
    return app


async def _answer(request: Request) -> JSONResponse:  # noqa: ARG001 -- an endpoint
    return JSONResponse({"ok": True})


def _identify(conn: HTTPConnection) -> Account | None:
    account = conn.headers.get("x-account")
    return Account(account, plan="free") if account else None


if __name__ == "__main__":
    main()

"""What the servers of tests/test_conformance.py serve: an application behind limits in a Redis.

CONFORMANCE_REDIS, _NAMESPACE and _LOG say where it decides, and where it tells that it was opened
and closed; CONFORMANCE_MARK is what it answers with, so that no other server is taken for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from tieredlimit import Account, Limiter, TieredLimitMiddleware
from tieredlimit.backends import RedisBackend

PATIENT = 10.0
PLAIN = "/plain"
"""Where WebSockets are served as by a server without the extension for denials."""

JOBS = ["POST /stream/{id}", "POST /endless", "POST /wait"]
POLICY = {
    "features": {
        "image": {"routes": ["POST /images"], "outage": "deny"},
        "page": {"routes": ["GET /page"], "outage": "deny"},
        "upload": {"routes": ["POST /uploads"], "outage": "deny"},
        "job": {"routes": JOBS, "outage": "deny"},
        "zero": {"routes": ["POST /zero", "GET /ws/zero", f"GET {PLAIN}/zero"]},
        "socket": {"routes": ["GET /ws", f"GET {PLAIN}"], "outage": "deny"},
    },
    "tiers": {
        "all": {
            "quotas": {
                "image": "2/day",
                "page": "2/day",
                "upload": "1/day",
                "job": {"rate": "1000/day", "concurrency": 1, "lease": "10 minutes"},
                "zero": 0,
                "socket": "1/day",
            }
        }
    },
}

_gates: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)


class Told(Limiter):
    """Write down when it is opened and closed."""

    async def open(self) -> None:
        await super().open()
        _tell("open")

    async def close(self) -> None:
        await super().close()
        _tell("close")


class Outermost:
    """Say which process answers, and hide what a server offers where that is asked for."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and scope["path"].startswith(PLAIN):
            scope = {**scope, "extensions": {}}

        async def send_with_pid(message: Message) -> None:
            if message["type"] == "http.response.start":
                pid = (b"x-pid", b"%d" % os.getpid())
                message = {**message, "headers": [*message.get("headers", ()), pid]}
            await send(message)

        await self.app(scope, receive, send_with_pid)


async def about(request: Request) -> Response:
    """Tell what the server made of a request, and what the limits knew before it."""
    return JSONResponse({**_told(request), "mark": os.environ["CONFORMANCE_MARK"]})


async def upload(request: Request) -> Response:
    digest = hashlib.sha256()
    async for chunk in request.stream():
        digest.update(chunk)
    return PlainTextResponse(digest.hexdigest())


async def stream(request: Request) -> Response:
    """Send a part, and the rest once somebody says so at `/go`."""

    async def parts() -> AsyncIterator[bytes]:
        yield b"first"
        await _gates[request.path_params["id"]].wait()
        yield b"last"

    return StreamingResponse(parts())


async def go(request: Request) -> Response:
    _gates[request.path_params["id"]].set()
    return Response(status_code=204)


async def endless(request: Request) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 1000
            await asyncio.sleep(0.001)

    return StreamingResponse(parts())


async def wait(request: Request) -> Response:
    """Answer nothing until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    return Response()


async def talk(websocket: WebSocket) -> None:
    await websocket.accept(headers=[(b"x-own", b"1")])
    await websocket.send_json(_told(websocket))
    await websocket.close()


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[dict[str, bool]]:
    yield {"lifespan": True}


def identify(connection: HTTPConnection) -> Account | None:
    name = connection.headers.get("x-account")
    return Account(name) if name else None


def _told(connection: HTTPConnection) -> dict[str, Any]:
    scope = connection.scope
    return {
        "http": scope.get("http_version"),
        "scheme": scope.get("scheme"),  # Daphne leaves it out of WebSockets
        "client": scope["client"],
        "extensions": sorted(scope.get("extensions") or {}),
        "lifespan": getattr(connection.state, "lifespan", False),
        "decided": sorted(connection.state.tieredlimit.decisions),
        "loop": type(asyncio.get_running_loop()).__module__.partition(".")[0],
    }


def _tell(word: str) -> None:
    with Path(os.environ["CONFORMANCE_LOG"]).open("a", encoding="utf-8") as log:
        log.write(f"{word} {os.getpid()}\n")


app = Starlette(
    routes=[
        Route("/about", about),
        Route("/images", about, methods=["POST"]),
        Route("/page", about),
        Route("/zero", about, methods=["POST"]),
        Route("/uploads", upload, methods=["POST"]),
        Route("/stream/{id}", stream, methods=["POST"]),
        Route("/go/{id}", go, methods=["POST"]),
        Route("/endless", endless, methods=["POST"]),
        Route("/wait", wait, methods=["POST"]),
        *(WebSocketRoute(f"{at}{end}", talk) for at in ("/ws", PLAIN) for end in ("", "/zero")),
        WebSocketRoute("/about", talk),
    ],
    middleware=[
        Middleware(Outermost),
        Middleware(
            TieredLimitMiddleware,
            limiter=Told(
                POLICY,
                RedisBackend.from_url(os.environ["CONFORMANCE_REDIS"], timeout=PATIENT),
                namespace=os.environ["CONFORMANCE_NAMESPACE"],
            ),
            identify=identify,
        ),
    ],
    lifespan=lifespan,
)

"""Litestar: the types of guards that charge."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, assert_type

from litestar import Controller, Litestar, Request, Response, WebSocket, get, post, websocket
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from tieredlimit import Account, Decision, Denied
from tieredlimit.integrations.litestar import denied, feature_of, limited, limits_of
from tieredlimit.request import RequestLimits

AnyConnection = ASGIConnection[Any, Any, Any, Any]


def price(connection: AnyConnection) -> int:
    return int(connection.query_params["seconds"])


async def payer(request: Request[Any, Any, Any]) -> Account | None:
    return Account(request.headers["x-user"])


guard = limited("video", cost=price, account=payer)
assert_type(guard, Callable[[AnyConnection, BaseRouteHandler], Awaitable[None]])


@post("/videos", guards=[guard])
async def create_video(request: Request[Any, Any, Any]) -> int | None:
    assert_type(feature_of(request), str | None)
    assert_type(limits_of(request), RequestLimits)
    decision = await limits_of(request).take("image", 2)
    assert_type(decision, Decision)
    return decision.remaining


@get("/images", guards=[limited("image", cost=lambda connection: len(connection.headers))])
async def show_image() -> None: ...


@websocket("/watch", guards=[limited("video", cost=2)])
async def watch(socket: WebSocket[Any, Any, Any]) -> None:
    assert_type(feature_of(socket), str | None)
    await socket.accept()


class Videos(Controller):
    guards = [limited("video")]  # noqa: RUF012 -- as Litestar has it


def handled(request: Request[Any, Any, Any], denial: Denied) -> Response[None]:
    return denied(request, denial)


app = Litestar(
    [create_video, show_image, watch, Videos],
    guards=[limited("request")],
    exception_handlers={Denied: denied},
)

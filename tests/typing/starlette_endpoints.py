"""Starlette: the types of limited endpoints."""

from __future__ import annotations

from typing import assert_type

from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint, WebSocketEndpoint
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from tieredlimit import Account, Decision, Denied, Reservation
from tieredlimit.integrations.starlette import denied, feature_of, limited, limits_of
from tieredlimit.request import RequestLimits


def price(request: Request) -> int:
    return int(request.query_params["seconds"])


async def price_later(socket: WebSocket) -> int:
    return len(socket.path_params)


async def payer(connection: HTTPConnection) -> Account | None:
    return Account(connection.headers["x-user"])


@limited("video", cost=price, account=payer)
async def create_video(request: Request) -> PlainTextResponse:
    assert_type(feature_of(request), str | None)
    limits = limits_of(request, "create_video")
    assert_type(limits, RequestLimits)
    assert_type(await limits.take("image", 2), Decision)
    assert_type(await limits.reserve("video", 30), Reservation)
    assert_type(await limits.account(), Account)
    assert_type(limits.decisions, dict[str, Decision])
    assert_type(limits.metered, str | None)
    return PlainTextResponse("made")


@limited("image", cost=2, account=lambda request: Account(request.headers["x-user"]))
def show_image(request: Request) -> Response:
    return Response(feature_of(request.scope))


@limited("video", cost=price_later)
async def watch(websocket: WebSocket) -> None:
    assert_type(limits_of(websocket), RequestLimits)
    await websocket.accept()


@limited("video")
class Videos(HTTPEndpoint):
    async def get(self, request: Request) -> Response:
        return Response(request.url.path)

    @limited("image")
    def post(self, request: Request) -> Response:
        return Response(request.url.path)


@limited("video")
class Watching(WebSocketEndpoint):
    encoding = "text"


async def called(request: Request, websocket: WebSocket, videos: Videos) -> None:
    # What is decorated is as it was.
    assert_type(await create_video(request), PlainTextResponse)
    assert_type(show_image(request), Response)
    assert_type(await watch(websocket), None)
    assert_type(Videos, type[Videos])
    assert_type(videos.post(request), Response)
    assert_type(await denied(request, Denied(await limits_of(request).take("video"))), Response)
    show_image("no request")  # type: ignore[arg-type]
    limited("video", cost="much")  # type: ignore[arg-type]
    limited("video")("no endpoint")  # type: ignore[type-var]


app = Starlette(
    routes=[
        Route("/videos", create_video, methods=["POST"]),
        Route("/images", limited("image")(show_image)),
        Route("/all", Videos),
        WebSocketRoute("/watch", watch),
        WebSocketRoute("/watching", Watching),
    ],
    exception_handlers={Denied: denied},
)
app.add_exception_handler(Denied, denied)

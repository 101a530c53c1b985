"""Starlette behind the middleware, and the decorator of its endpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.endpoints import HTTPEndpoint, WebSocketEndpoint
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, Router, WebSocketRoute
from starlette.websockets import WebSocket

from tests.framework_contract import (
    DONE,
    GATE,
    POLICY,
    WORD,
    WebSocketContract,
    ask,
    connect,
    hold,
    identify,
    payer,
    price,
)
from tieredlimit import Account, Denied, Limiter, TieredLimitMiddleware, UsageError
from tieredlimit.integrations.starlette import denied, feature_of, limited, limits_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp


async def metered(request: Request) -> Response:
    return JSONResponse({"feature": feature_of(request)})


@limited("image")
async def both(request: Request) -> Response:
    (await limits_of(request).take("image")).raise_if_denied()
    return await metered(request)


@limited("image")
async def limited_endpoint(request: Request) -> Response:
    return await metered(request)


@limited("image")
def limited_sync(request: Request) -> Response:
    return JSONResponse({"feature": feature_of(request)})


@limited("image")
class Limited(HTTPEndpoint):
    async def post(self, request: Request) -> Response:
        return await metered(request)


async def taken(request: Request) -> Response:
    (await request.state.tieredlimit.take("image")).raise_if_denied()
    return await metered(request)


@limited("video", cost=price, account=payer)
async def costly(request: Request) -> Response:
    return JSONResponse({"left": limits_of(request).decisions["video"].remaining})


@limited("video", cost=price, account=payer)
def costly_sync(request: Request) -> Response:
    return JSONResponse({"left": limits_of(request).decisions["video"].remaining})


async def crash(request: Request) -> Response:
    raise RuntimeError("crash")


async def stream(request: Request) -> Response:
    return StreamingResponse(hold([b"first", b"last"]))


async def background(request: Request) -> Response:
    async def work() -> None:
        await GATE.get().wait()
        DONE.get().set()

    return Response(background=BackgroundTask(work))


async def free(request: Request) -> Response:
    return JSONResponse({"feature": feature_of(request.scope), "word": WORD.get()})


async def socket(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text("hello")
    await websocket.close()


ROUTES = [
    Route("/images", metered, methods=["POST"]),
    Route("/images/{id}", metered),
    Route("/both", both, methods=["POST"]),
    Route("/limited", limited_endpoint, methods=["POST"]),
    Route("/options", limited_endpoint, methods=["OPTIONS"]),
    Route("/limited-sync", limited_sync, methods=["POST"]),
    Route("/class", Limited),
    Route("/taken", taken, methods=["POST"]),
    Route("/costly", costly, methods=["POST"]),
    Route("/costly-sync", costly_sync, methods=["POST"]),
    Route("/crash", crash, methods=["POST"]),
    Route("/stream", stream),
    Route("/background", background, methods=["POST"]),
    Route("/free", free),
    Route("/free-crash", crash),
    Mount("/api", app=Router([Route("/images", metered, methods=["POST"])])),
    Mount("/mounted", app=Starlette(routes=[Route("/pictures", metered, methods=["POST"])])),
    WebSocketRoute("/socket", socket),
    WebSocketRoute("/limited-socket", limited("image")(socket)),
]


def starlette(limiter: Limiter, *routes: Any, **options: Any) -> Starlette:
    middleware = [Middleware(TieredLimitMiddleware, limiter=limiter, **options)]
    return Starlette(routes=routes, middleware=middleware)


class TestStarlette(WebSocketContract):
    def build(self, limiter: Limiter, **options: Any) -> ASGIApp:
        return starlette(limiter, *ROUTES, **options)


class TestStarletteWrappedFromOutside(WebSocketContract):
    def build(self, limiter: Limiter, **options: Any) -> ASGIApp:
        app = Starlette(routes=ROUTES)
        app.add_exception_handler(Denied, denied)
        return TieredLimitMiddleware(app, limiter=limiter, **options)


async def test_every_method_of_a_limited_class_is_charged_but_options() -> None:
    @limited("image")
    class Endpoint(HTTPEndpoint):
        async def get(self, request: Request) -> Response:
            return Response()

        def put(self, request: Request) -> Response:
            return Response()

        async def options(self, request: Request) -> Response:
            return Response()

    async with Limiter(POLICY) as limiter:
        app = starlette(limiter, Route("/", Endpoint))

        made = [
            (await ask(app, f"{method} /")).status
            for method in ("OPTIONS", "DELETE", "HEAD", "PUT", "OPTIONS", "GET", "PUT", "DELETE")
        ]

    assert made == [200, 405, 200, 200, 200, 429, 429, 405]


async def test_limited_class_leaves_the_one_it_inherits_from_as_it_was() -> None:
    class Endpoint(HTTPEndpoint):
        async def get(self, request: Request) -> Response:
            return Response()

    @limited("image")
    class Dear(Endpoint):
        pass

    async with Limiter(POLICY) as limiter:
        app = starlette(limiter, Route("/", Endpoint), Route("/dear", Dear))

        made = [(await ask(app, f"GET {path}")).status for path in ("/", "/", "/", "/dear")]
        answer = await ask(app, "GET /dear")

    assert made == [200, 200, 200, 200]
    assert answer.headers["ratelimit"].startswith('"image-hour";r=0;')


async def test_methods_of_classes_that_inherit_from_a_limited_one_are_charged() -> None:
    @limited("image")
    class Endpoint(HTTPEndpoint):
        async def post(self, request: Request) -> Response:
            return Response("base")

    class Above(Endpoint):
        async def post(self, request: Request) -> Response:
            return Response("above")

        def put(self, request: Request) -> Response:
            return Response("put")

    class Around(Above):
        async def dispatch(self) -> None:
            response = await self.post(Request(self.scope, self.receive))
            await response(self.scope, self.receive, self.send)

    async with Limiter(POLICY) as limiter:
        routes = Route("/", Endpoint), Route("/above", Above), Route("/around", Around)
        app = starlette(limiter, *routes, identify=identify)

        lines = {
            "ada": ("POST /above", "POST /", "POST /above"),
            "bob": ("PUT /above", "PUT /above", "PUT /above"),
            "cyd": ("POST /around", "POST /around", "POST /around"),
        }
        made = {
            who: [await ask(app, line, x_who=who) for line in asked] for who, asked in lines.items()
        }

    answered = {who: [one.body for one in answers[:2]] for who, answers in made.items()}
    assert answered == {"ada": [b"above", b"base"], "bob": [b"put"] * 2, "cyd": [b"above"] * 2}
    assert [answers[2].status for answers in made.values()] == [429] * 3


async def test_body_that_tells_the_cost_can_be_read_again_by_the_endpoint() -> None:
    async def length(request: Request) -> int:
        return len(await request.body())

    @limited("video", cost=length)
    class Endpoint(HTTPEndpoint):
        async def post(self, request: Request) -> Response:
            return Response(await request.body())

    async with Limiter(POLICY) as limiter:
        app = starlette(limiter, Route("/", Endpoint))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            first = await client.post("/", content=b"12345")
            second = await client.post("/", content=b"1234")

    assert (first.content, first.headers["ratelimit"][:18]) == (b"12345", '"video-hour";r=3;t')
    assert second.status_code == 429


@pytest.mark.parametrize("extension", [False, True])
async def test_websocket_class_is_denied_before_it_accepts(extension: bool) -> None:
    @limited("image")
    class Endpoint(WebSocketEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.accept()
            await websocket.close()

    async with Limiter(POLICY) as limiter:
        app = starlette(limiter, WebSocketRoute("/", Endpoint))

        made = [
            (await connect(app, "/", extension=extension)).messages[0]["type"] for _ in range(3)
        ]

    denied = "websocket.http.response.start" if extension else "websocket.close"
    assert made == ["websocket.accept", "websocket.accept", denied]


async def test_denial_after_a_websocket_was_accepted_is_the_endpoints_own_affair() -> None:
    async def late(websocket: WebSocket) -> None:
        await websocket.accept()
        await limited("video")(socket_body)(websocket)
        await websocket.close(4429)

    async def socket_body(websocket: WebSocket) -> None:
        raise AssertionError("it was let in")

    policy = {**POLICY, "tiers": {"all": {"quotas": {"image": "2/hour", "video": 0}}}}
    policy["order"] = ["all"]
    async with Limiter(policy) as limiter:
        answer = await connect(starlette(limiter, WebSocketRoute("/", late)), "/")

    kinds = [(message["type"], message.get("code")) for message in answer.messages]
    assert kinds == [("websocket.accept", None), ("websocket.close", 4429)]


@pytest.mark.parametrize(
    "given",
    [{"cost": -1}, {"cost": 1.5}, {"cost": True}, {"cost": 10**9 + 1}, {"account": Account("u")}],
    ids=str,
)
def test_argument_that_cannot_be_is_refused_where_it_is_written(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r'limited\("video"\): (cost|account) must be'):
        limited("video", **given)


def test_feature_that_is_no_string_is_refused_where_it_is_written() -> None:
    with pytest.raises(UsageError, match="a feature is a string, got 7"):
        limited(7)  # type: ignore[arg-type]  # the fault under test


class NoEndpoint:
    pass


class NoMethods(HTTPEndpoint):
    pass


@pytest.mark.parametrize("wrong", [NoEndpoint, NoMethods, "endpoint", None])
def test_what_is_no_endpoint_is_refused_where_it_is_decorated(wrong: Any) -> None:
    with pytest.raises(UsageError, match="decorates"):
        limited("video")(wrong)


async def test_endpoint_without_a_request_is_told_what_is_wrong() -> None:
    @limited("video")
    async def endpoint() -> None: ...

    with pytest.raises(UsageError, match="found no request among the arguments"):
        await endpoint()


@pytest.mark.parametrize("path", ["/limited", "/limited-sync", "/class"])
async def test_without_the_middleware_the_error_says_what_is_missing(path: str) -> None:
    with pytest.raises(UsageError, match=r'limited\("image"\) needs TieredLimitMiddleware'):
        await ask(Starlette(routes=ROUTES), f"POST {path}")


async def test_account_function_that_gives_something_else_is_told_so() -> None:
    @limited("video", account=lambda _: "u1")  # type: ignore[arg-type, return-value]  # the fault under test
    async def endpoint(request: Request) -> Response:
        return Response()

    async with Limiter(POLICY) as limiter:
        with pytest.raises(UsageError, match="got a value of type str"):
            await ask(starlette(limiter, Route("/", endpoint)), "GET /")


async def test_identify_knows_the_feature_that_it_is_asked_for() -> None:
    asked: list[str | None] = []

    def by_feature(conn: HTTPConnection) -> Account:
        asked.append(feature_of(conn))
        return Account("u1")

    async with Limiter(POLICY) as limiter:
        app = starlette(limiter, *ROUTES, identify=by_feature)
        await ask(app, "POST /images")
        await ask(app, "POST /limited")

    assert asked == ["image", None]


async def test_feature_of_what_did_not_pass_the_middleware_is_none() -> None:
    assert feature_of({"type": "http"}) is None
    assert feature_of(HTTPConnection({"type": "http", "headers": []})) is None


async def test_refusal_stays_where_two_middlewares_of_one_limiter_are_passed() -> None:
    async with Limiter(POLICY) as limiter:
        inner = TieredLimitMiddleware(Starlette(routes=ROUTES), limiter=limiter)
        app = TieredLimitMiddleware(inner, limiter=limiter, identify=identify)

        answer = await ask(app, "POST /limited", x_who="mallory")

    assert [message["type"] for message in answer.messages] == [
        "http.response.start",
        "http.response.body",
    ]
    assert (answer.status, answer.json["reason"]) == (403, "zero")


async def test_denial_that_a_handler_for_it_takes_for_another_is_raised() -> None:
    with pytest.raises(LookupError):
        await denied(Request({"type": "http"}), LookupError())

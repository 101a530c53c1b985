"""Litestar behind the middleware, and the guard for its handlers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from litestar import (
    Controller,
    HttpMethod,
    Litestar,
    Request,
    Response,
    Router,
    WebSocket,
    asgi,
    get,
    post,
    route,
)
from litestar import websocket as websocket_handler
from litestar.background_tasks import BackgroundTask
from litestar.middleware import DefineMiddleware
from litestar.response import Stream

from tests.framework_contract import (
    DONE,
    GATE,
    POLICY,
    PREFLIGHT,
    WORD,
    WebSocketContract,
    ask,
    call,
    hold,
    identify,
    payer,
    price,
)
from tests.serving import serve
from tests.test_quart import status_of
from tieredlimit import Denied, Limiter, TieredLimitMiddleware
from tieredlimit.integrations.litestar import denied, feature_of, limited, limits_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp

AnyRequest = Request[Any, Any, Any]
AnyWebSocket = WebSocket[Any, Any, Any]


@post("/images", status_code=200)
async def image(request: AnyRequest) -> dict[str, Any]:
    return {"feature": feature_of(request)}


@get("/images/{id:str}")
async def variation(request: AnyRequest) -> dict[str, Any]:
    return {"feature": feature_of(request)}


@post("/both", status_code=200, guards=[limited("image")])
async def both(request: AnyRequest) -> dict[str, Any]:
    (await limits_of(request).take("image")).raise_if_denied()
    return {"feature": feature_of(request)}


@post("/limited", status_code=200, guards=[limited("image")])
async def limited_handler(request: AnyRequest) -> dict[str, Any]:
    return {"feature": feature_of(request)}


@route("/options", http_method=[HttpMethod.OPTIONS], status_code=200, guards=[limited("image")])
async def options(request: AnyRequest) -> dict[str, Any]:
    return {"feature": feature_of(request)}


@post("/limited-sync", status_code=200, guards=[limited("image")], sync_to_thread=True)
def limited_sync(request: AnyRequest) -> dict[str, Any]:
    return {"feature": feature_of(request)}


class Limited(Controller):
    path = "/class"
    guards = [limited("image")]  # noqa: RUF012 -- as Litestar's guide does

    @post(status_code=200)
    async def make(self, request: AnyRequest) -> dict[str, Any]:
        return {"feature": feature_of(request)}


@post("/taken", status_code=200)
async def taken(request: AnyRequest) -> dict[str, Any]:
    (await request.state.tieredlimit.take("image")).raise_if_denied()
    return {"feature": feature_of(request)}


@post("/costly", status_code=200, guards=[limited("video", cost=price, account=payer)])
async def costly(request: AnyRequest) -> dict[str, Any]:
    return {"left": limits_of(request).decisions["video"].remaining}


@post(
    "/costly-sync",
    status_code=200,
    guards=[limited("video", cost=price, account=payer)],
    sync_to_thread=True,
)
def costly_sync(request: AnyRequest) -> dict[str, Any]:
    return {"left": limits_of(request).decisions["video"].remaining}


@post("/crash", status_code=200)
async def crash() -> None:
    raise RuntimeError("crash")


@get("/free-crash")
async def free_crash() -> None:
    raise RuntimeError("crash")


@get("/stream")
async def stream() -> Stream:
    return Stream(hold([b"first", b"last"]))


@post("/background", status_code=200)
async def background() -> Response[str]:
    async def work() -> None:
        await GATE.get().wait()
        DONE.get().set()

    return Response("", background=BackgroundTask(work))


@get("/free")
async def free(request: AnyRequest) -> dict[str, Any]:
    return {"feature": feature_of(request), "word": WORD.get()}


@websocket_handler("/socket")
async def socket(socket: AnyWebSocket) -> None:
    await socket.accept()
    await socket.send_text("hello")
    await socket.close()


@websocket_handler("/limited-socket", guards=[limited("image")])
async def limited_socket(socket: AnyWebSocket) -> None:
    await socket.accept()
    await socket.send_text("hello")
    await socket.close()


@post("/pictures", status_code=200)
async def picture(request: AnyRequest) -> dict[str, Any]:
    return {"feature": feature_of(request)}


BELOW = Litestar([picture], openapi_config=None)


@asgi("/mounted", is_mount=True, copy_scope=True)
async def mounted(scope: Any, receive: Any, send: Any) -> None:
    await BELOW(scope, receive, send)


HANDLERS: list[Any] = [
    *(image, variation, both, limited_handler, limited_sync, Limited, taken, costly, costly_sync),
    *(options, crash, free_crash, stream, background, free, socket, limited_socket, mounted),
    Router("/api", route_handlers=[image]),
]


def litestar(*handlers: Any, **options: Any) -> Any:
    return Litestar(
        handlers or HANDLERS,
        exception_handlers={Denied: denied},
        openapi_config=None,
        **options,
    )


class TestLitestar(WebSocketContract):
    stranger = b'{"status_code":401,"detail":"who are you?"}'

    def build(self, limiter: Limiter, **options: Any) -> ASGIApp:
        return TieredLimitMiddleware(litestar(), limiter=limiter, **options)

    def meters(self, path: str) -> bool:
        # A mount takes whatever begins with its path: the rest need not begin with a slash.
        return path != "/mountedpictures"

    async def test_guard_of_a_mount_meters_what_begins_with_its_path(
        self, limiter: Limiter
    ) -> None:
        @asgi("/mounted", is_mount=True, copy_scope=True, guards=[limited("image")])
        async def guarded(scope: Any, receive: Any, send: Any) -> None:
            await BELOW(scope, receive, send)

        app = TieredLimitMiddleware(litestar(guarded), limiter=limiter)

        made = [(await ask(app, "POST /mountedpictures")).status for _ in range(3)]

        assert made == [200, 200, 429]


class TestLitestarsOwnMiddleware(WebSocketContract):
    """What holds where the middleware stands in Litestar's own list, behind its router."""

    stranger = TestLitestar.stranger

    def build(self, limiter: Limiter, **options: Any) -> ASGIApp:
        around: Any = TieredLimitMiddleware
        app: ASGIApp = litestar(middleware=[DefineMiddleware(around, limiter=limiter, **options)])
        return app

    def meters(self, path: str) -> bool:
        return "mounted" not in path  # what is mounted is seen below its mount

    async def test_path_parameter_is_matched_and_head_is_charged_as_get(self, app: ASGIApp) -> None:
        made = [(await ask(app, "GET /images/7", x_who="ada")).status for _ in range(3)]
        head = await ask(app, "HEAD /images/7", x_who="bob")

        assert made == [200, 200, 429]
        assert head.status == 405  # said by the router, before any middleware

    @pytest.mark.parametrize("path", ["/api/images"])
    async def test_included_routers_and_mounts_are_metered(self, app: ASGIApp, path: str) -> None:
        await super().test_included_routers_and_mounts_are_metered(app, path)


async def test_root_path_that_the_router_has_cut_off_is_not_cut_off_again() -> None:
    async with Limiter(POLICY) as limiter:
        around: Any = TieredLimitMiddleware
        app = litestar(middleware=[DefineMiddleware(around, limiter=limiter)])

        made = [
            (await call(app, "POST", "/images/images", root_path="/images")).status
            for _ in range(3)
        ]

    assert made == [200, 200, 429]


@pytest.mark.parametrize("at", ["handler", "controller", "router", "application"])
async def test_guard_charges_once_wherever_it_is_given(at: str) -> None:
    guards: dict[str, Any] = {"guards": [limited("image")]}

    class Images(Controller):
        path = "/made"

        @post(status_code=200, **guards)
        async def make(self) -> None: ...

    if at != "handler":
        Images.guards = [limited("image")]
    routes: Any = Router("/", route_handlers=[Images], **guards) if at == "router" else Images
    async with Limiter(POLICY) as limiter:
        options = guards if at == "application" else {}
        app = TieredLimitMiddleware(litestar(routes, **options), limiter=limiter)

        made = [(await ask(app, "POST /made")).status for _ in range(3)]

    assert made == [200, 200, 429]


async def test_preflight_that_litestar_answers_is_charged_by_no_guard_around_it() -> None:
    @post("/made", status_code=200)
    async def make() -> None: ...

    async with Limiter(POLICY) as limiter:
        app = TieredLimitMiddleware(litestar(make, guards=[limited("image")]), limiter=limiter)

        asked = [(await ask(app, "OPTIONS /made", **PREFLIGHT)).status for _ in range(3)]
        made = [(await ask(app, "POST /made")).status for _ in range(3)]

    assert asked == [204] * 3
    assert made == [200, 200, 429]


async def test_denial_by_a_guard_is_no_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with Limiter(POLICY) as limiter:
        app = TieredLimitMiddleware(litestar(), limiter=limiter, identify=identify)

        denied = await ask(app, "POST /limited", x_who="mallory")

    assert denied.status == 403
    assert caplog.records == []


async def test_without_the_middleware_the_error_says_what_is_missing() -> None:
    told: list[str] = []

    async def after_exception(exc: Exception, _: Any) -> None:
        told.append(str(exc))

    app = litestar(after_exception=[after_exception])

    answer = await ask(app, "POST /limited")

    assert answer.status == 500
    assert told == ['limited("image") needs TieredLimitMiddleware on the application']


async def test_target_without_a_slash_that_a_real_server_passes_on_is_metered() -> None:
    app = TieredLimitMiddleware(litestar(), limiter=Limiter(POLICY))

    with serve(app, http="h11") as url:
        made = [await status_of(url, "POST images HTTP/1.1") for _ in range(3)]

    assert made == [200, 200, 429]

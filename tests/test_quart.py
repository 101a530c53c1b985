"""Quart behind the middleware, and the decorator of its views."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from quart import Blueprint, Quart, Response, request, websocket
from quart.typing import ResponseReturnValue
from starlette.exceptions import HTTPException

from tests.framework_contract import (
    DONE,
    GATE,
    POLICY,
    WORD,
    WebSocketContract,
    ask,
    call,
    hold,
    identify,
    payer,
    price,
)
from tests.mounting import mounted
from tests.serving import serve
from tieredlimit import Denied, Limiter, TieredLimitMiddleware, UsageError
from tieredlimit.integrations.quart import denied, feature_of, limited, limits_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp


async def image() -> ResponseReturnValue:
    return {"feature": feature_of(request)}


def charged_in_views() -> Blueprint:
    app = Blueprint("charged", __name__)

    @app.post("/both")
    @limited("image")
    async def both() -> ResponseReturnValue:
        (await limits_of(request).take("image")).raise_if_denied()
        return {"feature": feature_of(request)}

    @app.route("/options", methods=["OPTIONS"])
    @app.post("/limited")
    @limited("image")
    async def limited_view() -> ResponseReturnValue:
        return {"feature": feature_of(request)}

    @app.post("/limited-sync")
    @limited("image")
    def limited_sync() -> ResponseReturnValue:
        return {"feature": feature_of(request)}

    @app.post("/class")
    @limited("image")
    async def again() -> ResponseReturnValue:
        return {"feature": feature_of(request)}

    @app.post("/taken")
    async def taken() -> ResponseReturnValue:
        (await limits_of(request).take("image")).raise_if_denied()
        return {"feature": feature_of(request)}

    @app.post("/costly")
    @limited("video", cost=price, account=payer)
    async def costly() -> ResponseReturnValue:
        return {"left": limits_of(request).decisions["video"].remaining}

    @app.post("/costly-sync")
    @limited("video", cost=price, account=payer)
    def costly_sync() -> ResponseReturnValue:
        return {"left": limits_of(request).decisions["video"].remaining}

    return app


def quart() -> Quart:
    """Return the whole application, but for what is mounted below it."""
    app = Quart(__name__)
    app.register_error_handler(Denied, denied)
    app.register_error_handler(HTTPException, denied)
    app.register_blueprint(charged_in_views())
    included = Blueprint("api", __name__, url_prefix="/api")
    included.add_url_rule("/images", view_func=image, methods=["POST"])
    app.register_blueprint(included)
    app.add_url_rule("/images", view_func=image, methods=["POST"])

    @app.get("/images/<id>")
    async def variation(id: str) -> ResponseReturnValue:  # noqa: A002 -- as templates say
        return {"feature": feature_of(request)}

    @app.post("/crash")
    @app.get("/free-crash")
    async def crash() -> ResponseReturnValue:
        raise RuntimeError("crash")

    @app.get("/stream")
    async def stream() -> ResponseReturnValue:
        return Response(hold([b"first", b"last"]))

    @app.post("/background")
    async def background() -> ResponseReturnValue:
        async def work() -> None:
            await GATE.get().wait()
            DONE.get().set()

        app.add_background_task(work)
        return ""

    @app.get("/free")
    async def free() -> ResponseReturnValue:
        return {"feature": feature_of(request), "word": WORD.get()}

    @app.websocket("/socket")
    async def socket() -> None:
        await websocket.accept()
        await websocket.send("hello")

    @app.websocket("/limited-socket")
    @limited("image")
    async def limited_socket() -> None:
        await websocket.accept()
        await websocket.send("hello")

    return app


def quart_with_mount() -> Quart:
    app, below = quart(), Quart(__name__)

    @below.post("/pictures")
    async def picture() -> ResponseReturnValue:
        return {"feature": feature_of(request)}

    app.asgi_app = mounted(app.asgi_app, "/mounted", below.asgi_app)  # type: ignore[method-assign, assignment]  # as Quart's guide does
    return app


class TestQuart(WebSocketContract):
    def build(self, limiter: Limiter, **options: Any) -> ASGIApp:
        app = quart_with_mount()
        app.asgi_app = TieredLimitMiddleware(app.asgi_app, limiter=limiter, **options)  # type: ignore[method-assign, assignment]  # as Quart's guide does
        return app  # type: ignore[return-value]  # Hypercorn's types say the same


class TestQuartWrappedFromOutside(WebSocketContract):
    def build(self, limiter: Limiter, **options: Any) -> ASGIApp:
        return TieredLimitMiddleware(quart_with_mount(), limiter=limiter, **options)


async def test_folder_of_a_quart_application_is_no_root_path() -> None:
    async with Limiter(POLICY) as limiter:
        app: Any = TieredLimitMiddleware(quart(), limiter=limiter)

        made = [
            (await call(app, "POST", "/root/images", root_path="/root")).status for _ in range(3)
        ]

    assert made == [200, 200, 429]


async def test_denial_in_a_view_keeps_what_the_application_gives_every_answer() -> None:
    async with Limiter(POLICY) as limiter:
        app = quart()
        app.secret_key = "secret"

        @app.after_request
        async def after(response: Response) -> Response:
            seen.append(response.status_code)
            response.headers["x-around"] = "yes"
            return response

        seen: list[int] = []
        wrapped: Any = TieredLimitMiddleware(app, limiter=limiter, identify=identify)
        denied = await ask(wrapped, "POST /limited", x_who="mallory")

    assert (denied.status, denied.headers["x-around"]) == (403, "yes")
    assert denied.headers["content-type"] == "application/problem+json"
    assert seen == [403]


async def test_http_exception_of_a_views_own_stays_what_quart_makes_of_it() -> None:
    app = quart()

    @app.post("/own")
    async def own() -> ResponseReturnValue:
        await limits_of(request).take("video")
        raise HTTPException(401, "of the view")

    async with Limiter(POLICY) as limiter:
        answer = await ask(TieredLimitMiddleware(app, limiter=limiter), "POST /own")

    assert (answer.status, b"of the view" in answer.body) == (500, False)


async def test_without_the_middleware_the_error_says_what_is_missing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app: Any = quart()

    answer = await ask(app, "POST /limited")

    assert answer.status == 500
    assert 'limited("image") needs TieredLimitMiddleware' in caplog.text


def test_what_is_no_view_is_refused_where_it_is_decorated() -> None:
    wrong: Any = "view"

    with pytest.raises(UsageError, match="decorates a view"):
        limited("image")(wrong)


@pytest.mark.parametrize("target", ["images", "http://test/images", "http://test/images;x=1"])
async def test_odd_targets_that_a_real_server_passes_on_are_metered(target: str) -> None:
    limiter = Limiter(POLICY)
    app: Any = TieredLimitMiddleware(quart(), limiter=limiter)

    with serve(app, http="h11") as url:
        made = [await status_of(url, f"POST {target} HTTP/1.1") for _ in range(3)]

    assert made == [200, 200, 429]


async def status_of(url: str, line: str) -> int:
    """Send a request line as it is, and return the status of the answer."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(f"{line}\r\nhost: test\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return int(answer.split(b" ", 2)[1])

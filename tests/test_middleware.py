"""The door: what every request meets, and what the application behind never notices."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import json
import re
import threading
import weakref
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI
from fastapi import HTTPException as FastAPIHTTPException
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, Router, WebSocketRoute
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from tests.servers import Monitor
from tests.serving import serve
from tests.test_limiter import PATIENT, Broken, Clock, Spy
from tests.test_settling import push
from tieredlimit import Account, Decision, Denied, Limiter, TieredLimitMiddleware, UsageError
from tieredlimit.backends import MemoryBackend, RedisBackend
from tieredlimit.identity import blocking
from tieredlimit.integrations.endpoints import limits_of
from tieredlimit.integrations.starlette import limited
from tieredlimit.limiter import Complaints
from tieredlimit.request import RequestLimits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
    from contextlib import AbstractAsyncContextManager

    from starlette.requests import HTTPConnection
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from starlette.websockets import WebSocket

ANN = Account("ann", plan="free")


def policy(quota: object = "2/hour", **features: Any) -> dict[str, Any]:
    """Meter images, with the quota given, and what `features` names: feature = (routes, quota)."""
    features = {"image": (["POST /images", "GET /images/{id}", "GET /ws"], quota), **features}
    return {
        "features": {
            name: {"routes": routes, "outage": "deny" if name == "video" else "allow"}
            for name, (routes, _) in features.items()
        },
        "tiers": {"everyone": {"quotas": {name: cell for name, (_, cell) in features.items()}}},
    }


def limiter_of(*arguments: Any, **features: Any) -> Limiter:
    return Limiter(policy(*arguments, **features), MemoryBackend(clock=Clock()))


def identify(connection: HTTPConnection) -> Account | None:
    key = connection.headers.get("x-key")
    return Account(key) if key else None


async def ok(request: Request) -> PlainTextResponse:
    return PlainTextResponse("done")


def behind(limiter: Limiter, app: ASGIApp, **options: Any) -> TieredLimitMiddleware:
    return TieredLimitMiddleware(app, limiter=limiter, **options)


def starlette(limiter: Limiter, *routes: Any, **options: Any) -> Starlette:
    options.setdefault("identify", identify)
    middleware = [Middleware(TieredLimitMiddleware, limiter=limiter, **options)]
    return Starlette(
        routes=routes or [Route("/images", ok, methods=["POST"])], middleware=middleware
    )


def client_of(app: ASGIApp) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def statuses(app: ASGIApp, *requests: tuple[str, str], **options: Any) -> list[int]:
    async with client_of(app) as client:
        return [(await client.request(*line, **options)).status_code for line in requests]


async def run(app: ASGIApp, **scope: Any) -> list[Message]:
    """Call an application with a plain scope; return what it sent."""
    sent: list[Message] = []
    received: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Message:
        if not received:
            await asyncio.Event().wait()  # the client stays, and has nothing more to say
        return received.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    base = {"type": "http", "method": "POST", "path": "/images", "headers": [], "query_string": b""}
    await app({**base, "client": ("192.0.2.1", 1), **scope}, receive, send)
    return sent


def fields_of(message: Message) -> dict[str, str]:
    names = [name.lower() for name, _ in message["headers"]]
    ours = [name for name in names if b"ratelimit" in name]
    assert len(ours) == len(set(ours))
    return {name.decode().lower(): value.decode() for name, value in message["headers"]}


async def plain(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})


CallNext: TypeAlias = "Callable[[Request], Awaitable[Response]]"


class Recorder:
    """Keep the scopes that reach the application."""

    def __init__(self, app: ASGIApp = plain) -> None:
        self.app = app
        self.scopes: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        await self.app(scope, receive, send)


@pytest.mark.fault("E1")
class TestWhereItHolds:
    async def test_direct_included_and_mounted_routes(self) -> None:
        limiter = limiter_of(deep=(["POST /v1/deep/{id}", "POST /inner/leaf"], "1/hour"))
        included = Router([Route("/deep/{id}", ok, methods=["POST"])])
        mounted = Starlette(routes=[Route("/leaf", ok, methods=["POST"])])
        app = starlette(
            limiter,
            Route("/images", ok, methods=["POST"]),
            Mount("/v1", app=included),
            Mount("/inner", app=mounted),
        )

        assert await statuses(app, *[("POST", "/images")] * 3) == [200, 200, 429]
        assert await statuses(app, ("POST", "/v1/deep/1"), ("POST", "/inner/leaf")) == [200, 429]

    async def test_routes_that_fastapi_includes(self) -> None:
        async def get_image(id: str) -> str:  # noqa: A002 -- the policy's word
            return id

        router = APIRouter(prefix="/images")
        router.add_api_route("/{id}", get_image, methods=["GET"])
        app = FastAPI()
        app.include_router(router)
        app.add_middleware(TieredLimitMiddleware, limiter=limiter_of())

        assert await statuses(app, *[("GET", f"/images/{i}") for i in range(3)]) == [200, 200, 429]

    async def test_paths_are_below_the_root_path(self) -> None:
        app = behind(limiter_of(), plain)

        async def status(path: str, root: str) -> int:
            status: int = (await run(app, path=path, root_path=root))[0]["status"]
            return status

        assert [await status("/api/images", "/api") for _ in range(3)] == [200, 200, 429]
        assert await status("/images", "/api") == 429
        assert await status("/api/images", "") == 200
        assert await status("/images", "/images") == 200
        assert await status("/images/images", "/images") == 429

    @pytest.mark.parametrize(
        ("path", "root"),
        [
            ("/apiimages", "/api"),
            ("/api/images", "/api/"),
            ("/x/api/images", "/api"),
            ("/x/apiimages", "/api"),
            ("images", ""),
            ("http://test/images", ""),
        ],
    )
    async def test_path_that_only_some_routers_serve_is_metered(self, path: str, root: str) -> None:
        app = behind(limiter_of(), plain)

        made = [(await run(app, path=path, root_path=root))[0]["status"] for _ in range(3)]

        assert made == [200, 200, 429]

    async def test_inside_a_mount_paths_are_below_the_mount(self) -> None:
        inner = behind(limiter_of(), Starlette(routes=[Route("/images", ok, methods=["POST"])]))
        app = Starlette(routes=[Mount("/api", app=inner)])

        assert await statuses(app, *[("POST", "/api/images")] * 3) == [200, 200, 429]

    async def test_head_is_charged_as_get(self) -> None:
        app = starlette(limiter_of(), Route("/images/{id}", ok))

        assert await statuses(app, *[("HEAD", "/images/1")] * 3) == [200, 200, 429]
        assert await statuses(app, ("GET", "/images/1")) == [429]

    async def test_a_star_covers_methods_not_yet_invented(self) -> None:
        app = behind(limiter_of(any=(["* /any"], "1/hour")), plain)

        assert await statuses(app, ("FROB", "/any"), ("frob", "/any")) == [200, 429]

    async def test_a_404_of_a_matched_template_is_charged(self) -> None:
        app = starlette(limiter_of(), Route("/other", ok))

        assert await statuses(app, *[("GET", "/images/7")] * 3) == [404, 404, 429]

    @pytest.mark.fault("C5")
    async def test_path_parameters_never_split_a_bucket(self) -> None:
        app = starlette(limiter_of(), Route("/images/{id}", ok))

        assert await statuses(app, *[("GET", f"/images/{i}") for i in range(9)]) == [
            200, 200, *[429] * 7,
        ]  # fmt: skip

    @pytest.mark.fault("E4")
    async def test_what_no_route_matches_never_touches_the_backend(self) -> None:
        spy = Spy()
        asked: list[HTTPConnection] = []
        app = behind(Limiter(policy(), spy), plain, identify=lambda c: asked.append(c))

        assert await statuses(app, ("GET", "/health"), ("GET", "/images"), ("PUT", "/images")) == [
            200, 200, 200,
        ]  # fmt: skip
        assert spy.takes == []
        assert asked == []

    @pytest.mark.parametrize("kind", ["future", "lifespan2", "webtransport"])
    async def test_other_scopes_pass_untouched(self, kind: str) -> None:
        app = Recorder()
        scope = {"type": kind}
        marks: list[Message] = []

        async def receive() -> Message:
            return {"type": "x"}

        async def send(message: Message) -> None:
            marks.append(message)

        seen: list[object] = []

        async def inner(scope: Scope, receive: Receive, send: Send) -> None:
            seen.extend([scope, receive, send])

        await behind(limiter_of(), inner)(scope, receive, send)

        assert seen[0] is scope
        assert seen[1:] == [receive, send]
        assert scope == {"type": kind}
        assert app.scopes == []


@pytest.mark.fault("E10")
class TestSpellings:
    @pytest.mark.parametrize("http", ["h11", "httptools"])
    def test_no_spelling_that_the_router_accepts_is_free(self, http: str) -> None:
        served: list[str] = []

        async def handler(request: Request) -> PlainTextResponse:
            served.append(request.scope["path"])
            return PlainTextResponse("done")

        routes = [
            Route("/v1/images", handler, methods=["POST"]),
            Route("/v1/images/{id}", handler, methods=["POST"]),
            Route("/v1/files/{rest:path}", handler, methods=["POST"]),
        ]
        metered = [f"POST {route.path}" for route in routes]
        spy = Spy()
        app = starlette(Limiter(policy(all=(metered, "1000/hour")), spy), *routes)
        spellings = [
            "/v1/images", "/v1/images/", "/v1//images", "//v1/images", "/v1/%69mages",
            "/v1/images%2F", "/v1%2Fimages", "/v1/images%0A", "/v1/images/%0A", "/v1/images/a%2Fb",
            "/v1/images/%2e%2e", "/v1/images/../images", "/v1/./images", "/V1/images",
            "/v1/images;x=1", "/v1/images?x=/v1", "/v1/images//", "/v1/images/1/",
            "/v1/files/", "/v1/files//", "/v1/files/a//b", "/v1/files/%2F", "/v1/files/a%0Ab",
            "/v1/images/1%0A", "/v1/images%00", "/v1/images%20", "/v1/images/%C3%A9",
            "/v1/images/%FF", "http://other/v1/images", "/v1/images#x",
        ]  # fmt: skip

        with serve(app, http=http) as url:
            host, port = httpx.URL(url).host, httpx.URL(url).port
            for spelling in spellings:
                before = len(spy.takes)
                ran = len(served)
                asyncio.run(_raw(host, port or 0, spelling))
                if len(served) > ran:
                    assert len(spy.takes) > before, spelling

        assert len(served) > len(spellings) // 3


async def _raw(host: str, port: int, target: str) -> bytes:
    """Send a request target as it stands, and return the answer."""
    reader, writer = await asyncio.open_connection(host, port)
    line = f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    writer.write(line.encode("latin-1"))
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


class Witness:
    """Be seen alive, or not."""


@limited("video")
async def limited_ok(request: Request) -> PlainTextResponse:
    return PlainTextResponse("done")


VIDEOS = Route("/videos", limited_ok, methods=["POST"])


class TestAfterTheRequest:
    @pytest.mark.parametrize("path", ["/images", "/health"])
    async def test_nothing_of_a_request_waits_for_the_garbage_collector(self, path: str) -> None:
        app = behind(limiter_of(), JSONResponse({}), identify=lambda _: ANN)

        assert not await self._waits_for_the_collector(app, path)

    @pytest.mark.parametrize("later", [False, True])
    @pytest.mark.parametrize("error", [ValueError, HTTPException])
    @pytest.mark.parametrize("path", ["/images", "/videos"])
    async def test_nor_does_one_whose_identify_fails(
        self, later: bool, error: type[Exception], path: str
    ) -> None:
        def fail(connection: HTTPConnection) -> Account:
            raise error(401) if error is HTTPException else error

        async def fail_later(connection: HTTPConnection) -> Account:
            await asyncio.sleep(0)
            return fail(connection)

        limiter = limiter_of(video=([], "5/hour"))
        app = behind(limiter, Router([VIDEOS]), identify=fail_later if later else fail)

        assert not await self._waits_for_the_collector(app, path)

    async def test_nor_does_one_that_an_endpoint_denies(self) -> None:
        app = behind(limiter_of(video=([], 0)), Router([VIDEOS]), identify=lambda _: ANN)

        assert not await self._waits_for_the_collector(app, "/videos")

    async def _waits_for_the_collector(self, app: ASGIApp, path: str) -> bool:
        """Say whether what a request refers to is there after it, and the next turn of the loop."""
        witness = Witness()
        seen = weakref.ref(witness)
        gc.disable()
        try:
            await run(app, path=path, witness=witness)
            del witness
            await asyncio.sleep(0)
            return seen() is not None
        finally:
            gc.enable()

    @pytest.mark.parametrize("known", [True, False])
    async def test_task_that_outlives_its_request_takes_for_its_account(self, known: bool) -> None:
        limiter = limiter_of(video=([], "5/hour"))
        taken: list[asyncio.Task[Decision]] = []
        over = asyncio.Event()

        async def late(limits: RequestLimits) -> Decision:
            await over.wait()
            return await limits.take("video")

        async def start(request: Request) -> PlainTextResponse:
            limits = request.state.tieredlimit
            if known:
                await limits.take("image")
            taken.append(asyncio.create_task(late(limits)))
            return PlainTextResponse("started")

        app = starlette(limiter, Route("/start", start))
        async with client_of(app) as client:
            await client.get("/start", headers={"x-key": "ann"})
        over.set()

        assert (await taken[0]).remaining == 4
        assert (await limiter.peek(Account("ann"), "video")).remaining == 4


@pytest.mark.fault("E2")
class TestStreams:
    async def test_a_stream_starts_once_and_keeps_its_bytes(self) -> None:
        chunks = [b"one", b"\x00" * 5000, b"", b"three"]

        async def stream(scope: Scope, receive: Receive, send: Send) -> None:
            await StreamingResponse(_each(chunks))(scope, receive, send)

        sent = await run(behind(limiter_of(), stream))
        bare = await run(stream)

        assert [message["type"] for message in sent].count("http.response.start") == 1
        assert sent[1:] == bare[1:]
        assert fields_of(sent[0])["ratelimit"] == '"image-hour";r=1;t=1800'

    async def test_everything_but_the_start_passes_as_the_very_object(self) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": [], "trailers": True}
        others: list[Message] = [
            {"type": "http.response.debug", "info": {}},
            {"type": "http.response.early_hint", "links": [b"</a>"]},
            start,
            {"type": "http.response.pathsend", "path": "/tmp/x"},
            {"type": "http.response.zerocopysend", "file": 3},
            {"type": "http.response.body", "body": b"x", "more_body": True},
            {"type": "http.response.trailers", "headers": [(b"x", b"y")]},
        ]

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            for message in others:
                await send(message)

        sent = await run(behind(limiter_of(), app))

        for message, original in zip(sent, others, strict=True):
            assert (message is original) is (original is not start)
        assert sent[2]["trailers"] is True
        assert start["headers"] == []

    async def test_a_start_without_headers_gets_some(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 204})

        (start,) = await run(behind(limiter_of(), app))

        assert "ratelimit" in fields_of(start)

    async def test_the_application_reads_the_servers_own_receive(self) -> None:
        seen: list[Receive] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(receive)
            assert (await receive())["type"] == "http.disconnect"

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None: ...

        await behind(limiter_of(), app)({"type": "http", "method": "POST", "path": "/images",
                                         "headers": [], "client": None}, receive, send)  # fmt: skip

        assert seen == [receive]

    def test_a_client_that_leaves_in_mid_stream_leaves_no_mess(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        gone = threading.Event()

        async def endless(request: Request) -> StreamingResponse:
            async def chunks() -> AsyncIterator[bytes]:
                try:
                    while True:
                        yield b"x" * 1000
                        await asyncio.sleep(0)
                finally:
                    gone.set()

            return StreamingResponse(chunks())

        app = starlette(limiter_of(), Route("/images", endless, methods=["POST"]))
        with serve(app) as url:
            with httpx.stream("POST", f"{url}/images") as response:
                assert next(response.iter_raw())
            assert gone.wait(10)
            assert httpx.get(f"{url}/other").status_code == 404

        assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def _each(chunks: list[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


@pytest.mark.fault("E3")
class TestBehindUs:
    async def test_base_http_middleware_background_tasks_and_context_variables_work(self) -> None:
        variable = contextvars.ContextVar("variable", default="unset")
        done: list[str] = []

        async def outer(request: Request, call_next: CallNext) -> Response:
            variable.set("from outside")
            response = await call_next(request)
            assert request.state.left_by_handler == "seen"
            return response

        async def handler(request: Request) -> StreamingResponse:
            request.state.left_by_handler = "seen"
            task = BackgroundTask(lambda: done.append(variable.get()))
            return StreamingResponse(_each([variable.get().encode(), b"!"]), background=task)

        limits = Middleware(TieredLimitMiddleware, limiter=limiter_of())
        for middleware in ([Middleware(BaseHTTPMiddleware, dispatch=outer), limits],
                           [limits, Middleware(BaseHTTPMiddleware, dispatch=outer)]):  # fmt: skip
            app = Starlette(
                routes=[Route("/images", handler, methods=["POST"])], middleware=middleware
            )
            async with client_of(app) as client:
                response = await client.post("/images")

            assert response.text == "from outside!"
            assert "ratelimit" in response.headers
        assert done == ["from outside", "from outside"]

    async def test_a_context_variable_set_inside_is_seen_outside(self) -> None:
        variable = contextvars.ContextVar("variable", default="unset")

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            variable.set("inside")
            await plain(scope, receive, send)

        await run(behind(limiter_of(), app))

        assert variable.get() == "inside"

    async def test_an_error_of_the_application_is_its_own(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            raise RuntimeError("its own")

        with pytest.raises(RuntimeError, match="its own"):
            await run(behind(limiter_of(), app))


def broken_identify(connection: HTTPConnection) -> Account | None:
    raise LookupError("the user table is locked")


async def identify_of_something_cancelled(connection: HTTPConnection) -> Account:
    shared: asyncio.Future[Account] = asyncio.get_running_loop().create_future()
    shared.cancel()
    return await shared


async def broken_identify_later(connection: HTTPConnection) -> Account | None:
    raise LookupError("the user table is locked")


def wrong_identify(connection: HTTPConnection) -> Any:
    return "ann"


def empty_identify(connection: HTTPConnection) -> Account | None:
    return Account("")


def unstorable_identify(connection: HTTPConnection) -> Account | None:
    return Account("\udcff")


@pytest.mark.fault("E4")
class TestTrouble:
    async def test_a_backend_that_fails_is_the_outage_answer_and_no_500(self) -> None:
        backend = Broken()
        app = behind(Limiter(policy(video=(["POST /videos"], "1/hour")), backend), plain)

        async with client_of(app) as client:
            image = await client.post("/images")
            video = await client.post("/videos")
            health = await client.get("/health")

        assert (image.status_code, video.status_code, health.status_code) == (200, 503, 200)
        assert "ratelimit" not in image.headers
        assert "retry-after" not in image.headers
        assert 1 <= int(video.headers["retry-after"]) <= 5
        assert len(backend.takes) == 2

    @pytest.mark.parametrize(
        "failing",
        [broken_identify, broken_identify_later, identify_of_something_cancelled],
    )
    async def test_an_identify_that_fails_is_the_outage_answer(self, failing: Any) -> None:
        limiter = limiter_of(video=(["POST /videos"], "1/hour"))
        app = behind(limiter, plain, identify=failing)

        assert await statuses(app, ("POST", "/images"), ("POST", "/videos")) == [200, 503]

    @pytest.mark.parametrize(
        "exception",
        [
            {"account": "u7"},
            {"when": {"plan": "pro"}},
            {"everyone": True, "percent": 10},
        ],
        ids=["an account", "a plan", "a share"],
    )
    async def test_what_is_open_to_some_stays_closed_where_nobody_knows_who_asks(
        self, exception: dict[str, Any]
    ) -> None:
        limiter = limiter_of()
        await limiter.control.close("image", everyone=True)
        await limiter.control.open("image", **exception)
        app = behind(limiter, plain, identify=broken_identify)

        assert await statuses(app, ("POST", "/images")) == [403]

    async def test_what_is_closed_to_some_gets_the_outage_answer_where_nobody_knows_who_asks(
        self,
    ) -> None:
        limiter = limiter_of()
        await limiter.control.close("image", account="u7")
        app = behind(limiter, plain, identify=broken_identify)

        assert await statuses(app, ("POST", "/images")) == [200]

    async def test_what_a_ramp_has_opened_to_all_is_open_where_nobody_knows_who_asks(self) -> None:
        clock = Clock()
        limiter = Limiter(policy(), MemoryBackend(clock=clock))
        await limiter.control.close("image", everyone=True)
        await limiter.control.open("image", everyone=True, ramp=timedelta(minutes=30))
        app = behind(limiter, plain, identify=broken_identify)

        before = await statuses(app, ("POST", "/images"))
        clock.advance(30 * 60)

        assert before + await statuses(app, ("POST", "/images")) == [403, 200]

    async def test_a_request_that_is_cancelled_while_identify_waits_is_cancelled(self) -> None:
        asked = asyncio.Event()

        async def wait(connection: HTTPConnection) -> Account:
            asked.set()
            await asyncio.Event().wait()
            return ANN

        recorder = Recorder()
        request = asyncio.create_task(run(behind(limiter_of(), recorder, identify=wait)))
        await asked.wait()
        request.cancel()

        with pytest.raises(asyncio.CancelledError):
            await request
        assert not recorder.scopes

    @pytest.mark.fault("C2")
    @pytest.mark.parametrize("wrong", [wrong_identify, unstorable_identify, empty_identify])
    async def test_an_identify_whose_account_is_none_charges_the_address(
        self, wrong: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        limiter = limiter_of(video=(["POST /videos"], "1/hour"))
        app = behind(limiter, plain, identify=wrong)

        assert await statuses(app, *[("POST", "/videos")] * 3) == [200, 429, 429]
        assert "identify gave what is no account" in caplog.messages[0]

    def test_statuses_that_cannot_be_are_refused_when_the_application_starts(self) -> None:
        for statuses, place in (
            ({"quotas": 402}, "unknown reason 'quotas'"),
            ({"quota": "429"}, "statuses['quota'] must be from 400 to 599, got '429'"),
            ({"zero": 200}, "statuses['zero'] must be from 400 to 599, got 200"),
        ):
            with pytest.raises(UsageError, match=re.escape(place)):
                TieredLimitMiddleware(plain, limiter=limiter_of(), statuses=statuses)  # type: ignore[arg-type]  # on purpose

    async def test_a_backend_of_others_that_breaks_its_promise_is_one_too(self) -> None:
        class Rude(Spy):
            async def take(self, charges: Any) -> Any:
                raise ZeroDivisionError

        app = behind(Limiter(policy(video=(["POST /videos"], "1/hour")), Rude()), plain)

        assert await statuses(app, ("POST", "/images"), ("POST", "/videos")) == [200, 503]

    async def test_a_handlers_take_gets_the_outage_answer_as_well(self) -> None:
        async def handler(request: Request) -> JSONResponse:
            limits: RequestLimits = request.state.tieredlimit
            return JSONResponse([(await limits.take(name)).reason for name in ("image", "video")])

        limiter = limiter_of(video=(["POST /videos"], "1/hour"))
        app = starlette(limiter, Route("/own", handler), identify=broken_identify)

        async with client_of(app) as client:
            assert (await client.get("/own")).json() == ["outage", "outage"]

    async def test_an_identify_may_answer_itself(self) -> None:
        def refuse(connection: HTTPConnection) -> Account | None:
            raise HTTPException(401, "no key", {"www-authenticate": "Key"})

        app = behind(limiter_of(), plain, identify=refuse)
        async with client_of(app) as client:
            answer = await client.post("/images")
            free = await client.post("/other")

        assert (answer.status_code, answer.text) == (401, "no key")
        assert answer.headers["www-authenticate"] == "Key"
        assert free.status_code == 200

    async def test_such_answers_may_be_empty_or_structured(self) -> None:
        problems: list[HTTPException] = [
            HTTPException(304),
            FastAPIHTTPException(422, detail={"why": ["x"]}),
        ]
        answers = []
        for problem in problems:

            def refuse(connection: HTTPConnection, it: Exception = problem) -> Account | None:
                raise it

            async with client_of(behind(limiter_of(), plain, identify=refuse)) as client:
                answers.append(await client.post("/images"))

        assert [(answer.status_code, answer.content) for answer in answers] == [
            (304, b""),
            (422, b'{"detail":{"why":["x"]}}'),
        ]

    async def test_an_identify_may_deny(self) -> None:
        limiter = limiter_of(login=([], 0))

        async def careful(connection: HTTPConnection) -> Account | None:
            (await limiter.take(ANN, "login")).raise_if_denied()
            return None

        sent = await run(behind(limiter, plain, identify=careful))

        assert sent[0]["status"] == 403
        assert json.loads(sent[1]["body"])["feature"] == "login"


@pytest.mark.fault("E5")
class TestFields:
    async def test_no_retry_after_on_a_200_and_each_field_once(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            headers = [
                (b"RateLimit", b'"theirs";r=9'), (b"ratelimit-policy", b'"theirs";q=9'),
                (b"RATELIMIT", b"again"), (b"x-ratelimit-limit", b"9"), (b"x-own", b"1"),
            ]  # fmt: skip
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b""})

        bare = fields_of((await run(behind(limiter_of(["2/hour", "9/day"]), app)))[0])
        legacy = fields_of((await run(behind(limiter_of(), app, legacy_fields=True)))[0])

        assert bare == {
            "x-own": "1",
            "x-ratelimit-limit": "9",
            "ratelimit-policy": '"image-hour";q=2;w=3600, "image-day";q=9;w=86400',
            "ratelimit": '"image-hour";r=1;t=1800, "image-day";r=8;t=9600',
        }
        assert legacy["x-ratelimit-limit"] == "2"
        assert legacy["x-ratelimit-remaining"] == "1"
        assert legacy["x-ratelimit-reset"] == "1800"

    async def test_without_a_limit_the_applications_fields_stay(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            headers = [(b"ratelimit", b"theirs")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})

        for path in ("/images", "/health"):
            (start,) = await run(behind(limiter_of("unlimited"), app), path=path)
            assert start["headers"] == [(b"ratelimit", b"theirs")]

    async def test_several_features_share_the_fields(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await scope["state"]["tieredlimit"].take("video", 3)
            await plain(scope, receive, send)

        limiter = limiter_of(video=([], {"rate": "5/day"}))
        start, _ = await run(behind(limiter, app, legacy_fields=True))

        fields = fields_of(start)
        assert fields["ratelimit"] == '"image-hour";r=1;t=1800, "video-day";r=2;t=17280'
        assert fields["ratelimit-policy"] == '"image-hour";q=2;w=3600, "video-day";q=5;w=86400'
        assert fields["x-ratelimit-limit"] == "2"

    async def test_a_denial_of_a_second_feature_shows_that_one_alone(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            (await scope["state"]["tieredlimit"].take("video", 1)).raise_if_denied()

        limiter = limiter_of(video=([], 0))
        for door in (behind(limiter, app), behind(limiter, behind(limiter, app))):
            start, _ = await run(door)
            assert start["status"] == 403
            assert fields_of(start)["ratelimit"] == '"video";r=0'


@pytest.mark.fault("E6", "C2")
class TestStrangers:
    async def test_a_clients_own_fields_change_nothing(self) -> None:
        app = starlette(limiter_of())
        headers = {
            "RateLimit": '"image-hour";r=99', "X-RateLimit-Remaining": "99", "X-Account": "boss",
            "X-Tier": "unlimited", "X-Forwarded-For": "6.6.6.6", "Forwarded": "for=6.6.6.6",
            "X-HTTP-Method-Override": "GET", "X-Original-URL": "/health",
        }  # fmt: skip
        async with client_of(app) as client:
            answers = [
                await client.post("/images", headers=[*headers.items(), ("X-Account", str(i))])
                for i in range(3)
            ]

        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert answers[0].headers["ratelimit"] == '"image-hour";r=1;t=1800'

    @pytest.mark.parametrize(
        "hostile",
        ["u:pro:x", "{tag}", "}{", "a\r\nGET x", "\x00", "*192.0.2.1", "x" * 1_000_000, "é/../é"],
        ids=str.__len__,
    )
    async def test_a_hostile_id_is_one_account_with_a_short_key(self, hostile: str) -> None:
        spy = Spy()
        app = behind(Limiter(policy(), spy), plain, identify=lambda _: Account(hostile))

        started = [(await run(app))[0]["status"] for _ in range(3)]

        keys = {charge.key for take in spy.takes for charge in take}
        assert started == [200, 200, 429]
        (key,) = keys
        assert key.startswith("tl1:{default:0}:image:everyone::")
        assert len(key.encode()) < 256
        assert not set(key.rpartition(":")[2]) & set("{}\r\n\x00:*")


class TestIdentify:
    async def test_each_account_has_its_own_tokens(self) -> None:
        app = starlette(limiter_of("1/hour"))

        ann = await statuses(app, *[("POST", "/images")] * 2, headers={"x-key": "ann"})
        ben = await statuses(app, *[("POST", "/images")] * 2, headers={"X-KEY": "ben"})

        assert ann == ben == [200, 429]

    async def test_strangers_are_charged_by_address(self) -> None:
        app = behind(limiter_of("1/hour"), plain, identify=identify)

        async def status(client: tuple[str, int] | None) -> int:
            status: int = (await run(app, client=client))[0]["status"]
            return status

        assert [await status(("192.0.2.1", port)) for port in (1, 2)] == [200, 429]
        assert await status(("192.0.2.2", 1)) == 200
        assert [await status(None) for _ in range(2)] == [200, 429]

    async def test_where_nobody_knows_the_client_all_such_share_one_account(self) -> None:
        app = behind(limiter_of("1/hour"), plain, anonymous=lambda _: None)

        assert await statuses(app, *[("POST", "/images")] * 2) == [200, 429]

    async def test_blocking_runs_in_a_thread_and_plain_on_the_loop(self) -> None:
        threads: list[bool] = []

        def look(connection: HTTPConnection) -> Account | None:
            threads.append(threading.current_thread() is threading.main_thread())
            return ANN

        for ask in (look, blocking(look)):
            await run(behind(limiter_of(), plain, identify=ask))

        assert threads == [True, False]

    async def test_identify_is_asked_once_however_many_features(self) -> None:
        asked: list[str] = []

        async def slow(connection: HTTPConnection) -> Account | None:
            asked.append("once")
            await asyncio.sleep(0)
            return ANN

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            limits: RequestLimits = scope["state"]["tieredlimit"]
            await asyncio.gather(*(limits.take(name) for name in ("image", "video", "sound")))
            assert await limits.account() is ANN

        limiter = limiter_of(video=([], "1/hour"), sound=([], "1/hour"))
        await run(behind(limiter, app, identify=slow), path="/unmetered")

        assert asked == ["once"]

    @pytest.mark.parametrize("later", [False, True])
    async def test_identify_that_fails_is_not_asked_again(self, later: bool) -> None:
        asked: list[str] = []

        def fail(connection: HTTPConnection) -> Any:
            asked.append("once")
            if later:
                return broken_identify_later(connection)
            return broken_identify(connection)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            limits = limits_of(scope)
            first = await limits.take("image")
            taken = asyncio.gather(*(limits.take(name) for name in ("video", "sound")))
            decided.extend([first, *await taken])
            with pytest.raises(LookupError, match="is locked"):
                await limits.account()
            await plain(scope, receive, send)
            late.append(limits)

        decided: list[Decision] = []
        late: list[RequestLimits] = []
        limiter = limiter_of(video=([], "1/hour"), sound=([], "1/hour"), music=([], "1/hour"))
        await run(behind(limiter, app, identify=fail), path="/unmetered")
        after = await late[0].take("music")

        assert [one.reason for one in (*decided, after)] == ["outage"] * 4
        assert asked == ["once"]

    async def test_answer_that_it_raises_is_sent_though_a_handler_asked(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await limits_of(scope).take("image")

        def refuse(connection: HTTPConnection) -> Account:
            raise HTTPException(401, "who are you?", {"www-authenticate": "Key"})

        start, body = await run(behind(limiter_of(), app, identify=refuse), path="/unmetered")

        assert (start["status"], body["body"]) == (401, b"who are you?")
        assert (b"www-authenticate", b"Key") in start["headers"]

    async def test_same_exception_of_the_applications_own_is_raised_on(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await limits_of(scope).take("image")
            raise HTTPException(401)

        with pytest.raises(HTTPException):
            await run(behind(limiter_of(), app, identify=identify), path="/unmetered")


class TestOneCharge:
    async def test_a_feature_is_charged_once_whichever_doors(self) -> None:
        spy = Spy()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            limits: RequestLimits = scope["state"]["tieredlimit"]
            first = limits.decisions["image"]
            assert await limits.take("image", 2, account=Account("other")) is first
            await plain(scope, receive, send)

        limiter = Limiter(policy(), spy)
        start, _ = await run(behind(limiter, behind(limiter, app)))

        assert len(spy.takes) == 1
        assert fields_of(start)["ratelimit"] == '"image-hour";r=1;t=1800'

    async def test_two_takes_at_once_charge_once(self) -> None:
        spy = Spy()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            limits: RequestLimits = scope["state"]["tieredlimit"]
            first, second = await asyncio.gather(limits.take("image"), limits.take("image"))
            assert first is second
            assert await limits.take("image") is first

        await run(behind(Limiter(policy(), spy), app), path="/unmetered")

        assert len(spy.takes) == 1

    @pytest.mark.parametrize("others", ["a handler and a door", "two doors"])
    async def test_a_feature_is_charged_once_though_doors_are_passed_at_once(
        self, others: str
    ) -> None:
        limiter = limiter_of(image=(["POST /images", "POST /images/{id}"], "5/hour"))
        inner = behind(limiter, plain)

        async def identify_later(connection: HTTPConnection) -> Account:
            await asyncio.sleep(0)
            return ANN

        async def fan_out(scope: Scope, receive: Receive, send: Send) -> None:
            limits: RequestLimits = scope["state"]["tieredlimit"]
            door = inner({**scope, "path": "/images"}, receive, send)
            if others == "two doors":
                await asyncio.gather(door, inner({**scope, "path": "/images/7"}, receive, send))
            else:
                await asyncio.gather(limits.take("image"), door)

        await run(behind(limiter, fan_out, identify=identify_later), path="/batch")

        assert (await limiter.peek(ANN, "image")).remaining == 4

    async def test_a_second_door_whose_request_is_cancelled_charges_nothing(self) -> None:
        limiter = limiter_of()
        asked, known = asyncio.Event(), asyncio.Event()

        async def identify_later(connection: HTTPConnection) -> Account:
            asked.set()
            await known.wait()
            return ANN

        async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
            await behind(limiter, plain)({**scope, "path": "/images"}, receive, send)

        app = behind(limiter, mounted, identify=identify_later)
        request = asyncio.create_task(run(app, path="/mount"))
        await asked.wait()
        request.cancel()
        await asyncio.wait((request,))
        known.set()
        await asyncio.sleep(0)

        assert request.cancelled()
        assert (await limiter.peek(ANN, "image")).remaining == 2

    async def test_a_take_whose_caller_gave_up_still_counts(self) -> None:
        going, go = asyncio.Event(), asyncio.Event()

        class Slow(Spy):
            async def take(self, charges: Any) -> Any:
                going.set()
                await go.wait()
                return await super().take(charges)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            limits: RequestLimits = scope["state"]["tieredlimit"]
            impatient = asyncio.create_task(limits.take("image"))
            await going.wait()
            impatient.cancel()
            second = asyncio.create_task(limits.take("image"))
            go.set()
            assert (await second).remaining == 1

        spy = Slow()
        await run(behind(Limiter(policy(), spy), app), path="/unmetered")

        assert len(spy.takes) == 1

    async def test_another_limiter_charges_by_itself(self) -> None:
        outer, inner = Spy(), Spy()
        first, second = Limiter(policy(), outer), Limiter(policy("1/day"), inner)

        start, _ = await run(behind(first, behind(second, plain)))

        assert (len(outer.takes), len(inner.takes)) == (1, 1)
        assert start["status"] == 200
        fields_of(start)

    async def test_a_door_behind_that_of_another_limiter_charges_nothing_again(self) -> None:
        spy = Spy()
        limiter, other = Limiter(policy(), spy), Limiter(policy())

        await run(behind(limiter, behind(other, behind(limiter, plain))))

        assert len(spy.takes) == 1

    @pytest.mark.parametrize("takes", [False, True])
    async def test_state_that_is_no_mapping_is_left_alone(self, takes: bool) -> None:
        other = object()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"] = other
            if takes:
                await limits_of(scope).take("image")
            await plain(scope, receive, send)

        door = behind(limiter_of(), app)
        found, _ = await run(door, path="/unmetered", state=other)
        made, _ = await run(door, path="/unmetered")

        assert (found["status"], made["status"]) == (200, 200)
        assert any(name == b"ratelimit" for name, _ in made["headers"]) is takes

    async def test_a_server_that_shares_its_state_gives_nothing_away(self) -> None:
        seen: list[RequestLimits] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(scope["state"]["tieredlimit"])
            assert scope["state"]["from_lifespan"] == 1
            await plain(scope, receive, send)

        door = behind(limiter_of(), app)
        state = {"from_lifespan": 1}

        started = [(await run(door, state=state))[0]["status"] for _ in range(3)]

        assert started == [200, 200, 429]
        assert seen[0] is not seen[1]

    async def test_an_unknown_feature_in_a_handler_is_its_error(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await scope["state"]["tieredlimit"].take("vidoe")

        with pytest.raises(ValueError, match='unknown feature "vidoe"'):
            await run(behind(limiter_of(), app))

    async def test_a_feature_that_was_once_known_is_allowed_and_logged_whatever_is_asked(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            limits = limits_of(scope)
            taken.append(await limits.take("video"))
            taken.append((await limits.reserve("sound", 30)).decision)
            with pytest.raises(UsageError):
                await limits.take("music", -1)
            await plain(scope, receive, send)

        taken: list[Decision] = []
        once: dict[str, Any] = {name: ([], "1/hour") for name in ("video", "sound", "music")}
        limiter = limiter_of(**once)
        await push(limiter, policy())
        for ask in (identify, broken_identify):
            start, _ = await run(behind(limiter, app, identify=ask), path="/unmetered")

        assert start["status"] == 200
        assert [(one.allowed, one.tier, one.token) for one in taken] == [(True, "", "")] * 4
        assert caplog.text.count("is not limited") == 2  # a line each, however often
        with pytest.raises(UsageError, match="unknown feature"):
            await limiter.take(ANN, "video")


class TestDenied:
    async def test_it_is_answered_as_our_own_wherever_it_is_raised(self) -> None:
        limiter = limiter_of(video=(["POST /direct"], 0))

        async def handler(request: Request) -> Response:
            (await limiter.take(ANN, "video")).raise_if_denied()
            return PlainTextResponse("never")

        async def passing(request: Request, call_next: CallNext) -> Response:
            return await call_next(request)

        app = FastAPI(dependencies=[])
        app.add_route("/handler", handler, methods=["POST"])
        app.add_api_route("/dependency", ok, methods=["POST"], dependencies=[Depends(handler)])
        app.add_middleware(BaseHTTPMiddleware, dispatch=passing)
        app.add_middleware(TieredLimitMiddleware, limiter=limiter)
        async with client_of(app) as client:
            answers = [await client.post(p) for p in ("/direct", "/handler", "/dependency")]

        first = answers[0]
        assert first.status_code == 403
        assert first.headers["content-type"] == "application/problem+json"
        for answer in answers[1:]:
            assert (answer.status_code, answer.content, answer.headers) == (
                first.status_code, first.content, first.headers,
            )  # fmt: skip

    async def test_after_the_response_has_started_it_goes_on(self) -> None:
        limiter = limiter_of(0)
        denied = await limiter.take(ANN, "image")

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await plain(scope, receive, send)
            denied.raise_if_denied()

        with pytest.raises(Denied):
            await run(behind(limiter, app), path="/other")

    @pytest.mark.parametrize("message", [
        {"type": "websocket.accept"},
        {"type": "websocket.close", "code": 1000},
        {"type": "websocket.http.response.start", "status": 401, "headers": []},
    ], ids=lambda message: message["type"])  # fmt: skip
    async def test_after_a_websockets_answer_too(self, message: MutableMapping[str, Any]) -> None:
        limiter = limiter_of(0)
        denied = await limiter.take(ANN, "image")

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send(message)
            denied.raise_if_denied()

        with pytest.raises(Denied):
            await run(behind(limiter, app), type="websocket", path="/other")


def teapot(scope: Scope, decision: Decision) -> ASGIApp:
    return PlainTextResponse(f"{decision.reason} {scope['path']}", 418)


async def teapot_later(scope: Scope, decision: Decision) -> ASGIApp:
    return teapot(scope, decision)


def none(scope: Scope, decision: Decision) -> None:
    return None


async def none_later(scope: Scope, decision: Decision) -> None:
    return None


def failing(scope: Scope, decision: Decision) -> ASGIApp:
    raise RuntimeError("oops")


async def failing_later(scope: Scope, decision: Decision) -> ASGIApp:
    raise RuntimeError("oops")


async def cancelled_lookup(scope: Scope, decision: Decision) -> ASGIApp:
    lookup = asyncio.ensure_future(asyncio.Event().wait())
    lookup.cancel()
    await lookup
    return teapot(scope, decision)


WRONG = (failing, failing_later, cancelled_lookup)


def mistaken(scope: Scope, decision: Decision) -> Any:
    return {"detail": "no"}


class TestOnDenied:
    @pytest.mark.parametrize("on_denied", [teapot, teapot_later])
    async def test_its_application_answers(self, on_denied: Any) -> None:
        async with client_of(behind(limiter_of(0), plain, on_denied=on_denied)) as client:
            answer = await client.post("/images")

        assert (answer.status_code, answer.text) == (418, "zero /images")
        assert "ratelimit" not in answer.headers

    @pytest.mark.parametrize("on_denied", [none, none_later, *WRONG, mistaken])
    async def test_otherwise_ours_does(
        self, on_denied: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        limiter = limiter_of(0)
        limiter.complaints = Complaints(lambda: 0.0)
        app = behind(limiter, plain, on_denied=on_denied, statuses={"zero": 404})

        assert await statuses(app, *[("POST", "/images")] * 5) == [404] * 5
        assert len(caplog.records) == (1 if on_denied in (*WRONG, mistaken) else 0)


@pytest.mark.fault("E11")
class TestBrowsers:
    async def test_a_denial_can_be_read_across_origins(self) -> None:
        spy = Spy()
        app = Starlette(routes=[Route("/images", ok, methods=["POST"])])
        app.add_middleware(TieredLimitMiddleware, limiter=Limiter(policy("1/hour"), spy))
        app.add_middleware(
            CORSMiddleware,
            allow_origins=["https://shop.example"],
            allow_methods=["POST"],
            expose_headers=["RateLimit", "RateLimit-Policy", "Retry-After"],
        )
        origin = {"origin": "https://shop.example"}
        ask = {**origin, "access-control-request-method": "POST"}

        async with client_of(app) as client:
            preflights = [await client.options("/images", headers=ask) for _ in range(5)]
            allowed = await client.post("/images", headers=origin)
            denied = await client.post("/images", headers=origin)

        assert [preflight.status_code for preflight in preflights] == [200] * 5
        assert (allowed.status_code, denied.status_code) == (200, 429)
        for answer in (allowed, denied):
            assert answer.headers["access-control-allow-origin"] == "https://shop.example"
            exposed = answer.headers["access-control-expose-headers"].split(", ")
            assert exposed == ["RateLimit", "RateLimit-Policy", "Retry-After"]
        assert denied.headers["retry-after"] == "3600"
        assert len(spy.takes) == 2

    async def test_a_preflight_is_never_charged_even_if_we_are_outermost(self) -> None:
        spy = Spy()
        limiter = Limiter(policy(all=(["* /any"], "1/hour")), spy)
        recorder = Recorder()
        app = behind(limiter, recorder)

        async with client_of(app) as client:
            for _ in range(3):
                asking = {"Origin": "https://a", "Access-Control-Request-Method": "POST"}
                await client.options("/any", headers=asking)
            assert spy.takes == []
            await client.options("/any")
            await client.options("/any", headers={"Access-Control-Request-Method": "POST"})

        assert len(spy.takes) == 2
        assert len(recorder.scopes) == 4


def websocket_app(limiter: Limiter, *, extension: bool = True, **options: Any) -> ASGIApp:
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept(headers=[(b"ratelimit", b"theirs"), (b"x-own", b"1")])
        await websocket.send_text("hello")
        await websocket.close()

    app = starlette(limiter, WebSocketRoute("/ws", talk), **options)

    async def without(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            scope["extensions"] = {}
        await app(scope, receive, send)

    return app if extension else without


@pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(
            "websockets",
            marks=[
                pytest.mark.filterwarnings("ignore::DeprecationWarning"),
                pytest.mark.filterwarnings("ignore:The `websockets` implementation"),
            ],
        ),
        "websockets-sansio",
    ],
)
class TestWebSockets:
    async def test_an_accepted_one_carries_the_fields(self, implementation: str) -> None:
        with serve(websocket_app(limiter_of()), ws=implementation) as url:
            async with connect(f"{url.replace('http', 'ws')}/ws") as websocket:
                assert await websocket.recv() == "hello"
                assert websocket.response is not None
                headers = websocket.response.headers

        assert headers.get_all("ratelimit") == ['"image-hour";r=1;t=1800']
        assert headers["x-own"] == "1"

    async def test_a_denied_one_gets_the_problem(self, implementation: str) -> None:
        app = websocket_app(limiter_of(0))
        with serve(app, ws=implementation) as url, pytest.raises(InvalidStatus) as caught:
            await connect(f"{url.replace('http', 'ws')}/ws")

        response = caught.value.response
        assert response.status_code == 403
        assert response.headers["content-type"] == "application/problem+json"
        assert json.loads(response.body or b"")["reason"] == "zero"

    async def test_without_the_extension_it_is_refused_all_the_same(
        self, implementation: str
    ) -> None:
        app = websocket_app(limiter_of("1/hour"), extension=False)
        with serve(app, ws=implementation) as url:
            target = f"{url.replace('http', 'ws')}/ws"
            async with connect(target) as websocket:
                assert await websocket.recv() == "hello"
            with pytest.raises(InvalidStatus) as caught:
                await connect(target)

        assert caught.value.response.status_code == 403

    @pytest.mark.parametrize("extension", [True, False])
    async def test_an_identify_may_refuse_one(self, implementation: str, extension: bool) -> None:
        def refuse(connection: HTTPConnection) -> Account | None:
            raise HTTPException(401, "no key")

        app = websocket_app(limiter_of(), extension=extension, identify=refuse)
        with serve(app, ws=implementation) as url, pytest.raises(InvalidStatus) as caught:
            await connect(f"{url.replace('http', 'ws')}/ws")

        assert caught.value.response.status_code == (401 if extension else 403)


def doomed(app: Starlette) -> AbstractAsyncContextManager[None]:
    raise RuntimeError("no database")


@pytest.mark.fault("E8")
class TestLifespan:
    async def drive(self, app: ASGIApp, *received: str) -> list[str]:
        messages = iter(received)
        sent: list[str] = []

        async def receive() -> Message:
            return {"type": next(messages)}

        async def send(message: Message) -> None:
            sent.append(message["type"].removeprefix("lifespan."))

        await app({"type": "lifespan", "state": {}}, receive, send)
        return sent

    async def test_the_limiter_is_open_before_the_application_starts_and_until_it_ends(
        self,
    ) -> None:
        spy = Spy()

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            spy.others.append("start")
            yield
            spy.others.append("end")

        app = behind(Limiter(policy(), spy), Starlette(lifespan=lifespan))
        sent = await self.drive(app, "lifespan.startup", "lifespan.shutdown")

        assert sent == ["startup.complete", "shutdown.complete"]
        assert spy.others == ["open", "start", "end", "close"]

    async def test_a_limiter_that_must_not_open_fails_the_startup_before_the_applications(
        self,
    ) -> None:
        class Refused(Spy):
            async def open(self) -> None:
                raise UsageError("laid out otherwise")

        started: list[str] = []
        told: list[Message] = []

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            started.append("start")
            yield

        async def receive() -> Message:
            return {"type": "lifespan.startup"}

        async def send(message: Message) -> None:
            told.append(message)

        app = behind(Limiter(policy(), Refused()), Starlette(lifespan=lifespan))
        with pytest.raises(UsageError, match="laid out otherwise"):
            await app({"type": "lifespan", "state": {}}, receive, send)

        assert told == [{"type": "lifespan.startup.failed", "message": "laid out otherwise"}]
        assert started == []

    async def test_a_startup_that_fails_is_told_and_leaves_nothing_open(self) -> None:
        spy = Spy()

        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "lifespan.startup"}

        async def send(message: Message) -> None:
            sent.append(message)

        app = behind(Limiter(policy(), spy), Starlette(lifespan=doomed))
        with pytest.raises(RuntimeError, match="no database"):
            await app({"type": "lifespan", "state": {}}, receive, send)

        assert [message["type"] for message in sent] == ["lifespan.startup.failed"]
        assert spy.others[:2] == ["open", "close"]

    async def test_an_application_without_lifespan_is_as_it_was(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            assert scope["type"] == "http"
            await plain(scope, receive, send)

        with pytest.raises(AssertionError):
            await self.drive(behind(limiter_of(), app), "lifespan.startup")

    @pytest.mark.parametrize("mode", ["auto", "off"])
    def test_without_lifespan_the_first_request_opens(self, mode: str, redis_url: str) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            assert scope["type"] == "http"
            await plain(scope, receive, send)

        limiter = Limiter(policy(), RedisBackend.from_url(redis_url, timeout=PATIENT))
        with serve(behind(limiter, app), lifespan=mode) as url:
            answers = [httpx.post(f"{url}/images") for _ in range(3)]

        assert [answer.status_code for answer in answers] == [200, 200, 429]

    def test_a_failing_startup_ends_the_server_and_does_not_hang(self) -> None:
        app = behind(limiter_of(), Starlette(lifespan=doomed))
        with pytest.raises(RuntimeError, match="uvicorn did not start"), serve(app):
            pass

    def test_a_backend_that_is_down_lets_the_application_start(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        limiter = Limiter(policy(), RedisBackend.from_url("redis://127.0.0.1:1/0", timeout=PATIENT))
        with serve(starlette(limiter)) as url:
            assert httpx.post(f"{url}/images").status_code == 200

        assert any("Redis" in message for message in caplog.messages)

    def test_two_servers_in_two_event_loops_share_a_limiter(self, redis_url: str) -> None:
        limiter = Limiter(policy(), RedisBackend.from_url(redis_url, timeout=PATIENT))
        app = starlette(limiter)

        with serve(app, loop="asyncio") as one, serve(app, loop="uvloop") as other:
            answers = [httpx.post(f"{url}/images") for url in (one, other, one, other)]

        assert [answer.status_code for answer in answers] == [200, 200, 429, 429]


class TestOverTheWire:
    @pytest.mark.fault("D1", "D5")
    def test_a_two_days_old_account_makes_images_and_no_videos(self) -> None:
        created = datetime.now(UTC) - timedelta(days=2)
        limiter = Limiter(Path(__file__).parent.parent / "examples" / "policy.toml")
        routes = [Route(f"/v1/{name}", ok, methods=["POST"]) for name in ("images", "videos")]
        app = starlette(
            limiter, *routes, identify=lambda _: Account("u", plan="free", created_at=created)
        )

        with serve(app) as url:
            image = httpx.post(f"{url}/v1/images")
            video = httpx.post(f"{url}/v1/videos", headers={"accept-language": "fr"})

        assert image.status_code == 200
        assert image.headers["ratelimit"].startswith('"image-minute";r=4;t=12, "image-day";r=49;t=')
        assert video.status_code == 403
        assert video.json()["detail"].startswith("La vidéo n'est pas encore ouverte")
        assert video.json()["tier"] == "new"
        assert video.headers["content-language"] == "fr"
        assert "retry-after" not in video.headers

    @pytest.mark.parametrize("http", ["h11", "httptools"])
    def test_a_denied_head_leaves_its_connection_usable(self, http: str) -> None:
        app = starlette(limiter_of("1/hour"), Route("/images/{id}", ok), Route("/", ok))

        with serve(app, http=http) as url, httpx.Client(base_url=url) as client:
            heads = [client.head("/images/1") for _ in range(3)]
            after = client.get("/")

        assert [head.status_code for head in heads] == [200, 429, 429]
        assert [head.content for head in heads[1:]] == [b"", b""]
        assert int(heads[1].headers["content-length"]) > 0
        assert (after.status_code, after.text) == (200, "done")

    async def test_a_request_is_one_call_to_redis_or_none(self, redis_url: str) -> None:
        features: dict[str, Any] = {
            "video": (["POST /videos"], ["9/hour", "99/day", {"rate": "5/day", "per": "org"}]),
            "zero": (["POST /zero"], 0),
        }
        document = policy(**features)
        document["features"]["video"]["routes"] = {"POST /videos": 1, "POST /huge": 6}

        def member(connection: HTTPConnection) -> Account | None:
            return Account("ann", within={"org": "o1"})

        async def told(limiter: Limiter, *requests: tuple[str, str], **options: Any) -> list[str]:
            async with Monitor(redis_url) as monitor:
                await statuses(behind(limiter, plain, identify=member), *requests, **options)
                return await monitor.commands()

        backend = RedisBackend.from_url(redis_url, timeout=PATIENT)
        async with Limiter(document, backend) as limiter:
            for _ in range(2):
                (command,) = await told(limiter, ("POST", "/videos"))
                assert command.startswith("EVALSHA ")
                assert " 3 tl1:{default:0}:revision tl1:{default:0}:" in command
            assert (
                await told(
                    limiter, ("POST", "/zero"), ("POST", "/huge"), ("POST", "/none"), ("GET", "/")
                )
                == []
            )
            ask = {"access-control-request-method": "POST", "origin": "https://x"}
            assert await told(limiter, ("OPTIONS", "/videos"), headers=ask) == []
        off = Limiter(document, redis_url, enabled=False)
        assert await told(off, ("POST", "/videos"), ("POST", "/zero")) == []

    @pytest.mark.fault("F11")
    async def test_switched_off_nobody_is_asked_who_they_are(self) -> None:
        spy = Spy()
        asked: list[HTTPConnection] = []
        limiter = Limiter(policy(0), spy, enabled=False)
        app = behind(limiter, plain, identify=lambda c: asked.append(c))

        assert await statuses(app, ("POST", "/images")) == [200]
        assert asked == []
        assert spy.takes == []

"""The end of a request: what is given back, what is freed, and that both happen once."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from tests.servers import RedisServer
from tests.serving import serve
from tests.test_leases import held, now_of
from tests.test_limiter import PATIENT, Clock
from tieredlimit import Account, BackendError, Decision, Limiter, TieredLimitMiddleware
from tieredlimit.backends import MemoryBackend, RedisBackend
from tieredlimit.backends.breaker import FAILURES, Breaker
from tieredlimit.backends.memory_holds import MemoryHolds
from tieredlimit.integrations.fastapi import document_denials, limited
from tieredlimit.request import RequestLimits

DEADLINE = 30.0
ANN = Account("ann")
SLOTS = {"rate": "1000/hour", "concurrency": 1, "lease": "1 minute"}
VIDEO = ["GET|POST /videos", "GET /ws"]
KEY = "tl1:{default:0}:video:everyone~lease::ann"
QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"
REDUCED = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"


def policy(quota: object = "10/hour", **words: object) -> dict[str, Any]:
    """Meter videos by route and images where a handler takes them; a failed video is refunded."""
    video = {"routes": VIDEO, "refund_on": [500, 503], **words}
    return {
        "features": {"video": video, "image": {"refund_on": [500]}},
        "tiers": {"everyone": {"quotas": {"video": quota, "image": "5/hour"}}},
    }


def limiter_of(quota: object = "10/hour", **words: object) -> Limiter:
    return Limiter(policy(quota, **words), MemoryBackend(clock=Clock()))


def identify(connection: HTTPConnection) -> Account:
    return Account(connection.headers.get("x-key", "ann"))


def behind(limiter: Limiter, app: ASGIApp) -> TieredLimitMiddleware:
    return TieredLimitMiddleware(app, limiter=limiter, identify=identify)


def starlette(limiter: Limiter, handler: Any, *inner: Middleware, **options: Any) -> Starlette:
    """Serve videos by a handler, the limits in front and `inner` behind them."""
    limits = Middleware(TieredLimitMiddleware, limiter=limiter, identify=identify)
    route = Route("/videos", handler, methods=["GET", "POST"])
    return Starlette(routes=[route], middleware=[limits, *inner], **options)


def client_of(app: ASGIApp) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def post(app: ASGIApp) -> httpx.Response:
    async with client_of(app) as client:
        return await client.post("/videos")


async def left(limiter: Limiter, feature: str = "video") -> int | None:
    return (await limiter.peek(ANN, feature)).remaining


async def running(limiter: Limiter) -> int:
    (slots,) = (await limiter.peek(ANN, "video")).slots
    return slots.held


GONE: Message = {"type": "http.disconnect"}
BODY: Message = {"type": "http.request", "body": b"", "more_body": False}
DONE: Message = {"type": "http.response.body", "body": b"done"}
PART_OF_A_FILE: Message = {"type": "http.response.zerocopysend", "file": 3, "more_body": True}


def start(status: int = 200, *headers: tuple[bytes, bytes]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


async def run(
    app: ASGIApp,
    *receives: Message,
    sending: Callable[[Message], Awaitable[None]] | None = None,
    **scope: Any,
) -> list[Message]:
    """Call an application with what a client sends, and then nothing; return what it sent."""
    sent: list[Message] = []
    coming = list(receives or (BODY,))

    async def receive() -> Message:
        if not coming:
            await asyncio.Event().wait()
        return coming.pop(0)

    async def send(message: Message) -> None:
        if sending is not None:
            await sending(message)
        sent.append(message)

    base = {"type": "http", "path": "/videos", "headers": [], "query_string": b""}
    if scope.get("type") != "websocket":
        base["method"] = "POST"
    await app({**base, "client": ("192.0.2.1", 1), **scope}, receive, send)
    return sent


def answering(*messages: Message) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    return app


class TestStatuses:
    @pytest.mark.parametrize(("status", "remaining"), [(500, 10), (503, 10), (200, 9), (502, 9)])
    async def test_listed_status_costs_nothing_and_its_answer_says_so(
        self, status: int, remaining: int
    ) -> None:
        limiter = limiter_of()

        async def render(request: Request) -> Response:
            return PlainTextResponse("done", status)

        answer = await post(starlette(limiter, render))

        assert answer.status_code == status
        assert answer.headers["ratelimit"].startswith(f'"video-hour";r={remaining}')
        assert answer.headers["ratelimit-policy"] == '"video-hour";q=10;w=3600'
        assert await left(limiter) == remaining

    async def test_tokens_are_back_before_the_answer_is_sent(self) -> None:
        limiter = limiter_of()
        there: list[tuple[str, int | None]] = []

        async def sending(message: Message) -> None:
            there.append((message["type"], await left(limiter)))

        await run(behind(limiter, answering(start(500), DONE)), sending=sending)

        assert there == [("http.response.start", 10), ("http.response.body", 10)]

    async def test_pool_gets_its_tokens_back_as_well(self) -> None:
        limiter = limiter_of(pool={"rate": "100/hour"})

        await run(behind(limiter, answering(start(500), DONE)))

        pool = (await limiter.peek(ANN, "video")).pool
        assert pool is not None
        assert (pool.remaining, await left(limiter)) == (100, 10)

    async def test_answer_through_two_doors_says_that_it_cost_nothing(self) -> None:
        limiter = limiter_of()
        inner = behind(limiter, answering(start(500), DONE))

        sent = await run(behind(limiter, inner))

        assert [value for name, value in sent[0]["headers"] if name == b"ratelimit"] == [
            b'"video-hour";r=10'
        ]

    async def test_status_after_the_start_changes_nothing(self) -> None:
        limiter = limiter_of()

        await run(behind(limiter, answering(start(200), start(500), DONE)))

        assert await left(limiter) == 9

    async def test_each_feature_goes_by_its_own_list(self) -> None:
        limiter = limiter_of()

        async def render(request: Request) -> Response:
            await request.state.tieredlimit.take("image", 2)
            return PlainTextResponse("busy", 503)

        answer = await post(starlette(limiter, render))

        assert answer.headers["ratelimit"] == '"video-hour";r=10, "image-hour";r=3;t=720'
        assert (await left(limiter), await left(limiter, "image")) == (10, 3)

    async def test_answer_of_an_exception_handler_counts_as_any(self) -> None:
        limiter = limiter_of()

        async def render(request: Request) -> Response:
            raise HTTPException(503, "out of GPUs")

        answer = await post(starlette(limiter, render))

        assert (answer.status_code, await left(limiter)) == (503, 10)

    async def test_reservation_is_given_back_and_cannot_be_settled_any_more(self) -> None:
        limiter = limiter_of(routes=[])
        tokens = []

        async def render(request: Request) -> Response:
            reservation = await request.state.tieredlimit.reserve("video", 6)
            tokens.append(reservation.token)
            return PlainTextResponse("failed", 500)

        answer = await post(starlette(limiter, render))

        assert answer.headers["ratelimit"].startswith('"video-hour";r=10')
        assert not await limiter.settle(tokens[0], 3)
        assert await left(limiter) == 10

    @pytest.mark.fault("E9", "A10")
    async def test_reservation_that_was_settled_is_not_given_back_again(self) -> None:
        limiter = limiter_of(routes=[])
        await limiter.take(ANN, "video", 4)

        async def render(request: Request) -> Response:
            reservation = await request.state.tieredlimit.reserve("video", 6)
            await reservation.settle(2)
            return PlainTextResponse("failed", 500)

        await post(starlette(limiter, render))

        assert await left(limiter) == 4


class TestExceptions:
    @pytest.mark.fault("E9")
    async def test_exception_before_the_answer_costs_nothing(self) -> None:
        limiter = limiter_of()

        async def crash(request: Request) -> Response:
            raise ZeroDivisionError

        answer = await post(starlette(limiter, crash))

        assert (answer.status_code, await left(limiter)) == (500, 10)

    async def test_unless_the_policy_says_otherwise(self) -> None:
        limiter = limiter_of(refund_on_exception=False)
        other = limiter_of(refund_on=[], refund_on_exception=True)

        async def crash(request: Request) -> Response:
            raise ZeroDivisionError

        await post(starlette(limiter, crash))
        await post(starlette(other, crash))

        assert (await left(limiter), await left(other)) == (9, 10)

    @pytest.mark.fault("E9")
    async def test_exception_after_the_start_gives_nothing_back(self) -> None:
        limiter = limiter_of()

        async def crash(scope: Scope, receive: Receive, send: Send) -> None:
            await send(start(200))
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await run(behind(limiter, crash))

        assert await left(limiter) == 9

    @pytest.mark.fault("E9")
    async def test_exception_that_becomes_a_listed_status_is_refunded_once(self) -> None:
        limiter = limiter_of()
        await limiter.take(ANN, "video", 4)

        async def crash(request: Request) -> Response:
            raise ZeroDivisionError

        async def server_error(request: Request, error: Exception) -> Response:
            return PlainTextResponse("sorry", 500)

        # One door inside of another, and between them what makes an answer of the exception.
        inner = behind(limiter, Route("/videos", crash, methods=["POST"]))
        app = behind(
            limiter,
            Starlette(
                routes=[Mount("/", app=inner)],
                exception_handlers={ZeroDivisionError: server_error},
            ),
        )
        answer = await post(app)

        assert (answer.status_code, await left(limiter)) == (500, 6)

    async def test_denied_that_a_handler_raises_costs_what_was_taken_before(self) -> None:
        limiter = limiter_of()

        async def render(request: Request) -> Response:
            limits = request.state.tieredlimit
            (await limits.take("image", 6)).raise_if_denied()
            return PlainTextResponse("done")

        answer = await post(starlette(limiter, render))

        assert (answer.status_code, answer.json()["feature"]) == (429, "image")
        assert (await left(limiter), await left(limiter, "image")) == (9, 5)

    async def test_denied_with_a_listed_status_costs_nothing(self) -> None:
        limiter = limiter_of(refund_on=[429])

        async def render(request: Request) -> Response:
            (await request.state.tieredlimit.take("image", 6)).raise_if_denied()
            return PlainTextResponse("done")

        answer = await post(starlette(limiter, render))

        assert answer.status_code == 429
        # The denial's own fields stand.
        assert answer.headers["ratelimit-policy"] == '"image-hour";q=5;w=3600'
        assert await left(limiter) == 10

    async def test_refund_that_may_have_happened_is_never_repeated(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        limiter = limiter_of()
        await limiter.take(ANN, "video", 4)
        refund = limiter.refund

        async def lose_the_answer(decision: Decision) -> Decision:
            await refund(decision)
            raise BackendError("no answer")

        monkeypatch.setattr(limiter, "refund", lose_the_answer)
        inner = behind(limiter, answering(start(500), DONE))

        sent = await run(behind(limiter, inner))

        assert sent[0]["status"] == 500
        assert await left(limiter) == 6
        assert "a refund may not have happened: BackendError: no answer" in caplog.text


@pytest.mark.fault("H3", "E9")
class TestGoneClients:
    async def test_exception_of_a_client_that_has_gone_gives_nothing_back(self) -> None:
        limiter = limiter_of()

        async def read(scope: Scope, receive: Receive, send: Send) -> None:
            await Request(scope, receive).body()

        with pytest.raises(ClientDisconnect):
            await run(behind(limiter, read), GONE)

        assert await left(limiter) == 9

    @pytest.mark.parametrize("error", [ClientDisconnect(), WebSocketDisconnect(1006)])
    async def test_nor_does_that_of_a_send_which_nobody_receives(self, error: Exception) -> None:
        limiter = limiter_of()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            raise error

        with pytest.raises(type(error)):
            await run(behind(limiter, app))

        assert await left(limiter) == 9

    async def test_nor_does_any_exception_after_it(self) -> None:
        limiter = limiter_of()

        async def read(scope: Scope, receive: Receive, send: Send) -> None:
            assert await receive() == GONE
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await run(behind(limiter, read), GONE)

        assert await left(limiter) == 9

    async def test_nor_does_a_listed_status_after_it(self) -> None:
        limiter = limiter_of()

        async def render(request: Request) -> Response:
            assert await request.is_disconnected()
            return PlainTextResponse("nobody waits for this", 500)

        await run(starlette(limiter, render), GONE)

        assert await left(limiter) == 9

    async def test_nor_does_a_handler_that_is_cancelled(self) -> None:
        limiter = limiter_of()
        entered = asyncio.Event()

        async def wait(scope: Scope, receive: Receive, send: Send) -> None:
            entered.set()
            await receive()
            await receive()

        call = asyncio.create_task(run(behind(limiter, wait)))
        await entered.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

        assert await left(limiter) == 9

    async def test_client_that_goes_after_the_start_pays(self) -> None:
        limiter = limiter_of()

        async def stream(scope: Scope, receive: Receive, send: Send) -> None:
            await send(start(200))
            assert await receive() == GONE
            raise ConnectionResetError

        with pytest.raises(ConnectionResetError):
            await run(behind(limiter, stream), GONE)

        assert await left(limiter) == 9


class TestSlots:
    async def test_slot_is_held_until_the_answer_ends_and_free_before_its_last_byte(self) -> None:
        limiter = limiter_of(SLOTS)
        there: list[int] = []

        async def sending(message: Message) -> None:
            there.append(await running(limiter))

        chunk = {"type": "http.response.body", "body": b"x", "more_body": True}
        await run(behind(limiter, answering(start(), chunk, chunk, DONE)), sending=sending)

        assert there == [1, 1, 1, 0]

    @pytest.mark.parametrize(
        ("messages", "method", "there"),
        [
            # What a client has read in full is over for it, whatever is sent behind it.
            ([start(200, (b"Content-Length", b"2")), b"x", b"y", b""], "POST", [1, 1, 0, 0]),
            ([start(200, (b"content-length", b"9")), b"x", b"y", b""], "POST", [1, 1, 1, 0]),
            ([start(200, (b"content-length", b"?")), b"x", b"y", b""], "POST", [1, 1, 1, 0]),
            ([start(200, (b"content-length", b"0")), b""], "POST", [0, 0]),
            ([start(204), b""], "POST", [0, 0]),
            ([start(304), b""], "GET", [0, 0]),
            ([start(200, (b"content-length", b"2")), b""], "HEAD", [0, 0]),
            ([start(200), {"type": "http.response.pathsend", "path": "/x"}], "GET", [1, 0]),
            ([start(200), {"type": "http.response.zerocopysend", "file": 3}], "GET", [1, 0]),
            ([start(200, (b"content-length", b"9")), PART_OF_A_FILE, b""], "GET", [1, 1, 0]),
        ],
    )
    async def test_slot_is_free_before_the_client_has_all_of_the_answer(
        self, messages: list[Any], method: str, there: list[int]
    ) -> None:
        limiter = limiter_of(SLOTS)
        seen: list[int] = []

        async def sending(message: Message) -> None:
            seen.append(await running(limiter))

        answer = [
            {"type": "http.response.body", "body": one, "more_body": bool(one)}
            if isinstance(one, bytes)
            else one
            for one in messages
        ]
        await run(behind(limiter, answering(*answer)), sending=sending, method=method)

        assert seen == there

    async def test_slot_is_free_before_the_answer_to_an_exception(self) -> None:
        limiter = limiter_of(SLOTS)
        seen = []

        async def crash(scope: Scope, receive: Receive, send: Send) -> None:
            raise ZeroDivisionError

        async def in_front(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await behind(limiter, crash)(scope, receive, send)
            except ZeroDivisionError:
                seen.append(await running(limiter))

        await run(in_front)

        assert seen == [0]

    async def test_slot_is_free_before_the_answer_to_a_denied_that_a_handler_raises(self) -> None:
        limiter = limiter_of(SLOTS)
        seen = []

        async def sending(message: Message) -> None:
            seen.append((message["type"], await running(limiter)))

        async def render(scope: Scope, receive: Receive, send: Send) -> None:
            limits: RequestLimits = scope["state"]["tieredlimit"]
            (await limits.take("image", 6)).raise_if_denied()

        await run(behind(limiter, render), sending=sending)

        assert seen[-1] == ("http.response.body", 0)

    async def test_slot_is_free_where_the_stream_breaks(self) -> None:
        limiter = limiter_of(SLOTS)

        async def crash(scope: Scope, receive: Receive, send: Send) -> None:
            await send(start())
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await run(behind(limiter, crash))
        await limiter.close()

        assert await running(limiter) == 0

    async def test_background_tasks_hold_no_slot(self) -> None:
        limiter = limiter_of(SLOTS)
        seen: list[int] = []

        async def later() -> None:
            seen.append(await running(limiter))

        async def render(request: Request) -> Response:
            return PlainTextResponse("done", background=BackgroundTask(later))

        await post(starlette(limiter, render))

        assert seen == [0]

    async def test_detached_lease_is_left_alone(self) -> None:
        limiter = limiter_of(SLOTS)
        tokens = []

        async def render(request: Request) -> Response:
            decision = request.state.tieredlimit.decisions["video"]
            tokens.append(decision.lease.detach())
            return JSONResponse({"job": 1}, 202)

        app = starlette(limiter, render)
        answers = [await post(app), await post(app)]
        after = await running(limiter)
        await limiter.leases.release(tokens[0])

        assert [one.status_code for one in answers] == [202, 429]
        assert (after, await running(limiter)) == (1, 0)

    async def test_slot_that_a_handler_takes_is_released_as_well(self) -> None:
        limiter = limiter_of(SLOTS, routes=[])
        seen = []

        async def render(request: Request) -> Response:
            await request.state.tieredlimit.take("video")
            seen.append(await running(limiter))
            return PlainTextResponse("done")

        await post(starlette(limiter, render))

        assert (seen, await running(limiter)) == ([1], 0)

    async def test_slot_that_is_taken_after_the_end_is_released_at_once(self) -> None:
        limiter = limiter_of(SLOTS, routes=[])
        late: list[asyncio.Task[Decision]] = []
        over = asyncio.Event()

        async def take(limits: RequestLimits) -> Decision:
            await over.wait()
            return await limits.take("video")

        async def render(request: Request) -> Response:
            late.append(asyncio.create_task(take(request.state.tieredlimit)))
            return PlainTextResponse("done")

        await post(starlette(limiter, render))
        over.set()
        decision = await late[0]
        await limiter.close()

        assert decision.allowed
        assert await running(limiter) == 0

    async def test_two_doors_free_a_slot_at_the_end_of_the_answer(self) -> None:
        limiter = limiter_of(SLOTS)
        seen: list[int] = []

        async def sending(message: Message) -> None:
            seen.append(await running(limiter))

        chunk = {"type": "http.response.body", "body": b"xx", "more_body": True}
        answer = answering(start(200, (b"content-length", b"4")), chunk, chunk, DONE)
        await run(behind(limiter, behind(limiter, answer)), sending=sending)

        assert seen == [1, 1, 0, 0]


class Unasked(MemoryBackend):
    """Be a store that is not asked for decisions now, and would be waited for very long."""

    timeout = 10_000.0

    def __init__(self) -> None:
        super().__init__(clock=Clock())
        self.breakers = [Breaker()]
        self.breakers[0].failed("the store is down", FAILURES)


async def test_answer_does_not_wait_for_a_store_that_is_not_asked_for_decisions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limiter = Limiter(policy(SLOTS), Unasked())
    back = asyncio.Event()

    async def once_it_is_back(*asked: Any) -> Any:
        await back.wait()
        return asked[-1]

    monkeypatch.setattr(limiter, "refund", once_it_is_back)
    monkeypatch.setattr(MemoryHolds, "release", once_it_is_back)

    async with asyncio.timeout(DEADLINE):
        sent = await run(behind(limiter, answering(start(500), DONE)))
    back.set()
    await limiter.close()

    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


class TestCostsInTheBody:
    async def test_handler_takes_what_the_body_says(self) -> None:
        limiter = limiter_of(routes=[])

        async def render(request: Request) -> Response:
            seconds = (await request.json())["seconds"]
            decision = await request.state.tieredlimit.take("video", cost=seconds)
            return decision.response() if not decision.allowed else PlainTextResponse("done")

        async with client_of(starlette(limiter, render)) as client:
            answers = [await client.post("/videos", json={"seconds": s}) for s in (7, 4, 3)]

        assert [one.status_code for one in answers] == [200, 429, 200]
        assert answers[0].headers["ratelimit"] == '"video-hour";r=3;t=360'
        assert answers[1].headers["retry-after"] == "360"
        assert await left(limiter) == 0

    async def test_handler_reserves_and_settles(self) -> None:
        limiter = limiter_of(SLOTS, routes=[])
        seen = []

        async def render(request: Request) -> Response:
            reservation = await request.state.tieredlimit.reserve("video", 600)
            seen.append((await left(limiter), await running(limiter)))
            settled = await reservation.settle(20)
            return JSONResponse({"settled": settled})

        answer = await post(starlette(limiter, render))

        assert answer.json() == {"settled": True}
        assert seen == [(400, 1)]
        assert (await left(limiter), await running(limiter)) == (980, 0)

    @pytest.mark.fault("A3")
    async def test_reservation_that_a_handler_enters_is_charged_once(self) -> None:
        limiter = limiter_of(SLOTS, routes=[])
        seen = []

        async def render(request: Request) -> Response:
            async with await request.state.tieredlimit.reserve("video", 600) as reservation:
                seen.append((await left(limiter), await running(limiter)))
                await reservation.settle(20)
            seen.append((await left(limiter), await running(limiter)))
            return PlainTextResponse("done")

        answer = await post(starlette(limiter, render))

        assert answer.status_code == 200
        assert seen == [(400, 1), (980, 0)]

    async def test_reservation_is_denied_as_anything_is(self) -> None:
        limiter = limiter_of(routes=[])

        async def render(request: Request) -> Response:
            await request.state.tieredlimit.reserve("video", 11)
            return PlainTextResponse("done")

        answer = await post(starlette(limiter, render))

        assert (answer.status_code, answer.json()["reason"]) == (429, "quota")

    async def test_reserving_what_the_route_has_charged_is_refused(self) -> None:
        limiter = limiter_of()
        told = []

        async def render(request: Request) -> Response:
            try:
                await request.state.tieredlimit.reserve("video", 5)
            except ValueError as exc:
                told.append(str(exc))
            return PlainTextResponse("done")

        await post(starlette(limiter, render))

        assert '"video" was charged in this request already' in told[0]
        assert await left(limiter) == 9

    async def test_of_two_reservations_at_once_one_is_refused(self) -> None:
        async def slow(connection: HTTPConnection) -> Account:
            await asyncio.sleep(0)
            return ANN

        limiter = limiter_of(routes=[])
        answers: list[Any] = []

        async def render(scope: Scope, receive: Receive, send: Send) -> None:
            limits: RequestLimits = scope["state"]["tieredlimit"]
            both = (limits.reserve("video", 3), limits.reserve("video", 3))
            answers.extend(await asyncio.gather(*both, return_exceptions=True))

        await run(TieredLimitMiddleware(render, limiter=limiter, identify=slow))

        assert "was charged in this request already" in str(answers[1])
        assert await left(limiter) == 7

    @pytest.mark.fault("E4")
    async def test_reserving_for_nobody_knows_whom_is_an_outage_and_no_500(self) -> None:
        async def fail(connection: HTTPConnection) -> Account:
            raise OSError("the database is down")

        limiter = limiter_of(routes=[], outage="deny")

        async def render(request: Request) -> Response:
            await request.state.tieredlimit.reserve("video", 3)
            return PlainTextResponse("done")

        app = TieredLimitMiddleware(
            Route("/videos", render, methods=["POST"]), limiter=limiter, identify=fail
        )
        answer = await post(app)

        assert (answer.status_code, answer.json()["reason"]) == (503, "outage")

    @pytest.mark.parametrize("feature", ["movie", None, 5, ["video"], {"video": 1}])
    async def test_reserving_what_is_no_feature_is_a_usage_error(self, feature: Any) -> None:
        limiter = limiter_of(routes=[])

        async def render(request: Request) -> Response:
            try:
                await request.state.tieredlimit.reserve(feature, 3)
            except ValueError as exc:
                return PlainTextResponse(str(exc), 400)
            return PlainTextResponse("done")

        answer = await post(starlette(limiter, render))

        assert answer.status_code == 400
        assert "feature" in answer.text


class TestDenials:
    async def test_no_slot_left(self) -> None:
        limiter = limiter_of(SLOTS)
        await limiter.take(ANN, "video")

        async def render(request: Request) -> Response:
            raise AssertionError

        answer = await post(starlette(limiter, render))
        problem = answer.json()

        assert answer.status_code == 429
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["cache-control"] == "no-store"
        assert not {"retry-after", "ratelimit", "ratelimit-policy"} & answer.headers.keys()
        assert (problem["type"], problem["reason"]) == (QUOTA_EXCEEDED, "concurrency")
        assert (problem["violated-policies"], problem["retry_after"]) == (["video-hour"], None)
        assert problem["detail"] == "As many jobs of video are running as may at once."
        assert await left(limiter) == 999

    async def test_pool_is_exhausted(self) -> None:
        limiter = limiter_of(pool={"rate": "60/hour", "leave": {"everyone": 50}})
        for i in range(10):
            await limiter.take(Account(f"u{i}"), "video")

        async def render(request: Request) -> Response:
            raise AssertionError

        answer = await post(starlette(limiter, render))
        problem = answer.json()

        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "60"
        assert not {"ratelimit", "ratelimit-policy"} & answer.headers.keys()
        assert (problem["type"], problem["reason"]) == (REDUCED, "pool")
        assert (problem["violated-policies"], problem["retry_after"]) == ([], 60)
        assert problem["detail"] == "video is busy right now. Try again in 1 minute."
        assert await left(limiter) == 10

    async def test_pool_has_no_slot_left(self) -> None:
        pool = {"rate": "60/hour", "concurrency": 1, "lease": "1 minute"}
        limiter = limiter_of(pool=pool)
        await limiter.take(Account("ben"), "video")

        async def render(request: Request) -> Response:
            raise AssertionError

        answer = await post(starlette(limiter, render))
        problem = answer.json()

        assert answer.status_code == 429
        assert not {"retry-after", "ratelimit", "ratelimit-policy"} & answer.headers.keys()
        assert (problem["type"], problem["reason"]) == (REDUCED, "pool")
        assert problem["detail"] == "video is busy right now. Please try again in a moment."
        assert await left(limiter) == 10

    async def test_cost_that_never_fits_the_pool(self) -> None:
        limiter = limiter_of("100/hour", routes={"POST /videos": 20}, pool={"rate": "10/hour"})

        async def render(request: Request) -> Response:
            raise AssertionError

        answer = await post(starlette(limiter, render))

        assert (answer.status_code, answer.json()["reason"]) == (429, "pool")
        assert "retry-after" not in answer.headers
        assert await left(limiter) == 100

    def test_openapi_document_tells_of_them(self) -> None:
        app = FastAPI()
        limiter = limiter_of(SLOTS)

        @app.post("/render")
        async def render(decision: Decision = Depends(limited("video"))) -> str:  # noqa: B008 -- FastAPI's way
            return "done"

        document_denials(app, limiter)
        document = app.openapi()

        denied = document["paths"]["/render"]["post"]["responses"]["429"]
        reasons = document["components"]["schemas"]["TieredLimitProblem"]["properties"]["reason"]
        assert "slot" in denied["description"]
        assert {"pool", "concurrency"} <= set(reasons["enum"])


class TestWebSockets:
    def app(self, limiter: Limiter, handler: Callable[[WebSocket], Awaitable[None]]) -> Starlette:
        limits = Middleware(TieredLimitMiddleware, limiter=limiter, identify=identify)
        return Starlette(routes=[WebSocketRoute("/ws", handler)], middleware=[limits])

    async def test_socket_holds_its_slot_until_it_closes(self) -> None:
        limiter = limiter_of(SLOTS)

        async def echo(socket: WebSocket) -> None:
            await socket.accept()
            async for text in socket.iter_text():
                await socket.send_text(text)

        with serve(self.app(limiter, echo)) as url:
            where = url.replace("http", "ws") + "/ws"
            async with connect(where) as socket:
                await socket.send("hello")
                assert await socket.recv() == "hello"
                during = await running(limiter)
                with pytest.raises(InvalidStatus) as refused:
                    await connect(where)
            await poll_until(limiter, 0)
            async with connect(where) as socket:
                await socket.send("again")
                again = await socket.recv()

        assert (during, again) == (1, "again")
        assert refused.value.response.status_code == 429
        assert json.loads(refused.value.response.body or b"")["reason"] == "concurrency"

    @pytest.mark.parametrize(("status", "remaining"), [(403, 10), (404, 9)])
    async def test_socket_that_is_closed_before_its_handshake_counts_as_403(
        self, status: int, remaining: int
    ) -> None:
        limiter = limiter_of(refund_on=[status])
        closing = answering({"type": "websocket.close", "code": 1000})

        await run(behind(limiter, closing), type="websocket", path="/ws")

        assert await left(limiter) == remaining

    async def test_socket_that_is_closed_after_its_handshake_costs(self) -> None:
        limiter = limiter_of(refund_on=[403])
        messages = {"type": "websocket.accept"}, {"type": "websocket.close", "code": 1000}

        await run(behind(limiter, answering(*messages)), type="websocket", path="/ws")

        assert await left(limiter) == 9

    async def test_slot_is_free_before_the_client_hears_of_the_close(self) -> None:
        limiter = limiter_of(SLOTS)
        seen = []

        async def sending(message: Message) -> None:
            seen.append((message["type"], await running(limiter)))

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.send", "text": "x"})
            await send({"type": "websocket.close", "code": 1000})

        await run(behind(limiter, app), type="websocket", path="/ws", sending=sending)

        assert seen == [("websocket.accept", 1), ("websocket.send", 1), ("websocket.close", 0)]

    @pytest.mark.fault("H3")
    async def test_socket_whose_client_has_gone_costs_and_is_free(self) -> None:
        limiter = limiter_of(SLOTS)
        gone: Message = {"type": "websocket.disconnect", "code": 1001}

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await receive()
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await run(
                behind(limiter, app), {"type": "websocket.connect"}, gone,
                type="websocket", path="/ws",
            )  # fmt: skip

        assert (await left(limiter), await running(limiter)) == (999, 0)


async def poll_until(limiter: Limiter, count: int) -> None:
    async with asyncio.timeout(DEADLINE):
        while await running(limiter) != count:  # noqa: ASYNC110 -- a server's thread changes it
            await asyncio.sleep(0.005)


async def passed_on(request: Request, call_next: Any) -> Response:
    response: Response = await call_next(request)
    return response


@pytest.mark.redis
class TestRealServers:
    """Uvicorn and Redis, and one slot for the client."""

    def app(
        self, url: str, handler: Any, *inner: Middleware, lease: str = "1 minute"
    ) -> tuple[Starlette, Limiter]:
        quota = {"rate": "1000/day", "concurrency": 1, "lease": lease}
        limiter = Limiter(policy(quota), RedisBackend.from_url(url, timeout=PATIENT))
        return starlette(limiter, handler, *inner), limiter

    @pytest.mark.parametrize("http", ["httptools", "h11"])
    def test_client_that_comes_back_at_once_is_never_denied(
        self, redis_url: str, http: str
    ) -> None:
        async def render(request: Request) -> Response:
            kind = request.headers["x-kind"]
            if kind == "stream":
                return StreamingResponse(_each([b"one", b"two"]))
            if kind == "error":
                raise ZeroDivisionError
            if kind == "empty":
                return Response(status_code=204)
            return PlainTextResponse("done")

        # Which hands on a body in parts, and its end after the last one.
        inner = Middleware(BaseHTTPMiddleware, dispatch=passed_on)
        app, _ = self.app(redis_url, render, inner)
        kinds = ["plain", "stream", "error", "empty"]
        answers = []
        # A connection each: the next request does not wait for the end of this one.
        limits = httpx.Limits(max_keepalive_connections=0)
        with serve(app, http=http) as url, httpx.Client(limits=limits) as client:
            for i in range(200):
                answer = client.post(f"{url}/videos", headers={"x-kind": kinds[i % 4]})
                answers.append(answer.status_code)

        assert [answers[i::4] for i in range(4)] == [
            [200] * 50, [200] * 50, [500] * 50, [204] * 50,
        ]  # fmt: skip

    async def test_response_longer_than_its_lease_keeps_its_slot(
        self, redis_server: RedisServer, redis_url: str
    ) -> None:
        go_on = threading.Event()

        async def render(request: Request) -> Response:
            async def chunks() -> AsyncIterator[bytes]:
                yield b"first"
                while not go_on.is_set():  # noqa: ASYNC110 -- another thread sets it
                    await asyncio.sleep(0.005)
                yield b"last"

            return StreamingResponse(chunks())

        app, _ = self.app(redis_url, render, lease="1 second")
        seen = set()
        with serve(app) as url:
            async with httpx.AsyncClient(base_url=url) as client:
                async with client.stream("POST", "/videos") as response:
                    until = now_of(redis_server) + 2_500_000
                    while now_of(redis_server) < until:
                        seen.add(held(redis_server, KEY))
                        await asyncio.sleep(0.005)
                    denied = await client.post("/videos")
                    go_on.set()
                    body = await response.aread()
                again = await client.post("/videos")

        assert seen == {1}
        assert (denied.status_code, denied.json()["reason"]) == (429, "concurrency")
        assert (body, again.status_code) == (b"firstlast", 200)

    @pytest.mark.fault("E9", "H3")
    async def test_client_that_leaves_in_mid_stream_frees_its_slot_and_pays(
        self, redis_server: RedisServer, redis_url: str
    ) -> None:
        async def render(request: Request) -> Response:
            async def endless() -> AsyncIterator[bytes]:
                while True:
                    yield b"x" * 1000
                    await asyncio.sleep(0.001)

            return StreamingResponse(endless())

        app, limiter = self.app(redis_url, render)
        with serve(app) as url:
            async with httpx.AsyncClient(base_url=url) as client:
                async with client.stream("POST", "/videos") as response:
                    async for _ in response.aiter_raw():
                        break
                    during = held(redis_server, KEY)
                async with asyncio.timeout(DEADLINE):
                    while held(redis_server, KEY):  # noqa: ASYNC110 -- a server's
                        await asyncio.sleep(0.005)
        async with limiter:
            charged = 1000 - (await left(limiter) or 0)

        assert (during, charged) == (1, 1)

    @pytest.mark.fault("E9", "H3")
    async def test_client_that_leaves_before_the_answer_frees_its_slot_and_pays(
        self, redis_server: RedisServer, redis_url: str
    ) -> None:
        entered = threading.Event()

        async def render(request: Request) -> Response:
            entered.set()
            while not await request.is_disconnected():  # noqa: ASYNC110 -- how one is to ask
                await asyncio.sleep(0.005)
            raise ZeroDivisionError  # as what it works with might

        app, limiter = self.app(redis_url, render)
        with serve(app) as url:
            async with httpx.AsyncClient(base_url=url) as client:
                call = asyncio.create_task(client.post("/videos"))
                async with asyncio.timeout(DEADLINE):
                    while not entered.is_set():  # noqa: ASYNC110 -- another thread sets it
                        await asyncio.sleep(0.005)
                during = held(redis_server, KEY)
                call.cancel()
                async with asyncio.timeout(DEADLINE):
                    while held(redis_server, KEY):  # noqa: ASYNC110 -- a server's
                        await asyncio.sleep(0.005)
                await asyncio.gather(call, return_exceptions=True)
        async with limiter:
            charged = 1000 - (await left(limiter) or 0)

        assert (during, charged) == (1, 1)

    async def test_failed_render_costs_nothing_over_redis_as_well(self, redis_url: str) -> None:
        async def crash(request: Request) -> Response:
            raise ZeroDivisionError

        async def fail(request: Request) -> Response:
            return PlainTextResponse("failed", 503)

        for handler in (crash, fail):
            app, limiter = self.app(redis_url, handler)
            async with limiter:
                await post(app)
                assert (await left(limiter), await running(limiter)) == (1000, 0)


async def _each(chunks: list[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk

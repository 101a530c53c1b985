"""docs/clients.md: the clients of the page, at the media API, over real HTTP, never waiting."""

from __future__ import annotations

import asyncio
import heapq
import json
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai._base_client
import pytest
import requests
import urllib3.util.retry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.client import BackingOff, retry_after
from examples.media_api import ACCOUNTS, LONG_AGO, NOW, create_app, make_video
from tests.contract import Clock
from tests.serving import serve
from tieredlimit import Account, Limiter, TieredLimitMiddleware
from tieredlimit.backends import MemoryBackend
from tieredlimit.identity import api_key

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "clients.md").read_text("utf-8")
BLOCKS = {
    block.split("\n", 1)[0]: block
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
}
SECOND_US = 1_000_000
NOWHERE = "redis://127.0.0.1:1/0"


class Api:
    """The media API, served on the loopback interface, with a clock that only waiting moves."""

    def __init__(self) -> None:
        self.clock = Clock(int(NOW.timestamp() * SECOND_US))
        self.limiter = Limiter(ROOT / "examples/policy.toml", MemoryBackend(clock=self.clock))
        self.requests = 0
        self.slept: list[float] = []
        self._app = create_app(self.limiter)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.requests += scope["type"] == "http"
        await self._app(scope, receive, send)

    @property
    def now(self) -> datetime:
        return datetime.fromtimestamp(self.clock() / SECOND_US, UTC)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.clock.advance(round(seconds * SECOND_US))

    async def sleep_async(self, seconds: float) -> None:
        self.sleep(seconds)

    async def close_video(self, **given: Any) -> None:
        await self.limiter.control.close("video", everyone=True, **given)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Api, str]]:
    api = Api()
    with serve(api) as url:
        yield api, url


@pytest.fixture
async def api(served: tuple[Api, str], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    api, _ = served
    api.requests, api.slept = 0, []
    # A day later all buckets are full, whoever used them before; nova stays as young as she is.
    api.clock.advance(86_400 * SECOND_US)
    nova = replace(ACCOUNTS["key-nova"], created_at=api.now - timedelta(days=2))
    monkeypatch.setitem(ACCOUNTS, "key-nova", nova)
    yield api
    if await api.limiter.control.overrides():
        await api.limiter.control.undo()


@pytest.fixture
def url(served: tuple[Api, str]) -> str:
    return served[1]


def key(name: str) -> dict[str, str]:
    return {"X-Api-Key": f"key-{name}"}


def block(label: str, **given: Any) -> dict[str, Any]:
    """Run a block of the page, and return what it defines."""
    exec(compile(BLOCKS[f"# {label}"], f"{label} of clients.md", "exec"), given)
    return given


def test_page_has_no_code_but_what_the_tests_run() -> None:
    labels = {label for label in BLOCKS if label.startswith("# ")}
    fences = re.findall(r"^```(.+)$", PAGE, re.MULTILINE)

    assert labels == {"# where you stand", "# requests", "# openai", "# the field"}
    assert sorted(fences) == ["http"] + ["python"] * 5


# What an answer says


async def test_table_of_the_page_holds_every_denial_and_no_other() -> None:
    rows = re.findall(r"^\| (\d+) \| (`[^|]*`) \| (seconds|none) \|", PAGE, re.MULTILINE)
    told = {
        (int(status), reason, when == "seconds")
        for status, reasons, when in rows
        for reason in re.findall(r"`(\w+)`", reasons)
    }
    policy: dict[str, Any] = {
        "features": {
            "image": {"routes": {"POST /image": 1, "POST /huge": 9}},
            "pooled": {"routes": ["POST /pooled"], "pool": {"rate": "1/minute"}},
            "crowded": {
                "routes": ["POST /crowded"],
                "pool": {"rate": "9/minute", "concurrency": 1, "lease": "1 minute"},
            },
            "job": {"routes": ["POST /job"]},
            "zero": {"routes": ["POST /zero"]},
            "until": {"routes": ["POST /until"]},
            "closed": {"routes": ["POST /closed"]},
        },
        "defaults": {"quotas": dict.fromkeys(("pooled", "crowded", "until", "closed"), "9/day")},
        "tiers": {
            "all": {
                "quotas": {
                    "image": "1/minute",
                    "zero": 0,
                    "job": {"rate": "9/day", "concurrency": 1, "lease": "1 minute"},
                }
            }
        },
    }
    unreachable = {
        "features": {"video": {"routes": ["POST /video"], "outage": "deny"}},
        "tiers": {"all": {"quotas": {"video": "1/day"}}},
    }

    asked = [("image", 1), ("image", 9), *((feature, 1) for feature in policy["features"])]
    asked.append(("pooled", 2))  # more than its pool ever lets through

    async with Limiter(policy) as limiter, Limiter(unreachable, NOWHERE) as lost:
        end = datetime.now(UTC) + timedelta(hours=1)
        await limiter.control.close("until", everyone=True, until=end)
        await limiter.control.close("closed", everyone=True)
        for feature in ("image", "pooled", "crowded", "job"):
            await limiter.take(Account("u"), feature)
        decisions = [await limiter.take(Account("u"), feature, cost) for feature, cost in asked]
        decisions.append(await lost.take(Account("u"), "video"))

    answers = [(decision, decision.response()) for decision in decisions]
    seen = {(a.status_code, d.reason, "retry-after" in a.headers) for d, a in answers}
    assert seen == told
    assert {a.media_type for _, a in answers} == {"application/problem+json"}
    assert {d.reason for d, a in answers if "ratelimit" in a.headers} == {"quota", "zero"}
    types = dict(re.findall(r"^\| `([a-z]+:\S+)` \| (`[^|]*`) \| [^|]*\|$", PAGE, re.MULTILINE))
    assert {(json.loads(bytes(a.body))["type"], d.reason) for d, a in answers} == {
        (kind, reason) for kind in types for reason in re.findall(r"`(\w+)`", types[kind])
    }


async def test_only_the_sentence_tells_a_full_pool_from_one_that_is_too_small() -> None:
    slots = {"rate": "9/minute", "concurrency": 1, "lease": "1 minute"}
    policy = {
        "features": {"video": {"pool": slots}},
        "tiers": {"all": {"quotas": {"video": "20/day"}}},
    }
    async with Limiter(policy) as limiter:
        await limiter.take(Account("ada"), "video")

        busy, small = [await limiter.take(Account("u"), "video", cost) for cost in (1, 10)]

    told, said = [json.loads(bytes(one.response().body)) for one in (busy, small)]
    assert told.pop("detail") != said.pop("detail")
    assert told == said
    assert said["retry_after"] is None


async def test_fields_of_the_page_are_what_the_api_sends(api: Api, url: str) -> None:
    shown = re.findall(r"^```http\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0]
    where = block("where you stand")["remaining"]
    async with httpx.AsyncClient(base_url=url, headers=key("ada")) as client:
        for _ in range(12):
            await client.post("/v1/images")
        api.clock.advance(SECOND_US)
        answer = await client.post("/v1/images")

    fields = dict(line.split(": ", 1) for line in shown.splitlines())
    assert {name: answer.headers[name] for name in fields} == fields
    assert where(answer) == {"image-minute": (7, 2)}


async def test_where_you_stand_reads_several_quotas_and_none(api: Api, url: str) -> None:
    where = block("where you stand")["remaining"]
    async with httpx.AsyncClient(base_url=url) as client:
        several = await client.post("/v1/images", headers=key("nova"))
        zero = await client.post("/v1/videos", headers=key("nova"))
        unlimited = await client.post("/v1/images", headers=key("grace"))

    assert where(several) == {"image-minute": (4, 12), "image-day": (49, 1728)}
    assert where(zero) == {"video": (0, None)}
    assert where(unlimited) == {}


async def test_client_that_keeps_the_pace_of_the_policy_is_never_denied(api: Api, url: str) -> None:
    statuses = set()
    left = 1
    async with httpx.AsyncClient(base_url=url, headers=key("ada")) as client:
        for _ in range(60):
            if left == 0:
                api.sleep(60 / 20)
            answer = await client.post("/v1/images")
            statuses.add(answer.status_code)
            ((left, _),) = block("where you stand")["remaining"](answer).values()

    assert statuses == {201}
    assert len(api.slept) == 40


# httpx


def test_client_of_the_page_is_the_example() -> None:
    example = (ROOT / "examples" / "client.py").read_text("utf-8")

    assert example in BLOCKS.values()


def as_written(api: Api, url: str, name: str) -> httpx.AsyncClient:
    transport = BackingOff(sleep=api.sleep_async)
    return httpx.AsyncClient(transport=transport, base_url=url, headers=key(name))


async def test_used_up_quota_is_waited_for_and_no_longer_than_told_and_a_little(
    api: Api, url: str
) -> None:
    async with as_written(api, url, "ada") as client:
        answers = [await client.post("/v1/images") for _ in range(21)]

    assert {answer.status_code for answer in answers} == {201}
    assert api.requests == 22
    assert len(api.slept) == 1
    assert 3 <= api.slept[0] <= 4


@pytest.mark.parametrize(
    ("name", "path", "status"), [("nova", "/v1/videos", 403), ("ada", "/v1/videos/hd", 429)]
)
async def test_what_never_fits_is_sent_once(
    api: Api, url: str, name: str, path: str, status: int
) -> None:
    async with as_written(api, url, name) as client:
        answer = await client.post(path)

    assert answer.status_code == status
    assert answer.json()["retry_after"] is None
    assert (api.requests, api.slept) == (1, [])


async def test_closed_feature_is_asked_for_again_once_it_is_open(api: Api, url: str) -> None:
    end = api.now + timedelta(seconds=30)
    await api.close_video(until=end)

    async with as_written(api, url, "ada") as client:
        answer = await client.post("/v1/videos")

    assert answer.status_code == 202
    assert (api.requests, len(api.slept)) == (2, 1)
    assert api.now >= end


@pytest.mark.parametrize("closed_for", [timedelta(seconds=61), None], ids=["a minute", "open end"])
async def test_what_is_closed_for_longer_than_patience_is_given_to_the_caller(
    api: Api, url: str, closed_for: timedelta | None
) -> None:
    await api.close_video(until=closed_for and api.now + closed_for)

    async with as_written(api, url, "ada") as client:
        answer = await client.post("/v1/videos")

    assert answer.json()["reason"] == "closed"
    assert (api.requests, api.slept) == (1, [])


async def test_outage_is_asked_again_within_seconds_and_so_often_at_most(api: Api) -> None:
    async with Limiter(ROOT / "examples/policy.toml", NOWHERE) as limiter:
        below = httpx.ASGITransport(create_app(limiter))
        transport = BackingOff(below, attempts=3, sleep=api.sleep_async)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.post("/v1/videos", headers=key("ada"))

    assert answer.status_code == 503
    assert len(api.slept) == 2
    assert all(1 <= seconds <= 6 for seconds in api.slept)


async def test_slot_is_waited_for_though_nobody_knows_until_when(api: Api) -> None:
    policy = {
        "features": {"video": {"routes": ["POST /v1/videos"]}},
        "tiers": {
            "all": {"quotas": {"video": {"rate": "9/day", "concurrency": 1, "lease": "1 hour"}}}
        },
    }
    slept = []

    async with Limiter(policy) as limiter:
        held = (await limiter.take(Account("ada"), "video")).lease
        assert held is not None

        async def sleep(seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == 2:
                await held.release()

        app = TieredLimitMiddleware(
            Starlette(routes=[Route("/v1/videos", make_video, methods=["POST"])]),
            limiter=limiter,
            identify=lambda _: Account("ada"),
        )
        transport = BackingOff(httpx.ASGITransport(app), sleep=sleep)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.post("/v1/videos")

    assert answer.status_code == 202
    assert len(slept) == 2
    assert all(1 <= seconds <= 31 for seconds in slept)


async def test_repetitions_stop_once_they_are_one_request_in_ten() -> None:
    sent = 0

    async def deny(_: httpx.Request) -> httpx.Response:
        nonlocal sent
        sent += 1
        return httpx.Response(429, headers={"Retry-After": "1"})

    transport = BackingOff(httpx.MockTransport(deny), sleep=no_time)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        statuses = {(await client.get("/")).status_code for _ in range(100)}

    assert statuses == {429}
    assert 100 + 10 <= sent <= 100 + 10 + 100 / 10


async def no_time(seconds: float) -> None: ...


@pytest.mark.parametrize("told", [1, 9, 3600])
async def test_client_comes_back_later_than_told_and_never_earlier(told: int) -> None:
    slept = []

    async def deny(_: httpx.Request) -> httpx.Response:
        return httpx.Response(429, headers={"Retry-After": str(told)})

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    for _ in range(50):
        transport = BackingOff(httpx.MockTransport(deny), attempts=2, patience=10_000, sleep=sleep)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.get("/")

    assert len(slept) == 50
    assert len(set(slept)) > 40
    assert told <= min(slept) <= max(slept) <= told + max(1, told / 10)


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (500, {"Retry-After": "1"}, b""),
        (429, {"Retry-After": "soon"}, b""),
        (429, {"Retry-After": "-1"}, b""),
        (429, {}, b'{"reason": "concurrency"}'),
        (429, {"Content-Type": "application/problem+json"}, b"{"),
        (429, {"Content-Type": "application/problem+json"}, b"[]"),
        (429, {"Content-Type": "application/problem+json"}, b'{"reason": "quota"}'),
    ],
)
async def test_answers_that_ask_for_nothing_are_the_callers(
    status: int, headers: dict[str, str], body: bytes
) -> None:
    sent = []

    async def reply(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(status, headers=headers, content=body)

    transport = BackingOff(httpx.MockTransport(reply), sleep=no_time)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.post("/", content=b"a cat")

    assert (answer.status_code, answer.content) == (status, body)
    assert len(sent) == 1


async def test_body_that_is_made_while_it_is_sent_is_sent_once(api: Api, url: str) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"a cat"

    async with as_written(api, url, "ada") as client:
        for _ in range(20):
            await client.post("/v1/images")
        answer = await client.post("/v1/images", content=body())

    assert answer.status_code == 429
    assert (api.requests, api.slept) == (21, [])


# requests


@pytest.fixture
def session(api: Api, monkeypatch: pytest.MonkeyPatch) -> Iterator[requests.Session]:
    monkeypatch.setattr(
        urllib3.util.retry, "time", SimpleNamespace(sleep=api.sleep, time=time.time)
    )
    with block("requests")["session"] as session:
        session.trust_env = False
        session.headers.update(key("ada"))
        yield session


async def test_requests_waits_for_a_used_up_quota(
    api: Api, url: str, session: requests.Session
) -> None:
    statuses = {session.post(f"{url}/v1/images").status_code for _ in range(21)}

    assert statuses == {201}
    assert len(api.slept) == 1
    assert 3 <= api.slept[0] <= 4


async def test_requests_waits_for_a_closed_feature(
    api: Api, url: str, session: requests.Session
) -> None:
    end = api.now + timedelta(seconds=30)
    await api.close_video(until=end)

    answer = session.post(f"{url}/v1/videos")

    assert answer.status_code == 202
    assert len(api.slept) == 1
    assert api.now >= end


async def test_requests_gives_up_where_it_would_wait_for_too_long(
    api: Api, url: str, session: requests.Session
) -> None:
    await api.close_video(until=api.now + timedelta(minutes=5))

    answer = session.post(f"{url}/v1/videos")

    assert (answer.status_code, answer.json()["reason"]) == (403, "closed")
    assert (api.requests, api.slept) == (1, [])


@pytest.mark.parametrize(("name", "path"), [("nova", "/v1/videos"), ("ada", "/v1/videos/hd")])
async def test_requests_sends_what_never_fits_once(
    api: Api, url: str, session: requests.Session, name: str, path: str
) -> None:
    answer = session.post(f"{url}{path}", headers=key(name))

    assert answer.status_code in (403, 429)
    assert (api.requests, api.slept) == (1, [])


def test_requests_does_not_repeat_what_broke_off_in_the_middle() -> None:
    seen = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            while True:
                connection, _ = listener.accept()
                with connection:
                    seen.append(connection.recv(65536))
                if seen[-1] == b"that is all":
                    return

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        address = listener.getsockname()
        with block("requests")["session"] as session:
            session.trust_env = False
            with pytest.raises(requests.ConnectionError):
                session.post(f"http://127.0.0.1:{address[1]}/v1/videos")
        with socket.create_connection(address) as last:
            last.sendall(b"that is all")
        thread.join()

    assert len(seen) == 2


# OpenAI's SDK


STUDIO: dict[str, Any] = {
    "order": ["small", "banned", "everyone"],
    "features": {"image": {"routes": {"POST /v1/images/generations": 2}}},
    "tiers": {
        "small": {"when": {"plan": "small"}, "quotas": {"image": "1/minute"}},
        "banned": {
            "when": {"plan": "banned"},
            "quotas": {"image": 0},
            "messages": {"image": "No pictures on this plan."},
        },
        "everyone": {"quotas": {"image": "4/minute"}},
    },
}


class Studio:
    """An API in the form of OpenAI's, at which a picture costs two tokens."""

    def __init__(self, on_denied: Any = None) -> None:
        self.requests = 0
        self.slept: list[float] = []
        self.clock = Clock()
        self.limiter = Limiter(STUDIO, MemoryBackend(clock=self.clock))
        routes = [Route("/v1/images/generations", self.generate, methods=["POST"])]
        self._app = TieredLimitMiddleware(
            Starlette(routes=routes),
            limiter=self.limiter,
            identify=api_key(lambda name: Account(name, plan=name), scheme="Bearer"),
            on_denied=on_denied,
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.requests += scope["type"] == "http"
        await self._app(scope, receive, send)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.clock.advance(round(seconds * SECOND_US))

    @staticmethod
    async def generate(request: Request) -> JSONResponse:
        prompt = (await request.json())["prompt"]
        return JSONResponse({"created": 0, "data": [{"url": f"https://img.example/{prompt}"}]})


@contextmanager
def sdk(
    monkeypatch: pytest.MonkeyPatch, studio: Studio, plan: str
) -> Iterator[Callable[[str], str]]:
    slow = SimpleNamespace(sleep=studio.sleep, time=time.time)
    monkeypatch.setattr(openai._base_client, "time", slow)
    with serve(studio) as url:
        page = block("openai", base_url=f"{url}/v1")
        page["client"].api_key = plan
        with page["client"]:
            yield page["picture"]


def test_openais_sdk_waits_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    studio = Studio()

    with sdk(monkeypatch, studio, "plus") as picture:
        made = [picture(f"cat-{number}") for number in range(3)]

    assert made == [f"https://img.example/cat-{number}" for number in range(3)]
    assert studio.slept == [30]


def test_openais_sdk_does_not_repeat_a_403(monkeypatch: pytest.MonkeyPatch) -> None:
    studio = Studio()

    with sdk(monkeypatch, studio, "banned") as picture:
        told = picture("cat")

    assert told == "No pictures on this plan."
    assert (studio.requests, studio.slept) == (1, [])


async def test_openais_sdk_does_not_wait_for_what_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    studio = Studio()
    end = datetime.fromtimestamp(studio.clock() / SECOND_US + 10, UTC)
    await studio.limiter.control.close("image", everyone=True, until=end, message="Until six.")

    with sdk(monkeypatch, studio, "plus") as picture:
        told = picture("cat")

    assert told == "Until six."
    assert (studio.requests, studio.slept) == (1, [])


@pytest.mark.parametrize("field", [False, True], ids=["without", "with"])
def test_openais_sdk_repeats_what_never_fits_unless_the_field_says_not_to(
    monkeypatch: pytest.MonkeyPatch, field: bool
) -> None:
    studio = Studio(block("the field")["in_vain"] if field else None)

    with sdk(monkeypatch, studio, "small") as picture:
        told = picture("cat")

    assert told == "This request costs 2, more than image ever allows at once."
    assert studio.requests == (1 if field else 5)
    assert all(seconds < 8 for seconds in studio.slept)


def test_field_is_left_away_where_waiting_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    studio = Studio(block("the field")["in_vain"])

    with sdk(monkeypatch, studio, "plus") as picture:
        made = [picture("cat") for _ in range(3)]

    assert made == ["https://img.example/cat"] * 3
    assert studio.slept == [30]


@pytest.mark.parametrize(("told", "requests"), [(120, 2), (121, 1)])
def test_openais_sdk_waits_for_two_minutes_and_not_longer(
    monkeypatch: pytest.MonkeyPatch, told: int, requests: int
) -> None:
    studio = Studio()
    studio.limiter = Limiter(
        {
            "features": {"image": {"routes": ["POST /v1/images/generations"]}},
            "tiers": {"all": {"quotas": {"image": f"1/{told} seconds"}}},
        },
        MemoryBackend(clock=studio.clock),
    )
    studio._app.limiter = studio.limiter

    with sdk(monkeypatch, studio, "plus") as picture:
        picture("cat")
        studio.requests = 0
        picture("dog")

    assert studio.requests == requests
    assert studio.slept == [told] * (requests - 1)


# When a closed feature opens again

CLOSED_FOR, CLIENTS = 300, 500


class Crowd:
    """Let clients wait by a clock that jumps from one waking to the next."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._parked: asyncio.Queue[tuple[int, int, asyncio.Future[None]]] = asyncio.Queue()
        self._tasks: dict[int, asyncio.Task[httpx.Response]] = {}
        self._waking: list[tuple[int, int, asyncio.Future[None]]] = []

    async def sleep(self, number: int, seconds: float) -> None:
        until = self._clock() + round(seconds * SECOND_US)
        woken = asyncio.get_running_loop().create_future()
        self._parked.put_nowait((until, number, woken))
        await woken

    async def start(self, number: int, task: asyncio.Task[httpx.Response]) -> None:
        """Let one begin, until it waits or is done."""
        self._tasks[number] = task
        await self._until_it_waits(number)

    async def finish(self) -> list[httpx.Response]:
        """Let all of them come to their end, one waking after the other."""
        while self._waking:
            self._clock.now, number, woken = heapq.heappop(self._waking)
            woken.set_result(None)
            await self._until_it_waits(number)
        return [task.result() for task in self._tasks.values()]

    async def _until_it_waits(self, number: int) -> None:
        parked = asyncio.ensure_future(self._parked.get())
        await asyncio.wait({self._tasks[number], parked}, return_when=asyncio.FIRST_COMPLETED)
        if parked.done():
            heapq.heappush(self._waking, parked.result())
        parked.cancel()


async def test_no_stampede_when_a_closed_feature_opens_again(
    api: Api, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    random.seed(7)  # the jitter
    names = [f"crowd-{number}" for number in range(CLIENTS)]
    for name in names:
        account = Account(name, plan="free", created_at=LONG_AGO)
        monkeypatch.setitem(ACCOUNTS, f"key-{name}", account)
    begin = api.clock()
    end = begin + CLOSED_FOR * SECOND_US
    crowd = Crowd(api.clock)
    told: list[int] = []
    came: list[int] = []
    await api.close_video(until=api.now + timedelta(seconds=CLOSED_FOR))

    class Noting(httpx.AsyncBaseTransport):
        def __init__(self, below: httpx.AsyncBaseTransport) -> None:
            self._below = below

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            response = await self._below.handle_async_request(request)
            seconds = retry_after(response)
            if seconds is None:
                came.append(api.clock())
            else:
                told.append(api.clock() + seconds * SECOND_US)
            return response

    async with httpx.AsyncHTTPTransport() as wire:
        for number, name in enumerate(names):
            api.clock.now = begin + (end - begin) * number // CLIENTS

            def sleep(seconds: float, number: int = number) -> Any:
                return crowd.sleep(number, seconds)

            transport = BackingOff(Noting(wire), patience=2 * CLOSED_FOR, sleep=sleep)
            client = httpx.AsyncClient(transport=transport, base_url=url, headers=key(name))
            await crowd.start(number, asyncio.ensure_future(client.post("/v1/videos")))
        answers = await crowd.finish()

    assert {answer.status_code for answer in answers} == {202}
    assert api.requests == 2 * CLIENTS
    for instants in (told, came):
        assert len(instants) == CLIENTS
        assert min(instants) >= end
        assert max(Counter(at // SECOND_US for at in instants).values()) <= 50
    # A tenth of the closure, and the second to which Retry-After is rounded up.
    assert 0.9 * CLOSED_FOR / 10 <= (max(told) - end) / SECOND_US <= CLOSED_FOR / 10 + 1
    assert (max(came) - end) / SECOND_US > CLOSED_FOR / 10


async def test_account_is_told_the_same_instant_whenever_it_asks(api: Api, url: str) -> None:
    await api.close_video(until=api.now + timedelta(seconds=CLOSED_FOR))
    told = set()

    async with httpx.AsyncClient(base_url=url, headers=key("ada")) as client:
        for _ in range(5):
            answer = await client.post("/v1/videos")
            told.add(api.clock() + int(answer.headers["retry-after"]) * SECOND_US)
            api.clock.advance(7 * SECOND_US)

    assert len(told) == 1

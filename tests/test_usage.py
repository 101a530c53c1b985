"""What an account may still do, as a front end reads it, and nothing taken for the asking."""

from __future__ import annotations

import json
import re
from contextlib import asynccontextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import jsonschema
import pytest
from fastapi import FastAPI
from litestar import Litestar, asgi
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.routing import Mount, Route

from examples import usage_page
from tests.contract import START, Clock
from tests.serving import serve
from tests.test_readme import blocks
from tests.test_settling import push
from tieredlimit import (
    Account,
    BackendError,
    Denied,
    Limiter,
    TieredLimitMiddleware,
    stored,
    usage_app,
)
from tieredlimit.backends import Charge, Claimed, MemoryBackend, Reply
from tieredlimit.identity import api_key
from tieredlimit.testing import RecordingObserver, broken

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

PAGE = (Path(__file__).parent.parent / "docs" / "usage.md").read_text("utf-8")
EXAMPLE, SCHEMA = (json.loads(block) for block in blocks(PAGE, "json"))
NOW = datetime.fromtimestamp(START // 1_000_000, UTC)
HOUR = 3_600_000_000

POLICY: dict[str, Any] = {
    "order": ["new", "pro", "everyone"],
    "features": {
        "image": {"routes": ["POST /images"]},
        "video": {"routes": ["POST /videos"], "outage": "deny"},
        "audio": {"outage": "local", "pool": {"rate": "10/hour", "leave": {"new": "50%"}}},
        "render": {"pool": {"rate": "90/hour", "concurrency": 1, "lease": "1 hour"}},
        "page": {"routes": ["GET /usage"]},
    },
    "defaults": {
        "quotas": {
            "image": ["5/hour", "50/day"],
            "video": "2/hour",
            "audio": "9/hour",
            "render": "9/hour",
        }
    },
    "tiers": {
        "new": {
            "when": {"plan": "new"},
            "quotas": {"video": 0, "page": "unlimited"},
            "messages": {"video": {"en": "Not yet.", "fr": "Pas encore."}},
        },
        "pro": {
            "when": {"plan": "pro"},
            "quotas": {
                "image": "unlimited",
                "video": {"rate": "9/hour", "concurrency": 1, "lease": "1 hour", "per": "org"},
                "page": "unlimited",
            },
        },
        "everyone": {"quotas": {"page": "3/hour"}},
    },
}
ACCOUNTS = {
    "ada": Account("ada-with-a-secret-id", plan="new"),
    "pro": Account("pro", plan="pro", within={"org": "o7"}),
    "bob": Account("bob"),
}
OTHER = {"features": {"image": {}}, "tiers": {"all": {"quotas": {"image": "2/hour"}}}}
identify = api_key(ACCOUNTS.get)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limiter(clock: Clock) -> Limiter:
    return Limiter(POLICY, MemoryBackend(clock=clock))


@asynccontextmanager
async def asking(app: Any, name: str = "bob") -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, client=("192.0.2.1", 1))
    headers = {"x-api-key": name}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://test", headers=headers
    ) as client:
        yield client


async def usage(limiter: Limiter, name: str = "bob", **headers: str) -> dict[str, Any]:
    async with asking(usage_app(limiter, identify), name) as client:
        answer = await client.get("/", headers=headers)
    assert answer.status_code == 200
    document: dict[str, Any] = answer.json()
    jsonschema.validate(document, SCHEMA)
    return document


def at(seconds: float) -> str:
    return (NOW + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


async def test_what_is_left_is_shown_and_nothing_is_taken(limiter: Limiter) -> None:
    await limiter.take(ACCOUNTS["bob"], "image", 2)

    shown = [await usage(limiter) for _ in range(20)]

    assert shown == [shown[0]] * 20
    assert shown[0]["tier"] == "everyone"
    assert list(shown[0]["features"]) == list(POLICY["features"])
    # START is some 0.12 s after a whole second, and an instant is never an earlier one.
    assert shown[0]["features"]["image"] == {
        "state": "allowed",
        "allowed": True,
        "remaining": 3,
        "capacity": 5,
        "retry_at": None,
        "until": None,
        "message": None,
        "quotas": [
            {
                "name": "image-hour",
                "per": None,
                "capacity": 5,
                "window": 3600.0,
                "remaining": 3,
                "full_at": at(1441),
            },
            {
                "name": "image-day",
                "per": None,
                "capacity": 50,
                "window": 86400.0,
                "remaining": 48,
                "full_at": at(3457),
            },
        ],
        "slots": [],
    }


async def test_used_up_quota_says_when_the_next_request_fits(
    limiter: Limiter, clock: Clock
) -> None:
    await limiter.take(ACCOUNTS["bob"], "video", 2)

    video = (await usage(limiter))["features"]["video"]
    clock.now = (START // 1_000_000 + 1801) * 1_000_000
    then = (await usage(limiter))["features"]["video"]

    assert (video["state"], video["allowed"], video["remaining"]) == ("quota", False, 0)
    assert video["retry_at"] == at(1801)
    assert video["message"] == "The quota for video is used up."
    assert (then["state"], then["remaining"], then["retry_at"]) == ("allowed", 1, None)


async def test_zero_says_why_in_the_language_that_is_accepted(limiter: Limiter) -> None:
    english = (await usage(limiter, "ada"))["features"]["video"]
    french = await usage(limiter, "ada", **{"accept-language": "fr-CH, en;q=0.5"})

    assert (english["state"], english["allowed"]) == ("zero", False)
    assert (english["remaining"], english["capacity"], english["quotas"]) == (0, 0, [])
    assert english["message"] == "Not yet."
    assert french["features"]["video"]["message"] == "Pas encore."


async def test_unlimited_has_no_numbers(limiter: Limiter) -> None:
    image = (await usage(limiter, "pro"))["features"]["image"]

    assert (image["state"], image["remaining"], image["capacity"]) == ("allowed", None, None)


async def test_closure_says_when_it_ends_and_when_this_account_should_come_back(
    limiter: Limiter,
) -> None:
    until = NOW + timedelta(hours=2)
    await limiter.control.close("video", tier="everyone", until=until, message="Paused.")
    await limiter.control.close("image", everyone=True)

    bob = (await usage(limiter))["features"]
    ada = (await usage(limiter, "ada"))["features"]

    assert bob["video"]["state"] == "closed"
    assert (bob["video"]["until"], bob["video"]["message"]) == (at(7200), "Paused.")
    assert at(7200) <= bob["video"]["retry_at"] <= at(7200 + 61)
    assert bob["image"]["state"] == ada["image"]["state"] == "closed"
    assert (bob["image"]["until"], bob["image"]["retry_at"]) == (None, None)
    assert (ada["video"]["state"], ada["video"]["until"]) == ("zero", None)


async def test_end_of_a_closure_is_told_as_it_was_announced(limiter: Limiter) -> None:
    until = NOW + timedelta(hours=2, microseconds=3)
    await limiter.control.close("video", everyone=True, until=until)

    video = (await usage(limiter))["features"]["video"]

    assert video["until"] == at(7200.000003)
    assert (video["remaining"], video["capacity"]) == (None, None)


class Counting(MemoryBackend):
    asked = 0

    async def take(self, charges: Sequence[Charge]) -> Reply:
        self.asked += 1
        return await super().take(charges)


@pytest.mark.parametrize(("shards", "calls"), [(1, 1), (8, 3)])
async def test_asking_costs_a_call_for_each_shard_and_not_for_each_feature(
    shards: int, calls: int
) -> None:
    # By their names the two pools are on two shards of eight, and the account is on a third.
    pool = {"pool": {"rate": "9/minute"}}
    features: dict[str, Any] = {"a": pool, "b": pool, "c": {}, "d": {}, "e": {}}
    policy = {"features": features, "tiers": {"all": {"quotas": dict.fromkeys(features, "5/day")}}}
    backend = Counting()

    await Limiter(policy, backend, shards=shards).usage(Account("u"))

    assert backend.asked == calls


async def test_pool_is_said_to_be_used_up_and_its_numbers_are_nobodys_business(
    limiter: Limiter,
) -> None:
    for i in range(5):
        await limiter.take(Account(f"u{i}", plan="new"), "audio")

    ada = (await usage(limiter, "ada"))["features"]["audio"]
    bob = (await usage(limiter, "bob"))["features"]["audio"]

    assert (ada["state"], ada["remaining"], ada["capacity"]) == ("pool", 9, 9)
    assert ada["retry_at"] == at(361)
    assert [quota["name"] for quota in ada["quotas"]] == ["audio-hour"]
    assert bob["state"] == "allowed"


async def test_slots_of_ones_own_are_shown(limiter: Limiter) -> None:
    held = await limiter.take(ACCOUNTS["pro"], "video")

    video = (await usage(limiter, "pro"))["features"]["video"]

    assert held.allowed
    assert (video["state"], video["retry_at"]) == ("concurrency", None)
    assert video["slots"] == [{"name": "video-hour-org", "limit": 1, "held": 1}]
    assert video["quotas"][0]["per"] == "org"


async def test_slots_of_a_pool_are_not(limiter: Limiter) -> None:
    held = await limiter.take(ACCOUNTS["ada"], "render")

    render = (await usage(limiter, "bob"))["features"]["render"]

    assert held.allowed
    assert (render["state"], render["slots"], render["retry_at"]) == ("pool", [], None)


async def test_no_account_is_named(limiter: Limiter) -> None:
    async with asking(usage_app(limiter, identify), "ada") as client:
        answer = await client.get("/")

    assert "secret-id" not in answer.text + str(answer.headers)


@pytest.mark.parametrize("name", ["redis", "identify"])
async def test_where_nobody_answers_the_outage_answers_are_shown(
    limiter: Limiter, name: str
) -> None:
    def failing(_: HTTPConnection) -> Account:
        raise ConnectionError("the database is down")

    app = usage_app(limiter, failing if name == "identify" else identify)
    async with asking(app, "ada") as client:
        with broken(limiter) if name == "redis" else nullcontext():
            answer = await client.get("/")
    document = answer.json()
    jsonschema.validate(document, SCHEMA)
    features = document["features"]

    assert answer.status_code == 200
    assert {name: features[name]["state"] for name in ("image", "audio")} == {
        "image": "unknown",
        "audio": "unknown",
    }
    assert (features["image"]["allowed"], features["audio"]["allowed"]) == (True, None)
    assert features["image"]["remaining"] is None
    if name == "identify":
        assert (document["tier"], features["video"]["allowed"]) == (None, False)
        assert "cannot be served right now" in features["video"]["message"]
    else:
        assert features["video"]["state"] == "zero"  # whatever Redis would say


@pytest.mark.parametrize("name", ["redis", "identify"])
async def test_asking_in_an_outage_is_counted_as_no_decision(
    limiter: Limiter, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(_: HTTPConnection) -> Account:
        raise ConnectionError("the database is down")

    recorder = RecordingObserver()
    limiter = Limiter(POLICY, observers=[recorder])
    app = usage_app(limiter, failing if name == "identify" else identify)
    async with asking(app, "bob") as client:
        with broken(limiter) if name == "redis" else nullcontext():
            made = [(await client.get("/")).json() for _ in range(3)]

    assert made[2]["features"]["image"]["state"] == "unknown"
    assert [cell for cell, tally in limiter.tallies.items() if any(tally.counts().values())] == []
    assert (recorder.decisions, recorder.outages) == ([], [])
    assert "no decision could be made" in caplog.text


async def test_policy_that_is_published_meanwhile_is_not_seen_halfway_through() -> None:
    backend = MemoryBackend()
    held = Limiter(POLICY, backend)
    claim = backend.claim

    async def claim_and_publish(*asked: Any) -> Claimed:
        reply = await claim(*asked)
        await push(held, OTHER)
        return reply

    held._claim = claim_and_publish
    end = datetime.now(UTC) + timedelta(hours=1)
    await held.control.close("video", everyone=True, until=end)

    before = (await usage(held, "bob"))["features"]
    after = (await usage(held, "bob"))["features"]

    assert {name: one["state"] for name, one in before.items()} == {
        **dict.fromkeys(("image", "audio", "render", "page"), "allowed"),
        "video": "closed",
    }
    assert before["video"]["until"] is not None
    assert list(after) == ["image"]


async def test_what_identify_raises_to_answer_the_request_answers_it(limiter: Limiter) -> None:
    def refuse(_: HTTPConnection) -> Account:
        raise HTTPException(401, "Who are you?", {"www-authenticate": "Bearer"})

    async def deny(_: HTTPConnection) -> Account:
        raise Denied(await limiter.peek(ACCOUNTS["ada"], "video"))

    async with asking(usage_app(limiter, refuse)) as client:
        refused = await client.get("/")
    async with asking(usage_app(limiter, deny)) as client:
        denied = await client.get("/")

    assert (refused.status_code, refused.json()) == (401, {"detail": "Who are you?"})
    assert refused.headers["www-authenticate"] == "Bearer"
    assert (denied.status_code, denied.json()["reason"]) == (403, "zero")


async def test_answer_without_a_body_may_be_one(limiter: Limiter) -> None:
    def nothing(_: HTTPConnection) -> Account:
        raise HTTPException(204)

    async with asking(usage_app(limiter, nothing)) as client:
        answer = await client.get("/")

    assert (answer.status_code, answer.content) == (204, b"")


async def test_what_is_no_account_is_a_client_without_one(limiter: Limiter) -> None:
    await limiter.take(Account("192.0.2.1", anonymous=True), "image", 2)

    async with asking(usage_app(limiter, lambda _: Account(""))) as client:
        answer = await client.get("/")

    assert answer.json()["features"]["image"]["remaining"] == 3


class TestCaching:
    async def test_tag_stays_until_a_client_would_see_a_change(
        self, limiter: Limiter, clock: Clock
    ) -> None:
        async with asking(usage_app(limiter, identify)) as client:
            await limiter.take(ACCOUNTS["bob"], "video", 2)
            first = await client.get("/")
            known = {"if-none-match": first.headers["etag"]}
            statuses = []
            for _ in range(100):
                clock.advance(7_777_777)
                statuses.append((await client.get("/", headers=known)).status_code)
            await limiter.take(ACCOUNTS["bob"], "image")
            changed = await client.get("/", headers=known)

        assert set(statuses) == {304}
        assert changed.status_code == 200
        assert changed.headers["etag"] != first.headers["etag"]

    async def test_token_that_is_back_changes_the_tag(self, limiter: Limiter, clock: Clock) -> None:
        async with asking(usage_app(limiter, identify)) as client:
            await limiter.take(ACCOUNTS["bob"], "video", 2)
            known = {"if-none-match": (await client.get("/")).headers["etag"]}
            clock.advance(HOUR // 2 - 1)
            before = await client.get("/", headers=known)
            clock.advance(1)
            after = await client.get("/", headers=known)

        assert (before.status_code, after.status_code) == (304, 200)

    async def test_closure_changes_the_tag_and_another_tiers_does_not(
        self, limiter: Limiter
    ) -> None:
        async with asking(usage_app(limiter, identify)) as client:
            known = {"if-none-match": (await client.get("/")).headers["etag"]}
            await limiter.control.close("image", tier="pro")
            others = await client.get("/", headers=known)
            await limiter.control.close("image", tier="everyone")
            own = await client.get("/", headers=known)

        assert (others.status_code, own.status_code) == (304, 200)

    @pytest.mark.parametrize(
        ("given", "status"),
        [
            ("{tag}", 304),
            ("W/{tag}", 304),
            ('"other", {tag}', 304),
            ("*", 304),
            ('"other"', 200),
            ("", 200),
            (",,,", 200),
            ("{tag}x", 200),
            ('"a",' * 5_000, 200),
        ],
    )
    async def test_tags_are_compared_as_http_has_it(
        self, limiter: Limiter, given: str, status: int
    ) -> None:
        async with asking(usage_app(limiter, identify)) as client:
            first = await client.get("/")
            tag = first.headers["etag"]
            answer = await client.get("/", headers={"if-none-match": given.format(tag=tag)})

        assert answer.status_code == status
        assert answer.headers["etag"] == tag
        assert answer.headers["cache-control"] == "private, no-cache"
        assert answer.headers["vary"] == "Accept-Language, Authorization, Cookie"
        assert (answer.content == b"") == (status == 304)

    async def test_head_is_get_without_a_body(self, limiter: Limiter) -> None:
        async with asking(usage_app(limiter, identify)) as client:
            whole = await client.get("/")
            head = await client.head("/")
            same = await client.head("/", headers={"if-none-match": whole.headers["etag"]})

        assert (head.status_code, head.content) == (200, b"")
        assert dict(head.headers) == dict(whole.headers)
        assert same.status_code == 304

    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
    async def test_other_methods_are_refused(self, limiter: Limiter, method: str) -> None:
        async with asking(usage_app(limiter, identify)) as client:
            answer = await client.request(method, "/")

        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


def starlette_app(app: ASGIApp) -> Any:
    return Starlette(routes=[Route("/usage", app)])


def fastapi_app(app: ASGIApp) -> Any:
    framework = FastAPI()
    framework.router.routes.append(Route("/usage", app))
    return framework


def litestar_app(app: ASGIApp) -> Any:
    @asgi("/usage", copy_scope=True)
    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)

    return Litestar([handler], logging_config=None)


def beside_another(app: ASGIApp) -> Any:
    return Starlette(routes=[Route("/usage", app), Mount("/", app=FastAPI())])


@pytest.mark.parametrize("framework", [starlette_app, fastapi_app, litestar_app, beside_another])
async def test_behind_the_middleware_it_shows_whom_that_names_in_every_framework(
    limiter: Limiter, framework: Any
) -> None:
    asked = []

    def counting(connection: HTTPConnection) -> Any:
        asked.append(connection)
        return identify(connection)

    app = TieredLimitMiddleware(framework(usage_app(limiter)), limiter=limiter, identify=counting)
    async with asking(app, "bob") as client:
        answer = await client.get("/usage")
        stranger = await client.get("/usage", headers={"x-api-key": "nobody"})

    # Its own route is metered, and was charged once before it looked.
    assert answer.json()["features"]["page"]["remaining"] == 2
    assert (answer.json()["tier"], stranger.json()["tier"]) == ("everyone", "everyone")
    assert len(asked) == 2


async def test_behind_the_middleware_of_two_limiters_it_shows_whom_its_own_names(
    limiter: Limiter,
) -> None:
    inner = TieredLimitMiddleware(usage_app(limiter), limiter=Limiter(OTHER), identify=identify)
    app = TieredLimitMiddleware(inner, limiter=limiter, identify=identify)
    async with asking(app, "ada") as client:
        assert (await client.get("/")).json()["tier"] == "new"


async def test_identify_of_its_own_counts_before_that_of_the_middleware(limiter: Limiter) -> None:
    app = TieredLimitMiddleware(
        usage_app(limiter, lambda _: ACCOUNTS["pro"]), limiter=limiter, identify=identify
    )
    async with asking(app, "ada") as client:
        assert (await client.get("/")).json()["tier"] == "pro"


async def test_process_that_has_no_policy_yet_says_so() -> None:
    backend = MemoryBackend()
    app = usage_app(Limiter(stored(), backend), identify)
    async with asking(app) as client:
        before = await client.get("/")

    assert (before.status_code, before.headers["retry-after"]) == (503, "1")
    assert before.headers["cache-control"] == "no-store"


async def test_websocket_is_closed_before_it_is_accepted(limiter: Limiter) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await usage_app(limiter)({"type": "websocket", "path": "/", "headers": []}, receive, send)

    assert [message["type"] for message in sent] == ["websocket.close"]


async def test_startup_fails_where_there_is_no_policy_to_decide_by() -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    async def send(message: Message) -> None:
        sent.append(message)

    with pytest.raises(BackendError, match="no policy is stored"):
        await usage_app(Limiter(stored(), MemoryBackend()))({"type": "lifespan"}, receive, send)

    assert [message["type"] for message in sent] == ["lifespan.startup.failed"]


def test_it_is_a_whole_application_under_a_real_server_and_on_redis(redis_url: str) -> None:
    limiter = Limiter(POLICY, redis_url)
    with serve(usage_app(limiter, identify), lifespan="on") as url, httpx.Client() as client:
        first = client.get(url, headers={"x-api-key": "bob"})
        second = client.get(
            url, headers={"x-api-key": "bob", "if-none-match": first.headers["etag"]}
        )
        head = client.head(url, headers={"x-api-key": "bob"})

    assert (first.status_code, second.status_code, head.status_code) == (200, 304, 200)
    assert first.json()["features"]["image"]["remaining"] == 5


def test_example_of_the_page_is_what_its_schema_says() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(EXAMPLE, SCHEMA)

    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**EXAMPLE, "account": "u1"}, SCHEMA)


async def test_code_of_the_page_runs() -> None:
    (block,) = blocks(PAGE, "python")
    namespace: dict[str, Any] = {}
    exec(compile(block, "usage.md", "exec"), namespace)

    async with asking(namespace["app"]) as client:
        document = (await client.get("/v1/usage")).json()

    jsonschema.validate(document, SCHEMA)
    assert document["features"]["video"]["state"] == "zero"


async def test_page_of_the_example_has_a_button_for_each_feature_that_it_asks_about() -> None:
    limiter = Limiter(Path(usage_page.__file__).with_name("policy.toml"))
    async with asking(usage_page.create_app(limiter)) as client:
        html = (await client.get("/")).text
        for _ in range(3):
            await client.post("/v1/images")
        document = (await client.get("/v1/usage")).json()

    jsonschema.validate(document, SCHEMA)
    assert set(re.findall(r'data-feature="(\w+)"', html)) == set(document["features"])
    assert document["features"]["image"]["allowed"] is False
    assert document["features"]["video"]["message"] == "Sign in to make videos."

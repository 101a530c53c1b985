"""docs/coming-from: what the pages say of other limiters and of ours is what both do."""

from __future__ import annotations

import asyncio
import re
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastapi.routing
import flask
import flask_limiter._extension
import httpx
import limits.storage.memory
import pyrate_limiter
import pyrate_limiter.clocks
import pytest
import redis.asyncio
import slowapi.extension
from a2wsgi import WSGIMiddleware
from asgiref.wsgi import WsgiToAsgi
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi_limiter.depends import RateLimiter
from flask import Flask
from slowapi.middleware import SlowAPIASGIMiddleware, SlowAPIMiddleware

from tests.coming_from import (
    SECOND_US,
    Page,
    answers,
    clocked,
    let_in,
    most_within,
    statuses,
    time_of,
)
from tests.contract import Clock
from tests.servers import Monitor, RedisServer
from tests.serving import serve
from tieredlimit import Account, Limiter, Policy, TieredLimitMiddleware
from tieredlimit.backends import MemoryBackend
from tieredlimit.cli import main

INDEX = Page("index")
SLOWAPI = Page("slowapi")
FASTAPI_LIMITER = Page("fastapi-limiter")
FLASK = Page("flask-limiter")
ALL = [INDEX, SLOWAPI, FASTAPI_LIMITER, FLASK, Page("django-ratelimit")]
NOWHERE = "redis://127.0.0.1:1/0"
as_asgi: Any = WSGIMiddleware  # its types know no others of WSGI and ASGI

# Newer versions of FastAPI keep included routers in `app.routes` as what they are.
NESTED = hasattr(fastapi.routing, "iter_route_contexts")
nested_only = pytest.mark.skipif(not NESTED, reason="this FastAPI flattens included routers")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def by_clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Let the peers, which have no clock to be given, and our limiters go by the test's."""
    for module in (limits.storage.memory, slowapi.extension, flask_limiter._extension):
        monkeypatch.setattr(module, "time", time_of(clock))
    monkeypatch.setattr(pyrate_limiter.clocks, "monotonic_ns", lambda: clock() * 1000)
    monkeypatch.setattr("tieredlimit.Limiter", clocked(clock))
    return clock


@pytest.fixture
def wait_until(clock: Clock) -> Callable[[int], None]:
    begin = clock()

    def advance(at: int) -> None:
        clock.now = begin + at * SECOND_US

    return advance


@pytest.fixture
def at_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Page], Page]:
    """Work in a folder in which a page's policy is `policy.toml`."""

    def enter(page: Page) -> Page:
        (tmp_path / "policy.toml").write_text(page.policies[0], "utf-8")
        monkeypatch.chdir(tmp_path)
        return page

    return enter


@pytest.fixture(autouse=True)
def no_timers_left() -> Iterator[None]:
    """See to the end of the timers by which the memory of `limits` sweeps itself."""
    yield
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()


# All pages


@pytest.mark.parametrize(
    ("page", "labels"),
    [
        (SLOWAPI, ["before", "after"]),
        (FASTAPI_LIMITER, ["before", "after"]),
        (FLASK, ["before", "Flask as it is", "Quart"]),
    ],
    ids=["slowapi", "fastapi-limiter", "flask-limiter"],
)
async def test_series_of_the_page_is_let_in_as_its_table_says(
    page: Page,
    labels: list[str],
    at_page: Callable[[Page], Page],
    by_clock: Clock,
    wait_until: Callable[[int], None],
) -> None:
    series = at_page(page).series()
    let = {}

    for label in labels:
        wait_until(0)
        app = page.run(label)["app"]
        app = as_asgi(app) if isinstance(app, Flask) else app
        let[label] = await let_in(app, "/images", series, wait_until)

    there, *here = let.values()
    assert there == [row[2] for row in series]
    assert here == [[row[3] for row in series]] * len(here)


@pytest.mark.parametrize("page", [SLOWAPI, FLASK], ids=["slowapi", "flask-limiter"])
def test_window_lets_nine_in_within_a_second_and_a_bucket_five(page: Page) -> None:
    # What the tables say is what is done: the test above.
    there = most_within(1, [(at, count) for at, _, count, _ in page.series()])
    here = most_within(1, [(at, count) for at, _, _, count in page.series()])

    assert (there, here) == (9, 5)
    assert "nine requests within a\nsecond" in page.text or "nine requests within a second" in (
        page.text.replace("\n", " ")
    )


def test_pyrate_limiter_lets_in_five_in_any_minute_and_a_bucket_more() -> None:
    series = FASTAPI_LIMITER.series()

    assert most_within(60, [(at, count) for at, _, count, _ in series]) == 5
    assert most_within(60, [(at, count) for at, _, _, count in series]) > 5


@pytest.mark.parametrize(
    "page",
    ALL,
    ids=lambda page: page.name,
)
def test_every_policy_and_link_of_a_page_leads_somewhere(page: Page) -> None:
    for block in page.policies:
        document = tomllib.loads(block)
        document.setdefault("features", {"image": {"routes": ["POST /images"]}})
        assert Policy.from_dict(document).warnings == ()
    for target, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", page.text):
        path = (page.path.parent / target) if target else page.path
        headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
        known = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        assert not anchor or anchor in known, (target, anchor)


def test_pages_have_no_code_but_what_the_tests_run() -> None:
    run = {
        "index": set(),
        "slowapi": {"before", "after", "the old body"},
        "fastapi-limiter": {"before", "after"},
        "flask-limiter": {"before", "Flask as it is", "Quart"},
        "django-ratelimit": {"before", "the view", "asgi.py", "the user"},
    }

    assert {page.name: set(page.code) for page in ALL} == run
    for page in ALL:
        fences = re.findall(r"^```(.+)$", page.text, re.MULTILINE)
        assert len(fences) == len(page.code) + len(page.policies), page.name


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_routes_quotas_and_commands_in_the_text_of_a_page_are_such(page: Page) -> None:
    spans = [span.replace("\\|", "|") for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.text)]
    quotas = [span for span in spans if re.match(r"quotas\.\w+ = ", span)]
    routes = [span for span in spans if re.fullmatch(r"[A-Z|]+ /\S*|\* /\S+", span)]
    commands = [span.split()[1] for span in spans if re.match(r"tieredlimit [a-z]", span)]

    for line in quotas:
        feature = line.split()[0].removeprefix("quotas.")
        cells = tomllib.loads(line)
        policy = Policy.from_dict({"features": {feature: {}}, "tiers": {"all": cells}})
        assert policy.cell("all", feature).spell()
    for route in routes:
        document = {"features": {"one": {"routes": [route]}}, "tiers": {"all": {}}}
        policy = Policy.from_dict({**document, "defaults": {"quotas": {"one": 0}}})
        assert policy.features["one"].routes
    assert quotas or page is INDEX
    assert set(commands) <= set(main.commands)


# The page that all share


async def test_burst_and_refill_apart_let_five_in_in_any_minute(clock: Clock) -> None:
    part = tomllib.loads(INDEX.policies[0])

    admitted = await asked_all_the_time({"features": {"image": {}}, **part}, clock)

    assert most_within(60, admitted) == 5


async def test_bucket_after_a_rest_lets_ten_in_within_a_minute(clock: Clock) -> None:
    policy = {"features": {"image": {}}, "tiers": {"all": {"quotas": {"image": "5/minute"}}}}

    admitted = await asked_all_the_time(policy, clock)

    assert most_within(60, admitted) == 10


async def asked_all_the_time(policy: dict[str, Any], clock: Clock) -> list[tuple[int, int]]:
    """Return how many were let in at each second of five minutes, of ten that ask in each."""
    limiter = Limiter(policy, MemoryBackend(clock=clock))
    admitted = []
    for second in range(300):
        taken = [await limiter.take(Account("u"), "image") for _ in range(10)]
        admitted.append((second, sum(decision.allowed for decision in taken)))
        clock.advance(SECOND_US)
    return admitted


async def test_shadow_in_front_of_the_old_limiter_changes_nothing_and_counts(
    by_clock: Clock, wait_until: Callable[[int], None]
) -> None:
    before = SLOWAPI.run("before")["app"]
    alone = SLOWAPI.run("before")["app"]
    policy = tomllib.loads(INDEX.policies[1])
    limiter = Limiter(policy, MemoryBackend(clock=by_clock))
    measured = TieredLimitMiddleware(before, limiter=limiter)
    series = SLOWAPI.series()

    seen: dict[Any, list[Any]] = {alone: [], measured: []}
    for app, told in seen.items():
        wait_until(0)
        for at, sent, *_ in series:
            wait_until(at)
            told += [(a.status_code, a.headers) for a in await answers(app, "/images", sent)]

    counts = limiter.tallies.snapshot()["image/everyone"]
    assert seen[alone] == seen[measured]
    assert counts["shadow_allowed"] == sum(row[3] for row in series)
    assert counts["shadow_denied"] == sum(row[1] - row[3] for row in series)


async def test_cell_moved_from_shadow_to_quotas_is_enforced(clock: Clock) -> None:
    policy = tomllib.loads(INDEX.policies[1])
    tier = policy["tiers"]["everyone"]
    tier["quotas"]["image"] = tier["shadow"].pop("image")
    limiter = Limiter(policy, MemoryBackend(clock=clock))

    taken = [(await limiter.take(Account("u"), "image")).allowed for _ in range(6)]

    assert taken == [True] * 5 + [False]


# slowapi


def slow_app(
    *limits_of_videos: str, middleware: Any = None, **options: Any
) -> tuple[FastAPI, slowapi.Limiter]:
    """Return an application behind slowapi, with a limit on POST /videos if one is given."""
    limiter = slowapi.Limiter(**{"key_func": lambda: "u", **options})
    app = FastAPI()
    app.state.limiter = limiter
    app.add_exception_handler(
        slowapi.errors.RateLimitExceeded,
        slowapi._rate_limit_exceeded_handler,  # type: ignore[arg-type]  # as its own guide does
    )
    if middleware is not None:
        app.add_middleware(middleware)

    async def video(request: Request, response: Response) -> dict[str, str]:
        return {}

    decorated = video
    for limit in limits_of_videos:
        decorated = limiter.limit(limit)(decorated)
    app.post("/videos")(decorated)
    return app, limiter


async def test_slowapi_charges_the_hour_for_what_the_minute_denied(
    at_page: Callable[[Page], Page], by_clock: Clock
) -> None:
    page = at_page(SLOWAPI)
    let = {}

    for label in ("before", "after"):
        app = page.run(label)["app"]
        first = await statuses(app, "/videos", 10)
        by_clock.advance(60 * SECOND_US)
        let[label] = first.count(200), (await statuses(app, "/videos")) == [200]

    assert let == {"before": (1, False), "after": (1, True)}


async def test_slowapi_answers_zero_as_it_answers_a_used_up_limit(by_clock: Clock) -> None:
    app, _ = slow_app("0/minute", headers_enabled=False)
    limiter = Limiter(
        {
            "features": {"video": {"routes": ["POST /videos"]}},
            "tiers": {"all": {"quotas": {"video": 0}}},
        }
    )

    (there,) = await answers(app, "/videos")
    (here,) = await answers(TieredLimitMiddleware(FastAPI(), limiter=limiter), "/videos")

    assert there.status_code == 429
    assert here.status_code == 403
    assert "retry-after" not in here.headers


async def test_slowapi_without_redis_answers_500_unless_told_to_fall_back() -> None:
    plain, _ = slow_app("5/minute", storage_uri=NOWHERE)
    falling, _ = slow_app("5/minute", storage_uri=NOWHERE, in_memory_fallback_enabled=True)

    assert await statuses(plain, "/videos") == [500]
    assert await statuses(falling, "/videos", 6) == [200] * 5 + [429]


async def test_tieredlimit_without_redis_gives_the_outage_answer() -> None:
    policy = {
        "features": {"video": {"routes": ["POST /videos"]}},
        "tiers": {"all": {"quotas": {"video": "5/minute"}}},
    }
    app, _ = slow_app()
    async with Limiter(policy, NOWHERE) as limiter:
        seen = await statuses(TieredLimitMiddleware(app, limiter=limiter), "/videos", 6)

    assert seen == [200] * 6


@pytest.mark.login("default")  # the peer's commands are not ours
async def test_slowapi_calls_redis_once_for_each_limit_and_tieredlimit_once(redis_url: str) -> None:
    policy = {
        "features": {"video": {"routes": ["POST /videos"]}},
        "tiers": {"all": {"quotas": {"video": ["10/hour", "100/day"]}}},
    }
    before, _ = slow_app("10/hour;100/day", storage_uri=redis_url)
    bare, _ = slow_app()

    async with Limiter(policy, redis_url) as limiter:
        after = TieredLimitMiddleware(bare, limiter=limiter)
        there, here = [await evaluated(app, redis_url) for app in (before, after)]

    assert (there, here) == (2, 1)


async def evaluated(app: Any, redis_url: str) -> int:
    """Return how many scripts the second request runs."""
    async with Monitor(redis_url) as monitor:
        assert await statuses(app, "/videos") == [200]
        await monitor.commands()
        assert await statuses(app, "/videos") == [200]
        return sum(line.startswith(("EVALSHA ", "FCALL ")) for line in await monitor.commands())


@pytest.mark.login("default")  # the peer's commands are not ours
async def test_slowapi_waits_for_redis_on_the_event_loop(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, limiter = slow_app("10/hour", storage_uri=redis_url)
    threads = []
    hit = limiter.limiter.hit

    def noted(*arguments: Any, **named: Any) -> bool:
        threads.append((threading.current_thread(), asyncio.get_running_loop()))
        return hit(*arguments, **named)

    monkeypatch.setattr(limiter.limiter, "hit", noted)
    await statuses(app, "/videos")

    # A plain function, called on the loop's thread: it cannot have let anything else run.
    assert threads == [(threading.current_thread(), asyncio.get_running_loop())]


@nested_only
@pytest.mark.parametrize("middleware", [SlowAPIMiddleware, SlowAPIASGIMiddleware])
async def test_slowapi_applies_default_limits_to_no_route_of_an_included_router(
    middleware: type,
) -> None:
    app, _ = slow_app(middleware=middleware, default_limits=["1/minute"])
    app.include_router(with_one_route())

    assert await statuses(app, "/videos", 2) == [200, 429]
    assert await statuses(app, "/v1/images", 2) == [200, 200]


async def test_tieredlimit_limits_the_routes_of_an_included_router() -> None:
    app = FastAPI()
    app.include_router(with_one_route())
    policy = {
        "features": {"all": {"routes": ["* /{rest:path}"]}},
        "tiers": {"all": {"quotas": {"all": "1/minute"}}},
    }

    seen = await statuses(TieredLimitMiddleware(app, limiter=Limiter(policy)), "/v1/images", 2)

    assert seen == [200, 429]


def with_one_route(*dependencies: Any) -> APIRouter:
    router = APIRouter(prefix="/v1", dependencies=dependencies)

    @router.post("/images")
    async def image() -> dict[str, str]:
        return {}

    return router


async def test_slowapi_counts_each_url_of_a_template_for_itself() -> None:
    limiter = slowapi.Limiter(key_func=lambda: "u")
    app = FastAPI()
    app.state.limiter = limiter
    app.add_exception_handler(
        slowapi.errors.RateLimitExceeded,
        slowapi._rate_limit_exceeded_handler,  # type: ignore[arg-type]  # as its own guide does
    )

    async def image(request: Request, number: int) -> dict[str, str]:
        return {}

    app.post("/images/{number}")(limiter.limit("1/minute")(image))
    policy = {
        "features": {"image": {"routes": ["POST /images/{number}"]}},
        "tiers": {"all": {"quotas": {"image": "1/minute"}}},
    }
    bare = FastAPI()
    bare.post("/images/{number}")(lambda number: {})
    ours = TieredLimitMiddleware(bare, limiter=Limiter(policy))

    there = [await statuses(app, path) for path in ("/images/1", "/images/2", "/images/1")]
    here = [await statuses(ours, path) for path in ("/images/1", "/images/2")]

    assert there == [[200], [200], [429]]
    assert here == [[200], [429]]


async def test_slowapi_skips_the_limit_where_the_key_is_empty() -> None:
    app, _ = slow_app("1/minute", key_func=lambda: "")

    assert await statuses(app, "/videos", 3) == [200] * 3


async def test_old_body_of_the_page_is_what_slowapis_clients_read(
    at_page: Callable[[Page], Page], by_clock: Clock
) -> None:
    page = at_page(SLOWAPI)
    as_before = page.run("the old body")["as_before"]
    before, after = page.run("before")["app"], page.run("after")
    ours = TieredLimitMiddleware(FastAPI(), limiter=after["limiter"], on_denied=as_before)

    there, here = [(await answers(app, "/images", 6))[-1] for app in (before, ours)]

    assert there.json() == {"error": "Rate limit exceeded: 5 per 1 minute"}
    assert here.json() == {"error": "Rate limit exceeded: image-minute"}
    assert (there.status_code, here.status_code) == (429, 429)
    assert here.headers["retry-after"] == "12"


async def test_key_that_nobody_has_shares_the_bucket_of_its_address(
    at_page: Callable[[Page], Page], by_clock: Clock
) -> None:
    page = at_page(SLOWAPI)
    strangers = [{"x-api-key": f"made-up-{i}"} for i in range(6)]
    let = {}

    for label in ("before", "after"):
        app = page.run(label)["app"]
        let[label] = [(await statuses(app, "/images", headers=key))[0] for key in strangers]

    assert let == {"before": [200] * 6, "after": [200] * 5 + [429]}


# fastapi-limiter


def nothing() -> dict[str, str]:
    return {}


def rates(limit: int) -> pyrate_limiter.Limiter:
    return pyrate_limiter.Limiter(pyrate_limiter.Rate(limit, pyrate_limiter.Duration.MINUTE))


async def by_key(request: Any) -> str:
    return str(request.headers["x-api-key"])


async def test_fastapi_limiter_gives_all_clients_one_bucket_whatever_the_identifier() -> None:
    app = FastAPI()
    limit = RateLimiter(limiter=rates(2), identifier=by_key)
    app.post("/images", dependencies=[Depends(limit)])(nothing)

    seen = [(await statuses(app, "/images", headers={"x-api-key": key}))[0] for key in "abab"]

    assert seen == [200, 200, 429, 429]


async def test_accounts_have_their_own_buckets_after_fastapi_limiter(
    at_page: Callable[[Page], Page], by_clock: Clock
) -> None:
    app = at_page(FASTAPI_LIMITER).run("after")["app"]

    seen = {
        key: await statuses(app, "/images", 6, {"x-api-key": key}) for key in ("key-ada", "key-bob")
    }

    assert seen == dict.fromkeys(seen, [200] * 5 + [429])


async def test_fastapi_limiter_does_not_say_when_to_come_back(
    at_page: Callable[[Page], Page], by_clock: Clock
) -> None:
    page = at_page(FASTAPI_LIMITER)
    apps = [page.run(label)["app"] for label in ("before", "after")]

    there, here = [(await answers(app, "/images", 6))[-1] for app in apps]

    assert there.json() == {"detail": "Too Many Requests"}
    assert "retry-after" not in there.headers
    assert here.headers["retry-after"] == "12"


async def test_fastapi_limiter_charges_the_first_dependency_though_the_second_denies() -> None:
    app = FastAPI()
    first, second = rates(3), rates(1)
    limited = [Depends(RateLimiter(limiter=one)) for one in (first, second)]
    app.post("/images", dependencies=limited)(nothing)

    seen = await statuses(app, "/images", 3)

    assert seen == [200, 429, 429]
    assert first.buckets()[0].count() == 3


@nested_only
async def test_fastapi_limiter_answers_500_where_a_router_is_included() -> None:
    app = FastAPI()
    app.include_router(with_one_route(Depends(RateLimiter(limiter=rates(5)))))

    assert await statuses(app, "/v1/images") == [500]


def test_pyrate_limiter_has_no_rate_of_zero() -> None:
    with pytest.raises(AssertionError):
        pyrate_limiter.Rate(0, pyrate_limiter.Duration.MINUTE)


@pytest.mark.login("default")  # the peer's commands are not ours
async def test_fastapi_limiter_keeps_its_key_for_ever_and_answers_500_once_redis_is_gone(
    own_server: RedisServer,
) -> None:
    client = redis.asyncio.Redis.from_url(own_server.url)
    some = [pyrate_limiter.Rate(5, pyrate_limiter.Duration.MINUTE)]
    bucket = await pyrate_limiter.RedisBucket.init(some, client, "images")
    app = FastAPI()
    limiter = pyrate_limiter.Limiter(bucket)
    app.post("/images", dependencies=[Depends(RateLimiter(limiter=limiter))])(nothing)

    served = await statuses(app, "/images")
    lasts = own_server.command("TTL", "images")
    own_server.kill()
    down = await statuses(app, "/images")
    limiter.close()
    await client.aclose()

    assert (served, down) == ([200], [500])
    assert lasts == -1, "the page says that its key has no expiry"


# Flask-Limiter


def flask_app(limit: str, **options: Any) -> Any:
    """Return a Flask application behind Flask-Limiter, with a limit on POST /videos, for ASGI."""
    app = Flask("peer")
    limiter = flask_limiter.Limiter(lambda: "u", app=app, **{"storage_uri": "memory://", **options})

    @app.post("/videos")
    @limiter.limit(limit)
    def video() -> dict[str, str]:
        return {}

    @app.post("/images")
    def image() -> dict[str, str]:
        return {}

    return as_asgi(app)


async def test_moving_window_of_flask_limiter_lets_in_five_in_any_minute(
    by_clock: Clock, wait_until: Callable[[int], None]
) -> None:
    # Not at 60 s on the second: then it depends on whether the memory of `limits` was swept.
    series = FASTAPI_LIMITER.series()
    app = flask_app("5/minute", strategy="moving-window")

    counts = await let_in(app, "/videos", series, wait_until)

    instants = [row[0] for row in series]
    assert most_within(60, list(zip(instants, counts, strict=True))) == 5


async def test_flask_limiter_charges_the_application_for_what_a_route_denied(
    by_clock: Clock,
) -> None:
    there = flask_app("1/hour", application_limits=["5/minute"])
    limiter = Limiter(
        {
            "features": {
                "video": {"routes": ["POST /videos"], "pool": "all"},
                "image": {"routes": ["POST /images"], "pool": "all"},
            },
            "pools": {"all": {"rate": "5/minute"}},
            "tiers": {"all": {"quotas": {"video": "1/hour", "image": "unlimited"}}},
        },
        MemoryBackend(clock=by_clock),
    )
    here = TieredLimitMiddleware(as_asgi(bare_flask()), limiter=limiter)

    videos = [await statuses(app, "/videos", 5) for app in (there, here)]
    images = [await statuses(app, "/images") for app in (there, here)]

    assert videos == [[200] + [429] * 4] * 2
    assert images == [[429], [200]]


def bare_flask() -> Flask:
    app = Flask("bare")
    app.post("/videos")(nothing)
    app.post("/images", endpoint="image")(nothing)
    return app


async def test_flask_limiter_answers_zero_as_it_answers_a_used_up_limit() -> None:
    assert await statuses(flask_app("0/minute"), "/videos") == [429]


async def test_flask_limiter_without_redis_answers_500_unless_told_otherwise() -> None:
    plain = flask_app("5/minute", storage_uri=NOWHERE)
    swallowing = flask_app("5/minute", storage_uri=NOWHERE, swallow_errors=True)
    falling = flask_app("5/minute", storage_uri=NOWHERE, in_memory_fallback_enabled=True)

    assert await statuses(plain, "/videos") == [500]
    assert await statuses(swallowing, "/videos", 6) == [200] * 6
    assert await statuses(falling, "/videos", 6) == [200] * 5 + [429]


@pytest.mark.login("default")  # the peer's commands are not ours
async def test_flask_limiter_calls_redis_once_for_each_limit(redis_url: str) -> None:
    app = flask_app("10/hour;100/day", storage_uri=redis_url)

    assert await evaluated(app, redis_url) == 2


@pytest.mark.parametrize(
    ("adapter", "at_once", "patience"), [("asgiref", 1, 0.2), ("the page's", 2, 20.0)]
)
async def test_flask_requests_run_beside_each_other_and_not_in_the_thread_of_asgiref(
    at_page: Callable[[Page], Page], by_clock: Clock, adapter: str, at_once: int, patience: float
) -> None:
    to_asgi: Any = WsgiToAsgi  # it has no types
    here = at_page(FLASK).run("Flask as it is")
    meeting = Meeting(patience)
    here["flask"].post("/meet")(meeting.hold)
    app = to_asgi(here["flask"]) if adapter == "asgiref" else here["app"]

    met = await asyncio.gather(*(statuses(app, "/meet") for _ in range(2)))

    assert list(met) == [[200], [200]]
    assert meeting.most == at_once


class Meeting:
    """Let two requests run into each other, if they can; each waits so many seconds for another."""

    def __init__(self, patience: float) -> None:
        self.most = 0
        self._patience = patience
        self._inside = 0
        self._lock = threading.Lock()
        self._let_go = threading.Event()

    def hold(self) -> dict[str, str]:
        with self._lock:
            self._inside += 1
            self.most = max(self.most, self._inside)
            if self._inside == 2:
                self._let_go.set()
        self._let_go.wait(self._patience)
        with self._lock:
            self._inside -= 1
        return {}


async def test_view_of_flask_finds_what_was_decided_where_the_page_says(
    at_page: Callable[[Page], Page], by_clock: Clock
) -> None:
    here = at_page(FLASK).run("Flask as it is")
    (expression,) = re.findall(r"`(request\.environ\[.*)`", FLASK.text)
    left: list[int] = []

    def look() -> None:
        left.append(eval(expression, {"request": flask.request}))

    here["flask"].before_request(look)

    await statuses(here["app"], "/images", 2)

    assert left == [4, 3]


async def test_denied_request_never_reaches_a_thread_of_flask(
    at_page: Callable[[Page], Page], by_clock: Clock
) -> None:
    here = at_page(FLASK).run("Flask as it is")
    served = []
    here["flask"].before_request(lambda: served.append(threading.current_thread()))

    seen = await statuses(here["app"], "/images", 8)

    assert seen == [200] * 5 + [429] * 3
    assert len(served) == 5


async def test_flask_as_it_is_says_how_much_is_left(
    at_page: Callable[[Page], Page], by_clock: Clock
) -> None:
    for label in ("Flask as it is", "Quart"):
        (answer,) = await answers(at_page(FLASK).run(label)["app"], "/images")

        assert answer.json() == {"image": "ready"}
        assert answer.headers["ratelimit"] == '"image-minute";r=4;t=12'


async def test_flask_as_it_is_runs_under_a_real_server_and_sees_what_was_decided(
    at_page: Callable[[Page], Page], by_clock: Clock
) -> None:
    page = at_page(FLASK)
    (looked_up,) = re.findall(r"^`(request\.environ.*)`\.$", page.text, re.MULTILINE)
    here = page.run("Flask as it is")
    left: list[int] = []
    here["flask"].before_request(lambda: left.append(eval(looked_up, {"request": flask.request})))

    # One connection that is kept, and bodies: not all adapters survive the two.
    with serve(here["app"]) as url:
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            seen = [(await client.post("/images", content=b"a cat")).status_code for _ in range(6)]

    assert seen == [200] * 5 + [429]
    assert left == [4, 3, 2, 1, 0]


async def test_what_clients_notice_of_fields_is_as_the_index_says(
    at_page: Callable[[Page], Page], by_clock: Clock
) -> None:
    told, silent = (
        [
            slow_app("5/minute", headers_enabled=True)[0],
            flask_app("5/minute", headers_enabled=True),
        ],
        [slow_app("5/minute")[0], flask_app("5/minute")],
    )
    after = at_page(SLOWAPI).run("after")
    ours = TieredLimitMiddleware(
        after["app"], limiter=Limiter(after["limiter"].policy), legacy_fields=True
    )

    left = [
        (await answers(app, path))[0].headers.get("x-ratelimit-remaining")
        for app, path in [(app, "/videos") for app in (*told, *silent)] + [(ours, "/images")]
    ]

    assert left == ["4", "4", None, None, "4"]

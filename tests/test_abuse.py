"""What strangers send, and an `identify` makes of it, never takes the site down nor is free."""

from __future__ import annotations

import asyncio
import json
import sys
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import HTTPConnection

from tests.fuzzing import FoundError, Fuzz
from tests.servers import RedisServer
from tests.test_limiter import PATIENT, Clock, Spy
from tests.test_middleware import Recorder, behind, plain, policy, run
from tieredlimit import Account, Limiter, UsageError
from tieredlimit._core.messages import choose
from tieredlimit.backends import MemoryBackend, RedisBackend
from tieredlimit.identity import api_key, blocking, client_address

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Message, Receive, Scope, Send

    from tieredlimit.identity import Identify

Header = tuple[bytes, bytes]
HOUR_US = 3_600_000_000


def limiter_of(quota: object = "2/hour", **features: Any) -> Limiter:
    return Limiter(policy(quota, **features), MemoryBackend(clock=Clock()))


async def statuses(app: Any, times: int, **scope: Any) -> list[int]:
    return [(await run(app, **scope))[0]["status"] for _ in range(times)]


# --- A great many requests


@pytest.mark.fault("E1", "E4", "E6", "E7", "E10")
def test_20000_odd_requests_are_answered_and_none_escapes() -> None:
    fuzz = Fuzz(Random(20_240_229))

    asyncio.run(fuzz.run(20_000))

    assert set(fuzz.metered) == {"image", "video", "file", "hall", "admin", "job", "search"}
    assert {200, 403, 429, 503, "closed", "accepted"} <= set(fuzz.answers)


def test_escape_is_found_by_the_fuzzer() -> None:
    fuzz = Fuzz(Random(1))
    match = fuzz.limiter.match

    def blind(method: str, path: str, *, outside_root: bool = False) -> tuple[str, int] | None:
        return None if "//" in path else match(method, path, outside_root=outside_root)

    fuzz.limiter.match = blind  # type: ignore[method-assign]  # a matcher that has a hole

    with pytest.raises(FoundError, match="ran without its decision"):
        asyncio.run(fuzz.run(20_000))


# --- Headers that cost more than they should


def lines_run(action: Callable[[], object]) -> int:
    """Count the lines that `action` runs of ours: work that depends on no clock."""
    ran = 0

    def on_event(frame: Any, event: str, _argument: object) -> Any:
        nonlocal ran
        if "tieredlimit" not in frame.f_code.co_filename:
            return None
        ran += event == "line"
        return on_event

    before = sys.gettrace()
    sys.settrace(on_event)
    try:
        action()
    finally:
        sys.settrace(before)
    return ran


HOSTILE_VALUES: dict[str, Callable[[int], list[bytes]]] = {
    "commas": lambda size: [b"," * size],
    "addresses": lambda size: [b"6.6.6.6," * (size // 8)],
    "quotes": lambda size: [b'"' * size],
    "backslashes": lambda size: [b"\\" * size],
    "escaped quotes": lambda size: [b'for="' + b'\\"' * (size // 2)],
    "opened quotes": lambda size: [b'for=",' * (size // 6)],
    "pairs": lambda size: [b"for=6.6.6.6;" * (size // 12)],
    "semicolons": lambda size: [b";" * size],
    "spaces": lambda size: [b" " * size],
    "one word": lambda size: [b"6" * size],
    "brackets": lambda size: [b"[" * size],
    "colons": lambda size: [b":" * size],
    "lines": lambda size: [b"6.6.6.6"] * (size // 8),
    "empty lines": lambda size: [b""] * (size // 8),
    "letters of no alphabet": lambda size: [bytes(range(128, 256)) * (size // 128)],
}


@pytest.mark.fault("E7")
@pytest.mark.parametrize("hostile", HOSTILE_VALUES.values(), ids=HOSTILE_VALUES)
@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded"])
@pytest.mark.parametrize("hops", [1, 32])
def test_ten_times_the_forwarding_header_costs_twelve_times_the_work_at_most(
    hostile: Callable[[int], list[bytes]], header: Any, hops: int
) -> None:
    def work(size: int) -> int:
        identify = client_address(trusted_hops=hops, header=header)
        headers = [(header.encode(), value) for value in hostile(size)]
        connection = HTTPConnection({"type": "http", "headers": headers, "client": ("::1", 1)})
        return lines_run(lambda: identify(connection))

    small, large, largest = work(800), work(8_000), work(80_000)

    assert large <= 12 * small
    assert largest <= 12 * large


@pytest.mark.fault("E6", "E7")
@pytest.mark.parametrize("hostile", HOSTILE_VALUES.values(), ids=HOSTILE_VALUES)
@pytest.mark.parametrize("name", [b"x-forwarded-for", b"X-FORWARDED-FOR"])
def test_what_is_forged_before_our_proxies_names_nobody_else(
    hostile: Callable[[int], list[bytes]], name: bytes
) -> None:
    identify = client_address(trusted_hops=2)
    forged = [(name, value) for value in hostile(64_000)]
    ours = [(b"x-forwarded-for", b"203.0.113.7"), (b"X-Forwarded-For", b"198.51.100.1")]
    connection = HTTPConnection({"type": "http", "headers": [*forged, *ours], "client": None})

    assert identify(connection) == Account("203.0.113.7", anonymous=True)


HOSTILE_LANGUAGES: dict[str, Callable[[int], str]] = {
    "commas": lambda size: "," * size,
    "semicolons": lambda size: ";" * size,
    "hyphens": lambda size: "-" * size,
    "long tag": lambda size: "a-" * (size // 2),
    "many tags": lambda size: "x1," * (size // 3),
    "weights": lambda size: "fr;q=0.1," * (size // 9),
    "digits": lambda size: "fr;q=" + "9" * size,
    "spaces": lambda size: "fr" + " " * size + ";q=1",
    "equals": lambda size: "fr;" + "=" * size,
}
MESSAGES = {"en": "No.", "fr": "Non.", "pt-BR": "Não.", "zh-Hant-TW": "不。"}


@pytest.mark.parametrize("hostile", HOSTILE_LANGUAGES.values(), ids=HOSTILE_LANGUAGES)
def test_ten_times_the_accepted_languages_cost_twelve_times_the_work_at_most(
    hostile: Callable[[int], str],
) -> None:
    small, large, largest = (
        lines_run(lambda size=size: choose(MESSAGES, hostile(size)))  # type: ignore[misc]  # bound
        for size in (100, 1_000, 100_000)
    )

    assert large <= 12 * small
    assert largest <= 12 * large


@given(st.text(st.characters(max_codepoint=255)) | st.text("frenptzh-*;q=, 0.19", max_size=40))
def test_any_accepted_languages_get_a_message_that_is_there(header: str) -> None:
    language, text = choose(MESSAGES, header)

    assert MESSAGES[language] == text


@pytest.mark.fault("E6")
@pytest.mark.parametrize(
    "value",
    [
        b"\r\nset-cookie: x=1",
        b"\x00",
        b"fr\r\n\r\nbody",
        b"\xff" * 70_000,
        b"fr;q=" + b"9" * 70_000,
    ],
    ids=repr,
)
async def test_nothing_of_a_request_comes_back_in_a_header(value: bytes) -> None:
    document = policy(0)
    document["tiers"]["everyone"]["messages"] = {"image": MESSAGES}
    app = behind(Limiter(document, MemoryBackend()), plain)
    names = [b"accept-language", b"x-forwarded-for", b"ratelimit", b"origin", b"x-key"]

    start, body = await run(app, headers=[(name, value) for name in names])

    assert start["status"] == 403
    assert json.loads(body["body"])["reason"] == "zero"
    for name, sent in start["headers"]:
        assert name.isascii()
        assert sent.isascii()
        assert not set(sent) & set(b"\r\n\x00")


# --- Ids, paths and costs

ALIKE = [
    *["ann", "ann ", " ann", "Ann", "ANN", "\u0430nn", "ann\u200b", "\ufeffann", "\u202eann"],
    *["ann\x00", "ann\r\n", "ann\n", "%61nn", "ann%00", "a\u0301nn", "\u00e1nn", "ann\t", "./ann"],
    *["user:tier:enterprise:x", "user:tier:enterprise", "user", "{ann}", "}{", "{", "}", "*ann"],
    *["tl1:{default:0}:image:everyone::ann", "everyone::ann", ":ann", "ann:", "~ann", "=ann"],
    *["192.0.2.1", "*192.0.2.1", "unknown", "a" * 64, "a" * 65, "a" * 1_000_000, "\U0001f600"],
]  # fmt: skip


@pytest.mark.fault("C1", "C2")
@pytest.mark.parametrize("backend", ["memory", "redis"])
async def test_ids_that_look_alike_share_nothing_and_choose_nothing(
    backend: str, request: pytest.FixtureRequest
) -> None:
    document = {
        "order": ["enterprise", "everyone"],
        "features": {"image": {"routes": ["POST /images"]}},
        "tiers": {
            "enterprise": {"when": {"plan": "enterprise"}, "quotas": {"image": "unlimited"}},
            "everyone": {"quotas": {"image": "1/hour"}},
        },
    }
    store: Any = MemoryBackend()
    if backend == "redis":
        store = RedisBackend.from_url(request.getfixturevalue("redis_url"), timeout=PATIENT)
    async with Limiter(document, store) as limiter:
        for id_ in ALIKE:
            account = Account(id_)
            app = behind(limiter, plain, identify=lambda _, account=account: account)

            assert await statuses(app, 2) == [200, 429], id_[:80]


@pytest.mark.fault("E10")
@pytest.mark.parametrize(
    "path",
    ["/images\x00", "/images\r\nx: y", "/images\ud800", "/" * 1_000_000, "/images" + "/" * 10**6,
     "/images/" + "x" * 1_000_000, "/images/\u202e", "", "*", "images", "/images\n" * 50_000],
    ids=lambda path: repr(path[:20]),
)  # fmt: skip
async def test_any_path_is_answered(path: str) -> None:
    document = policy(deep=(["GET /images/{rest:path}", "POST /{a}/{b:path}/{c}"], "9/hour"))
    app = behind(Limiter(document, MemoryBackend()), plain)

    for scope in ({}, {"root_path": "/api"}, {"root_path": path}, {"type": "websocket"}):
        assert await run(app, path=path, **scope)


COSTS: list[Any] = [
    *[-1, 10**9 + 1, 10**400, -(10**400), 1.0, 0.5, float("nan"), float("inf"), -0.0],
    *[True, False, None, "1", b"1", [1], {"cost": 1}, object(), 1j, ..., int, lambda: 1],
]  # fmt: skip


class Sly(int):
    """A number that says it is another."""

    def __le__(self, other: object) -> bool:
        return True

    def __ge__(self, other: object) -> bool:
        return True


@pytest.mark.fault("A6")
@pytest.mark.parametrize("cost", [*COSTS, Sly(-5)], ids=lambda cost: f"{type(cost).__name__}")
async def test_a_cost_from_a_body_is_a_whole_number_or_the_callers_error(cost: Any) -> None:
    spy = Spy()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        limits = scope["state"]["tieredlimit"]
        with pytest.raises(UsageError, match="cost must be a whole number") as caught:
            await limits.take("image", cost)
        str(caught.value).encode()
        assert len(str(caught.value)) < 300
        await plain(scope, receive, send)

    start, _ = await run(behind(Limiter(policy(), spy), app), path="/unmetered")

    assert start["status"] == 200
    assert spy.takes == []


@pytest.mark.parametrize(
    "feature",
    ["\udcff", "x\r\nERROR forged", "\x1b[2J", "x" * 100_000, "\u202e", None, 7, ["image"]],
)
async def test_a_feature_from_a_body_is_told_on_one_line_that_can_be_sent(feature: Any) -> None:
    with pytest.raises(UsageError) as caught:
        await limiter_of().take(Account("ann"), feature)

    assert str(caught.value).isprintable()
    assert len(str(caught.value).encode()) < 400


# --- An identify that misbehaves


class Unsure:
    """What a database's client returns by mistake: it has no truth value."""

    def __bool__(self) -> bool:
        raise TypeError("the truth value is ambiguous")


async def no_account() -> str:
    return "ann"


def strange_answers() -> list[Any]:
    return [
        *["ann", "", 7, 0, 0.0, True, False, [], {}, (), {"id": "ann"}, b"ann", Unsure(), Account],
        *[iter(()), (n for n in range(1)), Exception("no"), object(), no_account, ...],
    ]  # fmt: skip


@pytest.mark.fault("C2", "E4")
@pytest.mark.parametrize("number", range(len(strange_answers())))
@pytest.mark.parametrize("later", [False, True])
async def test_whatever_an_identify_returns_that_is_no_account_the_address_is_charged(
    number: int, later: bool
) -> None:
    asked: list[HTTPConnection] = []

    def identify(connection: HTTPConnection) -> Any:
        asked.append(connection)
        return strange_answers()[number]

    async def identify_later(connection: HTTPConnection) -> Any:
        return identify(connection)

    app = behind(limiter_of(), plain, identify=identify_later if later else identify)

    assert await statuses(app, 3) == [200, 200, 429]
    assert len(asked) == 3


async def test_an_awaitable_that_leads_to_another_is_no_account() -> None:
    async def identify(connection: HTTPConnection) -> Any:
        future = asyncio.get_running_loop().create_future()
        future.set_result(Account("ann"))
        return future

    assert await statuses(behind(limiter_of(), plain, identify=identify), 3) == [200, 200, 429]


class OwnExit(BaseException):
    """What is no `Exception`, as those that end a process or a task are not."""


ENDS = [OwnExit, KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError]


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("later", [False, True])
def test_what_ends_a_process_or_a_task_passes_through(
    kind: type[BaseException], later: bool
) -> None:
    def identify(connection: HTTPConnection) -> Account | None:
        raise kind("enough")

    async def identify_later(connection: HTTPConnection) -> Account | None:
        raise kind("enough")

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None: ...

    spy, recorder = Spy(), Recorder()
    app = behind(Limiter(policy(), spy), recorder, identify=identify_later if later else identify)
    scope: Scope = {
        "type": "http", "method": "POST", "path": "/images", "headers": [], "client": None
    }  # fmt: skip

    # By hand: an event loop ends with the first two of these.
    with pytest.raises(kind, match="enough"):
        app(scope, receive, send).send(None)

    assert (spy.takes, recorder.scopes) == ([], [])


@pytest.mark.fault("E4")
@pytest.mark.parametrize(
    "kind",
    [StopIteration, StopAsyncIteration, RecursionError, MemoryError, TimeoutError, OSError,
     AssertionError, UnicodeError, NotImplementedError],
)  # fmt: skip
@pytest.mark.parametrize("how", ["now", "later", "blocking"])
async def test_whatever_an_identify_raises_is_the_outage_answer(
    kind: type[Exception], how: str
) -> None:
    def now(connection: HTTPConnection) -> Account | None:
        raise kind

    async def later(connection: HTTPConnection) -> Account | None:
        raise kind

    identify: Identify = {"now": now, "later": later, "blocking": blocking(now)}[how]
    limiter = limiter_of(video=(["POST /videos"], "9/hour"))
    recorder = Recorder()
    app = behind(limiter, recorder, identify=identify)

    assert await statuses(app, 1, path="/images") == [200]
    assert await statuses(app, 1, path="/videos") == [503]
    assert [scope["path"] for scope in recorder.scopes] == ["/images"]


@pytest.mark.fault("E4", "E9")
async def test_an_identify_that_hangs_holds_up_its_own_request_alone_until_it_is_ended() -> None:
    asking, never = asyncio.Event(), asyncio.Event()

    async def identify(connection: HTTPConnection) -> Account | None:
        if dict(connection.scope["headers"]).get(b"x-key") != b"slow":
            return Account("ann")
        asking.set()
        await never.wait()
        return Account("ann")

    spy, recorder = Spy(), Recorder()
    app = behind(Limiter(policy(), spy), recorder, identify=identify)
    hung = asyncio.create_task(run(app, headers=[(b"x-key", b"slow")]))
    await asking.wait()

    assert await statuses(app, 2) == [200, 200]
    hung.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hung
    assert len(spy.takes) == len(recorder.scopes) == 2
    assert await statuses(app, 1) == [429]


@pytest.mark.fault("E9")
async def test_a_handlers_second_take_asks_anew_where_the_first_was_ended() -> None:
    asking, never = asyncio.Event(), asyncio.Event()
    asked: list[str] = []

    async def identify(connection: HTTPConnection) -> Account | None:
        asked.append("once")
        if len(asked) == 1:
            asking.set()
            await never.wait()
        return Account("ann")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        limits = scope["state"]["tieredlimit"]
        first = asyncio.create_task(limits.account())
        await asking.wait()
        first.cancel()
        assert await limits.account() == Account("ann")
        await plain(scope, receive, send)

    start, _ = await run(behind(limiter_of(), app, identify=identify), path="/unmetered")

    assert start["status"] == 200
    assert len(asked) == 2


@pytest.mark.fault("E6")
@pytest.mark.parametrize(
    "values",
    [
        [b"a" * 1_000_000],
        [b"\x00"],
        [b"\xff"],
        [b"k\r\nx-tier: pro"],
        [b"k"] * 50_000,
        [b"a", b"b"],
    ],
    ids=lambda values: f"{len(values)} of {values[0][:12]!r}",
)
async def test_any_key_is_looked_up_as_it_is_or_not_at_all(values: list[bytes]) -> None:
    keys: list[str] = []

    def lookup(key: str) -> Account | None:
        keys.append(key)
        return None

    app = behind(limiter_of(), plain, identify=api_key(lookup))
    headers: list[Header] = [(b"x-api-key", value) for value in values]

    assert await statuses(app, 3, headers=headers) == [200, 200, 429]
    assert set(keys) <= {value.decode("latin-1") for value in values}
    assert all(len(key) <= 4_096 for key in keys)


# --- Invented ids by the thousand

FLOODED = {
    "order": ["pro", "everyone"],
    "features": {"image": {"outage": "allow"}},
    "defaults": {"quotas": {"image": "2/hour"}},
    "tiers": {"pro": {"when": {"plan": "pro"}}, "everyone": {}},
}


@pytest.mark.fault("C7")
@pytest.mark.parametrize("invented", ["strangers", "accounts"])
async def test_no_flood_of_ids_makes_memory_forget_anybody(invented: str) -> None:
    clock = Clock()
    backend = MemoryBackend(clock=clock, max_keys=100, max_catch_all_keys=50)
    limiter = Limiter(FLOODED, backend)
    known = [Account("ann", plan="pro"), Account("192.0.2.1", anonymous=True)]
    for account in known * 2:
        assert (await limiter.take(account, "image")).reason == "allowed"

    for number in range(20_000):
        if invented == "accounts":
            await limiter.take(Account(f"a{number}", plan="pro"), "image")
        else:
            await limiter.take(Account(f"s{number}", anonymous=True), "image")

    assert len(backend) <= 150
    assert [(await limiter.take(account, "image")).reason for account in known] == ["quota"] * 2
    clock.now += HOUR_US
    assert [(await limiter.take(account, "image")).reason for account in known] == ["allowed"] * 2


@pytest.mark.fault("B2", "C7")
@given(st.lists(st.integers(-(10**9), 10**6), min_size=1, max_size=50))
def test_a_flood_while_the_clock_goes_back_lets_nobody_in_again(steps: list[int]) -> None:
    async def flood() -> None:
        clock = Clock()
        latest = clock.now
        backend = MemoryBackend(clock=clock, max_keys=20, max_catch_all_keys=20)
        limiter = Limiter(FLOODED, backend)
        ann = Account("ann", plan="pro")
        for _ in range(2):
            await limiter.take(ann, "image")
        for number, step in enumerate(steps):
            clock.now = min(clock.now + step, latest)
            await limiter.take(Account(f"s{number}", anonymous=True), "image")
            await limiter.take(Account(f"a{number}", plan="pro"), "image")
            assert (await limiter.take(ann, "image")).reason == "quota"

    asyncio.run(flood())


@pytest.mark.fault("C6", "C7")
async def test_a_flood_of_ids_leaves_redis_with_keys_that_all_expire(
    redis_server: RedisServer, redis_url: str
) -> None:
    async with Limiter(FLOODED, RedisBackend.from_url(redis_url, timeout=PATIENT)) as limiter:
        ann = Account("ann", plan="pro")
        for _ in range(2):
            await limiter.take(ann, "image")
        for start in range(0, 2_000, 200):
            ids = [f"{number}" * 30 for number in range(start, start + 200)]
            await asyncio.gather(
                *[limiter.take(Account(one, anonymous=True), "image") for one in ids]
            )

        assert (await limiter.take(ann, "image")).reason == "quota"
    client = _client(redis_server.port)
    try:
        buckets = [key async for key in client.scan_iter(match="*:image:*", count=1_000)]
        lives = [await client.pttl(key) for key in buckets]
    finally:
        await client.aclose()
    assert len(buckets) == 2_001
    assert all(0 < life <= 7_200_000 for life in lives)
    assert max(map(len, buckets)) < 200


def _client(port: int) -> Any:
    from redis.asyncio import Redis  # here, for its types are none of ours

    return Redis(port=port)

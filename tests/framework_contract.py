"""What a client sees of an application behind the middleware, whatever framework it is written in.

Each framework's test module builds the same application, with the endpoints listed at `Framework`,
and subclasses the contract. Requests are plain ASGI calls: nothing is forgiven on the way.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from tests.test_settling import push
from tieredlimit import Account, Decision, Limiter, UsageError
from tieredlimit.backends import RedisBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from starlette.requests import HTTPConnection
    from starlette.types import ASGIApp, Message, Scope

POLICY: dict[str, Any] = {
    "order": ["banned", "everyone"],
    "features": {
        "image": {
            "routes": [
                *("POST /images", "GET /images/{id}", "POST /both", "POST /crash", "GET /stream"),
                *("POST /api/images", "POST /mounted/pictures", "GET /socket"),
            ],
            "outage": "deny",
        },
        "video": {"outage": "deny"},
    },
    "tiers": {
        "banned": {
            "when": {"plan": "banned"},
            "quotas": {"image": 0, "video": 0},
            "messages": {"image": {"en": "No images for you.", "fr": "Pas d'images pour vous."}},
        },
        "everyone": {"quotas": {"image": "2/hour", "video": "8/hour"}},
    },
}

WITHOUT_IMAGES = {"features": {"video": {}}, "tiers": {"all": {"quotas": {"video": "8/hour"}}}}

# The doors by which an application may take an image, none of them better known than the others.
DOORS = ["/images", "/limited", "/limited-sync", "/class", "/taken"]
FIELDS = {"ratelimit", "ratelimit-policy", "retry-after"}
CLIENT = ("192.0.2.1", 1)
PATIENCE = 10.0

PREFLIGHT = {"origin": "https://x.example", "access_control_request_method": "POST"}

PATHS = ["/images", "/images/7", "/api/images", "/mounted/pictures"]
ROOTS = ["", "/", "/root", "/root/", "root", "/images", "/api", "/mounted", "//", "/root/images"]
METERED = b'"image"'

WORD: ContextVar[str] = ContextVar("WORD", default="unset")
GATE: ContextVar[asyncio.Event] = ContextVar("GATE")
DONE: ContextVar[asyncio.Event] = ContextVar("DONE")


@dataclass
class Answer:
    """What an application sent for one request."""

    messages: list[Message] = field(default_factory=list)

    @property
    def status(self) -> int:
        status: int = self.messages[0]["status"]
        return status

    @property
    def headers(self) -> dict[str, str]:
        pairs = self.messages[0].get("headers", ())
        return {name.decode().lower(): value.decode() for name, value in pairs}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Framework:
    """Build the application in one framework.

    It has these endpoints, of which the first line are metered by `POLICY`:

    - `POST /images`, `GET /images/{id}`, `POST /api/images` in an included router, `POST
      /mounted/pictures` in a mounted application, `POST /crash` that raises: JSON `{"feature":
      feature_of(request)}`
    - `POST /both`: also `limited("image")`, and then takes an image in the handler
    - `POST /limited`, `POST /limited-sync` (a plain function), `POST /class`: `limited("image")`
    - `OPTIONS /options`: `limited("image")`, where the application itself answers that method
    - `POST /taken`: takes an image in the handler and raises where it is denied
    - `POST /costly`: `limited("video")` with the cost of the header x-cost, and the account x-who;
      JSON `{"left": …}` of `limits_of(request)`; `POST /costly-sync` in a plain function
    - `GET /stream`: two chunks, the second after `GATE`; `POST /background`: sets `DONE` after the
      answer, which `GATE` holds up
    - `GET /free`: JSON `{"feature": …, "word": WORD.get()}`; `GET /free-crash` raises
    - WebSockets `/socket`, and `/limited-socket` with `limited("image")`: "hello", then closed
    """

    stranger: ClassVar[bytes] = b"who are you?"
    """How the framework itself renders what `identify` raises."""
    beside: ClassVar[set[tuple[str, str]]] = set()
    """Fields that the application gives every answer of its own."""

    def build(self, limiter: Limiter, **options: Any) -> ASGIApp:
        """Return the application behind the middleware, which is given `options`."""
        raise NotImplementedError

    def may_serve(self, path: str, root: str) -> bool:
        """Say whether the router has anything there, where asking it so is quicker."""
        return True

    def meters(self, path: str) -> bool:
        """Say whether the framework's page leaves it to the policy's routes to meter a path."""
        return True


def hostile_requests() -> Iterator[tuple[str, str]]:
    """Yield methods and spellings of the metered paths that some router may take for the same."""
    for path in PATHS:
        method = "GET" if "7" in path else "POST"
        yield from product(["GET", "POST", "get", "post", "Post", "HEAD", "PUT", "BREW"], [path])
        around = product(
            ["", "/", "//", ".", "/.", "/./", "/x/..", "/root", "/root/", "/x/root", "http://test"],
            ["", "/", "//", "\n", "/\n", ".", "/.", ";x", "?x", "#x", "%2f", "\x00", " ", "\\"],
        )
        spellings = [
            *(before + path + after for before, after in around),
            *(path[1:], path.replace("/", "//"), path.replace("/", "\\"), path.upper()),
            *(path.replace("i", "\u0131"), "".join(path.rsplit("/", 1)), f"http:{path}"),
            *(f"http://test{path};a=b?c#d", f"http://[{path}"),
        ]
        yield from product([method], spellings)


class Exchange:
    """One request to an application: what it receives and sends, as a server would have it."""

    def __init__(self) -> None:
        self.answer = Answer()
        self.body: asyncio.Queue[bytes] = asyncio.Queue()
        self.complete = asyncio.Event()
        self._received: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive(self) -> Message:
        if self._received:
            return self._received.pop()
        await self.complete.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.answer.messages.append(message)
        if message["type"] == "http.response.body":
            self.body.put_nowait(message.get("body", b""))
            if not message.get("more_body", False):
                self.complete.set()

    async def run(self, app: ASGIApp, scope: dict[str, Any]) -> Answer:
        """Ask; what is raised after the answer is a server's to log."""
        try:
            await app(scope, self.receive, self.send)
        except (RuntimeError, ValueError) as exc:
            if str(exc) not in ("crash", "Invalid IPv6 URL"):  # the latter is Quart's
                raise
        return self.answer


async def call(app: ASGIApp, method: str, path: str, **scope: Any) -> Answer:
    return await Exchange().run(app, _scope("http", path, method=method, **scope))


async def ask(app: ASGIApp, line: str, **headers: str) -> Answer:
    method, path = line.split(" ")
    return await call(app, method, path, headers=_headers(headers))


async def connect(app: ASGIApp, path: str, *, extension: bool = False) -> Answer:
    """Open a WebSocket and return all that the application sent."""
    answer = Answer()
    received: list[Message] = [{"type": "websocket.connect"}]
    closed = asyncio.Event()

    async def receive() -> Message:
        if received:
            return received.pop()
        await closed.wait()
        return {"type": "websocket.disconnect", "code": 1000}

    async def send(message: Message) -> None:
        answer.messages.append(message)
        ends = message["type"] == "websocket.http.response.body" and not message.get("more_body")
        if ends or message["type"] == "websocket.close":
            closed.set()

    extensions: dict[str, Any] = {"websocket.http.response": {}} if extension else {}
    scope = _scope("websocket", path, extensions=extensions, subprotocols=[])
    async with asyncio.timeout(PATIENCE):
        await app(scope | {"scheme": "ws"}, receive, send)
    return answer


def _scope(kind: str, path: str, **more: Any) -> dict[str, Any]:
    return {
        "type": kind,
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": _headers({}),
        "client": CLIENT,
        "server": ("test", 80),
        "state": {},
        **more,
    }


def _headers(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    named = {"host": "test", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return [(name.encode(), value.encode()) for name, value in named.items()]


def identify(conn: HTTPConnection) -> Account | None:
    if conn.headers.get("x-who") == "stranger":
        raise HTTPException(401, "who are you?", {"www-authenticate": "Key"})
    who = conn.headers.get("x-who", "")
    return Account(who, plan="banned" if who == "mallory" else "free") if who else None


def payer(request: Any) -> Account:
    """Who pays by a header, of any framework's request."""
    return Account("payer-" + request.headers.get("x-who", "nobody"))


async def price(request: Any) -> int:
    return int(request.headers.get("x-cost", "1"))


async def hold(chunks: list[bytes]) -> AsyncIterator[bytes]:
    yield chunks[0]
    await GATE.get().wait()
    yield chunks[1]


class FrameworkContract(Framework):
    """What every framework promises. Subclass it and provide `build`."""

    @pytest.fixture
    async def limiter(self) -> AsyncIterator[Limiter]:
        async with Limiter(POLICY) as opened:
            yield opened

    @pytest.fixture
    def app(self, limiter: Limiter) -> ASGIApp:
        return self.build(limiter, identify=identify)

    async def test_allowed_request_is_answered_with_its_fields(self, app: ASGIApp) -> None:
        answer = await ask(app, "POST /images", x_who="ada")

        assert (answer.status, answer.json) == (200, {"feature": "image"})
        assert answer.headers["ratelimit"].startswith('"image-hour";r=1;t=')
        assert answer.headers["ratelimit-policy"] == '"image-hour";q=2;w=3600'
        assert "retry-after" not in answer.headers

    @pytest.mark.parametrize("door", DOORS)
    async def test_allowed_request_has_fields_by_whichever_door(
        self, app: ASGIApp, door: str
    ) -> None:
        answer = await ask(app, f"POST {door}", x_who="ada")

        assert answer.status == 200
        assert answer.headers["ratelimit"].startswith('"image-hour";r=1;t=')

    @pytest.mark.parametrize("door", DOORS)
    async def test_used_up_quota_is_a_429_that_says_when(self, app: ASGIApp, door: str) -> None:
        made = [await ask(app, f"POST {door}", x_who="ada") for _ in range(3)]

        assert [answer.status for answer in made] == [200, 200, 429]
        denied = made[-1]
        assert denied.headers["content-type"] == "application/problem+json"
        assert denied.headers["cache-control"] == "no-store"
        assert 1790 <= int(denied.headers["retry-after"]) <= 1800
        assert denied.headers["ratelimit"].startswith('"image-hour";r=0;t=')
        assert (denied.json["reason"], denied.json["violated-policies"]) == (
            "quota",
            ["image-hour"],
        )

    async def test_denial_is_the_same_by_whichever_door(self, app: ASGIApp) -> None:
        made = {door: await ask(app, f"POST {door}", x_who="mallory") for door in DOORS}

        told = {
            door: (answer.status, sorted(answer.headers.items() - self.beside), answer.body)
            for door, answer in made.items()
        }
        assert told == dict.fromkeys(DOORS, told["/images"])
        assert made["/images"].status == 403

    @pytest.mark.parametrize("door", DOORS)
    async def test_zero_is_a_403_in_the_clients_language(self, app: ASGIApp, door: str) -> None:
        french = await ask(app, f"POST {door}", x_who="mallory", accept_language="fr-CA, en;q=0.4")
        plain = await ask(app, f"POST {door}", x_who="mallory")

        assert (french.status, french.json["reason"]) == (403, "zero")
        assert (french.json["detail"], plain.json["detail"]) == (
            "Pas d'images pour vous.",
            "No images for you.",
        )
        assert french.headers["content-language"] == "fr"
        assert (french.headers["ratelimit"], french.headers["ratelimit-policy"]) == (
            '"image";r=0',
            '"image";q=0',
        )
        assert "retry-after" not in french.headers

    @pytest.mark.parametrize("door", DOORS)
    async def test_closed_feature_is_a_403_with_the_operators_message(
        self, app: ASGIApp, limiter: Limiter, door: str
    ) -> None:
        await limiter.control.close("image", everyone=True, message="Closed for lunch.")

        answer = await ask(app, f"POST {door}", x_who="ada")

        assert (answer.status, answer.json["reason"]) == (403, "closed")
        assert answer.json["detail"] == "Closed for lunch."

    @pytest.mark.parametrize("door", DOORS)
    async def test_dead_redis_is_the_outage_answer_and_no_500(self, door: str) -> None:
        limiter = Limiter(POLICY, "redis://127.0.0.1:1/0")
        app = self.build(limiter, identify=identify)

        answer = await ask(app, f"POST {door}", x_who="ada")
        await limiter.close()

        assert (answer.status, answer.json["reason"]) == (503, "outage")
        assert int(answer.headers["retry-after"]) >= 1

    @pytest.mark.parametrize("door", DOORS)
    async def test_answer_that_an_identify_raises_is_given_by_whichever_door(
        self, app: ASGIApp, door: str
    ) -> None:
        answer = await ask(app, f"POST {door}", x_who="stranger")

        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Key")
        assert answer.body in (b"who are you?", self.stranger)

    @pytest.mark.parametrize("door", DOORS)
    async def test_feature_that_a_pushed_policy_has_no_more_is_not_limited_any_more(
        self, app: ASGIApp, limiter: Limiter, door: str
    ) -> None:
        await push(limiter, WITHOUT_IMAGES)
        made = [await ask(app, f"POST {door}", x_who="mallory") for _ in range(3)]
        await push(limiter, POLICY)
        after = await ask(app, f"POST {door}", x_who="mallory")

        assert [answer.status for answer in (*made, after)] == [200, 200, 200, 403]
        assert FIELDS.isdisjoint(made[0].headers)

    @pytest.mark.parametrize("door", DOORS)
    async def test_statuses_and_legacy_fields_hold_for_whichever_door(
        self, limiter: Limiter, door: str
    ) -> None:
        app = self.build(limiter, identify=identify, statuses={"zero": 402}, legacy_fields=True)

        denied = await ask(app, f"POST {door}", x_who="mallory")
        allowed = await ask(app, f"POST {door}", x_who="ada")

        assert (denied.status, denied.json["status"]) == (402, 402)
        assert allowed.headers["x-ratelimit-remaining"] == "1"

    @pytest.mark.parametrize("door", DOORS)
    async def test_on_denied_answers_for_whichever_door(self, limiter: Limiter, door: str) -> None:
        def on_denied(scope: Scope, decision: Decision) -> ASGIApp:
            return PlainTextResponse(f"{decision.feature} at {scope['path']}", 418)

        app = self.build(limiter, identify=identify, on_denied=on_denied)

        denied = await ask(app, f"POST {door}", x_who="mallory")

        assert (denied.status, denied.body.decode()) == (418, f"image at {door}")
        assert denied.headers["content-length"] == str(len(denied.body))

    async def test_feature_is_charged_once_by_all_doors_together(self, app: ASGIApp) -> None:
        both = await ask(app, "POST /both", x_who="ada")
        after = await ask(app, "POST /images", x_who="ada")

        assert both.status == 200
        assert both.headers["ratelimit"].startswith('"image-hour";r=1;')
        assert after.headers["ratelimit"].startswith('"image-hour";r=0;')

    @pytest.mark.parametrize("path", ["/costly", "/costly-sync"])
    async def test_cost_and_account_are_told_from_the_request(
        self, app: ASGIApp, path: str
    ) -> None:
        first = await ask(app, f"POST {path}", x_who="ada", x_cost="5")
        second = await ask(app, f"POST {path}", x_who="ada", x_cost="4")
        other = await ask(app, f"POST {path}", x_who="bob", x_cost="4")

        assert (first.status, first.json) == (200, {"left": 3})
        assert (second.status, second.json["feature"]) == (429, "video")
        assert (other.status, other.json) == (200, {"left": 4})

    @pytest.mark.parametrize("path", ["/costly", "/costly-sync"])
    async def test_cost_that_is_none_is_an_error_of_the_application(
        self, app: ASGIApp, path: str
    ) -> None:
        # Starlette answers 500 and has the server log the error, others answer.
        with suppress(UsageError):
            assert (await ask(app, f"POST {path}", x_who="ada", x_cost="-1")).status == 500

        assert (await ask(app, f"POST {path}", x_who="ada", x_cost="8")).status == 200

    async def test_unmetered_request_is_untouched(self, app: ASGIApp) -> None:
        answer = await ask(app, "GET /free", x_who="mallory")

        assert (answer.status, answer.json["feature"]) == (200, None)
        assert FIELDS.isdisjoint(answer.headers)

    async def test_path_parameter_is_matched_and_head_is_charged_as_get(self, app: ASGIApp) -> None:
        got = await ask(app, "GET /images/7", x_who="ada")
        await ask(app, "HEAD /images/7", x_who="ada")
        after = await ask(app, "GET /images/8", x_who="ada")

        assert (got.status, got.json) == (200, {"feature": "image"})
        assert after.status == 429

    @pytest.mark.parametrize("path", ["/api/images", "/mounted/pictures"])
    async def test_included_routers_and_mounts_are_metered(self, app: ASGIApp, path: str) -> None:
        made = [await ask(app, f"POST {path}", x_who="ada") for _ in range(3)]

        assert [answer.status for answer in made] == [200, 200, 429]
        assert made[0].json == {"feature": "image"}

    async def test_paths_are_below_the_root_path(self, app: ASGIApp) -> None:
        headers = _headers({"x-who": "ada"})
        made = [
            await call(app, "POST", "/root/images", root_path="/root", headers=headers)
            for _ in range(3)
        ]

        assert [answer.status for answer in made] == [200, 200, 429]
        assert made[0].json == {"feature": "image"}

    @pytest.mark.parametrize(
        ("line", "status"),
        [("GET /nowhere", 404), ("DELETE /free", 405), ("GET /free-crash", 500)],
    )
    async def test_frameworks_own_answers_stay(self, app: ASGIApp, line: str, status: int) -> None:
        answer = await ask(app, line, x_who="ada")

        assert answer.status == status
        assert FIELDS.isdisjoint(answer.headers)

    async def test_crash_of_a_metered_handler_stays_one(self, app: ASGIApp) -> None:
        answer = await ask(app, "POST /crash", x_who="ada")

        assert answer.status == 500

    async def test_streaming_answer_passes_unbuffered(self, app: ASGIApp) -> None:
        GATE.set(asyncio.Event())
        exchange = Exchange()
        scope = _scope("http", "/stream", method="GET", headers=_headers({"x-who": "ada"}))

        running = asyncio.create_task(exchange.run(app, scope))
        async with asyncio.timeout(PATIENCE):
            while await exchange.body.get() != b"first":
                pass
            assert not exchange.complete.is_set()
            GATE.get().set()
            answer = await running

        assert answer.body == b"firstlast"
        assert answer.headers["ratelimit"].startswith('"image-hour";r=1;')

    async def test_background_task_runs_after_the_answer(self, app: ASGIApp) -> None:
        GATE.set(asyncio.Event())
        DONE.set(asyncio.Event())
        exchange = Exchange()
        scope = _scope("http", "/background", method="POST", headers=_headers({"x-who": "ada"}))

        running = asyncio.create_task(exchange.run(app, scope))
        async with asyncio.timeout(PATIENCE):
            await exchange.complete.wait()
            assert not DONE.get().is_set()
            GATE.get().set()
            await DONE.get().wait()
            await running

    async def test_context_variables_of_what_is_around_reach_the_handler(
        self, app: ASGIApp
    ) -> None:
        WORD.set("set outside")

        answer = await ask(app, "GET /free")

        assert answer.json["word"] == "set outside"

    async def test_preflight_that_the_framework_answers_is_never_charged(
        self, app: ASGIApp
    ) -> None:
        for door in DOORS:
            for _ in range(3):
                answer = await ask(app, f"OPTIONS {door}", x_who="ada", **PREFLIGHT)
                assert answer.status in (200, 204, 405)
                assert b'"feature"' not in answer.body  # no endpoint has run

        assert (
            (await ask(app, "POST /limited", x_who="ada"))
            .headers["ratelimit"]
            .startswith('"image-hour";r=1;')
        )

    async def test_preflight_that_runs_a_limited_endpoint_is_charged(self, app: ASGIApp) -> None:
        made = [await ask(app, "OPTIONS /options", x_who="ada", **PREFLIGHT) for _ in range(3)]

        assert [answer.status for answer in made] == [200, 200, 429]
        assert made[0].json == {"feature": None}

    @pytest.mark.fault("E10")
    async def test_whatever_the_router_gives_to_a_metered_handler_is_metered(self) -> None:
        """Odd spellings of paths, below odd root paths: a handler that ran was metered."""
        policy = {**POLICY, "tiers": {"all": {"quotas": {"image": "unlimited", "video": 0}}}}
        policy["order"] = ["all"]
        async with Limiter(policy) as limiter:
            app = self.build(limiter)
            ran = {}
            for (method, path), root in product(hostile_requests(), ROOTS):
                if not self.may_serve(path, root):
                    continue
                answer = await call(app, method, path, root_path=root, raw_path=b"/elsewhere")
                if answer.messages and answer.status == 200:
                    ran[method, path, root] = answer.body

        bodies = {one: body for one, body in ran.items() if b'"feature"' in body}
        escaped = {path for (_, path, _), body in bodies.items() if METERED not in body}
        assert [path for path in escaped if self.meters(path)] == []
        assert len(ran) > len(PATHS)  # the plain ones at least, below each root

    async def test_plain_and_async_handlers_share_a_bucket_on_redis(self, redis_url: str) -> None:
        backend = RedisBackend.from_url(redis_url, timeout=PATIENCE)
        async with Limiter(POLICY, backend) as limiter:
            app = self.build(limiter, identify=identify)

            made = [
                (await ask(app, f"POST {door}", x_who="ada")).status
                for door in ("/limited-sync", "/limited", "/limited-sync")
            ]

        assert made == [200, 200, 429]


class WebSocketContract(FrameworkContract):
    """What every framework promises that has WebSockets."""

    @pytest.mark.parametrize("path", ["/socket", "/limited-socket"])
    async def test_websocket_is_denied_before_it_is_accepted(self, app: ASGIApp, path: str) -> None:
        made = [await connect(app, path) for _ in range(3)]

        for answer in made[:2]:
            assert answer.messages[0]["type"] == "websocket.accept"
            assert "ratelimit" in answer.headers
            assert answer.messages[1]["text"] == "hello"
        assert [(one["type"], one.get("code")) for one in made[2].messages] == [
            ("websocket.close", 1008)
        ]

    @pytest.mark.parametrize("path", ["/socket", "/limited-socket"])
    async def test_websocket_is_denied_with_a_whole_answer_where_that_is_offered(
        self, app: ASGIApp, path: str
    ) -> None:
        made = [await connect(app, path, extension=True) for _ in range(3)]

        denied = made[-1]
        assert denied.messages[0]["type"] == "websocket.http.response.start"
        assert denied.status == 429
        assert denied.json["feature"] == "image"
        assert int(denied.headers["retry-after"]) > 1700

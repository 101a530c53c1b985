"""Who is charged, whatever a stranger writes into a request."""

from __future__ import annotations

import asyncio
import inspect
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from litestar import Litestar, get
from litestar import Request as LitestarRequest
from litestar.connection import ASGIConnection
from litestar.middleware import (
    AbstractAuthenticationMiddleware,
    AuthenticationResult,
    DefineMiddleware,
)
from starlette.applications import Starlette
from starlette.authentication import (
    AuthCredentials,
    AuthenticationBackend,
    BaseUser,
    SimpleUser,
    UnauthenticatedUser,
)
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute

from tieredlimit._core.account import Account
from tieredlimit.errors import UsageError
from tieredlimit.identity import (
    Answer,
    Identify,
    api_key,
    blocking,
    client_address,
    first_of,
    request_user,
    resolve,
    session,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from starlette.websockets import WebSocket

HeaderName: TypeAlias = Literal["x-forwarded-for", "forwarded"]
HEADERS: tuple[HeaderName, ...] = ("x-forwarded-for", "forwarded")

ALICE = Account("alice", plan="pro")
BOB = Account("bob")
PEER = "192.0.2.1"


def connection(
    *headers: tuple[str, str], client: tuple[Any, int] | None = (PEER, 4711), **scope: Any
) -> HTTPConnection:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    return HTTPConnection({"type": "http", "headers": raw, "client": client, **scope})


def lookup(key: str) -> Account | None:
    return {"a-key": ALICE, "b-key": BOB}.get(key)


async def async_lookup(key: str) -> Account | None:
    await asyncio.sleep(0)
    return lookup(key)


def nobody(_: HTTPConnection) -> Account | None:
    return None


async def nobody_later(_: HTTPConnection) -> Account | None:
    await asyncio.sleep(0)
    return None


def alice(_: HTTPConnection) -> Account | None:
    return ALICE


async def alice_later(_: HTTPConnection) -> Account | None:
    await asyncio.sleep(0)
    return ALICE


def never(_: object) -> Account | None:
    raise AssertionError("must not be asked")


def address(
    *values: str,
    hops: int,
    header: HeaderName = "x-forwarded-for",
    client: tuple[Any, int] | None = (PEER, 4711),
) -> str:
    identify = client_address(trusted_hops=hops, header=header)
    account = identify(connection(*((header, value) for value in values), client=client))
    assert account.anonymous
    return account.id


def peer(host: str, *, ipv6_prefix: int = 64, ipv4_prefix: int = 32) -> str:
    identify = client_address(ipv6_prefix=ipv6_prefix, ipv4_prefix=ipv4_prefix)
    return identify(connection(client=(host, 1))).id


def application(identify: Identify, *middleware: Middleware) -> Starlette:
    """Serve the id of whoever is charged at `/`, over HTTP and WebSocket."""

    async def over_http(request: Request) -> PlainTextResponse:
        account = await resolve(identify(request))
        return PlainTextResponse(account.id if account else "nobody")

    async def over_websocket(websocket: WebSocket) -> None:
        account = await resolve(identify(websocket))
        await websocket.accept()
        await websocket.send_text(account.id if account else "nobody")
        await websocket.close()

    return Starlette(
        routes=[Route("/", over_http), WebSocketRoute("/", over_websocket)], middleware=middleware
    )


async def charged(app: Starlette, headers: Sequence[tuple[str, str]] = ()) -> str:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://media") as client:
        return (await client.get("/", headers=list(headers))).text


async def charged_websocket(app: Starlette, conn: HTTPConnection) -> str:
    scope = {**conn.scope, "type": "websocket", "path": "/", "query_string": b""}
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return "".join(message.get("text", "") for message in sent)


class TestApiKey:
    async def test_a_known_key_is_its_account(self) -> None:
        app = application(api_key(lookup))

        assert await charged(app, [("X-Api-Key", "a-key")]) == "alice"

    async def test_a_lookup_may_be_async(self) -> None:
        app = application(api_key(async_lookup))

        assert await charged(app, [("X-Api-Key", "a-key")]) == "alice"
        assert await charged(app, [("X-Api-Key", "c-key")]) == "nobody"

    def test_a_plain_lookup_answers_at_once(self) -> None:
        assert api_key(lookup)(connection(("x-api-key", "a-key"))) is ALICE

    async def test_websockets_are_identified_alike(self) -> None:
        app = application(api_key(lookup))

        assert await charged_websocket(app, connection(("x-api-key", "b-key"))) == "bob"

    @pytest.mark.parametrize("value", ["", "  ", "c-key", "A-KEY"])
    def test_an_unknown_or_empty_key_is_nobody(self, value: str) -> None:
        assert api_key(lookup)(connection(("x-api-key", value))) is None

    def test_an_absent_header_is_nobody(self) -> None:
        assert api_key(lookup)(connection()) is None
        assert api_key(lookup)(HTTPConnection({"type": "http"})) is None

    def test_a_key_of_absurd_length_is_not_looked_up(self) -> None:
        asked: list[str] = []

        def record(key: str) -> Account | None:
            asked.append(key)
            return ALICE

        assert api_key(record)(connection(("x-api-key", "k" * 4096))) is ALICE
        assert api_key(record)(connection(("x-api-key", "k" * 4097))) is None
        assert len(asked) == 1

    @pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
    @pytest.mark.parametrize("value", ["Bearer a-key", "bearer a-key", "BEARER   a-key "])
    def test_a_scheme_is_compared_in_any_case(self, scheme: str, value: str) -> None:
        assert api_key(lookup, scheme=scheme)(connection(("authorization", value))) is ALICE

    @pytest.mark.parametrize("value", ["a-key", "Basic a-key", "Bearer", "Bearer ", "Bearera-key"])
    def test_another_scheme_or_none_is_nobody(self, value: str) -> None:
        assert api_key(lookup, scheme="Bearer")(connection(("authorization", value))) is None

    def test_a_scheme_may_stand_in_another_header(self) -> None:
        identify = api_key(lookup, header="X-Auth", scheme="Key")

        assert identify(connection(("x-auth", "Key a-key"))) is ALICE
        assert identify(connection(("authorization", "Key a-key"))) is None

    @pytest.mark.fault("E6")
    @pytest.mark.parametrize("sent", ["x-api-key", "X-API-KEY", "X-aPi-KeY"])
    async def test_the_case_of_a_header_does_not_matter(self, sent: str) -> None:
        identify = api_key(lookup, header="X-API-Key")

        assert identify(connection((sent, "a-key"))) is ALICE
        assert await charged(application(identify), [(sent, "a-key")]) == "alice"

    @pytest.mark.fault("E6")
    async def test_two_differing_keys_are_nobody(self) -> None:
        app = application(api_key(lookup))

        assert await charged(app, [("x-api-key", "a-key"), ("X-Api-Key", "b-key")]) == "nobody"
        assert await charged(app, [("x-api-key", "a-key"), ("X-Api-Key", "")]) == "nobody"

    @pytest.mark.fault("E6")
    async def test_the_same_key_twice_is_its_account(self) -> None:
        app = application(api_key(lookup))

        assert await charged(app, [("x-api-key", "a-key"), ("X-Api-Key", "a-key")]) == "alice"

    @pytest.mark.fault("E6")
    async def test_headers_that_no_identify_reads_change_nothing(self) -> None:
        forged = [
            ("X-Account", "bob"),
            ("X-Api-Keys", "b-key"),
            ("Account-Id", "bob"),
            ("X-Forwarded-For", "198.51.100.9"),
            ("RateLimit", '"image-minute";r=1000;t=1'),
            ("RateLimit-Policy", '"image-minute";q=1000;w=1'),
        ]
        app = application(first_of(api_key(lookup), client_address()))

        assert await charged(app, [*forged, ("X-Api-Key", "a-key")]) == "alice"
        assert await charged(app, forged) == "127.0.0.1"

    def test_a_name_that_is_no_token_is_refused(self) -> None:
        with pytest.raises(UsageError, match="header must be an HTTP token, got 'x key'"):
            api_key(lookup, header="x key")
        with pytest.raises(UsageError, match="header must be an HTTP token, got ''"):
            api_key(lookup, header="")
        with pytest.raises(UsageError, match="scheme must be an HTTP token, got 'Bearer '"):
            api_key(lookup, scheme="Bearer ")


class Customer(BaseUser):
    """A user with all that the default mapping knows."""

    is_authenticated = True
    display_name = "Carol"
    identity = "carol"
    plan = "team"
    created_at = datetime(2024, 5, 1, tzinfo=UTC)
    tags = ("beta",)


class Nameless(BaseUser):
    """A user whose class never implemented `identity`, as Starlette's own once did not."""

    is_authenticated = True
    display_name = "Dave"


class HeaderBackend(AuthenticationBackend):
    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser] | None:
        name = conn.headers.get("x-user")
        return (AuthCredentials(["authenticated"]), SimpleUser(name)) if name else None


class TestRequestUser:
    async def test_starlettes_user_is_charged(self) -> None:
        app = application(
            request_user(), Middleware(AuthenticationMiddleware, backend=HeaderBackend())
        )

        assert await charged(app, [("X-User", "erin")]) == "erin"
        assert await charged(app) == "nobody"

    def test_billing_fields_are_taken_where_the_user_has_them(self) -> None:
        expected = Account("carol", plan="team", created_at=Customer.created_at, tags=("beta",))

        assert request_user()(connection(user=Customer())) == expected
        assert request_user()(connection(user=SimpleUser("erin"))) == Account("erin", tags=())

    def test_display_name_stands_in_for_a_missing_identity(self) -> None:
        assert request_user()(connection(user=Nameless())) == Account("Dave", tags=())

    def test_nobody_is_there_without_an_authenticated_user(self) -> None:
        assert request_user()(connection()) is None
        assert request_user()(connection(user=None)) is None
        assert request_user()(connection(user=UnauthenticatedUser())) is None

    def test_a_user_that_does_not_say_so_is_not_authenticated(self) -> None:
        assert request_user()(connection(user={"identity": "mallory"})) is None

    def test_an_id_that_is_no_string_is_refused(self) -> None:
        class Numbered(Customer):
            identity: Any = 7

        with pytest.raises(UsageError, match=r"account id must be a string, got int$"):
            request_user()(connection(user=Numbered()))

    def test_a_user_without_an_identity_is_refused_and_what_is_missing_named(self) -> None:
        class Mine:
            is_authenticated = True
            display_name = "whatever the user likes"

        class Unfinished(BaseUser):
            is_authenticated = True

        with pytest.raises(UsageError, match=r"Mine has no identity; give request_user a mapping"):
            request_user()(connection(user=Mine()))
        with pytest.raises(UsageError, match="Unfinished has no display_name"):
            request_user()(connection(user=Unfinished()))

    async def test_a_mapping_of_ones_own_may_be_sync_or_async(self) -> None:
        def plain(user: Customer) -> Account:
            return Account(user.identity, within={"org": "o7"})

        async def later(user: Customer) -> Account:
            await asyncio.sleep(0)
            return plain(user)

        expected = Account("carol", within={"org": "o7"})

        assert request_user(plain)(connection(user=Customer())) == expected
        assert await resolve(request_user(later)(connection(user=Customer()))) == expected

    def test_a_mapping_of_ones_own_sees_no_strangers(self) -> None:
        def refuse(_: object) -> Account:
            raise AssertionError("must not be asked")

        assert request_user(refuse)(connection(user=UnauthenticatedUser())) is None


class LitestarAuthentication(AbstractAuthenticationMiddleware):
    async def authenticate_request(self, connection: ASGIConnection) -> AuthenticationResult:  # type: ignore[type-arg]  # of anything
        name = connection.headers.get("x-user")
        return AuthenticationResult(user=SimpleUser(name) if name else None, auth=None)


async def test_user_that_litestars_authentication_leaves_is_charged() -> None:
    @get("/")
    async def handler(request: LitestarRequest[Any, Any, Any]) -> str:
        return str(request.scope["state"]["charged"])

    class Charging:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            account = await resolve(request_user()(HTTPConnection(scope)))
            scope["state"]["charged"] = account.id if account else "nobody"
            await self.app(scope, receive, send)

    def charging(app: Any) -> Any:
        return Charging(app)

    middleware: list[Any] = [DefineMiddleware(LitestarAuthentication), charging]
    app = Litestar([handler], middleware=middleware, logging_config=None)

    assert await charged(cast("Starlette", app), [("X-User", "erin")]) == "erin"
    assert await charged(cast("Starlette", app)) == "nobody"


class TestSession:
    async def test_value_that_starlettes_session_keeps_is_charged(self) -> None:
        async def login(request: Request) -> PlainTextResponse:
            request.session["user_id"] = 7
            return PlainTextResponse("in")

        app = application(session(), Middleware(SessionMiddleware, secret_key="s3cret" * 8))
        app.add_route("/login", login)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://media") as client:
            before = (await client.get("/")).text
            await client.get("/login")
            after = (await client.get("/")).text
            cookie = client.cookies["session"]
            client.cookies.clear()
            forged = (await client.get("/", headers={"cookie": f"session={cookie}x"})).text

        assert (before, after, forged) == ("nobody", "7", "nobody")

    async def test_value_may_be_looked_up_now_or_later(self) -> None:
        kept = {"login": "a-key"}

        assert session("login", lookup)(connection(session=kept)) is ALICE
        assert await resolve(session("login", async_lookup)(connection(session=kept))) is ALICE

    @pytest.mark.parametrize("kept", [None, {}, {"user_id": None}, b"", "user_id", ["user_id"]])
    def test_without_such_a_value_nobody_is_there(self, kept: Any) -> None:
        assert session(lookup=never)(connection(session=kept)) is None
        assert session(lookup=never)(connection()) is None

    @pytest.mark.parametrize("value", [True, 1.5, ["u1"], {"id": "u1"}, ""])
    def test_value_that_can_be_no_id_is_refused(self, value: object) -> None:
        with pytest.raises(UsageError, match="account id must"):
            session()(connection(session={"user_id": value}))


class TestPeer:
    def test_a_peer_is_an_anonymous_account(self) -> None:
        assert client_address()(connection()) == Account(PEER, anonymous=True)

    async def test_a_websocket_has_a_peer_too(self) -> None:
        app = application(client_address())

        assert await charged_websocket(app, connection()) == PEER

    @pytest.mark.fault("E7")
    def test_headers_are_not_read_without_trusted_hops(self) -> None:
        assert address("198.51.100.9", hops=0) == PEER
        assert address("for=198.51.100.9", hops=0, header="forwarded") == PEER

    @pytest.mark.fault("E7")
    def test_ipv6_counts_by_prefix(self) -> None:
        assert peer("2001:db8:1:2::1") == "2001:db8:1:2::/64"
        assert peer("2001:DB8:1:2:ffff:ffff:ffff:ffff") == "2001:db8:1:2::/64"
        assert peer("2001:db8:1:3::1") == "2001:db8:1:3::/64"
        assert peer("2001:db8:1:2::1", ipv6_prefix=56) == "2001:db8:1::/56"
        assert peer("2001:db8:0:0:0:0:0:1", ipv6_prefix=128) == "2001:db8::1"
        assert peer("fe80::1%eth0", ipv6_prefix=128) == "fe80::1"

    @pytest.mark.fault("E7")
    @given(st.ip_addresses(v=6, network="2001:db8:1:2::/64"))
    def test_no_address_of_a_64_is_another_client(self, host: object) -> None:
        assert peer(str(host)) == "2001:db8:1:2::/64"

    def test_ipv4_written_as_ipv6_is_ipv4(self) -> None:
        assert peer("::ffff:192.0.2.1") == "192.0.2.1"
        assert peer("::FFFF:c000:201") == "192.0.2.1"
        assert peer("::ffff:192.0.2.1", ipv4_prefix=24) == "192.0.2.0/24"

    def test_ipv4_counts_by_prefix_if_asked(self) -> None:
        assert peer("192.0.2.77", ipv4_prefix=24) == "192.0.2.0/24"

    @pytest.mark.parametrize("client", [None, (None, 0), ("", 0)])
    def test_a_peer_without_an_address_is_unknown(self, client: tuple[Any, int] | None) -> None:
        assert client_address()(connection(client=client)).id == "unknown"

    def test_a_name_that_the_server_gives_is_kept(self) -> None:
        assert peer("testclient") == "testclient"
        assert peer("n" * 64) == "n" * 64

    @pytest.mark.parametrize(
        "name",
        ["n" * 65, "n" * 100_000, "a\nb", "caf\xe9", "\ud800", "1" * 200, "::1%" + "z" * 200],
    )
    def test_a_name_that_is_long_or_odd_is_unknown(self, name: str) -> None:
        assert peer(name) == "unknown"

    def test_the_same_peer_is_worked_out_once(self) -> None:
        identify = client_address()

        assert identify(connection()) is identify(connection())


class TestForwardedFromTheRight:
    @pytest.mark.fault("E7")
    @pytest.mark.parametrize(
        ("hops", "expected"),
        [(1, "203.0.113.3"), (2, "203.0.113.2"), (3, "203.0.113.1"), (4, "6.6.6.6")],
    )
    def test_entries_are_counted_from_the_right(self, hops: int, expected: str) -> None:
        entries = ["6.6.6.6", "203.0.113.1", "203.0.113.2", "203.0.113.3"]

        assert address(", ".join(entries), hops=hops) == expected
        elements = ",".join(f"for={entry};proto=https" for entry in entries)
        assert address(elements, hops=hops, header="forwarded") == expected

    @pytest.mark.fault("E7")
    @pytest.mark.fault("E6")
    async def test_repeated_lines_are_one_list_in_their_order(self) -> None:
        lines = [("X-Forwarded-For", "6.6.6.6, 7.7.7.7"), ("x-forwarded-for", "203.0.113.1")]

        assert await charged(application(client_address(trusted_hops=1)), lines) == "203.0.113.1"
        assert await charged(application(client_address(trusted_hops=2)), lines) == "7.7.7.7"
        assert await charged(application(client_address(trusted_hops=3)), lines) == "6.6.6.6"

    @pytest.mark.fault("E6")
    def test_the_case_of_a_forwarding_header_does_not_matter(self) -> None:
        forged = [("X-FORWARDED-FOR", "6.6.6.6"), ("x-forwarded-for", "203.0.113.1")]

        assert client_address(trusted_hops=1)(connection(*forged)).id == "203.0.113.1"
        assert client_address(trusted_hops=1)(connection(forged[0])).id == "6.6.6.6"

    @pytest.mark.fault("E7")
    def test_only_the_chosen_header_is_read(self) -> None:
        both = connection(("x-forwarded-for", "203.0.113.1"), ("forwarded", "for=203.0.113.2"))

        assert client_address(trusted_hops=1)(both).id == "203.0.113.1"
        assert client_address(trusted_hops=1, header="forwarded")(both).id == "203.0.113.2"

    @pytest.mark.fault("E7")
    def test_a_header_of_too_few_entries_gives_its_leftmost(self) -> None:
        assert address("203.0.113.1, 203.0.113.2", hops=3) == "203.0.113.1"

    @pytest.mark.fault("E7")
    @pytest.mark.parametrize("values", [(), ("",), ("  ",)])
    def test_an_absent_header_gives_the_peer(self, values: tuple[str, ...]) -> None:
        assert address(*values, hops=2) == PEER
        assert address(*values, hops=2, client=None) == "unknown"

    @pytest.mark.fault("E7")
    def test_an_empty_entry_counts_and_is_nobody(self) -> None:
        assert address("6.6.6.6, , 203.0.113.1", hops=1) == "203.0.113.1"
        assert address("6.6.6.6, , 203.0.113.1", hops=2) == "unknown"

    @pytest.mark.parametrize(
        ("entry", "expected"),
        [
            ("203.0.113.1:8080", "203.0.113.1"),
            (" 203.0.113.1\t", "203.0.113.1"),
            ('"203.0.113.1:8080"', "203.0.113.1"),
            ("2001:DB8::1", "2001:db8::/64"),
            ("[2001:db8::1]", "2001:db8::/64"),
            ('"[2001:db8::1]:8080"', "2001:db8::/64"),
            ("[fe80::1%25eth0]:8080", "fe80::/64"),
            ("::ffff:203.0.113.1", "203.0.113.1"),
            ("[::FFFF:203.0.113.1]:8080", "203.0.113.1"),
        ],
    )
    def test_every_spelling_of_an_address_is_read(self, entry: str, expected: str) -> None:
        assert address(entry, hops=1) == expected
        assert address(f"For={entry}", hops=1, header="forwarded") == expected

    @pytest.mark.parametrize(
        "entry",
        [
            "unknown",
            "UNKNOWN",
            "_hidden",
            "_hidden:8080",
            "unix:",
            "localhost",
            "203.0.113",
            "203.0.113.01",
            "203.0.113.1%eth0",
            "203.0.113.1.example",
            "[2001:db8::1",
            "[2001:db8::1]x",
            "2001:db8::1::",
            '"203.0.113.1',
            '203.0.113.1"',
            '"',
            '""',
            "\xff",
            "1" * 129,
            "2001:db8::1%" + "z" * 200,
        ],
    )
    def test_what_is_no_address_is_unknown(self, entry: str) -> None:
        assert address(entry, hops=1) == "unknown"
        assert address(f"for={entry}", hops=1, header="forwarded") == "unknown"

    @pytest.mark.parametrize(
        ("element", "expected"),
        [
            ('for="203.0.113.1"', "203.0.113.1"),
            (r'for="203\.0.113.1"', "203.0.113.1"),
            ("proto=https ; FOR = 203.0.113.1 ; by=_us", "203.0.113.1"),
            ('host="a;for=6.6.6.6, for=7.7.7.7";for=203.0.113.1', "203.0.113.1"),
            (r'for=203.0.113.1;host="\", for=6.6.6.6\\"', "203.0.113.1"),
            ("proto=https", "unknown"),
            ("203.0.113.1", "unknown"),
            ("for=203.0.113.1;for=6.6.6.6", "unknown"),
            ("xfor=203.0.113.1", "unknown"),
        ],
    )
    def test_an_element_of_forwarded_is_read_as_rfc_7239_writes_it(
        self, element: str, expected: str
    ) -> None:
        assert address(element, hops=1, header="forwarded") == expected
        assert address(f'for=", {element}', hops=1, header="forwarded") == expected

    @pytest.mark.fault("E7")
    def test_a_huge_header_is_not_read_to_its_end(self) -> None:
        huge = "6.6.6.6," * 200_000

        assert address(huge + "203.0.113.1", hops=1) == "203.0.113.1"
        assert address("6" * 1_000_000, hops=1) == "unknown"
        element = f'for=203.0.113.1;host="{"h" * 10_000}"'
        assert address(element, hops=1, header="forwarded") == "unknown"

    def test_what_the_bound_cuts_in_two_is_no_address(self) -> None:
        kept = ",203.0.113.1" * 31
        filler = " " * (8192 - len("6.6.6.6") - len(kept))

        assert address("6.6.6.6" + filler + kept, hops=32) == "6.6.6.6"
        assert address("66.6.6.6" + filler + kept, hops=32) == "unknown"


LATIN_1 = st.characters(max_codepoint=255)
FORGED = st.one_of(
    st.text(LATIN_1, max_size=60),
    st.text('",;=\\ for16.[]:_', max_size=60),
    st.sampled_from(["6.6.6.6", "for=6.6.6.6", 'for="', 'for="6.6.6.6\\', "for=6.6.6.6;host="]),
)
ADDRESSES = st.ip_addresses(v=4).map(str)
QUOTED = st.text(LATIN_1, max_size=20).map(
    lambda text: '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
)


@st.composite
def elements(draw: st.DrawFn, node: str) -> str:
    """Spell an element of Forwarded in any way that RFC 7239 allows."""
    pairs = [draw(st.sampled_from([f"for={node}", f'For="{node}"', f'FOR="{node}:1234"']))]
    pairs += draw(st.lists(QUOTED.map(lambda text: f"host={text}"), max_size=2))
    pairs += draw(st.lists(st.sampled_from(["proto=https", "by=_us"]), max_size=2))
    return ";".join(draw(st.permutations(pairs)))


@pytest.mark.fault("E7")
class TestForgery:
    @given(FORGED, st.lists(ADDRESSES, min_size=1, max_size=4), st.booleans())
    @example('"', ["203.0.113.1"], False)
    @example("", ["203.0.113.1"], False)
    def test_what_stands_left_of_our_proxies_never_changes_the_answer(
        self, forged: str, honest: list[str], own_line: bool
    ) -> None:
        ours = ", ".join(honest)
        lines = [forged, ours] if own_line else [f"{forged}, {ours}"]

        assert address(*lines, hops=len(honest)) == honest[0]

    @given(FORGED, st.lists(ADDRESSES, min_size=1, max_size=4), st.booleans(), st.data())
    def test_nor_does_it_in_forwarded(
        self, forged: str, honest: list[str], own_line: bool, data: st.DataObject
    ) -> None:
        ours = ", ".join(data.draw(elements(node)) for node in honest)
        lines = [forged, ours] if own_line else [f"{forged}, {ours}"]

        assert address(*lines, hops=len(honest), header="forwarded") == honest[0]

    @given(st.lists(FORGED, max_size=4), st.integers(1, 5), st.sampled_from(HEADERS))
    def test_text_of_a_stranger_never_names_a_bucket(
        self, lines: list[str], hops: int, header: HeaderName
    ) -> None:
        subject = address(*lines, hops=hops, header=header)

        assert subject == "unknown" or set(subject) <= set("0123456789abcdef.:/")


class TestClientAddressArguments:
    def test_bounds_are_checked_at_once(self) -> None:
        with pytest.raises(
            UsageError, match="trusted_hops must be an integer from 0 to 32, got 33"
        ):
            client_address(trusted_hops=33)
        with pytest.raises(UsageError, match=r"trusted_hops must be .*, got '1'"):
            client_address(trusted_hops=cast("int", "1"))  # as read from an environment
        with pytest.raises(UsageError, match="ipv6_prefix must be an integer from 1 to 128, got 0"):
            client_address(ipv6_prefix=0)
        with pytest.raises(UsageError, match="ipv4_prefix must be an integer from 1 to 32, got 64"):
            client_address(ipv4_prefix=64)
        with pytest.raises(UsageError, match=r"header must be .*, got 'x-real-ip'"):
            client_address(header=cast("HeaderName", "x-real-ip"))  # what a checker refuses


class TestFirstOf:
    def test_the_first_that_knows_the_client_wins(self) -> None:
        assert first_of(nobody, alice, never)(connection()) is ALICE

    def test_nobody_is_known_if_none_knows_the_client(self) -> None:
        assert first_of(nobody, nobody)(connection()) is None

    @pytest.mark.parametrize(
        ("identifies", "expected"),
        [
            ((nobody_later, alice, never), ALICE),
            ((nobody, nobody_later, alice_later, never), ALICE),
            ((alice_later, never), ALICE),
            ((nobody_later, nobody), None),
            ((nobody, nobody_later), None),
        ],
    )
    async def test_sync_and_async_may_be_mixed(
        self, identifies: tuple[Identify, ...], expected: Account | None
    ) -> None:
        answer = first_of(*identifies)(connection())

        assert inspect.isawaitable(answer)
        assert await answer == expected

    async def test_one_may_stand_within_another(self) -> None:
        identify = first_of(first_of(nobody, nobody_later), first_of(nobody, alice_later))

        assert await resolve(identify(connection())) is ALICE

    async def test_a_wrong_answer_is_named_and_not_passed_over(self) -> None:
        wrong = cast("Identify", lambda _: "alice")  # what a checker refuses

        with pytest.raises(UsageError, match="of type str"):
            await resolve(first_of(nobody, wrong, alice)(connection()))
        with pytest.raises(UsageError, match="of type str"):
            await resolve(first_of(nobody_later, wrong)(connection()))

    def test_nobody_to_ask_is_refused(self) -> None:
        with pytest.raises(UsageError, match="at least one identify"):
            first_of()


class TestResolve:
    async def test_an_answer_is_awaited_where_it_must_be(self) -> None:
        future: asyncio.Future[Account | None] = asyncio.get_running_loop().create_future()
        future.set_result(BOB)

        assert await resolve(None) is None
        assert await resolve(ALICE) is ALICE
        assert await resolve(alice_later(connection())) is ALICE
        assert await resolve(future) is BOB

    @pytest.mark.parametrize("wrong", ["a secret", 7, {"id": "alice"}, False])
    async def test_a_wrong_answer_is_named_by_its_type_alone(self, wrong: object) -> None:
        async def later() -> object:
            return wrong

        for answer in (wrong, later()):
            with pytest.raises(UsageError, match=f"of type {type(wrong).__name__}$") as caught:
                await resolve(cast("Answer", answer))  # what a checker refuses

            assert "secret" not in str(caught.value)


class TestBlocking:
    async def test_a_blocking_identify_runs_off_the_event_loops_thread(self) -> None:
        threads: list[int] = []

        @blocking
        def identify(conn: HTTPConnection) -> Account | None:
            threads.append(threading.get_ident())
            return lookup(conn.headers["x-api-key"])

        assert await charged(application(identify), [("X-Api-Key", "a-key")]) == "alice"
        assert threads
        assert threads != [threading.get_ident()]

    async def test_a_blocking_lookup_runs_off_the_event_loops_thread(self) -> None:
        threads: list[int] = []

        def slow(key: str) -> Account | None:
            threads.append(threading.get_ident())
            return lookup(key)

        identify = first_of(api_key(blocking(slow)), client_address())

        assert await resolve(identify(connection(("x-api-key", "a-key")))) is ALICE
        assert threads
        assert threads != [threading.get_ident()]

    async def test_blocking_calls_run_side_by_side(self) -> None:
        both = threading.Barrier(2, timeout=10)

        @blocking
        def identify(_: HTTPConnection) -> Account | None:
            both.wait()
            return ALICE

        accounts = await asyncio.gather(
            *(resolve(identify(connection())) for _ in range(both.parties))
        )

        assert accounts == [ALICE, ALICE]

    async def test_a_plain_identify_runs_on_the_event_loops_thread(self) -> None:
        threads: list[int] = []

        def identify(_: HTTPConnection) -> Account | None:
            threads.append(threading.get_ident())
            return ALICE

        await charged(application(first_of(nobody, identify)))

        assert threads == [threading.get_ident()]

    def test_an_async_function_is_refused(self) -> None:
        class Asynchronous:
            async def __call__(self, key: str) -> Account | None:
                return lookup(key)

        with pytest.raises(UsageError, match=r"takes a plain function, got <function async_lookup"):
            blocking(async_lookup)
        with pytest.raises(UsageError, match="takes a plain function"):
            blocking(Asynchronous())
        with pytest.raises(UsageError, match="takes a plain function"):
            blocking(blocking(lookup))

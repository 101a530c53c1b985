"""What the middleware does behind every server. Subclass it with a name and what is offered."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from h2.connection import H2Connection
from h2.events import ResponseReceived, StreamEnded
from h2.exceptions import StreamClosedError
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.programs import HOST, PAGE, Program
from tests.servers import RedisServer

SECONDS = 20.0
MOST_ASKED = 2_000
DAY = 86_400
WHOLE_BODY = bytes(range(256)) * 32_768
PROXIED = "198.51.100.7, 203.0.113.9"
"""What a proxy on the server's own machine makes of a client that sent an address itself."""


@pytest.mark.redis
class ServerContract:
    """What every server that is named in docs/servers.md lets the middleware do.

    Attributes:
        name: The server.
        options: What is added to its command.
        loop: The package of its event loop.
        http2: Whether clients may speak HTTP/2 without TLS.
        late_bodies: Whether an HTTP/2 connection outlives an answer before a request's end.
        lifespan: Whether it tells applications of their start and end.
        several: Whether its command starts several processes.
        waits: Whether it lets all of these come to their end, not only the first that does.
        spares_bodies: Whether a client that asks first need not send the body of a denied request.
        denial_fields: Whether a denied WebSocket is answered by a whole response.
        accept_fields: Whether an accepted WebSocket carries the fields.
        believes_proxies: Whether the client is who a proxy on the same machine says.
    """

    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    loop: ClassVar[str] = "asyncio"
    http2: ClassVar[bool] = False
    late_bodies: ClassVar[bool] = True
    lifespan: ClassVar[bool] = True
    several: ClassVar[bool] = True
    waits: ClassVar[bool] = True
    spares_bodies: ClassVar[bool] = True
    denial_fields: ClassVar[bool] = True
    accept_fields: ClassVar[bool] = True
    believes_proxies: ClassVar[bool] = False

    @pytest.fixture
    def account(self) -> dict[str, str]:
        """The header of an account that nobody else has."""
        return {"x-account": uuid.uuid4().hex}

    @pytest.fixture
    def client(self, server: Program) -> Iterator[httpx.Client]:
        with httpx.Client(base_url=server.url, timeout=SECONDS, trust_env=False) as client:
            yield client

    @classmethod
    def started(cls, redis_server: RedisServer, folder: Path, workers: int = 1) -> Program:
        """Return the server, to be entered."""
        namespace = f"{cls.__name__.lower()}-{workers}"
        return Program(
            cls.name,
            folder,
            redis_server.url,
            namespace[-32:],
            workers=workers,
            options=cls.options,
        )

    def test_quota_is_counted_down_and_then_denied_until_its_time(
        self, client: httpx.Client, account: dict[str, str]
    ) -> None:
        first, second, third = (client.post("/images", headers=account) for _ in range(3))

        assert (first.status_code, second.status_code) == (200, 200)
        assert first.headers["ratelimit"].startswith('"image-day";r=1;t=')
        assert second.headers["ratelimit"].startswith('"image-day";r=0;t=')
        assert third.status_code == 429
        assert third.headers["content-type"] == "application/problem+json"
        assert third.headers["ratelimit-policy"] == '"image-day";q=2;w=86400'
        assert third.json()["retry_after"] == int(third.headers["retry-after"])
        assert DAY / 2 - SECONDS <= int(third.headers["retry-after"]) <= DAY / 2

    def test_zero_is_403_without_a_time(self, client: httpx.Client) -> None:
        denial = client.post("/zero")

        assert (denial.status_code, denial.json()["reason"]) == (403, "zero")
        assert denial.headers["ratelimit"] == '"zero";r=0'
        assert "retry-after" not in denial.headers

    def test_requests_of_one_connection_are_each_charged_for_themselves(
        self, client: httpx.Client, account: dict[str, str]
    ) -> None:
        other = {"x-account": f"{account['x-account']}-2"}

        first = client.post("/images", headers=account)
        second = client.post("/images", headers=account)
        unmetered = client.get("/about", headers=account)
        another = client.post("/images", headers=other)

        answers = [first, second, unmetered, another]
        # By the peer's port the server tells that they came over the same connection.
        assert len({str(answer.json()["client"]) for answer in answers}) == 1
        assert [answer.json()["decided"] for answer in answers] == [["image"]] * 2 + [[], ["image"]]
        left = [answer.headers.get("ratelimit", "").partition(";t=")[0] for answer in answers]
        assert left == ['"image-day";r=1', '"image-day";r=0', "", '"image-day";r=1']

    async def test_http2_is_served_where_it_is_offered(
        self, server: Program, account: dict[str, str]
    ) -> None:
        async with httpx.AsyncClient(
            base_url=server.url, http1=False, http2=True, trust_env=False, timeout=SECONDS
        ) as client:
            if not self.http2:
                with pytest.raises(httpx.TransportError):
                    await client.get("/about")
                return
            first = await client.get("/about")
            answers = await asyncio.gather(
                *(client.get("/page", headers=account) for _ in range(4))
            )
            unmetered = await client.get("/about", headers=account)

        allowed = [answer for answer in answers if answer.status_code == 200]
        assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429]
        assert {one.headers["ratelimit"][:14] for one in allowed} == {
            '"page-day";r=1',
            '"page-day";r=0',
        }
        # One connection, several requests at once: each knows of itself alone.
        known = [answer.json() for answer in (first, *allowed, unmetered)]
        assert {one["http"] for one in known} == {"2"}
        assert len({str(one["client"]) for one in known}) == 1
        assert [one["decided"] for one in known] == [[], ["page"], ["page"], []]

    def test_http2_connection_goes_on_after_a_denial_before_the_body_where_the_page_says_so(
        self, server: Program
    ) -> None:
        if not self.http2:
            return
        headers = [(":authority", HOST), (":scheme", "http")]
        with closing(Http2(server.port)) as connection:
            denied = connection.ask(
                [*headers, (":method", "POST"), (":path", "/zero")], open_ended=True
            )
            connection.send_end_of(denied)
            after = connection.ask([*headers, (":method", "GET"), (":path", "/about")])

        assert connection.statuses[denied] == "403"
        assert (after in connection.statuses) == self.late_bodies

    def test_stream_is_passed_on_as_it_comes_with_the_fields_on_its_start(
        self, client: httpx.Client, account: dict[str, str]
    ) -> None:
        name = account["x-account"]

        with client.stream("POST", f"/stream/{name}", headers=account) as response:
            parts = response.iter_raw()
            first = next(parts)
            # The rest is not made before this: were anything buffered, we would wait for ever.
            client.post(f"/go/{name}")
            rest = b"".join(parts)

        assert (first, rest) == (b"first", b"last")
        assert response.headers["ratelimit"].startswith('"job-day";r=999;t=')

    @pytest.mark.parametrize("chunked", [False, True], ids=["of-known-length", "chunked"])
    def test_large_upload_reaches_the_application_whole(
        self, client: httpx.Client, account: dict[str, str], chunked: bool
    ) -> None:
        parts = (WHOLE_BODY[at : at + 100_000] for at in range(0, len(WHOLE_BODY), 100_000))

        answer = client.post("/uploads", headers=account, content=parts if chunked else WHOLE_BODY)

        assert answer.request.headers.get("transfer-encoding") == ("chunked" if chunked else None)
        assert answer.text == hashlib.sha256(WHOLE_BODY).hexdigest()
        assert answer.headers["ratelimit"].startswith('"upload-day";r=0;t=')

    @pytest.mark.parametrize("chunked", [False, True], ids=["of-known-length", "chunked"])
    def test_client_that_sends_a_body_nobody_reads_sees_its_denial(
        self, client: httpx.Client, chunked: bool
    ) -> None:
        parts = (WHOLE_BODY[at : at + 100_000] for at in range(0, 1_000_000, 100_000))

        denial = client.post("/zero", content=parts if chunked else WHOLE_BODY[:1_000_000])
        # Whether it reads the rest or closes is up to the server; the rest is never a request.
        try:
            after = client.get("/about")
        except (httpx.RemoteProtocolError, httpx.WriteError, httpx.ReadError):
            after = client.get("/about")

        assert (denial.status_code, denial.json()["reason"]) == (403, "zero")
        assert after.json()["decided"] == []

    def test_client_that_asks_first_is_denied_before_it_sends_a_body_where_that_is_offered(
        self, server: Program
    ) -> None:
        asking = (
            f"POST /zero HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 1000000\r\n"
            "Expect: 100-continue\r\n\r\n"
        )
        with closing(socket.create_connection((HOST, server.port), SECONDS)) as asked:
            asked.sendall(asking.encode())
            with asked.makefile("rb") as answer:
                status = answer.readline().split()[1]

        assert status == (b"403" if self.spares_bodies else b"100")

    def test_head_costs_and_is_denied_as_get_without_a_body(
        self, client: httpx.Client, account: dict[str, str]
    ) -> None:
        _, allowed, denied = (client.head("/page", headers=account) for _ in range(3))
        got = client.get("/page", headers=account)

        assert (allowed.status_code, denied.status_code, got.status_code) == (200, 429, 429)
        assert allowed.headers["ratelimit"].startswith('"page-day";r=0;t=')
        assert (allowed.content, denied.content) == (b"", b"")
        assert "retry-after" in denied.headers
        assert got.json()["reason"] == "quota"

    @pytest.mark.parametrize("path", ["/endless", "/wait"], ids=["in-mid-stream", "before-it"])
    def test_slot_of_a_client_that_goes_away_is_free_again(
        self, server: Program, client: httpx.Client, account: dict[str, str], path: str
    ) -> None:
        name = account["x-account"]
        asking = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nX-Account: {name}\r\n"
        # Once the first bytes are here, or the account's slot is known to be taken, it runs.
        with closing(socket.create_connection((HOST, server.port), SECONDS)) as going:
            going.sendall(f"{asking}Content-Length: 0\r\n\r\n".encode())
            if path == "/endless":
                assert going.recv(1000)
            self.wait_for(client, account, "concurrency")

        self.wait_for(client, account, "")

    def wait_for(self, client: httpx.Client, account: dict[str, str], reason: str) -> None:
        """Ask for a job until it is denied by this reason, or allowed with an empty one."""
        name = account["x-account"]
        deadline = time.monotonic() + SECONDS
        client.post(f"/go/{name}")
        while time.monotonic() < deadline:
            answer = client.post(f"/stream/{name}", headers=account)
            seen = answer.json()["reason"] if answer.status_code == 429 else ""
            if seen == reason:
                return
        pytest.fail(f"not {reason or 'allowed'!r} within {SECONDS:g} s")

    def test_accepted_websocket_carries_the_fields_where_the_server_lets_it(
        self, server: Program, account: dict[str, str]
    ) -> None:
        with websocket(server, "/ws", account) as opened:
            told = json.loads(opened.recv())
            assert opened.response is not None
            headers = opened.response.headers

        assert told["decided"] == ["socket"]
        # Both or neither: a server that leaves ours out leaves out the application's as well.
        assert ("x-own" in headers, "ratelimit" in headers) == (self.accept_fields,) * 2
        if self.accept_fields:
            assert headers["ratelimit"].startswith('"socket-day";r=0;t=')

    def test_denied_websocket_is_answered_as_a_request_where_the_server_can(
        self, server: Program, account: dict[str, str]
    ) -> None:
        with websocket(server, "/ws", account):
            pass

        with pytest.raises(InvalidStatus) as used_up, websocket(server, "/ws", account):
            pass
        with pytest.raises(InvalidStatus) as zero, websocket(server, "/ws/zero", account):
            pass

        answers = [caught.value.response for caught in (used_up, zero)]
        if not self.denial_fields:
            assert [answer.status_code for answer in answers] == [403, 403]
            return
        assert [answer.status_code for answer in answers] == [429, 403]
        assert int(answers[0].headers["retry-after"]) <= DAY
        problems = [json.loads(answer.body or b"") for answer in answers]
        assert [problem["reason"] for problem in problems] == ["quota", "zero"]

    def test_denied_websocket_is_a_403_where_no_response_can_be_sent(
        self, server: Program, account: dict[str, str]
    ) -> None:
        with websocket(server, "/plain", account):
            pass

        with pytest.raises(InvalidStatus) as used_up, websocket(server, "/plain", account):
            pass
        with pytest.raises(InvalidStatus) as zero, websocket(server, "/plain/zero", account):
            pass

        statuses = [caught.value.response.status_code for caught in (used_up, zero)]
        assert statuses == [403, 403]

    def test_proxy_on_the_same_machine_is_believed_where_the_page_says_so(
        self, server: Program
    ) -> None:
        client = server.about(**{"x-forwarded-for": PROXIED})["client"]

        assert client[0] == ("203.0.113.9" if self.believes_proxies else HOST)

    def test_event_loop_is_the_one_that_is_meant(self, server: Program) -> None:
        assert server.about()["loop"] == self.loop


class ServedContract(ServerContract):
    """What docs/servers.md says of a server, started by the very command that it gives."""

    def test_processes_are_exact_in_sum_and_open_and_close_their_limiters(
        self, redis_server: RedisServer, tmp_path: Path, account: dict[str, str]
    ) -> None:
        workers = 2 if self.several else 1
        started = self.started(redis_server, tmp_path, workers)
        statuses: list[int] = []
        pids: set[str] = set()
        with started as server:
            # A connection each: which process accepts it is up to the kernel.
            limits = httpx.Limits(max_keepalive_connections=0)
            with httpx.Client(
                base_url=server.url, limits=limits, timeout=SECONDS, trust_env=False
            ) as client:
                while len(pids) < workers and len(statuses) < MOST_ASKED:
                    pids.add(client.get("/about").headers["x-pid"])
                    statuses.append(client.post("/images", headers=account).status_code)
                statuses += [client.post("/images", headers=account).status_code for _ in range(9)]
            opened_by = {line.removeprefix("open ") for line in server.told}

        assert len(pids) == workers
        assert (statuses.count(200), set(statuses)) == (2, {200, 429})
        # Without lifespan nobody says so: the first request opened it.
        assert opened_by == (pids if self.lifespan else set())
        closed_by = [line.removeprefix("close ") for line in server.told if "close" in line]
        assert set(closed_by) <= opened_by
        assert len(closed_by) == len(set(closed_by))
        assert len(closed_by) >= (len(opened_by) if self.waits else 1)
        assert len(server.told) == len(opened_by) + len(closed_by)

    def test_page_says_what_the_server_offers(self) -> None:
        offers: dict[str, Any] = {
            "HTTP/2": self.http2,
            "lifespan": self.lifespan,
            "several processes": self.several,
            "whole response to a denied WebSocket": self.denial_fields,
            "fields on an accepted WebSocket": self.accept_fields,
            "body of a denied request": "is not asked for" if self.spares_bodies else "is read",
            "HTTP/2 connection after an early denial": "-",
            "`X-Forwarded-For`": "from 127.0.0.1" if self.believes_proxies else "never",
        }

        if self.http2:
            goes_on = "goes on" if self.late_bodies else "is closed"
            offers["HTTP/2 connection after an early denial"] = goes_on
        assert table_of_the_page()[self.name] == {
            column: {True: "yes", False: "no"}.get(said, said) for column, said in offers.items()
        }


class Http2:
    """One connection on which requests need not end, as no finished client lets us."""

    def __init__(self, port: int) -> None:
        self.statuses: dict[int, str] = {}
        self._socket = socket.create_connection((HOST, port), SECONDS)
        self._h2 = H2Connection()
        self._h2.initiate_connection()
        self._flush()

    def ask(self, headers: list[tuple[str, str]], *, open_ended: bool = False) -> int:
        """Send a request, wait for its answer or the connection's end, return its number."""
        number = self._h2.get_next_available_stream_id()
        self._h2.send_headers(number, headers, end_stream=not open_ended)
        self._flush()
        while data := self._receive():
            for event in self._h2.receive_data(data):
                if isinstance(event, ResponseReceived):
                    found = {str_of(name): str_of(value) for name, value in event.headers}
                    self.statuses[event.stream_id] = found[":status"]
                elif isinstance(event, StreamEnded) and event.stream_id == number:
                    return number
            self._flush()
        return number

    def send_end_of(self, number: int) -> None:
        """Send the end of a request's body, in time or not."""
        try:
            self._h2.end_stream(number)
        except StreamClosedError:
            return  # the server has said already that it does not want it
        self._flush()

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def _flush(self) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(self._h2.data_to_send())

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(65_536)
        except ConnectionResetError:
            return b""


def str_of(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else text


def websocket(server: Program, path: str, account: dict[str, str]) -> ClientConnection:
    """Open a WebSocket of an account."""
    return connect(
        f"{server.url.replace('http', 'ws')}{path}", additional_headers=account, proxy=None
    )


def table_of_the_page() -> dict[str, dict[str, str]]:
    """Return what docs/servers.md says each server offers: server, then what, then the word."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text("utf-8").splitlines()
        if line.startswith("|")
    ]
    (_, *servers), _, *lines = rows
    return {
        name: {line[0]: line[position] for line in lines}
        for position, name in enumerate(servers, start=1)
    }

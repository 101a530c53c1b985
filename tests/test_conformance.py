"""The contract of tests/server_contract.py on every server, started as docs/servers.md says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from daphne.utils import parse_x_forwarded_for  # type: ignore[import-untyped]  # it has no types
from starlette.requests import HTTPConnection
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from tests.programs import Program, commands
from tests.server_contract import ServedContract, ServerContract, table_of_the_page
from tieredlimit.identity import client_address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.servers import RedisServer
    from tieredlimit import Account

PROXY = "10.0.0.7"
CLIENT = "203.0.113.9"
WRITTEN = "198.51.100.7"


@pytest.fixture(scope="class")
def server(
    request: pytest.FixtureRequest,
    redis_server: RedisServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Program]:
    """One process per class."""
    redis_server.command("FLUSHALL")
    with request.cls.started(redis_server, tmp_path_factory.mktemp("server")) as server:
        yield server


class TestUvicorn(ServedContract):
    name = "uvicorn"
    loop = "uvloop"
    believes_proxies = True


class TestUvicornInPurePython(ServerContract):
    name = "uvicorn"
    options = ("--loop", "asyncio", "--http", "h11", "--ws", "wsproto")
    believes_proxies = True


class TestHypercorn(ServedContract):
    name = "hypercorn"
    http2 = True
    waits = False
    late_bodies = False
    spares_bodies = False


class TestHypercornOnUvloop(ServerContract):
    name = "hypercorn"
    options = ("--worker-class", "uvloop")
    loop = "uvloop"
    http2 = True
    waits = False
    late_bodies = False
    spares_bodies = False


class TestGranian(ServedContract):
    name = "granian"
    loop = "uvloop"
    http2 = True
    accept_fields = False


class TestDaphne(ServedContract):
    name = "daphne"
    lifespan = False
    several = False
    spares_bodies = False
    denial_fields = False
    accept_fields = False


def test_every_server_of_the_page_is_held_to_the_contract() -> None:
    held = {contract.name for contract in ServedContract.__subclasses__()}

    assert held == set(commands()) == set(table_of_the_page())


class TestWhoseAddressItIs:
    """What docs/servers.md says of servers that read a proxy's headers themselves."""

    async def named_by(
        self, identify: Callable[[HTTPConnection], Account], trusted: str, sent: str
    ) -> str:
        """Return who is charged behind Uvicorn, for a request with this X-Forwarded-For."""
        seen: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            seen.append(identify(HTTPConnection(scope)).id)

        scope: Any = {
            "type": "http",
            "scheme": "http",
            "client": (PROXY, 1),
            "headers": [(b"x-forwarded-for", sent.encode())],
        }
        nothing: Any = None
        await ProxyHeadersMiddleware(app, trusted_hosts=trusted)(scope, nothing, nothing)
        return seen[0]

    async def test_uvicorn_that_believes_everybody_believes_what_the_client_wrote(self) -> None:
        sent = f"{WRITTEN}, {CLIENT}"

        assert await self.named_by(client_address(), "*", sent) == WRITTEN
        assert await self.named_by(client_address(), PROXY, sent) == CLIENT

    @pytest.mark.parametrize("trusted", ["*", PROXY, "127.0.0.1"])
    async def test_hops_counted_by_us_are_right_whatever_uvicorn_believes(
        self, trusted: str
    ) -> None:
        counted = client_address(trusted_hops=1)

        assert await self.named_by(counted, trusted, f"{WRITTEN}, {CLIENT}") == CLIENT

    def test_daphne_with_proxy_headers_believes_what_the_client_wrote(self) -> None:
        headers = {b"X-Forwarded-For": f"{WRITTEN}, {CLIENT}".encode()}

        (host, _), _ = parse_x_forwarded_for(headers)

        assert host == WRITTEN

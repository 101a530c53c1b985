"""The contract, kept by every backend and over every way to reach Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from tests.contract import START, BackendContract, Clock
from tests.servers import RedisServer
from tieredlimit import Account, Limiter, UsageError
from tieredlimit.backends import Backend, Charge, MemoryBackend, RedisBackend, Reply

GENEROUS = 10.0


class TestMemoryBackend(BackendContract):
    @pytest.fixture
    def backend(self, clock: Clock) -> Backend:
        return MemoryBackend(clock=clock)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer(unix_socket=True) as running:
        yield running


@pytest.mark.redis
class TestRedisBackendOverTcp(BackendContract):
    @pytest.fixture
    async def backend(self, server: RedisServer, clock: Clock) -> AsyncIterator[Backend]:
        server.command("FLUSHALL")
        backend = RedisBackend.from_url(server.url, clock=clock, timeout=GENEROUS)
        yield backend
        await backend.close()


@pytest.mark.redis
class TestRedisBackendOverUnixSocket(BackendContract):
    @pytest.fixture
    async def backend(self, server: RedisServer, clock: Clock) -> AsyncIterator[Backend]:
        server.command("FLUSHALL")
        backend = RedisBackend.from_url(server.unix_url, clock=clock, timeout=GENEROUS)
        yield backend
        await backend.close()


@pytest.mark.redis
class TestRedisBackendWithClient(BackendContract):
    @pytest.fixture
    async def backend(self, server: RedisServer, clock: Clock) -> AsyncIterator[Backend]:
        server.command("FLUSHALL")
        client = redis.asyncio.Redis.from_url(
            server.url, retry=Retry(NoBackoff(), 0), decode_responses=True
        )
        backend = RedisBackend(client, clock=clock, timeout=GENEROUS)
        yield backend
        await backend.close()
        await client.aclose()


class Untouched:
    """A backend that nobody may ask."""

    def now(self) -> int:
        return START

    async def open(self) -> None:
        return

    async def close(self) -> None:
        return

    async def take(self, charges: Sequence[Charge]) -> Reply:
        raise AssertionError(f"asked for {charges}")


@pytest.mark.fault("A6")
@pytest.mark.parametrize(
    "cost", [-1, 1.0, 0.5, float("nan"), float("inf"), 10**9 + 1, 10**30, "1", None, True]
)
async def test_cost_that_is_no_whole_number_in_bounds_never_reaches_a_backend(cost: Any) -> None:
    document = {
        "order": ["everyone"],
        "features": {"image": {"routes": ["POST /v1/images"]}},
        "tiers": {"everyone": {"quotas": {"image": "5/minute"}}},
    }
    limiter = Limiter(document, Untouched())

    with pytest.raises(UsageError, match="cost must be a whole number"):
        await limiter.take(Account("u1"), "image", cost=cost)

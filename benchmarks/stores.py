"""The stores that a benchmark asks, and what one round of takes made of them."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks.measure import Run, middle
from benchmarks.policies import TIMEOUT
from tests.servers import NoServerError, RedisServer
from tieredlimit import Limiter
from tieredlimit.backends import MemoryBackend, RedisBackend


@dataclass(frozen=True, slots=True)
class Asked:
    """Hold one round of takes, and the calls that reached Redis in it."""

    run: Run
    calls: int


@contextmanager
def redis_server(*options: str) -> Iterator[RedisServer]:
    """Start a server for a benchmark, with these options; end the process where there is none."""
    try:
        server = RedisServer(*options)
    except NoServerError as exc:
        sys.exit(str(exc))
    with server:
        yield server


@asynccontextmanager
async def limiters(
    policy: Mapping[str, Any], server: RedisServer
) -> AsyncIterator[dict[str, Limiter]]:
    """Open a limiter for each store."""
    async with AsyncExitStack() as stack:
        opened = {
            "memory": Limiter(policy, MemoryBackend()),
            "redis": Limiter(policy, RedisBackend.from_url(server.url, timeout=TIMEOUT)),
        }
        for limiter in opened.values():
            await stack.enter_async_context(limiter)
        yield opened


def told(asked: Sequence[Asked]) -> dict[str, Any]:
    """Return what a result says of the rounds of one row."""
    return {
        **asdict(middle([one.run for one in asked])),
        "calls": median(one.calls for one in asked),
        "rounds": [asdict(one) for one in asked],
    }

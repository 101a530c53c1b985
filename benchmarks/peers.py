"""The same decisions by other packages, each in its cheapest way; those not there are named.

They come from an environment of their own, `.venv-peers`, which `scripts/bench` makes.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

from limits import RateLimitItem, RateLimitItemPerDay, RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage, Storage
from limits.aio.strategies import FixedWindowRateLimiter
from redis.asyncio import ConnectionPool, Redis

from tieredlimit import Account

Operation = Callable[[Account], Awaitable[bool]]
Operations = dict[tuple[str, int], dict[str, Operation]]
"""By store and number of quotas, then by the name of who does it."""

LIMIT = 1_000_000
_LIMITS: tuple[RateLimitItem, ...] = (RateLimitItemPerMinute(LIMIT), RateLimitItemPerDay(LIMIT))
# Some have a maximum of their own, beyond which a request fails instead of waiting.
_MOST_CONNECTIONS = 1_000
_NOTES = Path(".venv-peers/left-out.json")


def notes() -> dict[str, str]:
    """Return which peers `scripts/bench` could not install, and why."""
    found: dict[str, str] = json.loads(_NOTES.read_text("utf-8")) if _NOTES.exists() else {}
    return found


async def peers(stack: AsyncExitStack, url: str) -> tuple[Operations, dict[str, str]]:
    """Open the peers; return what they do, and who was left out and why."""
    made: Operations = {(store, quotas): {} for store in ("memory", "redis") for quotas in (1, 2)}
    left_out = {
        "fastapi-limiter": "keeps a log of hits in one bucket for all accounts, unless its user "
        "writes a factory of buckets",
        **notes(),
    }
    for name, opens in _PEERS.items():
        try:
            operations = await opens(stack, url)
            for operation in operations.values():
                if not await operation(Account("warm-up")):
                    raise RuntimeError("denied its first request")
        except Exception as exc:  # noqa: BLE001 -- a peer that does not run is named, not fatal
            left_out.setdefault(name, f"{type(exc).__name__}: {exc}"[:200])
        else:
            for cell, operation in operations.items():
                made[cell][name] = operation
    return made, left_out


async def _limits(stack: AsyncExitStack, url: str) -> Mapping[tuple[str, int], Operation]:
    pool = ConnectionPool.from_url(url)
    stack.push_async_callback(pool.disconnect)
    remote = RedisStorage(
        f"async+{url}",
        implementation="redispy",
        connection_pool=pool,  # type: ignore[arg-type]  # it takes one, its types say otherwise
    )
    stores: dict[str, Storage] = {"memory": MemoryStorage(), "redis": remote}

    def hits(storage: Storage, quotas: int) -> Operation:
        hit = FixedWindowRateLimiter(storage).hit
        items = _LIMITS[:quotas]

        async def operation(account: Account) -> bool:
            for item in items:
                if not await hit(item, account.id):
                    return False
            return True

        return operation

    return {
        (name, quotas): hits(store, quotas) for name, store in stores.items() for quotas in (1, 2)
    }


async def _throttled(stack: AsyncExitStack, url: str) -> Mapping[tuple[str, int], Operation]:
    throttled: Any = import_module("throttled.asyncio")
    stores = {
        "memory": throttled.MemoryStore(options={"MAX_SIZE": 4 * LIMIT}),
        "redis": throttled.RedisStore(server=url),
    }
    stack.push_async_callback(stores["redis"]._backend.get_client().aclose)

    def limit(store: Any, quotas: int) -> Operation:
        throttles = [
            throttled.Throttled(using="fixed_window", quota=quota, store=store, key_prefix=prefix)
            for quota, prefix in ((f"{LIMIT}/m", "minute"), (f"{LIMIT}/d", "day"))
        ][:quotas]
        limits = [throttle.limit for throttle in throttles]

        async def operation(account: Account) -> bool:
            for limit in limits:
                if (await limit(account.id)).limited:
                    return False
            return True

        return operation

    return {
        (name, quotas): limit(store, quotas) for name, store in stores.items() for quotas in (1, 2)
    }


async def _asgi_ratelimit(stack: AsyncExitStack, url: str) -> Mapping[tuple[str, int], Operation]:
    rule: Any = import_module("ratelimit").Rule
    client = await stack.enter_async_context(Redis.from_url(url))
    stores: dict[str, Any] = {
        "memory": import_module("ratelimit.backends.simple").MemoryBackend(),
        "redis": import_module("ratelimit.backends.redis").RedisBackend(client),
    }

    def retry_after(store: Any, quotas: int) -> Operation:
        amounts = dict(list({"minute": LIMIT, "day": LIMIT}.items())[:quotas])
        ask, its_rule = store.retry_after, rule(**amounts)

        async def operation(account: Account) -> bool:
            left: int = await ask(f"/{quotas}", account.id, its_rule)
            return left == 0

        return operation

    return {
        (name, quotas): retry_after(store, quotas)
        for name, store in stores.items()
        for quotas in (1, 2)
    }


async def _moderato(stack: AsyncExitStack, url: str) -> Mapping[tuple[str, int], Operation]:
    limiter: Any = import_module("moderato").RateLimiter(redis_url=url)
    limiter.config.max_connections = _MOST_CONNECTIONS
    await limiter.connect()
    stack.push_async_callback(limiter.close)

    def check(quotas: int) -> Operation:
        rates = [f"{LIMIT}/minute", f"{LIMIT}/day"][:quotas]

        async def operation(account: Account) -> bool:
            for rate in rates:
                if not await limiter.check(account.id, rate):
                    return False
            return True

        return operation

    return {("redis", quotas): check(quotas) for quotas in (1, 2)}


async def _traffik(stack: AsyncExitStack, url: str) -> Mapping[tuple[str, int], Operation]:
    traffik: Any = import_module("traffik")
    from starlette.requests import Request

    stores = {
        "memory": import_module("traffik.backends.inmemory").InMemoryBackend(),
        "redis": import_module("traffik.backends.redis").RedisBackend(url, namespace="traffik"),
    }

    async def identify(connection: Request) -> str:
        return str(connection.scope["account"])

    def hit(name: str, backend: Any, quotas: int) -> Operation:
        throttles = [
            traffik.HTTPThrottle(
                f"{name}-{quotas}-{unit}", rate=f"{LIMIT}/{unit}", backend=backend,
                identifier=identify, cache_ids=False,
            )
            for unit in ("minute", "day")
        ][:quotas]  # fmt: skip
        hits = [throttle.hit for throttle in throttles]

        async def operation(account: Account) -> bool:
            scope = {
                "type": "http", "method": "POST", "path": "/v1/images", "headers": [],
                "state": {}, "account": account.id,
            }  # fmt: skip
            request = Request(scope)
            for hit in hits:
                await hit(request)  # raises where it is denied
            return True

        return operation

    operations = {}
    for name, backend in stores.items():
        await stack.enter_async_context(backend())
        for quotas in (1, 2):
            operations[name, quotas] = hit(name, backend, quotas)
    return operations


_PEERS: dict[
    str, Callable[[AsyncExitStack, str], Awaitable[Mapping[tuple[str, int], Operation]]]
] = {
    "limits.aio": _limits,
    "throttled-py": _throttled,
    "asgi-ratelimit": _asgi_ratelimit,
    "moderato": _moderato,
    "traffik": _traffik,
}

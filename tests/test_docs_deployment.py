"""docs/deployment.md: what it says of workers that run side by side with different policies."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.applications import Starlette

from tests.serving import serve
from tieredlimit import Account, BackendError, Limiter, TieredLimitMiddleware, stored
from tieredlimit.backends import RedisBackend

U1 = Account("u1")


def policy(quota: Any, **more: Any) -> dict[str, Any]:
    cells = {"video": quota, **more}
    return {"features": {name: {} for name in cells}, "tiers": {"all": {"quotas": cells}}}


def worker(url: str, document: dict[str, Any], **options: Any) -> Limiter:
    return Limiter(document, RedisBackend.from_url(url, timeout=10.0), **options)


async def test_new_numbers_hand_out_nothing_that_the_old_ones_have_taken(redis_url: str) -> None:
    old, new = worker(redis_url, policy("10/hour")), worker(redis_url, policy("20/hour"))
    async with old, new:
        for _ in range(10):
            await old.take(U1, "video")

        by_new = await new.take(U1, "video")
        by_old = await old.take(U1, "video")

    assert (by_new.reason, by_old.reason) == ("quota", "quota")


async def test_new_name_starts_full_for_those_who_know_it(redis_url: str) -> None:
    named = {"rate": "10/hour", "name": "renders"}
    old, new = worker(redis_url, policy("10/hour")), worker(redis_url, policy(named))
    async with old, new:
        await old.take(U1, "video", 10)

        decision = await new.take(U1, "video")

    assert decision.remaining == 9


async def test_overrides_hold_for_old_and_new_workers_alike(redis_url: str) -> None:
    old = worker(redis_url, policy("10/hour"))
    new = worker(redis_url, policy("10/hour", upscale="1/hour"))
    async with old, new:
        await new.control.close("upscale", everyone=True)
        await new.control.close("video", everyone=True)

        reasons = [(await one.take(U1, "video")).reason for one in (old, new)]

    assert reasons == ["closed", "closed"]


@pytest.mark.parametrize("options", [{"shards": 8}, {"id_secret": "0123456789abcdef"}])
async def test_application_of_another_layout_does_not_start(
    redis_url: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with worker(redis_url, policy("10/hour")):
        app = Starlette()
        app.add_middleware(
            TieredLimitMiddleware, limiter=worker(redis_url, policy("10/hour"), **options)
        )

        with pytest.raises(RuntimeError, match="did not start"), serve(app):
            pass

    assert "is laid out as" in caplog.text


async def test_application_starts_without_redis_only_where_its_policy_is_a_file() -> None:
    nobody = "redis://127.0.0.1:1/0"
    with_file, with_stored = Limiter(policy("10/hour"), nobody), Limiter(stored(), nobody)

    await with_file.open()
    decision = await with_file.take(U1, "video")
    with pytest.raises(BackendError):
        await with_stored.open()

    assert (decision.allowed, decision.reason) == (True, "outage")
    await with_file.close()
    await with_stored.close()

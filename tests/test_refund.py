"""`Limiter.refund`, and what a request gives back by itself: once, whoever asks for it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from tests.contract import Clock
from tieredlimit import Account, Limiter, TieredLimitMiddleware
from tieredlimit.backends import MemoryBackend

ACCOUNT = Account("u1")
POLICY: dict[str, Any] = {
    "features": {"video": {"routes": ["POST /v1/videos"], "refund_on": [500]}},
    "tiers": {"all": {"quotas": {"video": "10/day"}}},
}


@pytest.mark.fault("A10", "E9")
async def test_decision_is_given_back_once_however_often_it_is_asked_for() -> None:
    async with Limiter(POLICY, MemoryBackend(clock=Clock())) as limiter:
        decisions = [await limiter.take(ACCOUNT, "video") for _ in range(10)]

        for _ in range(3):
            await limiter.refund(decisions[0])

        assert (await limiter.peek(ACCOUNT, "video")).remaining == 1


@pytest.mark.fault("H1")
@pytest.mark.parametrize("settle_within", [None, 60])
async def test_refunded_decision_still_has_its_lease_and_shows_the_pool_as_it_is(
    settle_within: float | None,
) -> None:
    limiting = {"rate": "10/day", "concurrency": 1, "lease": "10 minutes"}
    policy = {
        "features": {"video": {"refund_on": [500], "pool": {"rate": "10/hour"}}},
        "tiers": {"all": {"quotas": {"video": limiting}}},
    }
    async with Limiter(policy, MemoryBackend(clock=Clock())) as limiter:
        decision = await limiter.take(ACCOUNT, "video", 4, settle_within=settle_within)

        refunded = await limiter.refund(decision)
        held = await limiter.take(ACCOUNT, "video")
        assert refunded.lease is not None
        released = await refunded.lease.release()

        assert [one.pool and one.pool.remaining for one in (decision, refunded)] == [6, 10]
        assert (refunded.lease, refunded.token) == (decision.lease, decision.token)
        assert (held.reason, released) == ("concurrency", True)
        assert (await limiter.take(ACCOUNT, "video")).allowed


@pytest.mark.fault("A10", "E9")
async def test_refunded_decision_is_not_refunded_again() -> None:
    async with Limiter(POLICY, MemoryBackend(clock=Clock())) as limiter:
        decision = await limiter.take(ACCOUNT, "video", 2)
        await limiter.take(ACCOUNT, "video", 5)

        once = await limiter.refund(decision)
        twice = await limiter.refund(once)

        assert twice is once
        assert (await limiter.peek(ACCOUNT, "video")).remaining == 5


@pytest.mark.fault("E9", "H3")
async def test_handler_that_refunds_and_fails_is_not_refunded_again() -> None:
    async with Limiter(POLICY, MemoryBackend(clock=Clock())) as limiter:

        async def fail(request: Request) -> PlainTextResponse:
            await limiter.refund(request.state.tieredlimit.decisions["video"])
            return PlainTextResponse("no", 500)

        app = Starlette(routes=[Route("/v1/videos", fail, methods=["POST"])])
        metered = TieredLimitMiddleware(app, limiter=limiter, identify=lambda _: ACCOUNT)
        for _ in range(8):
            await limiter.take(ACCOUNT, "video")
        transport = httpx.ASGITransport(app=metered)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.post("/v1/videos")

        assert answer.status_code == 500
        assert (await limiter.peek(ACCOUNT, "video")).remaining == 2

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

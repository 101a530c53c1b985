"""docs/capacity.md: its policies load, its code runs, its picture is what the code draws."""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from examples import pool_picture
from tests.test_readme import blocks
from tieredlimit import Account, Limiter, Policy, TieredLimitMiddleware

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "capacity.md").read_text("utf-8")
LEASED: dict[str, Any] = {
    "features": {"video": {"routes": ["POST /v1/videos"]}},
    "tiers": {
        "all": {"quotas": {"video": {"rate": "60/hour", "concurrency": 1, "lease": "10 minutes"}}}
    },
}
UNROUTED = {**LEASED, "features": {"video": {}}}


def code() -> Iterator[dict[str, Any]]:
    for block in blocks(PAGE, "python"):
        namespace: dict[str, Any] = {}
        exec(compile(block, "capacity.md", "exec"), namespace)
        yield namespace


@pytest.mark.parametrize("block", blocks(PAGE, "toml"))
def test_every_policy_of_the_page_loads_without_a_warning(block: str) -> None:
    part = tomllib.loads(block)
    names = ["new", "pro", "free", "everyone"]
    features = {"video": {}, **part.get("features", {})}
    tiers: dict[str, Any] = {name: {"when": {"plan": name}} for name in names[:-1]}
    tiers["everyone"] = {}
    for name, tier in part.get("tiers", {}).items():
        tiers[name].update(tier)
    document = {
        "order": names,
        "features": features,
        "defaults": {"quotas": dict.fromkeys(features, "60/hour")},
        "tiers": tiers,
    }
    if "pools" in part:
        document["pools"] = part["pools"]

    assert Policy.from_dict(document).warnings == ()


def test_picture_of_the_page_is_what_the_code_draws() -> None:
    drawn = pool_picture.drawn(*asyncio.run(pool_picture.play()))

    assert drawn == (DOCS / "pool.svg").read_text("utf-8"), (
        "draw it anew: python -m examples.pool_picture docs/pool.svg"
    )


async def test_pool_of_the_picture_keeps_pro_whole_and_starves_the_others() -> None:
    admitted, _ = await pool_picture.play()

    minutes = [sum(admitted[i : i + 6], start=type(admitted[0])()) for i in range(0, 96, 6)]
    assert all(minute["pro"] == 20 for minute in minutes[:8])
    assert all(minute["free"] + minute["new"] == 0 for minute in minutes[9:13])


def client_of(limiter: Limiter, handler: dict[str, Any]) -> httpx.AsyncClient:
    app = Starlette(routes=[Route("/v1/videos", handler["render"], methods=["POST"])])
    metered = TieredLimitMiddleware(app, limiter=limiter, identify=lambda _: Account("u1"))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=metered), base_url="http://test")


async def test_slot_that_a_handler_of_the_page_detaches_is_kept_and_given_back_by_its_job() -> None:
    handler, job, *_ = code()
    async with Limiter(LEASED) as limiter, client_of(limiter, handler) as client:
        await client.post("/v1/videos")
        while_it_waits = await client.post("/v1/videos")
        await job["job"](limiter, handler["queue"].pop())
        afterwards = await client.post("/v1/videos")

    assert while_it_waits.status_code == 429
    assert while_it_waits.json()["reason"] == "concurrency"
    assert afterwards.status_code == 202


@pytest.mark.parametrize("nothing_is_held", ["unlimited", "outage"])
async def test_handler_and_job_of_the_page_do_without_a_lease_where_nothing_is_held(
    nothing_is_held: str,
) -> None:
    handler, job, *_ = code()
    policy = LEASED
    if nothing_is_held == "unlimited":
        policy = {**LEASED, "tiers": {"all": {"quotas": {"video": "unlimited"}}}}
    backend = "redis://127.0.0.1:1/0" if nothing_is_held == "outage" else None
    async with Limiter(policy, backend) as limiter, client_of(limiter, handler) as client:
        answers = [await client.post("/v1/videos") for _ in range(2)]
        for token in handler["queue"]:
            await job["job"](limiter, token)

    assert [one.status_code for one in answers] == [202, 202]


async def test_reservation_of_the_page_costs_what_it_took() -> None:
    reserving = next(block for block in code() if "generate" in block)
    async with Limiter(LEASED) as limiter:
        await reserving["generate"](limiter, "a cat")

        assert (await limiter.peek(Account("u1"), "video")).remaining == 60 - 12


async def test_job_of_the_page_that_has_one_token_gives_back_its_slot_and_settles() -> None:
    both = next(block for block in code() if "order" in block)
    async with Limiter(UNROUTED) as limiter:
        app = Starlette(routes=[Route("/v1/videos", both["order"], methods=["POST"])])
        app.add_middleware(TieredLimitMiddleware, limiter=limiter, identify=lambda _: Account("u1"))
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test")
        async with client:
            await client.post("/v1/videos")
            while_it_waits = await client.post("/v1/videos")
            await both["work"](limiter, both["ordered"].pop())

        afterwards = await limiter.peek(Account("u1"), "video")

    assert while_it_waits.json()["reason"] == "concurrency"
    assert (afterwards.remaining, [slot.held for slot in afterwards.slots]) == (60 - 12, [0])

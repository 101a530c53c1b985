"""Renders that run in processes of their own: a slot while one runs, its true seconds at the end.

Run it from the checkout, with a Redis, which both kinds of processes ask:

    TIEREDLIMIT_REDIS=redis://localhost:6379/0 uvicorn examples.video_jobs:app

    curl -d '{"account": "ada", "seconds": 8}' localhost:8000/v1/videos
    curl localhost:8000/v1/usage/ada

The request charges an estimate and takes one of two slots, then answers 202. The job, a process
that knows no more than a token, keeps the slot for as long as it renders, gives it back, and
settles what it really took. Kill a job, and its slot is free ten seconds later; its estimate
stands.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tieredlimit import Account, Limiter, TieredLimitMiddleware, UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

POLICY: dict[str, Any] = {
    # No routes: what a request costs stands in its body, so its handler charges it.
    "features": {"video": {"outage": "deny", "pool": {"rate": "600/minute"}}},
    "tiers": {
        "everyone": {
            "quotas": {"video": {"rate": "60/hour", "concurrency": 2, "lease": "10 seconds"}}
        }
    },
}
LONGEST = 60
"""Seconds of the longest video: a cost of 0 would pass an empty bucket."""
PACE = float(os.environ.get("VIDEO_JOBS_PACE", "1"))
"""Real seconds that a job takes to render one second of video."""


def limiter_of() -> Limiter:
    """Return a limiter as both the service and its jobs have it."""
    return Limiter(POLICY, os.environ["TIEREDLIMIT_REDIS"], namespace="video-jobs")


def create_app(limiter: Limiter) -> Starlette:
    """Return the service, limited by `limiter`."""
    jobs: set[asyncio.Task[None]] = set()

    async def order(request: Request) -> Response:
        try:
            asked = await request.json()
            account, seconds = Account(asked["account"]), asked["seconds"]
        except (KeyError, TypeError, ValueError, UsageError) as exc:
            raise HTTPException(400, "an account and its seconds, please") from exc
        if type(seconds) is not int or not 1 <= seconds <= LONGEST:
            raise HTTPException(400, f"a video has from 1 to {LONGEST} seconds")
        limits = request.state.tieredlimit
        reservation = await limits.reserve("video", seconds, account=account)
        # From here on the slot is the job's to renew and to give back.
        token = reservation.detach()
        job = asyncio.create_task(start_job(token, seconds))
        jobs.add(job)
        job.add_done_callback(jobs.discard)
        return JSONResponse({"charged": seconds}, 202)

    async def usage(request: Request) -> Response:
        decision = await limiter.peek(Account(request.path_params["account"]), "video")
        (slots,) = decision.slots
        pool = decision.pool
        return JSONResponse(
            {
                "remaining": decision.remaining,
                "running": slots.held,
                "in_pool": None if pool is None else pool.remaining,
            }
        )

    @asynccontextmanager
    async def until_jobs_end(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.gather(*jobs)

    return Starlette(
        routes=[
            Route("/v1/videos", order, methods=["POST"]),
            Route("/v1/usage/{account}", usage),
        ],
        middleware=[Middleware(TieredLimitMiddleware, limiter=limiter)],
        lifespan=until_jobs_end,
    )


async def start_job(token: str, seconds: int) -> None:
    """Render in a process of its own. A real service would put both into its queue of jobs."""
    job = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "examples.video_jobs", token, str(seconds)
    )
    await job.wait()


async def run_job(token: str, estimate: int) -> None:
    """Render, in whichever process has the token, and settle what it took."""
    async with limiter_of() as limiter, limiter.leases.hold(token) as lease:
        seconds = 0
        # An estimate may be too high, or too low.
        actual = max(1, round(estimate * random.uniform(0.5, 1.2)))
        while seconds < actual and not lease.lost:
            await asyncio.sleep(PACE)  # where a real job renders
            seconds += 1
        settled = await limiter.settle(token, seconds)
        print(f"rendered {seconds} s, {estimate} were charged; settled: {settled}")


if __name__ == "__main__":
    asyncio.run(run_job(sys.argv[1], int(sys.argv[2])))
elif os.environ.get("TIEREDLIMIT_REDIS"):
    app = create_app(limiter_of())

"""A small media API behind tieredlimit: start reading here.

Run it from the checkout, with buckets in memory:

    uvicorn examples.media_api:app

`TIEREDLIMIT_REDIS=redis://localhost:6379/0` shares the buckets of all workers instead, and
`TIEREDLIMIT_POLICY` names another policy than the `policy.toml` beside this file.
"""

from __future__ import annotations

import os
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tieredlimit import Account, Limiter, TieredLimitMiddleware
from tieredlimit.identity import api_key

NOW = datetime.now(UTC)
LONG_AGO = NOW - timedelta(days=400)

# Whatever keeps your keys goes here: `api_key` takes any function from a key to its account or
# None, async ones too. The plan and the age choose the tier, the id is who is charged.
ACCOUNTS = {
    "key-ada": Account("ada", plan="free", created_at=LONG_AGO),
    "key-nova": Account("nova", plan="free", created_at=NOW - timedelta(days=2)),
    "key-grace": Account("grace", plan="pro", created_at=LONG_AGO, within={"org": "studio"}),
    "key-linus": Account("linus", plan="pro", created_at=LONG_AGO, within={"org": "studio"}),
}

# A caller without a key that we know is anonymous, and charged by address.
identify = api_key(ACCOUNTS.get)


def create_app(limiter: Limiter) -> Starlette:
    """Return the media API, limited by `limiter`."""

    async def usage(request: Request) -> Response:
        # Looking costs nothing: /v1/usage is no route of the policy, and `usage` only reads.
        account = await request.state.tieredlimit.account()
        return JSONResponse(
            {
                feature: {
                    "allowed": decision.allowed,
                    "remaining": {quota.name: quota.remaining for quota in decision.quotas},
                }
                for feature, decision in (await limiter.usage(account)).items()
            }
        )

    app = Starlette(
        routes=[
            Route("/v1/images", make_image, methods=["POST"]),
            Route("/v1/images/{id}/variations", make_image, methods=["POST"]),
            Route("/v1/videos", make_video, methods=["POST"]),
            Route("/v1/videos/hd", make_video, methods=["POST"]),
            Route("/v1/usage", usage),
            Route("/health", health),
        ]
    )
    app.add_middleware(TieredLimitMiddleware, limiter=limiter, identify=identify)
    # Added last, so outermost: denials pass through it as well, and a page of another origin may
    # read them. Without `expose_headers`, its scripts would see the status but no Retry-After.
    app.add_middleware(
        CORSMiddleware,
        allow_origins=["*"],
        allow_methods=["GET", "POST"],
        allow_headers=["X-Api-Key"],
        expose_headers=["RateLimit", "RateLimit-Policy", "Retry-After"],
    )
    return app


# The handlers know nothing of limits: what the policy denies never gets here.


async def make_image(request: Request) -> Response:
    """Pretend to make an image, or a variation of one."""
    made = {"image": uuid.uuid4().hex, "variation_of": request.path_params.get("id")}
    return JSONResponse(made, status_code=201)


async def make_video(request: Request) -> Response:
    """Pretend to start rendering a video."""
    started = {"video": uuid.uuid4().hex, "hd": request.url.path.endswith("/hd")}
    return JSONResponse(started, status_code=202)


async def health(_: Request) -> Response:
    """Say that we are up."""
    return PlainTextResponse("ok")


os.environ.setdefault("TIEREDLIMIT_POLICY", str(Path(__file__).with_name("policy.toml")))
limiter = Limiter.from_env()
app = create_app(limiter)

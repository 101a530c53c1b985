"""Starlette: `uvicorn examples.starlette_app:app`, then `curl -X POST localhost:8000/v1/images`.

Images are metered by their route; a video is charged by its endpoint, by the second.
"""

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tieredlimit import Account, Limiter, TieredLimitMiddleware
from tieredlimit.identity import api_key
from tieredlimit.integrations.starlette import limited

POLICY = {
    "order": ["pro", "everyone"],
    "features": {"image": {"routes": ["POST /v1/images"]}, "video": {}},
    "tiers": {
        "pro": {"when": {"plan": "pro"}, "quotas": {"image": "unlimited", "video": "60/hour"}},
        "everyone": {"quotas": {"image": "5/minute", "video": 0}},
    },
}
ACCOUNTS = {"key-ada": Account("ada", plan="pro"), "key-bob": Account("bob", plan="free")}


async def create_image(_: Request) -> JSONResponse:
    """Make an image."""
    return JSONResponse({"image": "ready"})


@limited("video", cost=lambda request: max(1, min(request.path_params["seconds"], 60)))
async def create_video(_: Request) -> JSONResponse:
    """Make a video."""
    return JSONResponse({"video": "queued"})


around = Middleware(TieredLimitMiddleware, limiter=Limiter(POLICY), identify=api_key(ACCOUNTS.get))
images = Route("/v1/images", create_image, methods=["POST"])
videos = Route("/v1/videos/{seconds:int}", create_video, methods=["POST"])
app = Starlette(routes=[images, videos], middleware=[around])

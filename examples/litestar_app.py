"""Litestar: `uvicorn examples.litestar_app:app`, then `curl -X POST localhost:8000/v1/images`.

Images are metered by their route; a video is charged by a guard of its handler, by the second.
"""

from litestar import Litestar, post

from tieredlimit import Account, Denied, Limiter, TieredLimitMiddleware
from tieredlimit.identity import api_key
from tieredlimit.integrations.litestar import denied, limited

POLICY = {
    "order": ["pro", "everyone"],
    "features": {"image": {"routes": ["POST /v1/images"]}, "video": {}},
    "tiers": {
        "pro": {"when": {"plan": "pro"}, "quotas": {"image": "unlimited", "video": "60/hour"}},
        "everyone": {"quotas": {"image": "5/minute", "video": 0}},
    },
}
ACCOUNTS = {"key-ada": Account("ada", plan="pro"), "key-bob": Account("bob", plan="free")}
by_seconds = limited(
    "video", cost=lambda connection: max(1, min(connection.path_params["seconds"], 60))
)


@post("/v1/images")
async def create_image() -> dict[str, str]:
    """Make an image."""
    return {"image": "ready"}


@post("/v1/videos/{seconds:int}", guards=[by_seconds])
async def create_video() -> dict[str, str]:
    """Make a video."""
    return {"video": "queued"}


api = Litestar([create_image, create_video], exception_handlers={Denied: denied})
app = TieredLimitMiddleware(api, limiter=Limiter(POLICY), identify=api_key(ACCOUNTS.get))

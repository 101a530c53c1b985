"""Quart: `uvicorn examples.quart_app:app`, then `curl -X POST localhost:8000/v1/images`.

Images are metered by their route; a video is charged by its view, by the second.
"""

from quart import Quart

from tieredlimit import Account, Denied, Limiter, TieredLimitMiddleware
from tieredlimit.identity import api_key
from tieredlimit.integrations.quart import denied, limited

POLICY = {
    "order": ["pro", "everyone"],
    "features": {"image": {"routes": ["POST /v1/images"]}, "video": {}},
    "tiers": {
        "pro": {"when": {"plan": "pro"}, "quotas": {"image": "unlimited", "video": "60/hour"}},
        "everyone": {"quotas": {"image": "5/minute", "video": 0}},
    },
}
ACCOUNTS = {"key-ada": Account("ada", plan="pro"), "key-bob": Account("bob", plan="free")}

app = Quart(__name__)
app.register_error_handler(Denied, denied)
app.asgi_app = TieredLimitMiddleware(  # type: ignore[assignment, method-assign]  # as Quart's guide says
    app.asgi_app, limiter=Limiter(POLICY), identify=api_key(ACCOUNTS.get)
)


@app.post("/v1/images")
async def create_image() -> dict[str, str]:
    """Make an image."""
    return {"image": "ready"}


@app.post("/v1/videos/<int:seconds>")
@limited("video", cost=lambda request: max(1, min(request.view_args["seconds"], 60)))
async def create_video(seconds: int) -> dict[str, str]:
    """Make a video."""
    return {"video": f"{seconds} seconds"}

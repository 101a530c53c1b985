"""FastAPI with authentication in dependencies: run `uvicorn examples.fastapi_app:app`.

The middleware runs before dependencies do, so here it only opens the limiter, renders denials and
adds the response fields; each endpoint says what it takes, and who pays.
"""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import APIKeyHeader

from tieredlimit import Account, Limiter, TieredLimitMiddleware
from tieredlimit.integrations.fastapi import document_denials, limited

POLICY = {
    "order": ["pro", "everyone"],
    # No routes: these features are taken by the endpoints themselves.
    "features": {"image": {}, "video": {}},
    "tiers": {
        "pro": {"when": {"plan": "pro"}, "quotas": {"image": "unlimited", "video": "20/day"}},
        "everyone": {"quotas": {"image": "5/minute", "video": 0}},
    },
}
ACCOUNTS = {
    "key-ada": Account("ada", plan="pro", created_at=datetime(2024, 5, 1, tzinfo=UTC)),
    "key-bob": Account("bob", plan="free", created_at=datetime(2026, 1, 9, tzinfo=UTC)),
}

limiter = Limiter(POLICY)
app = FastAPI(title="Media")
app.add_middleware(TieredLimitMiddleware, limiter=limiter)
document_denials(app)


def current_account(key: Annotated[str, Depends(APIKeyHeader(name="x-api-key"))]) -> Account:
    """Return the caller's account; an unknown key is a 401."""
    if key not in ACCOUNTS:
        raise HTTPException(401, "unknown key")
    return ACCOUNTS[key]


@app.post("/v1/images", dependencies=[Depends(limited("image", account=current_account))])
async def create_image() -> dict[str, str]:
    """Make an image."""
    return {"image": "ready"}


@app.post("/v1/videos", dependencies=[Depends(limited("video", account=current_account))])
async def create_video() -> dict[str, str]:
    """Make a video."""
    return {"video": "queued"}

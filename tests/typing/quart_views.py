"""Quart: the types of limited views."""

from __future__ import annotations

from typing import assert_type

from quart import Quart, Request, Response, request, websocket

from tieredlimit import Account, Decision, Denied
from tieredlimit.integrations.quart import denied, feature_of, limited, limits_of
from tieredlimit.request import RequestLimits

app = Quart(__name__)
app.register_error_handler(Denied, denied)


async def price(of: Request) -> int:
    return len(await of.get_data())


def payer(of: Request) -> Account | None:
    return Account(of.headers["x-user"])


@app.post("/videos")
@limited("video", cost=price, account=payer)
async def create_video() -> dict[str, int | None]:
    assert_type(feature_of(request), str | None)
    assert_type(limits_of(request), RequestLimits)
    decision = await limits_of(request).take("image", 2)
    assert_type(decision, Decision)
    return {"left": decision.remaining}


@app.get("/images/<name>")
@limited("image", cost=lambda of: len(of.headers))
def show_image(name: str) -> str:
    return name


@app.websocket("/watch")
@limited("video", cost=2)
async def watch() -> None:
    assert_type(feature_of(websocket), str | None)
    await websocket.send("ready")


async def called(denial: Denied) -> Response:
    # What is decorated is as it was.
    assert_type(await create_video(), dict[str, int | None])
    assert_type(show_image("cat"), str)
    assert_type(await watch(), None)
    show_image(7)  # type: ignore[arg-type]
    return await denied(denial)

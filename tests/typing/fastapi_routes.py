"""FastAPI: the types of dependencies that charge."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Annotated, assert_type

from fastapi import Depends, FastAPI
from starlette.requests import Request
from starlette.responses import Response

from tieredlimit import Account, Decision, Denied, Limiter
from tieredlimit.integrations.fastapi import (
    denied,
    document_denials,
    feature_of,
    limited,
    limits_of,
)
from tieredlimit.request import RequestLimits


def current_account(request: Request) -> Account | None:
    return Account(request.headers["x-user"])


async def account_of(name: str) -> Account:
    return Account(name)


def lent_account() -> Iterator[Account]:
    yield Account("u1")


async def lent_later() -> AsyncIterator[Account | None]:
    yield None


class Accounts:
    """What FastAPI calls a parametrised dependency."""

    async def __call__(self, request: Request) -> Account | None:
        return current_account(request)


def wrong_account(request: Request) -> str:
    return request.headers["x-user"]


charged = limited("video", account=current_account, cost=2)
assert_type(charged, Callable[..., Awaitable[Decision]])
others = [limited("video", account=one) for one in (account_of, lent_account, lent_later)]
others += [limited("video"), limited("video", account=Accounts())]
limited("video", account=wrong_account)  # type: ignore[arg-type]

app = FastAPI(dependencies=[Depends(one) for one in others])


@app.post("/videos")
async def create_video(
    request: Request, decision: Annotated[Decision, Depends(limited("video"))]
) -> int | None:
    assert_type(feature_of(request), str | None)
    assert_type(limits_of(request), RequestLimits)
    return decision.remaining


@app.get("/videos", dependencies=[Depends(charged)])
def show_videos() -> list[str]:
    return []


async def documents(limiter: Limiter, request: Request, denial: Denied) -> Response:
    app.add_exception_handler(Denied, denied)
    document_denials(app)
    document_denials(app, limiter)
    assert_type(show_videos(), list[str])
    return await denied(request, denial)

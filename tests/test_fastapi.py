"""The FastAPI dependency, inside a real FastAPI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import pytest
from fastapi import (
    APIRouter,
    BackgroundTasks,
    Depends,
    FastAPI,
    Header,
    HTTPException,
    Request,
    WebSocket,
)
from fastapi.responses import StreamingResponse

from examples import fastapi_app
from tests.framework_contract import DONE, GATE, WORD, WebSocketContract, ask, hold, payer, price
from tests.test_settling import push
from tieredlimit import (
    Account,
    Decision,
    Denied,
    Limiter,
    TieredLimitMiddleware,
    UsageError,
    stored,
)
from tieredlimit.backends import MemoryBackend
from tieredlimit.integrations.fastapi import (
    denied,
    document_denials,
    feature_of,
    limited,
    limits_of,
)
from tieredlimit.integrations.starlette import limited as limited_endpoint

if TYPE_CHECKING:
    from starlette.types import ASGIApp

POLICY: dict[str, Any] = {
    "order": ["pro", "everyone"],
    "features": {"image": {"routes": ["POST /routed"]}, "video": {}},
    "tiers": {
        "pro": {"when": {"plan": "pro"}, "quotas": {"image": "unlimited", "video": "4/hour"}},
        "everyone": {"quotas": {"image": "2/hour", "video": 0}},
    },
}


async def caller(x_user: Annotated[str, Header()] = "") -> Account | None:
    return Account(x_user, plan="pro" if x_user == "ada" else "free") if x_user else None


def build(limiter: Limiter, *, documented: bool = True) -> FastAPI:
    app = FastAPI()
    app.add_middleware(TieredLimitMiddleware, limiter=limiter)
    router = APIRouter(prefix="/v1", dependencies=[Depends(limited("image", account=caller))])

    @router.post("/images")
    async def image(decision: Annotated[Decision, Depends(limited("image"))]) -> dict[str, Any]:
        return {"tier": decision.tier, "remaining": decision.remaining}

    @app.post("/videos")
    async def video(
        decision: Annotated[Decision, Depends(limited("video", account=caller, cost=3))],
    ) -> dict[str, Any]:
        return {"remaining": decision.remaining}

    @app.post("/routed", dependencies=[Depends(limited("image", account=caller))])
    async def routed() -> dict[str, str]:
        return {}

    @app.get("/free")
    async def free() -> dict[str, str]:
        return {}

    app.include_router(router)
    if documented:
        document_denials(app)
    return app


@pytest.fixture
async def limiter() -> AsyncIterator[Limiter]:
    async with Limiter(POLICY) as opened:
        yield opened


@pytest.fixture
async def client(limiter: Limiter) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build(limiter))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as opened:
        yield opened


async def test_dependency_charges_whom_the_applications_own_dependency_names(
    client: httpx.AsyncClient,
) -> None:
    answers = [await client.post("/v1/images", headers={"x-user": user}) for user in "aabaa"]

    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert answers[0].json() == {"tier": "everyone", "remaining": 1}


async def test_feature_taken_by_two_dependencies_and_a_route_is_charged_once(
    client: httpx.AsyncClient,
) -> None:
    first = await client.post("/v1/images", headers={"x-user": "u"})
    routed = await client.post("/routed")

    assert first.json()["remaining"] == 1
    assert first.headers["ratelimit"].startswith('"image-hour";r=1')
    assert routed.headers["ratelimit"].startswith('"image-hour";r=1')


@pytest.mark.parametrize(("refund", "left"), [({}, 1), ({"refund_on": [429]}, 2)])
async def test_first_of_two_features_stays_charged_unless_it_is_refunded(
    refund: dict[str, Any], left: int
) -> None:
    limiter = Limiter(
        {
            "features": {"image": refund, "video": {}},
            "tiers": {"all": {"quotas": {"image": "3/hour", "video": "1/hour"}}},
        }
    )
    app = FastAPI()
    app.add_middleware(TieredLimitMiddleware, limiter=limiter)
    both = [Depends(limited(feature, account=caller)) for feature in ("image", "video")]

    @app.post("/both", dependencies=both)
    async def make_both() -> None: ...

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answers = [await client.post("/both", headers={"x-user": "ada"}) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [200, 429]
    assert (await limiter.peek(Account("ada"), "image")).remaining == left


async def test_payer_that_comes_too_late_is_told_in_the_log(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    await client.post("/routed", headers={"x-user": "u"})

    assert '"image" was charged to whom the middleware named' in caplog.messages[0]
    assert "leave the routes out of the policy" in caplog.messages[0]


@pytest.mark.parametrize("feature", [["image"], {"a": 1}, 7, None, "imag", "x" * 10_000])
async def test_feature_from_a_body_that_is_none_is_an_error_that_says_so(
    limiter: Limiter, feature: Any
) -> None:
    app = FastAPI()
    app.add_middleware(TieredLimitMiddleware, limiter=limiter)

    @app.post("/")
    async def handler(request: Request) -> Any:
        with pytest.raises(UsageError, match="feature") as caught:
            await request.state.tieredlimit.take(feature)
        return len(str(caught.value))

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        told = (await client.post("/")).json()

    assert told < 300


async def test_denial_may_be_returned_by_a_handler(limiter: Limiter) -> None:
    app = FastAPI()

    @app.get("/")
    async def handler() -> Any:
        return (await limiter.take(Account("u"), "video")).response()

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        denied = await client.get("/")

    assert denied.status_code == 403
    assert denied.headers["content-type"] == "application/problem+json"
    assert denied.json()["reason"] == "zero"


async def test_denial_from_a_dependency_is_rendered_as_the_middlewares_own(
    client: httpx.AsyncClient,
) -> None:
    denied = await client.post("/videos", headers={"x-user": "bob"})

    assert denied.status_code == 403
    assert denied.headers["content-type"] == "application/problem+json"
    assert denied.json()["reason"] == "zero"
    assert denied.headers["ratelimit"] == '"video";r=0'


async def test_cost_of_a_dependency_is_what_is_charged(client: httpx.AsyncClient) -> None:
    first = await client.post("/videos", headers={"x-user": "ada"})
    second = await client.post("/videos", headers={"x-user": "ada"})

    assert (first.status_code, first.json()) == (200, {"remaining": 1})
    assert second.status_code == 429
    assert int(second.headers["retry-after"]) == 1800


async def test_caller_without_an_account_is_charged_by_address(client: httpx.AsyncClient) -> None:
    answers = [await client.post("/v1/images") for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200, 200, 429]


async def test_without_the_middleware_the_error_says_what_is_missing() -> None:
    app = FastAPI()

    @app.get("/", dependencies=[Depends(limited("image"))])
    async def handler() -> None: ...

    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")

    with pytest.raises(UsageError, match="needs TieredLimitMiddleware"):
        await client.get("/")
    await client.aclose()


def test_openapi_document_shows_the_denials_of_limited_operations_only(limiter: Limiter) -> None:
    document = build(limiter).openapi()

    limited_operations = [
        document["paths"][path]["post"] for path in ("/v1/images", "/videos", "/routed")
    ]
    for operation in limited_operations:
        assert {"403", "429", "503"} <= set(operation["responses"])
        assert "Retry-After" in operation["responses"]["429"]["headers"]
    assert set(document["paths"]["/free"]["get"]["responses"]) == {"200"}
    assert "TieredLimitProblem" in document["components"]["schemas"]


def test_openapi_document_shows_routes_metered_by_the_policy_where_a_limiter_is_given(
    limiter: Limiter,
) -> None:
    app = FastAPI()

    @app.post("/routed")
    async def routed() -> None: ...

    document_denials(app, limiter)

    assert "429" in app.openapi()["paths"]["/routed"]["post"]["responses"]


async def test_openapi_document_can_be_had_before_a_stored_policy_is_loaded() -> None:
    limiter = Limiter(stored(), MemoryBackend())
    app = FastAPI()

    @app.post("/routed")
    async def routed() -> None: ...

    document_denials(app, limiter)
    before = set(app.openapi()["paths"]["/routed"]["post"]["responses"])
    await push(limiter, POLICY)

    assert before == {"200"}
    assert "429" in app.openapi()["paths"]["/routed"]["post"]["responses"]


def test_openapi_document_keeps_what_the_application_said_of_a_status(limiter: Limiter) -> None:
    app = FastAPI()
    said = {429: {"description": "slow down"}}

    @app.post("/routed", responses=said)  # type: ignore[arg-type]  # dict is invariant
    async def routed() -> None: ...

    document_denials(app, limiter)

    assert app.openapi()["paths"]["/routed"]["post"]["responses"]["429"] == said[429]


async def subject(x_who: Annotated[str, Header()] = "") -> Account | None:
    """Name who pays, as the contract's identify does."""
    if x_who == "stranger":
        raise HTTPException(401, "who are you?", {"www-authenticate": "Key"})
    return Account(x_who, plan="banned" if x_who == "mallory" else "free") if x_who else None


image_of_subject = Depends(limited("image", account=subject))
router = APIRouter()


@router.post("/images")
@router.get("/images/{id}")
@router.post("/limited", dependencies=[image_of_subject])
@router.options("/options", dependencies=[image_of_subject])
async def image(request: Request) -> dict[str, Any]:
    return {"feature": feature_of(request)}


@router.post("/limited-sync", dependencies=[image_of_subject])
def limited_sync(request: Request) -> dict[str, Any]:
    return {"feature": feature_of(request)}


@router.post("/class")
@limited_endpoint("image")
async def decorated(request: Request) -> dict[str, Any]:
    return {"feature": feature_of(request)}


@router.post("/both", dependencies=[Depends(limited("image"))])
@router.post("/taken")
async def taken(request: Request) -> dict[str, Any]:
    (await limits_of(request).take("image")).raise_if_denied()
    return {"feature": feature_of(request)}


@router.post("/costly")
@limited_endpoint("video", cost=price, account=payer)
async def costly(request: Request) -> dict[str, Any]:
    return {"left": limits_of(request).decisions["video"].remaining}


@router.post("/costly-sync")
@limited_endpoint("video", cost=price, account=payer)
def costly_sync(request: Request) -> dict[str, Any]:
    return {"left": limits_of(request).decisions["video"].remaining}


@router.post("/crash")
@router.get("/free-crash")
async def crash() -> None:
    raise RuntimeError("crash")


@router.get("/stream")
async def stream() -> StreamingResponse:
    return StreamingResponse(hold([b"first", b"last"]))


@router.post("/background")
async def background(tasks: BackgroundTasks) -> None:
    async def work() -> None:
        await GATE.get().wait()
        DONE.get().set()

    tasks.add_task(work)


@router.get("/free")
async def free(request: Request) -> dict[str, Any]:
    return {"feature": feature_of(request), "word": WORD.get()}


@router.websocket("/socket")
@router.websocket("/limited-socket", dependencies=[Depends(limited("image"))])
async def socket(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text("hello")
    await websocket.close()


def whole() -> FastAPI:
    api, mounted, app = APIRouter(prefix="/api"), FastAPI(), FastAPI()
    api.add_api_route("/images", image, methods=["POST"])
    mounted.add_api_route("/pictures", image, methods=["POST"])
    app.include_router(router)
    app.include_router(api)
    app.mount("/mounted", mounted)
    return app


class TestFastAPI(WebSocketContract):
    stranger = b'{"detail":"who are you?"}'

    def build(self, limiter: Limiter, **options: Any) -> ASGIApp:
        app = whole()
        app.add_middleware(TieredLimitMiddleware, limiter=limiter, **options)
        return app


class TestFastAPIWrappedFromOutside(WebSocketContract):
    stranger = TestFastAPI.stranger

    def build(self, limiter: Limiter, **options: Any) -> ASGIApp:
        app = whole()
        app.add_exception_handler(Denied, denied)
        return TieredLimitMiddleware(app, limiter=limiter, **options)


async def test_request_that_is_invalid_is_charged_all_the_same(limiter: Limiter) -> None:
    app = FastAPI()
    app.add_middleware(TieredLimitMiddleware, limiter=limiter)

    @app.post("/", dependencies=[Depends(limited("image"))])
    async def handler(seconds: int) -> None: ...

    answers = [await ask(app, "POST /") for _ in range(3)]

    assert [answer.status for answer in answers] == [422, 422, 429]


async def test_example_denies_video_to_who_has_not_paid_and_asks_strangers_for_a_key() -> None:
    transport = httpx.ASGITransport(fastapi_app.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        stranger = await client.post("/v1/videos")
        unknown = await client.post("/v1/videos", headers={"x-api-key": "key-eve"})
        bob = await client.post("/v1/videos", headers={"x-api-key": "key-bob"})
        ada = await client.post("/v1/videos", headers={"x-api-key": "key-ada"})
        images = [
            (await client.post("/v1/images", headers={"x-api-key": "key-bob"})).status_code
            for _ in range(6)
        ]
        document = (await client.get("/openapi.json")).json()

    assert (stranger.status_code, unknown.status_code) == (401, 401)
    assert (bob.status_code, ada.status_code) == (403, 200)
    assert images == [200] * 5 + [429]
    assert "429" in document["paths"]["/v1/videos"]["post"]["responses"]

"""Django under ASGI behind the middleware, and the decorator of its views."""

from __future__ import annotations

import asyncio
import sys
import threading
import types
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import django
import pytest
from asgiref.sync import sync_to_async
from django.conf import settings

if not settings.configured:
    settings.configure(ALLOWED_HOSTS=["*"], LOGGING_CONFIG=None, SECRET_KEY="x", USE_TZ=True)
    django.setup()

from django.core.handlers.asgi import ASGIHandler
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.test import RequestFactory, override_settings
from django.urls import include, is_valid_path, path, re_path
from django.utils.decorators import method_decorator
from django.views import View
from django.views.decorators.http import require_http_methods, require_POST

from tests.framework_contract import (
    DONE,
    GATE,
    POLICY,
    PREFLIGHT,
    WORD,
    FrameworkContract,
    ask,
    call,
    hold,
    payer,
    price,
)
from tests.mounting import mounted
from tieredlimit import Account, Limiter, TieredLimitMiddleware, UsageError
from tieredlimit.integrations.django import feature_of, limited, limits_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import ASGIApp

get = require_http_methods(["GET", "HEAD"])


@require_POST
async def image(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"feature": feature_of(request)})


@get
async def variation(request: HttpRequest, id: str) -> HttpResponse:  # noqa: A002 -- as templates say
    return JsonResponse({"feature": feature_of(request)})


async def picture(request: HttpRequest) -> HttpResponse:
    if "mounted" not in getattr(request, "scope"):  # noqa: B009 -- of an ASGIRequest
        raise Http404
    return await image(request)


@require_POST
@limited("image")
async def both(request: HttpRequest) -> HttpResponse:
    (await limits_of(request).take("image")).raise_if_denied()
    return JsonResponse({"feature": feature_of(request)})


@require_POST
@limited("image")
async def limited_view(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"feature": feature_of(request)})


@limited("image")
async def options(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"feature": feature_of(request)})


@require_POST
@limited("image")
def limited_sync(request: HttpRequest) -> HttpResponse:
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()
    return JsonResponse({"feature": feature_of(request)})


@method_decorator(limited("image"), name="dispatch")
class Limited(View):
    async def post(self, request: HttpRequest) -> HttpResponse:
        return JsonResponse({"feature": feature_of(request)})


class PlainClass(View):
    @method_decorator(limited("image"))
    def post(self, request: HttpRequest) -> HttpResponse:
        return JsonResponse({"feature": feature_of(request)})

    @method_decorator(limited("image"))
    def put(self, request: HttpRequest) -> HttpResponse:
        return JsonResponse({"feature": feature_of(request)})


@require_POST
async def taken(request: HttpRequest) -> HttpResponse:
    (await limits_of(request).take("image")).raise_if_denied()
    return JsonResponse({"feature": feature_of(request)})


@require_POST
@limited("video", cost=price, account=payer)
async def costly(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"left": limits_of(request).decisions["video"].remaining})


@require_POST
@limited("video", cost=price, account=payer)
def costly_sync(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"left": limits_of(request).decisions["video"].remaining})


async def crash(request: HttpRequest) -> HttpResponse:
    raise RuntimeError("crash")


async def stream(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(hold([b"first", b"last"]))


RUNNING: set[asyncio.Task[None]] = set()


async def background(request: HttpRequest) -> HttpResponse:
    async def work() -> None:
        await GATE.get().wait()
        DONE.get().set()

    RUNNING.add(task := asyncio.create_task(work()))
    task.add_done_callback(RUNNING.discard)
    return HttpResponse()


@get
async def free(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"feature": feature_of(request), "word": WORD.get()})


URLS = types.ModuleType("tests.django_urls")
URLS.urlpatterns = [  # type: ignore[attr-defined]  # a module made here
    path("images", image),
    path("images/<str:id>", variation),
    path("api/", include([path("images", image)])),
    path("pictures", picture),
    path("both", both),
    path("limited", limited_view),
    path("options", options),
    path("limited-sync", limited_sync),
    path("class", Limited.as_view()),
    path("plain-class", PlainClass.as_view()),
    path("taken", taken),
    path("costly", costly),
    path("costly-sync", costly_sync),
    path("crash", crash),
    path("stream", stream),
    path("background", background),
    path("free", free),
    path("free-crash", crash),
]
sys.modules[URLS.__name__] = URLS
DENIED = "tieredlimit.integrations.django.DeniedMiddleware"


@pytest.fixture
def in_force() -> Iterator[None]:
    with override_settings(ROOT_URLCONF=URLS.__name__, MIDDLEWARE=[DENIED]):
        yield


class DjangoContract(FrameworkContract):
    """The contract for Django; subclass it and say which middleware there is."""

    middleware: ClassVar[tuple[str, ...]]

    @pytest.fixture(autouse=True)
    def settings_in_force(self) -> Iterator[None]:
        with override_settings(ROOT_URLCONF=URLS.__name__, MIDDLEWARE=list(self.middleware)):
            yield

    def build(self, limiter: Limiter, **options: Any) -> ASGIApp:
        app = mounted(ASGIHandler(), "/mounted", ASGIHandler())
        return TieredLimitMiddleware(app, limiter=limiter, **options)

    def may_serve(self, path: str, root: str) -> bool:
        below = path.removeprefix(root).removeprefix("/mounted")
        return any(is_valid_path(one) for one in (path.removeprefix(root), below))


class TestDjango(DjangoContract):
    middleware = (DENIED,)


def plain_middleware(get_response: Any) -> Any:
    """Stand for the many that are not async: Django then runs what is behind in a thread."""

    def around(request: HttpRequest) -> HttpResponse:
        response: HttpResponse = get_response(request)
        response["x-around"] = "yes"
        response["content-security-policy"] = "none"
        response["etag"] = '"of the body that this comes with"'
        response.set_cookie("seen", "1")
        return response

    return around


class TestDjangoBehindPlainMiddleware(DjangoContract):
    middleware = ("tests.test_django.plain_middleware", DENIED)
    beside: ClassVar = {
        *(("x-around", "yes"), ("content-security-policy", "none")),
        ("set-cookie", "seen=1; Path=/"),
    }

    async def test_denial_in_a_view_keeps_what_middleware_gives_every_answer(
        self, app: ASGIApp
    ) -> None:
        denied = await ask(app, "POST /limited", x_who="mallory")

        assert self.beside <= denied.headers.items()
        names = [name.lower() for name, _ in denied.messages[0]["headers"]]
        assert sorted(names) == sorted(set(names))


async def test_methods_of_a_class_are_limited_one_by_one(in_force: None) -> None:
    async with Limiter(POLICY) as limiter:
        app = TieredLimitMiddleware(ASGIHandler(), limiter=limiter)

        made = [(await ask(app, f"{m} /plain-class")).status for m in ("PUT", "POST", "PUT", "GET")]

    assert made == [200, 200, 429, 405]


class Anything(View):
    def dispatch(self, request: HttpRequest) -> HttpResponse:
        return JsonResponse({"made": True})


@method_decorator(limited("image"), name="dispatch")
class LimitedAnything(Anything):
    pass


@method_decorator(limited("image"), name="dispatch")
class OwnOptions(View):
    def options(self, request: HttpRequest) -> HttpResponse:
        return JsonResponse({"made": True})


class Always(View):
    @method_decorator(limited("image"))
    def post(self, request: HttpRequest) -> HttpResponse:
        return JsonResponse({"made": True})

    def dispatch(self, request: HttpRequest) -> HttpResponse:
        return self.post(request)


@limited("image")
def every_method(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"made": True})


@pytest.mark.parametrize(
    "view",
    [
        every_method,
        LimitedAnything.as_view(),
        OwnOptions.as_view(),
        Always.as_view(),
        limited("image")(Anything.as_view()),
    ],
    ids=["function", "dispatch", "options", "method", "as_view"],
)
async def test_preflight_that_a_view_answers_itself_is_charged(in_force: None, view: Any) -> None:
    with urls(path("view", view)):
        async with Limiter(POLICY) as limiter:
            app = TieredLimitMiddleware(ASGIHandler(), limiter=limiter)
            made = [await ask(app, "OPTIONS /view", **PREFLIGHT) for _ in range(3)]

    assert [answer.status for answer in made] == [200, 200, 429]


@pytest.mark.parametrize(
    "view", [Limited.as_view(), limited("image")(PlainClass.as_view())], ids=["dispatch", "as_view"]
)
async def test_preflight_of_a_class_that_leaves_it_to_django_is_not_charged(
    in_force: None, view: Any
) -> None:
    with urls(path("view", view)):
        async with Limiter(POLICY) as limiter:
            app = TieredLimitMiddleware(ASGIHandler(), limiter=limiter)
            asked = [await ask(app, "OPTIONS /view", **PREFLIGHT) for _ in range(3)]
            made = [(await ask(app, "POST /view")).status for _ in range(3)]

    assert [(answer.status, answer.body) for answer in asked] == [(200, b"")] * 3
    assert made == [200, 200, 429]


async def test_functions_of_a_plain_view_run_in_its_thread_and_charge_on_the_event_loop(
    in_force: None,
) -> None:
    seen: list[tuple[str, bool, int]] = []
    loop = asyncio.get_running_loop()

    def note(what: str) -> None:
        seen.append((what, _loop() is loop, threading.get_ident()))

    def pays(request: HttpRequest) -> Account:
        note("account")
        return Account("u1")

    async def costs(request: HttpRequest) -> int:
        note("cost")
        # What needs the view's own thread, such as the database, is not waited for in vain.
        await sync_to_async(note, thread_sensitive=True)("database")
        return 2

    @limited("image", cost=costs, account=pays)
    def view(request: HttpRequest) -> HttpResponse:
        note("view")
        return HttpResponse()

    with urls(path("view", view)):
        async with Limiter(POLICY) as limiter:
            app = TieredLimitMiddleware(ASGIHandler(), limiter=limiter)
            made = [(await ask(app, "POST /view")).status for _ in range(2)]

    assert made == [200, 429]
    ours = threading.get_ident()
    of = {what: (on_loop, thread == ours) for what, on_loop, thread in seen}
    assert of == {
        "account": (False, False),
        "cost": (True, True),
        "database": (False, False),
        "view": (False, False),
    }
    assert len({thread for what, _, thread in seen[:4] if what != "cost"}) == 1


@pytest.mark.parametrize("text", ["^v1/images$", "^v1/images/?$", "(?i)^v1/images"])
async def test_expressions_of_django_are_metered_as_far_as_their_path_is_the_routes(
    in_force: None, text: str
) -> None:
    policy = {**POLICY, "features": {"image": {"routes": ["POST /v1/images"]}, "video": {}}}
    with urls(re_path(text, image)):
        async with Limiter(policy) as limiter:
            app = TieredLimitMiddleware(ASGIHandler(), limiter=limiter)
            spellings = ["/v1/images", "/v1/images/", "/v1/images\n", "//v1/images"]
            made = [await call(app, "POST", spelling) for spelling in spellings]

    bodies = [answer.body for answer in made if answer.status == 200]
    assert set(bodies) == {b'{"feature": "image"}'}


async def test_forced_script_name_is_told_to_the_middleware_by_the_handler(in_force: None) -> None:
    policy = {**POLICY, "features": {"image": {"routes": ["POST /images"]}, "video": {}}}
    with override_settings(FORCE_SCRIPT_NAME="/api"):
        handler: Any = ASGIHandler()
        handler.root_path = "/api"
        async with Limiter(policy) as limiter:
            app = TieredLimitMiddleware(handler, limiter=limiter)
            made = [
                (await ask(app, line)).status
                for line in ("POST /api/images", "POST /images", "POST /api/images")
            ]

    assert made == [200, 200, 429]


@pytest.mark.parametrize("wrong", [View, "view", None])
def test_what_is_no_view_is_refused_where_it_is_decorated(wrong: Any) -> None:
    with pytest.raises(UsageError, match="decorates a view"):
        limited("image")(wrong)


async def test_without_the_middleware_the_error_says_what_is_missing(
    in_force: None, caplog: pytest.LogCaptureFixture
) -> None:
    handler: Any = ASGIHandler()  # types of Django say that a scope is a dict

    answer = await ask(handler, "POST /limited-sync")

    assert answer.status == 500
    assert 'limited("image") needs TieredLimitMiddleware' in caplog.text


def test_under_wsgi_the_error_says_what_is_missing(in_force: None) -> None:
    request = RequestFactory().post("/limited-sync")

    with pytest.raises(UsageError, match=r"needs an ASGI scope.* got WSGIRequest.*under WSGI"):
        limited_sync(request)
    with pytest.raises(UsageError, match="needs an ASGI scope"):
        feature_of(request)


@contextmanager
def urls(*patterns: Any) -> Iterator[None]:
    module = types.ModuleType("tests.django_urls_of_a_test")
    module.urlpatterns = patterns  # type: ignore[attr-defined]  # a module made here
    sys.modules[module.__name__] = module
    with override_settings(ROOT_URLCONF=module.__name__):
        yield
    del sys.modules[module.__name__]


def _loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None

"""Django: the types of what its views are limited with, and of who its sessions belong to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import assert_type

from django.contrib.auth.models import User
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.urls import path
from django.utils.decorators import method_decorator
from django.views import View

from tieredlimit import Account, Decision
from tieredlimit.identity import Identify
from tieredlimit.integrations.django import DeniedMiddleware, feature_of, limited, limits_of
from tieredlimit.integrations.django_users import django_user
from tieredlimit.request import RequestLimits


class OwnRequest(HttpRequest):
    tenant: str


def price(request: OwnRequest) -> int:
    return len(request.tenant)


async def payer(request: HttpRequest) -> Account | None:
    return Account(request.headers["x-user"])


@limited("video", cost=price, account=payer)
async def create_video(request: HttpRequest, seconds: int) -> HttpResponse:
    assert_type(feature_of(request), str | None)
    assert_type(limits_of(request), RequestLimits)
    assert_type(await limits_of(request).take("image", seconds), Decision)
    return HttpResponse()


@limited("video", cost=lambda request: int(request.GET["seconds"]))
def show_video(request: OwnRequest, *, large: bool = False) -> HttpResponse:
    return HttpResponse(f"{feature_of(request)} {large}")


@method_decorator(limited("video"), name="dispatch")
class Videos(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(request.path)

    @method_decorator(limited("image", cost=2))
    def post(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(request.path)


async def views(request: OwnRequest) -> None:
    assert_type(await create_video(request, seconds=3), HttpResponse)
    assert_type(show_video(request, large=True), HttpResponse)
    assert_type(Videos().get(request), HttpResponse)
    show_video("no request")  # type: ignore[arg-type]


urlpatterns = [
    path("videos/<int:seconds>", create_video),
    path("videos", Videos.as_view()),
    path("shown", limited("image")(show_video)),
]


def middlewares(
    get_response: Callable[[HttpRequest], HttpResponse],
    get_later: Callable[[HttpRequest], Awaitable[HttpResponseBase]],
    request: HttpRequest,
) -> DeniedMiddleware:
    middleware = DeniedMiddleware(get_response)
    assert_type(middleware(request), HttpResponseBase | Awaitable[HttpResponseBase])
    assert_type(middleware.process_exception(request, ValueError()), HttpResponse | None)
    return DeniedMiddleware(get_later)


def sessions() -> list[Identify]:
    def pro(user: User) -> Account:
        return Account(str(user.pk), plan="pro" if user.is_staff else None)

    async def later(user: User) -> Account | None:
        return pro(user) if user.is_active else None

    assert_type(django_user(), Identify)
    return [django_user(pro, seconds=0), django_user(later, missing_seconds=1.5, most=100)]

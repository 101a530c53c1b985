"""A Django project in one file, with our middleware around it; served by the tests of users.

Each view does one thing to a user or a session; `/who` says who is charged, and whom Django serves.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import django
from django.conf import settings

settings.configure(
    ALLOWED_HOSTS=["*"],
    DATABASES={
        "default": {
            "ATOMIC_REQUESTS": True,
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": os.environ["SITE_DATABASE"],
        }
    },
    INSTALLED_APPS=[
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.sessions",
    ],
    MIGRATION_MODULES=dict.fromkeys(["auth", "contenttypes", "sessions"]),  # tables at once
    MIDDLEWARE=[
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
    ],
    PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
    ROOT_URLCONF=__name__,
    SECRET_KEY="s3cret",
    SECRET_KEY_FALLBACKS=["an-older-s3cret"],
    SESSION_ENGINE=os.environ["SITE_ENGINE"],
    SESSION_FILE_PATH=str(Path(os.environ["SITE_DATABASE"]).parent),
    USE_TZ=False,
    TIME_ZONE="Europe/Paris",
)
django.setup()

from django.contrib.auth import authenticate, login, logout  # noqa: E402 -- after the setup
from django.contrib.auth.models import Group, User  # noqa: E402
from django.contrib.sessions.models import Session  # noqa: E402
from django.core.asgi import get_asgi_application  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.db import connections, transaction  # noqa: E402
from django.db.backends.signals import connection_created  # noqa: E402
from django.dispatch import receiver  # noqa: E402
from django.http import HttpRequest, HttpResponse, JsonResponse  # noqa: E402
from django.urls import path  # noqa: E402
from django.utils.functional import SimpleLazyObject  # noqa: E402

from tieredlimit import Account, Limiter, TieredLimitMiddleware  # noqa: E402
from tieredlimit.integrations.django import limited  # noqa: E402
from tieredlimit.integrations.django_users import django_user  # noqa: E402

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection
    from starlette.types import Receive, Scope, Send

POLICY = {
    "features": {"page": {"routes": ["GET /who"]}, "group": {"outage": "deny"}},
    "tiers": {"all": {"quotas": {"page": "unlimited", "group": "unlimited"}}},
}


def pro(user: User) -> Account:
    """Take the plan from a group, which is a query."""
    group = user.groups.first()
    return Account(str(user.pk), plan=None if group is None else group.name)


async def later(user: User) -> Account:
    """Take the plan from a group, asynchronously."""
    group = await user.groups.afirst()
    return Account(str(user.pk), plan=None if group is None else group.name)


connected: list[Any] = []


@receiver(connection_created)
def note(connection: Any, **_: Any) -> None:
    """Keep each connection to the database that is made."""
    connected.append(connection)


TABLES = {
    "no table": "ALTER TABLE auth_user RENAME TO gone",
    "table": "ALTER TABLE gone RENAME TO auth_user",
}
WAYS = {
    "fresh": django_user(seconds=0),
    "remembered": django_user(seconds=30),
    "mapped": django_user(pro, seconds=0),
    "later": django_user(later, seconds=0),
}


def identify(connection: HTTPConnection) -> Any:
    """Identify as a test asks for."""
    return WAYS[connection.headers.get("x-way", "fresh")](connection)


@transaction.non_atomic_requests
async def who(request: Any) -> HttpResponse:
    """Say who is charged and who is served, or only what that has taken so far."""
    limits = request.scope["state"]["tieredlimit"]
    if "x-blind" in request.headers:
        since = connected[int(request.headers["x-blind"]) :]
        left_open = sum(one.connection is not None for one in since)
        told = {"reason": limits.decisions["page"].reason, "open": left_open}
        return JsonResponse({**told, "connected": len(connected)})
    account = await limits.account()
    user = await request.auser()
    created = account.created_at and account.created_at.isoformat()
    return JsonResponse(
        {
            "charged": None if account.anonymous else account.id,
            "plan": account.plan,
            "created_at": created,
            "served": None if user.pk is None else str(user.pk),
        }
    )


def enter(request: HttpRequest) -> HttpResponse:
    """Log a user in, by password."""
    user = authenticate(request, username=request.GET["name"], password="pass")
    login(request, user)
    return JsonResponse({"id": str(request.user.pk)})


def leave(request: HttpRequest) -> HttpResponse:
    """Log out."""
    logout(request)
    return HttpResponse()


def change(request: HttpRequest) -> HttpResponse:
    """Change a user, or what the secret of their sessions is."""
    what = request.GET["what"]
    if what in TABLES:
        with connections["default"].cursor() as cursor:
            cursor.execute(TABLES[what])
        return HttpResponse("{}")
    user = User.objects.get(username=request.GET["name"])
    match what:
        case "inactive":
            user.is_active = False
            user.save()
        case "password":
            user.set_password("another")
            user.save()
        case "group":
            user.groups.get_or_create(name="pro")
        case "older secret":
            # As if it had been logged in before the secret was changed.
            (older,) = user.get_session_auth_fallback_hash()
            request.session["_auth_user_hash"] = older
        case "expired":
            request.session.set_expiry(-1)
            return JsonResponse({"in": settings.SESSION_FILE_PATH})
        case "sessions":
            return JsonResponse({"keys": [one.session_key for one in Session.objects.all()]})
    return JsonResponse({"id": str(user.pk)})


@limited("group")
def make(request: Any) -> HttpResponse:
    """Make a group, in a plain view that is limited."""
    Group.objects.create(name=request.GET["name"])
    return HttpResponse()


def make_two(request: HttpRequest) -> HttpResponse:
    """Make another group before the charge."""
    Group.objects.create(name=request.GET["name"] + " before")
    return make(request)


def groups(_: HttpRequest) -> HttpResponse:
    """List the groups."""
    return JsonResponse({"names": list(Group.objects.values_list("name", flat=True))})


urlpatterns = [
    path("make", make),
    path("make-two", make_two),
    path("groups", groups),
    path("who", who),
    path("enter", enter),
    path("leave", leave),
    path("change", change),
]

call_command("migrate", run_syncdb=True, verbosity=0)
for name in ("ada", "bob", "cat", "dan"):
    if not User.objects.filter(username=name).exists():
        User.objects.create_user(name, password="pass", date_joined="2026-01-09 12:00:00")
connections.close_all()

around = TieredLimitMiddleware(get_asgi_application(), limiter=Limiter(POLICY), identify=identify)


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Put a user into the scope where a test asks for it, as channels does."""
    headers = dict(scope.get("headers", ()))
    if b"x-scope-user" in headers:
        name = headers[b"x-scope-user"].decode()
        scope["user"] = SimpleLazyObject(lambda: User.objects.get(username=name))
    await around(scope, receive, send)

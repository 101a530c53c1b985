"""Play what docs/coming-from/django-ratelimit.md shows, and print what was answered as JSON.

A process of its own, `python -m tests.coming_from_django FOLDER`: Django is configured once in a
process, and for all of it. FOLDER is empty, and holds the policy and the database.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import django
import django.core.cache.backends.base
import django.core.cache.backends.locmem
from django.conf import settings

import tieredlimit
from tests.coming_from import SECOND_US, Page, answers, clocked, let_in, statuses, time_of
from tests.contract import Clock

PAGE = Page("django-ratelimit")
NOWHERE = "redis://127.0.0.1:1/0"
CLOCK = Clock()


def configure(folder: Path) -> None:
    settings.configure(
        ALLOWED_HOSTS=["*"],
        SECRET_KEY="known-to-this-test-alone",
        USE_TZ=True,
        ROOT_URLCONF="tests.coming_from_django_urls",
        INSTALLED_APPS=[
            "django.contrib.auth",
            "django.contrib.contenttypes",
            "django.contrib.sessions",
        ],
        MIDDLEWARE=[],
        CACHES={
            "default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"},
            "nowhere": {
                "BACKEND": "django.core.cache.backends.redis.RedisCache",
                "LOCATION": NOWHERE,
            },
        },
        DATABASES={
            "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(folder / "db.sqlite3")}
        },
        LOGGING_CONFIG=None,
    )
    django.setup()


def urls(patterns: list[Any]) -> None:
    """Let Django route by these patterns from now on."""
    from django.urls import clear_url_caches

    module = ModuleType("tests.coming_from_django_urls")
    module.__dict__["urlpatterns"] = patterns
    sys.modules[module.__name__] = module
    clear_url_caches()


def begin_of_window(key: str) -> int:
    """Return the first second of one of django-ratelimit's windows of a minute."""
    from django_ratelimit.core import _get_window

    return int(_get_window(key, 60)) + 1


async def play() -> dict[str, Any]:
    import django_ratelimit.core
    from django.core.asgi import get_asgi_application
    from django.http import HttpRequest, JsonResponse
    from django.test import override_settings
    from django.urls import path
    from django.views.decorators.csrf import csrf_exempt
    from django_ratelimit.decorators import ratelimit

    for module in (
        django_ratelimit.core,
        django.core.cache.backends.base,
        django.core.cache.backends.locmem,
    ):
        setattr(module, "time", time_of(CLOCK))  # noqa: B010 -- one of them is without types
    begin = begin_of_window("key-ada")

    def wait_until(at: int) -> None:
        CLOCK.now = (begin + at) * SECOND_US

    def plain(request: HttpRequest) -> JsonResponse:
        return JsonResponse({})

    async def later(request: HttpRequest) -> JsonResponse:
        return JsonResponse({})

    def limited(view: Any, *rates: str) -> Any:
        for rate in rates:
            view = ratelimit(key="header:x-api-key", rate=rate)(view)
        return csrf_exempt(view)

    seen: dict[str, Any] = {}
    django_app = get_asgi_application()
    urls(PAGE.run("before")["urlpatterns"])
    seen["there"] = await let_in(django_app, "/images", PAGE.series(), wait_until)
    *_, denied = await answers(django_app, "/images", 6)
    seen["denied there"] = [denied.status_code, denied.headers.get("retry-after")]

    urls(PAGE.run("the view")["urlpatterns"])
    wait_until(0)
    application = PAGE.run("asgi.py")["application"]
    seen["here"] = await let_in(application, "/images", PAGE.series(), wait_until)
    *_, denied = await answers(application, "/images", 6)
    seen["denied here"] = [denied.status_code, denied.headers.get("retry-after")]

    urls(
        [
            path("zero", limited(plain, "0/s")),
            path("later", limited(later, "5/m")),
            path("bare-later", csrf_exempt(later)),
            # The last decorator is the outer one.
            path("two", limited(plain, "1/m", "3/h")),
            path("down", limited(plain, "5/m")),
        ]
    )
    wait_until(600)
    seen["zero"] = await statuses(django_app, "/zero")
    seen["two"] = [(await statuses(django_app, "/two", 4)).count(200)]
    wait_until(660)
    seen["two"] += [(await statuses(django_app, "/two")).count(200)]
    seen["async views"] = [await statuses(django_app, at) for at in ("/later", "/bare-later")]
    with override_settings(RATELIMIT_USE_CACHE="nowhere"):
        seen["down"] = await statuses(django_app, "/down")
        with override_settings(RATELIMIT_FAIL_OPEN=True):
            seen["down, open"] = await statuses(django_app, "/down")
    return seen


async def log_in(users: int) -> dict[str, Any]:
    """Let so many users, and a stranger, send requests with the session cookies they have."""
    from asgiref.sync import sync_to_async
    from django.contrib.auth import get_user_model
    from django.core.asgi import get_asgi_application
    from django.core.management import call_command
    from django.test import Client

    def cookies() -> list[str]:
        call_command("migrate", verbosity=0)
        made = []
        model: Any = get_user_model()  # which the types do not know to be Django's own
        for number in range(users):
            client = Client()
            client.force_login(model.objects.create_user(f"user-{number}"))
            made.append(client.cookies["sessionid"].value)
        return made

    urls(PAGE.run("the view")["urlpatterns"])
    identify = PAGE.run("the user")["identify"]
    limiter = tieredlimit.Limiter("policy.toml")
    app = tieredlimit.TieredLimitMiddleware(
        get_asgi_application(), limiter=limiter, identify=identify
    )
    sessions = [*await sync_to_async(cookies)(), "nobody's"]
    return {
        "sessions": [
            (await statuses(app, "/images", 6, {"cookie": f"sessionid={session}"})).count(200)
            for session in sessions
        ],
        # Who has no session is charged by the address, as who has a bad one.
        "stranger": await statuses(app, "/images", headers={}),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "policy.toml").write_text(PAGE.policies[0], "utf-8")
    os.chdir(folder)
    logging.disable(logging.CRITICAL)  # Django logs each answer above 399
    tieredlimit.Limiter = clocked(CLOCK)  # type: ignore[misc]  # for the blocks of the page
    configure(folder)
    seen = asyncio.run(play()) | asyncio.run(log_in(2))
    print(json.dumps(seen))


if __name__ == "__main__":
    main()

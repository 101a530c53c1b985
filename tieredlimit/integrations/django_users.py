"""Django: the account of whoever is logged in, found before Django's own middleware runs.

Needs `pip install "tieredlimit[django]"`. `TieredLimitMiddleware` wraps `get_asgi_application()`:
there is no `request.user` yet. The session cookie is read here, and what is behind it by Django.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextvars import Context
from datetime import datetime
from importlib import import_module
from io import BytesIO
from typing import Any

from asgiref.sync import ThreadSensitiveContext, sync_to_async
from starlette.requests import HTTPConnection

from tieredlimit._core.account import Account
from tieredlimit.backends.perloop import PerLoop
from tieredlimit.errors import UsageError
from tieredlimit.identity import Answer, Identify, remember, resolve

try:
    from django.conf import settings
    from django.contrib.auth import get_user
    from django.core.cache import caches
    from django.core.handlers.asgi import ASGIRequest
    from django.db import connections
    from django.http import HttpRequest
    from django.utils import timezone
except ImportError as exc:  # pragma: no cover -- the tests have Django
    raise ImportError('Django is missing: pip install "tieredlimit[django]"') from exc

__all__ = ["django_user"]

_LONGEST = 4_096  # of the cookies that browsers keep
_MOST_AT_ONCE = 1_000

# What these engines make are 32 letters and digits; an application may have others made. Theirs is
# a column of 40 characters, and what is shorter than 8 is no session to Django either.
_STORING = {
    f"django.contrib.sessions.backends.{one}" for one in ("cache", "cached_db", "db", "file")
}
_STORED_KEY = re.compile(r"[0-9A-Za-z_-]{8,40}")


def django_user(
    to_account: Callable[[Any], Answer] | None = None,
    *,
    seconds: float = 30.0,
    missing_seconds: float | None = None,
    most: int = 10_000,
    at_once: int = 8,
) -> Identify:
    """Identify by Django's session cookie, as `django.contrib.auth.get_user` does.

    The session engine, the authentication backends and `SECRET_KEY_FALLBACKS` are those of the
    settings, and the session's authentication hash is verified. No session is changed: one that is
    not valid any more is left for Django to flush, one that has expired for Django to remove. Where
    `scope["user"]` is there already, as channels' AuthMiddlewareStack leaves it, that user is
    taken.

    It runs in a thread of its own, as a request of Django's does, and leaves no connection open. It
    shares none with a view either, which may be in the middle of a transaction; nor the context
    variables of who asks, since what it finds is remembered for all of them.

    Args:
        to_account: From the user to the account, sync or async; a sync one may query. None takes
            the primary key as the id, `date_joined` as `created_at`, and `plan` where the user has
            a string of that name.
        seconds: How long the account of a session is remembered, as `remember` has it: who logs out
            is not charged any more at once, since the cookie is gone, but a change of plan and a
            user that was deactivated show only after so long. 0 asks at every request.
        missing_seconds: The same for a session without a user.
        most: The most sessions remembered.
        at_once: The most sessions looked up at the same time in one event loop, 1 to 1,000, each
            with a thread and connections of its own; others wait for their turn. Strangers who make
            cookies up have no more of your database than that.

    Raises:
        UsageError: A bound is out of range, as for `remember`.
    """
    if type(at_once) is not int or not 1 <= at_once <= _MOST_AT_ONCE:
        raise UsageError(f"at_once must be from 1 to {_MOST_AT_ONCE:,}, got {at_once!r:.80}")
    turns = PerLoop(lambda: asyncio.Semaphore(at_once))
    mapping = _account_of if to_account is None else to_account

    def map_user(user: Any) -> Answer:
        return mapping(user) if getattr(user, "is_authenticated", False) else None

    def user_of_session(key: str) -> Answer:
        store = import_module(settings.SESSION_ENGINE).SessionStore(key)
        # That of files removes one that has expired as it reads it, and makes another.
        store.create = store.delete = store.save = _leave
        request = HttpRequest()
        session: Any = _Seen(store.load())
        request.session = session  # all that is asked of it
        return map_user(get_user(request))

    find: Callable[[str], Answer] = _threaded(user_of_session, turns)
    if seconds != 0:
        find = remember(find, seconds, missing_seconds=missing_seconds, most=most)
    map_given = _threaded(map_user, turns)

    def identify(connection: HTTPConnection) -> Answer:
        user = connection.scope.get("user")
        if user is not None:
            return map_given(user)  # which may have to be loaded first
        key = _session_key(connection)
        if key is None:
            return None
        return find(key)

    return identify


class _Seen(dict[str, Any]):
    """What a session holds: changes end here, since no cookie would tell the client of them."""

    def cycle_key(self) -> None:
        """Keep the key: its session was signed with an older secret."""

    def flush(self) -> None:
        """Keep what it holds: its user, who has another password now, is found to be nobody."""


def _leave(*_: Any, **__: Any) -> None:
    """Stand for what would change a session."""


def _session_key(connection: HTTPConnection) -> str | None:
    """Return the key that Django will find in the cookies, None where no session can have it."""
    cookies = [pair for pair in connection.scope["headers"] if pair[0].lower() == b"cookie"]
    # One that is there twice is read as Django reads it: who is charged has to be who is served.
    request = ASGIRequest({"method": "GET", "path": "/", "headers": cookies}, BytesIO())
    key: str = request.COOKIES.get(settings.SESSION_COOKIE_NAME, "")
    if settings.SESSION_ENGINE in _STORING:
        return key if _STORED_KEY.fullmatch(key) else None
    # Others may keep all of a session in its key, but a database may fail over what cannot be text.
    return key if 0 < len(key) <= _LONGEST and key.isascii() and key.isprintable() else None


def _threaded(
    function: Callable[[Any], Answer], turns: PerLoop[asyncio.Semaphore]
) -> Callable[[Any], Awaitable[Account | None]]:
    """Run what asks Django in a thread, and what that answers where it is awaited."""
    run = sync_to_async(function)

    async def asked(argument: Any) -> Account | None:
        # As Django does for each request: one thread for all that is asked, async queries included.
        async with ThreadSensitiveContext():
            try:
                return await resolve(await run(argument))
            finally:
                await _close()

    async def asked_apart(argument: Any) -> Account | None:
        async with turns.here():
            # Where a plain view waits for us, its context would have us run in its thread, and
            # close the connection that it is using.
            return await asyncio.get_running_loop().create_task(asked(argument), context=Context())

    return asked_apart


@sync_to_async
def _close() -> None:
    """Close what the thread has opened: no request of Django's ends here, which would do it."""
    connections.close_all()
    caches.close_all()


def _account_of(user: Any) -> Account:
    joined = getattr(user, "date_joined", None)
    if isinstance(joined, datetime) and timezone.is_naive(joined):
        joined = timezone.make_aware(joined, timezone.get_default_timezone())  # USE_TZ is off
    plan = getattr(user, "plan", None)
    return Account(str(user.pk), plan=plan if isinstance(plan, str) else None, created_at=joined)

"""Who is charged is whom Django serves: real logins, in a real project, before its middleware."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from django.conf import settings

if not settings.configured:
    settings.configure(ALLOWED_HOSTS=["*"], LOGGING_CONFIG=None, SECRET_KEY="x", USE_TZ=True)

from asgiref.sync import ThreadSensitiveContext
from starlette.requests import HTTPConnection

from tests.serving import serve_workers
from tieredlimit import Account, UsageError
from tieredlimit.integrations import django_users
from tieredlimit.integrations.django_users import django_user

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from site_of("db", tmp_path_factory)


def site_of(engine: str, folders: pytest.TempPathFactory) -> Iterator[str]:
    folder = folders.mktemp(engine)
    environment = {
        "SITE_DATABASE": str(folder / "site.sqlite3"),
        "SITE_ENGINE": f"django.contrib.sessions.backends.{engine}",
    }
    with serve_workers("tests.djangosite:application", folder, 1, **environment) as url:
        yield url


@pytest.fixture
def browser(site: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=site, timeout=20) as client:
        yield client


def enter(browser: httpx.Client, name: str) -> str:
    answer = browser.get("/enter", params={"name": name})
    return str(answer.raise_for_status().json()["id"])


def change(browser: httpx.Client, name: str, what: str) -> Any:
    return browser.get("/change", params={"name": name, "what": what}).raise_for_status().json()


def who(browser: httpx.Client, way: str = "fresh", **headers: str) -> tuple[Any, Any]:
    answer = browser.get("/who", headers={"x-way": way, **headers}).raise_for_status().json()
    return answer["charged"], answer["served"]


def test_who_is_logged_in_is_charged(browser: httpx.Client) -> None:
    stranger = who(browser)
    ada = enter(browser, "ada")
    after = who(browser)
    browser.get("/leave")
    left = who(browser)

    assert (stranger, after, left) == ((None, None), (ada, ada), (None, None))


def test_session_that_is_all_in_its_cookie_is_read_alike(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    for url in site_of("signed_cookies", tmp_path_factory):
        with httpx.Client(base_url=url, timeout=20) as browser:
            ada = enter(browser, "ada")

            assert who(browser) == (ada, ada)


def test_file_of_a_session_that_has_expired_is_left_for_django(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    for url in site_of("file", tmp_path_factory):
        with httpx.Client(base_url=url, timeout=20) as browser:
            ada = enter(browser, "ada")
            assert who(browser) == (ada, ada)
            key = browser.cookies["sessionid"]
            folder = browser.get("/change", params={"name": "ada", "what": "expired"}).json()["in"]

            before = files_of(folder)
            blind = browser.get("/who", headers={"x-blind": "0", "cookie": f"sessionid={key}"})
            after = files_of(folder)
            charged = who(browser, cookie=f"sessionid={key}")

    assert blind.status_code == 200  # and has read no session itself
    assert [name for name, _ in before] == [f"sessionid{key}"]
    assert after == before
    assert charged == (None, None)


def files_of(folder: str) -> list[tuple[str, bytes]]:
    return [(one.name, one.read_bytes()) for one in Path(folder).glob("sessionid*")]


def test_day_on_which_a_user_joined_is_when_the_account_was_made(browser: httpx.Client) -> None:
    enter(browser, "ada")

    answer = browser.get("/who").json()

    assert answer["created_at"] == "2026-01-09T12:00:00+01:00"
    assert answer["plan"] is None


@pytest.mark.parametrize("way", ["mapped", "later"])
def test_function_of_ones_own_may_query_now_or_later(browser: httpx.Client, way: str) -> None:
    cat = enter(browser, "cat")
    change(browser, "cat", "group")

    answer = browser.get("/who", headers={"x-way": way}).json()

    assert (answer["charged"], answer["plan"]) == (cat, "pro")


def test_session_from_before_a_password_was_changed_is_nobodys_and_stays_for_django(
    site: str, browser: httpx.Client
) -> None:
    enter(browser, "bob")
    key = browser.cookies["sessionid"]
    with httpx.Client(base_url=site, timeout=20) as operator:
        change(operator, "bob", "password")

        charged, served = who(browser)
        left = change(operator, "bob", "sessions")["keys"]

    assert (charged, served) == (None, None)
    assert key not in left  # Django has flushed it, after us


def test_session_signed_with_an_older_secret_is_its_users_and_keeps_its_key_for_django(
    browser: httpx.Client,
) -> None:
    ada = enter(browser, "ada")
    change(browser, "ada", "older secret")
    before = browser.cookies["sessionid"]

    first = who(browser)
    after = browser.cookies["sessionid"]
    second = who(browser)

    # Had we cycled the key, Django would not have found the session.
    assert (first, second) == ((ada, ada), (ada, ada))
    assert before != after


def test_user_who_was_deactivated_is_charged_until_what_is_remembered_is_over(
    site: str, browser: httpx.Client
) -> None:
    dan = enter(browser, "dan")
    before = who(browser, "remembered")
    with httpx.Client(base_url=site, timeout=20) as operator:
        change(operator, "dan", "inactive")

    assert before == (dan, dan)
    assert who(browser, "remembered") == (dan, None)
    assert who(browser) == (None, None)


@pytest.mark.parametrize(
    "cookie",
    [
        "sessionid=",
        "sessionid=x",
        "sessionid=" + "a" * 32,
        "sessionid=" + "a" * 41,
        "sessionid=" + "a" * 7_000,
        'sessionid="\\000aaaaaaaaaaaa"',
        "sessionid=../../../../etc/passwd",
        "sessionid=\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9\xe9",
    ],
)
def test_cookie_that_a_stranger_made_up_is_nobodys(browser: httpx.Client, cookie: str) -> None:
    answer = browser.get("/who", headers={b"cookie": cookie.encode("latin-1")})

    assert answer.status_code == 200
    assert answer.json()["charged"] is None


@pytest.mark.parametrize("way", ["fresh", "mapped", "later"])
def test_connections_of_a_lookup_are_closed_and_what_can_be_no_key_makes_none(
    browser: httpx.Client, way: str
) -> None:
    def taken(cookie: str, since: int = 0) -> tuple[int, int]:
        headers = {"x-blind": str(since), "x-way": way, "cookie": f"sessionid={cookie}"}
        told = browser.get("/who", headers=headers).raise_for_status().json()
        return told["connected"], told["open"]

    enter(browser, "cat")
    key = browser.cookies.pop("sessionid")
    before, _ = taken("")
    for made_up in ('"\\000aaaaaaaaaaaa"', "a" * 7_000, "a" * 41, "a" * 7, "a" * 9 + "."):
        odd, _ = taken(made_up)
    after, left_open = taken(key, since=before)

    assert odd == before
    assert after > before
    assert left_open == 0


@pytest.mark.parametrize("apart", ["; ", ";", "\n"])
@pytest.mark.parametrize("strangers", ["x", "", "a" * 32])
def test_session_cookie_that_is_there_twice_is_the_one_that_django_serves(
    browser: httpx.Client, apart: str, strangers: str
) -> None:
    def asked(*values: str) -> tuple[Any, Any]:
        lines = apart.join(f"sessionid={value}" for value in values).split("\n")
        headers = [("cookie", line) for line in lines]
        answer = browser.get("/who", headers=headers).raise_for_status().json()
        return answer["charged"], answer["served"]

    ada = enter(browser, "ada")
    key = browser.cookies.pop("sessionid")

    last, first = asked(strangers, key), asked(key, strangers)

    assert first == (None, None)
    # Django has its own way with two header fields, and has changed it.
    assert last == (ada, ada) or (apart == "\n" and last[0] == last[1])


@pytest.mark.parametrize("way", ["fresh", "remembered", "mapped", "later"])
@pytest.mark.parametrize("scope_user", [{}, {"x-scope-user": "ada"}], ids=["session", "scope"])
def test_transaction_of_a_plain_view_is_not_touched_by_the_lookup_of_its_charge(
    browser: httpx.Client, way: str, scope_user: dict[str, str]
) -> None:
    enter(browser, "ada")
    headers = {"x-way": way, **scope_user}
    names = [f"{way} {bool(scope_user)} {path}" for path in ("make", "make-two")]

    made = [
        browser.get(path, params={"name": name}, headers=headers)
        for path, name in zip(("/make", "/make-two"), names, strict=True)
    ]

    assert [answer.status_code for answer in made] == [200, 200]
    left = browser.get("/groups").json()["names"]
    assert [left.count(name) for name in (*names, f"{names[1]} before")] == [1, 1, 1]


def test_user_who_is_in_the_scope_already_is_charged(browser: httpx.Client) -> None:
    ada = enter(browser, "ada")
    browser.cookies.clear()

    for way in ("fresh", "remembered", "mapped", "later"):
        charged, _ = who(browser, way, **{"x-scope-user": "ada"})
        assert charged == ada


def test_database_that_fails_gets_the_outage_answer_and_is_asked_again(
    browser: httpx.Client,
) -> None:
    ada = enter(browser, "ada")
    change(browser, "ada", "no table")
    try:
        failed = browser.get("/who", headers={"x-way": "remembered", "x-blind": "0"}).json()
    finally:
        change(browser, "ada", "table")

    assert failed["reason"] == "outage"
    assert who(browser, "remembered") == (ada, ada)


async def test_lookups_take_turns_whoever_makes_them_necessary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here: list[int] = [0]

    class Counted(ThreadSensitiveContext):
        async def __aenter__(self) -> Any:
            here.append(here[-1] + 1)
            return await super().__aenter__()  # type: ignore[no-untyped-call]  # asgiref's

        async def __aexit__(self, *exc: object) -> None:
            await super().__aexit__(*exc)  # type: ignore[no-untyped-call]  # asgiref's
            here.append(here[-1] - 1)

    monkeypatch.setattr(django_users, "ThreadSensitiveContext", Counted)
    identify = django_user(lambda user: Account(user.name), seconds=0, at_once=3)
    users = [Stranger(str(number)) for number in range(30)]
    asked = [
        identify(HTTPConnection({"type": "http", "headers": [], "user": user})) for user in users
    ]
    accounts = await asyncio.gather(*asked)  # type: ignore[arg-type]  # all of them may be awaited

    assert accounts == [Account(user.name) for user in users]
    assert (max(here), here[-1], len(here)) == (3, 0, 61)


@pytest.mark.parametrize("wrong", [0, 1_001, True, 8.0, None])
def test_lookups_at_once_are_bounded_where_that_is_written(wrong: Any) -> None:
    with pytest.raises(UsageError, match="at_once must be from 1 to 1,000"):
        django_user(at_once=wrong)


class Stranger:
    is_authenticated = True

    def __init__(self, name: str) -> None:
        self.name = name

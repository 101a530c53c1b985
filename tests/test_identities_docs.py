"""docs/identities.md: every block runs, in the page's order, and says whom the page says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import HTTPConnection

from tests.test_readme import blocks
from tieredlimit import Account
from tieredlimit.identity import resolve

PAGE = (Path(__file__).parent.parent / "docs" / "identities.md").read_text("utf-8")
DJANGO = [block for block in blocks(PAGE, "python") if "django" in block]


def connection(**headers: str) -> HTTPConnection:
    raw = [(name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()]
    return HTTPConnection({"type": "http", "headers": raw, "client": ("192.0.2.1", 1)})


@pytest.fixture(scope="module")
def shown() -> dict[str, dict[str, Any]]:
    """What the page's names are after each block, by a word that only this block has."""
    words = ["x-internal-user", "customer_of", "user_of", "with_team", "PyJWKClient", "first_of"]
    words.append("app.add_middleware(\n")
    namespace: dict[str, Any] = {}
    after = {}
    rest = [block for block in blocks(PAGE, "python") if block not in DJANGO]
    for word, block in zip(words, rest, strict=True):
        assert word in block
        exec(compile(block, "identities.md", "exec"), namespace)
        after[word] = dict(namespace)
    return after


async def test_function_of_ones_own_is_an_identify(shown: dict[str, dict[str, Any]]) -> None:
    identify = shown["x-internal-user"]["identify"]

    assert identify(connection(x_internal_user="ops")) == Account("ops", plan="staff")
    assert identify(connection()) is None


async def test_keys_are_looked_up_in_either_header(shown: dict[str, dict[str, Any]]) -> None:
    names = shown["customer_of"]

    one = await resolve(names["identify"](connection(x_api_key="key-1")))
    other = await resolve(names["bearer"](connection(authorization="Bearer key-1")))

    assert one == other is not None
    assert len(names["customers"]) == 1


async def test_application_with_sessions_counts(shown: dict[str, dict[str, Any]]) -> None:
    transport = httpx.ASGITransport(shown["user_of"]["app"])
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.post("/v1/images")

    assert answer.headers["ratelimit"] == '"image-minute";r=4;t=12'


async def test_first_that_knows_the_client_wins(shown: dict[str, dict[str, Any]]) -> None:
    names = shown["first_of"]

    known = await resolve(names["identify"](connection(x_api_key="key-1")))
    stranger = await resolve(names["identify"](connection(x_api_key="key-2")))
    address = names["anonymous"](connection(x_forwarded_for="198.51.100.7"))

    assert (known and known.id, stranger) == ("u1", None)
    assert address == Account("198.51.100.7", anonymous=True)


def test_block_for_django_runs_in_a_project(tmp_path: Path) -> None:
    (block,) = DJANGO
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").touch()
    apps = ["django.contrib.auth", "django.contrib.contenttypes"]
    settings = f'SECRET_KEY = "s"\nINSTALLED_APPS = {apps}\n'
    (tmp_path / "shop" / "settings.py").write_text(settings, "utf-8")
    (tmp_path / "asgi.py").write_text(block, "utf-8")

    subprocess.run([sys.executable, "-W", "error", "asgi.py"], cwd=tmp_path, check=True)

"""The examples of the frameworks and their pages, run as they say."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
import types
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from django.conf import settings

from examples.demo_server import CHECKOUT
from tests.framework_contract import PREFLIGHT, ask
from tests.serving import serve_workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PAGES = CHECKOUT / "docs" / "frameworks"
FRAMEWORKS = ["starlette", "fastapi", "litestar", "quart", "django"]
BROWSERS = {name.replace("_", "-"): value for name, value in PREFLIGHT.items()}
MOST_COMMANDS = 3
MOST_LINES = 15

if not settings.configured:
    settings.configure(ALLOWED_HOSTS=["*"], LOGGING_CONFIG=None, SECRET_KEY="x", USE_TZ=True)


def page_of(name: str) -> str:
    return (PAGES / f"{name}.md").read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands_of(text: str) -> list[list[str]]:
    lines = [line for block in blocks(text, "console") for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines)
    return [shlex.split(line.removeprefix("$ ")) for line in lines]


def python_blocks() -> Iterator[Any]:
    """Yield each block but the files that the pages begin with, which a server runs."""
    for page in ["index", *FRAMEWORKS]:
        for number, block in enumerate(blocks(page_of(page), "python")):
            if number or page == "index":
                yield pytest.param(page, block, id=f"{page}-{number}")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_first_429_needs_no_more_than_three_commands_and_fifteen_lines(
    framework: str, tmp_path: Path
) -> None:
    start = page_of(framework).split("\n## ")[0]
    (code, *_) = blocks(start, "python")
    commands = commands_of(start)
    (tmp_path / "app.py").write_text(code, "utf-8")
    install, server, curl = commands

    assert len(commands) <= MOST_COMMANDS
    assert len(code.splitlines()) <= MOST_LINES
    assert install[:2] == ["pip", "install"]
    assert {name for name in install[2:] if not is_ours(name)} == {"uvicorn"}
    assert server[0] == "uvicorn"
    with serve_workers(server[1], tmp_path, 1) as url:
        answers = asked(curl, url)
        others = asked_otherwise(url, "/v1/videos")

    assert [answer.status_code for answer in answers] == [*[answers[0].status_code] * 2, 429]
    assert answers[0].is_success
    assert "ratelimit" in answers[0].headers
    assert int(answers[2].headers["retry-after"]) <= 30
    assert answers[2].json()["reason"] == "quota"
    assert [answer.status_code for answer in others[1:]] == [405] * (len(others) - 1)
    assert others[0].status_code in (200, 204, 405)
    assert all(answers[0].text not in answer.text for answer in others)


def asked_otherwise(url: str, path: str, **headers: str) -> list[httpx.Response]:
    """Ask for what is metered as POST by other methods, a browser's preflight first."""
    with httpx.Client(base_url=url, timeout=20.0, trust_env=False, headers=headers) as client:
        return [
            client.options(path, headers=BROWSERS),
            *(client.request(method, path) for method in ("GET", "PUT", "PATCH", "DELETE")),
        ]


def is_ours(name: str) -> bool:
    """Say whether pip would install this package, with an extra that it has."""
    found = re.fullmatch(r"tieredlimit(?:\[(\w+)\])?", name)
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))["project"]
    return found is not None and (not found[1] or found[1] in project["optional-dependencies"])


def asked(curl: list[str], url: str) -> list[httpx.Response]:
    """Do what `curl -i -X METHOD "localhost:8000/path?[1-3]"` does, elsewhere."""
    name, *options, target = curl
    assert (name, options[:2]) == ("curl", ["-i", "-X"])
    (method,) = options[2:]
    path, first, last = re.fullmatch(r"localhost:8000(/.*)\?\[(\d)-(\d)\]", target).groups()  # type: ignore[union-attr]  # None fails
    with httpx.Client(base_url=url, timeout=20.0, trust_env=False) as client:
        return [
            client.request(method, f"{path}?{number}")
            for number in range(int(first), int(last) + 1)
        ]


@pytest.fixture
def run_block(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], dict[str, Any]]:
    def run(page: str, block: str) -> dict[str, Any]:
        module = types.ModuleType(f"page_of_{page}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        code = compile(block, f"docs/frameworks/{page}.md", "exec", dont_inherit=True)
        exec(code, module.__dict__)
        return module.__dict__

    return run


@pytest.mark.parametrize(("page", "block"), list(python_blocks()))
def test_python_block_of_a_page_runs(
    page: str, block: str, run_block: Callable[[str, str], dict[str, Any]]
) -> None:
    assert len(run_block(page, block)) > len(vars(types.ModuleType("empty")))


@pytest.mark.parametrize(
    ("page", "number", "line", "left"),
    [
        ("fastapi", 1, "POST /v1/videos", b'{"left":52}'),
        ("litestar", 2, "POST /v1/videos", b'{"left":52}'),
        ("quart", 2, "POST /v1/videos/30", b'{"left":30}\n'),
    ],
)
async def test_page_charges_in_its_endpoint_what_it_says(
    page: str,
    number: int,
    line: str,
    left: bytes,
    run_block: Callable[[str, str], dict[str, Any]],
) -> None:
    app = run_block(page, blocks(page_of(page), "python")[number])["app"]

    answer = await ask(app, line, x_api_key="key-1")

    assert (answer.body, answer.status < 300) == (left, True)
    assert answer.headers["ratelimit"].startswith('"video-hour";r=')


@pytest.mark.parametrize("module", ["", ".integrations.endpoints", ".integrations.starlette"])
def test_no_framework_is_loaded_unasked(module: str) -> None:
    told = f"import sys, tieredlimit{module}; print(*{{n.partition('.')[0] for n in sys.modules}})"

    loaded = subprocess.run(
        [sys.executable, "-c", told], capture_output=True, text=True, check=True, cwd=CHECKOUT
    ).stdout.split()

    assert "starlette" in loaded
    assert {"django", "fastapi", "litestar", "quart"}.isdisjoint(loaded)


@pytest.mark.parametrize("framework", ["django", "fastapi", "litestar", "quart"])
def test_missing_framework_is_an_error_that_names_the_extra(framework: str) -> None:
    told = f"import sys; sys.modules[{framework!r}] = None; import tieredlimit.integrations."

    failed = subprocess.run(
        [sys.executable, "-c", told + framework], capture_output=True, text=True, cwd=CHECKOUT
    )

    assert failed.returncode == 1
    assert f'pip install "tieredlimit[{framework}]"' in failed.stderr.replace("'", '"')


@pytest.mark.parametrize("framework", ["starlette", "litestar", "quart", "django"])
def test_example_charges_images_by_their_route_and_videos_by_the_second(
    framework: str, tmp_path: Path
) -> None:
    app = f"examples.{framework}_app:app"
    with (
        serve_workers(app, tmp_path, 1, PYTHONPATH=str(CHECKOUT)) as url,
        httpx.Client(base_url=url, timeout=20.0, trust_env=False) as client,
    ):
        bob, ada = ({"x-api-key": f"key-{name}"} for name in ("bob", "ada"))
        images = [client.post("/v1/images", headers=bob) for _ in range(6)]
        zero = client.post("/v1/videos/10", headers=bob)
        videos = [client.post(f"/v1/videos/{n}", headers=ada) for n in (50, 5, 500)]
        others = [
            *asked_otherwise(url, "/v1/images", **{"x-api-key": "key-bob"}),
            *asked_otherwise(url, "/v1/videos/10", **{"x-api-key": "key-bob"}),
        ]

    statuses = [answer.status_code for answer in images]
    assert statuses == [statuses[0]] * 5 + [429]
    assert images[0].is_success
    assert (zero.status_code, zero.json()["reason"]) == (403, "zero")
    assert [answer.is_success for answer in videos] == [True, True, False]
    assert videos[0].headers["ratelimit"].startswith('"video-hour";r=10;')
    assert videos[1].headers["ratelimit"].startswith('"video-hour";r=5;')
    assert 3200 < int(videos[2].headers["retry-after"]) <= 3300
    # Nobody makes for nothing, by another method, what is used up.
    assert {answer.status_code for answer in others} <= {200, 204, 405}
    assert [
        answer.text for answer in others if "ready" in answer.text or "sec" in answer.text
    ] == []


def test_every_page_is_listed_on_the_first() -> None:
    pages = {path.name for path in PAGES.glob("*.md")} - {"index.md"}

    assert pages == {f"{name}.md" for name in FRAMEWORKS}
    assert pages <= set(re.findall(r"\]\((\w+\.md)", page_of("index")))

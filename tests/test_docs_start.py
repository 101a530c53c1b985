"""docs/index.md: the start page's application answers as the page says."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.fences import blocks
from tests.serving import serve
from tieredlimit import Limiter
from tieredlimit.backends import MemoryBackend

PAGE = "docs/index.md"
BLOCKS = blocks(PAGE)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """The page's application, served as the page says."""
    policy = next(block.text for block in BLOCKS if block.language == "toml")
    app = next(block.text for block in BLOCKS if block.language == "python")
    (tmp_path / "policy.toml").write_text(policy, "utf-8")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(compile(app, PAGE, "exec"), namespace)
    # The same limiter on a clock that stands still: what fits in 30 s does so for the whole test.
    (middleware,) = namespace["app"].user_middleware
    now = time.time_ns() // 1000
    middleware.kwargs["limiter"] = Limiter("policy.toml", MemoryBackend(clock=lambda: now))
    with serve(namespace["app"]) as url, httpx.Client(base_url=url, trust_env=False) as client:
        yield client


def asked(client: httpx.Client, line: str) -> httpx.Response:
    """Make the request of a line of curl."""
    words = shlex.split(line)
    assert words[:2] == ["curl", "-i"]
    headers = dict(value.split(": ", 1) for flag, value in pairwise(words) if flag == "-H")
    method = words[words.index("-X") + 1]
    return client.request(method, urlsplit(words[-1]).path, headers=headers)


def test_each_request_of_the_page_gets_the_answer_of_the_page(api: httpx.Client) -> None:
    answers = 0
    last: httpx.Response | None = None
    for block in BLOCKS:
        if block.language == "console" and "curl" in block.text:
            for line in block.text.splitlines():
                last = asked(api, line.removeprefix("$ "))
        elif block.language == "http":
            assert last is not None
            head, _, body = block.text.partition("\n\n")
            status, *fields = head.splitlines()
            assert status == f"HTTP/1.1 {last.status_code} {last.reason_phrase}"
            assert {tuple(field.split(": ", 1)) for field in fields} <= set(last.headers.items())
            assert json.loads(body) == last.json()
            answers += 1

    assert answers == 3

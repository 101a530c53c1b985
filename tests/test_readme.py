"""The README and the policy reference: every block of code in them runs."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tieredlimit import Limiter, Policy
from tieredlimit.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
REFERENCE = (ROOT / "docs" / "policy.md").read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    policy, _ = blocks(README, "toml")
    (tmp_path / "policy.toml").write_text(policy, "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", blocks(README, "python"), ids=lambda block: block.split("\n")[0])
def test_python_block_of_the_readme_runs(block: str, folder: Path) -> None:
    namespace: dict[str, Any] = {}

    exec(compile(block, "README.md", "exec"), namespace)

    assert isinstance(namespace["limiter"], Limiter)


def test_policy_of_the_readme_says_what_the_readme_says(folder: Path) -> None:
    policy = Policy.load(folder / "policy.toml")

    assert policy.cell("new", "video").zero
    assert policy.cell("new", "image").spell() == "5/minute + 50/day"
    assert policy.cell("everyone", "image").spell() == "2/minute"
    assert policy.features["video"].outage == "deny"
    assert policy.warnings == ()


def test_part_with_a_pool_can_be_laid_over_the_policy_of_the_readme(folder: Path) -> None:
    _, part = blocks(README, "toml")
    above = tomllib.loads(part)
    (folder / "capacity.toml").write_text(part.replace("tiers.pro", "tiers.free"), "utf-8")

    policy = Policy.load(folder / "policy.toml", folder / "capacity.toml")

    pool = policy.features["video"].pool
    assert pool is not None
    assert (pool.reach("new"), pool.reach("free"), pool.reach("everyone")) == (300, 480, 600)
    assert policy.features["video"].refund_on == set(above["features"]["video"]["refund_on"])
    assert policy.cell("free", "video").quotas[0].concurrency == 3
    assert policy.warnings == ()


async def test_denial_of_the_readme_is_what_a_client_sees(folder: Path) -> None:
    (shown,) = blocks(README, "http")
    head, body = shown.split("\n\n", 1)
    status, *fields = head.splitlines()
    namespace: dict[str, Any] = {}
    exec(compile(blocks(README, "python")[0], "README.md", "exec"), namespace)
    account = namespace["Account"]("u1", plan="free")

    denial = (await namespace["limiter"].take(account, "video")).response()

    sent = {name.decode(): value.decode() for name, value in denial.raw_headers}
    del sent["content-length"]
    assert status == f"HTTP/1.1 {denial.status_code} Forbidden"
    assert dict(line.split(": ", 1) for line in fields) == sent
    assert json.loads(body) == json.loads(denial.document()[1])


def test_commands_of_the_readme_succeed(folder: Path, redis_url: str) -> None:
    lines = [line for block in blocks(README, "console") for line in block.splitlines()]
    commands = [line.removeprefix("$ tieredlimit ") for line in lines if "$ tieredlimit" in line]
    environment = {"TIEREDLIMIT_REDIS": redis_url, "TIEREDLIMIT_POLICY": "policy.toml"}
    live = ("close ", "open ")

    with worker(redis_url):
        results = [
            # Nobody is there to be asked.
            CliRunner().invoke(main, [*shlex.split(command), "--yes"], env=environment)
            if command.startswith(live)
            else CliRunner().invoke(main, shlex.split(command))
            for command in commands
        ]

    assert [result.exit_code for result in results] == [0] * len(commands) != []
    assert sum(command.startswith(live) for command in commands) == 2


@contextmanager
def worker(redis_url: str, namespace: str = "default") -> Iterator[None]:
    """Let one worker follow, in an event loop and a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    limiter = Limiter("policy.toml", redis_url, namespace=namespace)
    asyncio.run_coroutine_threadsafe(limiter.open(), loop).result()
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(limiter.close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.mark.parametrize("block", blocks(REFERENCE, "toml"))
def test_block_of_the_policy_reference_is_a_part_of_a_policy_that_loads(block: str) -> None:
    part = tomllib.loads(block)
    names = part.get("order") or ["new", "pro", "free", "everyone"]
    document: dict[str, Any] = {
        "order": names,
        "features": {"image": {}, "video": {}},
        "defaults": {"quotas": {}},
        "tiers": {name: {"when": {"plan": name}} for name in names[:-1]} | {names[-1]: {}},
    }
    for key, value in part.items():
        if isinstance(value, dict):
            for name, entry in value.items():
                document.setdefault(key, {}).setdefault(name, {}).update(entry)
    for name in document["features"]:
        document["defaults"]["quotas"].setdefault(name, 0)

    assert Policy.from_dict(document).features

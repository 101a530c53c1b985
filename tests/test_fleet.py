"""Promise 3, with real workers: once a closure is published, not one more request is let in."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.clusters import RedisCluster
from tests.servers import RedisServer
from tests.serving import serve_workers
from tieredlimit import Limiter
from tieredlimit.control import Control

NAMESPACE = "fleet"
WORKERS = 4
CLIENTS = 40
ACCOUNTS = 200
# The promise for `open` is a second; a machine that is busy with other things gets more.
OPEN_SECONDS = 10.0
PATIENCE = 60.0

# Nothing runs out here: whoever is not let in was turned away for another reason.
POLICY: dict[str, Any] = {
    "order": ["new", "everyone"],
    "features": {
        "image": {"routes": ["POST /images"], "outage": "deny"},
        "video": {"routes": ["POST /videos"], "outage": "deny"},
    },
    "defaults": {"quotas": {"image": "unlimited", "video": "100000/minute"}},
    "tiers": {"new": {"when": {"plan": "free", "account_age_below": "7 days"}}, "everyone": {}},
}

APP = """
import os
from datetime import UTC, datetime, timedelta

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from tests.test_fleet import NAMESPACE, POLICY
from tieredlimit import Account, Limiter, TieredLimitMiddleware
from tieredlimit.backends import ClusterBackend, RedisBackend

BORN = {"new": datetime.now(UTC) - timedelta(days=1), "old": datetime(2020, 1, 1, tzinfo=UTC)}


def identify(connection):
    name = connection.headers["x-account"]
    return Account(name, plan="free", created_at=BORN[name.partition("-")[0]])


async def done(request):
    return PlainTextResponse("done")


class Pid:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_pid(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-pid", b"%d" % os.getpid())]
            await send(message)

        await self.app(scope, receive, send_with_pid)


URL = os.environ["FLEET_REDIS"]
# Patient: on a busy machine a late answer is no outage.
BACKEND = (ClusterBackend if "+cluster" in URL else RedisBackend.from_url)(URL, timeout=10.0)
app = Starlette(
    routes=[Route(path, done, methods=["POST"]) for path in ("/images", "/videos")],
    middleware=[
        Middleware(Pid),
        Middleware(
            TieredLimitMiddleware,
            limiter=Limiter(POLICY, BACKEND, namespace=NAMESPACE),
            identify=identify,
        ),
    ],
)
"""


@dataclass(frozen=True, slots=True)
class Seen:
    """One request: what it was for, when it was sent, and who answered what."""

    feature: str
    age: str
    sent_at: float
    status: int
    pid: int


class Load:
    """Many clients, each of which asks on for one account after the other."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = str(parts.hostname), int(parts.port or 0)
        self._news = asyncio.Event()
        self._numbers = itertools.count()
        self.seen: list[Seen] = []

    async def until(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Return once the condition holds; it is looked at after each answer."""
        async with asyncio.timeout(seconds):
            while not condition():
                self._news.clear()
                await self._news.wait()

    def after(self, instant: float, feature: str = "video", age: str = "new") -> list[Seen]:
        """Return what was sent since then and is answered."""
        recent = itertools.takewhile(lambda one: one.sent_at > instant - 1, reversed(self.seen))
        return [
            one for one in recent
            if one.sent_at >= instant and (one.feature, one.age) == (feature, age)
        ]  # fmt: skip

    async def ask(self) -> None:
        """Be a client for ever, with a new connection every now and then."""
        loop = asyncio.get_running_loop()
        while True:
            reader, writer = await asyncio.open_connection(*self._address)
            try:
                for _ in range(4):
                    number = next(self._numbers)
                    feature = ("video", "image")[number % 2]
                    age = ("new", "old")[number // 2 % 2]
                    sent_at = loop.time()
                    account = f"{age}-{number % ACCOUNTS}"
                    writer.write(
                        f"POST /{feature}s HTTP/1.1\r\nhost: fleet\r\nx-account: {account}\r\n"
                        "content-length: 0\r\n\r\n".encode()
                    )
                    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                    status, *lines = head.split("\r\n")
                    headers = dict(line.split(": ", 1) for line in lines if line)
                    await reader.readexactly(int(headers["content-length"]))
                    pid = int(headers["x-pid"])
                    self.seen.append(Seen(feature, age, sent_at, int(status.split()[1]), pid))
                    self._news.set()
                    await asyncio.sleep(0.005)  # a client does not come back at once either
            finally:
                writer.close()


@asynccontextmanager
async def load_on(url: str) -> AsyncIterator[Load]:
    """Keep all workers busy, from `async with` until its end; a client that fails, fails it."""
    load = Load(url)
    async with asyncio.TaskGroup() as group:
        clients = [group.create_task(load.ask()) for _ in range(CLIENTS)]
        await load.until(lambda: len({one.pid for one in load.seen}) == WORKERS)
        yield load
        for client in clients:
            client.cancel()


@contextmanager
def fleet(folder: Path, redis: str) -> Iterator[str]:
    """Run the workers."""
    (folder / "fleet_app.py").write_text(textwrap.dedent(APP))
    here = str(Path(__file__).parent.parent)
    paths = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    environment = {"FLEET_REDIS": redis, "PYTHONPATH": paths}
    with serve_workers("fleet_app:app", folder, WORKERS, **environment) as url:
        yield url


@asynccontextmanager
async def operator(redis: str) -> AsyncIterator[Control]:
    """Change what is in force, from another process than any worker's."""
    limiter = Limiter(POLICY, redis, namespace=NAMESPACE)
    yield limiter.control
    await limiter.close()


async def check_closing(load: Load, close: Callable[[], Any], open_: Callable[[], Any]) -> None:
    """Close and open once, with all that is promised of it."""
    loop = asyncio.get_running_loop()

    def answered_by_all(since: float, status: int) -> bool:
        found = load.after(since)
        return len({one.pid for one in found if one.status == status}) == WORKERS

    await close()
    closed_at = loop.time()
    await load.until(lambda: len(load.after(closed_at)) >= 100 and answered_by_all(closed_at, 403))
    turned_away = load.after(closed_at)

    await open_()
    opened_at = loop.time()
    await load.until(lambda: answered_by_all(opened_at, 200), OPEN_SECONDS)

    assert {one.status for one in turned_away} == {403}


def check_others(load: Load) -> None:
    """No image and no other account was ever in the way, nor was anybody's answer an error."""
    others = {one.status for one in load.seen if (one.feature, one.age) != ("video", "new")}
    meant = {one.status for one in load.seen if (one.feature, one.age) == ("video", "new")}
    assert others == {200}
    assert meant == {200, 403}


async def test_of_what_is_sent_after_a_closure_nothing_is_let_in(
    redis_url: str, tmp_path: Path
) -> None:
    with fleet(tmp_path, redis_url) as url:
        async with operator(redis_url) as control, load_on(url) as load:
            for _ in range(10):
                await check_closing(
                    load,
                    lambda: control.close("video", tier="new"),
                    lambda: control.open("video", tier="new"),
                )

    check_others(load)


@pytest.mark.fault("G1")
@pytest.mark.login("default")  # it takes a right away
async def test_nor_where_no_worker_hears_the_news(own_server: RedisServer, tmp_path: Path) -> None:
    own_server.command("ACL", "SETUSER", "app", "on", ">word", "~*", "+@all", "resetchannels")
    redis = own_server.url.replace("redis://", "redis://app:word@")
    with fleet(tmp_path, redis) as url:
        async with operator(own_server.url) as control, load_on(url) as load:
            for _ in range(5):
                await check_closing(
                    load,
                    lambda: control.close("video", tier="new"),
                    lambda: control.open("video", tier="new"),
                )
            assert own_server.command("PUBSUB", "CHANNELS") == []

    check_others(load)


async def test_nor_on_a_cluster(
    redis_cluster: RedisCluster, cluster_url: str, tmp_path: Path
) -> None:
    with fleet(tmp_path, cluster_url) as url:
        async with operator(cluster_url) as control, load_on(url) as load:
            for _ in range(5):
                await check_closing(
                    load,
                    lambda: control.close("video", tier="new"),
                    lambda: control.open("video", tier="new"),
                )

    check_others(load)


@pytest.mark.login("operator")
async def test_the_command_itself_closes_and_opens(redis_url: str, tmp_path: Path) -> None:
    said: list[str] = []

    async def run(verb: str) -> None:
        words = [verb, "video", "--tier", "new", "--yes", "--namespace", NAMESPACE]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tieredlimit", *words, "--redis", redis_url,
            "--policy", str(policy),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await process.communicate()
        said.append(output.decode())
        assert process.returncode == 0, said[-1]

    policy = tmp_path / "policy.toml"
    policy.write_text(
        """
        order = ["new", "everyone"]
        [features]
        image = { routes = ["POST /images"], outage = "deny" }
        video = { routes = ["POST /videos"], outage = "deny" }
        [defaults]
        quotas = { image = "unlimited", video = "100000/minute" }
        [tiers]
        new = { when = { plan = "free", account_age_below = "7 days" } }
        everyone = {}
        """
    )
    with fleet(tmp_path, redis_url) as url:
        async with load_on(url) as load:
            for _ in range(3):
                await check_closing(load, lambda: run("close"), lambda: run("open"))

    check_others(load)
    assert all(f"{WORKERS}/{WORKERS} workers" in one for one in said)
    assert "admitted since: 0" in said[0]

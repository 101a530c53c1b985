"""The example of jobs in processes of their own, run as its first lines say."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.video_jobs import POLICY, create_app
from tests.servers import RedisServer
from tieredlimit import Account, Limiter
from tieredlimit.backends import MemoryBackend

CHECKOUT = Path(__file__).parent.parent
DEADLINE = 30.0


class Service:
    """The example's service under uvicorn, whose jobs render a second of video in `pace`."""

    def __init__(self, redis_url: str, pace: float) -> None:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        environment = {
            **os.environ,
            "TIEREDLIMIT_REDIS": redis_url,
            "VIDEO_JOBS_PACE": str(pace),
            "PYTHONUNBUFFERED": "1",
        }
        port = self.url.rpartition(":")[2]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "examples.video_jobs:app", "--port", port],
            cwd=CHECKOUT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.client = httpx.Client(base_url=self.url, timeout=10.0, trust_env=False)

    def order(self, account: str, seconds: int) -> httpx.Response:
        return self.client.post("/v1/videos", json={"account": account, "seconds": seconds})

    def usage(self, account: str) -> dict[str, Any]:
        told = self.client.get(f"/v1/usage/{account}")
        assert told.status_code == 200, told.text
        return dict(json.loads(told.text))

    def end(self) -> str:
        """End the service, which waits for its jobs, and return all that was printed."""
        self.process.terminate()
        printed = self.process.communicate(timeout=DEADLINE)[0]
        self.client.close()
        return printed


@pytest.fixture
def services(redis_server: RedisServer) -> Iterator[Callable[[float], Service]]:
    started: list[Service] = []

    def start(pace: float) -> Service:
        service = Service(redis_server.url, pace)
        started.append(service)
        wait_for(lambda: answers(service))
        return service

    yield start
    for service in started:
        if service.process.poll() is None:
            service.process.kill()
            service.process.communicate()
        service.client.close()


def answers(service: Service) -> bool:
    assert service.process.poll() is None, "the service ended by itself"
    try:
        return service.client.get("/v1/usage/nobody").status_code == 200
    except httpx.TransportError:
        return False


def debt_of(server: RedisServer, key: str) -> float:
    """Return the microseconds until the only bucket under a key is full."""
    held, now = server.command("GET", key), server.command("TIME")
    assert isinstance(held, bytes)
    assert isinstance(now, tuple | list)
    _, full_at = struct.unpack("<4sd", held)
    return float(full_at) - (int(now[0]) * 1_000_000 + int(now[1]))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@pytest.mark.redis
def test_a_job_holds_a_slot_renews_it_and_settles_what_it_took(
    services: Callable[[float], Service], redis_server: RedisServer
) -> None:
    service = services(0.05)
    key = "tl1:{video-jobs:0}:video:everyone~lease::ada"

    def free_at() -> float:
        told = redis_server.command("ZRANGE", key, "0", "-1", "WITHSCORES")
        return float(told[0][1]) if isinstance(told, list) and told else 0.0

    ordered = service.order("ada", 60)
    first = free_at()

    assert (ordered.status_code, ordered.json()) == (202, {"charged": 60})
    assert service.usage("ada")["running"] == 1
    assert service.usage("ada")["remaining"] == 0
    wait_for(lambda: free_at() > first)
    wait_for(lambda: service.usage("ada")["running"] == 0)
    printed = service.end()
    took = int(printed.partition("rendered ")[2].split()[0])
    assert "settled: True" in printed
    debt = debt_of(redis_server, "tl1:{video-jobs:0}:video:everyone::ada")
    # 60 an hour is one a minute; what has refilled since is less than one.
    assert took - 1 < debt / 60_000_000 <= took


@pytest.mark.redis
def test_what_is_too_much_is_denied_and_the_slots_come_back(
    services: Callable[[float], Service],
) -> None:
    service = services(0.1)

    statuses = [service.order("bob", 10).status_code for _ in range(3)]
    third = service.order("bob", 10)

    assert statuses == [202, 202, 429]
    assert third.json()["reason"] == "concurrency"
    wait_for(lambda: service.usage("bob")["running"] == 0)
    assert service.order("bob", 1).status_code == 202
    assert service.end().count("settled: True") == 3


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b'{"account": "ada"}', b'{"account": "", "seconds": 1}'),
        *(
            b'{"account": "ada", "seconds": %s}' % one
            for one in (b"-1", b"0", b"61", b"1.5", b'"x"')
        ),
    ],
)
async def test_order_of_nothing_that_can_be_rendered_is_refused_and_charges_nothing(
    body: bytes,
) -> None:
    async with Limiter(POLICY, MemoryBackend()) as limiter:
        transport = httpx.ASGITransport(app=create_app(limiter))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.post("/v1/videos", content=body)

        assert answer.status_code == 400
        assert (await limiter.peek(Account("ada"), "video")).remaining == 60

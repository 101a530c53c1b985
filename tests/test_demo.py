"""The demonstration, run as its script runs it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager
from threading import Timer
from typing import TYPE_CHECKING, NamedTuple

import httpx
import pytest

from examples.demo_server import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers import RedisServer

LONGEST_SECONDS = 30.0

MAIN_ROWS = [
    ("no account", "GET /health", "200"),
    ("no account", "OPTIONS /v1/images, preflight", "200"),
    ("nova (new)", "POST /v1/images", "201"),
    ("nova (new)", "POST /v1/videos", "403"),
    ("nova (new)", "POST /v1/videos, in French", "403"),
    ("nova (new)", "POST /v1/videos, from a page", "403"),
    ("no account", "POST /v1/videos", "403"),
    ("ada (free)", "POST /v1/videos", "202"),
    ("grace (pro)", "POST /v1/videos/hd", "202"),
    ("linus (pro)", "POST /v1/videos", "429"),
    ("ada (free)", "POST /v1/images, 25 at once", "201/429"),
]


class Finished(NamedTuple):
    code: int
    out: str
    err: str


def run_demo(*arguments: str) -> Finished:
    with demo(*arguments) as process:
        out, err = process.communicate()
    return Finished(process.returncode, out, err)


@contextmanager
def demo(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.demo", *arguments],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    # Told to stop rather than killed, so that it takes its servers along.
    too_late = Timer(LONGEST_SECONDS, process.terminate)
    too_late.start()
    try:
        with process:
            yield process
    finally:
        too_late.cancel()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    read = ""
    for line in process.stdout:
        read += line
        if text in line:
            return read
    pytest.fail(f"the demonstration never printed {text!r}, but:\n{read}")


def has_row(out: str, who: str, request: str, status: str) -> bool:
    row = rf"✓ {re.escape(who)} +{re.escape(request)} +{re.escape(status)}( |$)"
    return re.search(row, out, re.MULTILINE) is not None


def assert_as_promised(run: Finished) -> None:
    assert run.code == 0, run
    assert re.search(r"^All \d+ outcomes are as promised\.$", run.out, re.MULTILINE)
    # How many seconds Retry-After says depends on how long the burst took.
    assert re.search(r"^✓ ada \(free\) +POST /v1/images, \d s later +201 ", run.out, re.MULTILINE)
    assert [row for row in MAIN_ROWS if not has_row(run.out, *row)] == []


@pytest.fixture(scope="module")
def in_memory() -> Finished:
    return run_demo()


def test_every_outcome_is_the_promised_one(in_memory: Finished) -> None:
    assert_as_promised(in_memory)
    assert "✗" not in in_memory.out
    assert in_memory.err == ""


def test_the_table_shows_what_each_client_saw(in_memory: Finished) -> None:
    words = " ".join(in_memory.out.split())

    assert "La vidéo n'est pas encore ouverte aux nouveaux comptes. Les images le sont." in words
    assert "Video is not yet open to new accounts." in words
    assert '"image-minute";r=4;t=12, "image-day";r=49;t=1728' in words
    assert "Retry-After: 30 " in words
    assert "20 x 201, 5 x 429" in words


def test_the_table_fits_into_100_columns(in_memory: Finished) -> None:
    assert max(len(line) for line in in_memory.out.splitlines()) <= 100


def test_runs_on_one_redis_do_not_disturb_each_other(
    redis_server: RedisServer, redis_url: str
) -> None:
    with demo("--redis", redis_url) as one, demo("--redis", redis_url) as other:
        runs = [Finished(0, *p.communicate()) for p in (one, other)]
        runs = [run._replace(code=p.returncode) for run, p in zip(runs, (one, other), strict=True)]

    for run in runs:
        assert_as_promised(run)
        assert len(re.findall(r"http://127\.0\.0\.1:\d+", run.out)) == 2
    keys = redis_server.command("KEYS", "*")
    assert isinstance(keys, list)
    assert len({name for key in keys for name in re.findall(rb"demo-[0-9a-f]+", key)}) == 2
    buckets = [key for key in keys if key.startswith(b"tl1:")]
    assert all(int(str(redis_server.command("PTTL", key))) > 0 for key in buckets)


def test_a_broken_promise_is_named_and_fails_the_run(tmp_path: Path) -> None:
    policy = tmp_path / "open.toml"
    policy.write_text(
        '[tiers.new.quotas]\nvideo = "10/minute"\n[tiers.everyone.messages]\nvideo = "No."\n'
    )

    run = run_demo("--policy", str(policy))

    assert run.code == 1
    assert "✗ nova (new), POST /v1/videos: status 202, promised 403" in run.err
    assert "✗ no account, POST /v1/videos: message 'No.', promised 'Sign in" in run.err
    assert "ada" not in run.err
    assert re.search(r"^✗ nova \(new\) +POST /v1/videos +202", run.out, re.MULTILINE)
    assert "as promised" not in run.out


def test_a_faulty_policy_is_said_before_anything_is_started(tmp_path: Path) -> None:
    policy = tmp_path / "faulty.toml"
    policy.write_text('tiers.new.quotas.image = "5 per fortnight"\n')

    run = run_demo("--policy", str(policy))

    assert run.code == 2
    assert "tiers.new.quotas.image" in run.err
    assert "Traceback" not in run.err


def test_a_redis_that_is_not_there_is_said_before_anything_is_started() -> None:
    run = run_demo("--redis", "redis://127.0.0.1:1/0")

    assert run.code == 2
    assert "Redis does not answer" in run.err
    assert "Traceback" not in run.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_what_its_lines_ask_for_until_it_is_stopped(number: signal.Signals) -> None:
    with demo("--serve") as process:
        said = read_until(process, "Ctrl-C")
        lines = [shlex.split(line) for line in said.splitlines() if line.startswith("curl")]
        statuses = [send(line) for line in lines]
        process.send_signal(number)
        _, err = process.communicate()

    assert statuses == [201, 403, 403, 202, 403, 200]
    assert process.returncode == 0
    assert err == ""
    with pytest.raises(httpx.ConnectError):
        send(lines[0])


def test_a_port_in_use_is_said(redis_server: RedisServer) -> None:
    run = run_demo("--serve", "--port", str(redis_server.port))

    assert run.code == 2
    assert "address already in use" in run.err


def test_stopping_it_in_mid_play_stops_its_server() -> None:
    with demo() as process:
        said = read_until(process, "http://")
        read_until(process, "GET /health")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()

    assert process.returncode == 130
    assert "Traceback" not in err
    with pytest.raises(httpx.ConnectError):
        httpx.get(said.split()[-1], trust_env=False)


def send(curl: list[str]) -> int:
    """Do what a line such as `curl -i -X POST -H 'X-Api-Key: key-ada' URL` does."""
    headers = [curl[i + 1].split(": ") for i, word in enumerate(curl) if word == "-H"]
    method = "POST" if "POST" in curl else "GET"
    answer = httpx.request(method, curl[-1], headers=dict(headers), trust_env=False)
    return answer.status_code

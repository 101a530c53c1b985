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
from xml.etree import ElementTree as ET

import httpx
import pytest
import redis

from examples.demo_redis import OwnRedis, connect
from examples.demo_screen import Cell, View
from examples.demo_server import CHECKOUT, StartError
from examples.demo_still import draw

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers import RedisServer

LONGEST_SECONDS = 30.0

MAIN_ROWS = [
    ("no account", "GET /health", "200"),
    ("no account", "OPTIONS /v1/images, preflight", "200"),
    ("nova (new)", "POST /v1/images", "201"),
    ("nova (new)", "POST /v1/videos", "202"),
    ("operator", "close video, tier new", "200"),
    ("nova (new)", "POST /v1/videos", "403"),
    ("nova (new)", "POST /v1/videos, in French", "403"),
    ("nova (new)", "POST /v1/videos, from a page", "403"),
    ("no account", "POST /v1/videos", "403"),
    ("ada (free)", "POST /v1/videos", "202"),
    ("grace (pro)", "POST /v1/videos/hd", "202"),
    ("linus (pro)", "POST /v1/videos", "429"),
    ("40 new", "POST /v1/videos, one each", "403"),
    ("operator", "open video, tier new", "200"),
    ("40 new", "POST /v1/videos, one each", "202/403"),
    ("40 new", "POST /v1/videos, one each", "202"),
    ("ada (free)", "POST /v1/images, 25 at once", "201/429"),
]


class Finished(NamedTuple):
    code: int
    out: str
    err: str


def run_demo(*arguments: str, longest: float = LONGEST_SECONDS) -> Finished:
    with demo(*arguments, longest=longest) as process:
        out, err = process.communicate()
    return Finished(process.returncode, out, err)


@contextmanager
def demo(*arguments: str, longest: float = LONGEST_SECONDS) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.demo", *arguments],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    # Told to stop rather than killed, so that it takes its servers along.
    too_late = Timer(longest, process.terminate)
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

    assert "La vidéo est suspendue pour les nouveaux comptes. Les images continuent." in words
    assert "Video is paused for new accounts. Images go on." in words
    assert "revision 1: close video for tier new" in words
    assert "revision 2: open video for tier new, 50 %" in words
    assert "40 x 403" in words
    assert "40 x 202" in words
    assert '"image-minute";r=4;t=12, "image-day";r=49;t=1728' in words
    assert "Retry-After: 30 " in words
    assert "20 x 201, 5 x 429" in words


def test_half_of_the_new_accounts_are_let_in_and_they_are_the_same_ones(
    in_memory: Finished,
) -> None:
    asked = re.findall(
        r"^✓ 40 new .* 202/403 (\d+) x 202, (\d+) x 403$", in_memory.out, re.MULTILINE
    )

    assert len(asked) == 2
    assert asked[0] == asked[1]


def test_the_table_fits_into_100_columns(in_memory: Finished) -> None:
    assert max(len(line) for line in in_memory.out.splitlines()) <= 100


@pytest.mark.login("default")  # it looks for what it has left there, and removes it
def test_runs_on_one_redis_do_not_disturb_each_other(
    redis_server: RedisServer, redis_url: str
) -> None:
    with demo("--redis", redis_url) as one, demo("--redis", redis_url) as other:
        runs = [Finished(0, *p.communicate()) for p in (one, other)]
        runs = [run._replace(code=p.returncode) for run, p in zip(runs, (one, other), strict=True)]

    for run in runs:
        assert_as_promised(run)
        assert len(re.findall(r"http://127\.0\.0\.1:\d+", run.out)) == 2
    assert (
        redis_server.command("KEYS", "*demo-*") == []
    )  # what they have left is not theirs to keep


def test_a_broken_promise_is_named_and_fails_the_run(tmp_path: Path) -> None:
    policy = tmp_path / "open.toml"
    policy.write_text('[tiers.new.quotas]\nimage = 0\n[tiers.everyone.messages]\nvideo = "No."\n')

    run = run_demo("--policy", str(policy))

    assert run.code == 1
    assert "✗ nova (new), POST /v1/images: status 403, promised 201" in run.err
    assert "✗ no account, POST /v1/videos: message 'No.', promised 'Sign in" in run.err
    assert "ada" not in run.err
    assert re.search(r"^✗ nova \(new\) +POST /v1/images +403", run.out, re.MULTILINE)
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


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path]:
    still = tmp_path_factory.mktemp("still") / "demo.svg"
    run = run_demo("--redis", "--seconds", "10", "--still", str(still), longest=90.0)
    return run, still


@pytest.mark.redis
def test_the_fleet_is_closed_reopened_and_survives_its_redis(fleet: tuple[Finished, Path]) -> None:
    run, _ = fleet
    words = " ".join(run.out.split())

    assert run.code == 0, run
    assert "All 8 outcomes are as promised." in run.out
    assert "✗" not in run.out
    assert "after that, none was admitted" in words
    assert "4/4 workers on revision 1" in words
    assert "none of the new accounts was let in and turned away again" in words
    assert "videos without Redis: 503" in words
    assert "4/4 workers on revision 2" in words.split("tieredlimit status")[1]


@pytest.mark.redis
def test_where_there_is_no_terminal_the_fleet_is_told_in_plain_lines(
    fleet: tuple[Finished, Path],
) -> None:
    run, _ = fleet

    seconds = [line for line in run.out.splitlines() if "admitted/s" in line]
    assert len(seconds) >= 5
    assert any(re.search(r"video: new 0 \(\d+ x 403\), free \d+, pro \d+$", s) for s in seconds)
    assert "\x1b" not in run.out


@pytest.mark.redis
def test_the_still_shows_the_closure(fleet: tuple[Finished, Path]) -> None:
    run, still = fleet
    assert run.code == 0, run

    texts = texts_of(still.read_text("utf-8"))

    assert texts[0] == "Video is closed for new accounts · 4 workers, one Redis"
    assert "$ tieredlimit close video --tier new" in " ".join(texts)
    assert "403 Video is paused for new accounts." in " ".join(texts)


def test_the_still_in_the_documentation_shows_the_closure() -> None:
    texts = texts_of((CHECKOUT / "docs" / "demo.svg").read_text("utf-8"))

    assert texts[texts.index("new") :][:5] == ["new", "240 accounts", "30", "0", "40 x 403"]
    assert "docs/demo.svg" in (CHECKOUT / "README.md").read_text("utf-8")


def test_a_still_has_the_numbers_and_what_was_typed() -> None:
    closed = Cell(wanted=40, admitted=0, others={403: 38, 0: 1}, history=[40, 40, 21, 0, 0])
    busy = Cell(wanted=30, admitted=29, others={}, history=[])
    cells = {feature: {"new": closed, "a<b": busy} for feature in ("image", "video")}
    view = View("two", {"new": 240, "a<b": 7}, cells)

    drawn = draw(view, "<title>", ["$ close & open", "x " * 80])

    texts = texts_of(drawn)
    row = ["new", "240 accounts", "0", "1 x lost, 38 x 403", "0", "1 x lost, 38 x 403"]
    assert texts[0] == "<title>"
    assert texts[3:] == [
        *row, "a<b", "7 accounts", "29", "29", "$ close & open", *texts[-2:]
    ]  # fmt: skip
    assert " ".join(texts[-2:]).split() == ["x"] * 80


@pytest.mark.parametrize("arguments", [(), ("--redis", "redis://127.0.0.1:1/0")])
def test_a_still_of_no_fleet_is_refused(arguments: tuple[str, ...], tmp_path: Path) -> None:
    run = run_demo(*arguments, "--still", str(tmp_path / "demo.svg"))

    assert run.code == 2
    assert "wants --redis without URL" in run.err


def test_without_a_redis_to_start_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("PATH", "")

    with pytest.raises(StartError, match="apt-get install redis-server"):
        OwnRedis()


@pytest.mark.redis
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopping_the_fleet_leaves_no_process(number: signal.Signals) -> None:
    with demo("--redis", "--seconds", "10", longest=60.0) as process:
        said = read_until(process, "tieredlimit watch")
        said += read_until(process, "tieredlimit close")
        process.send_signal(number)
        _, err = process.communicate()

    workers = re.findall(r"http://\S+", said)
    (server,) = re.findall(r"redis://\S+", said)
    assert process.returncode == 130
    assert err == ""
    assert len(workers) == 4
    for url in workers:
        with pytest.raises(httpx.ConnectError):
            httpx.get(url, trust_env=False)
    with pytest.raises(redis.ConnectionError), connect(server, 1.0) as client:
        client.ping()


def texts_of(svg: str) -> list[str]:
    """Return what a well-formed drawing says, in its order."""
    space = "{http://www.w3.org/2000/svg}"
    root = ET.fromstring(svg)
    assert root.tag == f"{space}svg"
    return [text.text or "" for text in root.iter(f"{space}text")]


def send(curl: list[str]) -> int:
    """Do what a line such as `curl -i -X POST -H 'X-Api-Key: key-ada' URL` does."""
    headers = [curl[i + 1].split(": ") for i, word in enumerate(curl) if word == "-H"]
    method = "POST" if "POST" in curl else "GET"
    answer = httpx.request(method, curl[-1], headers=dict(headers), trust_env=False)
    return answer.status_code

"""`tieredlimit close`, `open`, `set`, `undo` and what they share: asking, publishing, waiting."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.servers import RedisServer
from tieredlimit import Account, Policy
from tieredlimit._core.change import Change
from tieredlimit._core.condition import When
from tieredlimit._core.override import Override, Share, Who
from tieredlimit._core.revision import NOTHING, Revision
from tieredlimit._core.tier import Cell
from tieredlimit._core.who import EVERYONE
from tieredlimit.backends import ClusterBackend, RedisBackend
from tieredlimit.backends.control import (
    ControlStore,
    Published,
    control_store,
    shard_key,
)
from tieredlimit.backends.heartbeat import Heartbeat
from tieredlimit.cli import main
from tieredlimit.cli.fleet import Fleet
from tieredlimit.cli.inforce import cell_under, policy_under, rule
from tieredlimit.cli.instants import duration, moment, percent
from tieredlimit.cli.pace import Pace
from tieredlimit.cli.rates import Beats, between
from tieredlimit.cli.report import Report

EXAMPLE = Path(__file__).parents[1] / "examples" / "policy.toml"
TEAM = "team"
SECOND = 1_000_000

Counts = Mapping[str, Mapping[str, int]]


class Workers:
    """Write heartbeats as living workers would; these follow the head whenever a command waits.

    `deaf` ones never do. `counted` is what each of them counts from one heartbeat to the next.
    """

    def __init__(
        self, url: str, *names: str, deaf: tuple[str, ...] = (), counted: Counts | None = None
    ) -> None:
        self.url = url
        self.names = names
        self.deaf = deaf
        self.counted = counted or {}
        self.since: dict[str, Any] = {}
        self.denied: list[dict[str, Any]] = []
        self.format = 1
        self.seconds = 0.0
        self.waited = 0
        self.head = NOTHING
        self._beats = 0

    def store(self) -> ControlStore:
        if "+cluster://" in self.url:
            return control_store(ClusterBackend(self.url), TEAM, 64)
        return control_store(RedisBackend.from_url(self.url), TEAM, 1)

    def beat(self) -> None:
        """Let all of them be heard once."""
        asyncio.run(self.beat_once())

    async def beat_once(self) -> None:
        store = self.store()
        head = await store.head()
        if head.number > self.head.number:
            self.head = head
        self._beats += 1
        for name in self.names:
            follows = NOTHING if name in self.deaf else self.head
            cells = {
                cell: {outcome: count * self._beats for outcome, count in outcomes.items()}
                for cell, outcomes in self.counted.items()
            }
            counters = {"cells": cells, "since": self.since, "denied": self.denied}
            await store.beat(
                Heartbeat(
                    name,
                    "app-1",
                    4711,
                    "0.1.0",
                    self.format,
                    follows.number,
                    follows.digest,
                    5,
                    counters,
                )
            )
        await store.close()

    async def pause(self, seconds: float) -> None:
        self.seconds += seconds
        self.waited += 1
        await self.beat_once()

    def pace(self, *, attended: bool = False) -> Pace:
        return Pace(lambda: self.seconds, self.pause, lambda: attended)


def run(
    workers: Workers,
    *words: object,
    typed: str | None = None,
    namespaced: bool = True,
    policy: str = str(EXAMPLE),
) -> Result:
    """Run a command as a script would; with `typed`, as somebody at a terminal."""
    env = {
        "TIEREDLIMIT_REDIS": workers.url,
        "TIEREDLIMIT_NAMESPACE": TEAM if namespaced else None,
        "TIEREDLIMIT_POLICY": policy,
        "COLUMNS": "300",
    }
    return CliRunner().invoke(
        main,
        [str(word) for word in words],
        obj=workers.pace(attended=typed is not None),
        input=typed,
        env=env,
        catch_exceptions=False,
    )


def as_json(workers: Workers, *words: object, code: int = 0) -> Any:
    result = run(workers, *words, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def head_of(workers: Workers) -> Revision:
    return asyncio.run(_head(workers))


async def _head(workers: Workers) -> Revision:
    store = workers.store()
    head = await store.head()
    await store.close()
    return head


def label(workers: Workers, text: str) -> None:
    assert run(workers, "label", text, "--yes", "--namespace", TEAM).exit_code == 0


@pytest.fixture
def workers(redis_url: str) -> Workers:
    """Two living workers on a namespace where nothing was published."""
    living = Workers(redis_url, "w1", "w2")
    living.beat()
    return living


# --- Done


def test_close_reports_who_follows_what_was_admitted_and_how_to_undo_it(workers: Workers) -> None:
    result = run(workers, "close", "video", "--tier", "free", "--yes", "--actor", "ann")

    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "team · no label · 2/2 workers on revision 0"
    assert result.stdout.splitlines()[-1] == (
        "closed · 2/2 workers on revision 1 · admitted since: 0 · "
        "undo: tieredlimit open video --tier free"
    )
    (one,) = head_of(workers).overrides
    assert (one.action, one.feature, one.who.tier, one.actor) == ("close", "video", "free", "ann")


@pytest.mark.login("default")  # a URL with a password is not repeated
def test_undo_line_of_the_report_undoes_it_in_the_same_place(workers: Workers) -> None:
    place = ["--namespace", TEAM, "--redis", workers.url]
    closed = run(workers, "close", "video", "--tier", "free", "--yes", *place)
    words = closed.stdout.split("undo: tieredlimit ")[1].split()
    assert words[-4:] == place

    undone = run(workers, *words, "--yes")

    assert undone.exit_code == 0
    assert head_of(workers).overrides == ()


@pytest.mark.login("default")  # it gives this user a password
def test_password_of_a_url_is_not_repeated(own_server: RedisServer) -> None:
    own_server.command("CONFIG", "SET", "requirepass", "geheim")
    url = own_server.url.replace("redis://", "redis://:geheim@")
    workers = Workers(url, "w1")

    result = run(workers, "close", "video", "--all", "--yes", "--redis", url)

    assert result.exit_code == 0
    assert "geheim" not in result.output


def test_everything_that_can_be_said_is_stored(workers: Workers) -> None:
    words = ["--plan", "free", "--plan", "team", "--tag", "beta", "--account-age-below", "7d"]
    words += ["--created-after", "2026-01-01T00:00:00Z", "--no-anonymous", "--tier", "free"]
    texts = ["--message", "Later, please: a = b.", "--message", "fr=Plus tard.", "--reason", "hot"]
    until = ["--from", "2100-01-01T00:00:00Z", "--for", "30m", "--no-exceptions"]

    result = run(workers, "close", "video", *words, *texts, *until, "--yes")

    assert result.exit_code == 0
    (one,) = head_of(workers).overrides
    assert one.who.document() == {
        "tier": "free",
        "when": {
            "plan": ["free", "team"],
            "anonymous": False,
            "tags": ["beta"],
            "account_age_below": "7 days",
            "created_after": "2026-01-01T00:00:00Z",
        },
    }
    assert one.messages == {"": "Later, please: a = b.", "fr": "Plus tard."}
    assert one.begin_us is not None
    assert (one.end_us, one.reason, one.no_exceptions) == (
        one.begin_us + 30 * 60 * SECOND,
        "hot",
        True,
    )
    assert "from 2100-01-01T00:00:00Z on" in result.stdout.splitlines()[-1]
    assert "admitted since" not in result.stdout


def test_time_of_day_is_of_today_and_said_in_full(workers: Workers) -> None:
    result = run(workers, "close", "video", "--tier", "free", "--until", "23:59", "--dry-run")

    if result.exit_code:  # in the last minute of a day
        assert "is past" in result.stderr
    else:
        assert "--until 23:59 is 20" in result.stdout
        assert "T23:59:00Z" in result.stdout


def test_share_and_ramp_are_stored_and_shown(workers: Workers) -> None:
    run(workers, "close", "video", "--tier", "free", "--yes")

    some = run(workers, "open", "video", "--tier", "free", "--percent", "12.5%", "--yes")
    less = run(workers, "open", "video", "--tier", "free", "--percent", "10", "--yes")
    ramp = as_json(workers, "open", "video", "--tier", "free", "--ramp", "30m", "--yes")

    assert some.exit_code == 0
    assert "open video for tier free, 12.5 %" in some.stdout
    assert less.exit_code == 1
    assert "12.5 % of tier free are in already" in less.stderr
    (added,) = ramp["added"]
    assert added["percent"] == 12.5
    assert added["full_at"] is not None
    assert ramp["done"] == "opened"


@pytest.mark.parametrize(
    ("quotas", "stored"),
    [
        (["10/day"], "10/day"),
        (["5/minute", "50/day"], ["5/minute", "50/day"]),
        (["0"], 0),
        (["unlimited"], "unlimited"),
        (['{ rate = "20/day", capacity = 2 }'], {"rate": "20/day", "capacity": 2}),
        (['["5/minute", "50/day"]'], ["5/minute", "50/day"]),
    ],
)
def test_set_takes_quotas_as_a_policy_writes_them(
    workers: Workers, quotas: list[str], stored: object
) -> None:
    result = run(workers, "set", "image", *quotas, "--tier", "free", "--yes")

    assert result.exit_code == 0, result.output
    assert head_of(workers).overrides[0].quotas == stored


def test_undo_brings_the_previous_content_back_under_a_new_number(workers: Workers) -> None:
    run(workers, "close", "video", "--tier", "free", "--yes")
    run(workers, "close", "image", "--all", "--yes")

    back = run(workers, "undo", "--yes")
    to = run(workers, "undo", "--to", "0", "--yes")

    assert (back.exit_code, to.exit_code) == (0, 0)
    history = as_json(workers, "history")["revisions"]
    assert [(one["number"], one["overrides"]) for one in history] == [
        (4, 0),
        (3, 1),
        (2, 2),
        (1, 1),
    ]
    assert history[1]["change"] == "undo revision 2: close image for everyone"
    assert history[0]["change"] == "go back to revision 0, from revision 3"


def test_undo_shows_first_what_it_brings_back(workers: Workers) -> None:
    run(workers, "close", "video", "--tier", "free", "--yes", "--message", "Later.")
    run(workers, "open", "video", "--tier", "free", "--yes")

    told = run(workers, "undo", "--dry-run").stdout

    assert "undo revision 2: open video for tier free" in told
    assert "brings back close-1: video closed for tier free\n" in told
    assert "message" not in told


def test_undo_shows_first_which_policy_it_brings_back(workers: Workers, tmp_path: Path) -> None:
    more = tmp_path / "more.toml"
    more.write_text(EXAMPLE.read_text("utf-8").replace("20/minute", "30/minute"), "utf-8")
    run(workers, "policy", "push", EXAMPLE, "--yes")
    run(workers, "policy", "push", more, "--yes")

    told = run(workers, "undo", "--dry-run").stdout
    to_files = run(workers, "undo", "--to", "0", "--dry-run").stdout

    assert "tiers.free.quotas.image: 30/minute -> 20/minute" in told
    assert "workers go back to the file that each of them has" in to_files


def test_override_that_is_replaced_later_is_not_said_to_end(workers: Workers) -> None:
    run(workers, "close", "video", "--tier", "free", "--yes")
    later = ["set", "video", "2/day", "--tier", "free", "--from", "2100-01-01T00:00:00Z", "--yes"]

    told = run(workers, *later).stdout
    back = run(workers, "undo", "--dry-run").stdout

    closed = "moves the end of close-1: video closed for tier free, until"
    assert f"{closed} 2100-01-01T00:00:00Z\n" in told
    assert f"{closed} further notice\n" in back
    assert "ends close-1" not in told + back


@pytest.mark.redis
def test_cluster_is_changed_on_every_shard(cluster_url: str) -> None:
    workers = Workers(cluster_url)

    result = run(workers, "close", "video", "--tier", "free", "--yes", "--json")

    assert result.exit_code == 3
    assert json.loads(result.stdout)["shards"] == 64


# --- How far it got


def test_nobody_follows_without_a_worker(redis_url: str) -> None:
    result = run(Workers(redis_url), "close", "video", "--tier", "free", "--yes")

    assert result.exit_code == 3
    assert "nobody follows: no worker lives" in result.stdout
    assert "no worker was heard twice" in result.stdout


def test_worker_that_stays_behind_is_named_after_three_seconds(redis_url: str) -> None:
    workers = Workers(redis_url, "w1", "w2", deaf=("w2",))
    workers.beat()

    result = run(workers, "close", "video", "--tier", "free", "--yes")

    assert result.exit_code == 4
    assert "1/2 workers on revision 1" in result.stdout
    assert "not on it: app-1:4711" in result.stdout
    assert 3.0 <= workers.seconds < 5.0


def test_worker_that_has_fallen_silent_is_told_from_one_that_is_late(
    redis_url: str, redis_server: RedisServer
) -> None:
    gone = Workers(redis_url, "gone")
    gone.beat()
    redis_server.command("ZINCRBY", "tl:{team}:workers", str(-2 * SECOND), "gone")

    result = run(Workers(redis_url, "w1"), "close", "video", "--tier", "free", "--yes")

    assert result.exit_code == 4
    assert "not heard since: app-1:4711; gone, or cut off from Redis" in result.stdout
    assert "not on it" not in result.stdout


def test_nobody_follows_where_all_stay_behind(redis_url: str) -> None:
    workers = Workers(redis_url, "w1", deaf=("w1",))
    workers.beat()

    assert as_json(workers, "close", "video", "--tier", "free", "--yes", code=3)["workers"] == {
        "live": 1,
        "following": 0,
        "behind": ["app-1:4711"],
    }


def test_what_did_not_reach_a_shard_is_partly_done_and_the_same_command_finishes_it(
    workers: Workers, redis_server: RedisServer
) -> None:
    redis_server.command("LPUSH", shard_key(TEAM, 0), "in the way")
    words = ["close", "video", "--tier", "free", "--for", "2h", "--yes"]

    partly = run(workers, *words)
    redis_server.command("DEL", shard_key(TEAM, 0))
    again = run(workers, *words)

    assert partly.exit_code == 4, partly.output
    assert "1 of 1 shards have not heard of it" in partly.stderr
    assert again.exit_code == 0
    assert "revision 1 (close video for tier free) had not reached 1 of 1 shards" in again.stdout
    assert "closed · 2/2 workers on revision 1" in again.stdout
    assert redis_server.command("GET", shard_key(TEAM, 0)) is not None


def test_undo_that_was_partly_done_is_finished_and_not_undone(
    workers: Workers, redis_server: RedisServer
) -> None:
    run(workers, "close", "video", "--tier", "free", "--yes")
    shard = redis_server.command("GET", shard_key(TEAM, 0))
    assert isinstance(shard, bytes)
    run(workers, "undo", "--yes")
    redis_server.command("SET", shard_key(TEAM, 0), shard.decode())

    again = run(workers, "undo", "--yes")

    assert again.exit_code == 0
    assert "undone · 2/2 workers on revision 2" in again.stdout
    assert head_of(workers).overrides == ()


def test_another_command_finishes_what_was_left_and_goes_on(
    workers: Workers, redis_server: RedisServer
) -> None:
    run(workers, "close", "video", "--tier", "free", "--yes")
    redis_server.command("DEL", shard_key(TEAM, 0))

    result = run(workers, "close", "video", "--tier", "pro", "--yes")

    assert result.exit_code == 0
    assert "closed · 2/2 workers on revision 2" in result.stdout


# --- What is shown before


def test_sample_says_what_would_be_denied(workers: Workers, redis_server: RedisServer) -> None:
    workers.counted = {"video/free": {"allowed": 41, "quota": 3}, "video/pro": {"allowed": 7}}
    workers.beat()
    for name in workers.names:  # heard a second ago
        redis_server.command("ZINCRBY", "tl:{team}:workers", str(-SECOND), name)

    told = as_json(workers, "close", "video", "--tier", "free", "--dry-run")

    assert told["sample"]["allowed"] == pytest.approx(82, rel=0.3)
    assert (told["sample"]["workers"], told["done"]) == (2, None)
    assert head_of(workers) == NOTHING


def test_rates_come_from_the_time_between_two_heartbeats_of_one_worker() -> None:
    def beat(name: str, counted: object, age: float, started: int = 1) -> Heartbeat:
        return Heartbeat(name, "h", 1, "0", 1, 0, "", started, {"cells": counted}, age)

    before = [
        beat("w1", {"video/new": {"allowed": 10}}, 0.5),
        beat("restarted", {"video/new": {"allowed": 90}}, 0.0),
        beat("silent", {"video/new": {"allowed": 5}}, 1.0),
        beat("odd", {"video/new": {"allowed": "many"}, "video": 3, "a/b": []}, 0.0),
    ]
    after = [
        beat("w1", {"video/new": {"allowed": 30}, "image/pro": {"quota": 4}}, 0.0),
        beat("restarted", {"video/new": {"allowed": 3}}, 0.0, started=2),
        beat("silent", {"video/new": {"allowed": 5}}, 2.5),
        beat("odd", "nothing", 0.0),
    ]

    sample = between(Beats(0, before), Beats(3 * SECOND // 2, after))

    assert sample.rates == {("video", "new"): {"allowed": 10.0}, ("image", "pro"): {"quota": 2.0}}
    assert (sample.workers, sample.live) == (2, 4)
    assert sample.of("video", ["new", "free"], "allowed") == 10.0


def test_admitted_since_is_of_the_cells_concerned(workers: Workers) -> None:
    workers.since = {"video/free": {"allowed": 2, "closed": 9}, "video/pro": {"allowed": 50}}

    told = as_json(workers, "close", "video", "--tier", "free", "--yes")
    narrow = as_json(workers, "close", "video", "--account", "u1", "--yes")

    assert told["admitted_since"] == 4
    assert narrow["admitted_since"] is None


def test_exceptions_that_stay_open_are_named(workers: Workers) -> None:
    run(workers, "close", "video", "--all", "--yes")
    run(workers, "open", "video", "--account", "u1", "--yes")

    some = run(workers, "close", "video", "--tier", "free", "--dry-run")
    none = run(workers, "close", "video", "--tier", "free", "--no-exceptions", "--dry-run")

    assert "stays open: open-2: video open for account u1" in some.stdout
    assert "stays open" not in none.stdout


def test_dry_run_changes_nothing_and_asks_nobody(workers: Workers) -> None:
    result = run(workers, "close", "video", "--tier", "free", "--dry-run")

    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "dry run: nothing was done"
    assert head_of(workers) == NOTHING


# --- Asking


@pytest.mark.parametrize(("typed", "done"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_terminal_is_asked(workers: Workers, typed: str, done: bool) -> None:
    result = run(workers, "close", "video", "--tier", "free", typed=typed)

    assert "go ahead?" in result.output
    assert result.exit_code == (0 if done else 1)
    assert head_of(workers).number == int(done)


def test_end_of_input_is_no_agreement(workers: Workers) -> None:
    result = run(workers, "close", "video", "--tier", "free", typed="")

    assert result.exit_code == 1
    assert head_of(workers) == NOTHING


def test_interrupted_question_ends_at_once_and_nothing_is_done(workers: Workers) -> None:
    controller, terminal = pty.openpty()
    env = {**os.environ, "TIEREDLIMIT_REDIS": workers.url, "TIEREDLIMIT_POLICY": str(EXAMPLE)}
    words = ["close", "video", "--tier", "free", "--namespace", TEAM]
    process = subprocess.Popen(
        [sys.executable, "-m", "tieredlimit", *words],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=env,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    told = b""
    while b"go ahead?" not in told:
        told += os.read(controller, 4096)
    wait_until_it_listens(process.pid)

    os.write(controller, b"\x03")

    assert process.wait(20) == 1
    os.close(controller)
    assert head_of(workers) == NOTHING


def wait_until_it_listens(pid: int) -> None:
    """Wait until a process that has asked sleeps, for want of an answer.

    Between the question and that Python's readline does not hear a signal: it looks for one, and
    then waits for input.
    """
    asleep, deadline = 0, time.monotonic() + 20
    while asleep < 5 and time.monotonic() < deadline:
        state = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0]
        asleep = asleep + 1 if state == "S" else 0
        time.sleep(0.005)


def test_interrupted_wait_says_that_it_is_published(workers: Workers) -> None:
    pauses = 0

    async def interrupted(seconds: float) -> None:
        nonlocal pauses
        pauses += 1
        if pauses > 1:
            raise asyncio.CancelledError
        await Workers.pause(workers, seconds)

    workers.deaf = ("w1",)
    workers.pause = interrupted  # type: ignore[method-assign]  # somebody at the keyboard
    with pytest.raises(asyncio.CancelledError):
        run(workers, "close", "video", "--tier", "free", "--yes")

    assert head_of(workers).number == 1


def test_where_nobody_can_be_asked_nothing_is_done(workers: Workers) -> None:
    result = run(workers, "close", "video", "--tier", "free")

    assert result.exit_code == 1
    assert "nobody can be asked here, and nothing was done: say --yes" in result.stderr
    assert head_of(workers) == NOTHING


@pytest.mark.parametrize("text", ["PRODUCTION", "prod", "Production"])
def test_production_asks_for_its_name(workers: Workers, text: str) -> None:
    label(workers, text)
    words = ["close", "video", "--tier", "free"]

    wrong = run(workers, *words, typed="y\n")
    right = run(workers, *words, typed=f"{TEAM}\n")

    assert f"This is {text}. Type the namespace's name" in wrong.output
    assert wrong.exit_code == 1
    assert right.exit_code == 0


def test_production_wants_yes_and_its_name_from_a_script(workers: Workers) -> None:
    label(workers, "PRODUCTION")
    words = ["close", "video", "--tier", "free", "--yes"]

    from_environment = run(workers, *words)
    named = run(workers, *words, "--namespace", TEAM)

    assert from_environment.exit_code == 1
    assert "--namespace team" in from_environment.stderr
    assert named.exit_code == 0


# --- Somebody else, and a Redis that forgot


def publish_elsewhere(workers: Workers) -> None:
    async def publish() -> None:
        store = workers.store()
        head = await store.head()
        made = Revision(head.number + 1, head.base, (), "bob", "hot", 5, "open everything")
        await store.publish(made, seen=head)
        await store.close()

    asyncio.run(publish())


def test_conflict_says_who_published_what(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(workers, "close", "video", "--tier", "free", "--yes")

    def agree(*_: object, **__: object) -> None:
        other = threading.Thread(target=publish_elsewhere, args=[workers])
        other.start()
        other.join()

    monkeypatch.setattr("tieredlimit.cli.publishing.require_consent", agree)
    result = run(workers, "undo", "--yes")

    assert result.exit_code == 1
    assert "bob has published revision 2 meanwhile: open everything (hot)" in result.stderr
    assert "Nothing was done" in result.stderr
    assert head_of(workers).number == 2


def test_close_goes_by_the_head_as_it_is_once_agreed(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def agree(*_: object, **__: object) -> None:
        other = threading.Thread(target=publish_elsewhere, args=[workers])
        other.start()
        other.join()

    monkeypatch.setattr("tieredlimit.cli.publishing.require_consent", agree)
    result = run(workers, "close", "video", "--tier", "free", "--yes")

    assert result.exit_code == 0
    assert "revision 2" in result.stdout


@pytest.mark.fault("G5")
@pytest.mark.parametrize("heard", [True, False], ids=["heard", "not heard yet"])
def test_emptied_redis_is_not_published_over(
    workers: Workers, redis_server: RedisServer, *, heard: bool
) -> None:
    run(workers, "close", "video", "--tier", "free", "--yes")
    closed = head_of(workers)
    redis_server.command("FLUSHALL")
    if heard:
        workers.beat()

    refused = run(workers, "close", "image", "--all", "--yes")

    async def seed() -> None:
        store = workers.store()
        await store.seed(closed)
        await store.close()

    asyncio.run(seed())
    done = run(workers, "close", "image", "--all", "--yes")

    assert refused.exit_code == 1
    assert "Redis holds revision 0, and app-1:4711, app-1:4711 revision 1" in refused.stderr
    assert "Nothing was done" in refused.stderr
    assert done.exit_code == 0
    assert [one.feature for one in head_of(workers).overrides] == ["video", "image"]


def test_worker_of_an_older_format_is_warned_of(workers: Workers) -> None:
    workers.format = 0
    workers.beat()

    result = run(workers, "close", "video", "--tier", "free", "--yes")

    assert result.exit_code == 0
    assert "note: app-1:4711, app-1:4711 cannot read it" in result.stdout


# --- Mistakes


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["close", "vidoe", "--tier", "free"], 'did you mean "video"?'),
        (["close", "video", "--tier", "fre"], 'did you mean "free"?'),
        (["close", "video", "--all", "--until", "2020-01-01T00:00:00Z"], "is past"),
        (["close", "video", "--tier", "new"], 'tieredlimit set video --tier new "10/day"'),
        (["open", "video", "--tier", "free"], "there is nothing to open"),
        (["close", "video", "--account", "u1", "--tier", "free"], "an account stands alone"),
        (["close", "video", "--account", ""], "not empty"),
        (["set", "video", "10/dya", "--tier", "free"], 'did you mean "day"?'),
        (["undo"], "nothing to undo"),
        (["undo", "--to", "7"], "nothing to undo"),
    ],
)
def test_operators_mistake_is_one_sentence(workers: Workers, words: list[str], told: str) -> None:
    result = run(workers, *words, "--yes")

    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert told in result.stderr
    assert head_of(workers) == NOTHING


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["close", "video"], "Say whom"),
        (["close", "video", "--all", "--tier", "new"], "--all is everybody"),
        (["close", "video", "--all", "--for", "1h", "--until", "23:00"], "--until or --for"),
        (["close", "video", "--all", "--for", "soon"], "write 90s, 30m"),
        (["close", "video", "--all", "--until", "tonight"], "write 18:00"),
        (["open", "video", "--all", "--percent", "101"], "from 0.01 to 100"),
        (["close", "video", "--all", "--message", "a", "--message", "b"], "two texts for no"),
        (["close", "video", "--all", "--message", "en=a", "--message", "EN=b"], 'language "EN"'),
        (["close", "video", "--all", "--message", "fr=a", "--message", "fr=b"], '"fr"'),
        (["set", "video", "{ rate = ", "--all"], "write it as in a policy file"),
        (["status", "--namespace", "No Good"], "1 to 32 of a-z"),
        (["status", "--redis", "http://x"], 'starts with "http"'),
    ],
)
def test_wrong_usage_is_exit_code_2(workers: Workers, words: list[str], told: str) -> None:
    result = run(workers, *words)

    assert result.exit_code == 2
    assert told in result.stderr


def test_no_redis_named_is_told() -> None:
    result = CliRunner().invoke(main, ["status"], env={"TIEREDLIMIT_REDIS": None})

    assert result.exit_code == 2
    assert "--redis URL, or TIEREDLIMIT_REDIS" in result.stderr


def test_no_policy_names_both_ways(redis_url: str) -> None:
    env = {"TIEREDLIMIT_REDIS": redis_url, "TIEREDLIMIT_POLICY": None}
    result = CliRunner().invoke(main, ["close", "video", "--all", "--yes"], env=env)

    assert result.exit_code == 1
    assert "--policy FILE" in result.stderr
    assert "tieredlimit policy push FILE" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["status"], ["overrides"], ["history"], ["doctor"], ["watch"], ["label"], ["undo", "--yes"],
        ["close", "video", "--all", "--yes"], ["policy", "show"], ["policy", "pull"],
        ["policy", "push", EXAMPLE, "--yes"], ["reset", "video", "--account", "u1", "--yes"],
        ["refund", "video", "--account", "u1", "--tokens", "1", "--yes"],
        ["explain", "--redis", "redis://127.0.0.1:1", "--feature", "video"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_redis_that_is_down_is_one_sentence(words: list[object]) -> None:
    result = run(Workers("redis://127.0.0.1:1"), *words)

    assert result.exit_code == 1
    assert result.stderr.startswith("Error: cannot connect to Redis")
    assert "Traceback" not in result.output


def test_hostile_contents_are_one_sentence(workers: Workers, redis_server: RedisServer) -> None:
    redis_server.command("SET", "tl:{team}:head", "\x1b[2Jgarbage")

    result = run(workers, "close", "video", "--all", "--yes")

    assert result.exit_code == 1
    assert result.stderr.startswith("Error: Redis holds what is no revision")
    assert "\x1b" not in result.stderr


def test_layout_of_another_format_is_refused(workers: Workers, redis_server: RedisServer) -> None:
    redis_server.command("SET", "tl:{team}:layout", "format 9, shards 1")

    result = run(workers, "close", "video", "--all", "--yes")

    assert result.exit_code == 1
    assert '"format 9, shards 1"' in result.stderr


def test_shards_are_those_that_the_workers_noted(
    workers: Workers, redis_server: RedisServer
) -> None:
    redis_server.command("SET", "tl:{team}:layout", "format 1, shards 3")

    assert as_json(workers, "close", "video", "--all", "--yes")["shards"] == 3


def test_every_command_stands_on_the_operators_page() -> None:
    page = (EXAMPLE.parents[1] / "docs" / "commands.md").read_text("utf-8")

    assert [
        name for name in main.commands if f"`{name}" not in page and f"{name} " not in page
    ] == []


# --- What is typed


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("2h", 7200), ("7d", 604_800), ("2w", 1_209_600),
     ("30 minutes", 1800), ("1 day", 86_400)],
)  # fmt: skip
def test_durations(text: str, seconds: int) -> None:
    assert duration(text) == seconds * SECOND


def test_time_of_day_is_resolved_on_the_day_of_the_server() -> None:
    noon = 20_000 * 86_400 * SECOND + 43_200 * SECOND

    assert moment("18:30").resolve(noon) == noon + 6 * 3600 * SECOND + 1800 * SECOND
    assert moment("2026-11-20T18:00:00Z").resolve(noon) == moment("2026-11-20T18:00:00Z").at


def test_percentages_are_exact() -> None:
    assert [percent(text) for text in ("10", "0.01", "12.5 %", "100%")] == [1000, 1, 1250, 10_000]


# --- What was left half-done


def test_shard_that_stays_deaf_does_not_stop_the_next_command(
    workers: Workers, redis_server: RedisServer
) -> None:
    run(workers, "close", "video", "--tier", "free", "--yes")
    redis_server.command("DEL", shard_key(TEAM, 0))
    redis_server.command("LPUSH", shard_key(TEAM, 0), "in the way")

    result = run(workers, "close", "video", "--tier", "pro", "--yes")

    assert result.exit_code == 4
    assert "it still has not: revision 1 is published" in result.stdout
    assert "run the same command again" in result.stderr
    assert head_of(workers).number == 2


def test_half_done_change_is_not_taken_for_one_that_is_only_alike(
    workers: Workers, redis_server: RedisServer
) -> None:
    run(workers, "close", "video", "--tier", "free", "--yes")
    redis_server.command("DEL", shard_key(TEAM, 0))

    opened = run(workers, "open", "video", "--tier", "free", "--yes")
    redis_server.command("DEL", shard_key(TEAM, 0))
    nothing = run(workers, "open", "video", "--tier", "pro", "--yes")

    assert opened.exit_code == 0
    assert head_of(workers).overrides == ()
    assert nothing.exit_code == 1
    assert "there is nothing to open" in nothing.stderr


def test_redis_that_goes_away_while_asked_is_told_and_nothing_was_done(
    own_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = Workers(own_server.url, "w1")
    workers.beat()
    monkeypatch.setattr(
        "tieredlimit.cli.publishing.require_consent", lambda *_, **__: own_server.kill()
    )

    result = run(workers, "close", "video", "--tier", "free", "--yes")

    assert result.exit_code == 1
    assert "Error: " in result.stderr
    assert "closed ·" not in result.output


def test_replicas_that_have_it_are_counted() -> None:
    fleet = Fleet(TEAM, "", NOTHING, [])
    change = Change(NOTHING)

    report = Report("closed", change, fleet, Published(NOTHING, 1, 2), 0, None, None, "")

    assert "on 2 replicas" in next(iter(report.lines()))


# --- Which override decides

NOW = 10**15
RULED = {
    "later": Override("later", 9, "close", "video", EVERYONE, begin_us=NOW + 1),
    "past": Override("past", 9, "close", "video", EVERYONE, end_us=NOW),
    "other": Override("other", 9, "close", "video", Who(account="u2")),
    "tier": Override("tier", 9, "close", "video", Who(tier="pro")),
    "plan": Override("plan", 9, "close", "video", Who(when=When(plan=frozenset({"pro"})))),
    "older": Override("older", 2, "close", "video", Who(tier="free")),
    "wide": Override("wide", 8, "close", "video", EVERYONE),
    "wins": Override("wins", 3, "set", "video", Who(tier="free"), quotas="7/day"),
    "ramp": Override("ramp", 4, "open", "video", Who(tier="free"), share=Share(0, NOW, SECOND)),
    "firm": Override("firm", 5, "close", "video", EVERYONE, no_exceptions=True),
    "image": Override("image", 9, "close", "image", EVERYONE),
}


def ruled(*ids: str) -> dict[str, str]:
    head = Revision(9, overrides=tuple(RULED[name] for name in ids))
    winner, rulings = rule(head, "video", Account("u1", "free"), "free", NOW)
    assert [one.override for one in rulings if one.wins] == ([winner] if winner else [])
    return {one.override.id: one.why for one in rulings}


def test_every_override_of_the_feature_gets_a_reason() -> None:
    why = ruled(*(name for name in RULED if name != "firm"))

    assert next(iter(why)) == "wins"
    assert why.pop("ramp").startswith("this one enters at 2001-09-09T01:46:4")
    assert why == {
        "wins": "it decides",
        "later": "not yet",
        "past": "over",
        "other": "this is another account",
        "tier": "this one is in tier free",
        "plan": "this one does not meet plan",
        "older": "wins is newer",
        "wide": "wins is more specific",
    }


def test_override_without_exceptions_is_the_reason() -> None:
    assert ruled("wins", "firm") == {
        "firm": "it decides",
        "wins": "firm is newer and without exceptions",
    }
    assert ruled("older", "wide", "firm") == {
        "wide": "it decides",
        "older": "a newer one without exceptions took it away",
        "firm": "wide is newer",
    }


def test_override_changes_the_cell_and_a_closure_only_what_is_said() -> None:
    policy = Policy.load(EXAMPLE)

    def cell(one: Override | None) -> Cell:
        return cell_under(policy, "free", "video", one)

    assert cell(RULED["wins"]).spell() == "7/day"
    assert cell(RULED["ramp"]) == cell(None) == policy.cell("free", "video")
    assert cell(RULED["wide"]).quotas == policy.cell("free", "video").quotas
    assert policy.cell("new", "video").messages
    assert cell_under(policy, "new", "video", RULED["wide"]).messages == {}
    assert policy_under(policy, cell(RULED["wins"])).cell("free", "video").spell() == "7/day"

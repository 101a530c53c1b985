"""`tieredlimit status`, `label`, `overrides`, `history` and `watch`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.servers import RedisServer
from tests.test_cli_control import SECOND, TEAM, Workers, as_json, label, run
from tieredlimit.backends.control import shard_key

DENIAL = {"feature": "video", "tier": "free", "reason": "closed", "account": "ab12"}


@pytest.fixture
def workers(redis_url: str) -> Workers:
    """Two living workers on a namespace where nothing was published."""
    living = Workers(redis_url, "w1", "w2", counted={"video/free": {"allowed": 3, "quota": 1}})
    living.beat()
    return living


# --- status, label


def test_status_is_one_line(workers: Workers) -> None:
    assert run(workers, "status").stdout == (
        "team · no label · redis ok · 2/2 workers on revision 0 · no overrides\n"
    )


def test_status_of_an_empty_namespace_is_no_failure(redis_url: str) -> None:
    result = run(Workers(redis_url), "status")

    assert result.exit_code == 0
    assert "no worker · revision 0" in result.stdout


def test_status_names_overrides_stragglers_and_shards(
    workers: Workers, redis_server: RedisServer
) -> None:
    run(workers, "close", "video", "--tier", "free", "--yes")
    run(workers, "close", "image", "--all", "--from", "2100-01-01T00:00:00Z", "--yes")
    workers.deaf = ("w2",)
    workers.beat()
    redis_server.command("DEL", shard_key(TEAM, 0))

    told = run(workers, "status").stdout.splitlines()

    assert told[0].endswith("1/2 workers on revision 2 · 2 overrides")
    assert told[1:] == [
        "  close-1: video closed for tier free",
        "  close-2: image closed for everyone, from 2100-01-01T00:00:00Z (scheduled)",
        "not on it: app-1:4711",
        "not heard by 1 shard yet: a worker, or the next change, finishes that",
    ]


def test_status_says_that_redis_has_lost_what_a_worker_holds(
    workers: Workers, redis_server: RedisServer
) -> None:
    run(workers, "close", "video", "--tier", "free", "--yes")
    redis_server.command("FLUSHALL")
    workers.beat()

    assert "Redis has lost revision 1, which app-1:4711" in run(workers, "status").stdout


def test_status_as_json(workers: Workers) -> None:
    run(workers, "close", "video", "--tier", "free", "--message", "Later.", "--yes")

    told = as_json(workers, "status")

    assert (told["namespace"], told["label"], told["shards_behind"]) == (TEAM, "", 0)
    assert (told["workers"]["live"], told["workers"]["following"]) == (2, 2)
    assert told["workers"]["list"][0]["id"] == "w1"
    assert told["revision"]["number"] == 1
    (one,) = told["overrides"]
    assert (one["state"], one["options"], one["messages"]) == (
        "in force",
        "--tier free",
        {"": "Later."},
    )


def test_label_is_shown_set_and_taken_away(workers: Workers) -> None:
    assert run(workers, "label").stdout == "team · no label\n"
    assert run(workers, "label", "staging").stdout == "team · staging\n"
    assert as_json(workers, "label") == {"namespace": "team", "label": "staging"}
    assert run(workers, "label", "").stdout == "team · no label\n"


def test_label_of_production_is_not_taken_away_unasked(workers: Workers) -> None:
    label(workers, "PRODUCTION")

    refused = run(workers, "label", "")
    agreed = run(workers, "label", "", typed=f"{TEAM}\n")

    assert refused.exit_code == 1
    assert agreed.stdout.endswith("team · no label\n")


def test_label_that_is_none_is_a_mistake(workers: Workers) -> None:
    result = run(workers, "label", "x" * 65)

    assert result.exit_code == 1
    assert "at most 64" in result.stderr


# --- overrides, history


def test_overrides_are_a_table(workers: Workers) -> None:
    assert run(workers, "overrides").stdout == "no overrides · revision 0\n"
    words = ["--actor", "ann", "--reason", "GPUs melt", "--yes"]
    run(workers, "close", "video", "--tier", "free", "--until", "2100-01-01T00:00:00Z", *words)
    run(workers, "set", "image", "1/minute", "--all", "--from", "2099-01-01T00:00:00Z", *words)

    head, first, second = run(workers, "overrides").stdout.splitlines()

    assert head.split() == ["id", "feature", "what", "who", "from", "until", "by", "why"]
    assert first.split()[:5] == ["close-1", "video", "closed", "tier", "free"]
    assert first.split()[-4:] == ["2100-01-01T00:00:00Z", "ann", "GPUs", "melt"]
    assert "set to 1/minute" in second
    assert "2099-01-01T00:00:00Z (scheduled)" in second


def test_narrow_terminal_lists_overrides_one_below_the_other(workers: Workers) -> None:
    from click.testing import CliRunner

    from tieredlimit.cli import main

    run(workers, "close", "video", "--tier", "free", "--yes", "--actor", "ann")
    env = {"TIEREDLIMIT_REDIS": workers.url, "TIEREDLIMIT_NAMESPACE": TEAM, "COLUMNS": "40"}
    lines = CliRunner().invoke(main, ["overrides"], env=env).stdout.splitlines()

    assert lines[0] == "id       close-1"
    assert "by       ann" in lines
    assert max(map(len, lines)) <= 40


def test_overrides_and_history_as_json(workers: Workers) -> None:
    run(workers, "close", "video", "--tier", "free", "--yes", "--actor", "ann", "--reason", "hot")

    listed, history = as_json(workers, "overrides"), as_json(workers, "history")

    assert listed["revision"] == 1
    assert [one["id"] for one in listed["overrides"]] == ["close-1"]
    (one,) = history["revisions"]
    assert (one["number"], one["actor"], one["reason"]) == (1, "ann", "hot")
    assert (one["change"], one["stored_policy"], one["overrides"]) == (
        "close video for tier free",
        False,
        1,
    )


def test_history_is_newest_first_and_bounded(workers: Workers) -> None:
    assert run(workers, "history").stdout == "nothing was ever published\n"
    for tier in ("free", "pro"):
        run(workers, "close", "video", "--tier", tier, "--yes")

    assert [line.split()[0] for line in run(workers, "history").stdout.splitlines()] == [
        "revision",
        "2",
        "1",
    ]
    assert len(run(workers, "history", "1").stdout.splitlines()) == 2


# --- watch


def aged(workers: Workers, redis_server: RedisServer) -> Workers:
    for name in workers.names:
        redis_server.command("ZINCRBY", "tl:{team}:workers", str(-SECOND), name)
    return workers


def test_watch_shows_rates_by_feature_tier_and_outcome(
    workers: Workers, redis_server: RedisServer
) -> None:
    result = run(aged(workers, redis_server), "watch", "--seconds", "1")

    banner, head, row = result.stdout.splitlines()
    assert result.exit_code == 0
    assert banner.startswith("team · no label · 2/2 workers on revision 0 · 20")
    assert head.split() == ["feature", "tier", "allowed/s", "quota/s"]
    assert row.split()[:2] == ["video", "free"]
    assert workers.seconds == 1.0


def test_watch_as_json_is_a_line_a_second_with_each_denial_once(
    workers: Workers, redis_server: RedisServer
) -> None:
    workers.denied = [{**DENIAL, "at": SECOND}]
    workers.names = ("w1",)
    workers.beat()
    workers.denied = [{**DENIAL, "at": SECOND}, {**DENIAL, "at": 2 * SECOND}, {"at": "odd"}, "odd"]  # type: ignore[list-item]  # what another release may send

    result = run(aged(workers, redis_server), "watch", "--seconds", "2", "--json")

    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert first["per_second"]["video/free"]["allowed"] == pytest.approx(3, rel=0.3)
    assert (first["namespace"], first["revision"]) == (TEAM, 0)
    assert first["denied"] == [{**DENIAL, "at": "1970-01-01T00:00:02Z"}]
    assert second["denied"] == []


@pytest.mark.parametrize("word", ["at", "at_us"])
def test_watch_shows_who_is_denied(workers: Workers, word: str) -> None:
    workers.denied = [{**DENIAL, word: SECOND, "account": "ab\x1b[2J"}]

    shown = run(workers, "watch", "--seconds", "1").stdout

    assert "denied 1970-01-01T00:00:01Z ab\\x1b[2J video in tier free: closed" in shown


def test_watch_goes_on_while_redis_does_not_answer(own_server: RedisServer) -> None:
    workers = Workers(own_server.url, "w1")
    workers.beat()

    async def pause(_: float) -> None:
        workers.waited += 1
        if workers.waited == 1:
            own_server.kill()
        else:
            own_server.restart()

    pace: Any = workers.pace()
    workers.pace = lambda **_: type(pace)(pace.clock, pause, pace.attended)  # type: ignore[method-assign]  # a server that dies
    result = run(workers, "watch", "--seconds", "2")

    assert result.exit_code == 0
    assert "no answer: " in result.stderr
    assert "no worker" in result.stdout


def test_watch_ends_quietly_when_interrupted(workers: Workers) -> None:
    async def pause(_: float) -> None:
        raise KeyboardInterrupt

    pace: Any = workers.pace()
    workers.pace = lambda **_: type(pace)(pace.clock, pause, pace.attended)  # type: ignore[method-assign]  # somebody at the keyboard

    assert run(workers, "watch").exit_code == 0

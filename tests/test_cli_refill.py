"""`tieredlimit reset` and `refund`: buckets of an account, on a real server."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from struct import pack
from typing import Any

import pytest

from tests.servers import RedisServer
from tests.test_cli_control import EXAMPLE, TEAM, Workers, as_json, label, run
from tieredlimit import Account, Decision, Limiter
from tieredlimit._core.keys import key_prefix
from tieredlimit._core.policy import Policy
from tieredlimit.backends import RedisBackend
from tieredlimit.backends.control import control_store
from tieredlimit.cli.refill import _REFUND

OLD = datetime(2020, 1, 1, tzinfo=UTC)
FREE = Account("u1", "free", OLD)
NEW = Account("u1", "free")


@pytest.fixture
def workers(redis_url: str) -> Workers:
    """Nobody works here, and nothing was published."""
    return Workers(redis_url)


def take(
    workers: Workers, account: Account, count: int, *, shards: int | None = None, peek: bool = False
) -> Decision:
    """Take so many images, one by one, and return the last decision."""

    async def take_all() -> Decision:
        limiter = Limiter(EXAMPLE, workers.url, namespace=TEAM, shards=shards)
        async with limiter:
            if peek:
                return await limiter.peek(account, "image")
            return [await limiter.take(account, "image") for _ in range(count)][-1]

    return asyncio.run(take_all())


def left(workers: Workers, account: Account) -> int | None:
    return take(workers, account, 0, peek=True).remaining


# --- reset


def test_reset_fills_the_buckets_of_every_tier(workers: Workers) -> None:
    take(workers, FREE, 15)
    take(workers, NEW, 5)
    other = Account("u2", "free", OLD)
    take(workers, other, 15)

    result = run(workers, "reset", "image", "--account", "u1", "--yes")

    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == (
        "reset · account u1 is full again for image · 2 keys of buckets dropped"
    )
    assert (left(workers, FREE), left(workers, NEW)) == (20, 5)
    assert (left(workers, other) or 0) < 15


@pytest.mark.parametrize(
    "words", [["--tier", "free"], ["--plan", "free", "--created", "2020-01-01"]]
)
def test_reset_of_a_tier_leaves_the_others(workers: Workers, words: list[str]) -> None:
    take(workers, FREE, 15)
    take(workers, NEW, 5)

    told = as_json(workers, "reset", "image", "--account", "u1", *words, "--yes")

    assert told["filled"] == 1
    assert {one["tier"] for one in told["looked_at"]} == {"free"}
    assert (left(workers, FREE), left(workers, NEW)) == (20, 0)


def test_reset_of_what_is_full_says_so(workers: Workers) -> None:
    result = run(workers, "reset", "image", "--account", "u1", "--yes")

    assert result.exit_code == 0
    assert "nothing to reset · account u1 has used nothing of image" in result.stdout


def test_reset_fills_what_an_override_has_charged(
    workers: Workers, redis_server: RedisServer
) -> None:
    run(workers, "set", "video", "7/day", "--tier", "new", "--yes")
    key = key_prefix(TEAM, 0, "video", "new", None) + "u1"
    redis_server.command("SET", key, "x" * 12)

    assert as_json(workers, "reset", "video", "--account", "u1", "--yes")["filled"] == 1


def test_reset_finds_the_shard_of_the_account(workers: Workers) -> None:
    within = Account("u1", "free", OLD, within={"org": "o7"})
    take(workers, within, 15, shards=16)

    unsure = run(workers, "reset", "image", "--account", "u1", "--yes")
    told = as_json(workers, "reset", "image", "--account", "u1", "--within", "org=o7", "--yes")

    assert unsure.exit_code == 1
    assert "say which with --within NAME=ID" in unsure.stderr
    assert told["filled"] == 1


def test_production_asks_before_a_reset(workers: Workers) -> None:
    label(workers, "PRODUCTION")
    take(workers, NEW, 5)

    refused = run(workers, "reset", "image", "--account", "u1", "--yes")

    assert refused.exit_code == 1
    assert left(workers, NEW) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["imag", "--account", "u1"], 'did you mean "image"?'),
        (["image", "--account", "u1", "--tier", "fre"], 'did you mean "free"?'),
        (["image", "--account", "u1", "--within", "orgs=o7"], 'did you mean "org"?'),
    ],
)
def test_mistake_is_one_sentence(workers: Workers, words: list[str], told: str) -> None:
    result = run(workers, "reset", *words, "--yes")

    assert result.exit_code == 1
    assert told in result.stderr


# --- refund


def test_refund_gives_tokens_back_in_the_tier_that_was_used(workers: Workers) -> None:
    take(workers, FREE, 15)

    told = as_json(workers, "refund", "image", "--account", "u1", "--tokens", "3", "--yes")

    assert told["tier"] == "free"
    (quota,) = told["quotas"]
    assert quota["quota"] == "image-minute"
    assert quota["debt_before"] - quota["debt_after"] == pytest.approx(9.0)
    assert left(workers, FREE) in (8, 9)


@pytest.mark.fault("A10")
def test_refund_never_goes_beyond_full(workers: Workers) -> None:
    take(workers, NEW, 5)

    told = as_json(workers, "refund", "image", "--account", "u1", "--tokens", "1000", "--yes")
    again = run(workers, "refund", "image", "--account", "u1", "--tokens", "1000", "--yes")

    assert [one["debt_after"] for one in told["quotas"]] == [0.0, 0.0]
    assert left(workers, NEW) == 5
    assert again.exit_code == 0
    assert "nothing to refund" in again.stdout


def test_refund_says_when_it_is_full(workers: Workers) -> None:
    take(workers, FREE, 15)

    result = run(workers, "refund", "image", "--account", "u1", "--tokens", "3", "--yes")

    assert "refunded · image-minute in tier free: full in 3" in result.stdout


def test_refund_in_several_tiers_asks_which(workers: Workers) -> None:
    take(workers, FREE, 15)
    take(workers, NEW, 5)
    words = ["refund", "image", "--account", "u1", "--tokens", "1", "--yes"]

    unsure, sure = run(workers, *words), run(workers, *words, "--tier", "new")

    assert unsure.exit_code == 1
    assert "has used image in the tiers new, free: say which with --tier" in unsure.stderr
    assert sure.exit_code == 0
    assert left(workers, NEW) == 1


def test_refund_of_an_unlimited_cell_is_nothing(workers: Workers) -> None:
    words = ["refund", "image", "--account", "u1", "--tokens", "1", "--tier", "pro", "--yes"]

    assert "nothing to refund" in run(workers, *words).stdout


# --- the script


def evaluate(workers: Workers, keys: list[str], *given: bytes) -> Any:
    async def ask() -> Any:
        store: Any = control_store(RedisBackend.from_url(workers.url), TEAM, 1)
        nodes = store._sessions.nodes()
        try:
            return await nodes.ask(keys[0], "EVAL", _REFUND, len(keys), *keys, *given)
        finally:
            await store.close()

    return asyncio.run(ask())


def test_refund_leaves_other_buckets_of_the_key_and_its_expiry(
    workers: Workers, redis_server: RedisServer
) -> None:
    take(workers, NEW, 5)
    minute, day = Policy.load(EXAMPLE).cell("new", "image").quotas
    key = key_prefix(TEAM, 0, "image", "new", None) + "u1"
    before: Any = redis_server.command("PTTL", key)

    told = evaluate(workers, [key], pack("<4sd", minute.tag, float(minute.window_us)))

    assert told[1] == 0
    assert redis_server.command("STRLEN", key) == 12
    after: Any = redis_server.command("PTTL", key)
    assert 0 <= before - after < 60_000  # of a day; Redis 6 does not tell the instant
    assert evaluate(workers, [key], pack("<4sd", day.tag, float(day.window_us)))[1] == 0
    assert redis_server.command("EXISTS", key) == 0


@pytest.mark.parametrize("held", ["garbage", None])
def test_refund_of_what_is_no_bucket_changes_nothing(
    workers: Workers, redis_server: RedisServer, held: str | None
) -> None:
    take(workers, NEW, 5)
    good, bad = (key_prefix(TEAM, 0, "image", "new", None) + name for name in ("u1", "u2"))
    if held:
        redis_server.command("SET", bad, held)
    else:
        redis_server.command("LPUSH", bad, "x")
    before = redis_server.command("GET", good)
    given = pack("<4sd", b"abcd", 1e6)

    from tieredlimit import BackendError

    with pytest.raises(BackendError):
        evaluate(workers, [good, bad], given, given)

    assert redis_server.command("GET", good) == before


def test_example_is_what_these_tests_take_it_for() -> None:
    assert Path(EXAMPLE).exists()
    assert Policy.load(EXAMPLE).cell("new", "image").spell() == "5/minute + 50/day"

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


@pytest.mark.parametrize("command", [["reset"], ["refund", "--tokens", "1"]], ids=lambda c: c[0])
def test_what_is_unused_in_one_tier_is_not_said_to_be_so_in_all(
    workers: Workers, command: list[str]
) -> None:
    take(workers, FREE, 15)

    result = run(workers, *command, "image", "--account", "u1", "--tier", "new", "--yes")

    assert "account u1 has used nothing of image in tier new\n" in result.stdout


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


# --- with a pool, and with slots

POOLED = """
order = ["new", "shut", "everyone"]
[features.video]
pool = { rate = "10/day", leave = { new = 2 }, concurrency = 9, lease = "1 hour" }
[features.clip]
pool = "cut"
[features.text]
[pools.cut]
rate = "1000/day"
slices = 4
[defaults]
quotas.text = "9/day"
quotas.clip = "9/day"
quotas.video = [
    { rate = "9/day", concurrency = 3, lease = "1 hour" },
    { rate = "99/day", per = "org", concurrency = 5, lease = "1 hour" },
]
[tiers.new]
when = { plan = "free" }
[tiers.shut]
when = { plan = "shut" }
quotas.video = 0
[tiers.everyone]
"""
WITHIN = Account("u1", "free", within={"org": "o7"})
YES = ("--account", "u1", "--yes")


@pytest.fixture
def pooled(tmp_path: Path) -> Path:
    path = tmp_path / "pooled.toml"
    path.write_text(POOLED, "utf-8")
    return path


def hold(
    workers: Workers, policy: Path, account: Account, feature: str, count: int, shards: int = 16
) -> Decision:
    """Take so many, one by one, and hold their slots; return what a take would get then."""

    async def take_all() -> Decision:
        async with Limiter(policy, workers.url, namespace=TEAM, shards=shards) as limiter:
            for _ in range(count):
                (await limiter.take(account, feature)).raise_if_denied()
            return await limiter.peek(account, feature)

    return asyncio.run(take_all())


def free_of(decision: Decision) -> dict[str, int | None]:
    """Return the tokens in each bucket, and in the pool."""
    left = {quota.name: quota.remaining for quota in decision.quotas}
    return left | ({decision.pool.name: decision.pool.remaining} if decision.pool else {})


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 16])
def test_reset_finds_the_shard_of_a_feature_s_pool(
    workers: Workers, pooled: Path, shards: int
) -> None:
    used = hold(workers, pooled, WITHIN, "video", 2, shards)
    words = ["--within", "org=o7", "--policy", pooled]

    told = as_json(workers, "reset", "video", *YES, *words)

    filled = hold(workers, pooled, WITHIN, "video", 0, shards)
    assert free_of(used) == {"video-day": 7, "video-day-org": 97, "video": 8}
    assert told["filled"] == 2
    assert free_of(filled) == {"video-day": 9, "video-day-org": 99, "video": 8}


@pytest.mark.parametrize("shards", [1, 16])
def test_reset_finds_each_slice_of_a_pool(workers: Workers, pooled: Path, shards: int) -> None:
    accounts = [Account(f"u{i}", within={"org": f"o{i}"}) for i in range(6)]
    for account in accounts:
        hold(workers, pooled, account, "clip", 2, shards)

    for i, account in enumerate(accounts):
        words = ["--account", account.id, "--within", f"org=o{i}", "--policy", pooled, "--yes"]

        assert as_json(workers, "reset", "clip", *words)["filled"] == 1
        assert hold(workers, pooled, account, "clip", 0, shards).remaining == 9


def test_whole_pool_has_one_shard_and_needs_no_subject_to_find_it(
    workers: Workers, pooled: Path
) -> None:
    hold(workers, pooled, NEW, "video", 2)
    hold(workers, pooled, NEW, "clip", 2)

    found = as_json(workers, "reset", "video", *YES, "--policy", pooled)
    unsure = run(workers, "reset", "clip", *YES, "--policy", pooled)

    assert found["filled"] == 2  # the second one stands in for the organisation
    assert unsure.exit_code == 1
    assert "say which with --within NAME=ID" in unsure.stderr


def test_feature_without_a_pool_is_where_its_account_is(workers: Workers, pooled: Path) -> None:
    hold(workers, pooled, WITHIN, "text", 2)

    told = as_json(workers, "reset", "text", *YES, "--within", "org=o7", "--policy", pooled)

    assert told["filled"] == 1
    assert hold(workers, pooled, WITHIN, "text", 0).remaining == 9


def test_reset_of_a_tier_at_zero_finds_what_an_override_has_charged(
    workers: Workers, pooled: Path
) -> None:
    hold(workers, pooled, NEW, "video", 0)  # its layout is noted
    run(workers, "set", "video", "7/day", "--tier", "shut", "--policy", pooled, "--yes")
    shut = Account("u1", "shut")
    hold(workers, pooled, shut, "video", 3)

    told = as_json(workers, "reset", "video", *YES, "--tier", "shut", "--policy", pooled)

    assert told["filled"] == 1
    assert hold(workers, pooled, shut, "video", 0).remaining == 7


def test_override_that_alone_charges_an_organisation_moves_the_account_s_buckets(
    workers: Workers, tmp_path: Path
) -> None:
    path = tmp_path / "plain.toml"
    path.write_text('[features.a]\n[tiers.t]\nquotas.a = "9/day"\n', "utf-8")
    accounts = [Account(f"u{i}", within={"org": f"team-{i}"}) for i in range(4)]
    hold(workers, path, accounts[0], "a", 0)
    per_org = '{ rate = "7/day", per = "org" }'
    run(workers, "set", "a", "8/day", per_org, "--all", "--policy", path, "--yes")

    for i, account in enumerate(accounts):
        hold(workers, path, account, "a", 2)
        words = ["--account", account.id, "--within", f"org=team-{i}", "--policy", path, "--yes"]

        assert as_json(workers, "reset", "a", *words)["filled"] == 2


def test_reset_leaves_slots_alone_and_says_how_many_are_held(
    workers: Workers, pooled: Path
) -> None:
    hold(workers, pooled, NEW, "video", 2)

    shown = run(workers, "reset", "video", *YES, "--policy", pooled).stdout.splitlines()

    after = hold(workers, pooled, NEW, "video", 0)
    assert shown[-2].startswith("reset · account u1 is full again for video")
    assert shown[-1] == "slots · 4 held, and left so: --slots frees them, too"
    assert [slot.held for slot in after.slots] == [2, 2, 2]


@pytest.mark.parametrize("shards", [1, 16])
def test_reset_frees_the_account_s_slots_and_not_the_pool_s(
    workers: Workers, pooled: Path, shards: int
) -> None:
    hold(workers, pooled, WITHIN, "video", 3, shards)
    other = Account("u2", "free", within={"org": "o8"})
    hold(workers, pooled, other, "video", 1, shards)
    words = ["--slots", "--within", "org=o7", "--policy", pooled]

    shown = run(workers, "reset", "video", *YES, *words).stdout.splitlines()

    after = hold(workers, pooled, WITHIN, "video", 0, shards)
    assert shown[1] == ("fill the buckets of account u1 for video in every tier, and free 6 slots")
    assert shown[-2:] == [
        "slots · 6 freed",
        "pool video · its slots stay held until their jobs or leases end",
    ]
    assert [slot.held for slot in after.slots] == [0, 0, 4]
    kept = hold(workers, pooled, other, "video", 0, shards)
    assert [slot.held for slot in kept.slots] == [1, 1, 4]


def test_reset_of_slots_of_one_tier_leaves_those_of_others(workers: Workers, pooled: Path) -> None:
    hold(workers, pooled, NEW, "video", 1)
    hold(workers, pooled, Account("u1"), "video", 2)
    words = ["reset", "video", *YES, "--slots", "--tier", "everyone", "--policy", pooled]

    told = as_json(workers, *words)
    again = run(workers, *words).stdout

    assert (told["slots_held"], told["slots_freed"]) == (4, 4)
    assert [slot.held for slot in hold(workers, pooled, NEW, "video", 0).slots] == [1, 1, 3]
    assert "nothing to reset" in again
    assert "slots · none was held" in again


def test_reset_without_slots_says_nothing_of_them(workers: Workers, pooled: Path) -> None:
    hold(workers, pooled, WITHIN, "text", 2)
    words = ["--within", "org=o7", "--policy", pooled]

    assert "slots" not in run(workers, "reset", "text", *YES, *words).stdout


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 16])
def test_refund_gives_back_to_the_account_and_not_to_the_pool(
    workers: Workers, pooled: Path, shards: int
) -> None:
    hold(workers, pooled, WITHIN, "video", 3, shards)
    words = ["--tokens", "2", "--within", "org=o7", "--policy", pooled]

    shown = run(workers, "refund", "video", *YES, *words).stdout.splitlines()
    told = as_json(workers, "refund", "video", *YES, *words)

    assert shown[1] == "give 2 tokens of video back to account u1, and none to pool video"
    assert shown[-1] == "pool video · stays as it is: only the account was given back to"
    assert (told["tier"], told["pool"]) == ("new", "video")
    after = hold(workers, pooled, WITHIN, "video", 0, shards)
    assert free_of(after) == {"video-day": 9, "video-day-org": 99, "video": 7}


def test_refund_says_nothing_of_a_pool_where_there_is_none(workers: Workers, pooled: Path) -> None:
    hold(workers, pooled, WITHIN, "text", 3)
    words = ["--tokens", "2", "--within", "org=o7", "--policy", pooled]

    shown = run(workers, "refund", "text", *YES, *words).stdout

    assert "refunded · text-day in tier new" in shown
    assert "pool" not in shown


@pytest.mark.parametrize("words", [["--slots"], ["--tokens", "1"]])
def test_slots_go_with_reset_and_tokens_with_refund(workers: Workers, words: list[str]) -> None:
    verb = "refund" if words == ["--slots"] else "reset"

    result = run(workers, verb, "image", *YES, *words)

    assert result.exit_code == 2
    assert words[0] in result.stderr


# --- the script


def evaluate(workers: Workers, keys: list[str], *given: bytes) -> Any:
    async def ask() -> Any:
        store: Any = control_store(RedisBackend.from_url(workers.url), TEAM, 1)
        nodes = store._sessions.nodes()
        try:
            return await nodes.ask(keys[0], "EVAL", _REFUND, len(keys), *keys, *given, "")
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

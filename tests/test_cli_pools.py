"""What the commands say of pools and slots: from files alone, and of a real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.servers import RedisServer
from tests.test_cli_control import SECOND, TEAM, Workers, as_json, run
from tieredlimit import Account, Decision, Limiter
from tieredlimit._core.demands import PoolPart
from tieredlimit._core.keys import LEASES, key_prefix
from tieredlimit._core.policy import Policy
from tieredlimit.cli import main

# Slow, so that nothing refills while a test looks.
POOLED = """
order = ["new", "pro", "shut", "everyone"]

[features.video]
routes = { "POST /v1/videos" = 1, "POST /v1/videos/hd" = 8 }
outage = "deny"
pool = "gpu"
refund_on = [502, 500]

[features.clip]
routes = ["POST /v1/clips"]
pool = "gpu"

[features.image]
routes = ["POST /v1/images"]
pool = { rate = "4/day", leave = { new = 3 } }

[features.text]
routes = ["POST /v1/texts"]

[pools.gpu]
rate = "20/day"
concurrency = 4
lease = "10 minutes"
leave = { new = "50%", everyone = 5 }

[defaults]
quotas.video = { rate = "1000/day", concurrency = 2, lease = "5 minutes" }
quotas.clip = "unlimited"
quotas.image = "9/day"
quotas.text = "9/day"

[tiers.new]
when = { plan = "free" }
messages.clip = "Pros first."

[tiers.pro]
when = { plan = "pro" }

[tiers.shut]
when = { plan = "shut" }
quotas.video = 0
quotas.clip = 0

[tiers.everyone]
"""
SLICED = POOLED.replace(
    '[pools.gpu]\nrate = "20/day"\nconcurrency = 4\n',
    '[pools.gpu]\nrate = "400/day"\nslices = 2\nconcurrency = 8\n',
)
NEW = Account("u1", "free")
PRO = Account("p1", "pro")


@pytest.fixture
def pooled(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(POOLED, "utf-8")
    return path


@pytest.fixture
def sliced(tmp_path: Path) -> Path:
    path = tmp_path / "sliced.toml"
    path.write_text(SLICED, "utf-8")
    return path


@pytest.fixture
def workers(redis_url: str) -> Workers:
    """Two living workers on a namespace where nothing was published."""
    living = Workers(redis_url, "w1", "w2")
    living.beat()
    return living


Take = tuple[Account, str, int]


def take(
    url: str, policy: Path, takes: Sequence[Take], *, shards: int | None = None
) -> list[Decision]:
    """Take one after the other, and hold what slots that gives."""

    async def take_all() -> list[Decision]:
        async with Limiter(policy, url, namespace=TEAM, shards=shards) as limiter:
            return [await limiter.take(*one) for one in takes]

    return asyncio.run(take_all())


def offline(*words: object, columns: int = 300) -> Result:
    return CliRunner().invoke(
        main,
        [str(word) for word in words],
        env={"COLUMNS": str(columns), "TIEREDLIMIT_REDIS": None, "TIEREDLIMIT_NAMESPACE": None},
    )


def gpu_key(policy: Path, shards: int = 1) -> str:
    pool = Policy.load(policy).features["video"].pool
    assert pool is not None
    return PoolPart.of(pool, "", TEAM, shards).shelves[0].prefix


# --- table


def test_table_lists_what_each_tier_leaves_and_reaches_of_a_pool(pooled: Path) -> None:
    page = offline("table", pooled).stdout

    assert page.split("\n\n")[1].splitlines() == [
        "pool gpu: 20/day cap 20, 4 slots with a lease of 10 minutes; for video, clip",
        "tier      leaves       reaches",
        "new       10, 2 slots  10, 2 slots",
        "pro       0, 0 slots   20, 4 slots",
        "shut      -            0: its cells are 0",
        "everyone  5, 0 slots   15, 4 slots",
    ]
    assert page.split("\n\n")[2].splitlines() == [
        "pool image: 4/day cap 4; for image",
        "tier      leaves  reaches",
        "new       3       1",
        "pro       0       4",
        "shut      0       4",
        "everyone  0       4",
    ]


def test_table_of_some_features_and_tiers_lists_their_pools_only(pooled: Path) -> None:
    words = ["--feature", "image", "--feature", "text", "--tier", "new"]

    page = offline("table", pooled, *words).stdout

    assert "pool gpu" not in page
    assert page.splitlines()[-2:] == ["tier  leaves  reaches", "new   3       1"]
    assert "pool" not in offline("table", pooled, "--feature", "text").stdout


def test_table_keeps_pools_within_a_narrow_terminal(sliced: Path) -> None:
    page = offline("table", sliced, columns=40).stdout

    assert "in 2 slices of 200" in " ".join(page.split())
    assert max(map(len, page.splitlines())) <= 40


def test_table_shows_the_levels_of_the_redis_that_is_named(workers: Workers, pooled: Path) -> None:
    take(workers.url, pooled, [(PRO, "video", 8), (PRO, "clip", 5)])

    page = run(workers, "table", pooled).stdout

    assert page.split("\n\n")[1].splitlines()[1:] == [
        "now 7 of 20 tokens, 2 of 4 slots held",
        "tier      leaves       reaches             can take now",
        "new       10, 2 slots  10, 2 slots         0, 0 slots",
        "pro       0, 0 slots   20, 4 slots         7, 2 slots",
        "shut      -            0: its cells are 0  0",
        "everyone  5, 0 slots   15, 4 slots         2, 2 slots",
    ]


@pytest.mark.parametrize("shards", [1, 16])
def test_table_of_a_sliced_pool_shows_the_sum_and_the_emptiest(
    workers: Workers, sliced: Path, shards: int
) -> None:
    accounts = [Account(f"p{i}", "pro") for i in range(6)]
    takes = [(account, "clip", 10) for account in accounts]
    take(workers.url, sliced, takes, shards=shards)

    told = as_json(workers, "table", sliced)["pools"]["gpu"]

    now = told["now"]
    assert (told["slices"], told["capacity"]) == (2, 400)
    assert sum(now["slices"]) == now["tokens"] == 340
    assert max(now["slices"]) < 200
    assert (now["slots_held"], now["slots"]) == (6, 8)
    # Each slice keeps its own part of what must be left.
    assert now["can_take"]["new"]["tokens"] == 340 - 200
    page = run(workers, "table", sliced).stdout
    assert f"now 340 of 400 tokens, {min(now['slices'])} of 200 in the emptiest slice" in page


def test_table_as_json_has_pools_without_a_redis_too(pooled: Path) -> None:
    told = json.loads(offline("table", pooled, "--json").stdout)["pools"]["gpu"]

    assert told["now"] is None
    assert (told["capacity"], told["window"]) == (20, 86_400.0)
    assert (told["concurrency"], told["lease"], told["slices"]) == (4, 600.0, 1)
    assert told["features"] == ["video", "clip"]
    assert told["tiers"]["new"] == {
        "leaves": 10,
        "reaches": 10,
        "leaves_slots": 2,
        "reaches_slots": 2,
        "zero": False,
    }
    assert told["tiers"]["shut"]["zero"]


def test_table_whose_redis_is_away_is_printed_unless_its_levels_were_asked_for(
    pooled: Path,
) -> None:
    away = "redis://127.0.0.1:1"
    env = {"TIEREDLIMIT_REDIS": away, "COLUMNS": "300"}

    by_environment = CliRunner().invoke(main, ["table", str(pooled)], env=env)
    asked_for = offline("table", pooled, "--redis", away)
    without_pools = offline("table", pooled, "--feature", "text", "--redis", away)

    assert by_environment.exit_code == 0
    assert "leaves" in by_environment.stdout
    assert "how the pools stand is unknown: cannot connect" in by_environment.stderr
    assert (asked_for.exit_code, asked_for.stdout) == (1, "")
    assert without_pools.exit_code == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--namespace", "x"], "Say which Redis"),
        (["--namespace", "X Y", "--redis", "redis://127.0.0.1:1"], "a namespace is 1 to 32"),
        (["--redis", "http://127.0.0.1"], "'--redis'"),
    ],
)
def test_table_says_which_option_is_wrong(pooled: Path, words: list[str], told: str) -> None:
    result = offline("table", pooled, *words)

    assert result.exit_code == 2
    assert told in result.stderr


def test_table_notes_a_namespace_that_nobody_uses_and_another_stored_policy(
    workers: Workers, pooled: Path, sliced: Path
) -> None:
    unused = run(workers, "table", pooled)
    run(workers, "policy", "push", sliced, "--yes")
    other = run(workers, "table", pooled)

    assert f'no worker has ever used the namespace "{TEAM}"' in unused.stderr
    assert "the policy that is stored (revision 1) has other pools" in other.stderr
    assert "other pools" not in run(workers, "table", sliced).stderr


def test_pool_that_cannot_be_read_is_unknown_and_the_others_are_told(
    workers: Workers, pooled: Path, redis_server: RedisServer
) -> None:
    redis_server.command("LPUSH", gpu_key(pooled), "x")

    page = run(workers, "table", pooled).stdout
    told = as_json(workers, "table", pooled)["pools"]

    assert "now unknown: " in page
    assert "now 4 of 4 tokens" in page
    assert "WRONGTYPE" in told["gpu"]["now"]["error"]


def test_policy_show_lists_the_pools_in_force(workers: Workers, pooled: Path) -> None:
    take(workers.url, pooled, [(PRO, "video", 8)])
    words = ["policy", "show", "--policy", pooled]

    page = run(workers, *words).stdout

    assert "now 12 of 20 tokens, 1 of 4 slots held" in page
    assert as_json(workers, *words)["pools"]["gpu"]["now"]["tokens"] == 12


# --- explain


def explain(workers: Workers, policy: Path, *words: object) -> list[str]:
    result = run(workers, "explain", "--policy", policy, *words)
    assert result.exit_code == 0, result.output
    return [line.strip() for line in result.stdout.splitlines()]


def test_explain_of_files_says_what_the_tier_leaves_and_reaches(pooled: Path) -> None:
    result = offline("explain", pooled, "--plan", "free", "POST", "/v1/videos/hd")

    page = [line.strip() for line in result.stdout.splitlines()]
    assert "2 slots, each free 5 minutes after its last renewal" in page
    at = page.index(
        "pool      gpu: 20/day cap 20, 4 slots with a lease of 10 minutes; for video, clip"
    )
    assert page[at + 1 : at + 3] == [
        "tier new leaves 10 tokens and 2 slots, and reaches 10 tokens and 2 slots",
        "answer    allowed if the bucket and pool gpu are full and a slot is free, 1 time in a row",
    ]
    assert (
        "refund    a request that is answered with 500, 502 costs nothing; "
        "a request whose handler raises costs nothing"
    ) in page


def test_explain_of_an_unlimited_cell_counts_its_pool_as_a_limit(pooled: Path) -> None:
    pro = offline("explain", pooled, "--plan", "pro", "--feature", "clip", "--cost", 10).stdout
    new = offline("explain", pooled, "--plan", "free", "--feature", "clip").stdout

    assert "allowed if pool gpu is full and a slot is free, 2 times in a row" in pro
    assert "used up   429 Too Many Requests, with:" in new
    assert "any language: Pros first." in new
    assert "outage    allowed, and not counted" in pro


def test_explain_of_a_cost_that_no_pool_has_says_that_it_never_fits(pooled: Path) -> None:
    words = ["--plan", "free", "--feature", "clip", "--cost", 11]

    result = offline("explain", pooled, *words)
    told = json.loads(offline("explain", pooled, *words, "--json").stdout)

    assert (
        "429 Too Many Requests: it costs 11, and tier new never gets at more than 10 of pool gpu: "
        "it never fits"
    ) in result.stdout
    assert "the same while Redis cannot answer" in result.stdout
    assert (told["answer"]["reason"], told["answer"]["status"]) == ("pool", 429)


def test_explain_shows_the_level_and_the_slots_of_now(workers: Workers, pooled: Path) -> None:
    take(workers.url, pooled, [(PRO, "video", 3), (NEW, "video", 1)])

    page = explain(workers, pooled, "--account", "u1", "--plan", "free", "POST", "/v1/videos")

    at = page.index(
        "now 16 of 20 tokens, 2 of 4 slots held: tier new can take 6 tokens and 0 slots"
    )
    assert page[at + 1 : at + 4] == [
        "not in the way of 1 token",
        "slots     video-day: 1 of 2 held by the account",
        "pool gpu: 2 held, and tier new may fill 2: in the way, for none is free",
    ]
    assert (
        "answer    429 Too Many Requests: all 2 slots that tier new may fill in pool gpu are held"
    ) in page
    assert page[-1] == "outage    503 Service Unavailable while Redis cannot answer"


def test_explain_says_when_a_cost_fits_the_pool(workers: Workers, pooled: Path) -> None:
    take(workers.url, pooled, [(Account("p1", "pro"), "clip", 9)])
    words = ["--account", "u9", "--plan", "free", "--feature", "clip", "--cost", 2]

    page = "\n".join(explain(workers, pooled, *words))
    told = as_json(workers, "explain", "--policy", pooled, *words)

    assert "in the way: 2 tokens fit in 1 hour 1" in page
    assert (
        "it costs 2, and pool gpu holds 11, of which tier new must leave 10: it fits in 1 hou"
        in page
    )
    assert told["pool"]["slice"]["denies"]
    assert told["pool"]["slice"]["retry_after"] == pytest.approx(4_320, abs=60)
    assert told["answer"]["reason"] == "pool"
    assert told["answer"]["body"]["detail"] == "Pros first."
    assert 4_200 < int(told["answer"]["headers"]["retry-after"]) <= 4_320
    assert told["slots"] == [{"name": "gpu", "pool": True, "limit": 2, "held": 1, "denies": False}]


def test_explain_counts_the_account_s_own_slots_first(workers: Workers, pooled: Path) -> None:
    take(workers.url, pooled, [(NEW, "video", 1), (NEW, "video", 1)])
    words = ["--account", "u1", "--plan", "free", "--feature", "video"]

    page = explain(workers, pooled, *words)
    told = as_json(workers, "explain", "--policy", pooled, *words)

    assert "answer    429 Too Many Requests: video-day has 2 slots, and 2 are held" in page
    assert told["answer"]["reason"] == "concurrency"
    assert told["answer"]["body"]["violated-policies"] == ["video-day"]
    assert (told["refund_on"], told["refund_on_exception"]) == ([500, 502], True)


def test_explain_decides_as_a_worker_does(workers: Workers, pooled: Path) -> None:
    take(workers.url, pooled, [(NEW, "video", 5), (PRO, "clip", 4)])

    for account, plan, feature, cost in [
        ("u1", "free", "video", 1),
        ("p1", "pro", "video", 11),
        ("p1", "pro", "video", 12),
        ("e1", "other", "clip", 6),
        ("e1", "other", "clip", 7),
        ("u2", "free", "image", 1),
        ("u2", "free", "image", 2),
    ]:
        words = ["--account", account, "--plan", plan, "--feature", feature, "--cost", cost]
        told = as_json(workers, "explain", "--policy", pooled, *words)["answer"]

        async def peek(who: Account, what: str, tokens: int) -> Decision:
            async with Limiter(pooled, workers.url, namespace=TEAM) as limiter:
                return await limiter.peek(who, what, tokens)

        decided = asyncio.run(peek(Account(account, plan), feature, cost))
        assert (told["allowed"], told["reason"]) == (decided.allowed, decided.reason), words


def test_explain_without_an_account_says_what_depends_on_it(workers: Workers, sliced: Path) -> None:
    take(workers.url, sliced, [(PRO, "video", 1)])

    nobody = explain(workers, sliced, "--plan", "pro", "--feature", "video")
    told = as_json(workers, "explain", "--policy", sliced, "--plan", "pro", "--feature", "video")
    named = explain(workers, sliced, "--account", "p1", "--plan", "pro", "--feature", "video")

    assert "which slice it is depends on the account: say which with --account" in nobody
    assert "slots     video-day: 2 at once; say with --account whose are held" in nobody
    assert told["pool"]["slice"] is None
    assert [one["held"] for one in told["slots"]] == [None, None]
    assert "the account's slice holds 199 tokens, of which 0 must stay" in named
    assert "slots     video-day: 1 of 2 held by the account" in named
    assert "its slice of pool gpu: 1 held, and tier pro may fill 4" in named


@pytest.mark.parametrize("shards", [1, 16])
def test_explain_finds_slots_on_the_shard_of_the_pool(
    workers: Workers, sliced: Path, shards: int
) -> None:
    accounts = [Account(f"p{i}", "pro") for i in range(4)]
    take(workers.url, sliced, [(one, "video", 1) for one in accounts], shards=shards)

    for account in accounts:
        words = ["--account", account.id, "--plan", "pro", "--feature", "video"]
        (own, _) = as_json(workers, "explain", "--policy", sliced, *words)["slots"]
        assert own["held"] == 1


def test_explain_as_of_another_instant_asks_nobody(workers: Workers, pooled: Path) -> None:
    take(workers.url, pooled, [(PRO, "clip", 20)])
    words = ["--account", "u1", "--feature", "clip", "--at", "2030-01-01"]

    page = explain(workers, pooled, *words)

    assert not [line for line in page if line.startswith("now ")]
    assert "answer    allowed if pool gpu is full and a slot is free, 15 times in a row" in page


def test_explain_of_what_is_closed_shows_the_pool_all_the_same(
    workers: Workers, pooled: Path
) -> None:
    run(workers, "close", "clip", "--all", "--yes", "--policy", pooled)
    take(workers.url, pooled, [(PRO, "video", 3)])

    page = explain(workers, pooled, "--account", "u1", "--feature", "clip")

    assert "answer    403 Forbidden: an override closes it until further notice" in page
    assert any(line.startswith("now 17 of 20 tokens") for line in page)


def test_explain_of_a_tier_at_zero_says_nothing_of_the_pool(workers: Workers, pooled: Path) -> None:
    page = explain(workers, pooled, "--account", "s1", "--plan", "shut", "--feature", "clip")

    assert "answer    403 Forbidden: this tier has 0, and no waiting helps" in page
    assert not [line for line in page if line.startswith(("pool", "slots", "refund"))]


def test_explain_of_a_pool_that_cannot_be_read_goes_on_without(
    workers: Workers, pooled: Path, redis_server: RedisServer
) -> None:
    redis_server.command("LPUSH", gpu_key(pooled), "x")

    page = explain(workers, pooled, "--account", "u1", "--feature", "clip")

    assert any(line.startswith("now unknown: ") for line in page)
    assert "answer    allowed if pool gpu is full and a slot is free, 15 times in a row" in page


def test_slots_that_cannot_be_read_are_one_sentence(
    workers: Workers, pooled: Path, redis_server: RedisServer
) -> None:
    key = key_prefix(TEAM, 0, "video", "pro" + LEASES, None) + "p1"
    redis_server.command("SET", key, "x")
    account = ["--account", "p1", "--plan", "pro", "--policy", pooled]

    explained = run(workers, "explain", *account, "--feature", "video")
    reset = run(workers, "reset", "video", *account, "--yes")

    for result in (explained, reset):
        assert result.exit_code == 1
        assert "WRONGTYPE" in result.stderr


def test_explain_of_a_tier_with_slots_and_no_pool(workers: Workers, tmp_path: Path) -> None:
    path = tmp_path / "slots.toml"
    path.write_text(
        "[features.a]\n[tiers.t]\n"
        'quotas.a = { rate = "9/day", per = "org", concurrency = 2, lease = "1 hour" }\n',
        "utf-8",
    )
    take(workers.url, path, [(Account("u2", within={"org": "o7"}), "a", 1)])

    page = explain(workers, path, "--within", "org=o7", "--feature", "a")

    assert "slots     a-day-org: 1 of 2 held by org o7" in page
    assert not [line for line in page if line.startswith("pool")]


# --- watch


def test_watch_has_a_line_for_each_pool(workers: Workers, pooled: Path) -> None:
    take(workers.url, pooled, [(PRO, "video", 3), (PRO, "image", 3)])

    shown = run(workers, "watch", "--seconds", "1", "--policy", pooled).stdout.splitlines()

    free = "can take now: new 7, 1 slot; pro, shut 17, 3 slots; everyone 12, 3 slots"
    assert shown[-2:] == [
        f"pool gpu: 17 of 20 tokens, 1 of 4 slots held · {free}",
        "pool image: 1 of 4 tokens · can take now: new 0; pro, shut, everyone 1",
    ]


def test_watch_as_json_follows_the_level(workers: Workers, pooled: Path) -> None:
    charged = [0]

    async def pause(seconds: float) -> None:
        workers.seconds += seconds
        async with Limiter(pooled, workers.url, namespace=TEAM) as limiter:
            await limiter.take(PRO, "video", 4)
        charged[0] += 4

    pace: Any = workers.pace()
    workers.pace = lambda **_: type(pace)(pace.clock, pause, pace.attended)  # type: ignore[method-assign]  # takes go on
    result = run(workers, "watch", "--seconds", "2", "--json", "--policy", pooled)

    first, second = (json.loads(line)["pools"]["gpu"] for line in result.stdout.splitlines())
    assert (first["tokens"], second["tokens"]) == (16, 12)
    assert (first["slots_held"], second["slots_held"], second["slots"]) == (1, 2, 4)
    assert second["can_take"]["new"] == {"tokens": 2, "slots": 0}
    assert second["can_take"]["pro"] == {"tokens": 12, "slots": 2}
    assert second["capacity"] == 20


def test_watch_finds_pools_on_a_cluster(cluster_url: str, sliced: Path) -> None:
    workers = Workers(cluster_url)
    accounts = [Account(f"p{i}", "pro") for i in range(4)]
    take(cluster_url, sliced, [(one, "video", 5) for one in accounts])

    result = run(workers, "watch", "--seconds", "1", "--json", "--policy", sliced)

    told = json.loads(result.stdout)["pools"]["gpu"]
    assert (told["tokens"], told["slots_held"]) == (380, 4)


def test_watch_without_a_policy_says_so_once(workers: Workers) -> None:
    env = {"TIEREDLIMIT_REDIS": workers.url, "TIEREDLIMIT_NAMESPACE": TEAM, "COLUMNS": "300"}
    words = ["watch", "--seconds", "3"]

    result = CliRunner().invoke(main, words, obj=workers.pace(), env=env)

    assert result.exit_code == 0
    assert result.stderr.count("pools are not shown: no policy is stored") == 1


def test_watch_takes_up_the_policy_that_is_pushed_meanwhile(workers: Workers, pooled: Path) -> None:
    env = {"TIEREDLIMIT_REDIS": workers.url, "TIEREDLIMIT_NAMESPACE": TEAM, "COLUMNS": "300"}
    pace: Any = workers.pace()

    async def pause(_: float) -> None:
        if workers.waited == 1:
            words = ["policy", "push", pooled, "--yes"]
            pushed = await asyncio.to_thread(run, Workers(workers.url), *words)
            assert pushed.exit_code == 3  # nobody follows
        workers.waited += 1

    watching = type(pace)(pace.clock, pause, pace.attended)
    result = CliRunner().invoke(main, ["watch", "--seconds", "2", "--json"], obj=watching, env=env)

    first, second = (json.loads(line)["pools"] for line in result.stdout.splitlines())
    assert first == {}
    assert second["gpu"]["tokens"] == 20


def test_watch_of_a_faulty_policy_file_tells_its_faults(workers: Workers, tmp_path: Path) -> None:
    path = tmp_path / "faulty.toml"
    path.write_text(POOLED.replace('"20/day"', '"20/month"'), "utf-8")

    result = run(workers, "watch", "--seconds", "1", "--policy", path)

    assert result.exit_code == 1
    assert "pools.gpu.rate" in result.stderr


def test_watch_shows_what_it_can_of_broken_pools(
    workers: Workers, pooled: Path, redis_server: RedisServer
) -> None:
    redis_server.command("SET", gpu_key(pooled), "x")

    result = run(workers, "watch", "--seconds", "1", "--policy", pooled)

    assert "pool gpu: unknown: " in result.stdout
    assert "pool image: 4 of 4 tokens" in result.stdout


def test_slot_whose_lease_is_over_is_not_counted(
    workers: Workers, pooled: Path, redis_server: RedisServer
) -> None:
    take(workers.url, pooled, [(PRO, "video", 1), (PRO, "video", 1)])
    pool = Policy.load(pooled).features["video"].pool
    assert pool is not None
    (slot,) = PoolPart.of(pool, "", TEAM, 1).slots or ()
    listed: Any = redis_server.command("ZRANGE", slot.key, "0", "0")
    redis_server.command("ZADD", slot.key, str(SECOND), listed[0])

    assert as_json(workers, "table", pooled)["pools"]["gpu"]["now"]["slots_held"] == 1


# --- check


def test_check_counts_the_pools(pooled: Path) -> None:
    page = offline("check", pooled).stdout

    assert "4 tiers x 4 features, 11 quotas, 5 routes, 2 pools" in page
    assert json.loads(offline("check", pooled, "--json").stdout)["pools"] == 2

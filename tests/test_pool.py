"""Pools and refunds: what a policy says about capacity that accounts share."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from tests.policies import with_feature
from tieredlimit import Account, Policy, PolicyError
from tieredlimit._core.bucket import debit
from tieredlimit._core.difference import Difference, diff
from tieredlimit._core.pool import ROOM_OF_A_SLICE, Pool
from tieredlimit._core.quota import parse_quota_rate
from tieredlimit._core.rate import SECOND_US
from tieredlimit._core.reading import spell
from tieredlimit._core.table import Table

TIERS = ("new", "free", "everyone")
GPU = {"rate": "600/minute"}
SLOTS = {"concurrency": 40, "lease": "10 minutes"}


def document(pools: object = None, **features: object) -> dict[str, Any]:
    """Return a document of three tiers, with these pools and features."""
    said: dict[str, Any] = {
        "order": list(TIERS),
        "features": features,
        "defaults": {"quotas": dict.fromkeys(features, "unlimited")},
        "tiers": {"new": {"when": {"plan": "new"}}, "free": {"when": {"plan": "free"}}},
    }
    said["tiers"]["everyone"] = {}
    return said if pools is None else {**said, "pools": pools}


def faults(said: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(PolicyError) as caught:
        Policy.from_dict(said)
    return {fault.path: fault.message for fault in caught.value.faults}


def warnings(said: dict[str, Any]) -> list[str]:
    return [str(warning) for warning in Policy.from_dict(said).warnings]


def pool_of(said: dict[str, Any], feature: str = "video") -> Pool:
    pool = Policy.from_dict(said).features[feature].pool
    assert pool is not None
    return pool


def pool(routes: object = (), **said: object) -> Pool:
    """Return the pool of a feature whose own table says this."""
    return pool_of(document(video={"routes": routes or [], "pool": {**GPU, **said}}))


def pool_faults(routes: object = (), **said: object) -> dict[str, str]:
    found = faults(document(video={"routes": routes or [], "pool": {**GPU, **said}}))
    return {path.removeprefix("features.video.pool."): told for path, told in found.items()}


# --- What a pool says


def test_pool_is_a_bucket_of_which_every_tier_may_take_all() -> None:
    found = pool()

    assert (found.name, found.quota.capacity) == ("video", 600)
    assert found.quota.interval_us == SECOND_US // 10
    assert [found.reach(tier) for tier in TIERS] == [600, 600, 600]
    assert pool(capacity=50).reach("new") == 50


def test_tier_reaches_what_it_must_not_leave() -> None:
    found = pool(leave={"new": "50%", "free": 120})

    assert {tier: found.reach(tier) for tier in TIERS} == {"new": 300, "free": 480, "everyone": 600}
    assert {tier: found.left_by(tier) for tier in TIERS} == {"new": 300, "free": 120, "everyone": 0}


@pytest.mark.parametrize(
    ("capacity", "left", "tokens"),
    [
        (3, "50%", 2),
        (3, "0.0001%", 1),
        (1_000_000, "0.0001%", 1),
        (1_000_001, "0.0001%", 2),
        (3, "66.6666%", 2),
        (600, "33.3 %", 200),
        (600, "05%", 30),
        (3, "0%", 0),
        (3, 0, 0),
        (3, 2, 2),
    ],
)
def test_part_of_a_token_that_must_be_left_is_left_whole(
    capacity: int, left: object, tokens: int
) -> None:
    assert pool(capacity=capacity, leave={"new": left}).left_by("new") == tokens


@pytest.mark.parametrize("left", ["100%", "100.0 %", 600, 1_000_000_000, "99.9999%"])
def test_tier_that_must_leave_everything_is_refused(left: object) -> None:
    (told,) = pool_faults(leave={"new": left, "free": 599}).items()

    assert told[0] == "leave.new"
    assert told[1].endswith(
        "of 600 leaves nothing to take; for never, write 0 in the tier's quotas"
    )


@pytest.mark.parametrize(
    "left",
    [-1, 1.5, True, None, "50", "half", "101%", "50%%", "-5%", "1e1%", 10**9 + 1, [], "\uff15%"],
)
def test_what_must_be_left_is_tokens_or_a_share(left: object) -> None:
    assert pool_faults(leave={"new": left}) == {
        "leave.new": f'got {spell(left)}; write a number of tokens, or a share such as "50%"'
    }


def test_unknown_tier_in_leave_is_a_fault_with_the_nearest() -> None:
    assert pool_faults(leave={"fre": "5%", "zzz": 5, 7: 5}) == {
        "leave.fre": 'unknown tier "fre"; did you mean "free"?',
        "leave.zzz": 'unknown tier "zzz"',
        "leave.7": "unknown tier 7",
    }


@pytest.mark.parametrize(
    ("said", "path", "told"),
    [
        ({"rate": 5}, "rate", 'got 5; write a rate such as "600/minute"'),
        ({"rate": "unlimited"}, "rate", 'got "unlimited"; write a rate'),
        ({"rate": "5/month"}, "rate", "write 30 days"),
        ({"rate": "1/day", "capacity": 3_651}, "rate", "a capacity of 3,650"),
        ({"capacity": 0}, "capacity", "from 1 to 1,000,000,000, got 0"),
        ({"capcity": 5}, "capcity", 'unknown key "capcity"; did you mean "capacity"?'),
        ({"per": "org"}, "per", 'unknown key "per"'),
        ({"leave": "50%"}, "leave", 'must be a table, got "50%"'),
        ({"slices": 0}, "slices", "must be a whole number from 1 to 1,024, got 0"),
        ({"slices": 1_025}, "slices", "must be a whole number from 1 to 1,024, got 1025"),
        ({"concurrency": 5}, "lease", "is missing: concurrency needs it"),
        ({"lease": "1 hour"}, "concurrency", "is missing: lease needs it"),
        ({"concurrency": 5, "lease": "2 days"}, "lease", "a lease is at most 1 day"),
    ],
)
def test_wrong_pool_is_told_with_place_value_and_bound(
    said: dict[str, object], path: str, told: str
) -> None:
    found = pool_faults(**said)

    assert list(found) == [path]
    assert told in found[path]


def test_pool_needs_a_rate() -> None:
    assert faults(document(video={"pool": {}})) == {
        "features.video.pool.rate": 'is missing; write a rate such as "600/minute"'
    }


def test_every_fault_of_a_pool_is_told_at_once() -> None:
    said = {
        "rate": "5/mont",
        "capacity": 0,
        "leave": {"fre": 5, "new": "half"},
        "slices": 0,
        "lease": "1 hour",
        "size": 5,
    }

    assert pool_faults(**said).keys() == {
        "rate", "capacity", "slices", "concurrency", "size", "leave.fre", "leave.new",
    }  # fmt: skip


def test_rounding_of_a_pool_is_a_warning_at_its_rate() -> None:
    (told,) = warnings(document(video={"pool": {"rate": "29500/second"}}))

    assert told.startswith('features.video.pool.rate: "29500/second" is 0.30% off once rounded')


# --- Which features take from it


def test_features_that_name_a_pool_share_it() -> None:
    policy = Policy.from_dict(
        document({"gpu": GPU}, image={"pool": "gpu"}, video={"pool": "gpu"}, audio={})
    )

    pools = {name: feature.pool for name, feature in policy.features.items()}
    assert pools["image"] is pools["video"] is not None
    assert pools["video"].name == "gpu"
    assert pools["audio"] is None


def test_features_with_pools_of_their_own_share_none() -> None:
    policy = Policy.from_dict(document(image={"pool": GPU}, video={"pool": GPU}))

    assert [feature.pool.name for feature in policy.features.values() if feature.pool] == [
        "image",
        "video",
    ]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("gpus", 'unknown pool "gpus"; did you mean "gpu"?'),
        ("zzz", 'unknown pool "zzz"'),
        ("", 'unknown pool ""'),
        (5, "must be a table, or the name of one under [pools], got 5"),
        (None, "must be a table, or the name of one under [pools], got nothing"),
        (["gpu"], "must be a table, or the name of one under [pools], got a list"),
    ],
)
def test_pool_of_a_feature_is_a_table_or_a_name(said: object, told: str) -> None:
    assert faults(document({"gpu": GPU}, video={"pool": said}, image={"pool": "gpu"})) == {
        "features.video.pool": told
    }


def test_pool_of_another_feature_cannot_be_named() -> None:
    assert faults(document(video={"pool": GPU}, image={"pool": "video"})) == {
        "features.image.pool": 'unknown pool "video"'
    }


def test_own_pool_of_a_feature_cannot_have_the_name_of_a_declared_one() -> None:
    assert faults(document({"video": GPU}, video={"pool": GPU}, image={"pool": "video"})) == {
        "features.video.pool": '[pools.video] has this feature\'s name; write pool = "video"'
    }

    assert pool_of(document({"video": GPU}, video={"pool": "video"})).name == "video"


@pytest.mark.parametrize("name", ["GPU", "a" * 33, "", "a.b", 7])
def test_name_of_a_pool_is_1_to_32_of_few_characters(name: object) -> None:
    (told,) = faults(document({name: GPU}, video={})).values()

    assert told == f"got {spell(name)}; a name is 1 to 32 of a-z, 0-9, _ and -"


def test_fault_of_a_shared_pool_is_told_once_and_hides_none_of_its_features() -> None:
    features = {name: {"pool": "gpu", "outage": "x"} for name in ("image", "video")}

    assert faults(document({"gpu": {}}, **features)).keys() == {
        "pools.gpu.rate", "features.image.outage", "features.video.outage",
    }  # fmt: skip


def test_pool_that_no_feature_uses_is_a_warning() -> None:
    assert warnings(document({"gpu": GPU, "cpu": GPU}, video={"pool": "cpu"})) == [
        "pools.gpu: no feature uses this pool"
    ]
    assert warnings(document({}, video={})) == []


def test_route_that_costs_more_than_a_tier_reaches_is_a_warning_at_the_pool() -> None:
    video = {"routes": {"POST /a": 1, "POST /b": 400, "POST /c": 700}, "pool": "gpu"}
    image = {"routes": {"POST /d": 500}, "pool": "gpu"}
    all_there_is = {"routes": {"POST /e": 600, "POST /f": 300}, "pool": "gpu"}
    gpu = {**GPU, "leave": {"new": "50%", "free": 120}}

    said = document({"gpu": gpu}, video=video, image=image, rest=all_there_is)

    assert warnings(said) == [
        'pools.gpu: "POST /b" costs 400, and tier new gets at 300 at most',
        'pools.gpu: "POST /c" costs 700, never fits a pool of 600',
        'pools.gpu: "POST /d" costs 500, and tier new gets at 300 at most',
        'pools.gpu: "POST /d" costs 500, and tier free gets at 480 at most',
        'pools.gpu: "POST /e" costs 600, and tier new gets at 300 at most',
        'pools.gpu: "POST /e" costs 600, and tier free gets at 480 at most',
    ]


def test_warning_of_a_pool_that_stands_in_its_feature_is_there() -> None:
    said = document(video={"routes": {"POST /a": 9}, "pool": {"rate": "8/minute"}})

    assert warnings(said) == ['features.video.pool: "POST /a" costs 9, never fits a pool of 8']


# --- Slices


@pytest.mark.fault("A13")
@pytest.mark.parametrize(("slices", "tokens"), [(16, 18), (30, 10), (601, 0)])
def test_slice_that_is_too_small_is_refused_with_what_works(slices: int, tokens: int) -> None:
    costs = {"POST /a": 1, "POST /b": 2}

    assert pool_faults(costs, leave={"new": "50%", "free": 9}, slices=slices) == {
        "slices": f"one of {slices} slices has {tokens} tokens beyond what must be left in it, "
        "and needs 20: 10 times the largest cost; 15 slices work"
    }
    assert pool(costs, leave={"new": "50%", "free": 9}, slices=15).slices == 15


@pytest.mark.fault("A13")
def test_pool_too_small_for_two_slices_is_best_left_whole() -> None:
    (told,) = pool_faults(capacity=19, slices=3).values()

    assert told.endswith("has 6 tokens beyond what must be left in it, and needs 10: 10 times the "
                         "largest cost; leave it whole")  # fmt: skip


@pytest.mark.fault("A13")
def test_largest_cost_of_all_features_of_a_pool_counts() -> None:
    image, video = {"pool": "gpu"}, {"pool": "gpu", "routes": {"POST /a": 31}}
    said = document({"gpu": {**GPU, "slices": 2}}, image=image, video=video)

    assert list(faults(said)) == ["pools.gpu.slices"]

    video["routes"] = {"POST /a": 30}
    assert pool_of(said).slices == 2


@pytest.mark.fault("A13")
def test_slices_of_a_pool_that_no_feature_uses_yet_are_checked() -> None:
    assert list(faults(document({"gpu": {**GPU, "slices": 61}}, video={}))) == ["pools.gpu.slices"]


@pytest.mark.fault("A13")
@pytest.mark.parametrize(
    ("slots", "leave", "works"),
    [
        (3, {}, "3 slices work"),
        (11, {"new": "50%"}, "5 slices work"),
        (15, {"new": "50%", "free": "75%"}, "3 slices work"),
        (3, {"new": "50%"}, "leave it whole"),
    ],
)
def test_slice_without_a_slot_to_take_is_refused_with_what_works(
    slots: int, leave: dict[str, str], works: str
) -> None:
    found = pool_faults(concurrency=slots, lease="1 hour", leave=leave, slices=6)

    assert found == {"slices": f"one of 6 slices has no slot to take; {works}"}


def test_slices_are_equal_parts_of_all_that_a_pool_has() -> None:
    found = pool(leave={"new": "50%", "free": 7}, slices=4, **SLOTS)

    part = found.slice
    assert (part.capacity, part.concurrency, part.lease_us) == (150, 10, 600 * SECOND_US)
    assert part.interval_us == 4 * found.quota.interval_us
    assert part.window_us == found.quota.window_us
    assert [found.seen_by(tier).leave for tier in TIERS] == [75, 2, 0]
    assert [found.seen_by(tier).concurrency for tier in TIERS] == [5, 10, 10]


rates = st.builds(
    "{}/{} {}".format,
    st.integers(1, 2_000),
    st.integers(1, 60),
    st.sampled_from(["second", "minute", "hour"]),
)
shares = st.builds("{}.{:04}%".format, st.integers(0, 99), st.integers(0, 9_999))


@pytest.mark.fault("A13")
@given(
    rate=rates,
    capacity=st.none() | st.integers(1, 50) | st.integers(1_000, 100_000),
    leave=st.dictionaries(st.sampled_from(TIERS), shares | st.integers(0, 900), max_size=2),
    slices=st.sampled_from([1, 2, 3, 7, 16]) | st.integers(1, 64),
    cost=st.integers(1, 20),
    slots=st.none() | st.integers(1, 10) | st.integers(50, 900),
)
def test_slices_together_never_exceed_the_pool_and_every_tier_gets_what_it_reaches(
    rate: str,
    capacity: int | None,
    leave: dict[str, Any],
    slices: int,
    cost: int,
    slots: int | None,
) -> None:
    said: dict[str, Any] = {"rate": rate, "leave": leave, "slices": slices}
    if capacity is not None:
        said["capacity"] = capacity
    if slots is not None:
        said |= {"concurrency": slots, "lease": "1 hour"}
    try:
        found = pool({"POST /a": cost}, **said)
    except PolicyError:
        event("refused")
        return
    event("sliced" if slices > 1 else "whole")

    parsed, whole, interval_us, _ = parse_quota_rate(rate, capacity)
    part = found.slice
    assert slices * part.capacity <= whole == found.quota.capacity
    assert slices * Fraction(1, part.interval_us) == Fraction(1, interval_us)
    assert Fraction(1, interval_us) <= Fraction(parsed.amount, parsed.period_us)
    assert part.window_us <= found.quota.window_us
    for tier in TIERS:
        left = leave.get(tier, 0)
        share = Fraction(left.removesuffix("%")) / 100 if isinstance(left, str) else None
        tokens = left if share is None else share * whole
        assert tokens <= found.left_by(tier) < tokens + 1
        assert 1 <= found.reach(tier) == whole - found.left_by(tier)
        seen = found.seen_by(tier)
        assert slices * seen.leave >= found.left_by(tier)
        reach = seen.capacity - seen.leave
        assert slices * reach <= found.reach(tier)
        assert slices == 1 or reach >= ROOM_OF_A_SLICE * cost
        assert debit(seen, 0, 0, reach) is not None
        assert debit(seen, 0, 0, reach + 1) is None
        if slots is not None:
            assert seen.concurrency is not None
            assert part.concurrency is not None
            assert 1 <= seen.concurrency <= part.concurrency - (share or 0) * part.concurrency
            assert slices * part.concurrency <= slots


def test_accounts_are_spread_over_the_slices_and_stay_on_theirs() -> None:
    table = Table(Policy.from_dict(document(video={"pool": {**GPU, "slices": 4}})), "test", 16)

    places = {}
    for i in range(400):
        account = Account(f"u{i}")
        entry = table.find(account, "video", 0)
        assert entry is not None
        shard, part = places[i] = table.place_of(account, entry)
        assert table.place_of(Account(f"u{i}"), entry) == (shard, part)

    shares = [part for _, part in places.values()]
    assert {part for _, part in places.values()} == {0, 1, 2, 3}
    assert len(set(places.values())) == 4
    assert min(shares.count(part) for part in range(4)) > 50


def test_features_of_a_pool_are_on_one_shard_for_every_account() -> None:
    table = Table(
        Policy.from_dict(document({"gpu": GPU}, image={"pool": "gpu"}, video={"pool": "gpu"})),
        "test",
        shards=16,
    )

    places = set()
    for i in range(50):
        account = Account(f"u{i}")
        for feature in ("image", "video"):
            entry = table.find(account, feature, 0)
            assert entry is not None
            places.add(table.place_of(account, entry))

    assert len(places) == 1


# --- Slots of a pool


def test_share_that_must_be_left_is_one_of_slots_too() -> None:
    found = pool(leave={"new": "50%", "free": "33%"}, concurrency=5, lease="1 hour")

    assert {tier: found.seen_by(tier).concurrency for tier in TIERS} == {
        "new": 2, "free": 3, "everyone": 5,
    }  # fmt: skip


def test_tokens_that_must_be_left_are_none_of_slots() -> None:
    assert pool(leave={"new": 590}, concurrency=5, lease="1 hour").seen_by("new").concurrency == 5


def test_tier_that_must_leave_every_slot_is_refused() -> None:
    assert pool_faults(leave={"new": "50%", "free": "49%"}, concurrency=1, lease="1 hour") == {
        "leave.new": "50% of 1 slots leaves none to take",
        "leave.free": "49% of 1 slots leaves none to take",
    }


# --- Refunds


@pytest.mark.parametrize(
    ("said", "statuses", "on_exception"),
    [
        ({}, set(), False),
        ({"refund_on": []}, set(), False),
        ({"refund_on": [500, 502, 500]}, {500, 502}, True),
        ({"refund_on": [400, 599]}, {400, 599}, False),
        ({"refund_on": [500], "refund_on_exception": False}, {500}, False),
        ({"refund_on": [503], "refund_on_exception": True}, {503}, True),
        ({"refund_on_exception": True}, set(), True),
    ],
)
def test_exception_costs_nothing_where_a_500_does_unless_the_policy_says_so(
    said: dict[str, object], statuses: set[int], on_exception: bool
) -> None:
    feature = Policy.from_dict(with_feature(**said)).features["image"]

    assert feature.refund_on == statuses
    assert feature.refund_on_exception is on_exception
    assert feature.refunds is (on_exception or bool(statuses))


@pytest.mark.parametrize(
    ("said", "path", "told"),
    [
        ({"refund_on": 500}, "refund_on", "must be a list of statuses such as [500, 503], got 500"),
        ({"refund_on": "500"}, "refund_on", 'must be a list of statuses such as [500, 503], got "'),
        ({"refund_on": [503, 399]}, "refund_on[1]", "a whole number from 400 to 599, got 399"),
        ({"refund_on": [600]}, "refund_on[0]", "a whole number from 400 to 599, got 600"),
        ({"refund_on": ["503"]}, "refund_on[0]", 'a whole number from 400 to 599, got "503"'),
        ({"refund_on": [True]}, "refund_on[0]", "a whole number from 400 to 599, got true"),
        ({"refund_on_exception": 1}, "refund_on_exception", "must be true or false, got 1"),
        ({"refund_on_exception": "no"}, "refund_on_exception", 'must be true or false, got "no"'),
    ],
)
def test_wrong_refund_is_told_with_place_and_value(
    said: dict[str, object], path: str, told: str
) -> None:
    found = faults(with_feature(**said))

    assert list(found) == [f"features.image.{path}"]
    assert told in found[f"features.image.{path}"]


# --- What a change of it is


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [str(one) for one in diff(Policy.from_dict(before), Policy.from_dict(after))]


def test_change_of_a_pool_is_shown_at_every_feature_that_takes_from_it() -> None:
    features = {"image": {"pool": "gpu"}, "video": {"pool": "gpu"}, "audio": {}}
    before = document({"gpu": {**GPU, "leave": {"new": "50%"}}}, **features)
    after = document({"gpu": {**GPU, "capacity": 900, "leave": {"new": "60%"}}}, **features)

    told = "gpu: 600/minute cap 600, leaving new 50% -> gpu: 600/minute cap 900, leaving new 60%"
    assert changes(before, after) == [
        f"features.image.pool: {told}",
        f"features.video.pool: {told}",
    ]


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (None, GPU, "added: video: 600/minute cap 600"),
        (GPU, None, "removed: video: 600/minute cap 600"),
        (GPU, "gpu", "video: 600/minute cap 600 -> gpu: 600/minute cap 600"),
        (GPU, {**GPU, "slices": 3},
         "video: 600/minute cap 600 -> video: 600/minute cap 600, in 3 slices"),
        (GPU, {**GPU, "leave": {"new": "12.5%", "free": 9}},
         "video: 600/minute cap 600 -> video: 600/minute cap 600, leaving new 12.5%, free 9"),
        (GPU, {**GPU, **SLOTS},
         "video: 600/minute cap 600 -> video: 600/minute cap 600, 40 at once"),
        ({**GPU, **SLOTS}, {**GPU, **SLOTS, "lease": "1 hour"},
         ("video: 600/minute cap 600, 40 at once for 10 minutes -> "
          "video: 600/minute cap 600, 40 at once for 1 hour")),
    ],
)  # fmt: skip
def test_change_of_a_features_pool_is_shown(before: object, after: object, told: str) -> None:
    was, will = (
        document({"gpu": GPU}, video={"pool": one} if one else {}, image={"pool": "gpu"})
        for one in (before, after)
    )

    assert changes(was, will) == [f"features.video.pool: {told}"]
    assert changes(will, will) == []


def test_pool_that_is_only_written_in_another_order_is_no_change() -> None:
    before, after = (
        document(video={"pool": {**GPU, "leave": leave}})
        for leave in ({"new": "50%", "free": 9}, {"free": 9, "new": "50%"})
    )

    assert changes(before, after) == []


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({}, {"refund_on": [503, 500]}, "added: 500, 503, an exception"),
        ({"refund_on": [503]}, {}, "removed: 503"),
        ({"refund_on": [500]}, {"refund_on": [500], "refund_on_exception": False},
         "500, an exception -> 500"),
    ],
)  # fmt: skip
def test_change_of_refunds_is_shown(
    before: dict[str, object], after: dict[str, object], told: str
) -> None:
    assert changes(with_feature(**before), with_feature(**after)) == [
        f"features.image.refund_on: {told}"
    ]
    assert changes(with_feature(**after), with_feature(**after)) == []


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({}, {"concurrency": 3, "lease": "1 hour"}, "9/minute -> 9/minute, 3 at once"),
        ({"concurrency": 3, "lease": "1 hour"}, {"concurrency": 4, "lease": "1 hour"},
         "9/minute, 3 at once -> 9/minute, 4 at once"),
        ({"concurrency": 3, "lease": "1 hour"}, {"concurrency": 3, "lease": "90 seconds"},
         "9/minute, 3 at once for 1 hour -> 9/minute, 3 at once for 90 seconds"),
        ({"concurrency": 3, "lease": "1 hour"}, {"concurrency": 3, "lease": "2 hours", "name": "x"},
         ("9/minute, 3 at once for 1 hour named video-minute -> "
          "9/minute, 3 at once for 2 hours named x (hands out at most 9 tokens per account)")),
    ],
)  # fmt: skip
def test_change_of_a_quotas_slots_is_shown(
    before: dict[str, object], after: dict[str, object], told: str
) -> None:
    was, will = (
        {**document(video={}), "defaults": {"quotas": {"video": {"rate": "9/minute", **said}}}}
        for said in (before, after)
    )

    assert changes(was, will) == [f"tiers.{tier}.quotas.video: {told}" for tier in TIERS]


def test_added_pool_hands_out_nothing_to_an_account() -> None:
    before, after = (Policy.from_dict(document(video=said)) for said in ({}, {"pool": GPU}))

    assert diff(before, after) == [
        Difference("features.video.pool", None, "video: 600/minute cap 600", grants=0)
    ]


# --- Several files


def load(folder: Path, *texts: str) -> Policy:
    paths = [folder / f"{i}.toml" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, "utf-8")
    return Policy.load(*paths)


BASE = """
order = ["new", "everyone"]
[pools.gpu]
rate = "600/minute"
capacity = 300
leave = { new = "50%", everyone = 9 }
[features.video]
pool = { rate = "60/minute", capacity = 50, leave = { new = "50%" } }
refund_on = [500, 503]
[features.image]
pool = "gpu"
[defaults]
quotas = { video = "5/minute", image = { rate = "9/minute", concurrency = 3, lease = "1 hour" } }
[tiers.new]
when = { plan = "new" }
[tiers.everyone]
"""


def test_overlay_merges_declared_pools_and_what_must_be_left_in_them(tmp_path: Path) -> None:
    above = '[pools.gpu]\nrate = "900/minute"\nleave.new = 40\n[pools.cpu]\nrate = "5/minute"\n'

    policy = load(tmp_path, BASE, above)

    gpu = policy.features["image"].pool
    assert gpu is not None
    assert gpu.spell() == "900/minute cap 300, leaving new 40, everyone 9"
    (warning,) = policy.warnings
    assert str(warning) == f"pools.cpu: no feature uses this pool ({tmp_path / '1.toml'})"


def test_overlay_replaces_a_features_own_pool_and_its_refunds_whole(tmp_path: Path) -> None:
    above = '[features.video]\npool = { rate = "90/minute" }\nrefund_on = [502]\n'

    video = load(tmp_path, BASE, above).features["video"]

    assert video.pool is not None
    assert video.pool.spell() == "90/minute cap 90"
    assert video.refund_on == {502}
    assert video.refund_on_exception is False


def test_overlay_gives_a_feature_another_pool_and_leaves_the_rest_of_it(tmp_path: Path) -> None:
    video = load(tmp_path, BASE, '[features.video]\npool = "gpu"\n').features["video"]

    assert video.pool is not None
    assert video.pool.name == "gpu"
    assert video.refund_on == {500, 503}


def test_overlay_replaces_a_quota_with_slots_whole(tmp_path: Path) -> None:
    above = '[defaults]\nquotas.image = { rate = "8/minute" }\n'

    cell = load(tmp_path, BASE, above).cell("new", "image")

    assert cell.spell() == "8/minute"


def test_fault_of_a_merged_pool_names_the_file_that_says_it(tmp_path: Path) -> None:
    base, above = (str(tmp_path / f"{i}.toml") for i in range(2))

    with pytest.raises(PolicyError) as caught:
        load(
            tmp_path,
            BASE.replace("everyone = 9", "evryone = 9"),
            '[pools.gpu]\nrate = 5\nleave.new = "x"\n',
        )

    files = {fault.path: fault.message.rpartition(" (")[2] for fault in caught.value.faults}
    assert files == {
        "pools.gpu.leave.new": f"{above})",
        "pools.gpu.leave.evryone": f"{base})",
        "pools.gpu.rate": f"{above})",
    }


@pytest.mark.parametrize("name", ["leave", "pool", "pools", "gpu"])
def test_overlay_merges_pools_whatever_their_names(tmp_path: Path, name: str) -> None:
    base = (
        f'[pools.{name}]\nrate = "6/minute"\nleave = {{ {name} = 1 }}\n'
        f'[features.{name}]\npool = "{name}"\n[tiers.{name}]\nquotas.{name} = "5/minute"\n'
    )

    found = load(tmp_path, base, f"[pools.{name}]\ncapacity = 9\n").features[name].pool

    assert found is not None
    assert found.spell() == f"6/minute cap 9, leaving {name} 1"

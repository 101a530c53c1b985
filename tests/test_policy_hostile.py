"""Whatever a document holds, reading it gives a policy or a PolicyError, never anything else."""

from __future__ import annotations

import math
from copy import deepcopy
from datetime import UTC, date, datetime, time
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.policies import (
    EVERY_WORD,
    SMALLEST,
    valid_documents,
    with_cell,
    with_feature,
    with_whens,
)
from tieredlimit import Account, Policy, PolicyError
from tieredlimit._core import cells, condition, document, features, pool, rows
from tieredlimit._core.table import Table

WORDS = [
    *document.WORDS, *features.WORDS, *rows.WORDS, *cells.WORDS, *condition.WORDS, *pool.WORDS,
    "image", "video", "everyone", "new", "gpu", "50%", "100%", "0.0001%",
    "unlimited", "allow", "local", "POST /v1/images", "GET /{x:path}", "5/minute", "5/month",
    "7 days", "2026-11-20T18:00:00Z", "en", "", "9" * 5_000 + "/day", "9" * 5_000 + "%", "\x00",
    "\ud800", "{", "a.b",
]  # fmt: skip
EXTREMES = [
    math.nan, math.inf, -math.inf, 10**400, 10**9, 10**9 + 1, 2**63, -1, 0, 1,
    True, False, None, datetime(2026, 11, 20, tzinfo=UTC), datetime.min, datetime.max,  # noqa: DTZ901 -- their edge
    date(2026, 11, 20), time(18), b"bytes", {1, 2}, (1, 2), frozenset(), Decimal("NaN"), object(),
    1j, range(3), ..., int,
]  # fmt: skip

# Python refuses to write these out, and Hypothesis writes out what it drew.
UNSPEAKABLE = [10**5_000, -(10**5_000), [10**5_000]]

words = st.sampled_from(WORDS)
leaves = words | st.sampled_from(EXTREMES) | st.text(max_size=8) | st.integers() | st.floats()
keys = words | st.text(max_size=8) | st.integers() | st.none() | st.tuples(st.integers())
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=25,
)


def read(value: Any) -> Policy | None:
    """Return the policy, None where it has faults; anything else is raised."""
    try:
        policy = Policy.from_dict(value)
    except PolicyError as exc:
        told = exc
    else:
        _use(policy)
        return policy
    assert told.faults
    for fault in told.faults:
        assert fault.message
        assert len(str(fault)) < 3_000
        assert "\n" not in str(fault)
        str(fault).encode()
    return None


def _use(policy: Policy) -> None:
    """Do with a policy what a request and an operator do."""
    table = Table(policy, "test")
    account = Account("u1", plan="free", within={"org": "o7"})
    tier = table.tier_of(account, 0)
    for tier_read in policy.tiers:
        for word in tier_read.when.words() if tier_read.when else ():
            assert tier_read.when is not None
            assert tier_read.when.spell(word)
        for shared in (one.pool for one in policy.features.values() if one.pool):
            assert shared.spell()
            assert shared.seen_by(tier_read.name).leave < shared.slice.capacity
            assert shared.seen_by(tier_read.name).concurrency != 0
    for entry in table.row(tier).values():
        assert entry.cell.spell()
        assert all(shelf.key(account) for shelf in entry.shelves)
        for text in entry.cell.messages.values():
            text.encode()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to every part of a document."""
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            found += places(inner, (*path, i))
    return found


def change(value: Any, path: tuple[Any, ...], how: str, what: Any, key: Any) -> Any:
    """Return the document with one part replaced, removed, renamed or added to."""
    if not path:
        return what
    inner = value
    for step in path[:-1]:
        inner = inner[step]
    last = path[-1]
    if how == "replace":
        inner[last] = what
    elif how == "remove":
        del inner[last]
    elif how == "rename" and isinstance(inner, dict):
        inner[key] = inner.pop(last)
    elif isinstance(inner[last], dict):
        inner[last][key] = what
    elif isinstance(inner[last], list):
        inner[last].append(what)
    else:
        inner[last] = [inner[last], what]
    return value


@given(values)
def test_any_value_is_a_policy_or_a_policy_error(value: Any) -> None:
    read(value)


@given(
    st.dictionaries(st.sampled_from(["image", "video", "x y"]), values, max_size=3),
    st.dictionaries(st.sampled_from(["new", "everyone", "x y"]), values, max_size=3),
    values,
    values,
)
def test_any_features_tiers_defaults_and_order_are_a_policy_or_a_policy_error(
    some_features: Any, some_tiers: Any, defaults: Any, order: Any
) -> None:
    read({"features": some_features, "tiers": some_tiers, "defaults": defaults, "order": order})


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=400)
@given(st.data())
def test_valid_document_changed_anywhere_is_a_policy_or_a_policy_error(data: st.DataObject) -> None:
    value: Any = valid_documents()[data.draw(st.sampled_from(list(valid_documents())))]
    for _ in range(data.draw(st.integers(1, 3))):
        if not isinstance(value, dict):
            break
        path = data.draw(st.sampled_from(places(value)[1:]) if value else st.just(()))
        how = data.draw(st.sampled_from(["replace", "remove", "rename", "add"]))
        value = change(value, path, how, data.draw(values), data.draw(keys))

    read(value)


@pytest.mark.parametrize("path", places(EVERY_WORD), ids=lambda path: ".".join(map(str, path)))
def test_every_place_takes_every_extreme(path: tuple[Any, ...]) -> None:
    for extreme in [*EXTREMES, *UNSPEAKABLE, *WORDS, [], {}, [[]], {"x": {}}, {7: 7}]:
        read(change(deepcopy(EVERY_WORD), path, "replace", extreme, ""))


@given(values)
@example([{"rate": "5/minute", "per": ["org"]}])
@example([["5/minute"], {}])
def test_any_cell_is_a_policy_or_a_policy_error(cell: Any) -> None:
    read(with_cell(cell))


@given(st.dictionaries(st.sampled_from(pool.WORDS) | keys, values), values)
@example({"rate": "5/minute", "leave": {7: "50%"}}, ["gpu"])
@example({"rate": "5/minute", "concurrency": 9, "lease": "1 day", "slices": 1_024}, "gpu")
def test_any_pool_is_a_policy_or_a_policy_error(said: Any, used: Any) -> None:
    read({**with_feature(pool=said), "pools": {"gpu": said}})
    read({**with_feature(pool=used), "pools": {"gpu": said, 7: said}})


@given(st.dictionaries(st.sampled_from(features.WORDS) | keys, values))
@example({"refund_on": [500, 500.0, True], "refund_on_exception": 1})
@example({"outage": "local", "outage_share": "0.0001%", "refund_on": [400]})
def test_any_feature_is_a_policy_or_a_policy_error(said: Any) -> None:
    read({**with_feature(), "features": {"image": said, "video": said}})


@given(st.dictionaries(st.sampled_from(cells.WORDS) | keys, values), values)
@example({"rate": "1/day", "concurrency": 10**9, "lease": "1 day", "per": "org"}, "0")
def test_any_quota_is_a_policy_or_a_policy_error(quota: Any, other: Any) -> None:
    read(with_cell(quota))
    read(with_cell([quota, other, quota]))
    read({**with_cell("5/day"), "defaults": {"shadow": {"image": [quota]}}})


RATES = ["100/day", "600/minute", "9/second", "1000/second", "1 per 365 days", "7 per 3 hours"]
LEASES = ["1 second", "10 minutes", "7 days", "8 days", "0 seconds", "1 month"]
PERCENTS = ["0%", "0.0001%", "33.3333 %", "99.9999%", "100%", "50%"]


def nearly(right: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Give what is right, and now and then what is not."""
    return st.sampled_from([True] * 15 + [False]).flatmap(lambda told: right if told else leaves)


amounts = nearly(st.sampled_from([1, 2, 7, 100, 1_024]) | st.integers(1, 2_000))
slots: st.SearchStrategy[Any] = st.just({}) | st.fixed_dictionaries(
    {"concurrency": amounts, "lease": nearly(st.sampled_from(LEASES[:3]))}
)


def with_slots(table: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(lambda one, other: {**one, **other}, table, slots)


pools = with_slots(
    st.fixed_dictionaries(
        {"rate": nearly(st.sampled_from(RATES))},
        optional={
            "capacity": amounts,
            "slices": nearly(st.sampled_from([1, 1, 2, 4])),
            "leave": nearly(
                st.dictionaries(
                    nearly(st.sampled_from(["new", "everyone"])).filter(lambda one: one.__hash__),
                    nearly(st.sampled_from(PERCENTS) | st.integers(0, 9)),
                )
            ),
        },
    )
)
quotas = with_slots(
    st.fixed_dictionaries(
        {"rate": nearly(st.sampled_from(RATES))},
        optional={"capacity": amounts, "per": st.sampled_from(["org", "team"])},
    )
)
local = st.fixed_dictionaries(
    {"outage": st.just("local")}, optional={"outage_share": nearly(st.sampled_from(PERCENTS))}
)
any_feature = st.builds(
    lambda one, other: {**one, **other},
    st.fixed_dictionaries(
        {},
        optional={
            "routes": nearly(
                st.dictionaries(
                    st.sampled_from(["POST /a", "GET /{x}", "* /b"]), nearly(st.integers(0, 9))
                )
            ),
            "outage": nearly(st.sampled_from(["allow", "deny", "local"])),
            "pool": nearly(pools | st.just("gpu")),
            "refund_on": nearly(st.lists(nearly(st.integers(400, 599)), max_size=3)),
            "refund_on_exception": nearly(st.booleans()),
        },
    ),
    st.just({}) | local,
)


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=200)
@given(any_feature, any_feature, nearly(pools), quotas | st.lists(quotas, min_size=1, max_size=3))
def test_anything_that_is_nearly_right_is_a_policy_or_a_policy_error(
    image: Any, video: Any, gpu: Any, cell: Any
) -> None:
    if isinstance(video, dict) and isinstance(video.get("routes"), dict):
        video = {**video, "routes": {f"{route}2": n for route, n in video["routes"].items()}}
    document = with_whens(new={"plan": "free"})
    document["features"] = {"image": image, "video": video}
    document["pools"] = {"gpu": gpu}
    document["defaults"] = {"quotas": {"image": cell, "video": cell}}

    read(document)


@given(st.dictionaries(st.sampled_from(condition.WORDS) | keys, values))
def test_any_when_is_a_policy_or_a_policy_error(when: Any) -> None:
    read(with_whens(new=when))


def nested(depth: int, kind: str) -> Any:
    value: Any = "5/minute"
    for _ in range(depth):
        value = [value] if kind == "list" else {"x": value}
    return value


@pytest.mark.parametrize("kind", ["list", "table"])
@pytest.mark.parametrize("path", places(EVERY_WORD), ids=lambda path: ".".join(map(str, path)))
def test_no_nesting_ends_the_stack(path: tuple[Any, ...], kind: str) -> None:
    value = change(deepcopy(EVERY_WORD), path, "replace", nested(20_000, kind), "")

    assert read(value) is None


def test_value_that_holds_itself_is_told() -> None:
    loop: dict[str, Any] = {}
    loop.update({"features": loop, "tiers": loop, "defaults": loop, "order": [loop]})

    assert read(loop) is None


@pytest.mark.parametrize(
    "number", [10**5_000, -(10**5_000), 10**40], ids=["huge", "far below", "large"]
)
def test_huge_number_is_told_without_writing_it_out(number: int) -> None:
    with pytest.raises(PolicyError, match="a number of more than 30 digits"):
        Policy.from_dict({**SMALLEST, "order": number})


def test_escape_sequences_do_not_reach_the_terminal() -> None:
    sly = "\x1b[2J\u202e\n  tiers.pro: fine"

    with pytest.raises(PolicyError) as caught:
        Policy.from_dict({**with_cell(sly, routes=[sly, f"GET /{sly}"]), sly: 1, "order": [sly]})

    assert all(str(fault).isprintable() for fault in caught.value.faults)
    assert len(str(caught.value).splitlines()) == 1 + len(caught.value.faults)


def test_warning_and_fault_of_a_huge_document_are_still_told() -> None:
    names = [f"t{i}" for i in range(300)]
    value = with_whens(**{name: {"plan": [name, "x"]} for name in names})
    for name, above in pairwise(names):
        value["tiers"][name]["extends"] = above

    assert read(value) is not None

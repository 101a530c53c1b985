"""Slots: how many jobs of one subject may run at once, as a policy says it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.policies import with_cell
from tieredlimit import Account, Policy, PolicyError
from tieredlimit._core.quota import Quota
from tieredlimit._core.rate import DAY_US, SECOND_US
from tieredlimit._core.table import Table

THREE = {"concurrency": 3, "lease": "10 minutes"}


def cell_faults(cell: object) -> dict[str, str]:
    with pytest.raises(PolicyError) as caught:
        Policy.from_dict(with_cell(cell))
    prefix = "tiers.everyone.quotas.image"
    return {one.path.removeprefix(prefix): one.message for one in caught.value.faults}


def quotas(cell: object) -> tuple[Quota, ...]:
    return Policy.from_dict(with_cell(cell)).cell("everyone", "image").quotas


def held(document: dict[str, Any], account: Account, feature: str) -> list[tuple[str, int, int]]:
    """Return the key, the limit and the lease of every slot that a take of the account fills."""
    table = Table(Policy.from_dict(document), "test")
    entry = table.find(account, feature, 0)
    assert entry is not None
    return [] if entry.demands is None else list(entry.demands.slots(account, 0, 0))


def test_quota_says_its_slots_and_their_lease() -> None:
    (quota,) = quotas({"rate": "200/day", **THREE})

    assert (quota.concurrency, quota.lease_us) == (3, 600 * SECOND_US)
    assert quota.capacity == 200


def test_quota_without_both_words_holds_nothing() -> None:
    assert [(quota.concurrency, quota.lease_us) for quota in quotas(["5/minute"])] == [(None, None)]
    assert held(with_cell("5/minute"), Account("u1"), "image") == []


def test_operator_reads_how_many_may_run_at_once() -> None:
    policy = Policy.from_dict(
        with_cell([{"rate": "200/day", "capacity": 20, **THREE}, {"rate": "9/hour", "per": "org"}])
    )

    spelled = policy.cell("everyone", "image").spell()

    assert spelled == "200/day cap 20, 3 at once + 9/hour per org"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"concurrency": 3}, {".lease": 'is missing: concurrency needs it; write such as "10 min'}),
        (
            {"lease": "9 hours"},
            {".concurrency": "is missing: lease needs it; write the slots, suc"},
        ),
        (
            {"concurrency": 0},
            {".concurrency": "from 1 to 1,000,000, got 0", ".lease": "is missing"},
        ),
        ({"lease": 5}, {".concurrency": "is missing", ".lease": "got 5; write a duration"}),
    ],
)
def test_concurrency_and_lease_need_each_other(
    said: dict[str, object], expected: dict[str, str]
) -> None:
    found = cell_faults({"rate": "5/minute", **said})

    assert found.keys() == expected.keys()
    for path, told in expected.items():
        assert told in found[path]


@pytest.mark.parametrize("slots", [0, -1, 1.5, True, "3", None, 1_000_001])
def test_concurrency_is_a_whole_number_up_to_a_million(slots: object) -> None:
    found = cell_faults({"rate": "5/minute", "concurrency": slots, "lease": "10 minutes"})

    assert list(found) == [".concurrency"]
    assert "must be a whole number from 1 to 1,000,000" in found[".concurrency"]


@pytest.mark.parametrize("lease", ["1 day", "24 hours", "1440 minutes", "86400 seconds"])
def test_lease_may_last_a_day(lease: str) -> None:
    (quota,) = quotas({"rate": "5/minute", "concurrency": 1_000_000, "lease": lease})

    assert quota.lease_us == DAY_US


@pytest.mark.parametrize("lease", ["2 days", "25 hours", "1 week", "86401 seconds"])
def test_lease_over_a_day_is_refused_with_what_to_do_instead(lease: str) -> None:
    assert cell_faults({"rate": "5/minute", "concurrency": 3, "lease": lease}) == {
        ".lease": f'got "{lease}"; a lease is at most 1 day: renew it'
    }


def test_every_fault_of_a_quota_with_slots_is_told_at_once() -> None:
    found = cell_faults({"rate": "5/mont", "capacity": 0, "concurrency": 0, "lease": "x"})

    assert found.keys() == {".rate", ".capacity", ".concurrency", ".lease"}


def test_second_concurrency_of_one_subject_is_refused_naming_the_first() -> None:
    cell = [
        {"rate": "5/minute", **THREE},
        {"rate": "90/day", "per": "org", **THREE},
        {"rate": "50/day", "concurrency": 5, "lease": "1 hour"},
        {"rate": "9/hour", "per": "org", "concurrency": 5, "lease": "1 hour"},
    ]

    told = "has one for the same subject; keep the smaller one"
    assert cell_faults(cell) == {
        "[2].concurrency": f"tiers.everyone.quotas.image[0] {told}",
        "[3].concurrency": f"tiers.everyone.quotas.image[1] {told}",
    }


def test_each_subject_of_a_cell_holds_slots_of_its_own() -> None:
    document = with_cell(
        [
            {"rate": "5/minute", **THREE},
            {"rate": "90/day", "per": "org", "concurrency": 40, "lease": "1 hour"},
            "50/day",
        ]
    )

    ours, theirs = (
        held(document, Account(id_, within={"org": "o7"}), "image") for id_ in ("u1", "u2")
    )

    assert [(limit, lease) for _, limit, lease in ours] == [
        (3, 600 * SECOND_US),
        (40, 3_600 * SECOND_US),
    ]
    assert ours[0][0] != theirs[0][0]
    assert ours[1][0] == theirs[1][0]


@pytest.mark.parametrize(
    "cell", [{"rate": "5/day", **THREE}, ["9/hour", {"rate": "5/day", **THREE}]]
)
def test_cell_in_shadow_holds_no_slot(cell: object) -> None:
    document = {**with_cell("5/minute"), "defaults": {"shadow": {"image": cell}}}

    with pytest.raises(PolicyError) as caught:
        Policy.from_dict(document)

    assert [str(fault) for fault in caught.value.faults] == [
        "defaults.shadow.image: concurrency is not measured: what is only measured holds no slot"
    ]

"""The tier found is the first whose `when` holds, however few of them were asked."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.contract import START
from tieredlimit import Account
from tieredlimit._core.condition import When
from tieredlimit._core.ranking import NEAR_US, NEVER_US, Ranking, Unknowns

DAY_US = 86_400_000_000
NOW = datetime.fromtimestamp(START / 1e6, UTC)

PLANS = st.sampled_from(["free", "pro", "team"])
TAGS = st.frozensets(st.sampled_from(["beta", "staff", "eu"]))
WHENS = st.builds(
    When,
    plan=st.none() | st.frozensets(PLANS, min_size=1),
    account_age_below_us=st.none() | st.integers(1, 3).map(lambda days: days * DAY_US),
    tags=TAGS,
    anonymous=st.none() | st.booleans(),
)
ACCOUNTS = st.builds(
    Account,
    st.just("u1"),
    plan=st.none() | PLANS | st.just("unheard-of"),
    created_at=st.none() | st.integers(0, 4).map(lambda days: NOW - timedelta(days=days)),
    tags=TAGS,
    anonymous=st.booleans(),
)


@given(st.lists(WHENS, max_size=8), ACCOUNTS)
def test_first_tier_that_takes_the_account_is_found(whens: list[When], account: Account) -> None:
    ranking = Ranking([*whens, None])

    found = ranking.first(account, START)

    holds = [when.failing_word(account, START) is None for when in whens]
    assert (found if found >= 0 else ~found) == [*holds, True].index(True)


def test_last_tier_takes_whom_no_other_does_whatever_it_asks() -> None:
    assert Ranking([When(plan=frozenset({"pro"}))]).first(Account("u1"), START) == 0


@pytest.mark.parametrize("tags", [frozenset(), frozenset({"beta"})])
@pytest.mark.parametrize(
    ("when", "tiers"),
    [(When(account_age_below_us=DAY_US), [0, ~0, ~1, 1]),
     (When(account_age_above_us=DAY_US), [1, ~1, ~0, 0])],
)  # fmt: skip
def test_tier_that_may_be_another_within_a_moment_says_so(
    when: When, tiers: list[int], tags: frozenset[str]
) -> None:
    ranking = Ranking([replace(when, tags=tags), None])
    account = Account("u1", created_at=NOW - timedelta(days=1), tags=tags)

    instants = [START - NEAR_US, START - 1, START, START + NEAR_US]

    assert [ranking.first(account, now) for now in instants] == tiers


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 10), TAGS)
def test_times_are_the_nearest_ages_that_are_asked_for(
    ages: list[int], age: int, tags: frozenset[str]
) -> None:
    whens = [
        When(account_age_below_us=days * DAY_US, tags=tags if days % 2 else frozenset())
        for days in ages
    ]
    account = Account("u1", created_at=NOW - timedelta(days=age), tags=tags)

    times = Ranking([*whens, None]).times(account, START)

    edges = [START + (days - age) * DAY_US for days in ages]
    assert times == (
        max((at for at in edges if at <= START), default=0),
        min((at for at in edges if at > START), default=NEVER_US),
    )


@pytest.mark.parametrize("tags", [frozenset(), frozenset({"beta"})])
@pytest.mark.parametrize(
    "age", [When(account_age_below_us=DAY_US), When(account_age_above_us=DAY_US)]
)
def test_accounts_that_billing_says_too_little_of_are_counted(
    age: When, tags: frozenset[str]
) -> None:
    unknowns = Unknowns()
    when = replace(age, plan=frozenset({"free"}), tags=tags)
    ranking = Ranking([when, None], unknowns)

    for plan in ("free", "free", "unheard-of", None):
        ranking.first(Account("u1", plan=plan, tags=tags), START)
    ranking.first(Account("u2", plan="free", created_at=NOW, tags=tags), START)

    assert (unknowns.plans, unknowns.ages) == (1, 2)

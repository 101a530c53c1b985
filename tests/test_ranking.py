"""The tier found is the first whose `when` holds, however few of them were asked."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from tests.contract import START
from tieredlimit import Account
from tieredlimit._core.condition import When
from tieredlimit._core.ranking import Ranking

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

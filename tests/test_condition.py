"""The `when` of a tier: whom it takes in, and what can be said of two of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

from tests.policies import with_whens
from tieredlimit import Account, Policy
from tieredlimit._core.condition import WORDS, When
from tieredlimit._core.rate import DAY_US, SECOND_US
from tieredlimit._core.table import Table

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
BORN = datetime(2026, 11, 20, 18, tzinfo=UTC)
BORN_US = (BORN - EPOCH) // timedelta(microseconds=1)

# Few values, so that conditions meet often.
PLANS = ["free", "pro", "team"]
TAGS = ["beta", "press", "staff"]
DAYS = st.integers(0, 6)


def some(values: list[str], least: int) -> st.SearchStrategy[frozenset[str]]:
    return st.frozensets(st.sampled_from(values), min_size=least)


whens = st.builds(
    When,
    plan=st.none() | some(PLANS, 1),
    account_age_below_us=st.none() | st.integers(1, 6),
    account_age_above_us=st.none() | st.integers(1, 6),
    created_before_us=st.none() | DAYS,
    created_after_us=st.none() | DAYS,
    tags=some(TAGS, 0),
    anonymous=st.none() | st.booleans(),
)
accounts = st.builds(
    Account,
    id=st.just("u1"),
    plan=st.none() | st.sampled_from([*PLANS, "else"]),
    created_at=st.none() | DAYS.map(lambda us: EPOCH + timedelta(microseconds=us)),
    tags=some([*TAGS, "else"], 0),
    anonymous=st.booleans(),
)
instants = st.integers(0, 13)


def matches(when: When, account: Account, now: int) -> bool:
    return when.failing_word(account, now) is None


def new(age_us: int) -> tuple[Account, int]:
    return Account("u1", created_at=BORN), BORN_US + age_us


@pytest.mark.parametrize(
    ("when", "account", "word"),
    [
        (When(plan=frozenset({"free"})), Account("u1", plan="pro"), "plan"),
        (When(plan=frozenset({"free"})), Account("u1"), "plan"),
        (When(tags=frozenset({"a", "b"})), Account("u1", tags=["a", "c"]), "tags"),
        (When(anonymous=True), Account("u1"), "anonymous"),
        (When(anonymous=False), Account("u1", anonymous=True), "anonymous"),
    ],
)
def test_word_that_does_not_hold_is_named(when: When, account: Account, word: str) -> None:
    assert when.failing_word(account, BORN_US) == word


@pytest.mark.parametrize(
    ("when", "account"),
    [
        (When(plan=frozenset({"free", "pro"})), Account("u1", plan="pro")),
        (When(tags=frozenset({"a", "b"})), Account("u1", tags=("b", "c", "a"))),
        (When(anonymous=True), Account("u1", anonymous=True)),
        (When(anonymous=False), Account("u1", plan="any")),
    ],
)
def test_account_for_which_every_word_holds_is_taken_in(when: When, account: Account) -> None:
    assert matches(when, account, BORN_US)


def test_account_leaves_the_young_at_exactly_the_age() -> None:
    when = When(account_age_below_us=7 * DAY_US)

    assert matches(when, *new(7 * DAY_US - 1))
    assert not matches(when, *new(7 * DAY_US))


def test_account_joins_the_old_at_exactly_the_age() -> None:
    when = When(account_age_above_us=7 * DAY_US)

    assert not matches(when, *new(7 * DAY_US - 1))
    assert matches(when, *new(7 * DAY_US))


def test_instant_itself_is_after_and_not_before() -> None:
    account, now = new(0)

    assert matches(When(created_after_us=BORN_US), account, now)
    assert not matches(When(created_before_us=BORN_US), account, now)
    assert matches(When(created_before_us=BORN_US + 1), account, now)
    assert not matches(When(created_after_us=BORN_US + 1), account, now)


def test_account_from_the_future_is_new() -> None:
    assert matches(When(account_age_below_us=SECOND_US), *new(-DAY_US))


def test_unknown_creation_counts_as_new() -> None:
    unknown = Account("u1")

    assert When(account_age_below_us=1).failing_word(unknown, BORN_US) is None
    assert When(created_after_us=BORN_US).failing_word(unknown, BORN_US) is None
    assert When(account_age_above_us=1).failing_word(unknown, BORN_US) == "account_age_above"
    assert When(created_before_us=BORN_US).failing_word(unknown, BORN_US) == "created_before"


@given(whens, accounts, instants)
def test_failing_word_is_one_of_the_words_given(when: When, account: Account, now: int) -> None:
    word = when.failing_word(account, now)

    assert word is None or word in when.words()
    assert set(when.words()) <= set(WORDS)


@given(whens)
def test_every_word_given_can_be_spelled(when: When) -> None:
    spelled = [when.spell(word) for word in when.words()]

    assert len(set(spelled)) == len(spelled)


def test_words_are_spelled_for_an_operator() -> None:
    when = When(
        plan=frozenset({"pro", "free"}),
        account_age_below_us=7 * DAY_US,
        account_age_above_us=DAY_US,
        created_before_us=BORN_US,
        created_after_us=0,
        tags=frozenset({"beta"}),
        anonymous=True,
    )

    assert [when.spell(word) for word in when.words()] == [
        "plan is free or pro",
        "has no account",
        "tags include beta",
        "account is younger than 7 days",
        "account is at least 1 day old",
        "created before 2026-11-20T18:00:00Z",
        "created at or after 1970-01-01T00:00:00Z",
    ]
    assert When(anonymous=False).spell("anonymous") == "has an account"


@given(whens)
def test_contradiction_matches_nobody(when: When) -> None:
    if when.contradiction():
        assert not any(matches(when, account, now) for account, now in CROWD)


@st.composite
def wider(draw: st.DrawFn, inner: When) -> When:
    """Return a condition that takes in all that `inner` does, at times more or less than that."""

    def shifted(value: int | None, by: int) -> int | None:
        moved = None if value is None else value + by * draw(st.integers(-1, 3))
        return draw(st.sampled_from([None, moved, moved]))

    plans = None if inner.plan is None else inner.plan | draw(some(PLANS, 0))
    return When(
        plan=draw(st.sampled_from([None, plans])),
        account_age_below_us=shifted(inner.account_age_below_us, 1),
        account_age_above_us=shifted(inner.account_age_above_us, -1),
        created_before_us=shifted(inner.created_before_us, 1),
        created_after_us=shifted(inner.created_after_us, -1),
        tags=inner.tags & draw(some(TAGS, 0)),
        anonymous=draw(st.sampled_from([None, inner.anonymous])),
    )


CROWD = [
    (Account("u1", plan, created, tags, anonymous=anonymous), now)
    for plan in (None, "free", "pro", "else")
    for created in (None, *(EPOCH + timedelta(microseconds=us) for us in (0, 3, 6)))
    for tags in ([], ["beta"], ["beta", "press"], ["press", "staff"], TAGS)
    for anonymous in (False, True)
    for now in (0, 3, 6, 9, 12)
]


@given(whens.flatmap(lambda inner: st.tuples(wider(inner) | whens, st.just(inner))))
def test_covering_takes_in_whoever_the_covered_takes_in(pair: tuple[When, When]) -> None:
    outer, inner = pair
    event("covers" if outer.covers(inner) else "does not cover")

    if outer.covers(inner):
        taken = [(account, now) for account, now in CROWD if matches(inner, account, now)]
        assert all(matches(outer, account, now) for account, now in taken)


@given(whens)
def test_condition_covers_itself(when: When) -> None:
    assert when.covers(when)


@given(whens, accounts, instants)
def test_parts_together_take_in_what_the_whole_takes_in(
    when: When, account: Account, now: int
) -> None:
    parts = when.parts()

    # A plan that no part names stands for itself where the whole asks for none.
    assert any(matches(part, account, now) for part in parts) == matches(when, account, now)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        (When(), When(plan=frozenset({"free"}))),
        (When(plan=frozenset({"a", "b"})), When(plan=frozenset({"a"}))),
        (When(tags=frozenset({"a"})), When(tags=frozenset({"a", "b"}))),
        (When(account_age_below_us=7), When(account_age_below_us=6)),
        (When(account_age_above_us=6), When(account_age_above_us=7)),
        (When(created_before_us=7), When(created_before_us=6)),
        (When(created_after_us=6), When(created_after_us=7)),
        (When(), When(anonymous=True)),
    ],
)
def test_narrower_words_are_covered_and_wider_ones_are_not(outer: When, inner: When) -> None:
    assert outer.covers(inner)
    assert not inner.covers(outer)


@given(whens, whens, accounts, instants)
def test_rest_is_whoever_the_other_takes_in_and_this_one_does_not(
    when: When, other: When, account: Account, now: int
) -> None:
    assume(when.contradiction() is None and other.contradiction() is None)

    rest = when.rest_of(other)

    holding = sum(matches(one, account, now) for one in rest)
    taken = matches(when, account, now)
    if rest == [other]:
        event("all of it")
    elif matches(other, account, now):
        event("taken" if taken else "left")
        assert holding == (not taken)
    else:
        assert holding == 0


def document_when(when: When) -> dict[str, object]:
    """Return the `when` as a document has it, with seconds for microseconds."""
    words: dict[str, object] = {}
    if when.plan is not None:
        words["plan"] = sorted(when.plan)
    for word in ("account_age_below", "account_age_above"):
        if (age := getattr(when, f"{word}_us")) is not None:
            words[word] = f"{age} seconds"
    for word in ("created_before", "created_after"):
        if (instant := getattr(when, f"{word}_us")) is not None:
            words[word] = EPOCH + timedelta(microseconds=instant)
    if when.tags:
        words["tags"] = sorted(when.tags)
    if when.anonymous is not None:
        words["anonymous"] = when.anonymous
    return words


@given(st.lists(whens, min_size=1, max_size=5), st.lists(accounts, max_size=5), instants)
def test_tier_by_plan_is_the_first_in_order_that_matches(
    several: list[When], strangers: list[Account], now: int
) -> None:
    # From the condition's own objects: a document would refuse the unreachable ones.
    policy = Policy.from_dict(with_whens(a={"plan": "x"}))
    rows = [(f"t{i}", when) for i, when in enumerate(several)]
    everyone = policy.tiers[-1]
    tiers = tuple(type(everyone)(name, when, everyone.cells) for name, when in rows)
    table = Table(Policy(policy.features, (*tiers, everyone)), "test")

    for account in strangers:
        first = next((name for name, when in rows if matches(when, account, now)), "everyone")
        assert table.tier_of(account, now) == first


@given(whens)
def test_document_reads_back_as_the_same_condition(when: When) -> None:
    words = document_when(when)
    assume(words and not when.contradiction())

    read = Policy.from_dict(with_whens(t=words)).tiers[0].when

    assert read is not None
    for word in read.words():
        scale = SECOND_US if "age" in word else 1
        name = f"{word}_us" if hasattr(when, f"{word}_us") else word
        expected = getattr(when, name)
        assert getattr(read, name) == (expected * scale if scale > 1 else expected)
    assert read.words() == when.words()


@pytest.mark.fault("D2")
@pytest.mark.parametrize("plan", ["gold", "", "FREE", "new", None])
def test_unknown_plan_falls_to_the_last_tier(plan: str | None) -> None:
    table = Table(Policy.from_dict(with_whens(new={"plan": "free"}, pro={"plan": "pro"})), "test")

    assert table.tier_of(Account("u1", plan=plan), BORN_US) == "everyone"


@pytest.mark.fault("D5")
def test_account_leaves_the_tier_for_new_ones_at_that_microsecond() -> None:
    whens = with_whens(new={"plan": "free", "account_age_below": "7 days"}, free={"plan": "free"})
    table = Table(Policy.from_dict(whens), "test")
    account = Account("u1", plan="free", created_at=BORN)

    assert table.tier_of(account, BORN_US + 7 * DAY_US - 1) == "new"
    assert table.tier_of(account, BORN_US + 7 * DAY_US) == "free"

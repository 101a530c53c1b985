"""What overrides make of the policy: which cell an account has, and for how long that holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.test_override import close_for, moments, open_for, people, several
from tieredlimit import Account, Policy
from tieredlimit._core.condition import When
from tieredlimit._core.force import overridden, reopens_in
from tieredlimit._core.override import MAX_INSTANT_US, Override, Share, Who, choose
from tieredlimit._core.rate import DAY_US, SECOND_US
from tieredlimit._core.share import position
from tieredlimit._core.stamp import Stamp
from tieredlimit._core.table import Entry, Table
from tieredlimit._core.tier import Cell
from tieredlimit.errors import RevisionError

MINUTE_US = 60 * SECOND_US
HOUR_US = 60 * MINUTE_US

# Seconds, as few as those of the overrides that are drawn: tiers change while overrides do.
POLICY = Policy.from_dict(
    {
        "order": ["new", "free", "pro"],
        "features": {"image": {"routes": ["POST /images"]}, "video": {}},
        "defaults": {"quotas": {"image": "5/minute", "video": "3/hour"}},
        "tiers": {
            "new": {
                "when": {"plan": "free", "account_age_below": "6 seconds"},
                "quotas": {"video": 0},
                "messages": {"video": {"en": "Not yet.", "fr": "Pas encore."}},
            },
            "free": {"when": {"account_age_above": "3 seconds", "anonymous": False}},
            "pro": {"quotas": {"video": "unlimited"}},
        },
    }
)

ANN = Account("ann")
BEN = Account("ben")
NEW = Who(tier="new")


def tier_at(account: Account, now: int) -> str:
    """Return the account's tier, asking one after the other."""
    for tier in POLICY.tiers:
        if tier.when is None or tier.when.failing_word(account, now) is None:
            return tier.name
    raise AssertionError(account)


def said_of(entry: Entry | None) -> tuple[str, Cell, str | None]:
    """Return what an entry says, whatever object it is."""
    assert entry is not None
    closure = None if entry.closure is None else entry.closure.id
    assert (entry.most is None) == (not entry.quotas)
    assert [q for shelf in entry.shelves for q in shelf.quotas] == list(entry.quotas)
    return entry.cell.tier, entry.cell, closure


def due(overrides: Sequence[Override], account: Account, now: int) -> tuple[str, Cell, str | None]:
    """Return the same, worked out from `choose` and the policy for this instant alone."""
    tier = tier_at(account, now)
    cell = POLICY.cell(tier, "video")
    winner = choose(overrides, account, tier, now)
    if winner is None or winner.action == "open":
        return tier, cell, None
    return tier, overridden(cell, winner), winner.id if winner.action == "close" else None


class TestTable:
    @given(several(), people(), moments)
    def test_decides_as_the_overrides_and_the_policy_say(
        self, overrides: list[Override], account: Account, now: int
    ) -> None:
        table = Table(POLICY, "test", overrides=overrides, now=now)

        found = table.find(account, "video", now)

        event("an override wins" if choose(overrides, account, tier_at(account, now), now) else "")
        assert said_of(found) == due(overrides, account, now)
        assert said_of(table.find(account, "image", now))[1:] == (
            POLICY.cell(tier_at(account, now), "image"),
            None,
        )
        assert table.find(account, "audio", now) is None

    @settings(max_examples=300)
    @given(st.just([]) | several(), people(), moments, moments, st.data())
    def test_within_its_bounds_nothing_changes(
        self,
        overrides: list[Override],
        account: Account,
        built: int,
        now: int,
        data: st.DataObject,
    ) -> None:
        table = Table(POLICY, "test", overrides=overrides, now=built)
        if not table.holds(now):
            event("the table is for another time")
            table = Table(POLICY, "test", overrides=overrides, now=now)
        found, times = table.look_up(account, "video", now)
        since, before = table.since, table.before or MAX_INSTANT_US
        if times is not None:
            since, before = max(since, times[0]), min(before, times[1])
        event("bounded by the account" if times is not None else "for all instants of the table")
        assert since <= now < before

        first, last = max(since, 0), min(before - 1, 30 * SECOND_US)
        ages = [age * SECOND_US + (account.created_us() or 0) for age in (3, 6)]
        shares = [one.share for one in overrides if one.share is not None]
        entries = [share.enters_at(position("video", account.id)) or 0 for share in shares]
        edges = [at for at in (first, last, *ages, *entries) if first <= at <= last]
        for at in {*edges, data.draw(st.integers(first, last))}:
            assert said_of(found) == due(overrides, account, at)

    @given(several(), people(), moments, moments)
    def test_without_anything_timed_instants_do_not_matter(
        self, overrides: list[Override], account: Account, built: int, now: int
    ) -> None:
        timeless = Policy.from_dict(
            {"features": {"video": {}}, "tiers": {"new": {"quotas": {"video": "3/hour"}}}}
        )
        table = Table(timeless, "test", overrides=overrides, now=built)
        if table.timed:
            return

        entry = table.rows[table.ranking.first(account, 0)]["video"]

        assert table.holds(now)
        assert entry.variants is None
        assert entry is table.find(account, "video", now)
        winner = choose(overrides, account, "new", now)
        closes = winner is not None and winner.action == "close"
        assert (entry.closure is not None) == closes

    def test_bounds_of_an_account_are_where_a_ramp_lets_it_in(self) -> None:
        ramp = open_for(NEW, 2, share=Share(0, 0, 20 * SECOND_US))
        table = Table(POLICY, "test", overrides=[close_for(NEW), ramp])
        account = Account("ann", plan="free")
        assert ramp.share is not None
        enters = ramp.share.enters_at(position("video", "ann"))
        assert enters is not None

        before, times = table.look_up(account, "video", enters - 1)
        after, later = table.look_up(account, "video", enters)

        assert (said_of(before)[2], times and times[1]) == ("close-1", enters)
        assert (said_of(after)[2], later and later[0]) == (None, enters)

    def test_bounds_of_an_account_are_where_an_override_takes_it_for_older(self) -> None:
        young = When(account_age_below_us=2 * SECOND_US)
        table = Table(POLICY, "test", overrides=[close_for(Who(when=young))])
        account = Account("ann", plan="free", created_at=datetime(1970, 1, 1, tzinfo=UTC))

        before, times = table.look_up(account, "video", 2 * SECOND_US - 1)
        after, later = table.look_up(account, "video", 2 * SECOND_US)

        assert (said_of(before)[2], times and times[1]) == ("close-1", 2 * SECOND_US)
        assert (said_of(after)[2], later and later[0]) == (None, 2 * SECOND_US)

    def test_holds_from_the_latest_edge_to_the_next(self) -> None:
        overrides = [close_for(NEW, begin_us=10, end_us=20), close_for(Who(), 2, begin_us=15)]

        tables = [Table(POLICY, "test", overrides=overrides, now=now) for now in (9, 10, 15, 20)]

        assert [(table.since, table.before) for table in tables] == [
            (0, 10), (10, 15), (15, 20), (20, None),
        ]  # fmt: skip
        assert [tables[1].holds(now) for now in (9, 10, 14, 15)] == [False, True, True, False]

    def test_overrides_of_what_the_policy_lacks_change_nothing(self) -> None:
        strangers = [
            replace(close_for(Who()), feature="audio"),
            close_for(Who(tier="gold"), 2),
        ]

        table = Table(POLICY, "test", overrides=strangers)

        assert said_of(table.find(ANN, "video", 0)) == due([], ANN, 0)

    def test_quotas_that_this_release_cannot_read_are_an_error(self) -> None:
        broken = replace(close_for(NEW), action="set", quotas="5/fortnight")

        with pytest.raises(RevisionError, match=r"overrides\.close-1: .*5/fortnight"):
            Table(POLICY, "test", overrides=[broken])

    def test_stamp_of_a_shard_says_what_the_shard_says(self) -> None:
        closed = [close_for(NEW, begin_us=10, end_us=20)]
        table = Table(POLICY, "test", 4, overrides=closed, standing=(7, "ab" * 8), now=12)

        stamp = table.stamp(3)

        assert (stamp.key, stamp.tag) == ("tl1:{test:3}:revision", "test:3")
        assert stamp.revision == "7 abababababababab"
        assert (stamp.since, stamp.before) == (10, 20)
        assert table.stamp(3) is stamp
        assert isinstance(table.stamp(0), Stamp)
        assert table.stamp(0).key == "tl1:{test:0}:revision"


class TestOverridden:
    def test_closure_has_its_own_message_or_none(self) -> None:
        cell = POLICY.cell("new", "video")

        quiet = overridden(cell, close_for(NEW))
        told = overridden(cell, close_for(NEW, messages={"de": "Zu."}))

        assert quiet.zero
        assert quiet.messages == {}
        assert told.messages == {"de": "Zu."}

    def test_quotas_in_its_place_keep_the_message_unless_they_bring_one(self) -> None:
        cell = POLICY.cell("new", "video")
        given = replace(close_for(NEW), action="set", quotas="2/minute")

        kept = overridden(cell, given)
        told = overridden(cell, replace(given, messages={"": "Two."}))

        assert [quota.capacity for quota in kept.quotas] == [2]
        assert kept.messages == cell.messages
        assert told.messages == {"": "Two."}
        assert overridden(cell, replace(given, quotas="unlimited")).unlimited
        assert overridden(cell, replace(given, quotas=0)).zero


class TestReopening:
    def told(self, *overrides: Override, account: Account = ANN, now: int = 0) -> int | None:
        closure = choose(overrides, account, "new", now)
        assert closure is not None
        assert closure.closes
        return reopens_in(closure, overrides, account, "new", now)

    def test_without_an_end_nobody_is_told_a_time(self) -> None:
        assert self.told(close_for(NEW)) is None

    @pytest.mark.fault("G7")
    def test_those_who_wait_for_the_same_instant_are_spread_behind_it(self) -> None:
        closure = close_for(NEW, begin_us=0, end_us=5 * MINUTE_US)

        told = [self.told(closure, account=Account(f"u{i}"), now=MINUTE_US) for i in range(500)]

        waits = [wait - 4 * MINUTE_US for wait in told if wait is not None]
        assert len(waits) == 500
        # A tenth of how long it lasts, evenly.
        assert min(waits) >= 0
        assert max(waits) < 30 * SECOND_US
        by_third = [sum(wait // (10 * SECOND_US) == third for wait in waits) for third in range(3)]
        assert min(by_third) > 100

    @pytest.mark.parametrize(
        ("length_us", "most_us"),
        [(SECOND_US, SECOND_US), (20 * SECOND_US, 2 * SECOND_US), (9 * DAY_US, MINUTE_US)],
    )
    def test_spread_follows_the_length_within_a_second_and_a_minute(
        self, length_us: int, most_us: int
    ) -> None:
        closure = close_for(NEW, made_us=0, end_us=length_us)

        told = [self.told(closure, account=Account(f"u{i}")) or 0 for i in range(300)]

        late = [wait - length_us for wait in told]
        assert 0 <= min(late) < most_us // 10
        assert most_us * 9 // 10 < max(late) < most_us

    @pytest.mark.fault("G7")
    def test_ramp_tells_each_the_instant_of_its_own(self) -> None:
        ramp = open_for(NEW, 2, share=Share(0, 0, HOUR_US))
        assert ramp.share is not None

        for i in range(50):
            account = Account(f"u{i}")
            enters = ramp.share.enters_at(position("video", account.id))

            assert self.told(close_for(NEW), ramp, account=account) == enters

    def test_ramp_that_is_still_to_begin_is_waited_for(self) -> None:
        share = Share(0, HOUR_US, HOUR_US)
        ramp = open_for(NEW, 2, begin_us=HOUR_US, share=share)

        enters = share.enters_at(position("video", ANN.id))

        assert self.told(close_for(NEW), ramp) == enters

    def test_of_closures_that_follow_one_another_the_last_end_counts(self) -> None:
        closures = [
            close_for(NEW, end_us=HOUR_US),
            close_for(Who(), 2, begin_us=HOUR_US // 2, end_us=2 * HOUR_US),
            close_for(NEW, 3, begin_us=2 * HOUR_US, end_us=3 * HOUR_US),
        ]

        told = self.told(*closures)

        assert told is not None
        assert 3 * HOUR_US <= told <= 3 * HOUR_US + MINUTE_US

    def test_what_opens_for_the_account_alone_is_its_time(self) -> None:
        let_in = open_for(Who(account="ann"), 2, begin_us=MINUTE_US)

        told = self.told(close_for(NEW), let_in)

        assert told is not None
        assert MINUTE_US <= told <= 2 * MINUTE_US
        assert self.told(close_for(NEW), let_in, account=BEN) is None

    @given(several(), people(), moments)
    def test_nobody_is_told_to_come_before_the_door_is_open(
        self, overrides: list[Override], account: Account, now: int
    ) -> None:
        tier = tier_at(account, now)
        winner = choose(overrides, account, tier, now)
        if winner is None or winner.action != "close":
            return

        wait = reopens_in(winner, overrides, account, tier, now)

        def is_open(at: int) -> bool:
            winner = choose(overrides, account, tier, at)
            return winner is None or not winner.closes

        instants = range(now, now + 40 * SECOND_US, SECOND_US // 4)
        opens = next((at for at in instants if is_open(at)), None)
        if wait is None:
            # Ages are not looked at: whoever comes of age is let in untold.
            event("no time is told")
        elif opens is not None:
            event("a time is told")
            assert now + wait > opens - SECOND_US // 4

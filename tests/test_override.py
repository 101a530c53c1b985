"""Overrides: whom they mean, which of them counts, and how long that answer holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from tests.test_condition import BORN, BORN_US, CROWD, EPOCH, accounts, whens
from tieredlimit import Account, UsageError
from tieredlimit._core.condition import When
from tieredlimit._core.override import (
    MAX_INSTANT_US,
    Action,
    Override,
    Share,
    Who,
    choose,
    edges,
    override_from,
    position,
    settled,
)
from tieredlimit._core.rate import DAY_US, SECOND_US
from tieredlimit.errors import RevisionError

ACTIONS: tuple[Action, ...] = ("close", "open", "set")
TIERS = ["new", "free", "pro"]
LAST_POSITION = 2**32 - 1
FREE = When(plan=frozenset({"free"}))

# Seconds, as few as the microseconds of `tests.test_condition`: what is drawn meets often.
instants = st.integers(0, 13)


def aged(when: When) -> When:
    """Return the condition with ages in whole seconds, as an override has them."""
    below, above = when.account_age_below_us, when.account_age_above_us
    return replace(
        when,
        account_age_below_us=below and below * SECOND_US,
        account_age_above_us=above and above * SECOND_US,
    )


conditions = whens.map(aged).filter(lambda when: when.words() and not when.contradiction())
whos = st.one_of(
    st.just(Who()),
    st.sampled_from(["u1", "u2"]).map(lambda account: Who(account=account)),
    st.sampled_from(TIERS).map(lambda tier: Who(tier=tier)),
    st.builds(Who, tier=st.none() | st.sampled_from(TIERS), when=conditions),
)
shares = st.builds(
    Share,
    start_bp=st.integers(0, 10_000),
    begin_us=st.integers(0, 13 * SECOND_US),
    duration_us=st.just(0) | st.integers(1, 13 * SECOND_US),
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
messages = st.dictionaries(
    st.sampled_from(["", "en", "fr", "pt-BR"]), texts.filter(lambda text: bool(text.strip()))
)


@st.composite
def overrides(draw: st.DrawFn, sequence: int = 1) -> Override:
    action: Action = draw(st.sampled_from(ACTIONS))
    begin_s, length_s = draw(st.none() | instants), draw(st.none() | st.integers(1, 6))
    begin_us = None if begin_s is None else begin_s * SECOND_US
    return Override(
        f"{action}-{sequence}",
        sequence,
        action,
        "video",
        draw(whos),
        begin_us,
        None if length_s is None else (begin_us or 0) + length_s * SECOND_US,
        draw(st.none() | shares) if action == "open" else None,
        draw(st.sampled_from([0, "unlimited", "2/minute", ["2/minute", "9/day"]]))
        if action == "set"
        else None,
        draw(messages),
        draw(texts),
        draw(texts),
        draw(st.booleans()),
        draw(instants),
    )


@st.composite
def several(draw: st.DrawFn) -> list[Override]:
    count = draw(st.integers(0, 6))
    return draw(st.permutations([draw(overrides(sequence)) for sequence in range(1, count + 1)]))


@st.composite
def people(draw: st.DrawFn) -> Account:
    account = draw(accounts)
    born_s = draw(st.none() | st.integers(-6, 12))
    born = None if born_s is None else EPOCH + timedelta(seconds=born_s)
    return replace(account, id=draw(st.sampled_from(["u1", "u2", "u3"])), created_at=born)


moments = st.integers(0, 13 * SECOND_US) | instants.map(lambda second: second * SECOND_US)


def close_for(who: Who, sequence: int = 1, **more: Any) -> Override:
    return Override(f"close-{sequence}", sequence, "close", "video", who, **more)


def open_for(who: Who, sequence: int = 1, **more: Any) -> Override:
    return Override(f"open-{sequence}", sequence, "open", "video", who, **more)


class TestWho:
    def test_account_is_meant_by_its_id_alone(self) -> None:
        who = Who(account="u1")

        assert who.matches(Account("u1", plan="pro"), "pro", 0)
        assert who.matches(Account("u1"), "new", 0)
        assert not who.matches(Account("u2"), "new", 0)
        assert not who.matches(Account("u1", anonymous=True), "new", 0)

    def test_tier_and_words_must_both_hold(self) -> None:
        who = Who(tier="new", when=FREE)

        assert who.matches(Account("u1", plan="free"), "new", 0)
        assert not who.matches(Account("u1", plan="free"), "free", 0)
        assert not who.matches(Account("u1", plan="pro"), "new", 0)

    def test_more_words_are_more_specific(self) -> None:
        ranked = [Who(), Who(tier="new"), Who(when=FREE), Who(account="u1")]

        assert [who.specificity for who in ranked] == [0, 1, 2, 3]
        assert Who(tier="new", when=FREE).specificity == 2

    @pytest.mark.parametrize(
        ("who", "spelled"),
        [
            (Who(), "everyone"),
            (Who(tier="new"), "tier new"),
            (Who(account="u1"), "account u1"),
            (Who(account="a b\x1b"), 'account "a b\\u001b"'),
            (
                Who(tier="new", when=replace(FREE, created_after_us=BORN_US)),
                "tier new, plan is free, created at or after 2026-11-20T18:00:00Z",
            ),
        ],
    )
    def test_who_is_spelled_for_an_operator(self, who: Who, spelled: str) -> None:
        assert who.spell() == spelled

    @pytest.mark.parametrize(
        ("given", "told"),
        [
            ({"account": "u1", "tier": "new"}, "an account stands alone"),
            ({"account": "u1", "when": FREE}, "an account stands alone"),
            ({"when": When()}, "when has no word"),
            ({"when": When(created_before_us=1, created_after_us=1)}, "matches nobody"),
            ({"when": When(account_age_below_us=1)}, "whole seconds.* got 1 microseconds"),
        ],
    )
    def test_who_that_can_be_nobody_is_refused(self, given: dict[str, Any], told: str) -> None:
        with pytest.raises(UsageError, match=told):
            Who(**given)

    @given(whos, whos)
    def test_keys_are_equal_for_equal_ones_only(self, one: Who, other: Who) -> None:
        assert (one.key() == other.key()) == (one == other)

    @given(whos, whos)
    def test_covering_means_whoever_the_covered_means(self, outer: Who, inner: Who) -> None:
        event("covers" if outer.covers(inner) else "does not cover")

        assert outer.covers(outer)
        for account, now in CROWD:
            for tier in TIERS:
                if inner.matches(account, tier, now) and outer.covers(inner):
                    assert outer.matches(account, tier, now)

    @given(whos, whos)
    def test_who_is_meant_by_both_shows_that_they_meet(self, one: Who, other: Who) -> None:
        event("meet" if one.meets(other) else "do not meet")

        assert one.meets(other) == other.meets(one)
        if not one.meets(other):
            assert not any(
                one.matches(account, tier, now) and other.matches(account, tier, now)
                for account, now in CROWD
                for tier in TIERS
            )

    @pytest.mark.parametrize(
        "other",
        [
            Who(tier="pro"),
            Who(tier="new", when=When(plan=frozenset({"pro"}))),
            Who(when=When(anonymous=True)),
            Who(when=When(account_age_above_us=DAY_US)),
            Who(when=When(created_before_us=BORN_US)),
        ],
    )
    def test_words_that_exclude_each_other_never_meet(self, other: Who) -> None:
        one = When(
            plan=frozenset({"free"}),
            anonymous=False,
            account_age_below_us=DAY_US,
            created_after_us=BORN_US,
        )

        assert not Who(tier="new", when=one).meets(other)
        assert not Who(account="u1").meets(Who(when=When(anonymous=True)))
        assert Who(account="u1").meets(Who(when=one))


@pytest.mark.fault("G7")
class TestShare:
    positions = st.integers(0, LAST_POSITION) | st.sampled_from([0, LAST_POSITION])

    @given(shares, positions, st.integers(0, 30 * SECOND_US))
    def test_account_is_inside_from_the_instant_it_enters(
        self, share: Share, at: int, now: int
    ) -> None:
        inside = at * 10_000 < share.bp_at(now) * 2**32
        entered_at = share.enters_at(at)

        assert inside == (entered_at is not None and now >= entered_at)

    @given(shares, positions)
    def test_instant_of_entering_is_exact(self, share: Share, at: int) -> None:
        entered_at = share.enters_at(at)

        if entered_at:
            assert at * 10_000 < share.bp_at(entered_at) * 2**32
            assert at * 10_000 >= share.bp_at(entered_at - 1) * 2**32

    @given(shares, moments, moments)
    def test_share_never_shrinks(self, share: Share, one: int, other: int) -> None:
        assert share.bp_at(min(one, other)) <= share.bp_at(max(one, other))

    @given(positions, st.integers(0, 10_000), st.integers(0, 10_000))
    def test_larger_share_holds_the_smaller(self, at: int, one: int, other: int) -> None:
        small, large = Share(min(one, other), 0), Share(max(one, other), 0)

        if small.enters_at(at) == 0:
            assert large.enters_at(at) == 0

    @given(positions)
    def test_all_are_inside_of_everything_and_none_of_nothing(self, at: int) -> None:
        assert Share(10_000, 5).enters_at(at) == 0
        assert Share(0, 5).enters_at(at) is None

    @given(shares)
    def test_ramp_is_full_when_its_time_is_over(self, share: Share) -> None:
        end = share.begin_us + share.duration_us

        assert share.bp_at(share.begin_us) == share.bp_at(0) == share.start_bp
        assert share.bp_at(end) == (10_000 if share.duration_us else share.start_bp)
        if share.duration_us:
            assert share.enters_at(LAST_POSITION) == (0 if share.start_bp == 10_000 else end)

    def test_accounts_stand_evenly_and_otherwise_for_each_feature(self) -> None:
        share = Share(1_000, 0)
        inside = {
            feature: {i for i in range(20_000) if share.enters_at(position(feature, f"u{i}")) == 0}
            for feature in ("image", "video")
        }

        assert all(1_800 < len(those) < 2_200 for those in inside.values())
        assert 120 < len(inside["image"] & inside["video"]) < 280

    def test_position_is_the_same_everywhere_and_always(self) -> None:
        assert position("video", "u1") == 242_326_297


class TestChoose:
    @given(several(), people(), st.sampled_from(TIERS), moments)
    def test_most_specific_then_newest_wins(
        self, several: list[Override], account: Account, tier: str, now: int
    ) -> None:
        expected = reference(several, account, tier, now)
        event("none" if expected is None else expected.action)

        assert choose(several, account, tier, now) == expected

    def test_specific_wins_over_newer(self) -> None:
        rows = [close_for(Who(), 9), open_for(Who(tier="new"), 3), close_for(Who(account="u1"), 1)]

        assert choose(rows, Account("u1"), "new", 0) == rows[2]
        assert choose(rows, Account("u2"), "new", 0) == rows[1]
        assert choose(rows, Account("u2"), "pro", 0) == rows[0]

    @pytest.mark.fault("G3")
    def test_of_overlapping_ones_the_newest_wins_and_then_the_older_is_back(self) -> None:
        older = close_for(Who(tier="new"), 1, begin_us=0, end_us=30)
        newer = open_for(Who(tier="new"), 2, begin_us=10, end_us=20)

        won = [choose([older, newer], Account("u1"), "new", now) for now in (9, 10, 19, 20, 29, 30)]

        assert won == [older, newer, newer, older, older, None]

    @pytest.mark.fault("G3")
    def test_override_begins_and_ends_at_its_microsecond(self) -> None:
        paused = close_for(Who(), begin_us=BORN_US, end_us=BORN_US + DAY_US)

        assert [
            choose([paused], Account("u1"), "new", BORN_US + at) is not None
            for at in (-1, 0, DAY_US - 1, DAY_US)
        ] == [False, True, True, False]

    def test_newest_without_exceptions_takes_away_older_ones_only(self) -> None:
        older, newer = open_for(Who(account="u1"), 1), open_for(Who(account="u2"), 3)
        paused = close_for(Who(), 2, no_exceptions=True)

        assert choose([older, paused, newer], Account("u1"), "new", 0) == paused
        assert choose([older, paused, newer], Account("u2"), "new", 0) == newer

    def test_account_outside_a_share_is_left_to_the_next_override(self) -> None:
        paused = close_for(Who(tier="new"), 1)
        tenth = open_for(Who(tier="new"), 2, share=Share(1_000, 0))
        won = [choose([paused, tenth], Account(f"u{i}"), "new", 0) for i in range(200)]

        assert {paused, tenth} == set(won)
        assert won.count(tenth) < 40


def reference(
    several: Iterable[Override], account: Account, tier: str, now: int
) -> Override | None:
    """Return the winner the slow way: sort all, then strike out what does not count."""

    def inside(one: Override) -> bool:
        if one.share is None:
            return True
        at = position(one.feature, account.id)
        return at * 10_000 < one.share.bp_at(now) * 2**32

    def meant(who: Who) -> bool:
        if who.account is not None:
            return not account.anonymous and account.id == who.account
        if who.tier is not None and tier != who.tier:
            return False
        return who.when is None or not who.when.failing_word(account, now)

    won: Override | None = None
    for one in sorted(several, key=lambda one: one.sequence):
        begin_us = -1 if one.begin_us is None else one.begin_us
        end_us = now + 1 if one.end_us is None else one.end_us
        if not (begin_us <= now < end_us and meant(one.who) and inside(one)):
            continue
        # Going from old to new, the winner so far stands only where it is more specific.
        if won is None or one.no_exceptions or one.who.specificity >= won.who.specificity:
            won = one
    return won


class TestValidity:
    @given(several(), moments)
    def test_nothing_begins_or_ends_between_the_edges(
        self, several: list[Override], now: int
    ) -> None:
        since, until = edges(several, now)
        active = [one.active(now) for one in several]
        last = 40 * SECOND_US if until is None else until - 1

        assert since <= now <= last
        assert [one.active(since) for one in several] == active
        assert [one.active((since + last) // 2) for one in several] == active
        assert [one.active(last) for one in several] == active
        if since:
            assert [one.active(since - 1) for one in several] != active
        if until is not None:
            assert [one.active(until) for one in several] != active

    @given(several(), people(), st.sampled_from(TIERS), moments, st.data())
    def test_choice_holds_between_edges_and_settled_instants(
        self, several: list[Override], account: Account, tier: str, now: int, data: st.DataObject
    ) -> None:
        (since, until), (from_us, to_us) = edges(several, now), settled(several, account, now)
        first = max(since, from_us)
        ends = [at for at in (until, to_us) if at is not None]
        last = min(ends, default=now + 40 * SECOND_US) - 1
        event("moves" if ends else "stands")

        won = choose(several, account, tier, now)

        assert first <= now <= last
        for at in (first, last, data.draw(st.integers(first, last))):
            assert choose(several, account, tier, at) == won

    def test_edges_of_nothing_are_open(self) -> None:
        assert edges([], 7) == (0, None)
        assert settled([], Account("u1"), 7) == (0, None)

    def test_account_settles_with_its_age_and_its_entry(self) -> None:
        young = close_for(Who(when=When(account_age_below_us=DAY_US)))
        ramp = open_for(Who(), 2, share=Share(0, BORN_US, 1_000 * SECOND_US))
        account = Account("u1", created_at=BORN)
        entered_at = ramp.share and ramp.share.enters_at(position("video", "u1"))

        assert entered_at
        assert settled([young, ramp], account, BORN_US) == (0, entered_at)
        assert settled([young, ramp], account, entered_at) == (entered_at, BORN_US + DAY_US)
        assert settled([young, ramp], account, BORN_US + DAY_US) == (BORN_US + DAY_US, None)

    def test_fixed_instants_of_creation_never_unsettle(self) -> None:
        late = close_for(Who(when=When(created_after_us=BORN_US)))

        assert settled([late], Account("u1", created_at=BORN), BORN_US - DAY_US) == (0, None)


RIGHT: Mapping[str, Any] = {
    "id": "open-7",
    "sequence": 7,
    "action": "open",
    "feature": "video",
    "who": {"tier": "new", "when": {"plan": ["free"], "account_age_below": "7 days"}},
    "begin_us": 5,
    "end_us": 9,
    "share": {"start_bp": 100, "begin_us": 5, "duration_us": 4},
    "messages": {"en": "Soon.", "fr": "Bientôt."},
    "reason": "load",
    "actor": "ann",
    "no_exceptions": True,
    "made_us": 3,
}


class TestDocument:
    @given(overrides())
    def test_document_reads_back_as_the_same_override(self, override: Override) -> None:
        document = json.loads(json.dumps(override.document()))

        read = override_from(document)

        assert read == override
        assert list(read.messages) == list(override.messages)
        assert read.document() == document

    def test_right_document_is_read_whole(self) -> None:
        read = override_from(RIGHT)

        assert read.document() == RIGHT
        assert read.share == Share(100, 5, 4)
        assert read.closes is False

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"id": "Open 7"}, 'id: got "Open 7"; an id is 1 to 32 of a-z, 0-9 and -'),
            ({"id": "a" * 33}, "an id is 1 to 32"),
            ({"sequence": 0}, "sequence: must be a whole number from 1 to"),
            ({"sequence": True}, "sequence: must be a whole number from 1 to .*, got true"),
            ({"action": "opne"}, 'action: must be one of close, open, set, .* did you mean "open"'),
            ({"feature": "a b"}, 'feature: got "a b"; a name is'),
            ({"who": None}, "who: must be a table, got nothing"),
            ({"who": {"acount": "u1"}}, 'who.acount: unknown key .*did you mean "account"'),
            ({"who": {"account": ""}}, "who.account: must not be empty"),
            ({"who": {"account": 7}}, "who.account: must be a text, got 7"),
            ({"who": {"account": "a" * 501}}, "at most 500 characters, got 501"),
            ({"who": {"account": "\ud800"}}, "who.account: holds a lone surrogate"),
            ({"who": {"account": "u1", "tier": "new"}}, "who: an account stands alone"),
            ({"who": {"tier": 7}}, "who.tier: got 7"),
            ({"who": {"when": {}}}, "who.when: is empty"),
            ({"who": {"when": {"plan": "x" * 501}}}, "who.when.plan: must be at most 500"),
            ({"who": {"when": {"tags": ["\ud800"]}}}, "who.when.tags: holds a lone surrogate"),
            ({"who": {"when": {"account_age_below": "7"}}}, "who.when.account_age_below: got"),
            ({"begin_us": 1.5}, "begin_us: must be a whole number"),
            ({"end_us": 5}, "end_us: must be after the begin, got 5"),
            ({"end_us": 2**53}, "end_us: must be a whole number from 1 to 9,007,199,254,740,991"),
            ({"share": {"start_bp": 10_001, "begin_us": 5, "duration_us": 0}}, "share.start_bp"),
            ({"share": {"start_bp": 1, "begin_us": 5}}, "share.duration_us: .*got nothing"),
            (
                {"share": {"start_bp": 1, "begin_us": MAX_INSTANT_US, "duration_us": 1}},
                "share: must be full by",
            ),
            ({"quotas": "2/minute"}, 'quotas: goes with "set" only, not with "open"'),
            ({"action": "set"}, "quotas: is missing"),
            ({"action": "set", "quotas": "2/minuet"}, "quotas: got .* did you mean"),
            ({"action": "set", "quotas": False}, "quotas: got false"),
            ({"action": "close"}, 'share: goes with "open" only, not with "close"'),
            ({"messages": "text"}, "messages: must be a table"),
            ({"messages": {"e n": "x"}}, "is no language tag"),
            ({"messages": {"en": "x" * 501}}, "messages.en: must be at most 500 characters"),
            ({"messages": {"": "x" * 501}}, "messages: must be at most 500 characters"),
            ({"messages": {"en": " "}}, "messages.en: must be a text"),
            ({"messages": {f"a{chr(97 + i)}": "x" for i in range(21)}}, "at most 20 languages"),
            ({"reason": None}, "reason: must be a text"),
            ({"actor": "\ud800"}, "actor: holds a lone surrogate"),
            ({"no_exceptions": 1}, "no_exceptions: must be true or false, got 1"),
            ({"shadow": True}, 'shadow: unknown key "shadow"'),
        ],
    )
    def test_wrong_document_is_refused_with_place_and_value(
        self, change: dict[str, Any], told: str
    ) -> None:
        with pytest.raises(RevisionError, match=told):
            override_from({**RIGHT, **change})

    @pytest.mark.parametrize("document", [None, [], "x", 7])
    def test_what_is_no_table_is_refused(self, document: Any) -> None:
        with pytest.raises(RevisionError, match="must be a table"):
            override_from(document)

    def test_all_faults_are_told_at_once(self) -> None:
        with pytest.raises(RevisionError) as caught:
            override_from({"id": "", "action": "set", "feature": "video", "end_us": 0})

        assert [fault.path for fault in caught.value.faults] == [
            *("id", "end_us", "sequence", "who", "made_us", "quotas"),
        ]
        assert str(caught.value).startswith("override: 6 faults\n  id: ")

    def test_zero_closes_and_other_quotas_do_not(self) -> None:
        put = Override("set-1", 1, "set", "video", Who(), quotas=0)

        assert put.closes
        assert not replace(put, quotas="2/minute").closes
        assert close_for(Who()).closes

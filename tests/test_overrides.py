"""What an operator's commands make of one revision: the next one, and what to tell them first."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from tests.policies import EXAMPLE, with_cell
from tests.test_condition import BORN_US
from tests.test_override import TIERS, people, several
from tieredlimit import Account, Policy, PolicyError, UsageError
from tieredlimit._core.change import living
from tieredlimit._core.condition import When
from tieredlimit._core.override import Override, Share, Who, choose
from tieredlimit._core.rate import DAY_US, SECOND_US
from tieredlimit._core.revision import NOTHING, Revision
from tieredlimit.errors import RevisionError
from tieredlimit.overrides import (
    Change,
    close,
    diff,
    open_,
    options,
    push,
    rollback,
    set_,
    undo,
)

NOW = BORN_US
HOUR_US = 3_600 * SECOND_US
EVERYONE, NEW, FREE, PRO = Who(), Who(tier="new"), Who(tier="free"), Who(tier="pro")
U1 = Who(account="u1")
BETA = Who(when=When(tags=frozenset({"beta"})))
TEAM = Who(when=When(plan=frozenset({"team"})))
CROWD = [Account(f"u{i}", plan="free") for i in range(300)]


def example() -> dict[str, Any]:
    return tomllib.loads(EXAMPLE.read_text("utf-8"))


POLICY = Policy.from_dict(example())  # video is at zero for new and everyone, not for pro and free


def closed(*whos: Who, now: int = NOW, **more: Any) -> Revision:
    """Return the revision after video was closed for these."""
    revision = NOTHING
    for who in whos:
        revision = close(revision, POLICY, "video", who, now=now, **more).revision
    return revision


def inside(revision: Revision, now: int, tier: str = "free") -> set[str]:
    """Return the ids of those for whom the policy decides."""
    won = {account.id: choose(revision.overrides, account, tier, now) for account in CROWD}
    return {name for name, one in won.items() if one is None or one.action == "open"}


def ids(overrides: Iterable[Override]) -> list[str]:
    return [one.id for one in overrides]


class TestClose:
    def test_closing_brings_one_override_and_the_line_that_undoes_it(self) -> None:
        change = close(
            NOTHING,
            POLICY,
            "video",
            FREE,
            now=NOW,
            messages={"": "Paused."},
            reason="GPUs",
            actor="ann",
        )

        expected = Override(
            "close-1",
            1,
            "close",
            "video",
            FREE,
            messages={"": "Paused."},
            reason="GPUs",
            actor="ann",
            made_us=NOW,
        )
        assert change.revision == Revision(
            1, None, (expected,), "ann", "GPUs", NOW, "close video for tier free"
        )
        assert (change.added, change.ended, change.exceptions) == ((expected,), (), ())
        assert change.notes == ()
        assert change.undo == "tieredlimit open video --tier free"

    def test_undo_line_undoes(self) -> None:
        change = close(NOTHING, POLICY, "video", FREE, now=NOW)

        assert open_(change.revision, POLICY, "video", FREE, now=NOW + 1).revision.overrides == ()

    @pytest.mark.parametrize("before", [FREE, EVERYONE])
    def test_undo_line_goes_back_where_opening_would_do_more(self, before: Who) -> None:
        change = close(closed(before), POLICY, "video", FREE, now=NOW + 1)

        assert change.undo == "tieredlimit undo"

    def test_closing_again_replaces_what_was_said_of_the_same_accounts(self) -> None:
        revision = set_(NOTHING, POLICY, "video", FREE, "1/day", now=NOW).revision

        change = close(revision, POLICY, "video", FREE, now=NOW + 1, messages={"": "Sorry."})

        assert ids(change.ended) == ["set-1"]
        assert ids(change.revision.overrides) == ["close-2"]

    @pytest.mark.fault("G3")
    def test_closing_later_cuts_the_earlier_there(self) -> None:
        before = closed(FREE)
        begin_us, end_us = NOW + HOUR_US, NOW + 2 * HOUR_US

        change = close(before, POLICY, "video", FREE, now=NOW, begin_us=begin_us, end_us=end_us)

        assert change.ended == before.overrides
        assert change.revision.overrides == (
            replace(before.overrides[0], end_us=begin_us),
            *change.added,
        )
        assert not inside(change.revision, begin_us - 1) | inside(change.revision, begin_us)
        assert len(inside(change.revision, end_us)) == len(CROWD)

    @pytest.mark.parametrize("end_us", [None, NOW + 2 * HOUR_US, NOW + HOUR_US])
    def test_what_would_have_gone_on_longer_is_told_not_to_come_back(
        self, end_us: int | None
    ) -> None:
        before = closed(FREE, end_us=end_us)

        change = set_(before, POLICY, "video", FREE, "1/day", now=NOW + 1, end_us=NOW + HOUR_US)

        lost = "close-1 is replaced, and does not come back when this is over"
        assert (lost in change.notes) == (end_us != NOW + HOUR_US)

    def test_closures_at_other_times_stay(self) -> None:
        first = closed(FREE, begin_us=NOW + 2 * HOUR_US)

        change = close(first, POLICY, "video", FREE, now=NOW, end_us=NOW + HOUR_US)

        assert ids(change.revision.overrides) == ["close-1", "close-2"]
        assert change.ended == ()

    def test_begin_that_is_past_is_now(self) -> None:
        change = close(NOTHING, POLICY, "video", FREE, now=NOW, begin_us=NOW - HOUR_US)

        assert change.added[0].begin_us is None
        told = "the begin, 2026-11-20T17:00:00Z, is past: it counts at once"
        assert change.notes == (told,)

    def test_plan_that_no_tier_asks_for_may_be_a_slip(self) -> None:
        who = Who(when=When(plan=frozenset({"fre", "free"})))

        change = close(NOTHING, POLICY, "image", who, now=NOW)

        told = 'no tier of the policy asks for the plan "fre"; did you mean "free"?'
        assert change.notes == (told,)

    def test_instant_to_come_means_hardly_anybody(self) -> None:
        after = [Who(when=When(created_after_us=at)) for at in (NOW, NOW + HOUR_US)]

        past, future = (close(NOTHING, POLICY, "image", who, now=NOW) for who in after)

        told = "as yet only accounts of unknown age count as made after it"
        assert past.notes == ()
        assert future.notes == (f"2026-11-20T19:00:00Z is to come: {told}",)

    def test_more_specific_that_stay_open_are_listed(self) -> None:
        revision = closed(FREE, EVERYONE, U1)
        revision = open_(revision, POLICY, "video", FREE, now=NOW, percent_bp=100).revision
        revision = set_(revision, POLICY, "video", BETA, "9/day", now=NOW).revision
        revision = set_(revision, POLICY, "image", BETA, "9/day", now=NOW).revision

        change = close(revision, POLICY, "video", EVERYONE, now=NOW)

        assert ids(change.exceptions) == ["open-4", "set-5"]

    def test_without_exceptions_none_stays_open(self) -> None:
        revision = closed(EVERYONE)
        revision = open_(revision, POLICY, "video", FREE, now=NOW).revision
        assert len(inside(revision, NOW)) == len(CROWD)

        change = close(revision, POLICY, "video", EVERYONE, now=NOW, no_exceptions=True)

        assert change.exceptions == ()
        assert not inside(change.revision, NOW)

    def test_finished_ramp_is_no_exception_to_a_later_closure(self) -> None:
        ramp = open_(closed(FREE), POLICY, "video", FREE, now=NOW, ramp_us=HOUR_US).revision

        during = close(ramp, POLICY, "video", EVERYONE, now=NOW + HOUR_US - 1)
        after = close(ramp, POLICY, "video", EVERYONE, now=NOW + HOUR_US)

        assert ids(during.exceptions) == ["open-2"]
        assert after.exceptions == ()
        assert ids(after.revision.overrides) == ["close-3"]

    def test_zero_in_the_policy_is_told_with_the_command_that_lets_in(self) -> None:
        with pytest.raises(UsageError) as caught:
            close(NOTHING, POLICY, "video", NEW, now=NOW)

        assert str(caught.value) == (
            "the policy says quotas.video = 0 for tier new: nobody gets in, there is nothing to "
            'close; to let somebody in: tieredlimit set video --tier new "10/day"'
        )

    def test_zero_that_an_override_lifts_can_be_closed(self) -> None:
        revision = set_(NOTHING, POLICY, "video", NEW, "1/day", now=NOW).revision

        change = close(revision, POLICY, "video", NEW, now=NOW)

        assert ids(change.ended) == ["set-1"]

    def test_zero_for_some_is_told_and_the_rest_is_closed(self) -> None:
        change = close(NOTHING, POLICY, "video", EVERYONE, now=NOW)

        assert change.notes == (
            "the policy says quotas.video = 0 for tiers new, everyone, with or without this",
        )
        assert len(change.added) == 1

    def test_zero_is_seen_by_the_words_of_the_tiers(self) -> None:
        # No account of plan "team" can be in the tier of new accounts, which is for plan "free".
        change = close(NOTHING, POLICY, "video", TEAM, now=NOW)

        assert change.notes == (
            "the policy says quotas.video = 0 for tier everyone, with or without this",
        )

    @pytest.mark.parametrize(
        ("feature", "who", "told"),
        [
            ("vdeo", FREE, 'unknown feature "vdeo"; did you mean "video"?'),
            ("x", FREE, 'unknown feature "x"; the policy has image, video'),
            ("video", Who(tier="nwe"), 'unknown tier "nwe"; did you mean "new"?'),
            (
                "video",
                Who(tier="new", when=When(plan=frozenset({"pro"}))),
                "tier new, plan is pro: matches nobody, by the policy's own words",
            ),
        ],
    )
    def test_unknown_names_are_refused_with_a_hint(self, feature: str, who: Who, told: str) -> None:
        for command in (close, open_):
            with pytest.raises(UsageError) as caught:
                command(NOTHING, POLICY, feature, who, now=NOW)
            assert str(caught.value) == told

    @pytest.mark.parametrize(
        ("more", "told"),
        [
            ({"end_us": NOW}, "end: 2026-11-20T18:00:00Z is past: it is 2026-11-20T18:00:00Z"),
            (
                {"begin_us": NOW + HOUR_US, "end_us": NOW + HOUR_US},
                "end: 2026-11-20T19:00:00Z is not after 2026-11-20T19:00:00Z, the begin",
            ),
            ({"end_us": 2.0**40}, "end: must be a whole number from 0 to"),
            ({"begin_us": 2**53}, "begin: must be a whole number from 0 to"),
            ({"messages": {"en": "x" * 501}}, "messages.en: must be at most 500 characters"),
            ({"reason": "x" * 501}, "reason: must be at most 500 characters, got 501"),
            ({"actor": "\ud800"}, "actor: holds a lone surrogate"),
        ],
    )
    def test_what_is_out_of_bounds_is_refused(self, more: dict[str, Any], told: str) -> None:
        with pytest.raises(UsageError) as caught:
            close(NOTHING, POLICY, "video", FREE, now=NOW, **more)

        assert str(caught.value).startswith(told)

    def test_all_faults_are_told_at_once(self) -> None:
        with pytest.raises(UsageError) as caught:
            close(NOTHING, POLICY, "vdeo", Who(tier="nwe"), now=NOW, end_us=1)

        assert str(caught.value).startswith("3 faults\n  unknown feature")

    def test_more_overrides_than_a_revision_holds_are_refused(self) -> None:
        row = closed(FREE).overrides[0]
        full = Revision(
            9,
            None,
            tuple(replace(row, id=f"close-x{i}", who=Who(account=f"u{i}")) for i in range(1_000)),
        )

        with pytest.raises(RevisionError, match="at most 1,000 at a time, got 1,001"):
            close(full, POLICY, "video", FREE, now=NOW)

    def test_line_of_a_long_id_is_cut(self) -> None:
        change = close(NOTHING, POLICY, "video", Who(account="ä" * 500), now=NOW)

        assert Revision.from_json(change.revision.to_json()) == change.revision


class TestSet:
    def test_setting_puts_quotas_in_the_place_of_the_cell(self) -> None:
        quotas = [{"rate": "200/day", "capacity": 20}, "5/minute"]

        change = set_(NOTHING, POLICY, "video", NEW, quotas, now=NOW)
        quotas.clear()

        assert change.added[0].quotas == [{"rate": "200/day", "capacity": 20}, "5/minute"]
        assert change.revision.change == "set video for tier new to 200/day cap 20 + 5/minute"
        assert change.undo == "tieredlimit open video --tier new"
        # The policy's own costs: an HD video takes 8.
        assert change.notes == (
            "POST /v1/videos/hd costs 8, never fits a capacity of 5: it is always denied",
        )

    def test_undo_line_of_a_set_undoes_where_the_policy_has_zero(self) -> None:
        revision = set_(NOTHING, POLICY, "video", NEW, "10/day", now=NOW).revision

        change = open_(revision, POLICY, "video", NEW, now=NOW)

        assert change.revision.overrides == ()
        assert change.notes == (
            (
                "the policy says quotas.video = 0 for tier new: nobody gets in there; "
                'to let somebody in: tieredlimit set video --tier new "10/day"'
            ),
        )

    def test_all_faults_of_quotas_are_told_at_once(self) -> None:
        with pytest.raises(UsageError) as caught:
            set_(NOTHING, POLICY, "video", FREE, ["5/minuet", {"rate": "0/day"}], now=NOW)

        assert str(caught.value).startswith("2 faults\n  quotas[0]: got")
        assert "quotas[1].rate: got" in str(caught.value)

    def test_rounding_of_a_rate_is_told(self) -> None:
        change = set_(NOTHING, POLICY, "image", FREE, "29500/second", now=NOW)

        assert "off once rounded" in change.notes[0]

    @pytest.mark.parametrize("quotas", [0, "unlimited"])
    def test_same_as_the_policy_is_told(self, quotas: Any) -> None:
        feature, who = ("video", NEW) if quotas == 0 else ("image", PRO)

        change = set_(NOTHING, POLICY, feature, who, quotas, now=NOW)

        assert change.notes == (f"the policy says the same for tier {who.tier}",)

    def test_more_specific_that_stay_otherwise_are_listed(self) -> None:
        change = set_(closed(U1), POLICY, "video", FREE, "1/day", now=NOW)

        assert ids(change.exceptions) == ["close-1"]


class TestOpen:
    @pytest.mark.parametrize("when", [{}, {"begin_us": NOW + HOUR_US}])
    def test_opening_ends_all_that_was_said_of_the_same_accounts(self, when: Any) -> None:
        revision = closed(FREE, **when)

        change = open_(revision, POLICY, "video", FREE, now=NOW, reason="calm", actor="bob")

        assert change.revision.overrides == ()
        assert ids(change.ended) == ["close-1"]
        assert change.undo == "tieredlimit undo"
        assert (change.revision.actor, change.revision.reason) == ("bob", "calm")
        called_off = ("close-1, due 2026-11-20T19:00:00Z, is called off",)
        assert change.notes == (called_off if when else ())

    def test_opening_below_a_broader_closure_makes_an_exception(self) -> None:
        change = open_(closed(FREE, EVERYONE), POLICY, "video", FREE, now=NOW)

        assert ids(change.revision.overrides) == ["close-2", "open-3"]
        assert ids(change.ended) == ["close-1"]
        assert len(inside(change.revision, NOW)) == len(CROWD)
        assert not inside(change.revision, NOW, "pro")

    def test_exception_goes_with_the_closure_that_it_was_made_to(self) -> None:
        revision = open_(closed(EVERYONE), POLICY, "video", FREE, now=NOW).revision

        revision = open_(revision, POLICY, "video", EVERYONE, now=NOW).revision

        assert revision.overrides == ()

    def test_more_specific_closures_stay_and_are_listed(self) -> None:
        change = open_(closed(FREE, U1), POLICY, "video", FREE, now=NOW)

        assert ids(change.exceptions) == ["close-2"]
        assert len(inside(change.revision, NOW)) == len(CROWD) - 1

    def test_without_exceptions_more_specific_closures_are_opened_too(self) -> None:
        change = open_(closed(FREE, U1), POLICY, "video", FREE, now=NOW, no_exceptions=True)

        assert change.exceptions == ()
        assert len(inside(change.revision, NOW)) == len(CROWD)
        again = push(change.revision, example(), now=NOW + 1).revision
        assert len(inside(again, NOW)) == len(CROWD)

    @pytest.mark.fault("G3")
    def test_opening_for_a_time_closes_again_by_itself(self) -> None:
        begin_us, end_us = NOW + HOUR_US, NOW + 2 * HOUR_US
        times: Any = {"begin_us": begin_us, "end_us": end_us}

        change = open_(closed(FREE), POLICY, "video", FREE, now=NOW, **times)

        assert change.ended == ()
        counts = [len(inside(change.revision, at)) for at in (begin_us - 1, begin_us, end_us)]
        assert counts == [0, len(CROWD), 0]

    def test_opening_for_another_time_replaces_the_former_and_no_share(self) -> None:
        revision = open_(closed(FREE), POLICY, "video", FREE, now=NOW, percent_bp=2_000).revision
        tenth = inside(revision, NOW)
        for hours in (1, 2):
            change = open_(revision, POLICY, "video", FREE, now=NOW, end_us=NOW + hours * HOUR_US)
            revision = change.revision

        assert ids(change.ended) == ["open-3"]
        assert len(inside(revision, NOW + HOUR_US)) == len(CROWD)
        assert inside(revision, NOW + 2 * HOUR_US) == tenth

    @pytest.mark.parametrize(
        "more", [{}, {"percent_bp": 1_000}, {"ramp_us": HOUR_US}, {"end_us": NOW + 1}]
    )
    def test_nothing_closed_is_nothing_to_open(self, more: dict[str, Any]) -> None:
        with pytest.raises(UsageError) as caught:
            open_(NOTHING, POLICY, "video", FREE, now=NOW, **more)

        assert str(caught.value) == ("video is not closed for tier free: there is nothing to open")

    @pytest.mark.parametrize("more", [{}, {"percent_bp": 1_000}, {"ramp_us": HOUR_US}])
    def test_zero_in_the_policy_is_told_with_the_command_that_lets_in(
        self, more: dict[str, Any]
    ) -> None:
        with pytest.raises(UsageError) as caught:
            open_(NOTHING, POLICY, "video", NEW, now=NOW, **more)

        assert str(caught.value) == (
            "the policy says quotas.video = 0 for tier new, and no override closes it: there is "
            'nothing to open; to let somebody in: tieredlimit set video --tier new "10/day"'
        )

    def test_what_is_closed_instead_is_named(self) -> None:
        with pytest.raises(UsageError, match=r"nothing to open; see close-1 \(account u1\)$"):
            open_(closed(U1), POLICY, "video", FREE, now=NOW)

    def test_closure_that_is_over_is_nothing_to_open(self) -> None:
        revision = closed(FREE, end_us=NOW + HOUR_US)

        told = "video is not closed for tier free at 2026-11-20T19:00:00Z: there is nothing to open"
        with pytest.raises(UsageError, match=told):
            open_(revision, POLICY, "video", FREE, now=NOW, begin_us=NOW + HOUR_US, ramp_us=HOUR_US)

    @pytest.mark.parametrize(
        ("more", "told"),
        [
            ({"percent_bp": 0}, "percent: must be from 0.01 to 100"),
            ({"percent_bp": 10_001}, "percent: must be from 0.01 to 100"),
            ({"percent_bp": 12.5}, "percent: must be from 0.01 to 100"),
            ({"ramp_us": SECOND_US - 1}, "ramp: must be at least 1 second"),
            ({"ramp_us": 3_651 * DAY_US}, "ramp: must be at least 1 second and at most 10 years"),
        ],
    )
    def test_share_out_of_bounds_is_refused(self, more: dict[str, Any], told: str) -> None:
        with pytest.raises(UsageError, match=told):
            open_(closed(FREE), POLICY, "video", FREE, now=NOW, **more)

    def test_share_that_was_over_is_no_share_reached(self) -> None:
        revision = open_(
            closed(FREE), POLICY, "video", FREE, now=NOW, percent_bp=5_000, end_us=NOW + HOUR_US
        ).revision

        change = open_(
            revision,
            POLICY,
            "video",
            FREE,
            now=NOW,
            percent_bp=100,
            begin_us=NOW + HOUR_US,
        )

        assert change.added[0].share == Share(100, NOW + HOUR_US)
        assert change.ended == ()

    def test_other_features_and_accounts_are_left_alone(self) -> None:
        revision = close(closed(FREE, PRO), POLICY, "image", FREE, now=NOW, begin_us=NOW + 9)

        change = open_(revision.revision, POLICY, "video", FREE, now=NOW, percent_bp=100)

        assert ids(change.revision.overrides) == ["close-1", "close-2", "close-3", "open-4"]
        assert (change.exceptions, change.notes) == ((), ())

    def test_later_closure_that_a_share_passes_by_is_told(self) -> None:
        revision = closed(FREE, begin_us=NOW + HOUR_US)
        revision = close(revision, POLICY, "video", EVERYONE, now=NOW).revision

        change = open_(revision, POLICY, "video", FREE, now=NOW, percent_bp=1_000)

        assert change.notes == (
            "close-1, due 2026-11-20T19:00:00Z, will not count for whom this lets in",
        )


@pytest.mark.fault("G7")
class TestShares:
    def test_percent_lets_in_that_share_and_more_is_a_superset(self) -> None:
        tenth = open_(closed(FREE), POLICY, "video", FREE, now=NOW, percent_bp=1_000)
        half = open_(tenth.revision, POLICY, "video", FREE, now=NOW, percent_bp=5_000)

        assert 10 < len(inside(tenth.revision, NOW)) < 60
        assert inside(tenth.revision, NOW) < inside(half.revision, NOW)
        assert ids(half.ended) == ["open-2"]
        assert half.revision.change == "open video for tier free, 50 %"

    def test_smaller_share_than_reached_is_refused_with_the_share_reached(self) -> None:
        half = open_(closed(FREE), POLICY, "video", FREE, now=NOW, percent_bp=5_050).revision

        with pytest.raises(UsageError) as caught:
            open_(half, POLICY, "video", FREE, now=NOW, percent_bp=5_049)

        assert str(caught.value) == (
            "50.5 % of tier free are in already, and whoever was let in stays in: "
            "give at least as much, or close video first"
        )

    @pytest.mark.parametrize(
        ("who", "no_exceptions"), [(FREE, False), (FREE, True), (EVERYONE, True)]
    )
    def test_share_begins_anew_once_closed_again(self, who: Who, no_exceptions: bool) -> None:
        half = open_(closed(FREE), POLICY, "video", FREE, now=NOW, percent_bp=5_000).revision
        again = close(half, POLICY, "video", who, now=NOW, no_exceptions=no_exceptions).revision

        change = open_(again, POLICY, "video", FREE, now=NOW, percent_bp=100)

        assert change.added[0].share == Share(100, NOW)
        assert len(inside(change.revision, NOW)) < 20

    def test_closure_with_exceptions_does_not_close_a_share_again(self) -> None:
        half = open_(closed(FREE), POLICY, "video", FREE, now=NOW, percent_bp=5_000).revision
        above = close(half, POLICY, "video", EVERYONE, now=NOW).revision

        with pytest.raises(UsageError, match="50 % of tier free are in already"):
            open_(above, POLICY, "video", FREE, now=NOW, percent_bp=100)

    def test_ramp_goes_on_from_the_share_reached(self) -> None:
        half = open_(closed(FREE), POLICY, "video", FREE, now=NOW, percent_bp=5_000).revision

        change = open_(half, POLICY, "video", FREE, now=NOW + 9, ramp_us=HOUR_US)

        assert change.added[0].share == Share(5_000, NOW + 9, HOUR_US)
        assert change.revision.change == "open video for tier free, from 50 % to all over 1 hour"

    def test_percent_and_ramp_together_climb_from_there(self) -> None:
        change = open_(
            closed(FREE), POLICY, "video", FREE, now=NOW, percent_bp=1_000, ramp_us=HOUR_US
        )

        assert change.added[0].share == Share(1_000, NOW, HOUR_US)

    def test_holding_a_ramp_keeps_whom_it_lets_in_until_workers_hear(self) -> None:
        ramp = open_(closed(FREE), POLICY, "video", FREE, now=NOW, ramp_us=60 * SECOND_US).revision
        now = NOW + 30 * SECOND_US

        change = open_(ramp, POLICY, "video", FREE, now=now, percent_bp=5_000)

        assert inside(change.revision, now) == inside(ramp, now + 2 * SECOND_US)
        assert change.notes == ("lets in 53.33 %: so many are in by the time it counts",)

    def test_ramp_from_a_later_instant_takes_over_there(self) -> None:
        at = NOW + HOUR_US
        slow = open_(closed(FREE), POLICY, "video", FREE, now=NOW, ramp_us=10 * HOUR_US).revision

        change = open_(slow, POLICY, "video", FREE, now=NOW, begin_us=at, ramp_us=HOUR_US)

        assert change.added[0].share == Share(1_000, at, HOUR_US)
        assert [one.end_us for one in change.revision.overrides] == [None, at, None]
        assert inside(change.revision, at) == inside(slow, at)

    def test_everybody_in_is_told(self) -> None:
        revision = open_(
            closed(FREE), POLICY, "video", FREE, now=NOW, end_us=NOW + HOUR_US
        ).revision

        with pytest.raises(UsageError, match="100 % of tier free are in already"):
            open_(revision, POLICY, "video", FREE, now=NOW, percent_bp=1_000)

    def test_finished_ramp_goes_with_the_closure_it_opened(self) -> None:
        ramp = open_(closed(FREE), POLICY, "video", FREE, now=NOW, ramp_us=HOUR_US).revision

        before = push(ramp, example(), now=NOW + HOUR_US - 1)
        after = push(ramp, example(), now=NOW + HOUR_US)

        assert ids(before.revision.overrides) == ["close-1", "open-2"]
        assert after.revision.overrides == ()
        assert after.ended == ()

    def test_finished_ramp_below_a_broader_closure_stays(self) -> None:
        revision = closed(FREE, EVERYONE)
        ramp = open_(revision, POLICY, "video", FREE, now=NOW, ramp_us=HOUR_US).revision

        after = push(ramp, example(), now=NOW + HOUR_US).revision

        assert ids(after.overrides) == ["close-2", "open-3"]
        assert len(inside(after, NOW + HOUR_US)) == len(CROWD)

    @given(
        st.lists(
            st.tuples(
                st.integers(0, 90 * SECOND_US),
                st.none() | st.integers(1, 10_000),
                st.none() | st.integers(SECOND_US, 120 * SECOND_US),
                st.integers(0, 2 * SECOND_US),
            ),
            min_size=2,
            max_size=6,
        ),
        st.sampled_from([[FREE], [EVERYONE], [FREE, EVERYONE]]),
    )
    def test_whom_a_share_has_let_in_is_never_turned_away(
        self, steps: list[tuple[int, int | None, int | None, int]], whos: list[Who]
    ) -> None:
        revision, now = closed(*whos), NOW
        let_in = inside(revision, now)

        for pause_us, percent_bp, ramp_us, publishing_us in steps:
            now += pause_us
            assert let_in <= inside(revision, now)
            before = revision
            try:
                revision = open_(
                    revision,
                    POLICY,
                    "video",
                    FREE,
                    now=now,
                    percent_bp=percent_bp,
                    ramp_us=ramp_us,
                ).revision
            except UsageError:
                event("refused")
            # Until they hear of it, workers go by the revision before.
            now += publishing_us
            let_in |= inside(before, now)
            assert let_in <= inside(revision, now)
            let_in |= inside(revision, now)

        for later_us in (1, 60 * SECOND_US, DAY_US):
            assert let_in <= inside(revision, now + later_us)


class TestLiving:
    @given(several(), st.integers(0, 13 * SECOND_US), people(), st.sampled_from(TIERS), st.data())
    def test_what_is_dropped_would_never_have_counted_again(
        self, rows: list[Override], now: int, account: Account, tier: str, data: st.DataObject
    ) -> None:
        kept = living(rows, now)
        event("dropped some" if len(kept) < len(rows) else "kept all")

        for at in (now, data.draw(st.integers(now, 40 * SECOND_US))):
            was, will = (effective(some, account, tier, at) for some in (rows, kept))
            assert was == will

    def test_finished_ramp_keeps_what_still_takes_exceptions_away(self) -> None:
        revision = set_(NOTHING, POLICY, "video", U1, "1/day", now=NOW).revision
        revision = close(revision, POLICY, "video", FREE, now=NOW, no_exceptions=True).revision
        ramp = open_(revision, POLICY, "video", FREE, now=NOW, ramp_us=HOUR_US).revision

        after = living(ramp.overrides, NOW + HOUR_US)

        # Without the closure, the account's own quotas would count again.
        assert ids(after) == ["set-1", "close-2", "open-3"]
        assert len(inside(replace(ramp, overrides=tuple(after)), NOW + HOUR_US)) == len(CROWD)

    def test_what_is_over_is_dropped_without_a_word(self) -> None:
        revision = closed(FREE, end_us=NOW + 1)

        change = close(revision, POLICY, "video", PRO, now=NOW + 1)

        assert ids(change.revision.overrides) == ["close-2"]
        assert (change.ended, change.notes) == ((), ())


def effective(rows: list[Override], account: Account, tier: str, now: int) -> Override | None:
    won = choose(rows, account, tier, now)
    return None if won is None or won.action == "open" else won


class TestUndo:
    @pytest.mark.fault("G3")
    def test_undo_brings_back_policy_and_overrides_under_a_new_number(self) -> None:
        first = push(closed(FREE), example(), now=NOW).revision
        second = open_(first, POLICY, "video", FREE, now=NOW).revision

        change = undo(second, first, now=NOW, actor="ann")

        assert change.revision.number == second.number + 1
        assert change.revision.digest == first.digest
        assert change.revision.actor == "ann"
        assert change.revision.change == "undo revision 3: open video for tier free"
        assert ids(change.added) == ["close-1"]
        assert change.undo == "tieredlimit undo"

    def test_undo_does_not_bring_back_what_is_over(self) -> None:
        first = closed(FREE, end_us=NOW + HOUR_US)
        second = open_(first, POLICY, "video", FREE, now=NOW).revision

        change = undo(second, first, now=NOW + HOUR_US)

        assert change.revision.overrides == ()
        assert change.notes == ("nothing changes: the same is in force already",)

    def test_names_stay_unique_after_an_undo(self) -> None:
        first = closed(FREE)
        second = open_(first, POLICY, "video", FREE, now=NOW).revision
        third = undo(second, first, now=NOW).revision

        fourth = close(third, POLICY, "video", PRO, now=NOW).revision

        assert ids(fourth.overrides) == ["close-1", "close-4"]

    @pytest.mark.parametrize("back", [undo, rollback])
    def test_only_what_is_older_can_come_back(self, back: Any) -> None:
        with pytest.raises(UsageError, match="revision 1 is not before revision 1"):
            back(closed(FREE), closed(FREE), now=NOW)


class TestBase:
    @pytest.mark.fault("G5")
    def test_push_and_rollback_leave_what_is_closed_closed(self) -> None:
        old = push(NOTHING, example(), now=NOW).revision
        paused = close(old, POLICY, "video", FREE, now=NOW).revision
        document = example()
        document["tiers"]["free"]["quotas"]["video"] = "99/day"

        pushed = push(paused, document, now=NOW, source="b.toml", actor="ci", reason="deploy")
        back = rollback(pushed.revision, old, now=NOW)

        assert pushed.revision.base == document
        assert back.revision.base == old.base
        assert pushed.revision.overrides == back.revision.overrides == paused.overrides
        assert pushed.revision.change == "push b.toml"
        assert (pushed.revision.actor, pushed.revision.reason) == ("ci", "deploy")
        assert back.revision.change == "roll back to the policy of revision 1"
        assert back.revision.number == 4

    def test_pushed_document_is_a_copy_that_a_store_gives_back(self) -> None:
        document = deepcopy(example())

        revision = push(NOTHING, document, now=NOW).revision
        document["tiers"].clear()

        assert revision.base == example()
        assert Revision.from_json(revision.to_json()) == revision

    @pytest.mark.fault("G2")
    def test_policy_with_faults_is_not_pushed(self) -> None:
        with pytest.raises(PolicyError, match=r"^b.toml: 2 faults"):
            push(NOTHING, {"features": {}, "tiers": {}}, now=NOW, source="b.toml")

    def test_policy_of_an_older_release_that_has_faults_is_not_brought_back(self) -> None:
        old, revision = Revision(1, {"features": 7}), Revision(2, example())

        with pytest.raises(PolicyError, match=r"^the policy of revision 1: "):
            rollback(revision, old, now=NOW)

    def test_rollback_to_no_policy_is_told(self) -> None:
        revision = push(NOTHING, example(), now=NOW).revision

        change = rollback(revision, NOTHING, now=NOW)

        assert change.revision.base is None
        assert change.notes == ("revision 0 stored no policy: each worker uses its own file",)

    def test_same_policy_again_is_told(self) -> None:
        revision = push(NOTHING, example(), now=NOW).revision

        change = push(revision, example(), now=NOW)

        assert change.notes == ("nothing changes: the same is in force already",)
        assert change.revision.digest == revision.digest

    def test_overrides_that_the_policy_knows_nothing_of_are_told(self) -> None:
        revision = close(closed(FREE), POLICY, "image", FREE, now=NOW).revision

        change = push(revision, with_cell("5/minute"), now=NOW)

        assert change.notes == (
            "close-1 is about the feature video, which this policy lacks",
            "close-2 is about the tier free, which this policy lacks",
        )

    def test_text_out_of_bounds_is_refused(self) -> None:
        with pytest.raises(UsageError, match="reason: must be at most 500 characters"):
            push(NOTHING, example(), now=NOW, reason="x" * 501)


class TestOptions:
    @pytest.mark.parametrize(
        ("who", "words"),
        [
            (EVERYONE, "--all"),
            (NEW, "--tier new"),
            (Who(account="a b'c"), """--account 'a b'"'"'c'"""),
            (
                Who(
                    tier="new",
                    when=When(
                        plan=frozenset({"pro", "free"}),
                        account_age_below_us=7 * DAY_US,
                        created_after_us=BORN_US,
                        tags=frozenset({"beta"}),
                        anonymous=False,
                    ),
                ),
                (
                    "--tier new --plan free --plan pro --no-anonymous --tag beta "
                    "--account-age-below '7 days' --created-after 2026-11-20T18:00:00Z"
                ),
            ),
            (Who(when=When(anonymous=True)), "--anonymous"),
        ],
    )
    def test_who_is_written_for_a_shell(self, who: Who, words: str) -> None:
        assert options(who) == words


def changed(**tiers: Any) -> Policy:
    """Return the example with these cells of images, by tier."""
    document = example()
    for tier, cell in tiers.items():
        document["tiers"][tier].setdefault("quotas", {})["image"] = cell
    return Policy.from_dict(document)


class TestDiff:
    def test_nothing_differs_from_itself(self) -> None:
        assert diff(POLICY, changed()) == []

    @pytest.mark.parametrize(
        ("before", "after", "grants"),
        [
            ("20/minute", "40/minute", 0),  # the same window: the fraction used is kept
            ("20/minute", {"rate": "20/minute", "capacity": 30}, 10),
            ({"rate": "20/minute", "capacity": 30}, "20/minute", 0),
            ("20/minute", "20/hour", 20),  # another name starts full
            ("20/minute", ["20/minute", "9/hour"], 0),
            ("20/minute", ["5/minute", "9/hour"], 0),
            (["20/minute", "9/hour"], "20/minute", 20),  # the hour's bucket denied, now it is gone
            (["20/minute", "9/hour"], ["20/minute", {"rate": "9/hour", "capacity": 12}], 3),
            (0, "20/minute", 20),
            (0, ["20/minute", "9/hour"], 9),
            ("20/minute", 0, 0),
            ("20/minute", "unlimited", None),
            ("unlimited", "20/minute", 0),
            ("20/minute", {"rate": "20/minute", "per": "org"}, 20),
        ],
    )
    def test_tokens_handed_out_are_those_of_an_empty_bucket(
        self, before: Any, after: Any, grants: int | None
    ) -> None:
        (difference,) = diff(changed(free=before), changed(free=after))

        assert difference.path == "tiers.free.quotas.image"
        assert difference.grants == grants

    @pytest.mark.parametrize(
        ("after", "line"),
        [
            ("40/minute", "20/minute -> 40/minute"),
            (
                {"rate": "20/minute", "capacity": 21},
                "20/minute -> 20/minute cap 21 (hands out at most 1 token per account)",
            ),
            ("1500/day", "20/minute -> 1500/day (hands out at most 1,500 tokens per account)"),
            ("unlimited", "20/minute -> unlimited"),
            (
                {"rate": "20/minute", "name": "x"},
                (
                    "20/minute named image-minute -> 20/minute named x "
                    "(hands out at most 20 tokens per account)"
                ),
            ),
        ],
    )
    def test_cell_is_one_line(self, after: Any, line: str) -> None:
        (difference,) = diff(POLICY, changed(free=after))

        assert str(difference) == f"tiers.free.quotas.image: {line}"

    def test_everything_else_is_listed_too(self) -> None:
        document = example()
        document["order"] = ["pro", "new", "staff", "everyone"]
        document["features"]["video"] = {"routes": {"POST /v1/videos": 2, "GET /v1/v": 1}}
        document["features"]["song"] = {}
        document["defaults"]["quotas"]["song"] = "1/day"
        document["tiers"]["staff"] = {"when": {"tags": "staff"}, "extends": "pro"}
        del document["tiers"]["free"]
        document["tiers"]["new"]["when"]["account_age_below"] = "9 days"
        document["tiers"]["everyone"]["messages"] = {"image": "Wait."}
        other = Policy.from_dict(document)

        assert [str(one) for one in diff(POLICY, other)] == [
            "order: new, pro, free, everyone -> pro, new, staff, everyone",
            "features.video.outage: deny -> allow",
            'features.video.routes."POST /v1/videos": costs 1 -> costs 2',
            'features.video.routes."POST /v1/videos/hd": removed: costs 8',
            'features.video.routes."GET /v1/v": added: costs 1',
            "features.song: added",
            (
                "tiers.new.when: plan is free, account is younger than 7 days -> "
                "plan is free, account is younger than 9 days"
            ),
            "tiers.new.quotas.song: added: 1/day",
            "tiers.pro.quotas.song: added: 1/day",
            "tiers.free: removed",
            "tiers.everyone.quotas.song: added: 1/day",
            'tiers.everyone.messages.image: added: "Wait."',
            (
                'tiers.everyone.messages.video: removed: en "Sign in to make videos.", '
                'fr "Connectez-vous pour créer des vidéos."'
            ),
            "tiers.staff: added",
            "tiers.staff.when: added: tags include staff",
            "tiers.staff.quotas.image: added: unlimited",
            "tiers.staff.quotas.video: added: 200/day cap 20 + 5000/day per org",
            "tiers.staff.quotas.song: added: 1/day",
        ]
        assert "features.song: removed" in [str(one) for one in diff(other, POLICY)]

    def test_share_of_an_outage_is_told_where_there_is_one(self) -> None:
        denying, local, half = (example() for _ in range(3))
        denying["features"]["image"]["outage"] = "deny"
        local["features"]["image"]["outage"] = "local"
        half["features"]["image"].update(outage="local", outage_share="50%")
        before, between, after = map(Policy.from_dict, (denying, local, half))

        assert [str(one) for one in diff(before, between)] == [
            "features.image.outage: deny -> local",
            "features.image.outage_share: added: 10%",
        ]
        assert [str(one) for one in diff(between, after)] == [
            "features.image.outage_share: 10% -> 50%"
        ]

    def test_condition_that_goes_or_comes_is_told(self) -> None:
        document = example()
        document["order"] = ["new", "pro", "everyone", "free"]
        del document["tiers"]["free"]["when"]
        document["tiers"]["everyone"]["when"] = {"anonymous": True}
        lines = [str(one) for one in diff(POLICY, Policy.from_dict(document))]

        assert "tiers.free.when: plan is free -> everybody" in lines
        assert "tiers.everyone.when: everybody -> has no account" in lines


def test_change_is_undone_by_the_general_command_unless_it_says_otherwise() -> None:
    assert Change(NOTHING).undo == "tieredlimit undo"

"""What a process counts: decisions, a few denials, and calls."""

from __future__ import annotations

import json
from collections import Counter
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.contract import SECOND
from tieredlimit import Account, UsageError
from tieredlimit._core import tally as tally_module
from tieredlimit._core.tally import (
    CALL_DECISIONS,
    CALL_SECONDS,
    MAX_PER_SECOND,
    OUTCOMES,
    SHADOW_OUTCOMES,
    CallStats,
    Pace,
    Samples,
    Tallies,
    Tally,
    hashed_id,
    plain_id,
)
from tieredlimit.decision import Reason

ANN = Account("ann")
REASONS = get_args(Reason)
PAIRS = st.tuples(st.sampled_from(["image", "video"]), st.sampled_from(["new", "old"]))
ENDINGS = st.tuples(st.booleans(), st.sampled_from(REASONS), st.booleans()).map(
    lambda ending: (ending[1] == "allowed" or (ending[1] == "outage" and ending[0]), *ending[1:])
)


class TestTally:
    def test_counts_are_what_was_added_without_zeros(self) -> None:
        tally = Tally()

        tally.allowed += 1
        tally.allowed += 1
        tally.shadow_denied += 1

        assert tally.counts() == {"allowed": 2, "shadow_denied": 1}

    @pytest.mark.parametrize(
        ("allowed", "reason", "shadow", "outcome"),
        [
            (True, "allowed", False, "allowed"),
            *((False, reason, False, reason) for reason in REASONS[1:-1]),
            (True, "outage", False, "outage_allowed"),
            (False, "outage", False, "outage_denied"),
            (True, "allowed", True, "shadow_allowed"),
            (False, "quota", True, "shadow_denied"),
        ],
    )
    def test_every_decision_has_one_outcome(
        self, allowed: bool, reason: str, shadow: bool, outcome: str
    ) -> None:
        tally = Tally()

        tally.count(allowed, reason, shadow=shadow)

        assert tally.counts() == {outcome: 1}

    @given(st.lists(ENDINGS))
    def test_outcomes_add_up_to_the_decisions(self, endings: list[tuple[bool, str, bool]]) -> None:
        tally = Tally()

        for allowed, reason, shadow in endings:
            tally.count(allowed, reason, shadow=shadow)

        counts = tally.counts()
        assert sum(counts.get(outcome, 0) for outcome in SHADOW_OUTCOMES) == sum(
            shadow for _, _, shadow in endings
        )
        assert sum(counts.values()) == len(endings)
        assert set(counts) <= {*OUTCOMES, *SHADOW_OUTCOMES}

    def test_holds_nothing_else(self) -> None:
        with pytest.raises(AttributeError):
            Tally().alowed = 1  # type: ignore[attr-defined]  # a slip that must not go unseen


class TestTallies:
    def test_pair_has_one_tally(self) -> None:
        tallies = Tallies()

        tally = tallies.of("video", "new")

        assert tallies.of("video", "new") is tally
        assert tallies.of("video", "old") is not tally
        assert [pair for pair, _ in tallies.items()] == [("video", "new"), ("video", "old")]

    def test_snapshot_is_ready_for_json_and_leaves_out_what_never_happened(self) -> None:
        tallies = Tallies()
        tallies.of("image", "new")
        tallies.of("video", "new").allowed += 41

        assert json.loads(json.dumps(tallies.snapshot())) == {"video/new": {"allowed": 41}}

    def test_since_is_everything_before_the_first_mark(self) -> None:
        tallies = Tallies()
        tallies.of("video", "new").closed += 3

        assert tallies.since() == tallies.snapshot() == {"video/new": {"closed": 3}}

    def test_mark_lets_since_begin_anew_for_all_that_were_counted_or_are_new(self) -> None:
        tallies = Tallies()
        video = tallies.of("video", "new")
        video.allowed += 41
        tallies.mark()
        at_once = tallies.since()

        video.closed += 2
        tallies.of("image", "new").allowed += 1

        assert at_once == {}
        assert tallies.since() == {"video/new": {"closed": 2}, "image/new": {"allowed": 1}}
        assert tallies.snapshot()["video/new"] == {"allowed": 41, "closed": 2}

    def test_increment_that_another_thread_lost_is_no_negative_count(self) -> None:
        tallies = Tallies()
        video = tallies.of("video", "new")
        video.allowed = 7
        tallies.mark()

        video.allowed = 6

        assert tallies.since() == {}

    @given(
        st.lists(st.tuples(PAIRS, ENDINGS)),
        st.lists(st.tuples(PAIRS, ENDINGS)),
        st.none() | st.integers(0, 5),
    )
    def test_nothing_is_left_out_of_the_sums(
        self,
        before: list[tuple[tuple[str, str], tuple[bool, str, bool]]],
        after: list[tuple[tuple[str, str], tuple[bool, str, bool]]],
        most: int | None,
    ) -> None:
        tallies = Tallies()
        for pair, (allowed, reason, shadow) in before:
            tallies.of(*pair).count(allowed, reason, shadow=shadow)
        tallies.mark()
        for pair, (allowed, reason, shadow) in after:
            tallies.of(*pair).count(allowed, reason, shadow=shadow)

        snapshot, since = tallies.snapshot(most), tallies.since(most)

        for shown, decisions in ((snapshot, before + after), (since, after)):
            assert sum(sum(counts.values()) for counts in shown.values()) == len(decisions)
            seen = Counter("/".join(pair) for pair, _ in decisions)
            named = {pair: sum(counts.values()) for pair, counts in shown.items() if pair != "*/*"}
            assert named.items() <= seen.items()
            assert len(named) <= len(seen) if most is None else len(named) <= most

    def test_busiest_pairs_are_named_and_the_others_summed(self) -> None:
        tallies = Tallies()
        for busy, feature in enumerate(["a", "b", "c", "d"]):
            tallies.of(feature, "new").allowed += busy
        tallies.of("b", "new").quota += 9
        tallies.of("a", "new").quota += 1

        shown = tallies.snapshot(2)

        assert shown == {
            "b/new": {"allowed": 1, "quota": 9},
            "d/new": {"allowed": 3},
            "*/*": {"quota": 1, "allowed": 2},
        }

    def test_number_of_pairs_is_bounded_whatever_is_pushed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tally_module, "MOST_PAIRS", 3)
        tallies = Tallies()

        for i in range(100):
            tallies.of(f"feature-{i}", "new").allowed += 1

        assert len(tallies.items()) == 4
        assert tallies.snapshot()["*/*"] == {"allowed": 97}
        assert tallies.snapshot(2) == {
            "feature-0/new": {"allowed": 1},
            "*/*": {"allowed": 99},
        }

    def test_pairs_may_be_added_while_they_are_read(self) -> None:
        tallies = Tallies()
        tallies.of("a", "new")

        for (feature, _), _ in tallies.items():  # noqa: PERF102 -- no dict
            tallies.of(f"{feature}-more", "new")

        assert len(tallies.items()) == 2


class TestPace:
    @given(
        st.integers(1, 5), st.lists(st.sampled_from([0, 1, 99_999, 300_000, SECOND - 1, SECOND]))
    )
    def test_no_second_has_more_than_its_share_and_all_others_are_counted(
        self, per_second: int, steps: list[int]
    ) -> None:
        pace, now = Pace(per_second), 0
        passed: list[int] = []

        for step in steps:
            now += step
            room = sum(now - earlier < SECOND for earlier in passed) < per_second
            assert pace.lets(now) is room
            if room:
                passed.append(now)

        assert len(passed) + pace.withheld == len(steps)

    def test_clock_that_stepped_back_an_hour_does_not_silence_it(self) -> None:
        pace = Pace(1)
        assert pace.lets(3_600 * SECOND)

        assert pace.lets(0)
        assert not pace.lets(SECOND - 1)
        assert pace.lets(SECOND)

    @pytest.mark.parametrize("wrong", [0, -1, MAX_PER_SECOND + 1, 1.0, True, "10", None])
    def test_bound_that_is_none_is_refused(self, wrong: int) -> None:
        with pytest.raises(UsageError, match="per_second must be a whole number from 1 to 1,000"):
            Pace(wrong)


class TestSamples:
    def test_sample_says_when_and_what_and_hides_who(self) -> None:
        samples = Samples("prod")

        samples.add(5 * SECOND, ANN, "video", "new", "closed")

        (sample,) = json.loads(json.dumps(samples.snapshot()))
        assert sample == {
            "at_us": 5 * SECOND,
            "feature": "video",
            "tier": "new",
            "reason": "closed",
            "account": hashed_id(ANN, "prod"),
        }

    def test_ids_are_shown_if_asked(self) -> None:
        samples = Samples("prod", plain=True)

        samples.add(0, ANN, "video", "new", "closed")

        assert [sample["account"] for sample in samples.snapshot()] == ["ann"]

    def test_newest_are_kept(self) -> None:
        samples = Samples("prod", most=3, per_second=1)

        for second in range(10):
            samples.add(second * SECOND, ANN, "video", "new", "quota")

        kept = [sample["at_us"] for sample in samples.snapshot()]
        assert kept == [7 * SECOND, 8 * SECOND, 9 * SECOND]

    def test_flood_of_one_second_does_not_push_out_the_seconds_before(self) -> None:
        samples = Samples("prod", most=50, per_second=10)
        samples.add(0, ANN, "image", "old", "quota")

        for i in range(100_000):
            samples.add(SECOND + i, Account(f"u{i}"), "video", "new", "closed")

        assert Counter(sample["feature"] for sample in samples.snapshot()) == {
            "image": 1,
            "video": 10,
        }

    def test_snapshot_is_a_copy(self) -> None:
        samples = Samples("prod")
        samples.add(0, ANN, "video", "new", "closed")

        samples.snapshot()[0]["account"] = "somebody else"

        assert samples.snapshot()[0]["account"] == hashed_id(ANN, "prod")

    @pytest.mark.parametrize("wrong", [0, -1, 1.5, True])
    def test_room_for_none_is_refused(self, wrong: int) -> None:
        with pytest.raises(UsageError, match="most must be a whole number above 0"):
            Samples("prod", most=wrong)


class TestIds:
    def test_hash_is_the_same_in_every_process(self) -> None:
        assert hashed_id(ANN, "prod") == "06dd9a1b230a521b"

    @given(st.text("ab\0*", min_size=1), st.text("ab\0*", min_size=1), st.booleans())
    def test_hash_tells_accounts_apart(self, one: str, other: str, anonymous: bool) -> None:
        first, second = Account(one), Account(other, anonymous=anonymous)

        same = hashed_id(first, "prod") == hashed_id(second, "prod")

        assert same is (one == other and not anonymous)

    def test_hash_differs_between_namespaces(self) -> None:
        assert hashed_id(ANN, "prod") != hashed_id(ANN, "test")

    def test_client_address_is_marked(self) -> None:
        address = Account("192.0.2.1", anonymous=True)

        assert hashed_id(address, "prod") == "*" + hashed_id(Account("192.0.2.1"), "prod")
        assert plain_id(address) == "*192.0.2.1"

    @given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300))
    def test_id_is_spelled_on_one_short_line(self, hostile: str) -> None:
        for spelled in (plain_id(Account(hostile)), hashed_id(Account(hostile), "prod")):
            assert len(spelled) <= 65
            assert spelled.isascii()
            assert spelled.isprintable()


class TestCallStats:
    @pytest.mark.parametrize(
        ("seconds", "decisions", "by_seconds", "by_decisions"),
        [
            (0.0, 1, 0, 0),
            (0.00025, 2, 0, 1),
            (0.000251, 3, 1, 2),
            (1.0, 128, len(CALL_SECONDS) - 1, len(CALL_DECISIONS) - 1),
            (1.01, 129, len(CALL_SECONDS), len(CALL_DECISIONS)),
        ],
    )
    def test_call_falls_into_the_first_bound_that_is_not_below_it(
        self, seconds: float, decisions: int, by_seconds: int, by_decisions: int
    ) -> None:
        stats = CallStats()

        stats.observe(seconds, decisions)

        assert stats.by_seconds.index(1) == by_seconds
        assert stats.by_decisions.index(1) == by_decisions

    @given(
        st.lists(st.tuples(st.floats(0, 5), st.integers(1, 200))),
    )
    def test_sums_are_those_of_the_calls(self, calls: list[tuple[float, int]]) -> None:
        stats = CallStats()

        for seconds, decisions in calls:
            stats.observe(seconds, decisions)

        assert sum(stats.by_seconds) == sum(stats.by_decisions) == len(calls)
        assert json.loads(json.dumps(stats.snapshot())) == {
            "calls": len(calls),
            "decisions": sum(decisions for _, decisions in calls),
            "failures": 0,
            "seconds_sum": pytest.approx(sum(seconds for seconds, _ in calls), abs=1e-5),
        }

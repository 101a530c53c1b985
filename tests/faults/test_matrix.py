"""Whatever happens to Redis: each feature gets its outage answer, in time, and charged once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.listed import FAULTS, Fault
from tests.faults.matrix import named
from tests.faults.runs import (
    ANSWERS,
    LOCAL,
    MOST_CLOSED_MS,
    MOST_OPEN_MS,
    MOST_RECOVERY_SECONDS,
    MOST_STALL_MS,
    run_of,
)

pytestmark = [pytest.mark.redis, pytest.mark.fault("E4")]

every_fault = pytest.mark.parametrize(
    "fault",
    [pytest.param(one, marks=pytest.mark.fault(*one.lines), id=one.name) for one in FAULTS],
)
every_answer = pytest.mark.parametrize("answer", ANSWERS)

OUTAGE = {"allow": {200}, "deny": {503}, "local": {200, 503}}


@every_answer
@every_fault
async def test_requests_get_the_outage_answer_and_never_a_500(fault: Fault, answer: str) -> None:
    run = await run_of(fault)

    for attempt in run.attempts:
        during = set(attempt.during[answer])
        if fault.outcome == "decided":
            assert during == {200}
            assert not attempt.given_out[answer]
        elif fault.outcome == "outage":
            assert during == OUTAGE[answer]
        elif fault.outcome == "outage, asked":
            assert during == OUTAGE[answer] - ({503} if answer == "local" else set())
        else:
            assert during <= {200} | OUTAGE[answer]
        assert set(attempt.statuses[answer]) - during <= {200, *OUTAGE[answer]}


@every_fault
async def test_zero_and_closed_stay_denied_and_unmetered_routes_untouched(fault: Fault) -> None:
    run = await run_of(fault)

    for attempt in run.attempts:
        assert set(attempt.statuses["zero"]) == {403}
        assert set(attempt.statuses["closed"]) == {403}
        assert set(attempt.statuses["health"]) == {200}


@every_answer
@every_fault
async def test_nothing_is_charged_twice_and_what_was_decided_is_charged(
    fault: Fault, answer: str
) -> None:
    run = await run_of(fault)

    for attempt in run.attempts:
        for held in attempt.held[answer]:
            least = attempt.decided if fault.keeps else attempt.decided_after
            assert least[answer] <= held <= attempt.decided[answer] + attempt.asked[answer]
            if fault.runs == "never" and fault.keeps:
                assert held == attempt.decided[answer]


@every_fault
async def test_what_was_asked_and_not_answered_has_run_where_the_fault_says_so(
    fault: Fault,
) -> None:
    run = await run_of(fault)

    for attempt in run.attempts:
        ran = sum(attempt.held[answer][0] - attempt.decided[answer] for answer in ANSWERS)
        assert (ran > 0) == (fault.runs == "once") or fault.runs == "perhaps" or not fault.keeps


@every_fault
async def test_one_process_gives_out_its_share_and_no_more(fault: Fault) -> None:
    run = await run_of(fault)

    for attempt in run.attempts:
        # What the store has decided before counts, too.
        assert attempt.given_out["local"] <= LOCAL - 4
        if fault.outcome == "outage":
            assert attempt.given_out["local"] == LOCAL - 4


@every_fault
async def test_breaker_opens_and_closes_with_the_end_of_the_fault(fault: Fault) -> None:
    run = await run_of(fault)

    for attempt in run.attempts:
        assert not attempt.closed_early
        assert attempt.opened == (fault.outcome in ("outage", "some"))


@every_answer
@every_fault
async def test_request_takes_no_longer_than_its_decision_may(fault: Fault, answer: str) -> None:
    run = await run_of(fault)

    opened = run.open_ms(answer)
    assert run.own_ms(answer) <= MOST_CLOSED_MS
    assert opened is None or opened <= MOST_OPEN_MS


@every_fault
async def test_event_loop_is_not_held_up(fault: Fault) -> None:
    run = await run_of(fault)

    assert run.stall_ms <= MOST_STALL_MS


@every_fault
async def test_store_decides_again_by_itself_soon_after_it_is_back(fault: Fault) -> None:
    run = await run_of(fault)

    assert run.recovery is not None
    assert run.recovery <= MOST_RECOVERY_SECONDS
    for attempt in run.attempts:
        # Of each answer's route, `local` included: its own buckets are left again.
        assert attempt.decided_after == dict.fromkeys(ANSWERS, 3)


def test_page_shows_every_fault() -> None:
    page = Path(__file__).parents[2] / "docs" / "faults.md"

    assert list(named(page.read_text("utf-8"))) == [fault.name for fault in FAULTS]

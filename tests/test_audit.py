"""That the audit finds what is admitted beyond a limit, and that nothing is."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.audit import Crew, Store, bound_of
from benchmarks.audit_check import Findings, Level, LogError, check
from benchmarks.audit_limits import FEATURES, LEASE_US, TIERS, policy
from benchmarks.audit_log import (
    ADMITTED,
    ASKED,
    DENIED,
    RELEASE,
    RENEW,
    SETTLE,
    End,
    Files,
    Log,
    Take,
)
from tests.servers import RedisServer
from tieredlimit import Account, Policy
from tieredlimit._core.table import Table

CHECKOUT = Path(__file__).parent.parent
ONE, TWO, POOLED, JOB, RESERVED = range(len(FEATURES))
T = 1_700_000_000_000_000
NEW, OLD = 0, 1
"""The numbers of two accounts, one of each tier."""


class Notes:
    """Write notes as workers would, and have them checked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[int, Files] = {}
        self.gone: dict[int, int] = {}

    def worker(self, *notes: Take | End, gone: int = T) -> None:
        number = len(self.files)
        self.files[number] = Files.of(self.folder, number)
        self.files[number].create()
        self.gone[number] = gone
        log = Log(self.files[number])
        for note in notes:
            if isinstance(note, End):
                log.end(note)
                continue
            if note.outcome != ASKED and note.now:
                log.take(Take(ASKED))
            log.take(note)
        log.close()

    def check(self) -> Findings:
        return check(self.files, self.gone)


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path)


def took(now: int, feature: int = ONE, cost: int = 1, account: int = OLD, name: int = 0) -> Take:
    return Take(ADMITTED, feature, account, cost, 0, T + now, name.to_bytes(16))


def ended(kind: int, now: int, *, name: int = 0, cost: int = 3, actual: int = 0) -> list[End]:
    feature = RESERVED if kind == SETTLE else JOB
    before = End(0, kind, 0, feature, OLD, cost, actual, 7 + name, T, T, name.to_bytes(16))
    return [before, before._replace(answered=1, done=1, first=T + now, last=T + now)]


def interval(feature: int, bucket: int = 0) -> int:
    return FEATURES[feature].buckets[bucket].interval_us


def test_bucket_spent_at_once_and_refilled_to_the_microsecond_is_no_over_admission(
    notes: Notes,
) -> None:
    notes.worker(took(0), took(0), took(0), took(interval(ONE)), took(2 * interval(ONE)))

    found = notes.check()

    assert (found.over, found.closest_us, found.counts["admitted"]) == (0, 0, 5)


@pytest.mark.parametrize("early", [1, interval(ONE)])
def test_admission_a_microsecond_early_is_found_both_ways(notes: Notes, early: int) -> None:
    notes.worker(took(0), took(0), took(0), took(interval(ONE) - early))

    found = notes.check()

    assert (found.over_intervals, found.over_replay, found.closest_us) == (1, 1, -early)
    assert [tokens for _, tokens in found.excess.values()] == [1]
    assert found.told == [
        f"at {T + interval(ONE) - early}, one for account 1: 1 too many from one of account 1"
    ]


def test_admissions_of_several_workers_are_counted_together(notes: Notes) -> None:
    notes.worker(took(0), took(2))
    notes.worker(took(1), took(3))

    assert notes.check().over == 1


def test_interval_that_begins_long_after_the_first_admission_is_looked_at(notes: Notes) -> None:
    late = 1_000 * interval(ONE)
    notes.worker(took(0), took(late), took(late), took(late), took(late + 5))

    assert notes.check().over == 1


def test_cost_counts_as_so_many_tokens(notes: Notes) -> None:
    notes.worker(took(0, cost=2), took(0, cost=2))

    assert notes.check().over == 1


def test_second_quota_is_checked_where_the_first_has_room(notes: Notes) -> None:
    pause = 4 * interval(TWO)
    # Each time the shorter one is full again, the longer one has gained less than one.
    notes.worker(*[took(i * pause, TWO) for i in range(9) for _ in range(4)])

    found = notes.check()

    assert found.over > 0
    assert list(found.excess) == ["two-long of account 1"]


def test_pool_is_shared_and_its_last_part_is_left_to_the_other_tier(notes: Notes) -> None:
    pool = FEATURES[POOLED].buckets[1]
    accounts = range(NEW, 200, 2)
    within = [took(0, POOLED, 5, account) for account in accounts[:6]]
    notes.worker(*within, *[took(1, POOLED, 5, account + 1) for account in accounts[:6]])

    assert pool.capacity == 60
    assert notes.check().over == 0

    notes.worker(took(2, POOLED, 1, accounts[7]))
    assert list(notes.check().excess) == ["pool"]


def test_takes_of_one_instant_are_judged_in_the_order_that_excuses_them(notes: Notes) -> None:
    old = [took(0, POOLED, 5, account) for account in range(1, 13, 2)]
    new = [took(0, POOLED, 5, account) for account in range(0, 12, 2)]
    notes.worker(*old, *new)

    assert notes.check().over == 0


def test_what_settling_gives_back_may_be_admitted_again_from_then_on(notes: Notes) -> None:
    takes = [took(0, RESERVED, 3) for _ in range(3)]
    notes.worker(*takes, took(100, RESERVED, 3), *ended(SETTLE, 99))
    assert notes.check().over == 0

    notes.worker(took(98, RESERVED, 3))
    found = notes.check()
    assert (found.over_intervals, found.over_replay) == (2, 2)  # of the account, twice too early


def test_nothing_is_given_back_beyond_full(notes: Notes) -> None:
    full = 9 * interval(RESERVED)
    takes = [took(full, RESERVED, 3) for _ in range(4)]
    notes.worker(took(0, RESERVED, 3), *takes, *ended(SETTLE, full))

    assert notes.check().over == 1


def test_what_settling_charges_in_addition_leaves_less_to_admit(notes: Notes) -> None:
    takes = [took(0, RESERVED, 3), took(0, RESERVED, 3), took(2, RESERVED, 3)]
    notes.worker(*takes, *ended(SETTLE, 1, actual=4))

    found = notes.check()

    assert (found.over_intervals, found.over_replay) == (0, 1)


@pytest.mark.parametrize(("at", "over"), [(100, 0), (900, 0), (1_100, 1)])
def test_settling_that_nobody_heard_of_excuses_what_it_may_have_given_back_and_no_more(
    notes: Notes, at: int, over: int
) -> None:
    takes = [took(0, RESERVED, 3) for _ in range(3)]
    asked, _ = ended(SETTLE, 0)
    later = [took(at, RESERVED, 3), *[took(at, RESERVED, 1) for _ in range(over)]]
    notes.worker(*takes, *later, asked, gone=T + 1_000)

    found = notes.check()

    assert (found.over, found.counts["unknown"]) == (over, 1)


def test_no_more_slots_are_held_than_there_are(notes: Notes) -> None:
    notes.worker(took(0, JOB, name=1), took(0, JOB, name=2), took(LEASE_US - 1, JOB, name=3))

    found = notes.check()

    assert (found.over_slots, found.most_held) == (1, 3)


def test_slot_is_free_at_the_end_of_its_lease_or_once_it_is_released(notes: Notes) -> None:
    held = [took(0, JOB, name=1), took(0, JOB, name=2)]
    more = [took(50, JOB, name=3), took(LEASE_US, JOB, name=4)]
    notes.worker(*held, *more, *ended(RELEASE, 49, name=1))

    found = notes.check()

    assert (found.over, found.most_held) == (0, 2)


def test_renewed_slot_is_held_for_its_whole_lease_again(notes: Notes) -> None:
    takes = [took(0, JOB, name=1), took(0, JOB, name=2)]
    more = [took(LEASE_US, JOB, name=3), took(LEASE_US, JOB, name=4)]
    notes.worker(*takes, *more, *ended(RENEW, 10, name=1))

    assert notes.check().over_slots == 1


def test_renewal_of_what_was_over_is_found(notes: Notes) -> None:
    notes.worker(took(0, JOB, name=1), *ended(RENEW, LEASE_US, name=1))

    assert notes.check().over_slots == 1


def test_admission_without_the_servers_word_is_found(notes: Notes) -> None:
    notes.worker(took(-T))

    found = notes.check()

    assert (found.unasked, found.over) == (1, 1)


def test_denials_charge_nothing_and_what_was_not_noted_is_counted_as_lost(notes: Notes) -> None:
    denied = [took(0)._replace(outcome=DENIED) for _ in range(9)]
    notes.worker(*denied, took(0), Take(ASKED), Take(ASKED))

    found = notes.check()

    assert found.over == 0
    assert [found.counts[name] for name in ("denied", "admitted", "lost")] == [9, 1, 2]


def test_note_that_was_cut_short_by_a_kill_is_left_out(notes: Notes) -> None:
    notes.worker(took(0), took(1))
    takes = notes.files[0].takes
    takes.write_bytes(takes.read_bytes()[:-1])

    found = notes.check()

    assert (found.counts["admitted"], found.counts["lost"]) == (1, 1)


def test_notes_out_of_order_are_refused(notes: Notes) -> None:
    notes.worker(took(1), took(0))

    with pytest.raises(LogError, match="takes of worker 0"):
        notes.check()


@given(
    steps=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 3)), min_size=1, max_size=30),
    capacity=st.integers(1, 6),
    interval_us=st.integers(1, 12),
)
def test_one_pass_finds_what_looking_at_every_interval_finds(
    steps: list[tuple[int, int]], capacity: int, interval_us: int
) -> None:
    level, now, admitted = Level(), 0, list[tuple[int, int]]()
    for pause, cost in steps:
        now += pause
        admitted.append((now, cost))
        room = level.admit(now, cost * interval_us, capacity * interval_us)

        exceeded = any(
            sum(tokens for at, tokens in admitted if at >= a) > capacity + (now - a) // interval_us
            for a, _ in admitted
        )
        assert (room.by_intervals < 0) == (room.by_replay < 0) == exceeded


def test_numbers_that_are_checked_are_those_of_the_policy() -> None:
    table = Table(Policy.from_dict(policy()), "audit", 1)

    for tier in TIERS:
        for feature in FEATURES:
            entry = table.entry(tier, feature.name)
            quotas = [quota for shelf in entry.shelves for quota in shelf.quotas]
            if entry.demands is not None and entry.demands.pool is not None:
                quotas.append(entry.demands.pool.quota)
            known = [(quota.interval_us, quota.reach_us) for quota in quotas]
            assert known == [(one.interval_us, one.reach_us(tier)) for one in feature.buckets]
            assert {q.concurrency for q in quotas if q.concurrency} == {feature.slots} - {None}
            assert {q.lease_us for q in quotas if q.lease_us} <= {LEASE_US}
    assert table.tier_of(Account("a", plan="new"), T) == "new"


def test_failover_may_cost_a_capacity_and_what_flows_in_meanwhile() -> None:
    bucket = replace(FEATURES[ONE].buckets[0], amount=10, capacity=3)

    assert bound_of(bucket, 150_000) == 3 + 5  # and for 0.3 s that the replica is behind


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[tuple[Crew, RedisServer]]:
    with RedisServer() as server:
        crew = Crew(tmp_path, 1, Store(server.url, server=server))
        try:
            yield crew, server
        finally:
            crew.abandon()


@pytest.mark.redis
def test_real_over_admission_is_found_where_the_server_forgets(
    crew: tuple[Crew, RedisServer],
) -> None:
    workers, server = crew
    workers.start()
    wait_for(workers, 2_000)

    server.command("FLUSHALL")
    wait_for(workers, workers.decisions() + 2_000)
    workers.stop()

    found = check(workers.files, workers.gone)
    assert found.over_intervals > 0
    assert found.over_replay > 0
    assert all(tokens <= bucket.capacity for bucket, tokens in found.excess.values())


@pytest.mark.redis
def test_nothing_is_admitted_beyond_the_limits_while_processes_are_killed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "audit.json"
    options = ["--processes", "2", "--decisions", "20000", "--kills", "--seconds", "6"]

    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.audit", *options, "--json", str(path)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(path.read_text("utf-8"))
    assert said["over_admissions"] == 0
    assert said["kills"] >= 1
    assert said["workers"] == 2 + said["kills"]
    assert min(said[name] for name in ("admitted", "denied", "settled", "released", "renewed")) > 0
    assert said["at_bound"] > 0
    assert said["lost"] <= 64 * said["kills"]
    assert "over-admissions" in done.stdout


def wait_for(crew: Crew, decisions: int) -> None:
    deadline = time.monotonic() + 30
    while crew.decisions() < decisions:
        crew.look()
        assert time.monotonic() < deadline, "the workers do not get anywhere"
        time.sleep(0.005)

"""What users' own tests are given: a clock, states, what was decided, and the contract."""

from __future__ import annotations

import inspect
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import pytest

from tests.test_readme import blocks
from tieredlimit import Account, BackendError, Limiter, UsageError, testing
from tieredlimit.backends import MemoryBackend
from tieredlimit.integrations.pytest import MakeLimiter
from tieredlimit.testing import BackendContract, Clock, RecordingObserver, broken, closed, exhaust

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tieredlimit.backends import Charge, Reply

PAGE = (Path(__file__).parent.parent / "docs" / "testing.md").read_text("utf-8")
BOB, PRO = Account("bob"), Account("pro", plan="pro", within={"org": "o7"})
POLICY: dict[str, Any] = {
    "order": ["pro", "everyone"],
    "features": {
        "image": {},
        "video": {"outage": "deny"},
        "audio": {"pool": {"rate": "5/hour"}},
        "render": {},
    },
    "tiers": {
        "pro": {
            "when": {"plan": "pro"},
            "quotas": {
                "image": "unlimited",
                "video": 0,
                "audio": "9/hour",
                "render": {"rate": "9/hour", "concurrency": 1, "lease": "1 hour"},
            },
        },
        "everyone": {
            "quotas": {
                "image": ["5/minute", "50/day"],
                "video": {"rate": "8/hour", "per": "org"},
                "audio": "3/hour",
                "render": "1000000/second",
            }
        },
    },
}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limiter(clock: Clock) -> Limiter:
    return Limiter(POLICY, MemoryBackend(clock=clock))


class TestClock:
    def test_it_stands_still_until_it_is_told_otherwise(self) -> None:
        clock = Clock(datetime(2026, 11, 25, 18, tzinfo=timezone(timedelta(hours=1))))
        before = clock()

        clock.advance(0.1)
        clock.advance(timedelta(days=1))

        assert before == 1_795_626_000_000_000
        assert clock() - before == 86_400_100_000
        assert clock.instant == datetime(2026, 11, 26, 17, 0, 0, 100_000, UTC)
        assert repr(clock) == "Clock(2026-11-26T17:00:00.100000+00:00)"

    def test_it_may_be_moved_back(self) -> None:
        clock = Clock()

        clock.move_to(datetime(1999, 1, 1, tzinfo=UTC))

        assert clock.instant == datetime(1999, 1, 1, tzinfo=UTC)

    @pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), timedelta(-1)])
    def test_it_never_goes_on_by_less_than_nothing(self, seconds: Any) -> None:
        with pytest.raises(UsageError, match="seconds must be 0 or more"):
            Clock().advance(seconds)

    def test_instant_without_a_time_zone_is_refused(self) -> None:
        with pytest.raises(UsageError, match="with a time zone"):
            Clock(datetime(2026, 1, 1))  # noqa: DTZ001 -- that is what is refused


class TestExhaust:
    async def test_next_request_is_denied_and_tokens_come_back_by_the_clock(
        self, limiter: Limiter, clock: Clock
    ) -> None:
        denial = await exhaust(limiter, BOB, "image")
        denied = await limiter.take(BOB, "image")
        clock.advance(12)
        allowed = await limiter.take(BOB, "image")

        assert (denial.allowed, denial.reason, denial.remaining) == (False, "quota", 0)
        assert (denied.allowed, allowed.allowed) == (False, True)

    async def test_whatever_was_taken_before_and_however_often_it_is_done(
        self, limiter: Limiter
    ) -> None:
        await limiter.take(BOB, "image", 2)

        assert [(await exhaust(limiter, BOB, "image")).remaining for _ in range(3)] == [0] * 3

    async def test_fraction_of_a_token_is_left_to_be_refilled(
        self, limiter: Limiter, clock: Clock
    ) -> None:
        await limiter.take(BOB, "image", 3)
        clock.advance(7)

        denial = await exhaust(limiter, BOB, "image")

        assert denial.retry_after == pytest.approx(5)

    async def test_zero_needs_no_exhausting(self, limiter: Limiter) -> None:
        assert (await exhaust(limiter, PRO, "video")).reason == "zero"

    async def test_slot_that_the_taking_held_is_free_again(self, limiter: Limiter) -> None:
        denial = await exhaust(limiter, PRO, "render")

        assert denial.reason == "quota"
        assert [slot.held for slot in denial.slots] == [0]

    async def test_on_redis_too(self, redis_url: str) -> None:
        async with Limiter(POLICY, redis_url) as limiter:
            await exhaust(limiter, BOB, "image")

            assert not (await limiter.take(BOB, "image")).allowed

    async def test_what_cannot_be_exhausted_says_why(self, limiter: Limiter) -> None:
        with pytest.raises(UsageError, match=r'"image" cannot be .* in tier pro: it is unlimited'):
            await exhaust(limiter, PRO, "image")
        with pytest.raises(UsageError, match=r"9 tokens are left .* denied \(pool\)"):
            await exhaust(limiter, PRO, "audio")
        with pytest.raises(UsageError, match="unknown feature"):
            await exhaust(limiter, PRO, "imagee")
        async with closed(limiter, "image"):
            with pytest.raises(UsageError, match=r"cannot be asked, and denied \(closed\)"):
                await exhaust(limiter, BOB, "image")
        with broken(limiter), pytest.raises(UsageError, match="cannot be asked"):
            await exhaust(limiter, BOB, "image")
        held = await limiter.take(PRO, "render")
        with pytest.raises(UsageError, match=r"8 tokens are left .* denied \(concurrency\)"):
            await exhaust(limiter, PRO, "render")
        assert held.allowed

    async def test_limiter_that_is_not_enabled_and_a_bucket_that_refills_at_once_say_so(
        self,
    ) -> None:
        class Rushing(Clock):
            def __call__(self) -> int:
                self.now += 1_000
                return self.now

        with pytest.raises(UsageError, match="the limiter is not enabled"):
            await exhaust(Limiter(POLICY, enabled=False), BOB, "image")
        with pytest.raises(UsageError, match="refills as fast as it is emptied"):
            await exhaust(Limiter(POLICY, MemoryBackend(clock=Rushing())), BOB, "render")


class TestClosed:
    async def test_feature_is_closed_within_the_block_and_open_after_it(
        self, limiter: Limiter
    ) -> None:
        async with closed(limiter, "image", tier="everyone", message="Paused."):
            within = await limiter.take(BOB, "image")
            other = await limiter.take(PRO, "image")
        after = await limiter.take(BOB, "image")

        assert (within.reason, within.message(), other.reason) == ("closed", "Paused.", "allowed")
        assert after.allowed
        assert await limiter.control.overrides() == ()

    async def test_nobody_named_is_everyone_and_a_failing_block_opens_all_the_same(
        self, limiter: Limiter
    ) -> None:
        reasons = []

        async def fail() -> None:
            async with closed(limiter, "image"):
                reasons.extend([(await limiter.take(who, "image")).reason for who in (BOB, PRO)])
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()

        assert reasons == ["closed", "closed"]
        assert (await limiter.take(PRO, "image")).allowed

    async def test_block_may_open_it_itself(self, limiter: Limiter) -> None:
        async with closed(limiter, "image"):
            await limiter.control.open("image", everyone=True)

        assert (await limiter.take(BOB, "image")).allowed

    async def test_unknown_names_are_refused(self, limiter: Limiter) -> None:
        with pytest.raises(UsageError, match="tire"):
            async with closed(limiter, "image", tire="everyone"):  # type: ignore[call-arg]  # the point
                pass


class TestBroken:
    async def test_every_decision_is_an_outage_answer_within_the_block(
        self, limiter: Limiter
    ) -> None:
        denied = await exhaust(limiter, BOB, "image")
        await limiter.take(BOB, "image")
        with broken(limiter):
            image = await limiter.take(BOB, "image")
            video = await limiter.take(BOB, "video")
            slot = await limiter.take(PRO, "render")
            peeked = await limiter.peek(BOB, "video")
            zero = await limiter.take(PRO, "video")
        after = await limiter.take(BOB, "image")

        assert not denied.allowed
        assert [one.reason for one in (image, video, slot, peeked)] == ["outage"] * 4
        assert (image.allowed, video.allowed, slot.allowed) == (True, False, True)
        assert zero.reason == "zero"
        assert after.reason == "quota"

    async def test_on_redis_too(self, redis_url: str) -> None:
        async with Limiter(POLICY, redis_url) as limiter:
            token = (await limiter.reserve(BOB, "image").take()).token
            with broken(limiter):
                within = [await limiter.take(who, "image") for who in (BOB, PRO)]
                with pytest.raises(BackendError, match="a test said so"):
                    await limiter.settle(token, 0)
            after = await limiter.take(BOB, "image")

        assert [one.reason for one in within] == ["outage", "outage"]
        assert (after.reason, after.remaining) == ("allowed", 3)

    async def test_nothing_is_settled_refunded_renewed_or_released_within_the_block(
        self, limiter: Limiter
    ) -> None:
        first = await limiter.reserve(BOB, "image", 2).take()
        second = await limiter.reserve(BOB, "image", 2).take()
        slot = await limiter.take(PRO, "render")
        lease = slot.lease
        assert lease is not None

        with broken(limiter):
            for ask in (
                lambda: limiter.settle(first.token, 1),
                lambda: limiter.refund(second),
                lambda: limiter.leases.renew(slot.token),
                lease.release,
            ):
                with pytest.raises(BackendError, match="a test said so"):
                    await ask()
            held = await limiter.take(PRO, "render")
        settled = await limiter.settle(first.token, 1)
        await limiter.close()  # the release is made up for at the latest here
        free = await limiter.take(PRO, "render")

        assert (held.reason, settled, free.reason) == ("outage", True, "allowed")
        assert (await limiter.peek(BOB, "image")).remaining == 2

    async def test_shadow_is_not_measured_within_the_block(self, clock: Clock) -> None:
        policy = {
            "features": {"image": {}},
            "tiers": {"all": {"quotas": {"image": "5/hour"}, "shadow": {"image": "1/hour"}}},
        }
        limiter = Limiter(policy, MemoryBackend(clock=clock))
        with broken(limiter), broken(limiter):
            await limiter.take(BOB, "image")
        before = limiter.tallies.of("image", "all").shadow_allowed
        await limiter.take(BOB, "image")

        assert (before, limiter.tallies.of("image", "all").shadow_allowed) == (0, 1)


class TestRecording:
    @pytest.fixture
    def recorded(self) -> RecordingObserver:
        return RecordingObserver()

    @pytest.fixture
    def limiter(self, clock: Clock, recorded: RecordingObserver) -> Limiter:
        return Limiter(POLICY, MemoryBackend(clock=clock), observers=[recorded])

    async def test_decisions_can_be_asked_for_by_what_they_are(
        self, limiter: Limiter, recorded: RecordingObserver
    ) -> None:
        await limiter.take(BOB, "image", 5)
        await limiter.take(BOB, "image")
        await limiter.take(PRO, "image")

        assert len(recorded.decisions) == 3
        assert [one.account.id for one in recorded.of("image", allowed=True)] == ["bob", "pro"]
        assert [one.decision.reason for one in recorded.of(account=BOB)] == ["allowed", "quota"]
        assert len(recorded.of(tier="pro")) == len(recorded.of(reason="quota")) == 1
        assert recorded.of(shadow=True) == recorded.of("video") == []
        recorded.clear()
        assert recorded.decisions == []

    async def test_assertions_pass_where_it_is_so(
        self, limiter: Limiter, recorded: RecordingObserver
    ) -> None:
        await exhaust(limiter, BOB, "image")
        await limiter.take(BOB, "image")

        recorded.assert_allowed("image")
        recorded.assert_denied("image")
        recorded.assert_denied("image", "quota", times=1, account=BOB, tier="everyone")
        recorded.assert_denied("image", "zero", times=0)
        recorded.assert_allowed("video", times=0)

    async def test_assertion_that_fails_lists_what_was_decided(
        self, limiter: Limiter, recorded: RecordingObserver
    ) -> None:
        await limiter.take(BOB, "image", 5)
        await limiter.take(Account("192.0.2.1", anonymous=True), "image")

        with pytest.raises(AssertionError) as caught:
            recorded.assert_denied("image", "quota", account="bob", tier="everyone", times=1)
        with pytest.raises(AssertionError) as twice:
            recorded.assert_allowed("image", times=1)
        with pytest.raises(AssertionError, match="nothing was decided"):
            RecordingObserver().assert_allowed("image")

        assert str(caught.value) == (
            "expected image to be denied (quota) to bob in tier everyone 1 time, it was never:\n"
            "1. image: allowed, bob in tier everyone, cost 5, 0 left\n"
            "2. image: allowed, 192.0.2.1 (an address) in tier everyone, cost 1, 4 left"
        )
        assert "to be allowed 1 time, it was 2 times:" in str(twice.value)

    async def test_long_list_is_cut_and_bad_counts_are_refused(
        self, limiter: Limiter, recorded: RecordingObserver
    ) -> None:
        for _ in range(40):
            await limiter.take(PRO, "image")

        assert str(recorded).startswith("(10 before these)\n11. image: allowed, pro")
        with pytest.raises(UsageError, match="times must be a whole number"):
            recorded.assert_allowed("image", times=-1)

    async def test_outages_and_revisions_are_kept(
        self, limiter: Limiter, recorded: RecordingObserver
    ) -> None:
        with broken(limiter):
            await limiter.take(BOB, "video")
        async with closed(limiter, "video"):
            pass

        (outage,) = recorded.outages
        assert outage[0] == "video"
        assert "a test said so" in str(outage[1])
        assert [number for number, _ in recorded.revisions] == [1, 2]
        recorded.assert_denied("video", "outage")


class Forgetful(MemoryBackend):
    """Charge in one go, but forget to give anything back."""

    async def take(self, charges: Sequence[Charge]) -> Reply:
        for one in charges:
            reply = await super().take([one])
            if not reply.allowed:
                return reply
        return await super().take(charges if not charges else [charges[0]._replace(cost=0)])


async def test_contract_finds_a_backend_that_charges_one_part_and_denies_the_other() -> None:
    contract = BackendContract()
    clock = Clock()

    with pytest.raises(AssertionError):
        await contract.test_denial_charges_no_bucket(Forgetful(clock=clock))
    await contract.test_denial_charges_no_bucket(MemoryBackend(clock=clock))


def test_importing_what_tests_are_given_loads_no_test_framework() -> None:
    code = "import sys, tieredlimit.testing; print('pytest' in sys.modules)"
    core = "import sys, tieredlimit; print('tieredlimit.testing' in sys.modules)"

    for script in (code, core):
        told = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
        assert told.stdout.strip() == b"False"


def test_public_names_are_sorted_and_there() -> None:
    assert sorted(testing.__all__) == list(testing.__all__)
    assert all(hasattr(testing, name) for name in testing.__all__)


@pytest.fixture
def run_pytest(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Run tests of users in a process of their own, as they would."""
    conftest = blocks(PAGE, "python")[0]
    (tmp_path / "conftest.py").write_text(conftest, "utf-8")
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
        "filterwarnings = error\naddopts = --strict-markers\n",
        "utf-8",
    )

    def run(text: str, *arguments: str) -> tuple[int, str]:
        (tmp_path / "test_mine.py").write_text(text, "utf-8")
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        return ran.returncode, ran.stdout + ran.stderr

    return run


def test_fixture_takes_what_a_limiter_takes() -> None:
    taken = inspect.signature(Limiter).parameters.values()
    named = {one.name for one in taken if one.kind == one.KEYWORD_ONLY}

    (options,) = get_args(get_type_hints(MakeLimiter.__call__)["options"])

    assert options.__optional_keys__ == named
    assert get_type_hints(options) == {
        name: hint for name, hint in get_type_hints(Limiter.__init__).items() if name in named
    }


def test_fixtures_work_in_a_test_of_users(run_pytest: Callable[..., tuple[int, str]]) -> None:
    code, told = run_pytest(
        """
from pathlib import Path

import pytest

from tieredlimit import Account, Policy
from tieredlimit.testing import exhaust

POLICY = {"features": {"image": {}}, "tiers": {"all": {"quotas": {"image": "5/minute"}}}}
TOML = 'features.image = {}\\ntiers.all.quotas.image = "5/minute"\\n'


@pytest.mark.parametrize("kind", ["dict", "path", "policy"])
async def test_quota(kind, tieredlimit_limiter, tieredlimit_clock, tieredlimit_decisions, tmp_path):
    (tmp_path / "policy.toml").write_text(TOML)
    policy = {
        "dict": POLICY, "path": tmp_path / "policy.toml", "policy": Policy.from_dict(POLICY)
    }[kind]
    limiter = tieredlimit_limiter(policy, namespace="mine")
    await exhaust(limiter, Account("u1"), "image")
    assert not (await limiter.take(Account("u1"), "image")).allowed
    tieredlimit_clock.advance(12)
    assert (await limiter.take(Account("u1"), "image")).allowed
    tieredlimit_decisions.assert_denied("image", "quota", times=1)


async def test_next_one_starts_anew(tieredlimit_limiter, tieredlimit_decisions):
    assert (await tieredlimit_limiter(POLICY).take(Account("u1"), "image")).remaining == 4
    assert len(tieredlimit_decisions.decisions) == 1


async def test_failing(tieredlimit_limiter):
    limiter = tieredlimit_limiter(POLICY)
    assert (await limiter.take(Account("u1"), "image")).remaining == 9
"""
    )

    assert code == 1
    assert "4 passed" in told
    assert "1 failed" in told
    assert "what tieredlimit has decided" in told
    assert "1. image: allowed, u1 in tier all, cost 1, 4 left" in told


def test_plugin_is_not_there_unless_it_is_asked_for(
    run_pytest: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    (tmp_path / "conftest.py").unlink()

    _, told = run_pytest("", "--fixtures")

    assert "tieredlimit" not in told


def test_tests_of_the_page_pass(run_pytest: Callable[..., tuple[int, str]]) -> None:
    _, *pages = blocks(PAGE, "python")

    code, told = run_pytest("\n\n".join(pages))

    assert len(pages) > 3
    assert code == 0, told

"""Who is let through, who is not, and until when."""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.servers import Monitor
from tieredlimit import Account, BackendError, Limiter, Policy, PolicyError, UsageError
from tieredlimit.backends import MemoryBackend, RedisBackend
from tieredlimit.limiter import Complaints
from tieredlimit.testing import RecordingObserver

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from tieredlimit.backends import Backend, Charge, Reply

SECOND = 1_000_000
START = datetime(2026, 3, 1, 12, tzinfo=UTC)
EXAMPLE = Path(__file__).parent.parent / "examples" / "policy.toml"
PATIENT = 5.0

POLICY: dict[str, Any] = {
    "order": ["new", "pro", "everyone"],
    "features": {
        "image": {"routes": ["POST /images"]},
        "video": {"routes": ["POST /videos"], "outage": "deny"},
    },
    "defaults": {"quotas": {"image": "3/hour", "video": 0}},
    "tiers": {
        "new": {
            "when": {"plan": "free", "account_age_below": "7 days"},
            "messages": {"video": {"en": "Not yet.", "fr": "Pas encore."}},
        },
        "pro": {
            "when": {"plan": "pro"},
            "quotas": {
                "image": "unlimited",
                "video": [{"rate": "10/hour", "capacity": 4}, {"rate": "5/day", "per": "org"}],
            },
        },
        "everyone": {"quotas": {"video": "1/hour"}},
    },
}

ANN = Account("ann", plan="free", created_at=START - timedelta(days=400))
BEN = Account("ben", plan="pro", within={"org": "o1"})
CAT = Account("cat", plan="pro", within={"org": "o1"})


class Clock:
    """Stand still until told otherwise."""

    def __init__(self) -> None:
        self.now = int(START.timestamp()) * SECOND

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += round(seconds * SECOND)


class Spy:
    """Note what is asked of a backend in memory."""

    def __init__(self) -> None:
        self.takes: list[list[Charge]] = []
        self.others: list[str] = []
        self._memory = MemoryBackend(clock=Clock())

    def now(self) -> int:
        return self._memory.now()

    async def open(self) -> None:
        self.others.append("open")

    async def close(self) -> None:
        self.others.append("close")

    async def take(self, charges: Sequence[Charge]) -> Reply:
        self.takes.append(list(charges))
        return await self._memory.take(charges)

    def __len__(self) -> int:
        return len(self._memory)


class Broken(Spy):
    """Be down."""

    async def take(self, charges: Sequence[Charge]) -> Reply:
        await super().take(charges)
        raise BackendError("the store is down")


def one_quota(quota: object) -> dict[str, Any]:
    return {
        "order": ["everyone"],
        "features": {"image": {"routes": ["POST /images"]}},
        "tiers": {"everyone": {"quotas": {"image": quota}}},
    }


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.redis)])
async def backend(request: pytest.FixtureRequest, clock: Clock) -> AsyncIterator[Backend]:
    store: Backend = MemoryBackend(clock=clock)
    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
        store = RedisBackend.from_url(url, clock=clock, timeout=PATIENT)
    yield store
    await store.close()


@pytest.fixture
def limiter(backend: Backend) -> Limiter:
    return Limiter(POLICY, backend)


class TestTake:
    async def test_tokens_go_down_and_come_back(self, limiter: Limiter, clock: Clock) -> None:
        left = [(await limiter.take(ANN, "image")).remaining for _ in range(3)]
        denied = await limiter.take(ANN, "image")
        clock.advance(20 * 60)
        again = await limiter.take(ANN, "image")

        assert left == [2, 1, 0]
        assert (denied.allowed, denied.reason, denied.retry_after) == (False, "quota", 1200.0)
        assert (again.allowed, again.reason, again.retry_after) == (True, "allowed", None)
        assert (again.feature, again.tier, again.cost) == ("image", "everyone", 1)

    async def test_all_quotas_are_charged_or_none(self, limiter: Limiter) -> None:
        first = await limiter.take(BEN, "video", 4)
        second = await limiter.take(CAT, "video", 2)
        third = await limiter.take(CAT, "video", 1)

        assert [quota.remaining for quota in first.quotas] == [0, 1]
        assert [quota.denies for quota in second.quotas] == [False, True]
        assert [quota.remaining for quota in third.quotas] == [3, 0]
        assert third.remaining == 0

    async def test_an_account_without_the_subject_stands_alone(self, limiter: Limiter) -> None:
        await limiter.take(BEN, "video", 4)

        alone = await limiter.take(Account("o1", plan="pro"), "video", 4)
        other = await limiter.take(Account("dan", plan="pro"), "video", 4)

        assert alone.allowed
        assert other.allowed

    async def test_retry_after_is_the_latest_over_the_denying_quotas(
        self, limiter: Limiter
    ) -> None:
        await limiter.take(BEN, "video", 4)

        decision = await limiter.take(BEN, "video", 3)

        hourly, daily = decision.quotas
        assert hourly.retry_after == 3 * 360
        assert daily.retry_after == 2 * 86400 / 5
        assert decision.retry_after == daily.retry_after

    async def test_unlimited_limits_nothing(self, limiter: Limiter) -> None:
        decision = await limiter.take(BEN, "image", 10**9)

        assert decision.allowed
        assert decision.remaining is None
        assert decision.quotas == ()

    async def test_a_cost_of_zero_charges_nothing(self, limiter: Limiter) -> None:
        decision = await limiter.take(ANN, "image", 0)

        assert decision.allowed
        assert decision.remaining == 3

    async def test_many_at_once_get_exactly_what_is_there(self, limiter: Limiter) -> None:
        decisions = await asyncio.gather(*(limiter.take(ANN, "image") for _ in range(50)))

        assert sum(decision.allowed for decision in decisions) == 3

    @pytest.mark.fault("C4")
    async def test_identities_never_share_tokens(self, limiter: Limiter) -> None:
        ids = [f"user-{i}" for i in range(40)] + ["*user-1", "=user-1", "~user-1", "user-1:"]
        accounts = [Account(text, plan="free", created_at=ANN.created_at) for text in ids]
        accounts += [Account(text, anonymous=True) for text in ids]

        for _ in range(3):
            taken = await asyncio.gather(*(limiter.take(account, "image") for account in accounts))
            assert all(decision.allowed for decision in taken)
        again = await asyncio.gather(*(limiter.take(account, "image") for account in accounts))

        assert not any(decision.allowed for decision in again)

    async def test_namespaces_keep_apart(self, backend: Backend) -> None:
        one, other = Limiter(POLICY, backend, namespace="one"), Limiter(POLICY, backend)
        for _ in range(3):
            await one.take(ANN, "image")

        assert not (await one.take(ANN, "image")).allowed
        assert (await other.take(ANN, "image")).allowed


@pytest.mark.fault("A6")
class TestArguments:
    @pytest.mark.parametrize(
        "cost",
        [-1, 0.5, 1.0, float("nan"), float("inf"), 10**9 + 1, 10**6000, -(10**6000), True, "1"],
        ids=["-1", "half", "float", "nan", "inf", "over", "huge", "-huge", "bool", "string"],
    )
    async def test_no_other_cost_reaches_the_store(self, cost: Any) -> None:
        spy = Spy()
        limiter = Limiter(POLICY, spy)

        for verb in (limiter.take, limiter.peek):
            with pytest.raises(UsageError, match="cost must be a whole number") as caught:
                await verb(ANN, "image", cost)
            assert len(str(caught.value)) < 200

        assert spy.takes == []

    async def test_huge_costs_are_told_by_their_size(self) -> None:
        with pytest.raises(UsageError, match=r"from 0 to 1,000,000,000, got one of 19932 bits$"):
            await Limiter(POLICY).take(ANN, "image", 10**6000)

    @pytest.mark.fault("D2")
    async def test_an_unknown_feature_is_an_error_that_knows_better(self) -> None:
        spy = Spy()

        with pytest.raises(UsageError, match='"vidoe"; did you mean "video"'):
            await Limiter(POLICY, spy).take(ANN, "vidoe")
        with pytest.raises(UsageError, match="known are image, video"):
            await Limiter(POLICY, spy).peek(ANN, "xyz")
        assert spy.takes == []

    @pytest.mark.parametrize("feature", [["image"], {}, None, 7])
    async def test_a_feature_that_is_no_string_is_an_error(self, feature: Any) -> None:
        with pytest.raises(UsageError, match="a feature's name is a string, got"):
            await Limiter(POLICY).take(ANN, feature)

    async def test_a_feature_from_a_body_is_not_repeated_at_length(self) -> None:
        with pytest.raises(UsageError) as caught:
            await Limiter(POLICY).take(ANN, "v" * 10**6)

        assert len(str(caught.value)) < 200

    async def test_an_id_that_cannot_be_stored_is_an_error(self) -> None:
        spy = Spy()

        with pytest.raises(UsageError, match="lone surrogate"):
            await Limiter(POLICY, spy).take(Account("\ud800"), "image")
        assert spy.takes == []

    def test_a_namespace_is_a_short_name(self) -> None:
        for namespace in ("", "a" * 33, "a:b", "A", "a\n", "{a}"):
            with pytest.raises(UsageError, match="a namespace is 1 to 32 of"):
                Limiter(POLICY, namespace=namespace)

    def test_a_policy_may_be_a_path_a_document_or_a_policy(self) -> None:
        policy = Policy.load(EXAMPLE)

        assert Limiter(policy).policy is policy
        assert Limiter(EXAMPLE).policy == policy
        assert Limiter(str(EXAMPLE)).policy == policy
        assert Limiter(POLICY).policy == Policy.from_dict(POLICY)
        with pytest.raises(PolicyError):
            Limiter({})

    def test_a_url_is_redis_and_nothing_is_memory(self) -> None:
        assert isinstance(Limiter(POLICY, "redis://localhost:1/0").backend, RedisBackend)
        assert isinstance(Limiter(POLICY).backend, MemoryBackend)
        with pytest.raises(UsageError, match="the Redis URL starts with"):
            Limiter(POLICY, "http://localhost")


class TestClosed:
    async def test_closure_that_ends_says_when_and_one_that_does_not_says_nothing(
        self, clock: Clock
    ) -> None:
        limiter = Limiter(POLICY, MemoryBackend(clock=clock))
        end = START + timedelta(seconds=90)
        await limiter.control.close("image", everyone=True, until=end)
        await limiter.control.close("video", everyone=True)

        image, video = [await limiter.take(BEN, feature) for feature in ("image", "video")]
        clock.advance(image.retry_after or 0)
        after = await limiter.take(BEN, "image")

        assert (image.reason, video.reason) == ("closed", "closed")
        assert image.retry_after is not None
        assert image.retry_after >= 90
        assert video.retry_after is None
        assert after.allowed


class TestZero:
    @pytest.mark.fault("D1")
    async def test_zero_denies_makes_no_key_and_promises_nothing(self) -> None:
        spy = Spy()
        limiter = Limiter(one_quota(0), spy)

        decision = await limiter.take(ANN, "image")

        assert (decision.allowed, decision.reason) == (False, "zero")
        assert decision.retry_after is None
        assert decision.remaining == 0
        assert b"retry-after" not in dict(decision.response().raw_headers)
        assert spy.takes == []

    @pytest.mark.fault("D2")
    async def test_an_unknown_plan_falls_to_the_last_tier(self, limiter: Limiter) -> None:
        stranger = Account("eve", plan="platinum")

        assert limiter.tier_of(stranger) == "everyone"
        assert (await limiter.take(stranger, "video")).allowed
        assert not (await limiter.take(stranger, "video")).allowed

    @pytest.mark.fault("A5")
    async def test_what_never_fits_is_denied_without_asking(self) -> None:
        spy = Spy()
        limiter = Limiter(POLICY, spy)

        decision = await limiter.take(BEN, "video", 5)

        assert (decision.allowed, decision.reason) == (False, "quota")
        assert decision.retry_after is None
        assert b"retry-after" not in dict(decision.response().raw_headers)
        assert [quota.denies for quota in decision.quotas] == [True, False]
        assert [quota.retry_after for quota in decision.quotas] == [None, 0]
        assert spy.takes == []
        assert len(spy) == 0


QUOTAS = st.builds(
    lambda amount, period, capacity: {
        "rate": f"{amount}/{period}",
        "capacity": capacity,
        "name": f"q{amount}-{period.replace(' ', '-')}-{capacity}",
    },
    st.sampled_from([1, 2, 5, 8, 20]),
    st.sampled_from(["second", "minute", "3 hours", "day", "7 seconds"]),
    st.integers(1, 12),
)


@pytest.mark.fault("B3")
class TestRetryAfter:
    @given(
        st.lists(QUOTAS, min_size=1, max_size=3, unique_by=lambda quota: str(quota["name"])),
        st.lists(st.tuples(st.integers(1, 12), st.integers(0, 10**10)), min_size=1, max_size=12),
    )
    async def test_a_retry_at_that_time_succeeds_and_none_before(
        self, quotas: list[dict[str, object]], steps: list[tuple[int, int]]
    ) -> None:
        clock = Clock()
        limiter = Limiter(one_quota(quotas), MemoryBackend(clock=clock))

        for cost, pause in steps:
            clock.now += pause
            decision = await limiter.take(ANN, "image", cost)
            if decision.retry_after is None:
                assert decision.allowed or cost > min(int(str(q["capacity"])) for q in quotas)
                continue
            wait = round(decision.retry_after * SECOND)
            told = int(dict(decision.response().raw_headers)[b"retry-after"])
            assert told >= 1
            assert 0 <= told * SECOND - wait < SECOND
            clock.now += wait - 1
            assert not (await limiter.peek(ANN, "image", cost)).allowed
            clock.now += 1
            assert (await limiter.take(ANN, "image", cost)).allowed

    async def test_it_holds_on_every_backend(self, limiter: Limiter, clock: Clock) -> None:
        await limiter.take(BEN, "video", 4)
        denied = await limiter.take(BEN, "video", 3)
        assert denied.retry_after is not None

        clock.now += round(denied.retry_after * SECOND) - 1
        early = await limiter.take(BEN, "video", 3)
        clock.now += 1
        punctual = await limiter.take(BEN, "video", 3)

        assert early.retry_after == 1e-6
        assert dict(early.response().raw_headers)[b"retry-after"] == b"1"
        assert punctual.allowed


class TestTiers:
    @pytest.mark.fault("D5")
    async def test_a_new_account_leaves_its_tier_at_that_very_second(
        self, limiter: Limiter, clock: Clock
    ) -> None:
        young = Account("young", plan="free", created_at=START - timedelta(days=2))

        denied = await limiter.take(young, "video")
        clock.advance(5 * 86400 - 1e-6)
        still = await limiter.take(young, "video")
        clock.now += 1
        grown = await limiter.take(young, "video")

        assert (denied.tier, denied.reason, denied.retry_after) == ("new", "zero", None)
        assert denied.message("fr-CA, en;q=0.5") == "Pas encore."
        assert still.tier == "new"
        assert (grown.tier, grown.allowed) == ("everyone", True)

    @pytest.mark.fault("D6")
    async def test_each_tier_has_its_own_bucket_and_each_is_kept(
        self, limiter: Limiter, clock: Clock
    ) -> None:
        new = Account("flap", plan="free", created_at=START)
        old = Account("flap", plan="free", created_at=START - timedelta(days=30))
        granted = 0

        for _ in range(20):
            for account in (new, old):
                granted += (await limiter.take(account, "image")).allowed

        assert granted == 3 + 3
        assert not (await limiter.take(new, "image")).allowed

    async def test_an_upgrade_does_not_find_the_old_empty_bucket(self, limiter: Limiter) -> None:
        await limiter.take(Account("x"), "video")

        assert not (await limiter.take(Account("x"), "video")).allowed
        assert (await limiter.take(Account("x", plan="pro"), "video")).allowed


class TestPeekAndUsage:
    async def test_peek_says_what_take_would_and_charges_nothing(self, limiter: Limiter) -> None:
        await limiter.take(ANN, "image", 2)

        peeks = [await limiter.peek(ANN, "image", cost) for cost in (1, 2, 3, 4)]

        assert [peek.allowed for peek in peeks] == [True, False, False, False]
        assert [peek.retry_after for peek in peeks] == [None, 1200.0, 2400.0, None]
        assert [peek.remaining for peek in peeks] == [1, 1, 1, None]
        assert (await limiter.take(ANN, "image")).remaining == 0

    async def test_usage_names_every_feature_and_charges_nothing(self, limiter: Limiter) -> None:
        await limiter.take(BEN, "video", 4)

        for _ in range(3):
            usage = await limiter.usage(BEN)

        assert list(usage) == ["image", "video"]
        assert usage["image"].allowed
        assert (usage["video"].allowed, usage["video"].remaining) == (False, 0)
        assert [quota.remaining for quota in usage["video"].quotas] == [0, 1]

    async def test_usage_is_one_call_however_many_features(self) -> None:
        spy = Spy()
        document = {**POLICY, "tiers": {**POLICY["tiers"], "pro": POLICY["tiers"]["everyone"]}}
        document["tiers"]["pro"] = {
            "when": {"plan": "pro"},
            "quotas": {"video": ["2/day", "1/hour"]},
        }

        usage = await Limiter(document, spy).usage(BEN)

        assert [decision.remaining for decision in usage.values()] == [3, 1]
        assert len(spy.takes) == 1
        assert len(spy) == 0

    async def test_usage_asks_nobody_where_no_bucket_decides(self) -> None:
        spy = Spy()
        limiter = Limiter(one_quota(0), spy)

        assert (await limiter.usage(ANN))["image"].reason == "zero"
        assert spy.takes == []

    async def test_without_the_store_usage_is_the_outage_answer(self) -> None:
        limiter = Limiter(POLICY, Broken())

        usage = await limiter.usage(Account("x"))
        new = await limiter.usage(Account("x", plan="free"))

        assert [(d.allowed, d.reason) for d in usage.values()] == [
            (True, "outage"),
            (False, "outage"),
        ]
        assert [d.reason for d in new.values()] == ["outage", "zero"]


class TestOutage:
    async def test_each_feature_has_its_answer(self) -> None:
        limiter = Limiter(POLICY, Broken())

        image = await limiter.take(ANN, "image")
        video = await limiter.take(ANN, "video")

        assert (image.allowed, image.reason, image.retry_after) == (True, "outage", None)
        assert (video.allowed, video.reason) == (False, "outage")
        assert video.retry_after is not None
        assert 1 <= video.retry_after <= 5
        assert image.remaining is None
        assert image.fields(legacy=True) == []

    async def test_zero_and_what_never_fits_win_over_the_outage(self) -> None:
        limiter = Limiter(one_quota(0), Broken())

        assert (await limiter.take(ANN, "image")).reason == "zero"
        assert (await Limiter(POLICY, Broken()).take(BEN, "video", 5)).reason == "quota"

    async def test_who_cannot_be_identified_gets_the_outage_answer(self) -> None:
        limiter = Limiter(POLICY)
        error = ValueError("no such user")

        assert limiter.outage("image", 1, error).allowed
        assert limiter.outage("video", 1, error).reason == "outage"
        assert Limiter(one_quota(0)).outage("image", 1, error).reason == "zero"
        assert Limiter(POLICY, enabled=False).outage("video", 1, error).allowed
        with pytest.raises(UsageError, match='unknown feature "vidoe"'):
            limiter.outage("vidoe", 1, error)

    async def test_a_redis_that_refuses_connections_is_an_outage(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        backend = RedisBackend.from_url("redis://127.0.0.1:1/0", timeout=PATIENT)

        async with Limiter(POLICY, backend) as limiter:
            decision = await limiter.take(ANN, "image")

        assert (decision.allowed, decision.reason) == (True, "outage")
        assert caplog.messages

    async def test_the_log_says_so_without_a_traceback(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        limiter = Limiter(POLICY, Broken())

        for _ in range(3):
            await limiter.take(ANN, "image")

        (record,) = caplog.records[:1]
        assert record.name == "tieredlimit"
        assert record.getMessage() == (
            'tieredlimit: no decision could be made: "image" gets "allow": '
            "BackendError: the store is down"
        )
        assert record.levelname == "WARNING"
        assert record.exc_info is None

    def test_a_thousand_outages_a_second_are_one_line(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        seconds = 0.0
        complaints = Complaints(lambda: seconds)

        for i in range(3000):
            seconds = i / 1000
            complaints.log("trouble", BackendError("x" * 10_000))

        assert len(caplog.records) == 3
        assert "(999 more since the last line)" in caplog.messages[1]
        assert max(map(len, caplog.messages)) < 600

    def test_what_goes_wrong_all_the_time_hides_nothing_else(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        seconds = 0.0
        complaints = Complaints(lambda: seconds)

        for i in range(2000):
            seconds = i / 1000
            complaints.log("no sign of life", BackendError("down"))
            if i == 500:
                complaints.log('"video" gets "allow"', BackendError("down"))

        assert [one.split(": ")[1] for one in caplog.messages] == [
            "no sign of life", '"video" gets "allow"', "no sign of life",
        ]  # fmt: skip

    def test_a_thousand_things_that_go_wrong_at_once_are_a_few_lines(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        seconds = 0.0
        complaints = Complaints(lambda: seconds)

        for second in (0.0, 10.0):
            seconds = second
            for i in range(1000):
                complaints.log(f"trouble {second + i}", BackendError("down"))

        assert len(caplog.records) == 2 * 17
        assert len(complaints._kinds) <= 17

    @pytest.mark.parametrize("given", ["u1", None, {"id": "u1"}, "video"])
    async def test_who_is_no_account_is_said(self, given: Any) -> None:
        limiter = Limiter(
            {"features": {"video": {}}, "tiers": {"all": {"quotas": {"video": "5/day"}}}}
        )

        for ask in (limiter.take, limiter.peek):
            with pytest.raises(UsageError, match="is an Account, got a value of type"):
                await ask(given, "video")

    def test_a_fault_that_is_not_the_stores_is_shown_with_its_place(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        user: dict[str, str] = {}
        try:
            user["plan"]
        except KeyError as exc:
            Complaints().log("trouble", exc)

        (message,) = caplog.messages
        assert message.startswith("tieredlimit: trouble: KeyError\n  File ")
        assert caplog.records[0].levelname == "ERROR"
        assert 'user["plan"]' in caplog.text


class TestSwitchedOff:
    @pytest.mark.fault("F11")
    async def test_no_call_is_made_at_all(self) -> None:
        spy = Spy()

        async with Limiter(POLICY, spy, enabled=False) as limiter:
            taken = await limiter.take(Account("x", plan="free"), "video", 10**9)
            peeked = await limiter.peek(ANN, "image")
            usage = await limiter.usage(ANN)

        assert taken.allowed
        assert peeked.allowed
        assert all(decision.allowed for decision in usage.values())
        assert spy.takes == []
        assert "open" not in spy.others

    @pytest.mark.fault("F11")
    async def test_no_connection_is_made(self, redis_url: str) -> None:
        async with Monitor(redis_url) as monitor:
            async with Limiter(POLICY, redis_url, enabled=False) as limiter:
                assert (await limiter.take(ANN, "video", 10**9)).allowed

            assert await monitor.commands() == []


class TestFromEnv:
    @pytest.fixture(autouse=True)
    def empty(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("POLICY", "REDIS", "NAMESPACE", "ENABLED"):
            monkeypatch.delenv(f"TIEREDLIMIT_{name}", raising=False)

    def test_every_variable_counts(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        above = tmp_path / "prod.toml"
        above.write_text('[features.image]\noutage = "deny"\n', "utf-8")
        monkeypatch.setenv("TIEREDLIMIT_POLICY", os.pathsep.join([str(EXAMPLE), str(above)]))
        monkeypatch.setenv("TIEREDLIMIT_REDIS", "redis://localhost:1/0")
        monkeypatch.setenv("TIEREDLIMIT_NAMESPACE", "media-prod")
        monkeypatch.setenv("TIEREDLIMIT_ENABLED", "Off")

        limiter = Limiter.from_env()

        assert limiter.policy.features["image"].outage == "deny"
        assert isinstance(limiter.backend, RedisBackend)
        assert limiter.namespace == "media-prod"
        assert not limiter.enabled

    def test_a_policy_is_enough(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TIEREDLIMIT_POLICY", str(EXAMPLE))
        monkeypatch.setenv("TIEREDLIMIT_REDIS", "")

        limiter = Limiter.from_env()

        assert isinstance(limiter.backend, MemoryBackend)
        assert limiter.enabled

    async def test_observers_come_from_the_code(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TIEREDLIMIT_POLICY", str(EXAMPLE))
        decisions = RecordingObserver()

        limiter = Limiter.from_env(observers=[decisions])
        await limiter.take(Account("u1"), "image")

        assert [decided.decision.feature for decided in decisions.decisions] == ["image"]

    def test_what_is_wrong_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UsageError, match="TIEREDLIMIT_POLICY must name a policy file"):
            Limiter.from_env()
        monkeypatch.setenv("TIEREDLIMIT_POLICY", "no/such/file.toml")
        with pytest.raises(PolicyError, match=r"no/such/file\.toml"):
            Limiter.from_env()
        monkeypatch.setenv("TIEREDLIMIT_POLICY", str(EXAMPLE))
        monkeypatch.setenv("TIEREDLIMIT_ENABLED", "maybe")
        with pytest.raises(UsageError, match="TIEREDLIMIT_ENABLED must be 0 or 1, got 'maybe'"):
            Limiter.from_env()


class TestLife:
    async def test_it_may_be_closed_and_used_again(self, limiter: Limiter) -> None:
        async with limiter as same:
            assert same is limiter
            await limiter.take(ANN, "image")
        await limiter.close()

        assert (await limiter.take(ANN, "image")).remaining == 1
        async with limiter:
            assert (await limiter.take(ANN, "image")).remaining == 0

    def test_it_serves_one_event_loop_after_another(self, redis_url: str) -> None:
        limiter = Limiter(POLICY, RedisBackend.from_url(redis_url, timeout=PATIENT))

        async def one_loop() -> int | None:
            async with limiter:
                return (await limiter.take(ANN, "image")).remaining

        assert [asyncio.run(one_loop()) for _ in range(3)] == [2, 1, 0]

    async def test_it_serves_two_event_loops_at_once(self, redis_url: str) -> None:
        limiter = Limiter(POLICY, RedisBackend.from_url(redis_url, timeout=PATIENT))

        async def elsewhere() -> bool:
            async with limiter:
                return (await limiter.take(ANN, "image")).allowed

        async with limiter:
            here = [limiter.take(ANN, "image") for _ in range(3)]
            there = [asyncio.to_thread(asyncio.run, elsewhere()) for _ in range(3)]
            decisions = await asyncio.gather(*here)
            allowed = [decision.allowed for decision in decisions] + await asyncio.gather(*there)

        assert sum(allowed) == 3

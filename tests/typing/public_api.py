"""Every public name, used as a user would, with the types that a checker must give it.

Those of frameworks and of users' own tests are in files of their own. Never run: `scripts/check`
reads them, with mypy and with pyright, both strict.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, assert_type

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Scope

import tieredlimit
from tieredlimit import (
    Account,
    BackendError,
    ConflictError,
    Decision,
    Denied,
    Fault,
    Lease,
    Limiter,
    LoggingObserver,
    Observer,
    Policy,
    PolicyError,
    PoolState,
    QuotaState,
    Reservation,
    RevisionError,
    SlotState,
    TieredLimitError,
    TieredLimitMiddleware,
    UsageError,
    stored,
    usage_app,
)
from tieredlimit.backends import (
    Backend,
    Charge,
    Claim,
    Claimed,
    ClusterBackend,
    MemoryBackend,
    RedisBackend,
    Reply,
    Slot,
)
from tieredlimit.decision import Denial, Reason
from tieredlimit.identity import (
    Answer,
    Identify,
    Remembered,
    api_key,
    blocking,
    client_address,
    first_of,
    remember,
    request_user,
    resolve,
    session,
)
from tieredlimit.integrations.prometheus import Counted, PrometheusCollector
from tieredlimit.middleware import OnDenied

assert_type(tieredlimit.__version__, str)


def accounts() -> Account:
    account = Account(
        "u1",
        plan="free",
        created_at=datetime(2026, 1, 9, tzinfo=UTC),
        tags=["beta"],
        within={"org": "o7"},
    )
    assert_type(account.id, str)
    assert_type(account.plan, str | None)
    assert_type(account.created_at, datetime | None)
    return account


def policies() -> Policy:
    policy = Policy.load("base.toml", "prod.toml")
    assert_type(policy, Policy)
    assert_type(policy.warnings, tuple[Fault, ...])
    return Policy.from_dict({"features": {}, "tiers": {}}, source="here")


class Watching:
    def on_decision(self, decision: Decision, account: Account, *, shadow: bool) -> None: ...
    def on_outage(self, feature: str, error: Exception) -> None: ...
    def on_revision(self, number: int, digest: str) -> None: ...


def limiters(backend: Backend) -> list[Limiter]:
    observers: list[Observer] = [Watching(), LoggingObserver(per_second=5, ids="plain")]
    memory: Backend = MemoryBackend(clock=lambda: 0)
    one: Backend = RedisBackend.from_url("redis://localhost:6379/0", timeout=0.1)
    several: Backend = ClusterBackend("redis+cluster://localhost:7000")
    made = [
        Limiter("policy.toml", "redis://localhost:6379/0", namespace="media-prod"),
        Limiter({"features": {}}, memory, observers=observers, close="video:new"),
        Limiter(policies(), one, shards=4, id_secret="a-secret-of-16-or-more"),
        Limiter(stored(), several, enabled=False),
        Limiter(policies(), backend),
    ]
    assert_type(Limiter.from_env(), Limiter)
    return made


async def decisions(limiter: Limiter, account: Account) -> None:
    async with limiter as opened:
        assert_type(opened, Limiter)
    decision = await limiter.take(account, "video", cost=8)
    assert_type(decision, Decision)
    assert_type(limiter.take_now(account, "video"), Decision | None)
    assert_type(await limiter.peek(account, "video"), Decision)
    assert_type(await limiter.usage(account), dict[str, Decision])
    assert_type(await limiter.refund(decision), Decision)
    assert_type(limiter.match("POST", "/v1/videos"), tuple[str, int] | None)
    assert_type(limiter.tier_of(account), str)
    assert_type(limiter.policy, Policy)
    assert_type(limiter.revision, tuple[int, str])
    assert_type(limiter.ready, bool)
    assert_type(limiter.following, bool)
    limiter.follow()

    assert_type(decision.allowed, bool)
    reason: Reason = decision.reason
    assert_type(
        reason, Literal["allowed", "quota", "zero", "closed", "pool", "concurrency", "outage"]
    )
    assert_type(decision.retry_after, float | None)
    assert_type(decision.remaining, int | None)
    assert_type(decision.feature, str)
    assert_type(decision.tier, str)
    assert_type(decision.message("fr"), str)
    assert_type(decision.quotas, tuple[QuotaState, ...])
    assert_type(decision.pool, PoolState | None)
    assert_type(decision.slots, tuple[SlotState, ...])
    assert_type(decision.token, str)
    assert_type(decision.response(), Denial)
    as_application: ASGIApp = decision.response(statuses={"zero": 451}, legacy_fields=True)
    for quota in decision.quotas:
        assert_type((quota.name, quota.capacity, quota.remaining), tuple[str, int, int | None])
    del as_application


async def jobs(limiter: Limiter, account: Account, decision: Decision) -> None:
    lease = decision.lease
    assert_type(lease, Lease | None)
    if lease is not None:
        async with lease as held:
            assert_type(held, Lease)
            assert_type(held.lost, bool)
        assert_type(await lease.renew(), bool)
        assert_type(await lease.release(), bool)
        assert_type(lease.detach(), str)
    async with limiter.leases.hold(decision.token) as taken_over:
        assert_type(taken_over, Lease)
    assert_type(await limiter.leases.release(decision.token), bool)
    async with limiter.reserve(account, "video", cost=30) as reservation:
        assert_type(reservation, Reservation)
        assert_type(await reservation.settle(12), bool)
    assert_type(await limiter.settle(decision.token, 12), bool)


async def control(limiter: Limiter) -> None:
    change = await limiter.control.close("video", tier="free", message={"en": "Paused."})
    assert_type(change.revision.number, int)
    assert_type(change.revision.change, str)
    await limiter.control.open("video", tier="free", ramp=timedelta(minutes=30))
    until = datetime(2026, 1, 9, tzinfo=UTC)
    await limiter.control.set("video", "5/hour", everyone=True, until=until, reason="busy")
    await limiter.control.close("video", when={"plan": "free"}, no_exceptions=True, actor="ann")
    # What no change knows is found before it runs.
    await limiter.control.close("video", tire="free")  # type: ignore[call-arg]
    await limiter.control.undo(actor="ann")


def errors(decision: Decision) -> None:
    try:
        decision.raise_if_denied()
    except Denied as denied:
        assert_type(denied.decision, Decision)
    except PolicyError as exc:
        assert_type(exc.faults, tuple[Fault, ...])
    except RevisionError as exc:
        assert_type(exc.faults, tuple[Fault, ...])
    except ConflictError as exc:
        assert_type((exc.seen, exc.found), tuple[int, int])
    except (BackendError, UsageError) as exc:
        above: TieredLimitError = exc
        del above


def identities() -> Identify:
    async def from_database(key: str) -> Account | None:
        return Account(key) if key else None

    def slow(key: str) -> Account | None:
        return Account(key) if key else None

    waited: Callable[[str], Awaitable[Account | None]] = blocking(slow)
    addressed = client_address(trusted_hops=1, header="forwarded", ipv6_prefix=56)
    assert_type(addressed, Callable[[HTTPConnection], Account])
    keyed: Identify = api_key(from_database, scheme="Bearer")
    assert_type(api_key(waited), Identify)
    assert_type(api_key({"key": Account("u1")}.get), Identify)
    assert_type(session("user"), Identify)
    assert_type(session(lookup=from_database), Identify)
    return first_of(keyed, request_user(), addressed)


def remembered() -> Identify:
    async def by_number(number: int) -> Account | None:
        return Account(str(number)) if number else None

    def by_key(key: str) -> Account:
        return Account(key)

    numbers = remember(by_number, 60, missing_seconds=0, most=100)
    assert_type(numbers, Remembered[int])
    assert_type(numbers(7), Answer)
    assert_type(len(numbers), int)
    numbers.forget(7)
    numbers.clear()
    keys: Remembered[str] = remember(by_key)
    return first_of(api_key(keys, scheme="Bearer"), session(lookup=numbers))


async def answers(answer: Answer) -> None:
    assert_type(await resolve(answer), Account | None)


def middlewares(app: Starlette, limiter: Limiter) -> ASGIApp:
    def answer(scope: Scope, decision: Decision) -> ASGIApp | None:
        return None if scope["path"] == "/" else decision.response()

    async def answer_later(scope: Scope, decision: Decision) -> ASGIApp | None:
        return answer(scope, decision)

    later: OnDenied = answer_later
    app.add_middleware(
        TieredLimitMiddleware,
        limiter=limiter,
        identify=identities(),
        anonymous=client_address(),
        on_denied=answer,
        statuses={"zero": 451},
        legacy_fields=True,
    )
    return TieredLimitMiddleware(app, limiter=limiter, on_denied=later)


def usage(app: Starlette, limiter: Limiter) -> None:
    app.mount("/usage", usage_app(limiter))
    told = usage_app(limiter, identities(), anonymous=client_address())
    assert_type(told, ASGIApp)


def prometheus(limiter: Limiter) -> PrometheusCollector:
    counted: Counted = limiter
    return PrometheusCollector(counted, registry=CollectorRegistry(), namespace_label="app")


class OwnBackend:
    """What a backend of the user's own has to have."""

    def now(self) -> int:
        return 0

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def take(self, charges: Iterable[Charge]) -> Reply:
        return Reply(all(charge.cost == 0 for charge in charges), 0, [])


own: Backend = OwnBackend()


def claims(slot: Slot) -> tuple[Claim, Claimed | None]:
    return Claim(b"", (slot,)), None


def given_documents(document: Mapping[str, Any]) -> Limiter:
    return Limiter(document)

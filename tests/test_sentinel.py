"""A failover behind the backend's back: it loses some decisions, and never its way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.clusters import RedisSentinels
from tests.contract import charge, quota, shelf
from tieredlimit import BackendError
from tieredlimit.backends import RedisBackend, Reply

RECOVERY_SECONDS = 20.0
CHARGE = charge(shelf(quota("1000000/hour")))
SLOW = charge(shelf(quota("5/hour"), tier="slow"))


@pytest.fixture
async def backend(sentinels: RedisSentinels) -> AsyncIterator[RedisBackend]:
    client = sentinels.client()
    backend = RedisBackend(client, timeout=1.0)
    yield backend
    await backend.close()
    await client.aclose()


async def recovered(backend: RedisBackend) -> Reply:
    """Ask until there is an answer; anything raised but BackendError fails the test."""
    async with asyncio.timeout(RECOVERY_SECONDS):
        while True:
            try:
                return await backend.take([CHARGE])
            except BackendError:
                continue


@pytest.mark.fault("F1", "F3")
async def test_takes_go_on_by_themselves_after_the_primary_died(
    sentinels: RedisSentinels, backend: RedisBackend
) -> None:
    old, new = sentinels.primary, sentinels.replica
    assert (await backend.take([CHARGE])).allowed

    failing_over = asyncio.create_task(asyncio.to_thread(sentinels.fail_over))
    raised = 0
    while not failing_over.done():
        try:
            await backend.take([CHARGE])
        except BackendError:
            raised += 1
    await failing_over

    assert raised
    assert (await recovered(backend)).allowed
    assert sentinels.primary is new is not old
    assert (await backend.take([SLOW])).allowed
    held = new.command("KEYS", "*")
    assert isinstance(held, list)
    # A bucket that refills in milliseconds may be gone, and so may what a probe leaves.
    passing = (b"~probe", CHARGE.key.encode())
    assert [key for key in held if not key.endswith(passing)] == [SLOW.key.encode()]


@pytest.mark.fault("F3")
async def test_primary_that_became_a_replica_refuses_and_is_left_for_the_new_one(
    sentinels: RedisSentinels, backend: RedisBackend
) -> None:
    old, new = sentinels.primary, sentinels.replica
    await backend.take([CHARGE])
    await asyncio.to_thread(sentinels.hand_over)
    assert (await backend.take([CHARGE])).allowed  # by the old one, over the same connection

    old.command("REPLICAOF", "127.0.0.1", str(new.port))
    new.command("FLUSHALL")
    with pytest.raises(BackendError, match=r"read only replica|now a slave"):
        await backend.take([CHARGE])

    assert (await recovered(backend)).allowed
    assert (await backend.take([SLOW])).allowed
    assert new.command("EXISTS", SLOW.key) == 1

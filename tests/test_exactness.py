"""Several processes, one Redis: together they admit what the bucket holds, no more and no less."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from itertools import pairwise

import pytest

from tests.contract import charge, quota, shelf
from tests.reference import Reference

PROCESSES = 3

WORKER = textwrap.dedent("""
    import asyncio, json, sys
    from tests.contract import charge, quota, shelf
    from tieredlimit.backends import RedisBackend

    async def main(url, rate, capacity, rounds):
        backend = RedisBackend.from_url(url, timeout=10.0)
        await backend.open()
        one = [charge(shelf(quota(rate, capacity=capacity)))]
        decisions = []

        async def caller():
            for _ in range(rounds):
                reply = await backend.take(one)
                decisions.append([reply.now, reply.allowed, reply.debts[0]])

        print("ready", flush=True)
        sys.stdin.readline()
        await asyncio.gather(*(caller() for _ in range(32)))
        print(json.dumps(decisions))
        await backend.close()

    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
""")


@pytest.mark.redis
@pytest.mark.fault("A1", "A3", "A7", "A9")
@pytest.mark.parametrize(
    ("rate", "capacity", "rounds"),
    [("1/day", 100, 10), ("300/second", 100, 40), ("5000/second", 20, 40), ("7/3 seconds", 3, 10)],
)
def test_processes_admit_together_exactly_what_the_definition_admits(
    redis_url: str, rate: str, capacity: int, rounds: int
) -> None:
    only = quota(rate, capacity=capacity)
    one = [charge(shelf(only))]
    command = [sys.executable, "-c", WORKER, redis_url, rate, str(capacity), str(rounds)]

    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(PROCESSES)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    decisions = [decision for worker in workers for decision in json.loads(worker.communicate()[0])]

    # Within one microsecond nothing flows in: what was allowed came before what was denied, and
    # a smaller debt before a larger one.
    decisions.sort(key=lambda decision: (decision[0], not decision[1], decision[2]))
    reference = Reference()
    assert len(decisions) == PROCESSES * 32 * rounds
    for now, allowed, debt in decisions:
        assert (allowed, [debt]) == reference.take(one, now)
    admitted = [now for now, allowed, _ in decisions if allowed]
    assert len(admitted) >= capacity
    for first, beyond in zip(admitted, admitted[capacity:], strict=False):
        assert beyond - first >= only.interval_us
    assert all(earlier <= later for earlier, later in pairwise(admitted))

"""A bounded load generator for where there is no `wrk`, in a process of its own.

    python -m benchmarks.load PORT PATH CONNECTIONS SECONDS

Prints one line of JSON: requests a second, and p50 and p99 in microseconds. It shares the cores
with the server, and takes more of them than `wrk` does.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict

from benchmarks.measure import Run, percentile, run

ACCOUNTS = 1_000


def main() -> None:
    """Send requests for a time and print what became of them."""
    port, path, connections, seconds = sys.argv[1:]
    try:
        import uvloop  # noqa: F401 -- to see whether it is there

        found = True
    except ImportError:
        found = False
    work = send(int(port), path, int(connections), float(seconds))
    print(json.dumps(asdict(run(work, uvloop=found))))


async def send(port: int, path: str, connections: int, seconds: float) -> Run:
    """Let each connection send one request after the other for a time.

    Raises:
        RuntimeError: A response was not 200, or another did not come for ten seconds.
    """
    latencies: list[float] = []
    begin = time.perf_counter()
    deadline = begin + seconds

    async def connection(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while (before := time.perf_counter()) < deadline:
                number = (number * 31 + 7) % ACCOUNTS
                writer.write(request(path, number))
                head = await reader.readuntil(b"\r\n\r\n")
                if not head.startswith(b"HTTP/1.1 200"):
                    raise RuntimeError(f"the server answered {head[:200]!r}")
                at = head.lower().index(b"content-length:") + 15
                await reader.readexactly(int(head[at : head.index(b"\r\n", at)]))
                latencies.append(time.perf_counter() - before)
        finally:
            writer.close()

    async with asyncio.timeout(seconds + 10), asyncio.TaskGroup() as group:
        for number in range(connections):
            group.create_task(connection(number))
    elapsed = time.perf_counter() - begin
    latencies.sort()
    return Run(
        len(latencies) / elapsed,
        percentile(latencies, 50) * 1e6,
        percentile(latencies, 99) * 1e6,
    )


def request(path: str, number: int) -> bytes:
    """Return the request of the account of that number."""
    text = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\n"
        f"X-Account: account-{number:07}\r\nContent-Length: 0\r\n\r\n"
    )
    return text.encode()


if __name__ == "__main__":
    main()

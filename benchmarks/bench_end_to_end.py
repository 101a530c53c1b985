"""How many requests a second does a whole server answer with limits, and how many without?

    scripts/bench end_to_end [--seconds 2] [--rounds 5] [--connections 64] [--json PATH]

The same Starlette application under uvicorn with httptools and uvloop, one worker in a process of
its own: bare, behind our middleware, and behind slowapi's ASGI middleware, both with a Redis on
loopback, response headers, and one quota or two. `wrk` sends the requests of 1,000 accounts where
it is on PATH, otherwise a generator of ours. The servers take turns; those not asked are idle.

On two cores the server, Redis and whoever sends the requests share them: the limited rows pay for
Redis' time as well, which they would not with Redis on another machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

from benchmarks.load import request
from benchmarks.measure import (
    Bar,
    Chart,
    Run,
    Target,
    arguments,
    counted,
    environment,
    finish,
    middle,
    ratio,
    run,
    table,
    take_turns,
)
from benchmarks.peers import notes
from benchmarks.served import PATHS
from benchmarks.stores import redis_server

BARE = "bare"
_START_SECONDS = 20.0


def main() -> None:
    """Measure, print the table, write the file."""
    options = arguments("end_to_end", __doc__, seconds=2.0, rounds=5, connections=64)
    missing = [name for name in ("uvicorn", "uvloop", "httptools") if find_spec(name) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}")
    with redis_server() as server:
        result, runs = run(
            measure(server.url, options.seconds, options.rounds, options.connections),
            uvloop=options.uvloop,
        )
    finish(
        options, "end_to_end", __doc__, result, _table(result["rows"]),
        targets=_targets(runs), charts=_charts(runs),
    )  # fmt: skip


async def measure(
    url: str, seconds: float, rounds: int, connections: int
) -> tuple[dict[str, Any], dict[str, list[Run]]]:
    """Let the servers answer in turns; return the result, and the rounds of every row."""
    before = environment()
    left_out = notes()
    kinds = [(BARE, BARE, 1)]
    kinds += [
        (f"tieredlimit, {counted(quotas, 'quota')}", "tieredlimit", quotas) for quotas in PATHS
    ]
    if find_spec("slowapi") is None:
        left_out.setdefault("slowapi", "is not installed")
    else:
        kinds += [(f"slowapi, {counted(quotas, 'limit')}", "slowapi", quotas) for quotas in PATHS]
    wrk = which("wrk")
    if wrk is None:
        left_out["wrk"] = "is not on PATH: a generator of ours sends the requests"
    contenders: dict[str, Callable[[], Awaitable[Run]]] = {}
    with ExitStack() as stack:
        for name, kind, quotas in kinds:
            port = stack.enter_context(_served(kind, quotas, url))
            path = PATHS[quotas]
            if kind == "tieredlimit" and b"ratelimit:" not in _headers(port, path).lower():
                raise RuntimeError("the limited application sends no limits: Redis did not answer")
            contenders[name] = partial(
                asyncio.to_thread, _load, wrk, port, path, connections, seconds
            )
        runs = await take_turns(contenders, rounds)
    result = {
        "environment": before,
        "settings": {
            "seconds": seconds, "rounds": rounds, "connections": connections,
            "generator": "wrk" if wrk else "benchmarks.load",
        },
        "left_out": left_out,
        "rows": [
            {
                "target": name,
                **asdict(middle(measured)),
                "vs_bare": _times(runs, name, BARE),
                "rounds": [asdict(one) for one in measured],
            }
            for name, measured in runs.items()
        ],
    }  # fmt: skip
    return result, runs


@contextmanager
def _served(kind: str, quotas: int, url: str) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.served", kind, str(quotas), str(port), url]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server of {kind!r} did not start") from None
                time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


def _headers(port: int, path: str) -> bytes:
    """Return the head of one response."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(request(path, 0))
        return connection.recv(65_536).partition(b"\r\n\r\n")[0]


def _load(wrk: str | None, port: int, path: str, connections: int, seconds: float) -> Run:
    if wrk is None:
        command = [sys.executable, "-m", "benchmarks.load", str(port), path]
        command += [str(connections), str(seconds)]
    else:
        script = Path(__file__).with_name("wrk.lua")
        # wrk counts whole seconds.
        command = [wrk, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s"]
        command += ["-s", str(script), f"http://127.0.0.1:{port}{path}"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        timeout=seconds + 60,
        env={**os.environ, "BENCH_PATH": path},
    )
    said: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if said.pop("failed", 0):
        raise RuntimeError(f"requests failed: {done.stdout[-500:]}")
    return Run(**said)


def _times(runs: Mapping[str, Sequence[Run]], own: str, other: str) -> float | None:
    if own not in runs or other not in runs:
        return None
    return ratio([r.per_second for r in runs[own]], [r.per_second for r in runs[other]])


def _targets(runs: Mapping[str, Sequence[Run]]) -> list[Target]:
    targets = []
    for quotas in PATHS:
        ours, peer = (
            f"tieredlimit, {counted(quotas, 'quota')}",
            f"slowapi, {counted(quotas, 'limit')}",
        )
        question = f"end to end, Redis, {counted(quotas, 'quota')}"
        targets += [
            Target(f"{question}: bare", 0.75, False, _times(runs, ours, BARE)),
            Target(f"{question}: slowapi", 4, False, _times(runs, ours, peer)),
        ]
    return targets


def _charts(runs: Mapping[str, Sequence[Run]]) -> list[Chart]:
    bars = [
        Bar(
            name,
            middle(measured).per_second,
            {"t": "ours", "b": "floor"}.get(name[0], "peer"),
        )
        for name, measured in runs.items()
    ]
    line = ("0.75 of bare", 0.75 * middle(runs[BARE]).per_second)
    title = "Requests a second, end to end: uvicorn, one worker, Redis"
    return [Chart(title, "requests/s, more is better", bars, [line])]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            row["target"], f"{row['per_second']:,.0f}", f"{row['p50_us']:,.0f}",
            f"{row['p99_us']:,.0f}", f"{row['vs_bare']:.2f}x",
        ]
        for row in rows
    ]  # fmt: skip
    return table(["target", "requests/s", "p50 us", "p99 us", "vs bare"], lines, words=1)


if __name__ == "__main__":
    main()

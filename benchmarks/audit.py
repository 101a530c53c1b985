"""Is ever more admitted than capacity plus refill, whatever interval one looks at?

    scripts/audit [--processes 4] [--decisions 2000000] [--kills] [--seconds N] [--failover]
                  [--seed N] [--json PATH]

Processes of 64 callers each share a Redis server of their own, and ask it through `Limiter` for
everything there is: one quota, two, a pool that must be left to some, slots that are released or
run out, reservations that are settled. All buckets are small and at their limit nearly all the
time. With `--kills`, processes are killed at random with SIGKILL and replaced.

Each process notes every decision with its instant on the server's clock; the notes are then
checked, in whole microseconds (`benchmarks/audit_check.py`). What was admitted and not noted, since
the process was killed in between, can only hide something: so what was asked for is noted, too, and
the difference is shown as lost. Denials that a process remembers cost no call and are not counted
as decisions.

`--failover` kills the primary of a Sentinel in the middle. Redis replicates without waiting: what
the primary had admitted and not yet sent on is forgotten. On one machine that would be next to
nothing: so the replica is cut off 0.3 s before. The excess is shown beside its bound, one capacity
of each bucket plus what flows in while the replica is behind and while nobody answers.

Ends with exit code 1 if too much was admitted, or more than that bound.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.audit_check import Findings, check
from benchmarks.audit_limits import ACCOUNTS, FEATURES, Bucket
from benchmarks.audit_log import Files
from benchmarks.measure import environment, load, table
from tests.clusters import RedisSentinels
from tests.servers import NoServerError, RedisServer

SEED = 20_240_229

_POLL_SECONDS = 0.05
_PATIENCE_SECONDS = 60.0
_LAG_SECONDS = 0.3
# How many processes are killed, about; a machine that is slow to start them kills no faster.
_KILLS = 40
_LEAST_BETWEEN_KILLS = 5_000


class WorkerError(Exception):
    """A worker left by itself, or none of them gets anywhere; there is no result."""


@dataclass(slots=True)
class Store:
    """Say where workers ask.

    Attributes:
        target: As the worker takes it.
        sentinels: Who watches the server; None where there is one alone.
        server: The server, where there is one alone.
    """

    target: str
    sentinels: RedisSentinels | None = None
    server: RedisServer | None = None

    def now(self) -> int:
        """Return the instant on the clock of the server that decides, in microseconds."""
        seconds, microseconds = self._command("TIME")
        return int(seconds) * 1_000_000 + int(microseconds)

    def names(self) -> set[str]:
        """Return the names of the clients whose connections it has not yet seen closed."""
        return {client["name"] for client in self._command("CLIENT LIST")}

    def _command(self, word: str) -> Any:
        server = self.server if self.sentinels is None else self.sentinels.primary
        if server is None:
            raise ValueError("there is no server to ask")
        return server.command(word)


@dataclass(slots=True)
class Crew:
    """Start, kill and stop workers.

    Attributes:
        files: The notes of each that ever worked, by its number.
        gone: By its number, an instant after which nothing that it had asked for could happen.
        kills: How many were killed.
    """

    folder: Path
    seed: int
    store: Store
    files: dict[int, Files] = field(default_factory=dict)
    gone: dict[int, int] = field(default_factory=dict)
    kills: int = 0
    _working: dict[int, subprocess.Popen[str]] = field(default_factory=dict)

    def start(self) -> None:
        """Let one more work."""
        number = len(self.files)
        self.files[number] = Files.of(self.folder, number)
        self.files[number].create()
        command = [sys.executable, "-m", "benchmarks.audit_worker", str(self.folder)]
        command += [str(number), str(self.seed), self.store.target]
        self._working[number] = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
        )

    def decisions(self) -> int:
        """Return about how many decisions there were."""
        return sum(files.count() for files in self.files.values())

    def look(self) -> None:
        """See that all are at work.

        Raises:
            WorkerError: One has left.
        """
        for number, process in self._working.items():
            if process.poll() is not None:
                raise WorkerError(f"worker {number} has left:\n{process.communicate()[1]}")

    def kill(self, chosen: random.Random) -> None:
        """Kill one that has begun, and let another one take its place."""
        begun = [number for number in self._working if self.files[number].count()]
        if begun:
            number = chosen.choice(begun)
            self.kills += 1
            self._working[number].kill()
            self._end(number)
            self.start()

    def stop(self) -> None:
        """Let all end what they are at.

        Raises:
            WorkerError: One of them failed.
        """
        for process in self._working.values():
            process.send_signal(signal.SIGTERM)
        failed = [
            f"worker {number} failed:\n{said}"
            for number, process in list(self._working.items())
            for said in [self._end(number)]
            # One that has only just been started does not know the signal yet.
            if process.returncode not in (0, -signal.SIGTERM)
        ]
        if failed:
            raise WorkerError("\n".join(failed))

    def abandon(self) -> None:
        """Kill all that are left."""
        for process in self._working.values():
            process.kill()
            process.communicate()

    def _end(self, number: int) -> str:
        """Wait until a worker is gone and the server knows; return what it complained of."""
        said = self._working[number].communicate(timeout=_PATIENCE_SECONDS)[1]
        del self._working[number]
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while f"audit-{number}" in self.store.names():
            if time.monotonic() > deadline:
                raise WorkerError(f"the server does not let go of worker {number}")
            time.sleep(_POLL_SECONDS / 10)
        self.gone[number] = self.store.now()
        return said


def main() -> None:
    """Let them work, check, print, and exit."""
    options = _arguments()
    before = asyncio.run(_environment())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="tieredlimit-audit-")))
        try:
            store = stack.enter_context(_store(failover=options.failover))
        except NoServerError as exc:
            sys.exit(str(exc))
        crew = Crew(folder, options.seed, store)
        begin = time.monotonic()
        try:
            _work(crew, options)
        finally:
            crew.abandon()
        seconds = time.monotonic() - begin
        findings = check(crew.files, crew.gone)
    result = _result(options, crew, findings, seconds)
    _print({**before, "load after": load()}, result, findings)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"environment": before, **result}
        options.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
        print(f"written to {options.json}")
    sys.exit(1 if result["failed"] else 0)


def _work(crew: Crew, options: argparse.Namespace) -> None:
    """Let workers work until there are enough decisions, or the time is up."""
    chosen = random.Random(options.seed)
    for _ in range(options.processes):
        crew.start()
    begin = moved_at = time.monotonic()
    between = max(options.decisions // _KILLS, _LEAST_BETWEEN_KILLS)
    kill_at = between * chosen.uniform(0.5, 1.5)
    decided, done, to_fail = 0, 0.0, options.failover
    while done < 1:
        time.sleep(_POLL_SECONDS)
        crew.look()
        now, before, decided = time.monotonic(), decided, crew.decisions()
        if decided > before:
            moved_at = now
        elif now > moved_at + _PATIENCE_SECONDS:
            raise WorkerError(f"not one decision in {_PATIENCE_SECONDS:g} s")
        done = decided / options.decisions
        if options.seconds is not None:
            done = max(done, (now - begin) / options.seconds)
        if options.kills and not crew.kills:
            done = min(done, 0.9)  # without one it would not show what it says
        if to_fail and done >= 0.5 and crew.store.sentinels is not None:
            to_fail = False
            _fail_over(crew.store.sentinels)
            begin += time.monotonic() - now
        if options.kills and decided >= kill_at:
            crew.kill(chosen)
            kill_at = decided + between * chosen.uniform(0.5, 1.5)
    crew.stop()


def _fail_over(sentinels: RedisSentinels) -> None:
    """Let the replica fall behind, and the primary die."""
    primary = sentinels.primary
    # Without the permission it would be back at once.
    primary.command("ACL", "SETUSER", "default", "-psync", "-sync")
    primary.command("CLIENT", "KILL", "TYPE", "replica")
    time.sleep(_LAG_SECONDS)
    sentinels.fail_over()


@contextmanager
def _store(*, failover: bool) -> Iterator[Store]:
    if failover:
        with RedisSentinels() as sentinels:
            ports = ",".join(str(sentinel.port) for sentinel in sentinels.sentinels)
            yield Store(f"sentinel:{sentinels.NAME}:{ports}", sentinels=sentinels)
    else:
        with RedisServer() as server:
            yield Store(server.url, server=server)


def bound_of(bucket: Bucket, silence_us: int) -> int:
    """Return the tokens by which a failover may exceed an interval's bound."""
    lag_us = round(_LAG_SECONDS * 1_000_000)
    return bucket.capacity + -(-(lag_us + silence_us) // bucket.interval_us)


def _result(
    options: argparse.Namespace, crew: Crew, findings: Findings, seconds: float
) -> dict[str, Any]:
    counts = findings.counts
    bounds = {
        name: bound_of(bucket, findings.silence_us) for name, (bucket, _) in findings.excess.items()
    }
    worst = [
        {"bucket": name, "tokens": tokens, "bound": bounds[name]}
        for name, (_, tokens) in sorted(findings.excess.items())
    ]
    # An emptied bucket of slots has them all free once.
    slots = _most_slots()
    failed = findings.over > 0
    if options.failover:
        beyond = any(tokens > bounds[name] for name, (_, tokens) in findings.excess.items())
        failed = beyond or findings.most_held > 2 * slots or findings.unasked > 0
    return {
        "settings": {
            "processes": options.processes,
            "kills": options.kills,
            "failover": options.failover,
            "seed": options.seed,
            "accounts": ACCOUNTS,
        },
        "seconds": round(seconds, 1),
        "decisions": counts["admitted"] + counts["denied"],
        **{name: counts[name] for name in ("admitted", "denied", "lost", "remembered")},
        "unanswered": counts["failed"],
        **{name: counts[name] for name in ("settled", "renewed", "released", "unknown")},
        "workers": len(crew.files),
        "kills": crew.kills,
        "buckets": findings.buckets,
        "at_bound": findings.at_bound,
        "closest_us": findings.closest_us,
        "most_held": findings.most_held,
        "over_intervals": findings.over_intervals,
        "over_replay": findings.over_replay,
        "over_slots": findings.over_slots,
        "unasked": findings.unasked,
        "over_admissions": findings.over,
        "silence_us": findings.silence_us,
        "excess": worst,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "failed": failed,
    }


def _most_slots() -> int:
    return max(feature.slots or 0 for feature in FEATURES)


def _print(before: Mapping[str, str], result: Mapping[str, Any], findings: Findings) -> None:
    print("\n".join(f"{name:<12} {value}" for name, value in before.items()))
    slots = _most_slots()
    over_told = (
        f"{result['over_intervals']:,} by intervals, {result['over_replay']:,} by replay, "
        f"{result['over_slots']:,} slots, {result['unasked']:,} unasked"
    )
    rows = [
        ["decisions", result["decisions"], f"in {result['seconds']:,.1f} s"],
        ["  admitted", result["admitted"], ""],
        ["  denied", result["denied"], ""],
        ["denials remembered", result["remembered"], "without a call, on top"],
        ["no answer", result["unanswered"], "denied, as the outage answer says"],
        ["settled", result["settled"], ""],
        ["renewed, released", result["renewed"] + result["released"], ""],
        ["workers killed", result["kills"], f"of {result['workers']:,}"],
        ["  lost", result["lost"], "asked for and not noted: may hide as many admissions"],
        ["  unknown ends", result["unknown"], "settled or released, or not: excused"],
        ["buckets", result["buckets"], ""],
        ["at their bound", result["at_bound"], "admissions that left no room for one more"],
        ["closest", result["closest_us"] or 0, "microseconds below the bound of an interval"],
        ["slots held at once", result["most_held"], f"of {slots}"],
        ["over-admissions", result["over_admissions"], over_told],
        ["memory of the check", result["peak_mb"], "MB"],
    ]  # fmt: skip
    shown = [[name, f"{value:,}", note] for name, value, note in rows]
    print(f"\n{table(['', 'count', ''], shown, words=1, last_word=True)}\n")
    for line in findings.told:
        print(line)
    if result["settings"]["failover"]:
        _print_excess(result)


def _print_excess(result: Mapping[str, Any]) -> None:
    worst = sorted(result["excess"], key=lambda one: one["tokens"] / one["bound"], reverse=True)
    total = sum(one["tokens"] for one in worst)
    many = f"{len(worst):,} of {result['buckets']:,} buckets"
    print(
        f"\nThe failover: {result['silence_us'] / 1e6:.1f} s without a decision; "
        f"{many} admitted too much, {total:,} tokens in all."
    )
    shown = [[one["bucket"], f"{one['tokens']:,}", f"{one['bound']:,}"] for one in worst[:10]]
    if shown:
        print(f"\n{table(['bucket', 'tokens too many', 'bound'], shown, words=1)}")


async def _environment() -> dict[str, str]:
    return environment()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, default=4, help="at once (default: %(default)s)")
    parser.add_argument(
        "--decisions", type=int, default=2_000_000,
        help="how many the server decides (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, help="end after so long in any case")
    parser.add_argument("--kills", action="store_true", help="kill processes and replace them")
    parser.add_argument("--failover", action="store_true", help="kill the primary in the middle")
    parser.add_argument("--seed", type=int, default=SEED, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result there")
    options = parser.parse_args()
    if min(options.processes, options.decisions, options.seconds or 1) <= 0:
        parser.error("processes, decisions and seconds must be above 0")
    return options


if __name__ == "__main__":
    main()

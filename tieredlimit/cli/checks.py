"""What can be wrong with one Redis server, and what that means."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import median
from typing import Any, Literal

from tieredlimit._core.policy import Policy
from tieredlimit.backends.memory import system_clock
from tieredlimit.cli.terminal import printable

Level = Literal["ok", "weakness", "unknown"]

LATENCIES = 100
"""How often the time is asked for, to see how long an answer takes."""

_OLDEST = (6, 2)
_CLOCK_US = 1_000_000
_SLOW = 0.010
_SLOWEST = 0.050


@dataclass(frozen=True, slots=True)
class Finding:
    """Say how one thing stands, and in one sentence what that means.

    Attributes:
        level: `ok`, `weakness`, or `unknown` where the server would not say.
        name: What was looked at.
        told: How it stands.
        means: What a weakness means; empty where all is well.
    """

    level: Level
    name: str
    told: str
    means: str = ""

    @property
    def line(self) -> str:
        """Return it on one line."""
        means = f": {self.means}" if self.means else ""
        return printable(f"{self.name}: {self.told}{means}")


def outage_finding(policy: Policy) -> Finding:
    """Say what requests get while Redis cannot answer."""
    answers = {
        "deny": "is denied",
        "local": "gets a share from each process",
        "allow": "is allowed, without any limit",
    }
    told = [
        f"{feature.name} {answers[feature.outage]}"
        + (f" ({spell_share(feature.outage_share)})" if feature.outage == "local" else "")
        for feature in policy.features.values()
    ]
    return Finding(
        "ok", "outage", f"while Redis is down {', '.join(told)}; zero and closed stay so"
    )


def spell_share(share: Fraction) -> str:
    """Return a share as a policy writes it."""
    return f"{float(share * 100):g}%"


def server_findings(
    info: Mapping[str, str], config: Mapping[str, str] | Exception
) -> Iterator[Finding]:
    """Yield what a server says of itself."""
    yield _version(info)
    yield from _replication(info, config)
    if isinstance(config, Exception):
        told = f"CONFIG is refused ({config})"
        means = "nobody here can say whether memory pressure or a restart loses buckets"
        yield Finding("unknown", "configuration", told, means)
        return
    yield _memory(config)
    yield _persistence(config)


def latency_finding(seconds: Sequence[float]) -> Finding:
    """Return how long answers took, in seconds each."""
    half, longest = median(seconds), max(seconds)
    told = f"median {half * 1e3:.2f} ms, longest {longest * 1e3:.2f} ms of {len(seconds)}"
    if half > _SLOW or longest > _SLOWEST:
        means = "a decision has 100 ms in all: what takes longer gets the outage answer"
        return Finding("weakness", "latency", told, means)
    return Finding("ok", "latency", told)


def clock_finding(server_us: int, before_us: int, after_us: int) -> Finding:
    """Return how far a server's clock is from this host's, which looked before and after."""
    off = (server_us - (before_us + after_us) // 2) / 1e6
    told = f"{abs(off):.3f} s {'ahead of' if off >= 0 else 'behind'} this host"
    if abs(off) * 1e6 > _CLOCK_US:
        means = "overrides begin and end by the server's clock, not by the one you look at"
        return Finding("weakness", "clock", told, means)
    return Finding("ok", "clock", told)


def permission_findings(replies: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what the user may do, by what was refused."""
    means = {
        "scripts": "no decision and no change is possible",
        "WAIT": "nobody can say how many replicas hold a change",
        "PUBLISH": "idle workers hear of a change up to 0.5 s later, busy ones with a decision",
        "SCRIPT LOAD": "every call carries the whole script",
    }
    refused = {name: reply for name, reply in replies.items() if isinstance(reply, Exception)}
    for name, reply in refused.items():
        yield Finding("weakness", "permissions", f"{name} is refused ({reply})", means[name])
    if not refused:
        yield Finding("ok", "permissions", f"{', '.join(replies)} are allowed")


def read_info(told: Any) -> dict[str, str]:
    """Return the lines of INFO by name."""
    text = told.decode("utf-8", "replace") if isinstance(told, bytes) else ""
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


def read_config(replies: Sequence[Any]) -> dict[str, str] | Exception:
    """Return the names and values that CONFIG GET gave one by one, or its refusal."""
    config: dict[str, str] = {}
    for told in replies:
        if isinstance(told, Exception):
            return told
        texts = [part.decode("utf-8", "replace") for part in told]
        config.update(zip(texts[::2], texts[1::2], strict=False))
    return config


class Stopwatch:
    """Measure what one question takes, and this host's clock around it."""

    def __init__(self) -> None:
        self.before_us = self.after_us = system_clock()
        self._from = time.perf_counter()

    def stop(self) -> float:
        """Return the seconds since it was made."""
        self.after_us = system_clock()
        return time.perf_counter() - self._from


def _version(info: Mapping[str, str]) -> Finding:
    version = info.get("redis_version", "")
    found = re.match(r"(\d{1,5})\.(\d{1,5})", version)
    if found is None:
        return Finding("unknown", "version", "the server does not say")
    told = f"{version} (Valkey {info['valkey_version']})" if "valkey_version" in info else version
    if (int(found[1]), int(found[2])) < _OLDEST:
        means = "6.2 is the oldest whose commands the scripts use: nothing will work"
        return Finding("weakness", "version", told, means)
    return Finding("ok", "version", told)


def _replication(
    info: Mapping[str, str], config: Mapping[str, str] | Exception
) -> Iterator[Finding]:
    if info.get("role") == "slave":
        means = "it takes no writes: name the primary"
        yield Finding("weakness", "replicas", "this server is a replica itself", means)
        return
    number = info.get("connected_slaves", "0")
    if number == "0":
        means = "when this server dies, its buckets start full, and a closure is gone until a "
        means += "running worker puts it back"
        yield Finding("weakness", "replicas", "none", means)
        return
    yield Finding("ok", "replicas", number)
    if not isinstance(config, Exception) and config.get("min-replicas-to-write") == "0":
        means = "a primary that is cut off goes on taking writes that a failover then loses"
        yield Finding("weakness", "min-replicas-to-write", "0", means)


def _memory(config: Mapping[str, str]) -> Finding:
    policy = config.get("maxmemory-policy", "")
    limit = config.get("maxmemory", "0")
    told = f"maxmemory-policy {policy}, maxmemory {'none' if limit == '0' else limit}"
    if policy == "noeviction":
        return Finding("ok", "memory", told)
    if policy.startswith("volatile-"):
        means = "under pressure it drops buckets, each of which then starts full"
    else:
        means = "under pressure it drops buckets, which then start full, and even closures"
    return Finding("weakness", "memory", told, f"{means}; set noeviction")


def _persistence(config: Mapping[str, str]) -> Finding:
    appends, save = config.get("appendonly") == "yes", config.get("save", "")
    if appends:
        return Finding("ok", "persistence", "appendonly")
    if save:
        means = "a restart forgets what was charged, and changed, since the last snapshot"
        return Finding("weakness", "persistence", f"snapshots only ({save})", means)
    means = "a restart comes back empty: buckets start full, and a closure is gone until a "
    means += "running worker puts it back"
    return Finding("weakness", "persistence", "none", means)

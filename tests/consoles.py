"""Play the commands that pages show, on a real Redis with workers under load.

`python -m tests.consoles --write` writes what they print into the pages. The test compares it; what
differs from run to run (times, rates, latencies) counts as equal.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import re
import shlex
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self, TypeVar
from unittest.mock import patch

from click.testing import CliRunner

from tests.servers import RedisServer
from tieredlimit import Account, Limiter
from tieredlimit.backends import RedisBackend
from tieredlimit.backends.control import control_store
from tieredlimit.cli import main
from tieredlimit.cli.pace import Pace

T = TypeVar("T")

DOCS = Path(__file__).parents[1] / "docs"
SHOWN_URL = "redis://redis.internal:6379/0"
SHOWN_USER, SHOWN_HOST = "ann", "ops-1"
NAMESPACE = "media-prod"
WORKERS = 3

# These show what the workers counted: they find a sample that was begun after the step before.
_SAMPLED = ("watch",)
_DENIALS = 2
_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TOML = re.compile(r"^```toml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_KEPT = re.compile(
    r"revision \d+|\d+/\d+ workers|\b[45]\d\d [A-Z]\w+|(?:close|open|set)-\d+|shards? \d+|"
    r"\d+/(?:day|minute)|undo --to \d+|u\d+\b"
)


@dataclass
class Step:
    """A command of a page, and what the page says that it prints."""

    command: str
    shown: str


@dataclass(frozen=True)
class Scene:
    """What a page's commands are played on.

    Attributes:
        page: The page, below `docs/`.
        policy: The workers' policy; None takes the page's first block of TOML.
        files: Further files beside it.
        load: What each worker takes in each tick: plan, age in days, feature.
        tick: Seconds.
        before: What happens once, before the first command.
    """

    page: str
    policy: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    load: Sequence[tuple[str | None, int, str]] = ()
    tick: float = 0.1
    before: Callable[[Limiter], Awaitable[None]] | None = None

    @property
    def text(self) -> str:
        return (DOCS / self.page).read_text("utf-8")


def today(command: str) -> str:
    """Return a command for accounts of this week: the one that it names was made two days ago."""
    made = (datetime.now(UTC) - timedelta(days=2)).date().isoformat()
    return command if "--at" in command else re.sub(r"(--created) [\d-]+", rf"\1 {made}", command)


def steps(block: str) -> list[Step]:
    """Return the commands of a block, each with the lines below it."""
    found: list[Step] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append(Step(line.removeprefix("$ "), ""))
        elif found and not found[-1].shown and found[-1].command.endswith("\\"):
            found[-1].command = found[-1].command[:-1] + line.strip()
        else:
            found[-1].shown += f"{line}\n"
    return found


def blocks(text: str) -> list[str]:
    """Return the blocks of commands of a page that show what is printed, or set the place."""
    return [block for block in _BLOCK.findall(text) if _plays(block)]


def _plays(block: str) -> bool:
    return any(
        line.startswith(("$ tieredlimit ", "$ export TIERED")) for line in block.splitlines()
    )


def alike(text: str) -> str:
    """Return a text with what differs from run to run made equal."""
    parts, end = [], 0
    for kept in _KEPT.finditer(text):
        parts += [_masked(text[end : kept.start()]), kept[0]]
        end = kept.end()
    parts.append(_masked(text[end:]))
    return "".join(parts).strip()


def _masked(text: str) -> str:
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", "INSTANT", text)
    text = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{16}\b", "HASH", text)
    text = re.sub(r"(ahead of|behind) this host", "beside this host", text)
    text = re.sub(r"[\d,.]*\d", "N", text)
    text = re.sub(r"\bN (second|minute|hour|day)s?( N (second|minute|hour|day)s?)?\b", "SPAN", text)
    # Told only where somebody was admitted before the last worker followed.
    text = re.sub(r"\n *admitted by the exceptions named above, or just before [^\n]*", "", text)
    # Columns are as wide as their content.
    return re.sub(r"[ ]{2,}", "  ", text)


def _short(text: str) -> str:
    """Leave out all but two of the denials that a command lists."""
    kept, denials = [], 0
    for line in text.splitlines():
        denials += (told := line.startswith("  denied "))
        if not told or denials <= _DENIALS:
            kept.append(line)
    return "\n".join(kept)


class Night:
    """Workers under load on one Redis, and an operator at a terminal."""

    def __init__(self, url: str, scene: Scene) -> None:
        self._url = url
        self._scene = scene
        self._environment = {"COLUMNS": "200", "LOGNAME": SHOWN_USER}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._limiters: list[Limiter] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._made = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._await(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._await(self._close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def play(self, step: Step) -> tuple[int, str]:
        """Run a command as the operator does; return its exit code and what the terminal shows."""
        words = shlex.split(today(step.command), comments=True)
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            self._environment[name] = value.replace(SHOWN_URL, self._url)
            return 0, ""
        assert words[0] == "tieredlimit", step.command
        if words[1] in _SAMPLED:
            self._await(self._counted())
        with patch("socket.gethostname", lambda: SHOWN_HOST):
            result = CliRunner().invoke(
                main,
                words[1:],
                input=f"{NAMESPACE}\n",
                env=self._environment,
                obj=Pace(attended=lambda: True),
                catch_exceptions=False,
            )
        shown = re.sub(r" +$", "", result.output, flags=re.MULTILINE)
        return result.exit_code, _short(shown)

    def _await(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _open(self) -> None:
        self._limiters = [
            Limiter("policy.toml", self._url, namespace=NAMESPACE) for _ in range(WORKERS)
        ]
        store = control_store(RedisBackend.from_url(self._url), NAMESPACE, 1)
        await store.set_label("PRODUCTION")
        await store.close()
        for limiter in self._limiters:
            await limiter.open()
        if self._scene.before is not None:
            await self._scene.before(self._limiters[0])
        self._tasks = [self._loop.create_task(self._work(one)) for one in self._limiters]
        await self._counted()
        await self._counted()

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for limiter in self._limiters:
            await limiter.close()

    async def _work(self, limiter: Limiter) -> None:
        """Make requests as a crowd does: each account makes one."""
        while True:
            for plan, days, feature in self._scene.load:
                self._made += 1
                created = datetime.now(UTC) - timedelta(days=days)
                account = Account(f"a{self._made}", plan=plan, created_at=created)
                decision = await limiter.take(account, feature)
                if decision.lease is not None:
                    await decision.lease.release()
            await asyncio.sleep(self._scene.tick)

    async def _counted(self) -> None:
        store = control_store(RedisBackend.from_url(self._url), NAMESPACE, 1)
        heard: dict[str, list[float]] = {}
        deadline = time.monotonic() + 20
        try:
            while sum(len(beats) > 1 for beats in heard.values()) < WORKERS:
                assert time.monotonic() < deadline, "the workers are not heard"
                for worker in await store.workers():
                    ages = heard.setdefault(worker.id, [worker.age])
                    if worker.age < ages[-1]:
                        ages.append(worker.age)
                    else:
                        ages[-1] = worker.age
                await asyncio.sleep(0.05)  # to look again
        finally:
            await store.close()


@contextlib.contextmanager
def stage(url: str, scene: Scene) -> Iterator[Night]:
    """Lay out the files of a scene in a folder of their own, and let its workers run."""
    policy = scene.policy or _TOML.findall(scene.text)[0]
    with tempfile.TemporaryDirectory() as folder:
        for name, content in {"policy.toml": policy, **scene.files}.items():
            (Path(folder) / name).write_text(content, "utf-8")
        with contextlib.chdir(folder), Night(url, scene) as night:
            yield night


VIDEO = """\
order = ["new", "pro", "everyone"]

[features.video]
routes = ["POST /v1/videos"]
outage = "deny"
refund_on = [500, 502, 503, 504]

[features.video.pool]
rate = "600/minute"
concurrency = 40
lease = "10 minutes"
leave = { new = "50%", everyone = "20%" }

[tiers.new]
when = { plan = "free", account_age_below = "7 days" }
quotas.video = "3/day"

[tiers.pro]
when = { plan = "pro" }
quotas.video = { rate = "200/day", capacity = 20, concurrency = 3, lease = "10 minutes" }

[tiers.everyone]
quotas.video = { rate = "10/day", capacity = 2 }
"""


async def _busy(limiter: Limiter) -> None:
    """Let jobs hold most slots and take most of the pool."""
    for i in range(25):
        account = Account(f"job-{i}", plan="pro", created_at=datetime(2026, 1, 1, tzinfo=UTC))
        decision = await limiter.take(account, "video", cost=16)
        assert decision.lease is not None
        decision.lease.detach()


async def _one_video(limiter: Limiter) -> None:
    created = datetime.now(UTC) - timedelta(days=2)
    await limiter.take(Account("u1", plan="free", created_at=created), "video")


SCENES = (
    Scene(
        "handbook.md",
        before=_one_video,
        load=(
            ("free", 2, "video"),
            ("free", 2, "image"),
            ("free", 2, "image"),
            ("free", 90, "image"),
            ("free", 90, "video"),
            ("pro", 90, "video"),
        ),
    ),
    Scene(
        "commands.md",
        policy=VIDEO,
        files={"next.toml": VIDEO.replace('"3/day"', '"6/day"')},
        # Slower than the pool refills: it stays below the line of `new`, above the others'.
        load=(("free", 2, "video"), ("pro", 90, "video")),
        tick=0.4,
        before=_busy,
    ),
)


def exit_code(step: Step) -> int:
    """Return with what a command of a page ends: 0, but for a doctor who finds something."""
    return 5 if step.command.startswith("tieredlimit doctor") else 0


def written(url: str, scene: Scene) -> str:
    """Return a page with what its commands print now."""
    text = scene.text
    with stage(url, scene) as night:
        for block in blocks(text):
            lines = []
            for step in steps(block):
                code, shown = night.play(step)
                assert code == exit_code(step), (step.command, code, shown)
                lines += [f"$ {today(step.command)}", *shown.splitlines()]
            text = text.replace(
                f"```console\n{block}```", "```console\n" + "\n".join(lines) + "\n```"
            )
    return text


def main_() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the pages, not only print them")
    parser.add_argument("page", nargs="*", help="only these, such as handbook.md")
    given = parser.parse_args()
    for scene in SCENES:
        if given.page and scene.page not in given.page:
            continue
        with RedisServer() as server:
            text = written(server.url, scene)
        if given.write:
            (DOCS / scene.page).write_text(text, "utf-8")
        else:
            print("\n".join(blocks(text)))


if __name__ == "__main__":
    # The workers are in this process: what they log is none of the commands' output.
    logging.getLogger("tieredlimit").addHandler(logging.NullHandler())
    main_()

"""A fleet under load: video is closed for new accounts, let in again, and its Redis killed."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from examples.demo_load import CROWD, Answer, Load, Stream
from examples.demo_redis import OwnRedis
from examples.demo_screen import Cell, Screen, View
from examples.demo_server import CHECKOUT, StartError
from examples.demo_still import draw

WORKERS = 4
SECONDS = 30.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

MESSAGE = "Video is paused for new accounts."
CLOSE = ("close", "video", "--tier", "new", "--message", MESSAGE, "--yes")
OPEN = ("open", "video", "--tier", "new", "--yes", "--ramp")

_IMAGES, _VIDEOS = "/v1/images", "/v1/videos"
STREAMS = (
    Stream("new", "image", _IMAGES, 30),
    Stream("free", "image", _IMAGES, 26),
    Stream("pro", "image", _IMAGES, 20),
    Stream("new", "video", _VIDEOS, 40),
    Stream("free", "video", _VIDEOS, 20),
    Stream("pro", "video", _VIDEOS, 16),
)

# What the commands take is not in here: about five seconds.
_WARM, _CLOSED, _RAMP, _ALL, _OUTAGE, _BACK = 4.0, 4.0, 8.0, 2.0, 4.0, 3.0
_COMMANDS = 5.0
_MOMENT = 0.5
_BACK_WITHIN = 10.0


class OffScript(Exception):  # noqa: N818 -- the story ends here, which is no error of its own
    """The story cannot go on; the message says why."""


class Fleet:
    """Play the story, tell it on a screen, and note what is not as promised.

    Args:
        urls: Where the workers answer.
        server: Their Redis, which will be killed.
        environment: What tells a command which Redis, namespace and policy are meant.
        screen: Where to tell it.
        seconds: About how long it takes.
        still: Where to put a picture of the closure; None for none.
    """

    def __init__(
        self,
        urls: Sequence[str],
        server: OwnRedis,
        environment: Mapping[str, str],
        screen: Screen,
        *,
        seconds: float = SECONDS,
        still: Path | None = None,
    ) -> None:
        self.checks = 0
        self.differences: list[str] = []
        self._urls = urls
        self._server = server
        self._environment = environment
        self._screen = screen
        self._scale = max(1.0, seconds - _COMMANDS) / (SECONDS - _COMMANDS)
        self._still = still
        self._load = Load(urls, STREAMS)
        self._history: dict[tuple[str, str], list[int]] = {
            (one.tier, one.feature): [] for one in STREAMS
        }
        self._told: list[str] = []

    async def play(self) -> None:
        """Play it to its end.

        Raises:
            asyncio.CancelledError: It was stopped by a signal.
        """
        with _cancelled_by_signals():
            async with self._load, asyncio.TaskGroup() as tasks:
                self._screen.begin()
                table = tasks.create_task(self._keep_showing())
                try:
                    await self._play()
                except OffScript as exc:
                    self._check(False, str(exc))
                table.cancel()

    async def _play(self) -> None:
        began_at = await self._phase(_WARM)
        closed_at = await self._close()
        ramp_at = await self._reopen(closed_at)
        bystanders = [
            one
            for one in self._load.sent(began_at, ramp_at)
            if (one.tier, one.feature) != ("new", "video")
        ]
        self._check_all(bystanders, "images, and other accounts' videos", "admitted all the while")
        await self._outage()
        await self._recover()

    async def _close(self) -> float:
        """Close video for new accounts; return when that had been done."""
        self._say("Video goes viral. One command closes it for new accounts, in every worker:")
        await self._command(*CLOSE)
        closed_at = time.monotonic()
        await self._read_denial()
        await self._phase(_CLOSED, closed_at)
        await self._load.settle()
        if self._still is not None:
            view = self._view()
            title = f"Video is closed for new accounts · {view.title}"
            typed, *_, result, read = self._told
            self._still.write_text(draw(view, title, [typed, result, read]), "utf-8")
        asked = list(self._sent("new", "video", closed_at))
        denied = sum(one.status == 403 for one in asked)
        self._check(
            0 < denied == len(asked),
            f"of {len(asked)} videos that new accounts asked for after that, "
            f"{sum(one.admitted for one in asked) or 'none'} was admitted, {denied} got a 403",
        )
        return closed_at

    async def _reopen(self, closed_at: float) -> float:
        """Let new accounts in again, more and more of them; return when all had been in a while."""
        seconds = max(1, round(_RAMP * self._scale))
        self._say("It calms down. A ramp lets in more and more of them, those who are in stay in:")
        await self._command(*OPEN, f"{seconds}s")
        await asyncio.sleep(seconds)
        all_in_at = await self._phase(_ALL)
        await self._load.settle()
        asked = list(self._sent("new", "video", all_in_at))
        self._check_all(asked, "videos of new accounts after the ramp", "admitted")
        turned_away = list(_turned_away(self._sent("new", "video", closed_at)))
        self._check(
            not turned_away,
            f"{len(turned_away) or 'none'} of the new accounts was let in and turned away again",
        )
        return time.monotonic()

    async def _outage(self) -> None:
        """Kill Redis, and see what each feature's outage answer does."""
        self._server.kill()
        killed_at = time.monotonic()
        self._say('Redis is killed. The policy says: image outage = "allow", video outage = "deny"')
        await self._phase(_OUTAGE)
        await self._load.settle()
        asked = list(self._load.sent(killed_at))
        images = [one for one in asked if one.feature == "image"]
        self._check_all(images, "images without Redis", "admitted")
        videos = [one for one in asked if one.feature == "video"]
        refused = sum(one.status == 503 for one in videos)
        self._check(
            0 < refused == len(videos),
            f"{refused} of {len(videos)} videos without Redis: 503",
        )

    async def _recover(self) -> None:
        """Bring Redis back, empty, and see everybody admitted again."""
        try:
            self._server.start()
        except StartError as exc:
            raise OffScript(str(exc)) from exc
        started_at = time.monotonic()
        self._say("Redis is back, and empty: the workers put back what was in force.")
        denied_at = started_at
        while time.monotonic() < denied_at + _MOMENT:
            if time.monotonic() > started_at + _BACK_WITHIN:
                raise OffScript(f"some are still denied {_BACK_WITHIN:g} s after Redis came back")
            await asyncio.sleep(_MOMENT / 5)
            denied = (one.sent_at for one in self._load.sent(started_at) if not one.admitted)
            denied_at = max(denied, default=started_at)
        await self._phase(_BACK)
        await self._load.settle()
        asked = [one for one in self._load.sent(started_at) if one.sent_at > denied_at]
        told = f"from {denied_at - started_at:.1f} s after it came back"
        self._check_all(asked, "requests", f"admitted {told}")
        await self._command("status")

    async def _phase(self, seconds: float, began_at: float | None = None) -> float:
        """Let so many seconds pass, scaled; return when they began."""
        began_at = time.monotonic() if began_at is None else began_at
        await asyncio.sleep(began_at + seconds * self._scale - time.monotonic())
        return began_at

    async def _command(self, *words: str) -> None:
        """Run `tieredlimit` as an operator would, and show what it says.

        Raises:
            OffScript: It has failed.
        """
        self._tell(f"$ tieredlimit {shlex.join(words)}")
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tieredlimit",
            *words,
            cwd=CHECKOUT,
            env={**os.environ, **self._environment, "PYTHONIOENCODING": "utf-8"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            out, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        for line in out.decode("utf-8", "replace").splitlines():
            self._tell(line)
        if process.returncode:
            raise OffScript(f"tieredlimit {words[0]} has left with {process.returncode}")

    async def _read_denial(self) -> None:
        """Ask for a video as a new account does, and show what it reads.

        Raises:
            OffScript: There was no answer.
        """
        url, headers = f"{self._urls[0]}{_VIDEOS}", {"X-Api-Key": "key-new-0"}
        try:
            async with httpx.AsyncClient(timeout=10.0, trust_env=False) as client:
                answer = await client.post(url, headers=headers)
        except httpx.HTTPError as exc:
            raise OffScript(f"a worker did not answer: {exc!r}") from exc
        said = answer.json().get("detail", "no detail")
        self._tell(f"a new account reads: {answer.status_code} {said}")
        self._check(
            (answer.status_code, said) == (403, MESSAGE), "it reads what the operator has written"
        )

    async def _keep_showing(self) -> None:
        shown = 0
        await asyncio.sleep(_MOMENT)  # a view is of the second before: wait for the first
        while True:
            await asyncio.sleep(_MOMENT)
            for key, statuses in self._load.came(time.monotonic() - _MOMENT).items():
                admitted = sum(n for status, n in statuses.items() if 200 <= status < 300)
                self._history[key].append(round(admitted / _MOMENT))
            shown += 1
            if self._screen.live or shown % 2:
                self._screen.show(self._view())

    def _view(self) -> View:
        seen = self._load.came(time.monotonic() - 1.0)
        cells: dict[str, dict[str, Cell]] = {}
        for one in STREAMS:
            history = self._history[one.tier, one.feature]
            statuses = seen[one.tier, one.feature]
            others = {s: n for s, n in statuses.items() if not 200 <= s < 300}
            cells.setdefault(one.feature, {})[one.tier] = Cell(
                one.per_second,
                sum(statuses.values()) - sum(others.values()),
                others,
                history,
            )
        return View(f"{len(self._urls)} workers, one Redis", CROWD, cells)

    def _sent(self, tier: str, feature: str, since: float) -> Iterator[Answer]:
        sent = self._load.sent(since)
        return (one for one in sent if (one.tier, one.feature) == (tier, feature))

    def _check_all(self, answers: Sequence[Answer], what: str, how: str) -> None:
        others = [one for one in answers if not one.admitted]
        admitted = len(answers) - len(others)
        told = f"{admitted} of {len(answers)} {what}: {how}"
        if others:
            statuses = ", ".join(str(status) for status in sorted({one.status for one in others}))
            told += f"; the others {statuses}"
        # On a busy machine, Redis is now and then slower than a decision waits: that is a 503.
        slow = sum(one.status == 503 for one in others)
        self._check(admitted > 0 and len(others) == slow <= 1 + len(answers) // 100, told)

    def _check(self, is_so: bool, what: str) -> None:
        self.checks += 1
        if not is_so:
            self.differences.append(what)
        tick, color = ("✓", "green") if is_so else ("✗", "red")
        self._screen.say(f"{tick} {what}", color=color)

    def _say(self, text: str) -> None:
        self._screen.say(text, bold=True)

    def _tell(self, line: str) -> None:
        """Show a line of the operator's terminal, and keep it for the still."""
        self._told.append(line)
        self._screen.say(line, color="cyan" if line.startswith("$ ") else None)


def _turned_away(answers: Iterable[Answer]) -> Iterator[Answer]:
    """Return what was denied to an account that had been let in before."""
    let_in: dict[int, float] = {}
    for one in sorted(answers, key=lambda answer: answer.came_at):
        if one.admitted:
            let_in.setdefault(one.account, one.came_at)
        elif one.status == 403 and one.sent_at > let_in.get(one.account, one.sent_at):
            yield one


@contextmanager
def _cancelled_by_signals() -> Iterator[None]:
    """Let signals cancel this task; elsewhere in the event loop, they would only do harm."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    before = {number: signal.getsignal(number) for number in SIGNALS}
    stopped = False

    def cancel(*_: object) -> None:
        nonlocal stopped
        stopped = True
        # Once: impatience must not interrupt what ends the processes.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        loop.call_soon_threadsafe(task.cancel)

    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, cancel)
    try:
        yield
    finally:
        if not stopped:
            for number, handler in before.items():
                signal.signal(number, handler)

"""Start ASGI servers as docs/servers.md says to, each in processes of its own."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx

from tests.servers import _free_port

if TYPE_CHECKING:
    from types import TracebackType

CHECKOUT = Path(__file__).resolve().parent.parent
PAGE = CHECKOUT / "docs" / "servers.md"
APP = "tests.conformance_app:app"
HOST = "127.0.0.1"
START_SECONDS = 60.0
STOP_SECONDS = 20.0


class Program:
    """A server that serves the conformance application, from `with` until its end.

    Args:
        name: The server, which is started by the command that docs/servers.md gives for it.
        folder: Where it logs.
        redis_url: What it decides by.
        namespace: Of its limiter.
        workers: How many processes serve, where the command has a say in that.
        options: What is added to the command.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        redis_url: str,
        namespace: str,
        *,
        workers: int = 1,
        options: tuple[str, ...] = (),
    ) -> None:
        self._name = name
        self._workers = workers
        self._options = options
        self._mark = uuid.uuid4().hex
        self._written = folder / f"{namespace}-{self._mark}.log"
        self._told = self._written.with_suffix(".told")
        self._environment = {
            "CONFORMANCE_REDIS": redis_url,
            "CONFORMANCE_NAMESPACE": namespace,
            "CONFORMANCE_LOG": str(self._told),
            "CONFORMANCE_MARK": self._mark,
        }

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{HOST}:{self.port}"

    @property
    def told(self) -> list[str]:
        """What its limiters wrote down, such as `open 17`: the word and the process."""
        return self._told.read_text("utf-8").splitlines() if self._told.exists() else []

    @property
    def log(self) -> str:
        """What it has written itself."""
        return self._written.read_text("utf-8", "replace")

    def about(self, **headers: str) -> dict[str, Any]:
        """Return what it makes of a request."""
        told: dict[str, Any] = httpx.get(
            f"{self.url}/about", headers=headers, timeout=START_SECONDS, trust_env=False
        ).json()
        return told

    def __enter__(self) -> Self:
        # Between the choice of a free port and its use, another process may take it.
        for attempts_left in reversed(range(5)):
            self.port = _free_port()
            self._start()
            try:
                self._wait_until_ready()
            except BaseException as exc:
                self.stop()
                if attempts_left and isinstance(exc, OSError) and "in use" in str(exc):
                    continue
                raise
            break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it as a supervisor does, and wait until it has gone."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            # Its workers as well: the session is its own.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            raise

    def _start(self) -> None:
        with self._written.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=CHECKOUT,
                env={**os.environ, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _command(self) -> list[str]:
        """Return the command of the page, for the application, port and workers of this test."""
        command = commands()[self._name].replace("app:app", APP).replace("0.0.0.0", HOST)
        command = command.replace("8000", str(self.port))
        command = command.replace("--workers 4", f"--workers {self._workers}")
        return [sys.executable, "-m", *shlex.split(command), *self._options]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                code = self._process.wait(0.02)
            except subprocess.TimeoutExpired:
                try:
                    ready = self.about()["mark"] == self._mark
                except (httpx.TransportError, ValueError, KeyError):
                    continue
                if ready:
                    return
            else:
                raise OSError(f"{self._name} left with exit code {code}:\n{self.log}")
        raise OSError(f"{self._name} did not answer within {START_SECONDS:g} s:\n{self.log}")


def commands() -> dict[str, str]:
    """Return the commands of docs/servers.md by server."""
    found = re.findall(r"^\$ ((\w+) app:app .*)$", PAGE.read_text("utf-8"), re.MULTILINE)
    return {name: command for command, name in found}

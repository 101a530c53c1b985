"""The media API in a process of its own, as the demonstration needs it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

CHECKOUT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
START_SECONDS = 15.0
STOP_SECONDS = 5.0

_MARK = "demo-server"
_LOGGED_LINES = 40


class StartError(Exception):
    """A server did not come up; the message holds its log."""


class MediaServer:
    """Serve the media API with uvicorn from `with` until its end.

    Args:
        environment: Variables for the server, above those that we have ourselves.
        port: Where to listen on the loopback interface; None is any free port.
        app: The application, as uvicorn is told.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        port: int | None = None,
        app: str = "examples.media_api:app",
    ) -> None:
        self._environment = environment
        self._port = port
        self._app = app
        self._mark = uuid.uuid4().hex

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{HOST}:{self.port}"

    @property
    def running(self) -> bool:
        """Whether the process is there still."""
        return self._process.poll() is None

    def log(self) -> str:
        """Return what the server has written, the last lines of it if that is much."""
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return "\n".join(lines[-_LOGGED_LINES:])

    def __enter__(self) -> Self:
        # Between the choice of a free port and its use, another process may take it.
        for attempts_left in reversed(range(1 if self._port else 5)):
            self.port = self._port or free_port()
            try:
                self._start()
            except StartError as exc:
                if not attempts_left or "address already in use" not in str(exc):
                    raise
            else:
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()
        self._log.close()

    def _start(self) -> None:
        command = [sys.executable, "-m", "uvicorn", self._app]
        command += ["--app-dir", str(CHECKOUT), "--host", HOST, "--port", str(self.port)]
        command += ["--log-level", "warning", "--header", f"{_MARK}:{self._mark}"]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the server
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **self._environment},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            self._wait_until_ready()
        except BaseException:  # Ctrl-C too must leave no process behind
            self._stop()
            self._log.close()
            raise

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                code = self._process.wait(timeout=0.05)
            except subprocess.TimeoutExpired:
                if self._answers():
                    return
            else:
                raise StartError(f"the server left with exit code {code}:\n{self.log()}")
        raise StartError(f"no answer within {START_SECONDS:g} s; the server wrote:\n{self.log()}")

    def _answers(self) -> bool:
        try:
            response = httpx.get(f"{self.url}/health", timeout=1.0, trust_env=False)
        except httpx.TransportError:
            return False
        # By its mark: on the same port, somebody else's server may be healthy as well.
        return response.headers.get(_MARK) == self._mark and response.is_success

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def free_port() -> int:
    """Return a port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port

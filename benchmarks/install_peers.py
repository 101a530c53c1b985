"""Install what the benchmarks compare with, each alone, and note what could not be.

    python -m benchmarks.install_peers PATH

What tieredlimit itself needs stays as it is: a peer that wants an older redis-py is installed
beside the newer one, where that is possible.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

PEERS = (
    "limits",
    "slowapi",
    "throttled-py",
    "fastapi-limiter",
    "traffik[redis]",
    "asgi-ratelimit",
    "moderato",
)


def main() -> None:
    """Install the peers and write which were left out, and why."""
    left_out = {}
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "kept.txt")
        kept.write_text(_pip("freeze", "--exclude-editable").stdout, "utf-8")
        for peer in PEERS:
            done = _pip("install", "--quiet", "--constraint", str(kept), peer)
            if done.returncode:
                why = next((line for line in done.stderr.splitlines() if "ERROR" in line), "")
                done = _pip("install", "--quiet", "--no-deps", peer)
                print(f"{peer}: beside versions that it does not ask for ({why})", file=sys.stderr)
            if done.returncode:
                left_out[peer.partition("[")[0]] = "cannot be installed"
                print(f"{peer}: left out:\n{done.stderr}", file=sys.stderr)
    Path(sys.argv[1]).write_text(json.dumps(left_out) + "\n", "utf-8")


def _pip(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    main()

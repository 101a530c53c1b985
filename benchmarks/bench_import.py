"""How much longer does an application take to start, for importing tieredlimit?

    scripts/bench import [--rounds 40] [--breakdown] [--json PATH]

What an application with limits in Redis imports anyway is `starlette.applications` and
`redis.asyncio`. A row is a process of its own that imports something and ends, the rows taking
turns; shown is the least processor time of all rounds, less that of a Python that imports nothing,
since whatever else the machine does can only add to it. Bytecode is there: it was compiled before.

`--breakdown` prints what each module of ours takes by itself, by `-X importtime`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

from benchmarks.measure import Bar, Chart, Target, arguments, environment, finish, run, table

ANYWAY = "import starlette.applications, redis.asyncio"
ROWS = {
    "nothing": "pass",
    "starlette and redis": ANYWAY,
    "both, and tieredlimit": f"{ANYWAY}, tieredlimit",
    "tieredlimit alone": "import tieredlimit",
    "both, and FastAPI": f"{ANYWAY}, fastapi",
}
BASE, OURS = "starlette and redis", "both, and tieredlimit"
AT_MOST = 1.3
_LISTED = 25
_LINE = re.compile(r"^import time:\s+(\d+) \|.*\| +(\S+)$", re.MULTILINE)


def main() -> None:
    """Measure, print the table, write the file."""
    breakdown = "--breakdown" in sys.argv
    if breakdown:
        sys.argv.remove("--breakdown")
    options = arguments("import", __doc__, rounds=40)
    before, least = run(measure(options.rounds), uvloop=False)
    rows: list[dict[str, Any]] = [
        {"imports": name, "ms": 1000 * seconds, "vs_base": seconds / least[BASE]}
        for name, seconds in least.items()
    ]
    shown = table(
        ["imports", "ms", "of starlette and redis"],
        [[row["imports"], f"{row['ms']:.1f}", f"{row['vs_base']:.2f}x"] for row in rows],
        words=1,
    )
    finish(
        options, "import", __doc__,
        {"environment": before, "settings": {"rounds": options.rounds}, "rows": rows},
        shown + (f"\n\n{by_module(options.rounds)}" if breakdown else ""),
        targets=[
            Target(
                "starlette and redis -> and tieredlimit", AT_MOST, True,
                least[OURS] / least[BASE], note="processor time of the imports",
            )
        ],
        charts=[
            Chart(
                "Processor time of importing", "ms, less is better",
                [
                    Bar(name, 1000 * seconds, "ours" if "tieredlimit" in name else "floor")
                    for name, seconds in least.items()
                ],
                [("1.3x starlette and redis", AT_MOST * 1000 * least[BASE])],
            )
        ],
    )  # fmt: skip


async def measure(rounds: int) -> tuple[dict[str, str], dict[str, float]]:
    """Return the environment, and the least processor seconds of each row above an empty one's."""
    before = environment()
    least: dict[str, float] = {}
    _warm_up()
    for _ in range(rounds):
        for name, code in ROWS.items():
            seconds = _processor_seconds(code)
            least[name] = min(seconds, least.get(name, seconds))
    nothing = least.pop("nothing")
    return before, {name: seconds - nothing for name, seconds in least.items()}


def by_module(rounds: int) -> str:
    """Return the microseconds that modules of ours take by themselves, the most first."""
    least: dict[str, int] = {}
    for _ in range(rounds):
        command = [sys.executable, "-X", "importtime", "-c", ROWS[OURS]]
        told = subprocess.run(
            command, capture_output=True, text=True, check=True, env=_environment()
        )
        for took, name in _LINE.findall(told.stderr):
            if name.partition(".")[0] == "tieredlimit":
                least[name] = min(int(took), least.get(name, int(took)))
    most = sorted(least.items(), key=lambda one: -one[1])
    lines: list[Any] = [[name, str(took)] for name, took in most[:_LISTED]]
    lines.append([f"all {len(most)}", str(sum(least.values()))])
    return table(["module", "us by itself"], lines, words=1)


def _warm_up() -> None:
    """Let all bytecode be written, and all files be read once."""
    for code in ROWS.values():
        _processor_seconds(code)


def _processor_seconds(code: str) -> float:
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", code], _environment())
    _, status, used = os.wait4(pid, 0)
    if status:
        raise RuntimeError(f"{code!r} left with status {os.waitstatus_to_exitcode(status)}")
    return used.ru_utime + used.ru_stime


def _environment() -> dict[str, str]:
    # Without its bytecode, what is measured would be the compiler.
    return {name: word for name, word in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


if __name__ == "__main__":
    main()

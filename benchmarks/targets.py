"""Print what was aimed at, beside what the latest result of each benchmark measured.

scripts/bench --targets
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, Target, targets_table

ORDER = (
    "decision",
    "middleware",
    "end_to_end",
    "accounts",
    "memory",
    "policy_size",
    "denied",
    "call_length",
    "cluster",
    "capacity",
    "strangers",
    "import",
)
"""The benchmarks, in the order in which they are run and shown."""


def main() -> None:
    """Print the table; exit with 1 where a benchmark has no result yet."""
    parser = argparse.ArgumentParser(prog="scripts/bench --targets", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results are")
    found = latest(parser.parse_args().results)
    print(targets_table(targets_of(found)))
    for result in found:
        load = result["environment"]["load after"]
        print(f"{result['benchmark']:<12} {result['finished']}  load after: {load}")
    missing = [name for name in ORDER if name not in {result["benchmark"] for result in found}]
    for name in missing:
        print(f"{name:<12} not measured: scripts/bench {name}", file=sys.stderr)
    sys.exit(1 if missing else 0)


def latest(folder: Path) -> list[dict[str, Any]]:
    """Return the latest result of each benchmark that has one."""
    found = []
    for name in ORDER:
        # The instant is part of the name, and sorts.
        paths = sorted(folder.glob(f"{name}-[0-9]*.json"))
        results = [json.loads(path.read_text("utf-8")) for path in paths[-1:]]
        found += [result for result in results if "targets" in result]
    return found


def targets_of(results: Sequence[dict[str, Any]]) -> list[Target]:
    """Return all that was aimed at, in the order of the results."""
    return [Target(**target) for result in results for target in result["targets"]]


if __name__ == "__main__":
    main()

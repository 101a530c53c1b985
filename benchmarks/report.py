"""Run every benchmark and draw one page of the results.

    scripts/bench --report [--quick] [--kept] [--output PATH]

The page is benchmarks/results/report.png unless told otherwise; an ending of .svg or .pdf is
understood as well. Bars of ours, of other packages, and of what there is without a limiter have
a colour each; lines are what was aimed at. All targets stand below.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, targets_table, verdict
from benchmarks.targets import ORDER, latest, targets_of

QUICK = {
    "accounts": ["--accounts", "100000", "--rounds", "2", "--seconds", "0.1"],
    "call_length": ["--calls", "20", "--rounds", "2"],
    "capacity": ["--rounds", "2", "--seconds", "0.1"],
    "cluster": ["--rounds", "2", "--seconds", "0.1"],
    "decision": ["--rounds", "2", "--seconds", "0.1"],
    "denied": ["--rounds", "2", "--seconds", "0.1"],
    "end_to_end": ["--rounds", "1", "--seconds", "1"],
    "import": ["--rounds", "3"],
    "memory": ["--accounts", "10000"],
    "middleware": ["--rounds", "2", "--seconds", "0.1"],
    "policy_size": ["--rounds", "2", "--seconds", "0.1"],
    "strangers": ["--ids", "200000", "--in-redis", "20000"],
}
"""Enough to see that all of it runs; too little to quote."""

_COLOURS = {"ours": "#2a7f62", "peer": "#b9b9b9", "floor": "#6f9bd1"}
_NAMES = {"ours": "tieredlimit", "peer": "other packages", "floor": "for comparison"}
_MISSED = "#c0392b"
_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
_COLUMNS = 2
_LINE_INCHES = 0.19
_BAR_INCHES = 0.27
_ROUND_CHART_INCHES = 1.25
_HEAD_INCHES = 1.5
_WIDTH_INCHES = 17.0
_ENVIRONMENT = ("cpu", "cores", "system", "python", "event loop", "server", "redis-py", "hiredis",
                "limits", "load before")  # fmt: skip


def main() -> None:
    """Run, draw, and print the targets."""
    parser = argparse.ArgumentParser(prog="scripts/bench --report", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short runs, not to be quoted")
    parser.add_argument("--kept", action="store_true", help="run none, draw the latest results")
    parser.add_argument("--output", type=Path, default=RESULTS / "report.png")
    options = parser.parse_args()
    failed = [] if options.kept else [name for name in ORDER if not _run(name, options.quick)]
    results = latest(RESULTS)
    if not results:
        sys.exit("there are no results to draw")
    draw(results, options.output)
    print(f"\n{targets_table(targets_of(results))}\n\ndrawn: {options.output}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _run(name: str, quick: bool) -> bool:
    print(f"== {name}", flush=True)
    command = [sys.executable, "-m", f"benchmarks.bench_{name}", *(QUICK[name] if quick else [])]
    return subprocess.run(command, check=False).returncode == 0


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw every chart of the results on one page."""
    try:
        figures: Any = import_module("matplotlib.figure")
        patches: Any = import_module("matplotlib.patches")
    except ImportError:
        sys.exit("drawing needs matplotlib: pip install tieredlimit[report]")

    # Each chart goes where the page is shortest.
    tops = [_HEAD_INCHES] * _COLUMNS
    placed = []
    for chart in [chart for result in results for chart in result["charts"]]:
        column = tops.index(min(tops))
        placed.append((chart, column, tops[column]))
        tops[column] += _ROUND_CHART_INCHES + _BAR_INCHES * len(chart["bars"])
    targets = targets_of(results)
    lines = targets_table(targets).splitlines()
    total = max(tops) + _LINE_INCHES * (len(lines) + 2)
    figure = figures.Figure(figsize=(_WIDTH_INCHES, total), layout="none", facecolor="white")
    figure.text(0.02, 1 - 0.35 / total, "tieredlimit: benchmarks", size=18, weight="bold")
    for at, text in enumerate(_head(results)):
        figure.text(0.02, 1 - (0.65 + 0.22 * at) / total, text, size=10, color="#444444")
    figure.legend(
        handles=[patches.Patch(color=_COLOURS[kind], label=name) for kind, name in _NAMES.items()],
        loc="upper right", ncols=3, frameon=False, bbox_to_anchor=(0.99, 1 - 0.15 / total),
    )  # fmt: skip
    for chart, column, top in placed:
        inner = _BAR_INCHES * len(chart["bars"])
        left, bottom = 0.15 + column * 0.5, 1 - (top + 0.45 + inner) / total
        _draw_chart(figure.add_axes((left, bottom, 0.325, inner / total)), chart)
    for at, line in enumerate(lines):
        missed = at > 1 and verdict(targets[at - 2]).startswith("not met")
        figure.text(
            0.02, 1 - (max(tops) + _LINE_INCHES * at) / total, line, size=9, family="monospace",
            color=_MISSED if missed else "black",
        )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_chart(axes: Any, chart: dict[str, Any]) -> None:
    bars = chart["bars"]
    values = [bar["value"] for bar in bars]
    longest = max([*values, *[at for _, at in chart["lines"]]])
    own = max((bar["value"] for bar in bars if bar["kind"] == "ours"), default=None)
    several = sum(bar["kind"] == "ours" for bar in bars) > 1
    axes.barh(range(len(bars)), values, color=[_COLOURS[bar["kind"]] for bar in bars], height=0.72)
    axes.set_yticks(range(len(bars)), [bar["label"] for bar in bars], size=9)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.28)
    for at, value in enumerate(values):
        # What ours is, in times of this one; with several of ours that would say nothing.
        compared = not several and own and bars[at]["kind"] != "ours" and value
        times = f"   (ours {_spell(own / value)}x)" if compared else ""
        axes.text(
            value + longest * 0.01,
            at,
            f"{_spell(value)}{times}",
            va="center",
            size=8.5,
            bbox=_WHITE,
        )
    for label, at in chart["lines"]:
        axes.axvline(at, color=_MISSED, linestyle="--", linewidth=1.2)
        axes.text(at, -0.62, label, color=_MISSED, size=8.5, ha="center", va="bottom")
    axes.set_title(chart["title"], size=11, loc="left", weight="bold", pad=16)
    axes.set_xlabel(chart["unit"], size=8.5, color="#444444")
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.set_major_formatter(lambda value, _: _spell(value))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _head(results: Sequence[dict[str, Any]]) -> list[str]:
    environment = results[0]["environment"]
    said = [f"{name} {environment[name]}" for name in _ENVIRONMENT if name in environment]
    half = math.ceil(len(said) / 2)
    dates = sorted(result["finished"] for result in results)
    targets = targets_of(results)
    met = sum(verdict(target) == "met" for target in targets)
    return [
        "  |  ".join(said[:half]),
        "  |  ".join(said[half:]),
        f"measured from {dates[0]} to {dates[-1]}; {met} of {len(targets)} targets met",
    ]


def _spell(value: float) -> str:
    if value >= 1_000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


if __name__ == "__main__":
    main()

"""`tieredlimit table`: every cell is there, and no line is wider than the terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from tieredlimit._core.policy import Policy
from tieredlimit.cli import main
from tieredlimit.cli.table import lines
from tieredlimit.cli.terminal import display_width, folded, pad, width

EXAMPLE = Path(__file__).parents[1] / "examples" / "policy.toml"

CELLS = [
    "0",
    '"unlimited"',
    '"5/minute"',
    '["20/minute", "500/day"]',
    '{ rate = "200/day", capacity = 20 }',
    '[{ rate = "200/day", capacity = 20 }, { rate = "5000/day", per = "org" }]',
    '["9/second", "40/minute", "900/hour", { rate = "7/3 days", capacity = 777, per = "org" }]',
]
SPELLED = [
    "0",
    "unlimited",
    "5/minute",
    "20/minute + 500/day",
    "200/day cap 20 + 5000/day per org",
    "9/second + 40/minute + 900/hour + 7/3 days cap 777 per org",
    " + ".join(f"{i}/minute per organisation-of-many" for i in range(1, 17)),
    "\uff15/minute per org + 画像",
]


def policy_text(tiers: int, features: int) -> str:
    """Return a policy of so many tiers and features, with cells of every kind."""
    names = [f"feature-{i}{'-with-a-long-name' * (i % 5 == 0)}" for i in range(features)]
    text = [f"order = {[f'tier-{i}' for i in range(tiers)]}"]
    text += [f'[features.{name}]\nroutes = ["POST /v1/{name}"]' for name in names]
    for i in range(tiers):
        text.append(f"[tiers.tier-{i}]")
        if i < tiers - 1:
            text.append(f'when = {{ plan = "plan-{i}" }}')
        text += [
            f"quotas.{name} = {CELLS[(i * 3 + j) % len(CELLS)]}" for j, name in enumerate(names)
        ]
    return "\n".join(text)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "large.toml"
    path.write_text(policy_text(20, 40), "utf-8")
    return path


def run(*words: object, columns: int | str = 80) -> Result:
    return CliRunner().invoke(main, ["table", *map(str, words)], env={"COLUMNS": str(columns)})


def read_blocks(text: str) -> dict[tuple[str, str], str]:
    """Read a table back as a person would: by where its columns start."""
    cells: dict[tuple[str, str], str] = {}
    for block in text.rstrip("\n").split("\n\n"):
        head, *rows = block.split("\n")
        starts = [0] + [i for i, (a, b) in enumerate(pairwise(head), 1) if a == " " != b]
        slices = [slice(a, b) for a, b in pairwise([*starts, 10_000])]
        features = [head[part].strip() for part in slices[1:]]
        tier = ""
        for row in rows:
            tier = row[slices[0]].strip() or tier
            for feature, part in zip(features, slices[1:], strict=True):
                key = (tier, feature)
                cells[key] = f"{cells.get(key, '')} {row[part].strip()}".strip()
    return cells


def expected(path: Path) -> dict[tuple[str, str], str]:
    policy = Policy.load(path)
    return {
        (tier.name, name): cell.spell()
        for tier in policy.tiers
        for name, cell in tier.cells.items()
    }


# --- Blocks


def test_small_table_stands_in_one_block() -> None:
    assert run(EXAMPLE).stdout.splitlines() == [
        "tier      image              video",
        "new       5/minute + 50/day  0",
        "pro       unlimited          200/day cap 20 + 5000/day per org",
        "free      20/minute          10/day cap 2",
        "everyone  2/minute           0",
    ]


@pytest.mark.parametrize("columns", [80, 120])
def test_large_table_keeps_every_cell_and_the_width(large: Path, columns: int) -> None:
    result = run(large, columns=columns)

    assert max(map(display_width, result.stdout.splitlines())) <= columns
    assert read_blocks(result.stdout) == expected(large)


def test_wide_terminal_takes_a_large_table_in_one_block(large: Path) -> None:
    assert "\n\n" not in run(large, columns=9_000).stdout


@pytest.mark.parametrize("columns", [20, 30])
def test_narrow_terminal_gets_a_list(large: Path, columns: int) -> None:
    result = run(large, "--tier", "tier-0", "--tier", "tier-19", columns=columns)

    first, second = result.stdout.split("\n\n")
    assert first.startswith("tier-0\n  feature-0-with-a-long-name   0\n")
    assert second.startswith("tier-19\n")
    words = "".join(result.stdout.split())
    cells = expected(large)
    for tier in ("tier-0", "tier-19"):
        for i in range(40):
            name = f"feature-{i}{'-with-a-long-name' * (i % 5 == 0)}"
            assert name + "".join(cells[tier, name].split()) in words


@given(
    st.lists(st.lists(st.sampled_from(SPELLED), min_size=3, max_size=3), min_size=1, max_size=4),
    st.integers(50, 140),
)
def test_no_line_is_wider_and_no_word_is_lost(rows: list[list[str]], columns: int) -> None:
    names = ["a", "somewhat-longer", "the-very-longest-name-there-is"]
    grid = {f"t{i}": dict(zip(names, row, strict=True)) for i, row in enumerate(rows)}

    shown = [click.unstyle(line) for line in lines(grid, names, columns)]

    assert max(map(display_width, shown)) <= columns
    words = [word for row in rows for cell in row for word in cell.split()]
    assert Counter(words) <= Counter(" ".join(shown).split())


def test_wide_characters_count_twice() -> None:
    assert display_width("画像e\u0301\u200d") == 5
    assert pad("画像", 6) == "画像  "


@given(st.text(st.sampled_from("a 画동\u0301\x1b-")), st.integers(4, 30))
def test_folded_text_keeps_its_words_and_the_width(text: str, columns: int) -> None:
    lines = folded(text, columns)

    words = text.replace("\x1b", "\\x1b").split()
    assert " ".join(lines).split() == words
    for line in lines:
        assert display_width(line.strip()) <= columns or " " not in line.strip()


def test_folded_text_keeps_its_indent() -> None:
    assert folded("  one two three", 9) == ["  one two", "  three"]


# --- What is shown


def test_filters_choose_rows_and_columns_in_the_policy_s_order() -> None:
    result = run(EXAMPLE, "--tier", "free", "--tier", "new", "--feature", "video")

    assert result.stdout.splitlines() == ["tier  video", "new   0", "free  10/day cap 2"]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--tier", "fre"], 'did you mean "free"?'),
        (["--feature", "viedo"], 'did you mean "video"?'),
        (["--tier", "zzz"], "known are new, pro, free, everyone"),
    ],
)
def test_unknown_name_gets_a_hint(words: list[str], hint: str) -> None:
    result = run(EXAMPLE, *words)

    assert result.exit_code == 2
    assert hint in result.stderr


def test_rate_is_shown_without_its_white_space(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(
        '[features.a]\nroutes = ["GET /a"]\n[tiers.t]\nquotas.a = "5  per   minute"', "utf-8"
    )

    assert "5 per minute" in run(path).stdout


def test_json_has_cells_with_their_quotas() -> None:
    document = json.loads(run(EXAMPLE, "--json", "--tier", "pro").stdout)

    assert document["tiers"] == ["pro"]
    assert document["features"] == ["image", "video"]
    assert document["cells"]["pro"]["image"]["unlimited"]
    assert document["cells"]["pro"]["video"]["quotas"][1] == {
        "name": "video-day-org",
        "rate": "5000/day",
        "capacity": 5000,
        "interval": 17.28,
        "window": 86400.0,
        "per": "org",
        "concurrency": None,
        "lease": None,
    }


# --- The terminal


@pytest.mark.parametrize("columns", ["", "0", "wide", "-3", "9" * 5_000])
def test_without_a_terminal_the_width_is_fixed(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)

    assert width() == 80


def test_on_a_terminal_its_width_counts_and_zero_has_a_colour() -> None:
    main_end, terminal = pty.openpty()
    os.set_blocking(main_end, False)
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    words = [sys.executable, "-m", "tieredlimit", "table", str(EXAMPLE)]

    subprocess.run(words, stdout=terminal, env=env | {"TERM": "xterm"}, check=True)

    shown = os.read(main_end, 100_000).decode()
    os.close(main_end)
    os.close(terminal)
    assert "\x1b[31m0\x1b[0m" in shown
    assert click.unstyle(shown).split() == run(EXAMPLE).stdout.split()


def test_cells_in_shadow_follow_below(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(
        """
        order = ["free", "everyone"]
        [features.image]
        routes = ["POST /v1/images"]
        [features.video]
        routes = ["POST /v1/videos"]
        [defaults]
        quotas = { image = "2/minute", video = 0 }
        shadow.image = ["10/minute", "200/day"]
        [tiers.free]
        when = { plan = "free" }
        shadow.video = "5/day"
        [tiers.everyone]
        """,
        "utf-8",
    )

    _, below = run(policy, "--tier", "free").stdout.split("\n\n")
    cells = json.loads(run(policy, "--json").stdout)["cells"]

    assert below.splitlines() == [
        "tier  feature  in shadow: measured, not enforced",
        "free  image    10/minute + 200/day",
        "free  video    5/day",
    ]
    assert cells["free"]["video"]["shadow"] == "5/day"
    assert cells["everyone"]["video"]["shadow"] is None

"""Draw how accounts fall into tiers: `python -m examples.tier_picture docs/tiers.svg`.

Nothing is made up: the policy is loaded, a limiter says which tier each account is in, and the
cells are spelled as `tieredlimit table` spells them.
"""

from __future__ import annotations

import sys
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from examples.pool_picture import Clock
from tieredlimit import Account, Limiter, Policy
from tieredlimit.backends import MemoryBackend

POLICY = """\
order = ["new", "pro", "free", "everyone"]
features.image = { routes = ["POST /v1/images"] }
features.video = { routes = ["POST /v1/videos"] }
defaults.quotas = { image = "2/minute", video = 0 }
[tiers.new]
when = { plan = "free", account_age_below = "7 days" }
quotas.image = ["5/minute", "50/day"]
[tiers.pro]
when = { plan = ["pro", "team"] }
quotas = { image = "unlimited", video = "200/day" }
[tiers.free]
when = { plan = "free" }
quotas = { image = "20/minute", video = "10/day" }
[tiers.everyone]
"""
_NOW = datetime(2026, 11, 22, 18, tzinfo=UTC)
ACCOUNTS = (
    ("u1: plan free", "2 days old", Account("u1", "free", _NOW - timedelta(days=2))),
    ("u1, a week later", "9 days old", Account("u1", "free", _NOW - timedelta(days=9))),
    ("u2: plan pro", "2 days old", Account("u2", "pro", _NOW - timedelta(days=2))),
    ("192.0.2.7", "no account", Account("192.0.2.7", anonymous=True)),
)

_COLOURS = {"new": "#9a3d6f", "pro": "#0b6e99", "free": "#d98a00", "everyone": "#5b6b5b"}
_INK, _GREY = "#222", "#777"
_TOP, _ROW, _WIDTH = 64, 66, 832
_ACCOUNT_X, _ACCOUNT_WIDE, _TIER_X, _TIER_WIDE = 16, 132, 250, 250
_CELLS_X, _CELL_WIDE = 512, 158


@dataclass(frozen=True)
class Shown:
    """One tier: what it asks for, what it says of each feature, and which accounts fall in it."""

    name: str
    when: str
    cells: tuple[str, ...]
    accounts: tuple[int, ...]


def read() -> list[Shown]:
    """Return the tiers of the policy, in the order in which they are tried."""
    document = tomllib.loads(POLICY)
    policy = Policy.from_dict(document)
    clock = Clock()
    clock.now = int(_NOW.timestamp()) * 1_000_000
    limiter = Limiter(policy, MemoryBackend(clock=clock))
    fallen = [limiter.tier_of(account) for _, _, account in ACCOUNTS]
    return [
        Shown(
            tier.name,
            _spelled(document["tiers"][tier.name].get("when", {})),
            tuple(policy.cell(tier.name, feature).spell() for feature in policy.features),
            tuple(i for i, name in enumerate(fallen) if name == tier.name),
        )
        for tier in policy.tiers
    ]


def drawn(tiers: list[Shown]) -> str:
    """Return the picture as SVG."""
    height = _TOP + len(tiers) * _ROW + 16
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            'font-family="system-ui, sans-serif" font-size="12" role="img">'
            "<title>Four accounts, each in the first tier whose conditions hold, and what that "
            'tier may do with each feature</title><rect width="100%" height="100%" fill="#fff"/>'
        ),
        _heading(_ACCOUNT_X, "account"),
        _heading(_TIER_X, "tier: the first that holds"),
    ]
    for i, feature in enumerate(Policy.from_dict(tomllib.loads(POLICY)).features):
        parts.append(_heading(_CELLS_X + i * _CELL_WIDE, feature))
    for i, (first, second, _) in enumerate(ACCOUNTS):
        parts.append(_card(i, first, second))
    for row, tier in enumerate(tiers):
        parts += [_tier(row, tier), *(_way(i, row, tier.name) for i in tier.accounts)]
    return "\n".join([*parts, "</svg>", ""])


def _spelled(when: dict[str, Any]) -> str:
    words = []
    for word, value in when.items():
        told = " or ".join(value) if isinstance(value, list) else value
        words.append(f"{word.replace('_', ' ')} {told}")
    return ", ".join(words) or "everybody else"


def _middle(row: int) -> float:
    return _TOP + row * _ROW + _ROW / 2 - 6


def _heading(x: float, text: str) -> str:
    return f'<text x="{x}" y="34" fill="{_INK}" font-weight="600">{text}</text>'


def _card(i: int, first: str, second: str) -> str:
    y = _middle(i)
    return (
        f'<rect x="{_ACCOUNT_X}" y="{y - 22}" width="{_ACCOUNT_WIDE}" height="44" rx="6" '
        f'fill="#f4f4f1" stroke="#d5d5cf"/>'
        f'<text x="{_ACCOUNT_X + 12}" y="{y - 4}" fill="{_INK}">{first}</text>'
        f'<text x="{_ACCOUNT_X + 12}" y="{y + 13}" fill="{_GREY}">{second}</text>'
    )


def _way(account: int, row: int, name: str) -> str:
    begin, end = _ACCOUNT_X + _ACCOUNT_WIDE, _TIER_X - 8
    y1, y2, bend = _middle(account), _middle(row), (end - begin) / 2
    return (
        f'<path d="M{begin} {y1} C{begin + bend} {y1} {end - bend} {y2} {end} {y2}" '
        f'fill="none" stroke="{_COLOURS[name]}" stroke-width="2"/>'
        f'<path d="M{end - 7} {y2 - 5} L{end} {y2} L{end - 7} {y2 + 5}" fill="none" '
        f'stroke="{_COLOURS[name]}" stroke-width="2"/>'
    )


def _tier(row: int, tier: Shown) -> str:
    y, colour = _middle(row), _COLOURS[tier.name]
    parts = [
        (
            f'<rect x="{_TIER_X}" y="{y - 24}" width="{_TIER_WIDE}" height="48" rx="6" '
            f'fill="{colour}" fill-opacity="0.10" stroke="{colour}"/>'
            f'<text x="{_TIER_X + 12}" y="{y - 5}" fill="{colour}" '
            f'font-weight="600">{tier.name}</text>'
            f'<text x="{_TIER_X + 12}" y="{y + 13}" fill="{_INK}">{tier.when}</text>'
        )
    ]
    for i, cell in enumerate(tier.cells):
        fill = "#b3261e" if cell == "0" else _INK
        told = "0: never" if cell == "0" else cell
        parts.append(
            f'<rect x="{_CELLS_X + i * _CELL_WIDE}" y="{y - 24}" width="{_CELL_WIDE - 8}" '
            f'height="48" rx="6" fill="#fff" stroke="#d5d5cf"/>'
            f'<text x="{_CELLS_X + i * _CELL_WIDE + 12}" y="{y + 4}" fill="{fill}">{told}</text>'
        )
    return "\n".join(parts)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(drawn(read()), "utf-8")

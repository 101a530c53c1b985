"""Reading cells and messages: what a tier says about a feature."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tieredlimit._core.quota import MAX_AMOUNT, Quota, parse_quota_rate
from tieredlimit._core.reading import Reading, join, spell
from tieredlimit._core.slots import read_slots

UNLIMITED = "unlimited"
WORDS = ("rate", "capacity", "name", "per", "concurrency", "lease")

_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")
_MAX_MESSAGE = 1_000
_MAX_QUOTAS = 16
_ZERO_OR_UNLIMITED = f'0 or "{UNLIMITED}"'


@dataclass(frozen=True, slots=True)
class Content:
    """Hold what a cell says: no quotas is zero, unless `unlimited`."""

    quotas: tuple[Quota, ...] = ()
    unlimited: bool = False


def read_cell(reading: Reading, path: str, feature: str, value: Any) -> Content | None:
    """Read a cell: a quota, a list of them, zero, or `"unlimited"`; None where it has a fault."""
    if _is_whole_cell(value):
        return Content(unlimited=value == UNLIMITED)
    return _read_quotas(reading, path, feature, value, _ZERO_OR_UNLIMITED)


def read_shadow(reading: Reading, path: str, feature: str, value: Any) -> Content | None:
    """Read a cell in shadow: as `read_cell`, except for `"unlimited"`, which measures nothing."""
    if value == UNLIMITED:
        reading.fault(path, f"{spell(value)} measures nothing; give a quota or 0, or leave it out")
        return None
    if _is_whole_cell(value):
        return Content()
    content = _read_quotas(reading, path, feature, value, "0")
    if content and any(quota.concurrency for quota in content.quotas):
        reading.fault(path, "concurrency is not measured: what is only measured holds no slot")
        return None
    return content


def _read_quotas(
    reading: Reading, path: str, feature: str, value: Any, otherwise: str
) -> Content | None:
    """Read a quota or a list of them; `otherwise` is what else the cell may be."""
    if not isinstance(value, list):
        quota = _read_quota(reading, path, feature, value, otherwise)
        return Content((quota,)) if quota else None
    if not value:
        reading.fault(path, f"an empty list limits nothing; write {otherwise}")
        return None
    if len(value) > _MAX_QUOTAS:
        reading.fault(path, f"at most {_MAX_QUOTAS} quotas in a cell, got {len(value)}")
        return None
    before = len(reading.faults)
    quotas = [
        _read_quota(reading, f"{path}[{i}]", feature, one, otherwise) for i, one in enumerate(value)
    ]
    _check_names(reading, path, quotas)
    _check_slots(reading, path, quotas)
    return Content(tuple(filter(None, quotas))) if len(reading.faults) == before else None


def read_messages(reading: Reading, path: str, value: Any) -> dict[str, str] | None:
    """Read a message: one text, or a table of texts by language; None where it has a fault."""
    before = len(reading.faults)
    if not isinstance(value, Mapping):
        _check_text(reading, path, value)
        return {"": value} if len(reading.faults) == before else None
    if not value:
        reading.fault(path, "must hold a text, got an empty table")
    seen: set[str] = set()
    for language, text in value.items():
        place = join(path, language)
        if not isinstance(language, str) or not _LANGUAGE.fullmatch(language):
            reading.fault(place, f'{spell(language)} is no language tag; write one such as "en"')
        elif language.lower() in seen:
            reading.fault(place, f"{spell(language)} is there twice: case does not count")
        else:
            seen.add(language.lower())
        _check_text(reading, place, text)
    return dict(value) if len(reading.faults) == before else None


def _check_text(reading: Reading, path: str, text: Any) -> None:
    if not isinstance(text, str) or not text.strip():
        reading.fault(path, f"must be a text, got {spell(text)}")
    elif len(text) > _MAX_MESSAGE:
        reading.fault(path, f"must be at most {_MAX_MESSAGE:,} characters, got {len(text):,}")
    elif any("\ud800" <= character <= "\udfff" for character in text):
        reading.fault(path, f"holds a lone surrogate, which no response can: {spell(text)}")


def _is_whole_cell(value: Any) -> bool:
    return value == UNLIMITED or (type(value) is int and value == 0)


def _read_quota(
    reading: Reading, path: str, feature: str, value: Any, otherwise: str
) -> Quota | None:
    if isinstance(value, Mapping):
        return _read_table(reading, path, feature, value)
    if _is_whole_cell(value):
        reading.fault(path, f"{spell(value)} is a whole cell: it cannot stand among quotas")
        return None
    if not isinstance(value, str):
        wanted = f'write a rate such as "5/minute", a table, {otherwise}'
        reading.fault(path, f"got {spell(value)}; {wanted}")
        return None
    return _build(reading, path, feature, value, {})


def _read_table(
    reading: Reading, path: str, feature: str, table: Mapping[Any, Any]
) -> Quota | None:
    before = len(reading.faults)
    reading.known(path, table, WORDS)
    slots = read_slots(reading, path, table)
    if "capacity" in table:
        reading.whole(join(path, "capacity"), table["capacity"], 1, MAX_AMOUNT)
    for word in ("name", "per"):
        if word in table:
            reading.name(join(path, word), table[word])
    place, rate = join(path, "rate"), table.get("rate")
    if "rate" not in table:
        reading.fault(place, 'is missing; write a rate such as "5/minute"')
    elif _is_whole_cell(rate):
        reading.fault(place, f"{spell(rate)} is a whole cell: it cannot stand in a quota")
    elif not isinstance(rate, str):
        reading.fault(place, f'got {spell(rate)}; write a rate such as "5/minute"')
    elif len(reading.faults) == before:
        return _build(reading, place, feature, rate, table, *slots)
    else:
        # For its own faults: with a wrong capacity the bucket's window is not known.
        _build(reading, place, feature, rate, {"capacity": 1})
    return None


def _build(
    reading: Reading,
    path: str,
    feature: str,
    text: str,
    table: Mapping[Any, Any],
    concurrency: int | None = None,
    lease_us: int | None = None,
) -> Quota | None:
    """Build the quota of a rate and the checked rest of its table."""
    parsed = reading.parse(path, lambda rate: parse_quota_rate(rate, table.get("capacity")), text)
    if parsed is None:
        return None
    rate, capacity, interval_us, warning = parsed
    if warning:
        reading.warn(path, warning)
    per: str | None = table.get("per")
    name = f"{feature}-{rate.label}" + (f"-{per}" if per else "")
    name = table.get("name", name)
    return Quota(name, text, capacity, interval_us, per, concurrency, lease_us)


def _check_names(reading: Reading, path: str, quotas: list[Quota | None]) -> None:
    """Note quotas of one cell that share a name, or the tag that stands for it in the store."""
    seen: dict[str | bytes, int] = {}
    for i, quota in enumerate(quotas):
        if quota is None:
            continue
        first = seen.setdefault(quota.name, i)
        if first == i:
            first = seen.setdefault(quota.tag, i)
        if first != i:
            reading.fault(
                f"{path}[{i}].name",
                f"{spell(quota.name)} is taken by {path}[{first}]; give one of them another name",
            )


def _check_slots(reading: Reading, path: str, quotas: list[Quota | None]) -> None:
    """Note a second `concurrency` of one subject: the smaller of both would decide alone."""
    seen: dict[str | None, int] = {}
    for i, quota in enumerate(quotas):
        if quota is not None and quota.concurrency is not None:
            first = seen.setdefault(quota.per, i)
            if first != i:
                reading.fault(
                    f"{path}[{i}].concurrency",
                    f"{path}[{first}] has one for the same subject; keep the smaller one",
                )

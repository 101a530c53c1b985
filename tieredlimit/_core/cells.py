"""Reading cells and messages: what a tier says about a feature."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tieredlimit._core.quota import MAX_AMOUNT, Quota, parse_quota_rate
from tieredlimit._core.reading import Reading, join, spell

UNLIMITED = "unlimited"

_WORDS = ("rate", "capacity", "name", "per", "concurrency", "lease")
_NOT_YET = ("concurrency", "lease")
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")
_MAX_MESSAGE = 1_000
_MAX_QUOTAS = 16

CellContent = tuple[tuple[Quota, ...], bool]
"""Quotas, and whether the cell is unlimited; no quotas and not unlimited is zero."""


def read_cell(reading: Reading, path: str, feature: str, value: Any) -> CellContent | None:
    """Read a cell: a quota, a list of them, zero, or `"unlimited"`; None where it has a fault."""
    if value == UNLIMITED:
        return (), True
    if type(value) is int and value == 0:
        return (), False
    if not isinstance(value, list):
        quota = _read_quota(reading, path, feature, value)
        return ((quota,), False) if quota else None
    if not value:
        reading.fault(path, 'an empty list limits nothing; write 0 or "unlimited"')
        return None
    if len(value) > _MAX_QUOTAS:
        reading.fault(path, f"at most {_MAX_QUOTAS} quotas in a cell, got {len(value)}")
        return None
    quotas = [_read_quota(reading, f"{path}[{i}]", feature, one) for i, one in enumerate(value)]
    read = tuple(quota for quota in quotas if quota)
    distinct = _distinct(reading, path, quotas)
    return (read, False) if distinct and len(read) == len(quotas) else None


def read_messages(reading: Reading, path: str, value: Any) -> dict[str, str] | None:
    """Read a message: one text, or a table of texts by language; None where it has a fault."""
    texts = value if isinstance(value, Mapping) else {"": value}
    before = len(reading.faults)
    if not texts:
        reading.fault(path, "must hold a text, got an empty table")
    for language, text in texts.items():
        place = join(path, language) if language else path
        if language and not _LANGUAGE.fullmatch(language):
            reading.fault(place, f'"{language}" is no language tag; write one such as "en"')
        elif not isinstance(text, str) or not text.strip() or len(text) > _MAX_MESSAGE:
            reading.fault(place, f"must be a text of 1 to {_MAX_MESSAGE} characters")
    return dict(texts) if len(reading.faults) == before else None


def _read_quota(reading: Reading, path: str, feature: str, value: Any) -> Quota | None:
    if isinstance(value, str):
        value, rate_path = {"rate": value}, path
    elif isinstance(value, Mapping):
        rate_path = join(path, "rate")
    else:
        wanted = 'write a rate such as "5/minute", a table, 0 or "unlimited"'
        reading.fault(path, f"got {spell(value)}; {wanted}")
        return None
    before = len(reading.faults)
    reading.known(path, value, _WORDS)
    for word in _NOT_YET:
        if word in value:
            reading.fault(join(path, word), "is not supported yet")
    capacity, per, name = value.get("capacity"), value.get("per"), value.get("name")
    if capacity is not None:
        capacity = reading.whole(join(path, "capacity"), capacity, 1, MAX_AMOUNT)
    if per is not None:
        reading.name(join(path, "per"), per)
    if name is not None:
        reading.name(join(path, "name"), name)
    text = value.get("rate")
    if text == UNLIMITED:
        reading.fault(rate_path, "unlimited is a whole cell: it cannot stand among quotas")
        return None
    if not isinstance(text, str):
        missing = 'must be a rate such as "5/minute"'
        reading.fault(rate_path, missing if text is None else f"{missing}, got {spell(text)}")
        return None
    parsed = reading.parse(rate_path, lambda rate: parse_quota_rate(rate, capacity), text)
    if parsed is None or len(reading.faults) > before:
        return None
    rate, tokens, interval_us, warning = parsed
    if warning:
        reading.warn(rate_path, f'"{text}" {warning}')
    default = f"{feature}-{rate.label}" + (f"-{per}" if per else "")
    return Quota(name or default, text, tokens, interval_us, per)


def _distinct(reading: Reading, path: str, quotas: list[Quota | None]) -> bool:
    """Note quotas of one cell that share a name, or the tag that stands for it in the store."""
    seen: dict[str | bytes, int] = {}
    distinct = True
    for i, quota in enumerate(quotas):
        if quota is None:
            continue
        first = seen.setdefault(quota.name, i)
        if first == i:
            first = seen.setdefault(quota.tag, i)
        if first != i:
            reading.fault(
                f"{path}[{i}].name",
                f'"{quota.name}" is taken by {path}[{first}]; give one of them another name',
            )
            distinct = False
    return distinct

"""Accounts: what can be one, and what is refused before it can do harm."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tieredlimit import Account, UsageError

WHEN = datetime(2026, 11, 20, 18, tzinfo=UTC)


class NoOffset(tzinfo):
    def utcoffset(self, moment: datetime | None) -> None:
        return None

    def dst(self, moment: datetime | None) -> None:
        return None

    def tzname(self, moment: datetime | None) -> None:
        return None


@given(st.text(min_size=1))
def test_any_text_is_an_id(text: str) -> None:
    assert Account(text).id == text


def test_account_of_an_id_alone_has_nothing_else() -> None:
    account = Account("u1")

    assert account.plan is None
    assert account.created_us() is None
    assert not account.tags
    assert not account.within
    assert not account.anonymous


@given(st.datetimes(timezones=st.timezones()))
def test_creation_is_told_in_microseconds_since_1970(created_at: datetime) -> None:
    created_us = Account("u1", created_at=created_at).created_us()

    assert created_us is not None
    assert timedelta(microseconds=created_us) == created_at - datetime(1970, 1, 1, tzinfo=UTC)


def test_zone_of_the_creation_does_not_matter() -> None:
    elsewhere = WHEN.astimezone(timezone(timedelta(hours=9)))

    assert Account("u", created_at=WHEN).created_us() == (
        Account("u", created_at=elsewhere).created_us()
    )


@pytest.mark.parametrize("tags", [["a"], ("a",), {"a"}, frozenset({"a"}), {"a": 1}, [], ()])
def test_tags_are_any_collection_of_strings(tags: Any) -> None:
    assert Account("u1", tags=tags).tags == tags


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"id": ""}, "account id must not be empty"),
        ({"id": None}, "account id must be a string, got NoneType$"),
        ({"id": b"u1"}, "account id must be a string, got bytes$"),
        ({"plan": 5}, "plan must be a string or None, got int 5"),
        ({"plan": ["pro"]}, "plan must be a string or None, got list"),
        ({"created_at": "2026-11-20T18:00:00Z"}, "created_at must be a datetime or None, got str"),
        ({"created_at": WHEN.date()}, "created_at must be a datetime or None, got date"),
        ({"created_at": 0}, "created_at must be a datetime or None, got int 0"),
        ({"created_at": WHEN.replace(tzinfo=None)}, "must have a time zone, got 2026-11-20T18"),
        ({"created_at": WHEN.replace(tzinfo=NoOffset())}, "must have a time zone"),
        ({"tags": "beta"}, "tags must be a collection of strings, got str 'beta'"),
        ({"tags": None}, "tags must be a collection of strings, got NoneType None"),
        ({"tags": 5}, "tags must be a collection of strings, got int 5"),
        ({"tags": [["beta"]]}, "tags must be strings, got list"),
        ({"within": {"org": 7}}, r"within\['org'\] must be a string, got int$"),
        ({"within": {"org": ""}}, r"within\['org'\] must not be empty"),
        ({"within": None}, "within must be a mapping, got NoneType$"),
        ({"within": ["org"]}, "within must be a mapping, got list$"),
    ],
)
def test_wrong_argument_is_refused_by_name(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Account(**{"id": "u1", **arguments})


def test_messages_stay_short_for_long_values() -> None:
    with pytest.raises(UsageError) as caught:
        Account("u1", plan=["x" * 1_000_000])  # type: ignore[arg-type] # a wrong one is the point

    assert len(str(caught.value)) < 200


def test_string_of_another_class_is_an_id() -> None:
    class Id(str):
        __slots__ = ()

    assert Account(Id("u1"), within={"org": Id("o7")}).id == "u1"
    with pytest.raises(UsageError, match="must not be empty"):
        Account(Id(""))


def test_accounts_can_be_keys_whatever_they_carry() -> None:
    account = Account("u1", tags=["a"], within={"org": "o7"})

    assert {account: 1}[Account("u1", tags=["a"], within={"org": "o7"})] == 1

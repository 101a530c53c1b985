"""Keys in a store: one for each subject, bounded, and nothing an id can do about it."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.policies import with_cell, with_whens
from tieredlimit import Account, Policy, UsageError
from tieredlimit._core.keys import ADDRESS, STAND_IN, key_prefix, subject_name
from tieredlimit._core.table import Table

NAME = "n" * 32
KEY = re.compile(r"tl1:\{[a-z0-9_-]+:[0-9]+\}:[a-z0-9_-]+:[a-z0-9_-]+:[a-z0-9_-]*:[^:{}\s]+")

# Ids that look like names, escapes, digests and each other.
ids = st.text(min_size=1) | st.text(alphabet="ab/:%~=*{}@.25E7é\r\n\x00", min_size=1, max_size=90)
hostile_ids = [
    "user:tier:enterprise:x",
    "{other}:tag",
    "}{",
    "a\r\nFLUSHALL\r\n",
    "\x00",
    "~" + "0" * 32,
    "*203.0.113.9",
    "=u1",
    "%7E",
    "é" * 64,
    "a" * 64,
    "a" * 65,
    " ",
    "x" * 1_000_000,
]


def table(**quota: object) -> Table:
    document = with_cell({"rate": "5/minute", **quota}, feature=NAME)
    document["tiers"] = {NAME: document["tiers"]["everyone"]}
    return Table(Policy.from_dict(document), NAME)


OWN, ORG = table(), table(per=NAME)


def key(account: Account, of: Table = OWN) -> str:
    entry = of.entry(of.tier_of(account, 0), NAME)
    return entry.shelves[0].key(account)


@pytest.mark.fault("C1")
@given(ids, ids)
@example("a/b", "a%2Fb")
@example("~", "%7E")
@example("a" * 65, "a" * 66)
@example("é", "e\u0301")
def test_two_ids_have_two_names(one: str, other: str) -> None:
    assert (subject_name(one) == subject_name(other)) == (one == other)


@pytest.mark.fault("C1")
@given(ids, ids, ids, ids)
def test_two_pairs_of_subjects_have_two_pairs_of_keys(a: str, b: str, c: str, d: str) -> None:
    one, other = Account(a, within={NAME: b}), Account(c, within={NAME: d})

    assert ((key(one), key(one, ORG)) == (key(other), key(other, ORG))) == ((a, b) == (c, d))


@pytest.mark.fault("C1")
@given(ids, ids, ids)
def test_account_address_group_and_stand_in_never_share_a_key(a: str, b: str, c: str) -> None:
    keys = {
        key(Account(a)),
        key(Account(b, anonymous=True)),
        key(Account("x", within={NAME: c}), ORG),
        key(Account(a), ORG),
        key(Account(b, anonymous=True), ORG),
    }

    assert len(keys) == 5


def test_accounts_of_a_group_share_its_key() -> None:
    assert key(Account("a", within={NAME: "o7"}), ORG) == key(
        Account("b", within={NAME: "o7"}), ORG
    )


def test_account_outside_of_any_group_stands_alone() -> None:
    assert key(Account("a"), ORG) != key(Account("b"), ORG)
    assert key(Account("a", within={"team": "o7"}), ORG) == key(Account("a"), ORG)


@pytest.mark.fault("C2")
@given(ids, st.sampled_from(["", ADDRESS, STAND_IN, STAND_IN + ADDRESS]))
def test_name_is_short_printable_and_has_no_braces(subject: str, mark: str) -> None:
    name = subject_name(subject, mark)

    assert re.fullmatch(r"=?\*?(~[0-9a-f]{32}|[A-Za-z0-9_.@%-]{1,64})", name, re.ASCII)


@pytest.mark.fault("C2")
@pytest.mark.parametrize("hostile", hostile_ids, ids=lambda text: repr(text[:20]))
@pytest.mark.parametrize("of", [OWN, ORG], ids=["account", "group"])
@pytest.mark.parametrize("anonymous", [False, True])
def test_no_id_alters_tier_slot_or_protocol(hostile: str, of: Table, anonymous: bool) -> None:
    account = Account(hostile, anonymous=anonymous)
    grouped = Account("x", within={NAME: hostile}, anonymous=anonymous)

    for made in (key(account, of), key(grouped, of)):
        per = NAME if of is ORG else ""
        assert made.startswith(f"tl1:{{{NAME}:0}}:{NAME}:{NAME}:{per}:")
        assert KEY.fullmatch(made)
        assert len(made.encode()) < 256


@pytest.mark.fault("C2")
@pytest.mark.parametrize("hostile", hostile_ids, ids=lambda text: repr(text[:20]))
def test_no_id_chooses_its_tier(hostile: str) -> None:
    tiers = Table(Policy.from_dict(with_whens(enterprise={"plan": "enterprise"})), NAME)

    assert tiers.tier_of(Account(hostile, plan="free"), 0) == "everyone"
    assert tiers.tier_of(Account(hostile, plan="enterprise"), 0) == "enterprise"


def test_numbers_of_a_quota_are_not_in_its_key() -> None:
    account = Account("u1")

    assert key(account, table(rate="6/minute", capacity=9)) == key(account, table())


@pytest.mark.fault("C2")
def test_longest_key_of_the_largest_shard_is_under_256_bytes() -> None:
    prefix = key_prefix(NAME, 10**9, NAME, NAME, NAME)

    assert len(prefix + subject_name("a" * 64, STAND_IN + ADDRESS)) < 256


@pytest.mark.fault("C2")
@pytest.mark.parametrize("surrogate", ["\ud800", "a\udfffb", "x" * 1_000_000 + "\ud800"])
def test_lone_surrogate_is_an_error_and_not_another_id(surrogate: str) -> None:
    with pytest.raises(UsageError, match="holds a lone surrogate at ") as caught:
        subject_name(surrogate)

    assert len(str(caught.value)) < 200
    with pytest.raises(UsageError, match="holds a lone surrogate at "):
        key(Account(surrogate))


def test_plain_ids_stay_readable() -> None:
    assert subject_name("user-1_a.b@c") == "user-1_a.b@c"
    assert subject_name("org/7") == "org%2F7"


@pytest.mark.parametrize("plain", ["namespace", "shard", "feature", "tier", "per"])
def test_every_part_of_the_prefix_tells_buckets_apart(plain: str) -> None:
    parts = {"namespace": "n", "shard": 0, "feature": "f", "tier": "t", "per": "p"}
    changed = {**parts, plain: 1 if plain == "shard" else "x"}

    assert key_prefix(**parts) != key_prefix(**changed)  # type: ignore[arg-type] # by name

"""Loading a policy: what it says, and every way in which a document can be wrong."""

from __future__ import annotations

from datetime import datetime
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.policies import EVERY_WORD, EXAMPLE, SMALLEST, valid_documents, with_cell, with_whens
from tieredlimit import Account, Policy, PolicyError
from tieredlimit._core.quota import Quota
from tieredlimit._core.reading import spell
from tieredlimit._core.table import Table

BASE = """
order = ["pro", "everyone"]
[features.image]
routes = ["POST /v1/images"]
[defaults]
quotas.image = "5/minute"
[tiers.pro]
when = { plan = "pro", tags = "beta" }
quotas.image = { rate = "20/minute", capacity = 5 }
[tiers.everyone]
messages.image = { en = "No.", fr = "Non." }
"""


def faults(document: Any) -> dict[str, str]:
    """Return the message of every fault by its place."""
    with pytest.raises(PolicyError) as caught:
        Policy.from_dict(document)
    found = {fault.path: fault.message for fault in caught.value.faults}
    assert len(found) == len(caught.value.faults)
    return found


def cell_faults(cell: object) -> dict[str, str]:
    prefix = "tiers.everyone.quotas.image"
    return {path.removeprefix(prefix): told for path, told in faults(with_cell(cell)).items()}


def quotas(cell: object, feature: str = "image") -> tuple[Quota, ...]:
    return Policy.from_dict(with_cell(cell, feature=feature)).cell("everyone", feature).quotas


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


# --- What a policy says


@pytest.mark.parametrize("name", valid_documents())
def test_valid_document_is_read(name: str) -> None:
    document = valid_documents()[name]

    policy = Policy.from_dict(document)

    assert [tier.name for tier in policy.tiers] == document.get("order", ["everyone"])
    for tier in policy.tiers:
        assert list(tier.cells) == list(document["features"])
    assert document == valid_documents()[name]


def test_example_has_the_cells_that_it_shows() -> None:
    policy = Policy.load(EXAMPLE)

    spelled = {tier.name: [cell.spell() for cell in tier.cells.values()] for tier in policy.tiers}
    assert spelled == {
        "new": ["5/minute + 50/day", "0"],
        "pro": ["unlimited", "200/day cap 20 + 5000/day per org"],
        "free": ["20/minute", "10/day cap 2"],
        "everyone": ["2/minute", "0"],
    }
    assert [fault.path for fault in policy.warnings] == ["tiers.free.quotas.video"]


def test_zero_and_unlimited_are_two_things() -> None:
    policy = Policy.from_dict(EVERY_WORD)

    zero, unlimited = policy.cell("new", "video"), policy.cell("new", "by-code")
    assert (zero.zero, zero.unlimited) == (True, False)
    assert (unlimited.zero, unlimited.unlimited) == (False, True)


def test_cell_of_an_unknown_tier_or_feature_is_a_key_error() -> None:
    policy = Policy.from_dict(SMALLEST)

    with pytest.raises(KeyError, match="gold"):
        policy.cell("gold", "image")
    with pytest.raises(KeyError, match="video"):
        policy.cell("everyone", "video")


@pytest.mark.parametrize(
    ("feature", "cell", "names"),
    [
        ("image", "5/minute", ["image-minute"]),
        ("image", "5/2 hours", ["image-2-hours"]),
        ("image", "5/1 hours", ["image-hour"]),
        ("image", {"rate": "5/MINUTES"}, ["image-minute"]),
        ("video", {"rate": "5/day", "per": "org"}, ["video-day-org"]),
        ("video", {"rate": "5/2 weeks", "name": "mine", "per": "org"}, ["mine"]),
        ("image", ["5/minute", "50/day"], ["image-minute", "image-day"]),
    ],
)
def test_name_of_a_quota_is_feature_period_and_subject(
    feature: str, cell: object, names: list[str]
) -> None:
    assert [quota.name for quota in quotas(cell, feature)] == names


def test_extended_tier_gives_what_is_not_said() -> None:
    policy = Policy.from_dict(EVERY_WORD)

    plus = {name: cell.spell() for name, cell in next(
        tier for tier in policy.tiers if tier.name == "plus").cells.items()}  # fmt: skip
    assert plus == {"image": "unlimited", "video": "9/hour", "by-code": "unlimited"}
    assert policy.cell("plus", "video").messages == {"": "Come back tomorrow."}
    assert policy.cell("new", "video").messages == {"en": "No.", "pt-BR": "Não."}
    assert policy.cell("plus", "by-code").messages == {}


def test_nearest_of_a_chain_of_extended_tiers_wins() -> None:
    document = with_whens(a={"plan": "a"}, b={"plan": "b"}, c={"plan": "c"})
    tiers = document["tiers"]
    tiers["a"] |= {"extends": "b"}
    tiers["b"] |= {"extends": "c", "quotas": {"image": "6/minute"}}
    tiers["c"] |= {"quotas": {"image": "7/minute"}, "messages": {"image": "Hm."}}

    cell = Policy.from_dict(document).cell("a", "image")

    assert cell.spell() == "6/minute"
    assert cell.messages == {"": "Hm."}


def test_order_is_the_order_of_the_tiers_and_one_tier_needs_none() -> None:
    document = with_whens(a={"plan": "a"}, b={"plan": "b"})
    document["order"] = ["b", "a", "everyone"]

    assert [tier.name for tier in Policy.from_dict(document).tiers] == ["b", "a", "everyone"]
    assert [tier.name for tier in Policy.from_dict(SMALLEST).tiers] == ["everyone"]


def test_when_is_read_word_by_word() -> None:
    policy = Policy.from_dict(EVERY_WORD)

    whens = {tier.name: tier.when for tier in policy.tiers}
    assert whens["everyone"] is None
    old, tagged = whens["old"], whens["tagged"]
    assert old is not None
    assert old.words() == ["account_age_above", "created_before", "created_after"]
    assert tagged is not None
    assert tagged.tags == frozenset({"beta", "press"})
    assert tagged.anonymous is False


# --- Warnings


def test_cost_that_never_fits_is_a_warning_at_the_cell_that_says_so() -> None:
    document = with_whens(a={"plan": "a"}, b={"plan": "b"})
    document["features"]["image"]["routes"] = {"POST /a": 2, "POST /b": 8, "POST /c": 5}
    document["tiers"]["a"]["quotas"] = {"image": ["9/minute", {"rate": "90/day", "capacity": 7}]}
    document["tiers"]["b"]["quotas"] = {"image": "unlimited"}

    warnings = Policy.from_dict(document).warnings

    assert [str(warning) for warning in warnings] == [
        'defaults.quotas.image: "POST /b" costs 8, never fits a capacity of 5',
        'tiers.a.quotas.image: "POST /b" costs 8, never fits a capacity of 7',
    ]


def test_rounding_by_more_than_a_thousandth_is_a_warning_at_the_rate() -> None:
    policy = Policy.from_dict(with_cell(["5/minute", {"rate": "29500/second"}]))

    (warning,) = policy.warnings
    assert warning.path == "tiers.everyone.quotas.image[1].rate"
    assert warning.message.startswith('"29500/second" is 0.30% off once rounded')


# --- Faults: the document


@pytest.mark.parametrize("document", [None, 5, [], "x", True])
def test_document_that_is_no_table_is_refused(document: object) -> None:
    assert faults(document) == {"": f"must be a table, got {spell(document)}"}


@pytest.mark.fault("D3")
@pytest.mark.parametrize("empty", [{}, {"features": {}, "tiers": {}}])
def test_empty_policy_is_refused(empty: dict[str, Any]) -> None:
    told = "is empty: a policy without any would let everything in"

    assert faults(empty) == {"features": told, "tiers": told}


@pytest.mark.fault("D3")
def test_tier_without_a_cell_is_refused_and_not_unlimited() -> None:
    told = 'is missing; give a quota, 0 or "unlimited", here or under [defaults]'

    assert faults({**SMALLEST, "tiers": {"everyone": {}}}) == {"tiers.everyone.quotas.image": told}


@pytest.mark.fault("D3")
def test_empty_list_of_quotas_is_refused() -> None:
    assert cell_faults([]) == {"": 'an empty list limits nothing; write 0 or "unlimited"'}


def test_one_error_lists_every_fault() -> None:
    document = {
        "ordr": [],
        "order": ["new", "fre"],
        "pools": {"gpu": {"rate": "5/mont", "leave": {"fre": 5}}},
        "features": {
            "image": {"routes": ["POST v1", "POST /v1"], "outages": "deny", "refund_on": [200]},
            "Video": {"routes": 5, "outage": "block", "pool": {}},
        },
        "defaults": {"quota": {}, "messages": {"image": ""}},
        "tiers": {
            "new": {"when": {"plan": []}, "quotas": {"imge": 0, "image": "5/mintue"}},
            "free": {"extends": "fre", "quotas": {"image": 5, "Video": "unlimited"}},
        },
    }

    assert faults(document).keys() == {
        "ordr", "pools.gpu.rate", "pools.gpu.leave.fre", "order", "order[1]",
        "features.image.routes[0]", "features.image.outages", "features.image.refund_on[0]",
        "features.Video", "features.Video.routes", "features.Video.outage",
        "features.Video.pool.rate",
        "defaults.quota", "defaults.messages.image",
        "tiers.new.when.plan", "tiers.new.quotas.imge", "tiers.new.quotas.image",
        "tiers.new.quotas.Video", "tiers.free.extends", "tiers.free.quotas.image",
    }  # fmt: skip


def test_error_names_its_source_and_counts_its_faults() -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.from_dict({}, source="the document")
    assert str(caught.value).startswith("the document: 2 faults\n  features: is empty")

    with pytest.raises(PolicyError, match=r"^policy: 1 fault\n  pools: must be a table, got 5$"):
        Policy.from_dict({**SMALLEST, "pools": 5})


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("feature", 'unknown key "feature"; did you mean "features"?'),
        ("ORDER", 'unknown key "ORDER"; did you mean "order"?'),
        ("zzz", 'unknown key "zzz"'),
        ("z" * 200, f'unknown key "{"z" * 77}..."'),
    ],
)
def test_unknown_key_is_a_fault_with_the_nearest(key: str, told: str) -> None:
    assert list(faults({**SMALLEST, key: 1}).values()) == [told]


def test_key_that_toml_would_quote_is_quoted_in_the_place() -> None:
    assert list(faults({**SMALLEST, "a b": 1, "x\x1b": 1, 7: 1, "": 1})) == [
        '"a b"', '"x\\u001b"', "7", '""',
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["Image", "a" * 33, "", "a.b", "é", "a b", "image\n"])
@pytest.mark.parametrize("kind", ["features", "tiers"])
def test_name_is_1_to_32_of_few_characters(name: str, kind: str) -> None:
    document: dict[str, Any] = {"features": {"f": {}}, "tiers": {"t": {"quotas": {"f": 0}}}}
    (entry,) = document[kind].values()
    document[kind] = {name: entry}
    if kind == "features":
        document["tiers"]["t"]["quotas"] = {name: 0}

    (told,) = faults(document).values()

    assert told == f"got {spell(name)}; a name is 1 to 32 of a-z, 0-9, _ and -"


# --- Faults: features and routes


def test_route_that_is_none_is_named_with_its_place() -> None:
    found = faults(with_cell(0, routes=["POST /a", "post /b", 7, "POST c"]))

    assert [path.removeprefix("features.image.") for path in found] == [
        "routes[1]", "routes[2]", "routes[3]",
    ]  # fmt: skip
    assert found["features.image.routes[2]"] == 'must be a route such as "POST /v1/images", got 7'


@pytest.mark.parametrize(
    "cost", [0, -1, 1.5, True, "1", None, 1_000_000_001, pytest.param(10**5_000, id="huge")]
)
def test_cost_of_a_route_is_a_whole_number_from_1(cost: object) -> None:
    assert faults(with_cell(0, routes={"POST /a": cost})) == {
        'features.image.routes."POST /a"': (
            f"must be a whole number from 1 to 1,000,000,000, got {spell(cost)}"
        )
    }


def test_routes_that_clash_are_faults_naming_both() -> None:
    document = {
        "features": {
            "a": {"routes": ["POST /x/{id}", "GET /y", "GET /y"]},
            "b": {"routes": {"POST|PUT /x/{other}": 2, "HEAD /y": 1, "DELETE /x/{id}": 1}},
        },
        "tiers": {"everyone": {"quotas": {"a": 0, "b": 0}}},
    }

    assert faults(document) == {
        'features.b.routes."POST|PUT /x/{other}"': (
            '"POST|PUT /x/{other}" matches requests that features.a.routes[0] matches, '
            '"POST /x/{id}"'
        ),
        "features.a.routes[2]": (
            '"GET /y" matches requests that features.a.routes[1] matches, "GET /y"'
        ),
        'features.b.routes."HEAD /y"': (
            '"HEAD /y" matches requests that features.a.routes[1] matches, "GET /y"'
        ),
    }


def test_many_equal_routes_are_one_fault_each() -> None:
    assert len(faults(with_cell(0, routes=["GET /y"] * 50))) == 49


def test_share_of_an_outage_is_a_tenth_unless_said() -> None:
    document = with_cell("5/day")
    document["features"]["image"]["outage"] = "local"
    unsaid = Policy.from_dict(document).features["image"]
    document["features"]["image"]["outage_share"] = "2.5%"

    said = Policy.from_dict(document).features["image"]

    assert (unsaid.outage, unsaid.outage_share) == ("local", Fraction(1, 10))
    assert said.outage_share == Fraction(1, 40)


@pytest.mark.parametrize("share", ["0%", "101%", "10", 0.1, "-1%", "", None, ["10%"], "1e1%"])
def test_wrong_share_of_an_outage_is_a_fault(share: object) -> None:
    document = with_cell("5/day")
    document["features"]["image"] |= {"outage": "local", "outage_share": share}

    (told,) = faults(document).values()

    assert told.startswith('must be a share above 0% such as "10%", got ')


def test_share_without_local_is_a_fault() -> None:
    document = with_cell("5/day")
    document["features"]["image"] |= {"outage": "deny", "outage_share": "10%"}

    assert faults(document) == {
        "features.image.outage_share": 'only outage = "local" gives out a share'
    }


def test_feature_without_routes_is_for_code_that_asks_for_it() -> None:
    assert Policy.from_dict(with_cell(0, routes=[])).features["image"].routes == ()


@pytest.mark.parametrize(
    ("outage", "told"),
    [
        ("alow", 'must be one of allow, deny, local, got "alow"; did you mean "allow"?'),
        (True, "must be one of allow, deny, local, got true"),
        (["deny"], "must be one of allow, deny, local, got a list"),
    ],
)
def test_outage_is_allow_deny_or_local(outage: object, told: str) -> None:
    document = with_cell(0)
    document["features"]["image"]["outage"] = outage

    assert faults(document) == {"features.image.outage": told}


# --- Faults: cells and messages


@pytest.mark.parametrize(
    ("cell", "path", "told"),
    [
        (5, "", 'got 5; write a rate such as "5/minute", a table, 0 or "unlimited"'),
        (-1, "", "got -1; write a rate"),
        (False, "", "got false; write a rate"),
        (0.0, "", "got 0.0; write a rate"),
        (None, "", "got nothing; write a rate"),
        ("5/minuet", "", 'got "5/minuet"; write a rate such as "5/minute" or "10/2 hours"; did'),
        ("UNLIMITED", "", 'did you mean "unlimited"?'),
        (["5/minute", 0], "[1]", "0 is a whole cell: it cannot stand among quotas"),
        (["unlimited"], "[0]", '"unlimited" is a whole cell'),
        ([["5/minute"]], "[0]", "got a list; write a rate"),
        ({}, ".rate", 'is missing; write a rate such as "5/minute"'),
        ({"rate": 0}, ".rate", "0 is a whole cell: it cannot stand in a quota"),
        ({"rate": 7}, ".rate", 'got 7; write a rate such as "5/minute"'),
        ({"rate": "5/month"}, ".rate", "write 30 days"),
        ({"rate": "5/day", "capacity": 0}, ".capacity", "from 1 to 1,000,000,000, got 0"),
        ({"rate": "5/day", "capacity": None}, ".capacity", "got nothing"),
        ({"rate": "5/day", "capacity": 1.0}, ".capacity", "got 1.0"),
        ({"rate": "5/day", "capacity": 10**5_000}, ".capacity", "more than 30 digits"),
        ({"rate": "5/day", "capacity": 18_251}, ".rate", "a capacity of 18,250"),
        ({"rate": "5/day", "per": "Org"}, ".per", 'got "Org"; a name is'),
        ({"rate": "5/day", "name": 7}, ".name", "got 7; a name is"),
        ({"rate": "5/day", "burst": 7}, ".burst", 'unknown key "burst"'),
        ({"rat": "5/day", "rate": "5/day"}, ".rat", 'did you mean "rate"?'),
        (["5/minute"] * 17, "", "at most 16 quotas in a cell, got 17"),
        (["5/minute", "6/minute"], "[1].name", '"image-minute" is taken by'),
    ],
)
def test_wrong_cell_is_told_with_place_value_and_bound(cell: object, path: str, told: str) -> None:
    found = cell_faults(cell)

    assert list(found) == [path]
    assert told in found[path]


def test_every_fault_of_a_quota_is_told_at_once() -> None:
    assert cell_faults([{"rate": "5/mont", "capacity": 0, "per": ""}, "x"]).keys() == {
        "[0].rate", "[0].capacity", "[0].per", "[1]",
    }  # fmt: skip


def test_names_with_one_tag_in_the_store_are_refused() -> None:
    seen: dict[bytes, str] = {}
    for i in count():
        name = f"q{i}"
        other = seen.setdefault(Quota(name, "", 1, 1).tag, name)
        if other != name:
            break

    rates = [{"rate": "5/minute", "name": name} for name in (other, name)]

    assert cell_faults(rates) == {
        "[1].name": f'"{name}" is taken by tiers.everyone.quotas.image[0]; '
        "give one of them another name"
    }


@pytest.mark.parametrize(
    ("message", "path", "told"),
    [
        ("", "", 'must be a text, got ""'),
        (" \n", "", 'must be a text, got " \\n"'),
        (5, "", "must be a text, got 5"),
        ("x" * 1_001, "", "must be at most 1,000 characters, got 1,001"),
        ("a\ud800", "", 'holds a lone surrogate, which no response can: "a\\ud800"'),
        ({}, "", "must hold a text, got an empty table"),
        ({"en": []}, ".en", "must be a text, got an empty list"),
        ({"": "x"}, '.""', '"" is no language tag; write one such as "en"'),
        ({"en_GB": "x"}, ".en_GB", '"en_GB" is no language tag'),
        ({5: "x"}, ".5", "5 is no language tag"),
        ({"en": "x", "EN": "y"}, ".EN", '"EN" is there twice: case does not count'),
    ],
)
def test_wrong_message_is_told_with_place_value_and_bound(
    message: object, path: str, told: str
) -> None:
    found = faults({**SMALLEST, "defaults": {"messages": {"image": message}}})

    assert list(found) == [f"defaults.messages.image{path}"]
    assert told in next(iter(found.values()))


@pytest.mark.parametrize("kind", ["quotas", "messages"])
@pytest.mark.parametrize("place", ["defaults", "tiers.everyone"])
def test_what_is_no_feature_is_a_fault_with_the_nearest(kind: str, place: str) -> None:
    row: dict[str, Any] = {kind: {"imag": "x", 7: "x"}}
    tier = {"quotas": {"image": 0}}
    document: dict[str, Any] = {**SMALLEST, "tiers": {"everyone": tier}}
    if place == "defaults":
        document["defaults"] = row
    else:
        tier[kind] = {"image": 0, **row[kind]} if kind == "quotas" else row[kind]

    assert faults(document) == {
        f"{place}.{kind}.imag": 'unknown feature "imag"; did you mean "image"?',
        f"{place}.{kind}.7": "unknown feature 7",
    }


def test_fault_of_a_default_cell_is_told_once() -> None:
    document = with_whens(a={"plan": "a"}, b={"plan": "b"})
    document["defaults"]["quotas"]["image"] = "x"

    assert list(faults(document)) == ["defaults.quotas.image"]


# --- Faults: tiers


def test_circles_of_extended_tiers_are_faults_and_ways_into_them_are_not() -> None:
    document = with_whens(**{name: {"plan": name} for name in "abcd"})
    for name, above in {"a": "b", "b": "c", "c": "b", "d": "d"}.items():
        document["tiers"][name]["extends"] = above

    assert faults(document) == {
        "tiers.b.extends": "goes round in a circle: b -> c -> b",
        "tiers.c.extends": "goes round in a circle: c -> b -> c",
        "tiers.d.extends": "goes round in a circle: d -> d",
    }


@pytest.mark.parametrize(
    ("extends", "told"),
    [
        ("evryone", 'must be one of a, everyone, got "evryone"; did you mean "everyone"?'),
        (["everyone"], "must be one of a, everyone, got a list"),
    ],
)
def test_extended_tier_must_be_there(extends: object, told: str) -> None:
    document = with_whens(a={"plan": "a"})
    document["tiers"]["a"]["extends"] = extends

    assert faults(document) == {"tiers.a.extends": told}


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (None, {"order": "must be a list of tier names, got nothing"}),
        ("a", {"order": 'must be a list of tier names, got "a"'}),
        (["everyone"], {"order": 'leaves out the tier "a"'}),
        (["a", "everyone", "a"], {"order[2]": '"a" stands at order[0] already'}),
        (["a", ["everyone"], "everyone"], {"order[1]": "must be the name of a tier, got a list"}),
        (["a", "everyon", "everyone"],
         {"order[1]": 'unknown tier "everyon"; did you mean "everyone"?'}),
    ],
)  # fmt: skip
def test_order_names_every_tier_once(order: object, expected: dict[str, str]) -> None:
    document = with_whens(a={"plan": "a"})
    document["order"] = order

    with pytest.raises(PolicyError) as caught:
        Policy.from_dict(document)

    assert expected.items() <= {fault.path: fault.message for fault in caught.value.faults}.items()


def test_several_tiers_need_an_order() -> None:
    document = with_whens(a={"plan": "a"})
    del document["order"]

    assert faults(document) == {"order": "is missing; name the 2 tiers, first match first"}


def test_empty_order_leaves_out_every_tier() -> None:
    document = with_whens(a={"plan": "a"})
    document["order"] = []

    with pytest.raises(PolicyError) as caught:
        Policy.from_dict(document)

    assert [str(fault) for fault in caught.value.faults] == [
        'order: leaves out the tier "a"',
        'order: leaves out the tier "everyone"',
    ]


@pytest.mark.parametrize(
    ("word", "value", "path", "told"),
    [
        ("plan", 5, "", "must be a string or a list of strings, got 5"),
        ("plan", "", "", 'must be a string or a list of strings, got ""'),
        ("plan", [], "", "must be a string or a list of strings, got an empty list"),
        ("plan", ["a", ["b"]], "[1]", "must be a string, got a list"),
        ("tags", ["a", "", None], "[1]", 'must be a string, got ""'),
        ("account_age_below", "7 das", "", 'got "7 das"; write a duration'),
        ("account_age_below", "101 years", "", "write a duration"),
        ("account_age_above", 7, "", "got 7; write a duration"),
        ("created_after", "18:00", "", 'got "18:00"; write an instant with a zone'),
        ("created_before", datetime(2026, 1, 1), "", "got 2026-01-01T00:00:00; write an instant"),  # noqa: DTZ001 -- without a zone
        ("anonymous", "yes", "", 'must be true or false, got "yes"'),
        ("anonymous", 1, "", "must be true or false, got 1"),
        ("plans", "a", "", 'unknown key "plans"; did you mean "plan"?'),
    ],
)
def test_wrong_word_of_a_when_is_told_with_its_place(
    word: str, value: object, path: str, told: str
) -> None:
    found = faults(with_whens(a={word: value}))

    assert told in found[f"tiers.a.when.{word}{path}"]


@pytest.mark.parametrize("when", [5, None, [], "plan"])
def test_when_must_be_a_table(when: object) -> None:
    assert faults(with_whens(a=when)) == {"tiers.a.when": f"must be a table, got {spell(when)}"}


def test_empty_when_is_refused() -> None:
    assert faults(with_whens(a={}))["tiers.a.when"].startswith("is empty; leave it out")


@pytest.mark.parametrize(
    ("when", "told"),
    [
        (
            {"account_age_below": "7 days", "account_age_above": "168 hours"},
            "account_age_above (7 days) must be below account_age_below (7 days)",
        ),
        (
            {"created_after": "2026-01-01T00:00:00Z", "created_before": "2026-01-01T00:00:00Z"},
            (
                "created_after (2026-01-01T00:00:00Z) must be before "
                "created_before (2026-01-01T00:00:00Z)"
            ),
        ),
    ],
)
def test_when_that_matches_nobody_is_refused(when: object, told: str) -> None:
    assert faults(with_whens(a=when)) == {"tiers.a.when": f"matches nobody: {told}"}


def test_last_tier_with_a_when_is_refused() -> None:
    document = with_whens(a={"plan": "a"})
    document["tiers"]["everyone"]["when"] = {"plan": "b"}

    assert faults(document) == {
        "tiers.everyone.when": "the last tier takes everybody else: it has no `when`"
    }


def test_only_tier_with_a_when_is_refused() -> None:
    document = {**SMALLEST, "tiers": {"t": {"when": {"plan": "a"}, "quotas": {"image": 0}}}}

    assert list(faults(document)) == ["tiers.t.when"]


def test_tier_without_a_when_before_the_last_is_refused() -> None:
    document = with_whens(a={"plan": "a"}, b={"plan": "b"})
    del document["tiers"]["a"]["when"]

    assert faults(document) == {"tiers.a": "has no `when`: no account reaches the tiers after it"}


@pytest.mark.parametrize(
    ("before", "when", "takers"),
    [
        ([{"plan": "free"}], {"plan": "free"}, "t0"),
        ([{"plan": ["free", "pro"]}], {"plan": "pro", "tags": "beta"}, "t0"),
        ([{"plan": "free"}, {"plan": "pro"}], {"plan": ["pro", "free"]}, "t0, t1"),
        ([{"account_age_below": "7 days"}], {"account_age_below": "6 days"}, "t0"),
        ([{"anonymous": True}, {"anonymous": False}], {"plan": "free"}, "t0, t1"),
        ([{"plan": "free"}, {"anonymous": True}, {"plan": "pro"}], {"plan": ["free", "pro"],
          "anonymous": True}, "t0, t1"),
        ([{"account_age_below": "7 days"}, {"account_age_above": "7 days"}], {"plan": "pro"},
          "t0, t1"),
        ([{"account_age_above": "2 days"}, {"account_age_below": "3 days"}], {"tags": "beta"},
          "t0, t1"),
        ([{"created_before": "2026-01-01T00:00:00Z"}, {"created_after": "2026-01-01T00:00:00Z",
           "account_age_below": "9 days"}, {"account_age_above": "9 days"}], {"plan": "pro"},
          "t0, t1, t2"),
        ([{"account_age_above": "1 day", "account_age_below": "2 days"},
          {"account_age_above": "2 days", "account_age_below": "3 days"}],
         {"account_age_above": "1 day", "account_age_below": "3 days"}, "t0, t1"),
    ],
)  # fmt: skip
def test_tier_that_no_account_reaches_is_refused(
    before: list[object], when: object, takers: str
) -> None:
    document = with_whens(**{f"t{i}": earlier for i, earlier in enumerate(before)}, late=when)

    assert faults(document) == {
        "tiers.late": f"is unreachable: every account it wants is taken by {takers}"
    }


@pytest.mark.parametrize(
    ("before", "when"),
    [
        ([{"plan": "free"}], {"plan": ["free", "pro"]}),
        ([{"plan": "free", "tags": "beta"}], {"plan": "free"}),
        ([{"account_age_below": "6 days"}], {"account_age_below": "7 days"}),
        ([{"anonymous": True}], {"plan": "free"}),
        ([{"plan": "free"}, {"plan": "pro"}], {"anonymous": False}),
        ([{"account_age_below": "7 days"}, {"account_age_above": "8 days"}], {"plan": "pro"}),
        (
            [{"account_age_below": "7 days"}, {"account_age_above": "7 days", "plan": "free"}],
            {"tags": "beta"},
        ),
        (
            [{"created_before": "2026-01-01T00:00:00Z"}, {"account_age_above": "7 days"}],
            {"plan": "x"},
        ),
        ([{"account_age_below": "2 days"}], {"account_age_above": "2 days"}),
    ],
)
def test_tier_that_some_account_reaches_is_read(before: list[object], when: object) -> None:
    document = with_whens(**{f"t{i}": earlier for i, earlier in enumerate(before)}, late=when)

    assert Policy.from_dict(document).tiers[-2].name == "late"


def test_tier_with_a_faulty_when_stands_in_nobodys_way() -> None:
    document = with_whens(
        a={"plan": 5}, b={"plan": "b"}, c={"plan": "b"}, d={"plan": "d", "account_age_below": "x"}
    )

    assert faults(document).keys() == {
        "tiers.a.when.plan", "tiers.c", "tiers.d.when.account_age_below",
    }  # fmt: skip


# --- Files


def test_file_is_read_and_named_in_errors(tmp_path: Path) -> None:
    path = write(tmp_path, "policy.toml", "order = 5\n[features.image]\n")

    with pytest.raises(PolicyError) as caught:
        Policy.load(path)

    assert caught.value.source == str(path)
    assert [fault.message for fault in caught.value.faults] == [
        "is empty: a policy without any would let everything in",
        "must be a list of tier names, got 5",
    ]


def test_byte_order_mark_and_carriage_returns_are_read(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes(b"\xef\xbb\xbf" + BASE.replace("\n", "\r\n").encode())

    assert Policy.load(str(path)) == Policy.load(write(tmp_path, "plain.toml", BASE))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"order = [", "is not TOML: "),
        (b"x = " + b"[" * 100_000, "is not TOML: "),
        (b"x = " + b"9" * 5_000, "is not TOML: "),
        (b"x = 2026-13-45T00:00:00Z", "is not TOML: "),
        (b"order = 'caf\xe9'", "is not UTF-8 at byte 12"),
    ],
)
def test_file_that_cannot_be_understood_is_a_policy_error(
    tmp_path: Path, content: bytes, told: str
) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes(content)

    with pytest.raises(PolicyError) as caught:
        Policy.load(path)

    assert str(caught.value).startswith(f"{path}: 1 fault\n  {told}")


@pytest.mark.parametrize("name", ["missing.toml", "", "a\0b"])
def test_file_that_cannot_be_read_is_a_policy_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(PolicyError, match="cannot be read: "):
        Policy.load(str(tmp_path / name))


def test_no_file_is_a_policy_error() -> None:
    with pytest.raises(PolicyError, match="no file given"):
        Policy.load()


def test_overlay_merges_tables_and_replaces_what_only_makes_sense_whole(tmp_path: Path) -> None:
    base = write(tmp_path, "base.toml", BASE)
    above = write(
        tmp_path,
        "prod.toml",
        """
        order = ["pro", "team", "everyone"]
        [features.image]
        routes = { "PUT /v1/images" = 3 }
        [features.video]
        [defaults]
        quotas.video = 0
        [tiers.pro]
        when = { plan = "pro" }
        quotas.image = { rate = "30/minute" }
        [tiers.team]
        when.plan = "team"
        [tiers.everyone]
        messages.image = { de = "Nein." }
        """,
    )

    policy = Policy.load(base, above)

    assert [(str(route), cost) for route, cost in policy.features["image"].routes] == [
        ("PUT /v1/images", 3)
    ]
    assert [tier.name for tier in policy.tiers] == ["pro", "team", "everyone"]
    assert policy.tiers[0].when is not None
    assert policy.tiers[0].when.words() == ["plan"]
    assert policy.cell("pro", "image").spell() == "30/minute"
    assert policy.cell("everyone", "image").spell() == "5/minute"
    assert policy.cell("everyone", "image").messages == {"de": "Nein."}
    assert policy.cell("team", "video").zero


@pytest.mark.parametrize("name", ["when", "routes", "pool", "quotas", "messages", "features"])
def test_overlay_merges_tiers_and_features_whatever_their_names(tmp_path: Path, name: str) -> None:
    base = write(
        tmp_path,
        "base.toml",
        f"""
        [features.{name}]
        routes = ["GET /a"]
        [tiers.{name}]
        quotas.{name} = "5/minute"
        messages.{name} = "No."
        """,
    )
    above = write(
        tmp_path,
        "prod.toml",
        f"""
        [features.{name}]
        outage = "deny"
        [tiers.{name}]
        quotas.{name} = "6/minute"
        """,
    )

    policy = Policy.load(base, above)

    assert len(policy.features[name].routes) == 1
    assert policy.features[name].outage == "deny"
    assert policy.cell(name, name).spell() == "6/minute"
    assert policy.cell(name, name).messages == {"": "No."}


def test_faults_of_several_files_say_which_one_they_are_in(tmp_path: Path) -> None:
    base = str(write(tmp_path, "base.toml", BASE + '"a.b" = 1\n[features."video.hd"]\noutage = 1'))
    above = str(
        write(
            tmp_path,
            "prod.toml",
            """
            order = ["pro", "everyone"]
            [features.image]
            outage = "none"
            routes = ["GET /v1.0/x", "GET v1.0"]
            [tiers.pro]
            quotas.image = [{ rate = "5/minute" }, { capacity = 5 }]
            when.tags = [5]
            """,
        )
    )

    with pytest.raises(PolicyError) as caught:
        Policy.load(base, above)

    assert caught.value.source == f"{base} + {above}"
    files = {}
    for fault in caught.value.faults:
        assert fault.message.endswith(")")
        files[fault.path] = fault.message[:-1].rpartition("(")[2]
    assert files == {
        'features."video.hd"': base,
        'features."video.hd".outage': base,
        "features.image.outage": above,
        "features.image.routes[1]": above,
        "tiers.pro.quotas.image[1].rate": above,
        "tiers.pro.when.tags[0]": above,
        'tiers.everyone."a.b"': base,
        'tiers.pro.quotas."video.hd"': above,
        'tiers.everyone.quotas."video.hd"': base,
    }


def test_fault_that_no_file_holds_names_none(tmp_path: Path) -> None:
    base = write(tmp_path, "base.toml", BASE.replace("order", "# order"))
    above = write(tmp_path, "prod.toml", "")

    with pytest.raises(PolicyError) as caught:
        Policy.load(base, above)

    assert [str(fault) for fault in caught.value.faults] == [
        "order: is missing; name the 2 tiers, first match first"
    ]


def test_warnings_of_several_files_say_which_one_they_are_in(tmp_path: Path) -> None:
    base = write(tmp_path, "base.toml", BASE)
    above = write(tmp_path, "prod.toml", '[features.image]\nroutes = { "POST /x" = 9 }')

    warnings = Policy.load(base, above).warnings

    assert [warning.path for warning in warnings] == [
        "defaults.quotas.image",
        "tiers.pro.quotas.image",
    ]
    assert all(warning.message.endswith(f" ({base})") for warning in warnings)


def test_deep_tables_of_two_files_end_no_stack(tmp_path: Path) -> None:
    deep = ".".join(["x"] * 5_000)
    paths = [write(tmp_path, f"{i}.toml", f"{deep} = 1\ntiers.{deep} = 1") for i in range(2)]

    with pytest.raises(PolicyError, match='unknown key "x"'):
        Policy.load(*paths)


# --- Size


@pytest.mark.parametrize("routes", [5, 5_000])
@pytest.mark.parametrize("tiers", [3, 50])
def test_size_of_a_policy_adds_no_step_to_a_request(routes: int, tiers: int) -> None:
    """A cell is two lookups away from its names, and a tier only as far as its plan has tiers."""
    names = [f"t{i}" for i in range(tiers - 1)]
    document = with_whens(**{name: {"plan": name} for name in names})
    document["features"]["image"]["routes"] = [f"GET /r{i}" for i in range(routes)]
    table = Table(Policy.from_dict(document), "test")

    tier = table.tier_of(Account("u1", plan=names[-1]), 0)

    assert tier == names[-1]
    assert len(table.ranking._by_plan[names[-1]].plain) == 1
    assert type(table.rows[-1]) is dict
    assert table.match("GET", f"/r{routes - 1}") == ("image", 1)


@pytest.mark.parametrize(
    ("route", "warning"),
    [
        ("PSOT /x", '"PSOT" is an unusual method; did you mean "POST"?'),
        ("BREW /x", '"BREW" is an unusual method'),
        ("POST /x/*", 'a "*" in a path stands for itself'),
        ("POST /x%20y", "paths are matched decoded"),
        ("* /x", None),
        ("GET|QUERY /x/{rest:path}", None),
    ],
)
def test_route_that_is_most_likely_a_slip_is_a_warning(route: str, warning: str | None) -> None:
    policy = Policy.from_dict(
        {
            "features": {"image": {"routes": [route]}},
            "tiers": {"everyone": {"quotas": {"image": "5/minute"}}},
        }
    )

    assert [one.path for one in policy.warnings] == ["features.image.routes[0]"][: bool(warning)]
    assert all(one.message.startswith(str(warning)) for one in policy.warnings)


@pytest.mark.parametrize("rate", ["20/minute", "20 per minute", "20 / minute", "020/minutes"])
def test_capacity_is_spelled_only_where_it_is_not_the_rates_amount(rate: str) -> None:
    tiers = {"t": {"quotas": {"a": rate, "b": {"rate": rate, "capacity": 2}}}}
    policy = Policy.from_dict({"features": {"a": {}, "b": {}}, "tiers": tiers})

    assert policy.cell("t", "a").spell() == rate
    assert policy.cell("t", "b").spell() == f"{rate} cap 2"

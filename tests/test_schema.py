"""The JSON Schema for editors says what the reader does, as far as a schema can."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from datetime import date, datetime, time
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from tests.policies import (
    EVERY_WORD,
    SMALLEST,
    valid_documents,
    with_cell,
    with_feature,
    with_whens,
)
from tieredlimit import Policy, PolicyError
from tieredlimit._core import cells, condition, document, features, pool, rows
from tieredlimit._core.quota import MAX_AMOUNT
from tieredlimit._core.rate import parse_duration, parse_instant, parse_rate
from tieredlimit._core.reading import Reading
from tieredlimit._core.routes import Route
from tieredlimit._core.slots import MAX_CONCURRENCY, read_slots

SCHEMA: dict[str, Any] = json.loads(
    files("tieredlimit").joinpath("policy.schema.json").read_text("utf-8")
)
VALIDATOR = Draft202012Validator(SCHEMA)


def part(*path: str) -> Any:
    found: Any = SCHEMA
    for step in path:
        found = found[int(step)] if isinstance(found, list) else found[step]
    return found


def as_json(value: Any) -> Any:
    """Return a document with TOML's own instants as text, as editors see them."""
    if isinstance(value, dict):
        return {key: as_json(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_json(inner) for inner in value]
    return value.isoformat() if isinstance(value, datetime | date | time) else value


def is_valid(value: Any) -> bool:
    return VALIDATOR.is_valid(as_json(value))


def is_read(value: Any) -> bool:
    try:
        Policy.from_dict(value)
    except PolicyError:
        return False
    return True


def accepts(name: str, value: object) -> bool:
    """Say whether a value fits a definition that refers to no other."""
    return Draft202012Validator(part("$defs", name)).is_valid(value)


def test_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", valid_documents())
def test_valid_document_is_valid(name: str) -> None:
    errors = [error.message for error in VALIDATOR.iter_errors(as_json(valid_documents()[name]))]

    assert errors == []


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (["properties"], document.WORDS),
        (["properties", "defaults", "properties"], rows.DEFAULTS_WORDS),
        (["$defs", "feature", "properties"], features.WORDS),
        (["$defs", "tier", "properties"], rows.WORDS),
        (["$defs", "when", "properties"], condition.WORDS),
        (["$defs", "quota", "anyOf", "1", "properties"], cells.WORDS),
        (["$defs", "pool", "properties"], pool.WORDS),
    ],
)
def test_schema_knows_the_words_that_the_reader_knows(
    path: list[str], words: Sequence[str]
) -> None:
    assert set(part(*path)) == set(words)


def test_schema_has_the_bounds_of_the_reader() -> None:
    assert part("$defs", "feature", "properties", "outage", "enum") == list(features.OUTAGES)
    assert part("$defs", "cost", "maximum") == MAX_AMOUNT
    assert part("$defs", "capacity", "maximum") == MAX_AMOUNT
    assert part("$defs", "concurrency", "maximum") == MAX_CONCURRENCY
    assert part("$defs", "pool", "properties", "slices", "maximum") == pool.MAX_SLICES
    assert part("$defs", "cell", "anyOf", "0", "const") == cells.UNLIMITED


def schemas(value: Any = SCHEMA, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every schema below `properties`, which is what an editor shows on hover."""
    for key, inner in value.items():
        if key == "properties" and not path.endswith("/if"):
            yield from ((f"{path}/{word}", said) for word, said in inner.items())
        if isinstance(inner, dict):
            yield from schemas(inner, f"{path}/{key}")
        elif isinstance(inner, list):
            for i, one in enumerate(inner):
                if isinstance(one, dict) and key != "examples":
                    yield from schemas(one, f"{path}/{key}/{i}")


@pytest.mark.parametrize("path", dict(schemas()))
def test_editor_has_a_title_and_a_sentence_for_every_word(path: str) -> None:
    said = dict(schemas())[path]

    while "description" not in said:
        said = part(*said["$ref"].removeprefix("#/").split("/"))

    assert said["title"]
    assert said["description"].endswith(".")


def test_examples_of_the_schema_are_read() -> None:
    for cell in part("$defs", "cell", "examples"):
        assert is_read(with_cell(cell))
    for cell in part("$defs", "shadow", "additionalProperties", "examples"):
        assert is_read({**SMALLEST, "defaults": {"shadow": {"image": cell}}})
    for routes in part("$defs", "feature", "properties", "routes", "examples"):
        assert is_read(with_cell(0, routes=routes))
    for rate in part("$defs", "rate", "examples"):
        assert parse_rate(rate).amount >= 1
    for said in part("$defs", "feature", "properties", "pool", "examples"):
        assert is_read({**with_feature(pool=said), "pools": {"gpu": {"rate": "9/minute"}}})
    for statuses in part("$defs", "feature", "properties", "refund_on", "examples"):
        assert is_read(with_feature(refund_on=statuses))
    for lease in part("$defs", "lease", "examples"):
        assert is_read(with_cell({"rate": "9/minute", "concurrency": 3, "lease": lease}))


WRONG_SHADOWS: list[object] = [
    "5/day", ["5/day"], {"image": "unlimited"}, {"image": []}, {"image": ["unlimited"]},
    {"image": 5}, {"image": False}, {"image": {}}, {"image": "5/month"},
    {"image": {"rate": "5/day", "burst": 5}},
    {"image": {"rate": "5/day", "concurrency": 3, "lease": "10 minutes"}},
    {"image": ["9/hour", {"rate": "5/day", "concurrency": 3, "lease": "10 minutes"}]},
]  # fmt: skip

WRONG_CONCURRENCIES: list[object] = [0, -1, True, "3", 1_000_001]
WRONG_LEASES: list[object] = [600, "2 days", "25 hours", "0 hours", "x"]
WRONG_SLOTS: list[dict[str, object]] = [
    {"concurrency": 3}, {"lease": "10 minutes"},
    *[{"concurrency": slots, "lease": "10 minutes"} for slots in WRONG_CONCURRENCIES],
    *[{"concurrency": 3, "lease": lease} for lease in WRONG_LEASES],
]  # fmt: skip

WRONG_LEAVES: list[object] = [
    5, "50%", [], {"everyone": -1}, {"everyone": "100%"}, {"everyone": "half"},
    {"everyone": 0.5}, {"everyone": "50"}, {"everyone": True}, {"Everyone": 1},
]  # fmt: skip

WRONG_POOLS: list[object] = [
    None, 5, [], "GPU", "", {}, {"rate": 5}, {"rate": "unlimited"}, {"rate": "5/month"},
    {"rate": "9/minute", "capacity": 0}, {"rate": "9/minute", "capcity": 5},
    *[{"rate": "9/minute", "slices": slices} for slices in (0, 1_025, "2", True)],
    *[{"rate": "9/minute", "leave": leave} for leave in WRONG_LEAVES],
    *[{"rate": "9/minute", **slots} for slots in WRONG_SLOTS],
]  # fmt: skip

WRONG_REFUNDS: list[dict[str, object]] = [
    {"refund_on": None}, {"refund_on": 500}, {"refund_on": "500"}, {"refund_on": {}},
    {"refund_on": [399]}, {"refund_on": [600]}, {"refund_on": ["500"]}, {"refund_on": [True]},
    {"refund_on_exception": None}, {"refund_on_exception": 1}, {"refund_on_exception": "yes"},
]  # fmt: skip

WRONG_WHENS: list[object] = [
    {}, "free", {"plan": []}, {"plan": 5}, {"plan": ""}, {"plan": ["a", ""]},
    {"plans": "free"}, {"tags": [5]}, {"anonymous": "yes"},
    {"account_age_below": 7}, {"account_age_below": "a week"},
    {"account_age_below": "0 days"}, {"account_age_above": "7  days"},
    {"created_after": "2026-11-20"}, {"created_after": "18:00"},
    {"created_before": datetime(2026, 11, 20)},  # noqa: DTZ001 -- a local one
    {"created_before": date(2026, 11, 20)},
]  # fmt: skip


@pytest.mark.parametrize(
    "mistake",
    [
        {},
        {**SMALLEST, "tier": {}},
        {**SMALLEST, "pools": None},
        {**SMALLEST, "pools": ["gpu"]},
        {**SMALLEST, "pools": {"GPU": {"rate": "9/minute"}}},
        *[{**SMALLEST, "pools": {"gpu": one}} for one in WRONG_POOLS],
        *[with_feature(pool=one) for one in WRONG_POOLS],
        {**SMALLEST, "features": {}},
        {**SMALLEST, "tiers": {}},
        {**SMALLEST, "features": {"Image": {}}},
        {**SMALLEST, "order": "everyone"},
        {**SMALLEST, "order": ["everyone", "everyone"]},
        {**SMALLEST, "defaults": {"when": {"plan": "x"}}},
        *[{**SMALLEST, "defaults": {"shadow": shadow}} for shadow in WRONG_SHADOWS],
        {**SMALLEST, "defaults": {"messages": {"image": ""}}},
        {**SMALLEST, "defaults": {"messages": {"image": " "}}},
        {**SMALLEST, "defaults": {"messages": {"image": {}}}},
        {**SMALLEST, "defaults": {"messages": {"image": {"en_GB": "No."}}}},
        *[with_feature(**said) for said in WRONG_REFUNDS],
        *[
            with_feature(outage="local", outage_share=share)
            for share in ("0%", "0.0%", "00%", "101%", "100.1%", "10", 0.1, "-1%", "", None)
        ],
        {key: value for key, value in EVERY_WORD.items() if key != "order"},
        *[
            with_cell(cell)
            for cell in (
                5, -1, True, None, "", "5", "5/month", "1/year", "0/minute", "1/0 day", "5/mins",
                "10/minute; 5/hour", "Unlimited", "9" * 65 + "/day", [], [0], ["unlimited"],
                [["5/minute"]], ["5/minute"] * 17, {}, {"rate": 5}, {"rate": "unlimited"},
                {"rate": "5/day", "capacity": 0}, {"rate": "5/day", "capacity": "5"},
                {"rate": "5/day", "burst": 5}, {"rate": "5/day", "per": "Org"},
                *[{"rate": "5/day", **slots} for slots in WRONG_SLOTS],
            )
        ],
        *[
            with_cell(0, routes=routes)
            for routes in (
                "POST /a", ["/a"], ["post /a"], ["POST a"], ["POST  /a"], ["POST /a b"],
                ["GET /a?b=c"], ["GET /a//b"], ["GET //a"], ["GET /a/{id"], ["GET /a/id}"],
                ["GET /{}"], ["GET /{a:word}"], ["GET /{1a}"], ["GET /\x00"], ["GET /\x9b"],
                [5], {"POST /a": 0}, {"POST /a": "1"}, {"/a": 1},
            )
        ],
        *[with_whens(new=when) for when in WRONG_WHENS],
    ],
)  # fmt: skip
def test_common_mistake_is_flagged_by_schema_and_reader(mistake: dict[str, Any]) -> None:
    assert not is_valid(mistake)
    assert not is_read(mistake)


def changed(path: Sequence[str], value: object) -> dict[str, Any]:
    changed = deepcopy(EVERY_WORD)
    inner = changed
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return changed


@given(
    st.sampled_from(
        [
            ["defaults", "quotas", "image"],
            ["defaults", "shadow", "image"],
            ["defaults", "shadow"],
            ["defaults", "messages", "image"],
            ["features", "by-code", "routes"],
            ["features", "by-code", "outage"],
            ["features", "by-code", "pool"],
            ["features", "by-code", "refund_on"],
            ["features", "by-code", "refund_on_exception"],
            ["pools"],
            ["pools", "gpu"],
            ["pools", "gpu", "leave"],
            ["pools", "gpu", "leave", "new"],
            ["pools", "gpu", "slices"],
            ["tiers", "new", "when"],
            ["tiers", "plus", "extends"],
        ]
    ),
    st.recursive(
        st.sampled_from(
            [*rows.WORDS, *condition.WORDS, *cells.WORDS, *pool.WORDS, "en", "pro", "allow", "deny",
             "5/minute", "9/2 days", "7 days", "1 day", "2026-11-20T18:00:00Z", "POST /else", "gpu",
             "50%", 0, 1, 7, 500, True, "unlimited"]
        ),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [*condition.WORDS, *cells.WORDS, *pool.WORDS, "en", "pro", "gpu", "PUT /a"]
            ),
            inner,
            max_size=3,
        ),
        max_leaves=5,
    ),
)  # fmt: skip
def test_whatever_the_reader_takes_is_valid(path: list[str], value: object) -> None:
    document = changed(path, value)
    assert is_valid(document) or not is_read(document)


@given(
    st.lists(
        st.sampled_from(
            [
                "/",
                "a",
                "{id}",
                "{n:path}",
                "{x:int}",
                "{",
                "}",
                "{:}",
                "{a:b}",
                "*",
                " ",
                "%41",
                "?",
            ]
        ),
        max_size=6,
        unique=True,
    )
)
@example(["/", "a", "/", "/"])
def test_schema_and_reader_agree_on_paths(parts: list[str]) -> None:
    text = f"GET /{''.join(parts)}"

    assert accepts("route", text) == _is_parsed(Route.parse, text)


rates = st.from_regex(
    r"\A ?[0-9]{1,3} ?(/|per|PER| per ) ?[0-9]{0,2} ?(second|Minute|HOUR|day|week|month|min)s?\Z"
)


@given(rates | st.text(max_size=12))
def test_schema_and_reader_agree_on_rates(text: str) -> None:
    assert accepts("rate", text) == _is_parsed(parse_rate, text)


@given(
    st.from_regex(r"\A[0-9]{1,3} ?(second|minute|hour|day|week|month)s?\Z") | st.text(max_size=9)
)
def test_schema_and_reader_agree_on_durations(text: str) -> None:
    assert accepts("duration", text) == _is_parsed(parse_duration, text)


leases = st.builds(
    "{}{}{}{}".format,
    st.integers(0, 100_000)
    | st.sampled_from([1, 2, 24, 25, 1_439, 1_440, 1_441, 86_399, 86_400, 86_401, "007", "0" * 9]),
    st.sampled_from(["", " ", "  "]),
    st.sampled_from(["second", "minute", "hour", "day", "week"]),
    st.sampled_from(["", "s"]),
)


@given(leases | st.text(max_size=9))
@example("0000000001 day")
@example("000000001 day")
@example("86400seconds")
@example("86401seconds")
def test_schema_and_reader_agree_on_leases(text: str) -> None:
    reading = Reading()
    read_slots(reading, "", {"concurrency": 1, "lease": text})

    assert accepts("lease", text) == (not reading.faults)


@given(
    st.from_regex(r"\A[0-9]{1,4}(\.[0-9]{0,5})? ?%?\Z") | st.integers(-1, 1) | st.text(max_size=5)
)
def test_schema_and_reader_agree_on_what_must_be_left(said: object) -> None:
    left = part("$defs", "pool", "properties", "leave", "additionalProperties")
    roomy = {"rate": "9/minute", "capacity": 10**7, "leave": {"everyone": said}}

    assert Draft202012Validator(left).is_valid(said) == is_read(with_feature(pool=roomy))


@given(
    st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1)),  # noqa: DTZ001 -- the zone is below
    st.sampled_from("Tt _"),
    st.sampled_from(["Z", "z", "+00:00", "-01:30", "", "+1"]),
)
def test_schema_and_reader_agree_on_instants(moment: datetime, between: str, zone: str) -> None:
    text = moment.isoformat(between) + zone

    assert accepts("instant", text) == _is_parsed(parse_instant, text)


def _is_parsed(parser: Any, text: str) -> bool:
    try:
        parser(text)
    except ValueError:
        return False
    return True

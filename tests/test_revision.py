"""Revisions: what stands for their content, and what a store gives back."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policies import valid_documents
from tests.test_override import several
from tieredlimit import Policy
from tieredlimit._core.override import Override, Who
from tieredlimit._core.revision import (
    FORMAT,
    MAX_BYTES,
    MAX_OVERRIDES,
    NOTHING,
    Revision,
    plain,
)
from tieredlimit.errors import ConflictError, RevisionError, TieredLimitError

PAUSED = Override("close-3", 3, "close", "video", Who(tier="new"))
RIGHT: dict[str, Any] = {
    "format": 1,
    "number": 3,
    "base": None,
    "overrides": [PAUSED.document()],
    "actor": "ann",
    "reason": "load",
    "made_us": 5,
    "change": "close video for tier new",
}

bases = st.none() | st.sampled_from([plain(one) for one in valid_documents().values()])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def revisions(draw: st.DrawFn) -> Revision:
    overrides = tuple(draw(several()))
    number = draw(st.integers(len(overrides), 2**53 - 1))
    base = draw(bases)
    return Revision(number, base, overrides, draw(texts), draw(texts), draw(st.integers(0, 9)), "x")


def encoded(**change: Any) -> bytes:
    return json.dumps({**RIGHT, **change}).encode()


def many(count: int) -> tuple[Override, ...]:
    return tuple(replace(PAUSED, id=f"close-{i}") for i in range(count))


@given(revisions())
def test_stored_document_reads_back_as_the_same_revision(revision: Revision) -> None:
    read = Revision.from_json(revision.to_json())

    assert read == revision
    assert read.digest == revision.digest
    assert read.to_json() == revision.to_json()


@given(revisions())
def test_digest_stands_for_base_and_overrides_alone(revision: Revision) -> None:
    other = replace(revision, number=9, actor="bob", reason="?", made_us=7, change="y")

    assert other.digest == revision.digest
    assert len(revision.digest) == 16
    assert set(revision.digest) <= set("0123456789abcdef")


def test_digest_differs_wherever_something_else_is_in_force() -> None:
    languages = [{"en": "No.", "fr": "Non."}, {"fr": "Non.", "en": "No."}]
    different = [
        NOTHING,
        Revision(0, {}),
        Revision(0, {"defaults": {"messages": languages[0]}}),
        # The first language is the default one.
        Revision(0, {"defaults": {"messages": languages[1]}}),
        Revision(0, None, (PAUSED,)),
        Revision(0, None, (replace(PAUSED, end_us=7),)),
        Revision(0, None, (PAUSED, replace(PAUSED, id="close-4"))),
    ]

    assert len({revision.digest for revision in different}) == len(different)


def test_digest_is_the_same_in_every_release() -> None:
    assert NOTHING.digest == "b577d623688d5295"


def test_nothing_is_revision_0_without_content() -> None:
    assert (NOTHING.number, NOTHING.base, NOTHING.overrides) == (0, None, ())
    assert Revision.from_json(NOTHING.to_json()) == NOTHING


@pytest.mark.parametrize("name", valid_documents())
def test_policy_document_with_instants_becomes_one_that_json_holds(name: str) -> None:
    document = valid_documents()[name]

    stored = Revision.from_json(Revision(1, plain(document)).to_json()).base

    assert stored is not None
    assert Policy.from_dict(stored) == Policy.from_dict(document)


def test_copy_for_json_shares_nothing_with_the_document() -> None:
    document: dict[str, Any] = {"a": [{"b": datetime(2026, 11, 20, 18, tzinfo=UTC)}]}

    copied = plain(document)
    document["a"][0]["b"] = 1

    assert copied == {"a": [{"b": "2026-11-20T18:00:00Z"}]}


def test_lone_surrogate_of_a_policy_document_comes_back() -> None:
    base = {"tiers": {"pro": {"when": {"plan": "\ud800"}}}}

    assert Revision.from_json(Revision(1, base).to_json()).base == base


@pytest.mark.parametrize("found", [0, 2, 10**40])
def test_other_format_is_named(found: int) -> None:
    with pytest.raises(
        RevisionError, match=r"format: is .*; this release reads format 1"
    ) as caught:
        Revision.from_json(encoded(format=found, overrides="of another kind"))

    assert [fault.path for fault in caught.value.faults] == ["format"]
    assert FORMAT == 1


@pytest.mark.fault("G2")
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": True}, "format: must be a whole number from 1 to 1, got true"),
        ({"number": -1}, "number: must be a whole number"),
        ({"number": 2**53}, "number: must be a whole number from 0 to 9,007,199,254,740,991"),
        ({"base": []}, "base: must be a table, got an empty list"),
        ({"overrides": {}}, "overrides: must be a list, got a table"),
        ({"overrides": [7]}, r"overrides\[0\]: must be a table, got 7"),
        ({"number": 2}, r"overrides\[0\].sequence: must be at most .* revision, 2, got 3"),
        ({"overrides": [RIGHT["overrides"][0]] * 2}, r"overrides\[1\].id: .*overrides\[0\]"),
        ({"actor": 7}, "actor: must be a text, got 7"),
        ({"reason": "x" * 501}, "reason: must be at most 500 characters, got 501"),
        ({"made_us": "now"}, 'made_us: must be a whole number from .*, got "now"'),
        ({"change": None}, "change: must be a text"),
        ({"chnge": ""}, 'chnge: unknown key "chnge"; did you mean "change"'),
    ],
)
def test_broken_document_is_refused_with_place_and_value(change: dict[str, Any], told: str) -> None:
    with pytest.raises(RevisionError, match=told) as caught:
        Revision.from_json(encoded(**change))

    assert len(caught.value.faults) == 1


@pytest.mark.fault("G2")
def test_all_faults_of_a_document_are_told_at_once() -> None:
    with pytest.raises(RevisionError) as caught:
        Revision.from_json(encoded(base=7, overrides=[{}, 3], actor=None, number=12))

    paths = [fault.path for fault in caught.value.faults]
    assert paths[0] == "base"
    assert {"overrides[0].id", "overrides[1]", "actor"} <= set(paths)
    assert str(caught.value).startswith("revision 12: ")


@pytest.mark.fault("G2")
@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"\xff",
        b"nonsense",
        b"[",
        b"[" * 500_000,
        b'{"a":' * 100_000,
        b'{"format":1,"number":' + b"9" * 5_000 + b"}",
        b'{"format":1,"number":NaN}',
        encoded()[:-1],
    ],
)
def test_what_is_no_json_is_refused(stored: bytes) -> None:
    with pytest.raises(RevisionError, match="is not JSON"):
        Revision.from_json(stored)


@pytest.mark.fault("G2")
@pytest.mark.parametrize("stored", [b"null", b"[]", b"7", b'"x"', b"{}"])
def test_what_is_no_revision_is_refused(stored: bytes) -> None:
    with pytest.raises(RevisionError):
        Revision.from_json(stored)


@pytest.mark.fault("G2")
@pytest.mark.parametrize("depth", [100, 300, 480, 900, 960, 980, 1_000, 3_000, 100_000])
def test_deep_nesting_is_read_or_refused(depth: int) -> None:
    inner = b"[" * depth + b"]" * depth
    stored = encoded(base={"a": "HERE"}).replace(b'"HERE"', inner)

    try:
        read = Revision.from_json(stored)
    except RevisionError:
        return

    assert read.base is not None
    assert read.number == 3


class TestBounds:
    def test_most_overrides_fit(self) -> None:
        full = Revision(3, None, many(MAX_OVERRIDES))

        assert Revision.from_json(full.to_json()) == full

    def test_one_override_more_is_refused_both_ways(self) -> None:
        over = Revision(3, None, many(MAX_OVERRIDES + 1))

        with pytest.raises(RevisionError, match=r"at most 1,000 at a time, got 1,001: end some"):
            over.to_json()
        with pytest.raises(RevisionError, match=r"overrides: at most 1,000 at a time, got 1,001"):
            Revision.from_json(encoded(overrides=[one.document() for one in over.overrides]))

    def test_larger_document_is_refused_both_ways(self) -> None:
        over = Revision(3, {"x": "y" * MAX_BYTES})

        with pytest.raises(RevisionError, match=r"revision 3: .*\n.* at most 1,000,000 bytes, got"):
            over.to_json()
        with pytest.raises(RevisionError, match="at most 1,000,000 bytes, got 1,000,001"):
            Revision.from_json(b" " * (MAX_BYTES + 1))


class TestErrors:
    def test_conflict_says_what_was_seen_and_what_was_found(self) -> None:
        error = ConflictError(17, 19)

        assert (error.seen, error.found) == (17, 19)
        assert isinstance(error, TieredLimitError)
        assert str(error).startswith(
            "revision 19 is in force, and this change was made for revision 17: nothing was "
        )

    def test_conflict_of_the_same_number_says_that_it_is_another(self) -> None:
        assert str(ConflictError(17, 17)).startswith("another revision 17 is in force")

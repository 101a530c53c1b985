"""Which of several texts a denied user reads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tieredlimit._core.messages import choose

TEXTS = {"en": "No.", "fr": "Non.", "pt-BR": "Não.", "zh-Hant": "不"}


@pytest.mark.parametrize(
    ("header", "tag"),
    [
        ("fr", "fr"),
        ("FR", "fr"),
        ("fr-CA", "fr"),
        ("fr-CA-x-old", "fr"),
        ("pt-br", "pt-BR"),
        ("pt", "pt-BR"),
        ("zh-Hant-TW", "zh-Hant"),
        ("de, fr", "fr"),
        ("en;q=0.5, fr;q=0.8", "fr"),
        ("en; q=0.5 , fr ;Q = 0.8", "fr"),
        ("fr;q=0.8, en;q=0.8", "fr"),
        ("fr;q=0, pt", "pt-BR"),
        ("fr;level=1", "fr"),
        ("de, *, fr;q=0.5", "en"),
        ("*", "en"),
        ("de", "en"),
        ("p", "en"),
        ("", "en"),
        (None, "en"),
    ],
)
def test_language_asked_for_is_found(header: str | None, tag: str) -> None:
    assert choose(TEXTS, header) == (tag, TEXTS[tag])


@pytest.mark.parametrize(
    "header", ["fr;q=x", "fr;q=nan", "fr;q=inf", "fr;q=-1", "fr;q=2", ";", ",,,", ";q=1", "\x00"]
)
def test_malformed_header_counts_for_nothing(header: str) -> None:
    assert choose(TEXTS, header)[0] == "en"


def test_single_text_is_for_everybody() -> None:
    assert choose({"": "No."}, "fr") == ("", "No.")


def test_only_the_start_of_a_long_header_is_read() -> None:
    assert choose(TEXTS, "de," * 32 + "fr")[0] == "en"
    assert choose(TEXTS, " " * 1_000 + "fr")[0] == "en"
    assert choose(TEXTS, "fr," + "x" * 1_000_000)[0] == "fr"


@given(st.text() | st.from_regex(r"([a-z-]{1,5}(;q=[0-9.]{1,5})?,?){1,5}"))
def test_any_header_has_an_answer(header: str) -> None:
    tag, text = choose(TEXTS, header)

    assert TEXTS[tag] == text

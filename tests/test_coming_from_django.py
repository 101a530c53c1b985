"""docs/coming-from/django-ratelimit.md: what the page says is what both do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.coming_from import Page, most_within

ROOT = Path(__file__).parent.parent
PAGE = Page("django-ratelimit")


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("django")
    done = subprocess.run(
        [sys.executable, "-m", "tests.coming_from_django", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    played: dict[str, Any] = json.loads(done.stdout)
    return played


def test_series_of_the_page_is_let_in_as_its_table_says(played: dict[str, Any]) -> None:
    assert played["there"] == [row[2] for row in PAGE.series()]
    assert played["here"] == [row[3] for row in PAGE.series()]


def test_window_lets_nine_in_within_a_second_and_a_bucket_five() -> None:
    # What the table says is what is done: the test above.
    there = most_within(1, [(at, count) for at, _, count, _ in PAGE.series()])
    here = most_within(1, [(at, count) for at, _, _, count in PAGE.series()])

    assert (there, here) == (9, 5)
    assert "nine requests within a second" in PAGE.text.replace("\n", " ")


def test_used_up_quota_is_a_429_that_says_until_when_and_was_a_403(played: dict[str, Any]) -> None:
    status, until = played["denied here"]

    assert played["denied there"] == [403, None]
    assert status == 429
    assert 1 <= int(until) <= 12


def test_zero_is_a_403_there_as_well(played: dict[str, Any]) -> None:
    assert played["zero"] == [403]


def test_outer_decorator_is_charged_for_what_the_inner_one_denied(played: dict[str, Any]) -> None:
    in_the_first_minute, in_the_next = played["two"]

    assert (in_the_first_minute, in_the_next) == (1, 0)


def test_async_view_under_the_decorator_is_answered_500(played: dict[str, Any]) -> None:
    decorated, bare = played["async views"]

    assert (decorated, bare) == ([500], [200])


def test_redis_cache_that_is_down_is_a_500_even_where_it_may_fail_open(
    played: dict[str, Any],
) -> None:
    assert played["down"] == played["down, open"] == [500]


def test_users_are_told_apart_by_their_sessions_and_strangers_by_address(
    played: dict[str, Any],
) -> None:
    # Two users, and a cookie that no session has.
    assert played["sessions"] == [5, 5, 5]
    assert played["stranger"] == [429]

"""`tieredlimit policy`: push, pull, show, diff, rollback."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policies import valid_documents
from tests.test_cli_control import EXAMPLE, TEAM, Workers, as_json, head_of, run
from tieredlimit import Policy
from tieredlimit._core.revision import plain
from tieredlimit.cli.toml import to_toml


@pytest.fixture
def workers(redis_url: str) -> Workers:
    """A living worker on a namespace where nothing was published."""
    living = Workers(redis_url, "w1")
    living.beat()
    return living


@pytest.fixture
def more(tmp_path: Path) -> Path:
    """The example, where free accounts get more images."""
    path = tmp_path / "more.toml"
    path.write_text(EXAMPLE.read_text("utf-8").replace("20/minute", "30/minute"), "utf-8")
    return path


def push(workers: Workers, path: Path) -> None:
    result = run(workers, "policy", "push", path, "--yes")
    assert result.exit_code == 0, result.output


def test_push_says_what_changes_and_stores_it(workers: Workers, more: Path) -> None:
    result = run(workers, "policy", "push", more, "--yes", "--reason", "more images")

    assert result.exit_code == 0
    assert "tiers.free.quotas.image: 20/minute -> 30/minute" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("pushed · 1/1 workers on revision 1")
    head = head_of(workers)
    assert (head.change, head.reason) == ("push more.toml", "more images")
    assert Policy.from_dict(head.base or {}).cell("free", "image").spell() == "30/minute"


def test_push_works_where_the_environment_says_stored_as_it_does_for_workers(
    workers: Workers, more: Path
) -> None:
    early = run(workers, "policy", "show", policy="stored")
    pushed = run(workers, "policy", "push", more, "--yes", policy="stored")
    closed = run(workers, "close", "image", "--all", "--yes", policy="stored")

    assert early.exit_code == 1
    assert f'no policy is stored in "{TEAM}", and no file is named' in early.stderr
    assert (pushed.exit_code, closed.exit_code) == (0, 0)


def test_push_says_how_many_tokens_it_hands_out(workers: Workers, tmp_path: Path) -> None:
    push(workers, EXAMPLE)
    longer = tmp_path / "longer.toml"
    longer.write_text(EXAMPLE.read_text("utf-8").replace("20/minute", "30/2 minutes"), "utf-8")

    told = run(workers, "policy", "diff", longer).stdout
    listed = as_json(workers, "policy", "diff", longer)

    assert "hands out at most" in told
    (one,) = listed["differences"]
    assert (one["path"], one["before"], one["after"]) == (
        "tiers.free.quotas.image",
        "20/minute",
        "30/2 minutes",
    )
    assert one["grants"] > 0


def test_overlay_is_pushed_as_one_document(workers: Workers, tmp_path: Path) -> None:
    above = tmp_path / "prod.toml"
    above.write_text('[tiers.free]\nquotas.image = "9/minute"\n', "utf-8")

    result = run(workers, "policy", "push", EXAMPLE, above, "--yes")

    assert result.exit_code == 0
    policy = Policy.from_dict(head_of(workers).base or {})
    assert policy.cell("free", "image").spell() == "9/minute"
    assert policy.cell("pro", "image").unlimited


def test_push_with_faults_stores_nothing(workers: Workers, tmp_path: Path) -> None:
    faulty = tmp_path / "faulty.toml"
    faulty.write_text(EXAMPLE.read_text("utf-8").replace("20/minute", "20/month"), "utf-8")

    result = run(workers, "policy", "push", faulty, "--yes")

    assert result.exit_code == 1
    assert "tiers.free.quotas.image" in result.stderr
    assert head_of(workers).number == 0


@pytest.mark.fault("G5")
def test_push_rollback_and_another_push_leave_a_closure(workers: Workers, more: Path) -> None:
    push(workers, EXAMPLE)
    run(workers, "close", "video", "--tier", "free", "--yes")

    push(workers, more)
    back = run(workers, "policy", "rollback", "1", "--yes")

    assert back.exit_code == 0
    assert "30/minute -> 20/minute" in back.stdout
    head = head_of(workers)
    assert head.number == 4
    assert [one.id for one in head.overrides] == ["close-2"]
    assert Policy.from_dict(head.base or {}).cell("free", "image").spell() == "20/minute"


def test_push_is_refused_while_a_worker_cannot_read_it(workers: Workers, more: Path) -> None:
    workers.format = 0
    workers.beat()

    result = run(workers, "policy", "push", more, "--yes")

    assert result.exit_code == 1
    assert "app-1:4711 cannot read what this release would publish" in result.stderr
    assert head_of(workers).number == 0


def test_push_that_lacks_what_an_override_is_about_says_so(
    workers: Workers, tmp_path: Path
) -> None:
    run(workers, "close", "video", "--tier", "free", "--yes")
    small = tmp_path / "small.toml"
    small.write_text('[features.image]\n[tiers.everyone]\nquotas.image = "1/minute"\n', "utf-8")

    result = run(workers, "policy", "push", small, "--dry-run")

    assert "note: close-1 is about the feature video, which this policy lacks" in result.stdout


def test_pulled_policy_is_the_one_that_was_pushed(
    workers: Workers, more: Path, tmp_path: Path
) -> None:
    push(workers, more)
    push(workers, EXAMPLE)

    latest = run(workers, "policy", "pull").stdout
    first = as_json(workers, "policy", "pull", "--revision", "1")

    pulled = tmp_path / "pulled.toml"
    pulled.write_text(latest, "utf-8")
    assert Policy.load(pulled) == Policy.load(EXAMPLE)
    assert Policy.from_dict(first) == Policy.load(more)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["pull"], "stores no policy"),
        (["pull", "--revision", "7"], "revision 7 is not kept"),
        (["rollback", "7", "--yes"], "revision 7 is not kept"),
    ],
)
def test_what_is_not_there_is_told(workers: Workers, words: list[str], told: str) -> None:
    result = run(workers, "policy", *words)

    assert result.exit_code == 1
    assert told in result.stderr


def test_rollback_to_where_nothing_was_stored_goes_back_to_files(
    workers: Workers, more: Path
) -> None:
    run(workers, "close", "video", "--tier", "free", "--yes")
    push(workers, more)

    result = run(workers, "policy", "rollback", "1", "--yes")

    assert result.exit_code == 0
    assert "workers go back to the file that each of them has" in result.stdout
    assert head_of(workers).base is None


def test_show_is_the_table_and_where_it_comes_from(workers: Workers, more: Path) -> None:
    before = run(workers, "policy", "show").stdout
    push(workers, more)
    run(workers, "close", "video", "--tier", "free", "--yes")
    after = run(workers, "policy", "show").stdout
    told = as_json(workers, "policy", "show")

    assert before.splitlines()[0] == f"team · {EXAMPLE}"
    assert "20/minute" in before
    assert after.splitlines()[0] == "team · stored, revision 2"
    assert "30/minute" in after
    assert after.endswith("1 override above it: see tieredlimit overrides\n")
    assert (told["stored"], told["cells"]["free"]["image"]) == (True, "30/minute")


def test_diff_with_the_same_says_so(workers: Workers) -> None:
    assert run(workers, "policy", "diff", EXAMPLE).stdout == "nothing differs\n"


def test_stored_policy_counts_for_later_commands(workers: Workers, tmp_path: Path) -> None:
    text = EXAMPLE.read_text("utf-8").replace("video", "clip").replace("Video", "Clip")
    other = tmp_path / "other.toml"
    other.write_text(text, "utf-8")
    push(workers, other)

    result = run(workers, "close", "video", "--tier", "free", "--yes")

    assert result.exit_code == 1
    assert 'unknown feature "video"' in result.stderr


# --- explain, in a place


def explained(workers: Workers, *words: str) -> Any:
    result = run(workers, "explain", "--redis", workers.url, "--namespace", TEAM, *words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


OLD = ["--plan", "free", "--created", "2020-01-01", "--feature", "video"]


def test_explain_names_the_override_that_decides_and_why_others_do_not(workers: Workers) -> None:
    run(workers, "close", "video", "--all", "--message", "Later.", "--yes")
    run(workers, "open", "video", "--account", "vip", "--yes")
    run(workers, "set", "video", "7/day", "--tier", "pro", "--yes")

    told = explained(workers, "--account", "u1", *OLD)

    assert (told["revision"], told["answer"]["reason"]) == (3, "closed")
    assert told["answer"]["status"] == 403
    assert told["answer"]["body"]["detail"] == "Later."
    assert {one["id"]: one["why"] for one in told["overrides"]} == {
        "close-1": "it decides",
        "open-2": "this is another account",
        "set-3": "this one is in tier free",
    }


def test_explain_goes_by_the_most_specific(workers: Workers) -> None:
    run(workers, "close", "video", "--all", "--yes")
    run(workers, "open", "video", "--account", "vip", "--yes")
    run(workers, "set", "video", "7/day", "--plan", "free", "--yes")

    vip, other = explained(workers, "--account", "vip", *OLD), explained(workers, *OLD)

    assert vip["answer"]["allowed"]
    assert vip["cell"]["text"] == "10/day cap 2"
    assert [one["why"] for one in vip["overrides"]] == [
        "it decides",
        "open-2 is more specific",
        "open-2 is more specific",
    ]
    assert other["cell"]["text"] == "7/day"
    assert "an override depends on the account's id: say which with --account" in other["notes"]


def test_explain_says_who_is_inside_a_share(workers: Workers) -> None:
    run(workers, "close", "video", "--tier", "free", "--yes")
    run(workers, "open", "video", "--tier", "free", "--percent", "50", "--yes")

    told = [explained(workers, "--account", f"u{i}", *OLD) for i in range(12)]

    inside = [one for one in told if one["answer"]["allowed"]]
    outside = [one for one in told if not one["answer"]["allowed"]]
    assert inside
    assert outside
    assert outside[0]["overrides"][1]["why"] == "this one is outside of the 50 %"


def test_explained_page_has_the_overrides(workers: Workers) -> None:
    words = ["explain", "--redis", workers.url, "--account", "u1", *OLD]
    none = run(workers, *words).stdout
    run(workers, "close", "video", "--tier", "free", "--for", "2h", "--yes")
    closed = run(workers, *words).stdout

    assert "override  none, under revision 0" in none
    assert "override  close-1: video closed for tier free, until 20" in closed
    assert "403 Forbidden: an override closes it for " in closed
    assert "any language" not in closed
    assert "en: video is closed for now. Try again in 2 hours" in closed


def test_explained_closure_lasts_as_long_as_another_one_below_it(workers: Workers) -> None:
    run(workers, "close", "video", "--tier", "free", "--yes")
    run(workers, "close", "video", "--account", "u1", "--for", "2h", "--yes")

    answer = explained(workers, "--account", "u1", *OLD)["answer"]

    assert answer["body"]["detail"] == "video is closed for now."
    assert "retry-after" not in answer["headers"]


def test_explained_closure_ends_where_an_override_opens(workers: Workers) -> None:
    run(workers, "close", "video", "--all", "--message", "Later.", "--yes")
    run(workers, "open", "video", "--account", "u1", "--from", "2100-01-01T00:00:00Z", "--yes")

    answer = explained(workers, "--account", "u1", *OLD)["answer"]

    assert answer["body"]["detail"] == "Later."
    assert int(answer["headers"]["retry-after"]) > 70 * 365 * 86_400


def test_explain_of_a_file_asks_no_redis_unless_told_to(workers: Workers) -> None:
    run(workers, "close", "video", "--tier", "free", "--yes")

    of_file = run(workers, "explain", EXAMPLE, *OLD)
    without = run(workers, "explain", "--plan", "free", "POST", "/v1/videos")

    assert "override" not in of_file.stdout
    assert "answer    allowed" in of_file.stdout
    assert "revision 1" in without.stdout or "close-1" in without.stdout


def test_explain_prefers_what_is_stored(workers: Workers, more: Path) -> None:
    push(workers, more)

    result = run(
        workers, "explain", EXAMPLE, "--redis", workers.url, "--feature", "image", "--plan", "pro"
    )

    assert "a policy is stored in Redis (revision 1), and counts instead of POLICY" in (
        " ".join(result.stdout.split())
    )


# --- TOML


@pytest.mark.parametrize("name", sorted(valid_documents()))
def test_valid_policies_come_back_from_toml(name: str) -> None:
    document = plain(valid_documents()[name])

    assert tomllib.loads(to_toml(document)) == document


_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_values = st.recursive(
    _texts | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, width=32),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(_texts, _values, max_size=4))
def test_any_document_comes_back_from_toml(document: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml(document)) == document


def test_toml_holds_nothing_that_steers_a_terminal() -> None:
    document = {"features": {"a\x9b": {"text": "\x1b[1m\x7f\x9b2J\u2028\u202e\u2066画"}}}

    written = to_toml(document)

    assert written.replace("\n", "").isprintable()
    assert "画" in written
    assert tomllib.loads(written) == document

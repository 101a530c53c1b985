"""`tieredlimit explain` and the reasoning behind it: which tier and why, which route."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from tieredlimit import Account, Policy
from tieredlimit._core.explanation import (
    Change,
    choose_tier,
    find_route,
    nearest_route,
    spell_about,
)
from tieredlimit._core.rate import parse_instant
from tieredlimit._core.table import Table
from tieredlimit.cli import main

EXAMPLE = Path(__file__).parents[1] / "examples" / "policy.toml"
SHADOWED = """
[features.video]
routes = ["POST /v1/videos"]
[tiers.everyone]
quotas.video = "20/day"
shadow.video = "5/day"
"""
NOON = "2026-12-02T12:00:00Z"
NOON_AT = datetime.fromisoformat(NOON)
DAY = 86_400_000_000

EVERY_WORD: dict[str, Any] = {
    "order": ["staff", "guest", "old", "early", "late", "fresh", "grown", "rest"],
    "features": {
        "files": {
            "routes": {
                "GET /files/{rest:path}": 1,
                "POST /files": 3,
                "GET /live/{id}": 1,
                "OPTIONS /files": 1,
                "* /{anything}": 1,
            }
        }
    },
    "defaults": {"quotas": {"files": "7/minute"}},
    "tiers": {
        "staff": {"when": {"tags": ["staff", "badge"]}},
        "guest": {"when": {"anonymous": True}, "quotas": {"files": 0}},
        "old": {"when": {"created_before": "2020-01-01T00:00:00Z", "anonymous": False}},
        "early": {"when": {"plan": "early", "account_age_above": "30 days"}},
        "late": {"when": {"created_after": "2026-12-01T12:00:00Z", "plan": "late"}},
        "fresh": {"when": {"account_age_below": "1 day"}},
        "grown": {"when": {"account_age_above": "10 days"}, "quotas": {"files": "2/minute"}},
        "rest": {},
    },
}


def run(*words: object, columns: int = 80) -> Result:
    return CliRunner().invoke(main, ["explain", *map(str, words)], env={"COLUMNS": str(columns)})


def explain(*words: object) -> list[str]:
    """Return the page's paragraphs on a wide terminal."""
    result = run(*words, "--at", NOON, columns=9_000)
    assert result.exit_code == 0, result.output
    return [line.rstrip() for line in result.stdout.splitlines()]


def as_json(*words: object) -> dict[str, Any]:
    result = run(*words, "--at", NOON, "--json")
    document: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == 0
    return document


@pytest.fixture
def every_word(tmp_path: Path) -> Path:
    """Every word of `when`, as a file."""
    path = tmp_path / "words.toml"
    lines = [f"order = {EVERY_WORD['order']}", "[features.files.routes]"]
    lines += [f'"{r}" = {c}' for r, c in EVERY_WORD["features"]["files"]["routes"].items()]
    lines += ["[defaults]", 'quotas.files = "7/minute"']
    for name, tier in EVERY_WORD["tiers"].items():
        lines.append(f"[tiers.{name}]")
        lines += [f"when.{w} = {json.dumps(v)}" for w, v in tier.get("when", {}).items()]
        lines += [f"quotas.{f} = {json.dumps(v)}" for f, v in tier.get("quotas", {}).items()]
    path.write_text("\n".join(lines), "utf-8")
    return path


# --- Which tier, and why


def test_page_says_everything_about_an_allowed_request() -> None:
    page = explain(EXAMPLE, "--plan", "free", "--created-at", "2026-11-20", "POST", "/v1/videos")

    age = Policy.load(EXAMPLE).tiers[0].when
    assert age is not None
    held = "holds 2, one more every 2 hours 24 minutes, empty to full in 4 hours 48 minutes"
    younger = age.spell("account_age_below")
    assert page == [
        "POST /v1/videos is metered as video, cost 1 (route POST /v1/videos)",
        "",
        "account   plan free · created 2026-11-20T00:00:00Z, 12 days 12 hours old",
        "          as of 2026-12-02T12:00:00Z",
        "tier      free: plan is free",
        f"skipped   new: {younger}; this one is 12 days 12 hours old",
        "          pro: plan is pro or team; this one's plan is free",
        "quotas    video-day: 10/day cap 2, charged to the account",
        f"            {held}",
        "answer    allowed if the bucket is full, 2 times in a row",
        '          ratelimit-policy: "video-day";q=2;w=17280',
        '          ratelimit: "video-day";r=1;t=8640',
        "outage    503 Service Unavailable while Redis cannot answer",
    ]


def test_page_says_when_age_alone_changes_the_tier() -> None:
    page = explain(EXAMPLE, "--plan", "free", "--created-at", "2026-12-01", "POST", "/v1/images")

    assert '          leaves "new" at 2026-12-08T00:00:00Z, in 5 days 12 hours, for "free"' in page


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "staff: tags include badge, staff; this one lacks badge, staff"),
        (["--tag", "badge"], "staff: tags include badge, staff; this one lacks staff"),
        ([], "guest: has no account; this one has an account"),
        (["--anonymous"], "guest: has no account"),
        (["--tag", "staff", "--tag", "badge"], "staff: tags include badge, staff"),
        ([], "old: created before 2020-01-01T00:00:00Z; this one is of unknown age"),
        (
            ["--created-at", "2026-11-01"],
            "old: created before 2020-01-01T00:00:00Z; this one was created 2026-11-01T00:00:00Z",
        ),
        ([], "early: plan is early; this one's plan is unknown"),
        (
            ["--plan", "early", "--created-at", "2026-11-30T12:00"],
            "early: account is at least 30 days old; this one is 2 days old",
        ),
        (
            ["--plan", "late", "--created-at", "2026-11-30"],
            "late: created at or after 2026-12-01T12:00:00Z; this one was created 2026-11-30T",
        ),
        (
            ["--plan", "early", "--created-at", "2027-11-30"],
            "early: account is at least 30 days old; this one is not created yet",
        ),
        (["--created-at", "2026-12-01T14:00:00+02:00"], "fresh: account is younger than 1 day; "),
        (["--created-at", "2026-11-30"], "rest: takes everybody else"),
    ],
)
def test_every_word_is_told_with_what_the_account_has(
    every_word: Path, words: list[str], told: str
) -> None:
    page = explain(every_word, *words, "--feature", "files")

    assert told in "\n".join(page)


def test_anonymous_account_is_told_apart(every_word: Path) -> None:
    account = Account("10.0.0.1", anonymous=True)
    policy = Policy.from_dict(
        {
            "order": ["known", "rest"],
            "features": {"a": {"routes": ["GET /a"]}},
            "defaults": {"quotas": {"a": 0}},
            "tiers": {"known": {"when": {"anonymous": False}}, "rest": {}},
        }
    )

    (passed,) = choose_tier(policy, account, 0).passed

    assert (passed.asks, passed.has) == ("has an account", "this one is anonymous")


@given(
    st.sampled_from([None, "early", "late", "other"]),
    st.none() | st.integers(-800, 2_200).map(lambda hours: NOON_AT - timedelta(hours=hours)),
    st.sets(st.sampled_from(["staff", "badge"])),
    st.booleans(),
)
def test_explained_tier_is_the_one_in_force_until_it_changes(
    plan: str | None, created_at: datetime | None, tags: set[str], anonymous: bool
) -> None:
    policy = Policy.from_dict(EVERY_WORD)
    table = Table(policy, "test")
    account = Account("u1", plan, created_at, tags, anonymous=anonymous)
    now = parse_instant(NOON)

    choice = choose_tier(policy, account, now)

    assert choice.tier == table.tier_of(account, now)
    last = choice.change.at - 1 if choice.change else now + 400 * DAY
    assert table.tier_of(account, last) == choice.tier
    if choice.change:
        assert table.tier_of(account, choice.change.at) == choice.change.tier != choice.tier


def test_change_skips_an_age_that_makes_no_difference() -> None:
    policy = Policy.from_dict(EVERY_WORD)
    made = datetime(2026, 12, 1, tzinfo=UTC)
    account = Account("u1", "early", made)
    noon = parse_instant(NOON)

    assert choose_tier(policy, account, noon).change == Change(
        parse_instant(made) + 10 * DAY, "grown"
    )
    assert choose_tier(policy, account, noon + 15 * DAY).change == Change(
        parse_instant(made) + 30 * DAY, "early"
    )


def test_change_beyond_the_calendar_is_none() -> None:
    policy = Policy.from_dict(EVERY_WORD)
    account = Account("u1", "early", datetime.max.replace(tzinfo=UTC) - timedelta(hours=1))

    assert choose_tier(policy, account, parse_instant(NOON)).change is None


# --- The answer


def test_zero_tells_every_message_and_the_fields() -> None:
    page = explain(EXAMPLE, "--plan", "free", "POST", "/v1/videos")

    start = page.index("answer    403 Forbidden: this tier has 0, and no waiting helps")
    assert page[start + 1 :] == [
        "          en (default): Video is not yet open to new accounts. Images are.",
        "          fr: La vidéo n'est pas encore ouverte aux nouveaux comptes. Les images le sont.",
        "          content-type: application/problem+json",
        "          cache-control: no-store",
        "          content-language: en",
        "          vary: accept-language",
        '          ratelimit-policy: "video";q=0',
        '          ratelimit: "video";r=0',
        "outage    the same while Redis cannot answer: it is not asked",
    ]


def test_cost_that_never_fits_names_the_bucket() -> None:
    page = explain(EXAMPLE, "--plan", "free", "--created-at", "2020-01-01", "POST", "/v1/videos/hd")

    told = "429 Too Many Requests: it costs 8, and video-day never holds more than 2: it never fits"
    assert f"answer    {told}" in page
    assert "          en: This request costs 8, more than video ever allows at once." in page


def test_unlimited_says_that_the_response_says_nothing() -> None:
    page = explain(EXAMPLE, "--plan", "pro", "POST", "/v1/images")

    assert page[-3:] == [
        "quotas    unlimited",
        "answer    allowed: nothing limits it, and the response says nothing of limits",
        "outage    allowed, and not counted, while Redis cannot answer",
    ]


def test_unlimited_is_given_out_in_no_shares_during_an_outage(tmp_path: Path) -> None:
    path = tmp_path / "local.toml"
    path.write_text(
        '[features.a]\noutage = "local"\n[features.b]\noutage = "local"\n'
        '[tiers.all]\nquotas = { a = "unlimited", b = "9/minute" }\n',
        "utf-8",
    )

    unlimited, limited = (explain(path, "--feature", name)[-1] for name in "ab")

    assert unlimited == "outage    allowed, for nothing limits it, while Redis cannot answer"
    assert limited.startswith("outage    each process gives out 10% of the quotas by itself")


def test_subjects_are_named_where_they_are_charged() -> None:
    within = "\n".join(
        explain(EXAMPLE, "--plan", "pro", "--within", "org=o7", "--feature", "video", "--cost", 8)
    )
    alone = "\n".join(explain(EXAMPLE, "--plan", "pro", "--feature", "video"))

    assert within.startswith("video, cost 8\n")
    assert "5000/day per org, charged to org o7\n" in within
    assert "allowed if all buckets are full, 2 times in a row" in within
    assert "charged to the account alone, since it is within no org" in alone


def test_client_without_an_account_is_charged_by_address() -> None:
    page = explain(EXAMPLE, "--anonymous", "--account", "10.0.0.1", "--feature", "image")

    assert (
        "account   10.0.0.1 · anonymous · plan unknown · of unknown age, which counts as new"
        in page
    )
    assert "quotas    image-minute: 2/minute, charged to the client's address" in page
    assert page[-1] == "outage    allowed, and not counted, while Redis cannot answer"


def test_messages_of_a_quota_are_told_for_when_it_is_used_up(tmp_path: Path) -> None:
    above = tmp_path / "above.toml"
    above.write_text('[tiers.everyone.messages]\nimage = "Enough."\n', "utf-8")

    page = explain(EXAMPLE, above, "--feature", "image")

    at = page.index("used up   429 Too Many Requests, with:")
    assert page[at + 1] == "          any language: Enough."


def test_peek_at_cost_0_is_allowed() -> None:
    page = explain(EXAMPLE, "--feature", "image", "--cost", 0)

    assert "answer    allowed if the bucket is full" in page


def test_words_that_no_tier_knows_are_noted() -> None:
    words = ["--plan", "fre", "--tag", "x", "--within", "orgs=o7", "--feature", "image"]

    page = explain(EXAMPLE, *words)

    assert page[-3:] == [
        'note      no tier asks for the plan "fre"; did you mean "free"?',
        '          no tier asks for the tag "x"',
        '          no quota is charged per "orgs"; did you mean "org"?',
    ]


def test_lines_keep_to_the_terminal_but_for_fields_and_the_heading() -> None:
    result = run(EXAMPLE, "--plan", "free", "--account", "u1", "--tag", "t", "POST", "/v1/videos")

    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    assert f"as of {datetime.now(UTC).year}-" in result.stdout


# --- Requests


@pytest.mark.parametrize(
    ("words", "heading"),
    [
        (["post", "/v1/videos"], "POST /v1/videos is"),
        (["POST", "/v1/videos/hd?a=/v1/images#x"], "POST /v1/videos/hd is"),
        (["POST", "https://api.example.com/v1/videos"], "POST /v1/videos is"),
        (["POST", "/v1/images/a%20b/variations"], "POST /v1/images/a b/variations is"),
    ],
)
def test_path_is_read_as_a_client_sends_it(words: list[str], heading: str) -> None:
    assert explain(EXAMPLE, *words)[0].startswith(heading)


@pytest.mark.parametrize("words", [["WS", "/live/1"], ["GET", "wss://example.com/live/1"]])
def test_websocket_is_matched_as_get(every_word: Path, words: list[str]) -> None:
    page = explain(every_word, *words)
    denied = explain(every_word, "--anonymous", *words)

    assert page[0] == "WebSocket /live/1 is metered as files, cost 1 (route GET /live/{id})"
    assert not [line for line in page if line.startswith("note")]
    assert denied[-1].endswith("closes it before accepting: a plain 403")


def test_head_is_matched_as_get_and_a_preflight_noted(every_word: Path) -> None:
    assert explain(every_word, "HEAD", "/files/a")[0].endswith("(route GET /files/{rest:path})")
    assert explain(every_word, "OPTIONS", "/files")[-1].endswith("is never charged, nor denied")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["GET", "/v1/videos"], "POST /v1/videos, metered as video: the same path, but not GET"),
        (["POST", "/v1/video"], "POST /v1/videos, metered as video: a similar path"),
        (
            ["POST", "/v1/image/7/variations"],
            "POST /v1/images/{id}/variations, metered as image: a similar path",
        ),
        (
            ["POST", "/api/prod/v1/videos"],
            'POST /v1/videos, metered as video: write the path without the root path "/api/prod"',
        ),
    ],
)
def test_unmetered_request_passes_and_gets_a_hint(words: list[str], hint: str) -> None:
    first, second = explain(EXAMPLE, *words)

    assert first == f"{' '.join(words)} matches no feature: it passes untouched."
    assert second == f"nearest   {hint}"


def test_unmetered_request_like_no_route_gets_no_hint() -> None:
    assert len(explain(EXAMPLE, "GET", "https://example.com")) == 1


def test_root_path_is_not_guessed_from_a_route_that_takes_anything() -> None:
    policy = Policy.from_dict(EVERY_WORD)

    nearest = nearest_route(policy, "GET", "/wholly/unlike-anything-else")

    assert nearest is None


@given(st.sampled_from(["GET", "POST", "HEAD", "PUT"]), st.text("/files.live1", max_size=12))
def test_explained_route_is_the_one_that_meters(method: str, path: str) -> None:
    policy = Policy.from_dict(EVERY_WORD)

    metered = find_route(policy, method, path)

    told = (metered.feature, metered.cost) if metered else None
    assert told == Table(policy, "test").match(method, path)


# --- JSON


def test_json_says_what_the_page_says() -> None:
    document = as_json(
        EXAMPLE, "--plan", "free", "--created-at", "2026-11-30T02:00:00+02:00", "POST", "/v1/videos"
    )

    answer = document["answer"]
    assert document["route"] == "POST /v1/videos"
    assert document["account"]["created_at"] == "2026-11-30T00:00:00Z"
    assert document["tier"]["name"] == "new"
    assert document["tier"]["changes"] == {"at": "2026-12-07T00:00:00Z", "tier": "free"}
    assert document["cell"]["zero"]
    assert (answer["allowed"], answer["status"]) == (False, 403)
    assert answer["body"]["detail"] == "Video is not yet open to new accounts. Images are."
    assert answer["headers"]["ratelimit"] == '"video";r=0'
    assert document["outage"] == "deny"


def test_json_holds_nothing_that_steers_a_terminal() -> None:
    plan = "\x1b[1m\x7f\x9b2J\u2028\u202e\u2066画\udcff"

    result = run(EXAMPLE, "--plan", plan, "--feature", "video", "--json")

    assert result.stdout.replace("\n", "").isprintable()
    assert "画" in result.stdout
    assert json.loads(result.stdout)["account"]["plan"] == plan


def test_json_of_a_feature_has_no_request() -> None:
    document = as_json(EXAMPLE, "--account", "u1", "--plan", "pro", "--feature", "video")

    assert (document["request"], document["route"]) == (None, None)
    assert document["account"] | {"id": "u1", "created_at": None} == document["account"]
    assert document["cell"]["quotas"][1]["charged"].startswith("the account alone")
    assert document["tier"]["skipped"][0]["word"] == "plan"
    assert (document["answer"]["status"], document["answer"]["body"]) == (None, None)


@pytest.mark.parametrize(("path", "route"), [("/v1/videos", "POST /v1/videos"), ("/zzz", None)])
def test_json_of_an_unmetered_request(path: str, route: str | None) -> None:
    document = as_json(EXAMPLE, "GET", path)

    assert not document["metered"]
    assert (document["nearest"] or {}).get("route") == route


# --- Mistakes


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--feature", "vidoe"], 'did you mean "video"?'),
        (["--feature", "zzz"], "known are image, video"),
        (["POST"], "Give the policy and then the request"),
        (["prod.toml", "/v1/videos"], "'prod.toml' is no method"),
        (["POST", "v1/videos"], "it must start with '/'"),
        (["--feature", "video", "POST", "/v1/videos"], "METHOD PATH or --feature, not both"),
        (["--cost", "8", "POST", "/v1/videos"], "--cost goes with --feature"),
        (["--cost", "-1", "--feature", "video"], "-1"),
        (["--created-at", "tomorrow", "POST", "/v1/videos"], "got 'tomorrow'; write a date"),
        (["--at", "0001-01-01T00:00:00+14:00", "POST", "/v1/videos"], "write a date"),
        (["--within", "org", "POST", "/v1/videos"], "write NAME=ID"),
        (["--within", "=o7", "POST", "/v1/videos"], "write NAME=ID"),
        (["--account", "", "POST", "/v1/videos"], "account id must not be empty"),
        (["--account", "\udcff", "POST", "/v1/images"], "lone surrogate"),
    ],
)
def test_mistake_is_told_in_one_line(words: list[str], told: str) -> None:
    result = run(EXAMPLE, *words)

    assert result.exit_code == 2
    assert told in result.stderr.splitlines()[-1]


def test_naive_time_is_utc() -> None:
    words = ["--created-at", "2026-11-20T18:00", "--feature", "image"]

    assert as_json(EXAMPLE, *words)["account"]["created_at"] == "2026-11-20T18:00:00Z"


@pytest.mark.parametrize(
    ("duration_us", "told"),
    [
        (0, "0 microseconds"),
        (1, "1 microsecond"),
        (10_000, "10 milliseconds"),
        (1_000_000, "1 second"),
        (8_571_429, "8.571 seconds"),
        (60_000_003, "1 minute"),
        (3_660_000_000, "1 hour 1 minute"),
        (DAY + 5_000_000, "1 day"),
        (13 * DAY - 1, "12 days 23 hours"),
    ],
)
def test_duration_is_told_in_two_units(duration_us: int, told: str) -> None:
    assert spell_about(duration_us) == told


# --- Shadow


def test_cell_in_shadow_is_told_beside_the_one_in_force(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(SHADOWED, "utf-8")

    page = explain(policy, "POST", "/v1/videos")
    cell = as_json(policy, "POST", "/v1/videos")["cell"]

    assert "shadow    5/day: measured beside it on buckets of its own, never enforced" in page
    assert (cell["text"], cell["shadow"]) == ("20/day", "5/day")


def test_nothing_is_said_of_shadow_where_there_is_none() -> None:
    page = explain(EXAMPLE, "--plan", "free", "POST", "/v1/videos")
    cell = as_json(EXAMPLE, "--plan", "free", "POST", "/v1/videos")["cell"]

    assert not any(line.startswith("shadow") for line in page)
    assert cell["shadow"] is None

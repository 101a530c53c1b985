"""What a denied client is told, field by field."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_limiter import Broken, Clock, one_quota
from tieredlimit import Account, Decision, Denied, Limiter, UsageError
from tieredlimit._core.fields import rate_limit_fields
from tieredlimit._core.quota import Quota
from tieredlimit._core.tier import Cell
from tieredlimit.backends import MemoryBackend
from tieredlimit.decision import STATUSES, Reason

if TYPE_CHECKING:
    from starlette.types import Message, Scope

ANN = Account("ann@example.com", within={"org": "secret-org"})
TYPES = "https://iana.org/assignments/http-problem-types#"


async def decide(
    quota: object, *costs: int, messages: dict[str, str] | None = None, outage: str = "allow"
) -> Decision:
    """Return the decision on the last of the costs."""
    document = one_quota(quota)
    document["features"]["image"]["outage"] = outage
    if messages:
        document["tiers"]["everyone"]["messages"] = {"image": messages}
    backend = Broken() if outage == "deny" else MemoryBackend(clock=Clock())
    limiter = Limiter(document, backend)
    for cost in costs:
        decision = await limiter.take(ANN, "image", cost)
    return decision


async def answer(
    decision: Decision,
    *headers: tuple[bytes, bytes],
    scope: Scope | None = None,
    statuses: dict[Reason, int] | None = None,
    legacy_fields: bool = False,
) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("a denial reads nothing")

    app = decision.response(statuses=statuses, legacy_fields=legacy_fields)
    await app(scope or {"type": "http", "headers": list(headers)}, receive, send)
    return sent


async def told(
    decision: Decision, *headers: tuple[bytes, bytes], **options: Any
) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Return status, headers and the body's members."""
    start, body = await answer(decision, *headers, **options)
    names = [name for name, _ in start["headers"]]
    assert len(names) == len(set(names))
    fields = {name.decode(): value.decode() for name, value in start["headers"]}
    assert fields.pop("content-length") == str(len(body["body"]))
    return start["status"], fields, json.loads(body["body"])


class TestDenials:
    async def test_a_used_up_quota(self) -> None:
        decision = await decide([{"rate": "2/minute"}, {"rate": "50/day"}], 2, 1)

        assert await told(decision) == (
            429,
            {
                "content-type": "application/problem+json",
                "cache-control": "no-store",
                "content-language": "en",
                "retry-after": "30",
                "ratelimit-policy": '"image-minute";q=2;w=60',
                "ratelimit": '"image-minute";r=0;t=30',
            },
            {
                "type": f"{TYPES}quota-exceeded",
                "title": "Request cannot be satisfied as assigned quota has been exceeded",
                "status": 429,
                "detail": "The quota for image is used up. Try again in 30 seconds.",
                "violated-policies": ["image-minute"],
                "reason": "quota",
                "feature": "image",
                "tier": "everyone",
                "retry_after": 30,
            },
        )

    async def test_a_cost_that_never_fits_has_no_time(self) -> None:
        status, fields, problem = await told(await decide("2/minute", 3))

        assert status == 429
        assert "retry-after" not in fields
        assert "ratelimit" not in fields
        assert fields["ratelimit-policy"] == '"image-minute";q=2;w=60'
        assert problem["detail"] == "This request costs 3, more than image ever allows at once."
        assert problem["violated-policies"] == ["image-minute"]
        assert problem["retry_after"] is None

    async def test_zero(self) -> None:
        assert await told(await decide(0, 1), legacy_fields=True) == (
            403,
            {
                "content-type": "application/problem+json",
                "cache-control": "no-store",
                "content-language": "en",
                "ratelimit-policy": '"image";q=0',
                "ratelimit": '"image";r=0',
            },
            {
                "type": "about:blank",
                "title": "Forbidden",
                "status": 403,
                "detail": "image is not available to this account.",
                "violated-policies": ["image"],
                "reason": "zero",
                "feature": "image",
                "tier": "everyone",
                "retry_after": None,
            },
        )

    async def test_an_outage(self) -> None:
        decision = await decide("2/minute", 1, outage="deny", messages={"en": "Pay.", "fr": "P."})

        status, fields, problem = await told(decision)

        assert status == 503
        assert 1 <= int(fields["retry-after"]) <= 5
        assert "ratelimit" not in fields
        assert problem == {
            "type": f"{TYPES}temporary-reduced-capacity",
            "title": "Request cannot be satisfied due to temporary server capacity constraints",
            "status": 503,
            "detail": "image cannot be served right now. Please try again in a moment.",
            "violated-policies": [],
            "reason": "outage",
            "feature": "image",
            "tier": "everyone",
            "retry_after": int(fields["retry-after"]),
        }

    async def test_every_reason_to_deny_has_a_status(self) -> None:
        decision = await decide(0, 1)

        for reason, status in STATUSES.items():
            denial = Decision(False, reason, decision.cell, 1).response()
            assert denial.status_code == status
        assert {reason for reason, status in STATUSES.items() if status == 429} == {
            "quota", "pool", "concurrency",
        }  # fmt: skip
        assert {reason for reason, status in STATUSES.items() if status == 403} == {
            "zero", "closed",
        }  # fmt: skip
        assert STATUSES["outage"] == 503

    async def test_no_id_leaves_the_house(self) -> None:
        start, body = await answer(await decide("1/hour", 1, 1), legacy_fields=True)

        for secret in (b"ann@example.com", b"secret-org"):
            assert secret not in body["body"]
            assert all(secret not in value for _, value in start["headers"])

    async def test_no_field_promises_more_than_retry_after(self) -> None:
        decision = await decide(
            [{"rate": "1/day", "capacity": 5, "name": "slow"}, {"rate": "2/minute"}], 2, 2
        )

        _, fields, _ = await told(decision)

        assert fields["retry-after"] == "60"
        assert fields["ratelimit"] == '"image-minute";r=0;t=30'


class TestOptions:
    async def test_statuses_replaces_what_it_names(self) -> None:
        zero, used = await decide(0, 1), await decide("1/hour", 1, 1)
        statuses: dict[Reason, int] = {"zero": 404}

        status, _, problem = await told(zero, statuses=statuses)

        assert (status, problem["status"], problem["title"]) == (404, 404, "Not Found")
        assert (await told(used, statuses=statuses))[0] == 429

    async def test_a_status_without_a_name_is_possible(self) -> None:
        status, _, problem = await told(await decide(0, 1), statuses={"zero": 499})

        assert (status, problem["title"]) == (499, "Denied")

    async def test_legacy_fields_show_the_tightest_denying_quota(self) -> None:
        decision = await decide(["2/minute", "3/hour", "9/day"], 2, 1)

        _, fields, _ = await told(decision, legacy_fields=True)

        assert fields["x-ratelimit-limit"] == "2"
        assert fields["x-ratelimit-remaining"] == "0"
        assert fields["x-ratelimit-reset"] == "30"

    async def test_an_allowed_request_shows_every_quota(self) -> None:
        decision = await decide(["2/minute", {"rate": "3/hour"}], 1)

        assert decision.fields(legacy=True) == [
            (b"ratelimit-policy", b'"image-minute";q=2;w=60, "image-hour";q=3;w=3600'),
            (b"ratelimit", b'"image-minute";r=1;t=30, "image-hour";r=2;t=1200'),
            (b"x-ratelimit-limit", b"2"),
            (b"x-ratelimit-remaining", b"1"),
            (b"x-ratelimit-reset", b"30"),
        ]

    async def test_unlimited_has_no_fields(self) -> None:
        assert (await decide("unlimited", 1)).fields(legacy=True) == []

    async def test_a_full_bucket_has_no_next_token(self) -> None:
        decision = await decide("2/minute", 0)

        assert dict(decision.fields())[b"ratelimit"] == b'"image-minute";r=2'


class TestMessages:
    @pytest.mark.parametrize(
        ("accepted", "language", "text"),
        [
            (None, "en", "Not yet."),
            ("fr-CA, en;q=0.8", "fr", "Pas encore à vous."),
            ("en;q=0.1, fr;q=0.9", "fr", "Pas encore à vous."),
            ("de, *", "en", "Not yet."),
            ("\x00;;;q=x,,", "en", "Not yet."),
        ],
    )
    async def test_the_client_chooses_the_language(
        self, accepted: str | None, language: str, text: str
    ) -> None:
        messages = {"en": "Not yet.", "fr": "Pas encore à vous."}
        decision = await decide(0, 1, messages=messages)
        headers = [(b"Accept-Language", accepted.encode())] if accepted else []

        _, fields, problem = await told(decision, *headers)

        assert problem["detail"] == decision.message(accepted) == text
        assert fields["content-language"] == language
        assert fields["vary"] == "accept-language"

    async def test_repeated_headers_are_one_list(self) -> None:
        decision = await decide(0, 1, messages={"en": "No.", "fr": "Non."})

        _, fields, _ = await told(
            decision, (b"accept-language", b"de"), (b"accept-language", b"fr")
        )

        assert fields["content-language"] == "fr"

    async def test_a_single_text_varies_with_nothing(self) -> None:
        _, fields, problem = await told(await decide(0, 1, messages={"fr": "Non."}))

        assert problem["detail"] == "Non."
        assert fields["content-language"] == "fr"
        assert "vary" not in fields

    async def test_a_text_of_no_language_claims_none(self) -> None:
        document = one_quota(0)
        document["tiers"]["everyone"]["messages"] = {"image": "Nope."}
        decision = await Limiter(document).take(ANN, "image")

        _, fields, problem = await told(decision)

        assert problem["detail"] == "Nope."
        assert "content-language" not in fields

    @pytest.mark.parametrize(
        ("seconds", "words"),
        [
            (1, "1 second"),
            (60, "1 minute"),
            (119, "1 minute 59 seconds"),
            (121, "3 minutes"),
            (5_184, "1 hour 27 minutes"),
            (86_399, "1 day"),
            (90_001, "1 day 2 hours"),
        ],
    )
    async def test_time_to_wait_is_said_as_people_say_it_and_never_too_short(
        self, seconds: int, words: str
    ) -> None:
        decision = await decide(f"1/{seconds} seconds", 1, 1)

        assert decision.message() == f"The quota for image is used up. Try again in {words}."

    async def test_what_is_allowed_has_no_message(self) -> None:
        assert (await decide("1/second", 1)).message() == ""


class TestWebSocket:
    async def test_where_the_server_can_it_gets_the_whole_answer(self) -> None:
        extensions: dict[str, object] = {"websocket.http.response": {}}
        scope: Scope = {"type": "websocket", "headers": [], "extensions": extensions}

        start, body = await answer(await decide(0, 1), scope=scope)

        assert start["type"] == "websocket.http.response.start"
        assert start["status"] == 403
        assert (b"content-type", b"application/problem+json") in start["headers"]
        assert body["type"] == "websocket.http.response.body"
        assert json.loads(body["body"])["reason"] == "zero"

    @pytest.mark.parametrize("extensions", [None, {}, {"tls": {}}])
    async def test_elsewhere_it_is_closed_before_it_is_accepted(
        self, extensions: dict[str, object] | None
    ) -> None:
        scope: Scope = {"type": "websocket", "headers": [], "extensions": extensions}

        sent = await answer(await decide(0, 1), scope=scope)

        assert sent == [{"type": "websocket.close", "code": 1008, "reason": ""}]


class TestRaising:
    async def test_only_a_denial_is_raised(self) -> None:
        allowed, denied = await decide("1/hour", 1), await decide("1/hour", 1, 1)

        allowed.raise_if_denied()
        with pytest.raises(Denied, match=r"image: denied \(quota\) in tier everyone") as caught:
            denied.raise_if_denied()

        assert caught.value.decision is denied

    async def test_what_is_allowed_has_no_denial(self) -> None:
        with pytest.raises(UsageError, match="image was allowed"):
            (await decide("1/hour", 1)).response()


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 3_000_000), st.integers(-10, 300_000_000)),
        min_size=1,
        max_size=3,
    )
)
def test_fields_straight_from_the_debts_are_those_of_the_quotas(
    numbers: list[tuple[int, int, int]],
) -> None:
    quotas = tuple(
        Quota(f"q{i}", "1/day", capacity, interval)
        for i, (capacity, interval, _) in enumerate(numbers)
    )
    debts = [max(0, debt) for _, _, debt in numbers]
    cell = Cell("image", "free", quotas, unlimited=False, messages={})

    decision = Decision(True, "allowed", cell, 1, None, quotas, debts)

    assert decision.fields() == rate_limit_fields(decision.quotas)

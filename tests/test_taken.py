"""Tokens: what another process settles, renews and releases by, and what is none."""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tieredlimit import Account, Limiter, UsageError
from tieredlimit._core.taken import POOL_KIND, Bucket, Taken
from tieredlimit.backends import MemoryBackend

ID = bytes(range(16))
TAG = "tl1:{media-prod:7}"
OWN = Bucket(f"{TAG}:video:free::u1", "", b"own.", 3_000, 60_000)
ORG = Bucket(f"{TAG}:video:free:org:o1", "org", b"org.", 1_000, 90_000)
POOL = Bucket(f"{TAG}:~pool:gpu::0", POOL_KIND, b"gpu.", 500, 10_000)
SLOTS = (
    (f"{TAG}:video:free~lease::u1", 600_000_000),
    (f"{TAG}:~pool:gpu~lease::0", 60_000_000),
)
RECORD = f"{TAG}:~reservation:{ID.hex()}"
TAKEN = Taken(ID, "video", "free", 8, (OWN, ORG, POOL), SLOTS, RECORD)


def document_of(token: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    return document


def token_of(document: object) -> str:
    return urlsafe_b64encode(json.dumps(document).encode()).decode().rstrip("=")


def changed(**parts: object) -> str:
    """Return the token with parts of its document replaced."""
    return token_of({**document_of(TAKEN.token()), **parts})


def with_bucket_at(key: str) -> str:
    return changed(b=[[key, "", "6f776e2e", 3_000, 60_000]])


def with_slot_at(key: str) -> str:
    return changed(s=[[key, 60_000_000]])


IDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)


class TestRoundTrip:
    def test_token_says_all_of_it_and_is_safe_in_a_url(self) -> None:
        token = TAKEN.token()

        assert Taken.read(token, "media-prod") == TAKEN
        assert token.replace("-", "").replace("_", "").isalnum()

    @given(IDS, IDS, st.booleans())
    async def test_token_of_whatever_account_is_read_again(
        self, account: str, org: str, anonymous: bool
    ) -> None:
        quotas = [
            {"rate": "9/hour", "concurrency": 2, "lease": "1 minute"},
            {"rate": "9/day", "per": "org", "concurrency": 5, "lease": "1 minute"},
        ]
        pool = {"rate": "9/minute", "concurrency": 9, "lease": "1 hour"}
        policy = {
            "features": {"video": {"pool": pool}},
            "tiers": {"everyone": {"quotas": {"video": quotas}}},
        }
        limiter = Limiter(policy, MemoryBackend(), namespace="n", shards=64)
        payer = Account(account, within={"org": org}, anonymous=anonymous)

        decision = await limiter.take(payer, "video", settle_within=60)

        assert Taken.read(decision.token, "n") == decision.taken
        assert await limiter.settle(decision.token, 0)
        assert await limiter.leases.renew(decision.token)
        assert await limiter.leases.release(decision.token)

    async def test_token_of_what_charged_nothing_settles_nothing(self) -> None:
        policy = {
            "features": {"image": {"refund_on": [500]}},
            "tiers": {"everyone": {"quotas": {"image": "unlimited"}}},
        }
        limiter = Limiter(policy, MemoryBackend())

        decision = await limiter.take(Account("u1"), "image", settle_within=60)

        assert await limiter.settle(decision.token, 5) is False


OTHER_DOCUMENTS: list[object] = [[], 1, None, "v", {}, {"v": 1}, {"v": 2}]
OTHER_LISTS: list[object] = [None, 5]


class TestWhatIsNone:
    @pytest.mark.parametrize("namespace", ["media", "media-prod-2", "media-pro", "", "*"])
    def test_token_of_another_namespace(self, namespace: str) -> None:
        with pytest.raises(UsageError, match="not of the namespace"):
            Taken.read(TAKEN.token(), namespace)

    @pytest.mark.parametrize(
        "token",
        [
            *("", "=", "a", "!", "{}", "é", "\x00", "\ud800", "A" * 20_000),
            *(token_of(document) for document in OTHER_DOCUMENTS),
            token_of("[" * 5_000),
            urlsafe_b64encode(b"[" * 12_000).decode(),
            urlsafe_b64encode(b'{"v":1,"c":' + b"9" * 6_000 + b"}").decode(),
            urlsafe_b64encode(b"\xff\xfe").decode(),
            TAKEN.token()[:-3],
        ],
    )
    def test_garbage(self, token: str) -> None:
        with pytest.raises(UsageError, match="token"):
            Taken.read(token, "media-prod")

    @pytest.mark.parametrize("token", [None, 1, b"abc", ["a"], {"v": 1}])
    def test_other_types(self, token: Any) -> None:
        with pytest.raises(UsageError, match="a token is a string"):
            Taken.read(token, "media-prod")

    @pytest.mark.parametrize(
        "parts",
        [
            *({"v": value} for value in (2, "1", None)),
            *({"id": value} for value in ("", "00", "0g" * 16, "00" * 17, 5, None)),
            *({"c": value} for value in (-1, 10**9 + 1, 1.0, True, "8", None)),
            *(
                {"b": [[OWN.key, "", "6f776e2e", *steps]]}
                for steps in ((0, 1), (-5, 1), (1, 2**60))
            ),
            *(
                {"b": [[OWN.key, "", tag, 5, 5]]}
                for tag in ("", "6f776e", "6f776e2e00", "zzzzzzzz")
            ),
            *(
                {"b": value}
                for value in (*OTHER_LISTS, "abcde", {"a": 1}, [[OWN.key]], [[1, 2, 3, 4, 5]])
            ),
            *({"s": [[SLOTS[0][0], lease]]} for lease in (0, -1, 1.5, 86_400_000_001, "1", True)),
            *({"s": value} for value in (*OTHER_LISTS, [[]], [[SLOTS[0][0]]], [[1, 1]])),
            {"s": [list(SLOTS[0])] * 65},
            *({"r": value} for value in (*OTHER_LISTS, [])),
            *({"f": 5}, {"t": None}),
        ],
        ids=repr,
    )
    def test_parts_of_another_kind(self, parts: dict[str, object]) -> None:
        with pytest.raises(UsageError, match="is no token"):
            Taken.read(changed(**parts), "media-prod")

    @pytest.mark.parametrize(
        "token",
        [
            # What is in force, and what else stands beside the buckets.
            *(with_bucket_at(key) for key in (f"{TAG}:revision", "tl1:{media-prod}:head", "x", "")),
            # Other namespaces, and other hash tags.
            with_bucket_at("tl1:{media:7}:video:free::u1"),
            with_bucket_at("tl1:{media-prod:8}:video:free::u1"),
            with_slot_at("tl1:{media-prod:8}:video:free~lease::u1"),
            with_bucket_at("tl2:{media-prod:7}:video:free::u1"),
            # What holds something else: slots are no bucket, buckets are no slots.
            *(with_bucket_at(key) for key, _ in SLOTS),
            *(with_slot_at(bucket.key) for bucket in (OWN, POOL)),
            with_bucket_at(RECORD),
            with_slot_at(RECORD),
            with_bucket_at(f"{TAG}:video:free~shadow::u1"),
            # Spelled as no subject is.
            *(
                with_bucket_at(f"{TAG}:video:free::{name}")
                for name in ("", "a b", "a\n", "é", "a" * 99)
            ),
            *(with_bucket_at(OWN.key + tail) for tail in ("\n", "\r\nDEL x", "\x00", ":x", "{x}")),
            # The record is the reservation's own, and never a bucket that it would delete.
            changed(r=OWN.key),
            changed(r=SLOTS[0][0]),
            changed(r=f"{TAG}:~reservation:{'0' * 32}"),
            changed(r=f"tl1:{{media-prod:8}}:~reservation:{ID.hex()}"),
            changed(b=[], s=[]),
        ],
    )
    def test_hostile_keys(self, token: str) -> None:
        with pytest.raises(UsageError, match="not of the namespace"):
            Taken.read(token, "media-prod")


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=80)
    | st.sampled_from([OWN.key, SLOTS[0][0], RECORD, ID.hex(), f"{TAG}:revision"]),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


class TestMutated:
    @given(st.data())
    async def test_mutated_document_is_a_usage_error_or_touches_only_what_takes_leave(
        self, data: st.DataObject
    ) -> None:
        document = document_of(TAKEN.token())
        for _ in range(data.draw(st.integers(1, 3))):
            where: Any = document
            part: Any = data.draw(st.sampled_from(sorted(document)))
            while isinstance(where[part], list) and where[part] and data.draw(st.booleans()):
                where, part = where[part], data.draw(st.integers(0, len(where[part]) - 1))
            where[part] = data.draw(VALUES)

        await self._use(token_of(document))

    @given(st.data())
    async def test_mutated_text_is_a_usage_error_or_touches_only_what_takes_leave(
        self, data: st.DataObject
    ) -> None:
        token = TAKEN.token()
        at = data.draw(st.integers(0, len(token)))
        until = data.draw(st.integers(at, len(token)))

        await self._use(token[:at] + data.draw(st.text(max_size=9)) + token[until:])

    @given(st.text() | st.binary() | VALUES)
    async def test_anything_else_is_a_usage_error(self, token: Any) -> None:
        await self._use(token)

    async def _use(self, token: Any) -> None:
        memory = MemoryBackend()
        policy = {"features": {"video": {}}, "tiers": {"free": {"quotas": {"video": "9/hour"}}}}
        limiter = Limiter(policy, memory, namespace="media-prod")

        for use in (limiter.leases.renew, limiter.leases.release):
            with suppress(UsageError):
                assert not await use(token)
        with suppress(UsageError):
            assert not await limiter.settle(token, 3)
        assert len(memory) == 0

"""Who a token says it is, as far as its signature goes, whatever a stranger writes into one."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from tieredlimit import Account, BackendError, Limiter, TieredLimitMiddleware, UsageError
from tieredlimit.identity import Identify, remember, resolve
from tieredlimit.integrations.jwt import Claims, access_token

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECRET = "s3cret" * 8
PRIVATE = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER = rsa.generate_private_key(public_exponent=65537, key_size=2048)
PEM = PRIVATE.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
OCTETS = {"kty": "oct", "k": base64.urlsafe_b64encode(SECRET.encode()).decode()}
AGE = 3_600


def claims_of(**given: Any) -> dict[str, Any]:
    return {"sub": "u1", "aud": "media", "exp": int(time.time()) + AGE, **given}


def signed(key: Any = SECRET, algorithm: str = "HS256", **given: Any) -> str:
    headers = given.pop("headers", None)
    return jwt.encode(claims_of(**given), key, algorithm, headers=headers)


def part(value: object) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def bearer(token: str) -> HTTPConnection:
    return connection(("authorization", f"Bearer {token}"))


def connection(*headers: tuple[str, str]) -> HTTPConnection:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    return HTTPConnection({"type": "http", "headers": raw})


def by_secret(**options: Any) -> Identify:
    return access_token(SECRET, **{"algorithms": ["HS256"], "audience": "media", **options})


class Provider(jwt.PyJWKClient):
    """Publish keys, and note when and in which thread they are fetched."""

    def __init__(self, **keys: rsa.RSAPrivateKey) -> None:
        super().__init__("https://identity.example/keys")
        self.published = keys
        self.threads: list[threading.Thread] = []
        self.gate = threading.Event()
        self.gate.set()
        self.down = False

    def fetch_data(self) -> Any:
        self.threads.append(threading.current_thread())
        self.gate.wait(10)
        if self.down:
            raise jwt.PyJWKClientConnectionError("nobody is there")
        return published(self.published)


def published(keys: dict[str, rsa.RSAPrivateKey]) -> dict[str, Any]:
    documents = [
        {**jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid}
        for kid, key in keys.items()
    ]
    return {"keys": [{**one, "alg": "RS256", "use": "sig"} for one in documents]}


class TestToken:
    def test_who_a_valid_token_names_is_charged(self) -> None:
        assert by_secret()(bearer(signed())) == Account("u1")

    def test_public_key_verifies_what_its_private_key_signed(self) -> None:
        for key in (PEM, PEM.decode(), PRIVATE.public_key()):
            identify = access_token(key, algorithms=["RS256"], audience="media")

            assert identify(bearer(signed(PRIVATE, "RS256"))) == Account("u1")
            assert identify(bearer(signed(OTHER, "RS256"))) is None

    def test_key_of_a_key_set_verifies_by_its_own_algorithm(self) -> None:
        document = published({"k1": PRIVATE})["keys"][0]
        identify = access_token(
            jwt.PyJWK(document), algorithms=["RS256", "RS512"], audience="media"
        )

        assert identify(bearer(signed(PRIVATE, "RS256"))) == Account("u1")
        assert identify(bearer(signed(PRIVATE, "RS512"))) is None

    def test_key_of_a_key_set_that_names_no_algorithm_is_for_all_of_its_type(self) -> None:
        rsa, octets = ({**one} for one in (published({"k1": PRIVATE})["keys"][0], OCTETS))
        del rsa["alg"]
        allowed = ["RS512", "PS256", "ES256"]
        by_rsa = access_token(jwt.PyJWK(rsa), algorithms=allowed, audience="media")
        by_octets = access_token(jwt.PyJWK(octets), algorithms=["HS384"], audience="media")
        chosen = jwt.PyJWK(rsa, algorithm="PS256")
        by_chosen = access_token(chosen, algorithms=allowed, audience="media")

        found = [by_rsa(bearer(signed(PRIVATE, name))) for name in ("RS512", "PS256", "RS256")]

        assert found == [Account("u1"), Account("u1"), None]
        assert by_octets(bearer(signed(SECRET, "HS384"))) == Account("u1")
        assert by_chosen(bearer(signed(PRIVATE, "PS256"))) == Account("u1")
        assert by_chosen(bearer(signed(PRIVATE, "RS512"))) is None
        with pytest.raises(UsageError, match="the key is for HS256, HS384, HS512, algorithms are"):
            access_token(jwt.PyJWK(octets), algorithms=["RS256"], audience="media")

    @pytest.mark.parametrize(
        ("options", "given"),
        [
            ({"audience": "other"}, {}),
            ({"audience": ["other", "another"]}, {}),
            ({"issuer": "https://id"}, {"iss": "https://evil"}),
            ({"issuer": "https://id"}, {}),
            ({}, {"exp": int(time.time()) - 10}),
            ({}, {"exp": None}),
            ({}, {"exp": "soon"}),
            ({}, {"nbf": int(time.time()) + AGE}),
            ({"algorithms": ["HS384"]}, {}),
            ({"audience": None}, {}),
            ({"audience": None}, {"aud": ["media"]}),
            ({}, {"sub": None}),
            ({}, {"sub": ""}),
            ({"claims": Claims(id="email")}, {}),
        ],
    )
    def test_token_that_is_not_meant_or_not_in_time_is_nobody(
        self, options: dict[str, Any], given: dict[str, Any]
    ) -> None:
        assert by_secret(**options)(bearer(signed(**given))) is None

    def test_token_that_never_ends_and_one_that_is_too_long_are_nobody(self) -> None:
        endless = {name: value for name, value in claims_of().items() if name != "exp"}
        fits, too_long = (signed(filler="x" * length) for length in (5_000, 8_000))

        assert by_secret()(bearer(jwt.encode(endless, SECRET))) is None
        assert by_secret()(bearer(fits)) == Account("u1")
        assert by_secret()(bearer(too_long)) is None

    def test_token_that_names_nobody_is_valid_where_no_audience_is_given(self) -> None:
        anybody = {name: value for name, value in claims_of().items() if name != "aud"}

        for token in (jwt.encode(anybody, SECRET), signed(aud=[])):
            assert by_secret(audience=None)(bearer(token)) == Account("u1")
        assert by_secret()(bearer(jwt.encode(anybody, SECRET))) is None

    def test_why_it_is_not_valid_can_be_looked_up_and_nothing_of_it_is_told(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG, "tieredlimit")
        late, foreign = signed(exp=int(time.time()) - 10), signed(aud="other")

        assert [by_secret()(bearer(one)) for one in (late, foreign, "x.y.z")] == [None] * 3

        reasons = [one.rpartition(": ")[2] for one in caplog.messages]
        assert reasons == ["ExpiredSignatureError", "InvalidAudienceError", "DecodeError"]
        assert all(part not in caplog.text for one in (late, foreign) for part in one.split("."))

    def test_issuer_is_compared_as_a_whole(self) -> None:
        assert by_secret(issuer="https://id")(bearer(signed(iss="https://"))) is None

    def test_one_of_several_audiences_and_issuers_is_enough(self) -> None:
        identify = by_secret(audience=["web", "media"], issuer=["https://a", "https://b"])

        assert identify(bearer(signed(iss="https://b"))) == Account("u1")

    def test_clocks_may_differ_by_the_leeway(self) -> None:
        late = signed(exp=int(time.time()) - 10)

        assert by_secret(leeway=60)(bearer(late)) == Account("u1")
        assert by_secret(leeway=60)(bearer(late)) == Account("u1")

    def test_token_may_be_in_another_header_or_a_cookie(self) -> None:
        token = signed()
        bare = by_secret(header="X-Token", scheme=None)
        cookie = by_secret(header=None, cookie="access")

        assert bare(connection(("x-token", token))) == Account("u1")
        assert cookie(connection(("cookie", f"a=b; access={token}"))) == Account("u1")
        assert cookie(bearer(token)) is None
        assert by_secret()(connection(("cookie", f"access={token}"))) is None

    def test_header_comes_before_the_cookie(self) -> None:
        identify = by_secret(cookie="access")
        mine, yours = signed(sub="mine"), signed(sub="yours")
        cookie = ("cookie", f"access={yours}")

        assert identify(connection(("authorization", f"bearer {mine}"), cookie)) == Account("mine")
        assert identify(connection(("authorization", "Basic abc"), cookie)) == Account("yours")
        assert identify(connection(cookie)) == Account("yours")

    def test_token_that_is_there_twice_with_differing_values_is_nobody(self) -> None:
        mine, yours = signed(sub="mine"), signed(sub="yours")
        headers = [("authorization", f"Bearer {token}") for token in (mine, yours)]

        assert by_secret()(connection(*headers)) is None
        assert (
            by_secret(cookie="access")(connection(*headers, ("cookie", f"access={mine}"))) is None
        )

    @pytest.mark.parametrize("together", [True, False])
    def test_cookie_that_is_there_twice_is_the_one_that_starlette_serves(
        self, together: bool
    ) -> None:
        identify = by_secret(header=None, cookie="access")
        values = [f"access={signed(sub=name)}" for name in ("mine", "yours")]
        lines = ["; ".join(values)] if together else values
        given = connection(*(("cookie", line) for line in lines))

        served = f"access={given.cookies['access']}"

        assert served == values[1]
        assert identify(given) == Account("yours")
        assert identify(connection(("cookie", f"{lines[-1]}; access="))) is None


class TestStrangers:
    @pytest.mark.parametrize(
        "algorithm", ["none", "None", "NONE", "HS256", "hs256", "", None, 7, []]
    )
    def test_token_that_chooses_its_own_algorithm_is_nobody(self, algorithm: object) -> None:
        identify = access_token(PEM, algorithms=["RS256"], audience="media")
        head, body = part({"alg": algorithm, "typ": "JWT"}), part(claims_of())
        signature = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(
            f"{head}.{body}".encode(), PEM
        )

        assert identify(bearer(f"{head}.{body}.")) is None
        assert identify(bearer(f"{head}.{body}.{part(signature)}")) is None

    @pytest.mark.parametrize(
        "token",
        [
            "x",
            "..",
            "a.b.c",
            "é" * 10,
            "a" * 100_000,
            part({"alg": "HS256"}),
            f"{part({'alg': 'HS256', 'crit': ['x']})}.e30.e30",
            f"{part({'alg': 'HS256', 'b64': False, 'crit': ['b64']})}.e30.e30",
            f"{part({'alg': 'HS256', 'kid': {}})}.e30.e30",
            f"{part(b'[' * 5_000)}.e30.e30",
            f"{part([])}.e30.e30",
            f"{part(b'9' * 5_000)}.e30.e30",
        ],
    )
    def test_what_is_no_token_is_nobody(self, token: str) -> None:
        assert by_secret()(bearer(token)) is None

    @given(st.text(st.characters(max_codepoint=255), max_size=200))
    def test_any_text_is_nobody_and_raises_nothing(self, text: str) -> None:
        assert by_secret()(connection(("authorization", f"Bearer {text}"))) is None

    @given(position=st.integers(0, 10_000), letter=st.sampled_from("abcXYZ019-_.= "))
    def test_token_with_another_letter_is_nobody_or_the_same(
        self, position: int, letter: str
    ) -> None:
        token = signed()
        at = position % len(token)

        found = by_secret()(bearer(token[:at] + letter + token[at + 1 :]))

        # The last letter of a base64 text has bits that mean nothing.
        assert found is None or found == Account("u1")
        assert found is None or letter == token[at] or at == len(token) - 1

    async def test_invalid_token_may_be_refused_with_401_while_none_is_nobody(self) -> None:
        document = {
            "features": {"image": {"routes": ["GET /"]}},
            "tiers": {"all": {"quotas": {"image": "9/hour"}}},
        }

        async def handler(request: Request) -> PlainTextResponse:
            return PlainTextResponse((await request.state.tieredlimit.account()).id)

        app = Starlette(routes=[Route("/", handler)])
        app.add_middleware(
            TieredLimitMiddleware,
            limiter=Limiter(document),
            identify=by_secret(refuse_invalid=True),
        )
        transport = httpx.ASGITransport(app, client=("192.0.2.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://media") as client:
            answers = [
                await client.get("/", headers=headers)
                for headers in (
                    {"authorization": f"Bearer {signed()}"},
                    {"authorization": "Bearer x.y.z"},
                    {"authorization": f"Bearer {'a' * 9_000}"},
                    {},
                )
            ]

        assert [answer.status_code for answer in answers] == [200, 401, 401, 200]
        assert [answers[0].text, answers[3].text] == ["u1", "192.0.2.1"]
        assert answers[1].headers["www-authenticate"] == 'Bearer error="invalid_token"'


class TestClaims:
    def test_claims_say_plan_age_tags_and_org(self) -> None:
        made = int(datetime(2026, 1, 9, tzinfo=UTC).timestamp())
        token = signed(plan="pro", created_at=made, tags=["beta"], org="o7")

        account = by_secret()(bearer(token))

        assert account == Account(
            "u1",
            plan="pro",
            created_at=datetime(2026, 1, 9, tzinfo=UTC),
            tags=frozenset({"beta"}),
            within={"org": "o7"},
        )

    def test_who_it_is_may_be_a_whole_number(self) -> None:
        assert by_secret()(bearer(signed(sub=7))) == Account("7")

    def test_claims_may_have_other_names_and_stand_within_others(self) -> None:
        claims = Claims(
            id="https://media.example/account",
            plan=("app_metadata", "plan"),
            created_at=("app_metadata", "since"),
            tags="scope",
            within={"team": "team", "org": ("app_metadata", "org")},
        )
        given: dict[str, Any] = {
            "https://media.example/account": 17,
            "scope": "read write",
            "team": "t1",
            "app_metadata": {"plan": "team", "since": "2026-01-09T12:00:00.5+02:00", "org": 7},
        }

        account = by_secret(claims=claims)(bearer(signed(**given)))

        assert account == Account(
            "17",
            plan="team",
            created_at=datetime(2026, 1, 9, 10, 0, 0, 500_000, tzinfo=UTC),
            tags=frozenset({"read", "write"}),
            within={"team": "t1", "org": "7"},
        )

    @pytest.mark.parametrize("missing", [{}, {"app_metadata": None}, {"app_metadata": "text"}])
    def test_claim_that_is_not_there_is_unknown(self, missing: dict[str, Any]) -> None:
        claims = Claims(plan=("app_metadata", "plan"), tags=None, created_at=None, within={})

        assert claims.account({"sub": "u1", **missing}) == Account("u1", tags=frozenset())

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"plan": 7}, "'plan' must be a string, got int"),
            ({"created_at": "yesterday"}, "'created_at' must be RFC 3339 or seconds"),
            ({"created_at": "2026-01-09"}, "'created_at' must be RFC 3339"),
            ({"created_at": "2026-01-09T25:00:00Z"}, "'created_at' must be RFC 3339"),
            ({"created_at": 1_790_000_000_000}, "'created_at' must be RFC 3339 or seconds"),
            ({"created_at": 10**400}, "'created_at' must be"),
            ({"created_at": True}, "'created_at' must be"),
            ({"tags": [1]}, "'tags' must be a list of strings"),
            ({"tags": {"a": 1}}, "'tags' must be a list of strings"),
            ({"sub": ["u1"]}, "'sub' must be a string or a whole number, got list"),
            ({"sub": True}, "'sub' must be a string or a whole number, got bool"),
            ({"org": ["o7"]}, "'org' must be a string or a whole number, got list"),
        ],
    )
    def test_claim_that_cannot_be_read_is_named_and_not_quoted(
        self, given: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(UsageError, match=said):
            by_secret()(bearer(signed(**given)))

    async def test_function_of_ones_own_makes_the_account_now_or_later(self) -> None:
        async def later(claims: Any) -> Account:
            await asyncio.sleep(0)
            return Account(claims["sub"], plan="pro")

        token = signed()
        now = by_secret(claims=lambda claims: Account(claims["sub"], plan="pro"))
        asked = by_secret(claims=later)

        for _ in range(2):
            assert now(bearer(token)) == Account("u1", plan="pro")
            assert await resolve(asked(bearer(token))) == Account("u1", plan="pro")

    async def test_plan_may_come_from_a_lookup_that_is_remembered(self) -> None:
        asked = []

        async def billing(name: str) -> Account:
            asked.append(name)
            return Account(name, plan="pro")

        lookup = remember(billing)
        identify = by_secret(claims=lambda claims: lookup(claims["sub"]))

        for _ in range(3):
            assert await resolve(identify(bearer(signed()))) == Account("u1", plan="pro")
        assert asked == ["u1"]


class TestVerifiedOnce:
    @pytest.fixture
    def decoded(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        decoded: list[str] = []
        decode = jwt.decode

        def counting(token: str, *args: Any, **options: Any) -> Any:
            decoded.append(token)
            return decode(token, *args, **options)

        monkeypatch.setattr(jwt, "decode", counting)
        return decoded

    def test_valid_token_is_verified_once_and_an_invalid_one_each_time(
        self, decoded: list[str]
    ) -> None:
        identify = by_secret()
        valid, invalid = signed(), signed("another-s3cret" * 4)

        for _ in range(3):
            assert identify(bearer(valid)) == Account("u1")
            assert identify(bearer(invalid)) is None

        assert (decoded.count(valid), decoded.count(invalid)) == (1, 3)

    @pytest.mark.parametrize(("age", "kept"), [(60, 60), (AGE, 300)])
    def test_it_is_verified_again_at_its_end_and_after_five_minutes(
        self, decoded: list[str], age: int, kept: int
    ) -> None:
        start = time.time()
        now = [start]
        identify = by_secret(clock=lambda: now[0])
        token = signed(exp=int(start) + age)

        identify(bearer(token))
        now[0] = int(start) + kept - 1
        identify(bearer(token))
        before = len(decoded)
        now[0] = start + kept
        identify(bearer(token))

        assert (before, len(decoded)) == (1, 2)

    @pytest.mark.parametrize(
        "end_at",
        [lambda now: now + 10**400, lambda now: now + 1e300, lambda now: str(now + AGE)],
        ids=["beyond a float", "float", "text"],
    )
    def test_end_may_be_any_number(self, end_at: Callable[[int], Any]) -> None:
        identify = by_secret()
        token = signed(exp=end_at(int(time.time())))

        assert [identify(bearer(token)) for _ in range(2)] == [Account("u1")] * 2

    def test_no_more_tokens_are_kept_than_was_said(self, decoded: list[str]) -> None:
        identify = by_secret(most=2)
        tokens = [signed(sub=f"u{i}") for i in range(3)]

        for token in [*tokens, tokens[0]]:
            identify(bearer(token))

        assert len(decoded) == 4


class TestKeySet:
    def identify(self, provider: Provider) -> Identify:
        return access_token(provider, algorithms=["RS256"], audience="media")

    def token(self, kid: str | None = "k1", key: Any = PRIVATE, sub: str = "u1") -> str:
        return signed(key, "RS256", headers={} if kid is None else {"kid": kid}, sub=sub)

    async def test_keys_are_fetched_once_and_never_on_the_event_loops_thread(self) -> None:
        provider = Provider(k1=PRIVATE)
        identify = self.identify(provider)
        tokens = [self.token() for _ in range(20)]

        found = await asyncio.gather(*(resolve(identify(bearer(token))) for token in tokens))

        assert found == [Account("u1")] * 20
        assert len(provider.threads) == 1
        assert provider.threads[0] is not threading.current_thread()
        assert identify(bearer(self.token(key=OTHER))) is None

    async def test_loop_goes_on_while_keys_are_fetched_and_who_leaves_leaves(self) -> None:
        provider = Provider(k1=PRIVATE)
        provider.gate.clear()
        identify = self.identify(provider)
        first, second = (
            asyncio.ensure_future(resolve(identify(bearer(self.token())))) for _ in range(2)
        )
        await asyncio.sleep(0)

        first.cancel()
        await asyncio.wait([first])
        provider.gate.set()

        assert await second == Account("u1")
        assert len(provider.threads) == 1

    async def test_names_of_keys_that_nobody_has_do_not_make_us_ask_each_time(self) -> None:
        provider = Provider(k1=PRIVATE)
        identify = self.identify(provider)

        found = [await resolve(identify(bearer(self.token(f"x{i}", OTHER)))) for i in range(50)]

        assert found == [None] * 50
        assert len(provider.threads) == 1
        assert await resolve(identify(bearer(self.token()))) == Account("u1")

    @pytest.mark.parametrize("kid", [None, "", "x" * 300])
    async def test_token_without_a_usable_name_of_a_key_asks_nobody(self, kid: str | None) -> None:
        provider = Provider(k1=PRIVATE)

        assert self.identify(provider)(bearer(self.token(kid))) is None
        assert provider.threads == []

    async def test_new_key_is_fetched_when_a_token_names_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = _monotonic(monkeypatch)
        provider = Provider(k1=PRIVATE)
        identify = self.identify(provider)
        await resolve(identify(bearer(self.token())))
        provider.published["k2"] = OTHER

        early = await resolve(identify(bearer(self.token("k2", OTHER))))
        now[0] += 10
        late = await resolve(identify(bearer(self.token("k2", OTHER))))

        assert (early, late) == (None, Account("u1"))

    async def test_keys_stay_while_nobody_answers_and_go_once_somebody_does(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = _monotonic(monkeypatch)
        provider = Provider(k1=PRIVATE)
        identify = self.identify(provider)
        await resolve(identify(bearer(self.token())))
        provider.published = {"k2": OTHER}
        provider.down = True
        now[0] += 400

        assert identify(bearer(self.token())) == Account("u1")  # who fetches is not waited for
        for _ in range(2):
            with pytest.raises(BackendError, match="not be fetched: PyJWKClientConnectionError"):
                await resolve(identify(bearer(self.token("k2", OTHER))))
        provider.down = False
        now[0] += 10

        assert await resolve(identify(bearer(self.token("k2", OTHER)))) == Account("u1")
        assert identify(bearer(self.token(sub="u2"))) is None

    async def test_fetch_that_fails_is_logged_and_the_tokens_behind_it_are_not(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        now = _monotonic(monkeypatch)
        provider = Provider(k1=PRIVATE)
        identify: Any = self.identify(provider)
        await resolve(identify(bearer(self.token())))
        provider.down = True
        now[0] += 300

        assert identify(bearer(self.token(sub="u2"))) == Account("u2")
        await asyncio.wait(identify._keys._fetching.values())
        for i in range(20):
            assert identify(bearer(self.token(sub=f"u{i}"))) == Account(f"u{i}")
            with pytest.raises(BackendError):
                await resolve(identify(bearer(self.token(f"x{i}", OTHER))))

        (line,) = caplog.messages
        assert "could not be fetched: PyJWKClientConnectionError" in line
        assert len(provider.threads) == 2

    async def test_key_that_names_no_algorithm_verifies_by_all_of_its_type(self) -> None:
        class Unnamed(Provider):
            def fetch_data(self) -> Any:
                (one,) = super().fetch_data()["keys"]
                return {"keys": [{name: one[name] for name in one if name != "alg"}]}

        allowed = ["RS512", "PS256"]
        identify = access_token(Unnamed(k1=PRIVATE), algorithms=allowed, audience="media")

        for name in allowed:
            token = signed(PRIVATE, name, headers={"kid": "k1"})
            assert await resolve(identify(bearer(token))) == Account("u1")

    async def test_old_keys_are_fetched_anew_without_anybody_waiting(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = _monotonic(monkeypatch)
        provider = Provider(k1=PRIVATE)
        identify: Any = self.identify(provider)
        await resolve(identify(bearer(self.token())))
        now[0] += 300

        assert identify(bearer(self.token(sub="u2"))) == Account("u2")
        (fetching,) = identify._keys._fetching.values()
        await fetching

        assert len(provider.threads) == 2

    async def test_where_no_key_could_be_fetched_no_decision_is_made(self) -> None:
        provider = Provider(k1=PRIVATE)
        provider.down = True
        identify = self.identify(provider)

        for _ in range(3):
            with pytest.raises(BackendError, match="could not be fetched"):
                await resolve(identify(bearer(self.token())))

        assert len(provider.threads) == 1

    def test_child_of_a_fork_waits_for_no_lock_and_no_fetch_of_the_parent(self) -> None:
        program = """
import asyncio, os, signal, threading, warnings
from tests.test_jwt import OTHER, PRIVATE, Provider, TestKeySet, bearer
from tieredlimit import Account
from tieredlimit.identity import resolve

# Python warns of what is tested here, from 3.12 on.
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
provider = Provider(k1=PRIVATE)
identify, token = TestKeySet().identify(provider), TestKeySet().token

async def ask(*names):
    return [await resolve(identify(bearer(token(name)))) for name in names]

async def fetch():
    asking = asyncio.ensure_future(ask("x0"))
    while len(provider.threads) < 2:
        await asyncio.sleep(0)
    return asking

def works_in_the_child():
    signal.alarm(20)  # what waits for ever ends with a signal
    provider.gate = threading.Event()
    provider.gate.set()
    found = asyncio.run(ask("k1", "x1", "x2", "x3"))
    return found == [Account("u1"), None, None, None] and len(provider.threads) == 3

loop = asyncio.new_event_loop()
loop.run_until_complete(ask("k1"))
provider.gate.clear()
identify._keys._next_fetch = 0.0  # as if it were long ago
asking = loop.run_until_complete(fetch())
with identify._lock, identify._keys._lock:
    child = os.fork()
    if not child:
        os._exit(0 if works_in_the_child() else 1)
assert os.waitpid(child, 0)[1] == 0
provider.gate.set()
loop.run_until_complete(asking)
loop.run_until_complete(loop.shutdown_default_executor())
loop.close()
"""

        done = subprocess.run(
            [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60
        )

        assert (done.returncode, done.stderr) == (0, "")

    async def test_key_that_is_not_for_signatures_verifies_none(self) -> None:
        class Encrypting(Provider):
            def fetch_data(self) -> Any:
                return {"keys": [{**one, "use": "enc"} for one in super().fetch_data()["keys"]]}

        assert await resolve(self.identify(Encrypting(k1=PRIVATE))(bearer(self.token()))) is None

    async def test_keys_come_over_http(self, key_server: str) -> None:
        identify = access_token(
            jwt.PyJWKClient(f"{key_server}/keys"), algorithms=["RS256"], audience="media"
        )

        assert await resolve(identify(bearer(self.token()))) == Account("u1")


@pytest.fixture
def key_server() -> Iterator[str]:
    class Keys(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(published({"k1": PRIVATE})).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Keys) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _monotonic(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the keys' clock stand still."""
    now = [1_000.0]

    class Frozen:
        @staticmethod
        def monotonic() -> float:
            return now[0]

    monkeypatch.setattr("tieredlimit.integrations._jwt_keys.time", Frozen)
    return now


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"algorithms": []}, "must be a list such as"),
        ({"algorithms": "HS256"}, "must be a list such as"),
        ({"algorithms": ["none"]}, "must be such as sign a token, got 'none'"),
        ({"algorithms": ["HS256", "None"]}, "must be such as sign"),
        ({"algorithms": ["HS255"]}, "unknown algorithm 'HS255'"),
        ({"algorithms": ["HS256", "RS256"]}, "do not mix"),
        ({"key": "no key at all", "algorithms": ["RS256"]}, "the key does not go with RS256"),
        ({"key": PEM}, "the key does not go with HS256"),
        ({"key": PEM, "algorithms": ["RS256", "ES256"]}, "does not go with ES256"),
        ({"key": jwt.PyJWK(published({"k": PRIVATE})["keys"][0])}, "the key is for RS256"),
        ({"header": None}, "give a header or a cookie"),
        ({"header": "a b"}, "header must be an HTTP token"),
        ({"cookie": "a;b"}, "cookie must be an HTTP token"),
        ({"leeway": -1}, "leeway must be from 0"),
        ({"leeway": float("nan")}, "leeway must be from 0"),
        ({"most": 0}, "most must be from 1"),
        ({"claims": {"id": "sub"}}, "claims must be Claims"),
    ],
)
def test_bounds_are_checked_at_once(options: dict[str, Any], said: str) -> None:
    arguments = {"key": SECRET, "algorithms": ["HS256"], "audience": None, **options}

    with pytest.raises(UsageError, match=said) as caught:
        access_token(arguments.pop("key"), **arguments)
    assert "no key at all" not in str(caught.value)

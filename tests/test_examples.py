"""The media API that newcomers read first, run as its first line says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

from examples.demo_server import CHECKOUT, MediaServer
from tieredlimit import Policy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

POLICY = CHECKOUT / "examples" / "policy.toml"
DEMO_POLICY = CHECKOUT / "examples" / "demo.toml"
LIMIT_FIELDS = {"ratelimit", "ratelimit-policy", "retry-after"}
PAGE = "https://studio.example"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLICY", "REDIS", "NAMESPACE", "ENABLED"):
        monkeypatch.delenv(f"TIEREDLIMIT_{name}", raising=False)


@pytest.fixture
def api() -> Iterator[httpx.Client]:
    """The media API with fresh buckets in memory."""
    with MediaServer({}) as server, client_of(server) as client:
        yield client


def client_of(server: MediaServer) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=10.0, trust_env=False)


def key(name: str) -> dict[str, str]:
    return {"X-Api-Key": f"key-{name}"}


def address(host: str) -> dict[str, str]:
    # uvicorn believes a proxy on its own machine, which is what the test's client looks like.
    return {"X-Forwarded-For": host}


@pytest.mark.parametrize("paths", [[POLICY], [POLICY, DEMO_POLICY]], ids=["policy", "demo"])
def test_the_policy_warns_of_hd_videos_for_free_accounts_and_of_nothing_else(
    paths: list[Path],
) -> None:
    policy = Policy.load(*paths)

    assert [warning.path for warning in policy.warnings] == ["tiers.free.quotas.video"]
    assert "costs 8" in policy.warnings[0].message


def test_each_tier_gets_its_own_answers(api: httpx.Client) -> None:
    statuses = {
        (name, path): api.post(path, headers=headers).status_code
        for name, headers in [("anonymous", {}), *((n, key(n)) for n in ("ada", "nova", "grace"))]
        for path in ("/v1/images", "/v1/images/7/variations", "/v1/videos", "/v1/videos/hd")
    }

    assert statuses == {
        ("anonymous", "/v1/images"): 201,
        ("anonymous", "/v1/images/7/variations"): 201,
        ("anonymous", "/v1/videos"): 403,
        ("anonymous", "/v1/videos/hd"): 403,
        ("ada", "/v1/images"): 201,
        ("ada", "/v1/images/7/variations"): 201,
        ("ada", "/v1/videos"): 202,
        ("ada", "/v1/videos/hd"): 429,
        ("nova", "/v1/images"): 201,
        ("nova", "/v1/images/7/variations"): 201,
        ("nova", "/v1/videos"): 403,
        ("nova", "/v1/videos/hd"): 403,
        ("grace", "/v1/images"): 201,
        ("grace", "/v1/images/7/variations"): 201,
        ("grace", "/v1/videos"): 202,
        ("grace", "/v1/videos/hd"): 202,
    }


@pytest.mark.parametrize(
    ("accepted", "language", "message"),
    [
        ("en", "en", "Video is not yet open to new accounts. Images are."),
        (
            "fr-CH, en;q=0.5",
            "fr",
            "La vidéo n'est pas encore ouverte aux nouveaux comptes. Les images le sont.",
        ),
    ],
)
def test_a_new_account_reads_why_it_has_no_video(
    api: httpx.Client, accepted: str, language: str, message: str
) -> None:
    denial = api.post("/v1/videos", headers={**key("nova"), "Accept-Language": accepted})

    assert denial.status_code == 403
    assert denial.headers["content-type"] == "application/problem+json"
    assert denial.headers["content-language"] == language
    assert denial.json()["detail"] == message
    assert "retry-after" not in denial.headers


@pytest.mark.fault("C4")
def test_no_two_callers_share_tokens(api: httpx.Client) -> None:
    # Each empties what it has of images; whoever shared with one before would find less.
    callers = {"ada": (key("ada"), 20), "nova": (key("nova"), 5)}
    callers |= {f"192.0.2.{i}": (address(f"192.0.2.{i}"), 2) for i in range(20)}
    callers |= {f"2001:db8:{i}::1": (address(f"2001:db8:{i}::1"), 2) for i in range(20)}

    made = {
        name: [api.post("/v1/images", headers=headers).status_code for _ in range(tokens + 1)]
        for name, (headers, tokens) in callers.items()
    }

    assert made == {name: [201] * tokens + [429] for name, (_, tokens) in callers.items()}


@pytest.mark.fault("C4")
def test_two_accounts_of_an_org_share_the_quota_of_the_org_and_nothing_else(
    api: httpx.Client,
) -> None:
    first = api.post("/v1/videos/hd", headers=key("grace"))
    second = api.post("/v1/videos", headers=key("linus"))

    assert first.headers["ratelimit"] == '"video-day";r=12;t=432, "video-day-org";r=4992;t=18'
    assert second.headers["ratelimit"].startswith('"video-day";r=19;')
    assert '"video-day-org";r=4991;' in second.headers["ratelimit"]


def test_a_key_that_nobody_has_is_charged_by_its_address(api: httpx.Client) -> None:
    made = [
        api.post("/v1/images", headers={**key(name), **address("192.0.2.1")}).status_code
        for name in ("mallory", "trudy", "")
    ]

    assert made == [201, 201, 429]


def test_usage_shows_what_is_left_and_consumes_nothing(api: httpx.Client) -> None:
    api.post("/v1/images", headers=key("nova"))

    usages = [api.get("/v1/usage", headers=key("nova")).json() for _ in range(10)]

    expected = {
        "image": {"allowed": True, "remaining": {"image-minute": 4, "image-day": 49}},
        "video": {"allowed": False, "remaining": {}},
    }
    assert usages == [expected] * 10


def test_usage_is_that_of_whoever_asks(api: httpx.Client) -> None:
    api.post("/v1/images", headers=address("192.0.2.1"))

    left = {
        host: api.get("/v1/usage", headers=address(host)).json()["image"]["remaining"]
        for host in ("192.0.2.1", "192.0.2.2")
    }

    assert left == {"192.0.2.1": {"image-minute": 1}, "192.0.2.2": {"image-minute": 2}}


@pytest.mark.parametrize("path", ["/health", "/v1/usage", "/v1/nowhere"])
def test_routes_that_the_policy_does_not_name_carry_no_fields(api: httpx.Client, path: str) -> None:
    response = api.get(path)

    assert not LIMIT_FIELDS.intersection(response.headers)


@pytest.mark.fault("E11")
@pytest.mark.parametrize(
    ("name", "path", "status"), [("nova", "/v1/videos", 403), ("ada", "/v1/videos/hd", 429)]
)
def test_a_page_of_another_origin_can_read_a_denial(
    api: httpx.Client, name: str, path: str, status: int
) -> None:
    denial = api.post(path, headers={**key(name), "Origin": PAGE})

    exposed = denial.headers["access-control-expose-headers"].lower().split(", ")
    assert denial.status_code == status
    assert denial.headers["access-control-allow-origin"] in ("*", PAGE)
    assert set(exposed) >= LIMIT_FIELDS


def test_a_preflight_lets_the_key_through_and_charges_nobody(api: httpx.Client) -> None:
    asked = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "x-api-key",
    }

    preflights = [api.options("/v1/images", headers=asked) for _ in range(5)]
    image = api.post("/v1/images")

    assert {preflight.status_code for preflight in preflights} == {200}
    assert "x-api-key" in preflights[0].headers["access-control-allow-headers"].lower()
    assert '"image-minute";r=1;' in image.headers["ratelimit"]


def test_two_processes_share_buckets_on_redis(redis_url: str) -> None:
    shared = {"TIEREDLIMIT_REDIS": redis_url}
    with (
        MediaServer(shared) as one,
        MediaServer(shared) as other,
        client_of(one) as first,
        client_of(other) as second,
    ):
        made = [client.post("/v1/images").status_code for client in (first, second, first)]

    assert made == [201, 201, 429]


def test_the_environment_names_another_policy(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(
        'features.image.routes = ["POST /v1/images"]\ntiers.all.quotas.image = "unlimited"\n'
    )
    with MediaServer({"TIEREDLIMIT_POLICY": str(policy)}) as server, client_of(server) as client:
        made = {client.post("/v1/images").status_code for _ in range(5)}

    assert made == {201}

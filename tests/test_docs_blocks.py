"""Every fenced block of every page runs, loads or is read: none escapes.

A page whose blocks have a test of their own is named in `CLAIMED`; all others are played here, by
what their fence says they hold. Python blocks of a page run in order and share their names, in a
folder that holds the README's policy as `policy.toml`.
"""

from __future__ import annotations

import ast
import asyncio
import fnmatch
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import yaml
from click.testing import CliRunner

from tests import test_readme
from tests.fences import ROOT, Block, blocks, pages
from tests.servers import RedisServer
from tieredlimit import Policy
from tieredlimit._core.overlay import overlay
from tieredlimit.cli import main

CLAIMED: Mapping[str, Mapping[str, str]] = {
    "README.md": dict.fromkeys(("toml", "python", "http", "console"), "test_readme"),
    "docs/policy.md": {"toml": "test_readme"},
    "docs/capacity.md": {"toml": "test_capacity_docs", "python": "test_capacity_docs"},
    "docs/handbook.md": {"console": "test_docs_consoles"},
    "docs/commands.md": {"console": "test_docs_consoles"},
    "docs/usage.md": {"python": "test_usage", "json": "test_usage"},
    "docs/clients.md": {"python": "test_clients"},
    "docs/identities.md": {"python": "test_identities_docs"},
    "docs/frameworks/*.md": {"*": "test_frameworks"},
    "docs/coming-from/django-ratelimit.md": {"*": "test_coming_from_django"},
    "docs/coming-from/*.md": {"*": "test_coming_from"},
}
"""Per page, or pattern of pages, which test plays the blocks of a language (`*`: of any)."""

ALL = [block for page in pages() for block in blocks(page)]
_SOURCE = "".join(path.read_text("utf-8") for path in sorted((ROOT / "tieredlimit").rglob("*.py")))
_REDIS_URL = re.compile(r"rediss?://[^\s'\"]+")
_ASKS = {"close", "open", "set", "undo", "label"}


def claimed(block: Block) -> str | None:
    """Return the module that plays a block, None if that is done here."""
    for pattern, modules in CLAIMED.items():
        if fnmatch.fnmatchcase(block.page, pattern):
            return modules.get(block.language) or modules.get("*")
    return None


def mine(language: str) -> list[Block]:
    return [block for block in ALL if block.language == language and not claimed(block)]


def test_every_block_says_what_it_holds_and_somebody_plays_it() -> None:
    assert len(ALL) > 50
    for block in ALL:
        module = claimed(block)
        assert module or block.language in PLAYED, f"{block}: nobody knows how to play it"


@pytest.mark.parametrize("pattern", CLAIMED)
def test_who_claims_a_page_reads_it(pattern: str) -> None:
    for module in set(CLAIMED[pattern].values()):
        held = [page for page in pages() if fnmatch.fnmatchcase(page, pattern)]
        path = ROOT / "tests" / f"{module}.py"
        if held:
            # Where a test reads pages through a module of its own, that one names them.
            text = path.read_text("utf-8")
            text += "".join(
                (ROOT / "tests" / f"{name}.py").read_text("utf-8")
                for name in re.findall(r"^from tests\.(\w+) import", text, re.MULTILINE)
            )
            name = Path(pattern).name
            assert (Path(pattern).parent.name if "*" in name else name) in text, pattern


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    policy = test_readme.blocks(test_readme.README, "toml")[0]
    (tmp_path / "policy.toml").write_text(policy, "utf-8")
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("TIEREDLIMIT_") and not name.startswith("TIEREDLIMIT_TEST_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TIEREDLIMIT_POLICY", "policy.toml")
    return tmp_path


@pytest.fixture
def registry() -> Iterator[None]:
    """Take collectors out of the process's registry again."""
    before = set(prometheus_client.REGISTRY._collector_to_names)
    yield
    for collector in set(prometheus_client.REGISTRY._collector_to_names) - before:
        prometheus_client.REGISTRY.unregister(collector)


@pytest.mark.usefixtures("folder", "registry")
@pytest.mark.parametrize("page", sorted({block.page for block in mine("python")}))
def test_python_of_a_page_runs(page: str) -> None:
    namespace: dict[str, Any] = {"__name__": "docs"}

    async def run() -> None:
        for block in mine("python"):
            if block.page == page:
                # Lines of the page, so that a traceback points there.
                text = "\n" * block.line + block.text
                flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
                code = compile(text, page, "exec", flags=flags)
                answer = eval(code, namespace)
                if inspect.isawaitable(answer):
                    await answer

    asyncio.run(run())


@pytest.mark.parametrize("block", mine("toml"), ids=str)
def test_policy_of_a_page_loads(block: Block) -> None:
    assert_policy(block.text)


def assert_policy(text: str) -> None:
    """Load a policy, or a part of one above the README's."""
    part = tomllib.loads(text)
    if not {"features", "tiers"} <= part.keys():
        base = tomllib.loads(test_readme.blocks(test_readme.README, "toml")[0])
        part = overlay(base, part)
    assert Policy.from_dict(part).features


@pytest.mark.parametrize("page", sorted({block.page for block in mine("console")}))
def test_commands_of_a_page_are_known_and_those_of_ours_succeed(
    page: str, folder: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if policies := [block.text for block in mine("toml") if block.page == page]:
        (folder / "policy.toml").write_text(policies[0], "utf-8")
    lines = [
        line.removeprefix("$ ")
        for block in mine("console")
        if block.page == page
        for line in block.text.splitlines()
        if line.startswith("$ ")
    ]
    commands = [shlex.split(line, comments=True) for line in lines]
    live = any(words[0] == "tieredlimit" and words[1] in _LIVE for words in commands)

    for words in commands:
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            assert f'"{name}"' in _SOURCE, f"{page}: nothing reads {name}"
            monkeypatch.setenv(name, _REDIS_URL.sub(redis_url, value))
    if live:
        monkeypatch.setenv("TIEREDLIMIT_REDIS", redis_url)
        with test_readme.worker(redis_url, os.environ.get("TIEREDLIMIT_NAMESPACE", "media-prod")):
            played = [_played(words) for words in commands]
    else:
        played = [_played(words) for words in commands]

    assert [told for told in played if told] == []
    assert played


_LIVE = {"status", "close", "open", "set", "label", "overrides", "history", "undo", "watch"}


def _played(words: list[str]) -> str:
    """Play a command; return what is wrong with it."""
    program, *rest = words
    if program == "tieredlimit":
        asking = rest[0] in _ASKS and "--yes" not in rest
        result = CliRunner().invoke(main, [*rest, "--yes"] if asking else rest)
        return f"{shlex.join(words)}: {result.output}" if result.exit_code else ""
    if program not in KNOWN_PROGRAMS and program.startswith("scripts/"):
        return "" if os.access(ROOT / program, os.X_OK) else f"{program} is no script"
    return KNOWN_PROGRAMS[program](rest) if program in KNOWN_PROGRAMS else f"{program}: unknown"


def _pip(words: list[str]) -> str:
    if not words or words[0] != "install":
        return f"pip {shlex.join(words)}: only installs are known"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for word in words[1:]:
        name, _, extras = word.rstrip("]").partition("[")
        if name in (".", "tieredlimit"):
            unknown = {*filter(None, extras.split(","))} - project["optional-dependencies"].keys()
            if unknown:
                return f"pip install {word}: there is no extra {unknown}"
        elif not name.startswith("-"):
            try:
                distribution(name)
            except PackageNotFoundError:
                return f"pip install {word}: the tests know no such package"
    return ""


def _installed(program: str) -> Callable[[list[str]], str]:
    def check(words: list[str]) -> str:
        found = shutil.which(program, path=str(Path(sys.executable).parent))
        return "" if found and words else f"{program} {shlex.join(words)}: cannot run"

    return check


def _python(words: list[str]) -> str:
    if words[:1] == ["-m"] and find_spec(words[1]):
        return ""
    return f"python {shlex.join(words)}: no such module"


def _curl(words: list[str]) -> str:
    urls = [word for word in words if "://" in word]
    loopback = re.compile(r"http://(127\.0\.0\.1|localhost)(:\d+)?/\S*")
    return "" if urls and all(map(loopback.fullmatch, urls)) else f"curl {words}: where to?"


KNOWN_PROGRAMS: Mapping[str, Callable[[list[str]], str]] = {
    "curl": _curl,
    "export": lambda _: "",
    "pip": _pip,
    "python": _python,
    **{program: _installed(program) for program in ("uvicorn", "hypercorn", "granian", "daphne")},
}


@pytest.mark.parametrize(
    "line",
    [
        "pip install 'tieredlimit[nope]'",
        "pip install no-such-package-anywhere",
        "scripts/nope",
        "frobnicate --now",
        "python -m nowhere_at_all",
        "curl https://api.example/v1/images",
        "tieredlimit check nowhere.toml",
        "tieredlimit frobnicate",
    ],
)
@pytest.mark.usefixtures("folder")
def test_command_that_cannot_be_run_is_told(line: str) -> None:
    assert _played(shlex.split(line))


@pytest.mark.parametrize("block", mine("json"), ids=str)
def test_json_of_a_page_is_json(block: Block) -> None:
    try:
        documents = [json.loads(block.text)]
    except json.JSONDecodeError:
        documents = [json.loads(line) for line in block.text.splitlines()]

    assert all(documents)


@pytest.mark.parametrize("block", mine("http"), ids=str)
def test_response_of_a_page_is_one(block: Block) -> None:
    head, _, body = block.text.partition("\n\n")
    lines = head.splitlines()
    status = lines.pop(0) if "HTTP/1.1" in lines[0] else ""

    # Fields may stand alone, where a page is about nothing else.
    if status or body:
        assert re.fullmatch(r"HTTP/1\.1 [1-5]\d\d [A-Z][\w ]+|[A-Z]+ /\S* HTTP/1\.1", status)
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    assert headers or status
    if "json" in headers.get("content-type", ""):
        document = json.loads(body)
        assert str(document.get("status", status.split()[1])) == status.split()[1]


@pytest.mark.parametrize("block", mine("yaml"), ids=str)
def test_manifest_of_a_page_is_yaml_and_names_what_exists(block: Block) -> None:
    for document in yaml.safe_load_all(block.text):
        for name in re.findall(r"TIEREDLIMIT_[A-Z_]+", json.dumps(document)):
            assert f'"{name}"' in _SOURCE, f"{block}: nothing reads {name}"
        for name, text in (document.get("data") or {}).items():
            if name.endswith(".toml"):
                assert_policy(text)


def test_manifests_of_the_deployment_fit_together() -> None:
    documents = [
        document
        for block in mine("yaml")
        if block.page == "docs/deployment.md"
        for document in yaml.safe_load_all(block.text)
    ]
    made = {(one["kind"], one["metadata"]["name"]): one for one in documents}
    pod = made["Deployment", "media"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {one["name"]: one for one in container["env"]}
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    for volume in pod["volumes"]:
        files = made["ConfigMap", volume["configMap"]["name"]]["data"]
        paths = {f"{mounts[volume['name']]}/{name}" for name in files}
        assert paths & {one.get("value") for one in env.values()}
    secret = env["TIEREDLIMIT_REDIS"]["valueFrom"]["secretKeyRef"]
    url = made["Secret", secret["name"]]["stringData"][secret["key"]]
    service = made["Service", "redis"]

    assert url.endswith(f"@{service['metadata']['name']}:{service['spec']['ports'][0]['port']}/0")
    assert (
        "noeviction"
        in made["StatefulSet", "redis"]["spec"]["template"]["spec"]["containers"][0]["args"]
    )
    grace = int(container["command"][-1])
    assert grace + 5 < pod["terminationGracePeriodSeconds"]


@pytest.mark.redis
def test_server_takes_the_configuration_of_the_deployment() -> None:
    (shown,) = [
        block.text
        for block in mine("text")
        if block.page == "docs/deployment.md" and "maxmemory-policy" in block.text
    ]
    options = dict(line.split(" ", 1) for line in shown.splitlines())
    flat = [word for name, value in options.items() for word in (f"--{name}", value)]

    with RedisServer(*flat) as server:
        told = [str(server.command("CONFIG", "GET", name)) for name in options]

    options["maxmemory"] = str(1 << 30)
    for (name, value), answer in zip(options.items(), told, strict=True):
        assert f"b'{name}': b'{value}'" in answer


@pytest.mark.parametrize("block", mine("promql"), ids=str)
def test_query_of_a_page_asks_for_metrics_that_exist(block: Block) -> None:
    names = set(re.findall(r"\btieredlimit_\w+", block.text))

    for name in names:
        stem = re.sub(r"^tieredlimit_|_(total|bucket|count|sum)$", "", name)
        stem = re.sub(r"_(total|bucket|count|sum)$", "", stem)
        assert stem in _SOURCE, f"{block}: there is no {name}"
    assert names


def test_shell_of_the_pages_parses() -> None:
    for block in (*mine("bash"), *mine("sh")):
        read = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
        assert read.returncode == 0, f"{block}: {read.stderr}"


PLAYED = {"python", "toml", "console", "json", "http", "yaml", "promql", "bash", "sh", "text"}
"""The languages that are played here; `text` is for eyes alone."""

"""What is shipped: the files of the wheel and the sdist, and that a stranger's first steps work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from email.parser import Parser
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.servers import _free_port
from tests.test_readme import README, blocks

pytestmark = pytest.mark.package

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
VERSION = PROJECT["version"]
START_SECONDS = 60.0
RUNTIME = {re.split("[>=]", line)[0] for line in PROJECT["dependencies"]}

NO_EXTRA = {"endpoints", "starlette"}
"""The integrations with what everybody has."""
IMPORT_ALL = """
import importlib, json, pkgutil
from tieredlimit import integrations
told = {}
for module in pkgutil.iter_modules(integrations.__path__):
    if module.name.startswith("_"):
        continue
    try:
        importlib.import_module(f"tieredlimit.integrations.{module.name}")
    except ImportError as exc:
        told[module.name] = str(exc)
    else:
        told[module.name] = ""
print(json.dumps(told))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command away from the checkout, and return what it printed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, the wheel that it builds, and `direct/`, the checkout's wheel."""
    folder = tmp_path_factory.mktemp("dist")
    build: list[str | Path] = [sys.executable, "-m", "build", "--no-isolation"]
    run(*build, "--outdir", folder, ROOT, cwd=folder)
    run(*build, "--wheel", "--outdir", folder / "direct", ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment with the wheel, what it requires, and a server."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    scripts = folder / "venv" / "bin"
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", scripts / "python", "--quiet"]
    run(*pip, "install", "--no-compile", wheel, "uvicorn", cwd=folder)
    return scripts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the README's policy and application, as a reader would have copied them."""
    (tmp_path / "policy.toml").write_text(blocks(README, "toml")[0], "utf-8")
    (tmp_path / "app.py").write_text(blocks(README, "python")[0], "utf-8")
    return tmp_path


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_holds_the_package_its_data_and_the_licence_and_nothing_else(wheel: Path) -> None:
    metadata = f"tieredlimit-{VERSION}.dist-info"
    package = ROOT / "tieredlimit"
    shipped = (path for path in package.rglob("*") if path.suffix in (".py", ".lua", ".json"))

    held = contents(wheel)

    expected = {path.relative_to(ROOT).as_posix() for path in shipped}
    expected |= {"tieredlimit/py.typed", f"{metadata}/licenses/LICENSE"}
    expected |= {f"{metadata}/{name}" for name in ("METADATA", "RECORD", "WHEEL")}
    assert set(held) == expected | {f"{metadata}/entry_points.txt"}
    assert {"tieredlimit/policy.schema.json", "tieredlimit/backends/lua/take.lua"} <= set(held)
    assert wheel.name == f"tieredlimit-{VERSION}-py3-none-any.whl"


def test_metadata_requires_what_the_project_says_and_shows_the_readme(wheel: Path) -> None:
    held = contents(wheel)[f"tieredlimit-{VERSION}.dist-info/METADATA"].decode()

    metadata = Parser().parsestr(held)

    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(required) == sorted(PROJECT["dependencies"])
    extras = set(metadata.get_all("Provides-Extra", []))
    assert extras == set(PROJECT["optional-dependencies"])
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_payload() == README


def test_sdist_builds_the_same_wheel_as_the_checkout(built: Path, wheel: Path) -> None:
    (direct,) = (built / "direct").glob("*.whl")

    assert contents(direct) == contents(wheel)


def test_sdist_holds_what_it_takes_to_test_it_and_no_litter(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")

    with tarfile.open(sdist) as archive:
        paths = [path.split("/", 1) for path in archive.getnames()]

    assert {first for first, _ in paths} == {f"tieredlimit-{VERSION}"}
    inside = {rest for _, rest in paths}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "scripts/test"} <= inside
    assert {"tests/conftest.py", "docs/policy.md", "examples/policy.toml"} <= inside
    litter = ("__pycache__", ".venv", "benchmarks/results", ".egg-info", ".pyc")
    assert [path for path in inside if any(word in path for word in litter)] == []


def test_only_what_is_needed_is_installed(installed: Path) -> None:
    listed = json.loads(
        run(
            sys.executable, "-m", "pip", "--python", installed / "python", "list",
            "--format=json", cwd=installed,
        )
    )  # fmt: skip

    names = {one["name"].lower().replace("_", "-") for one in listed}
    assert RUNTIME | {"tieredlimit", "uvicorn"} <= names
    assert names.isdisjoint({"fastapi", "prometheus-client", "pytest", "rich", "httpx"})


def test_commands_work_where_it_is_installed(installed: Path, folder: Path) -> None:
    version = run(installed / "tieredlimit", "--version", cwd=folder)
    checked = run(installed / "tieredlimit", "check", "policy.toml", cwd=folder)
    schema = run(installed / "python", "-m", "tieredlimit", "schema", cwd=folder)

    assert version == f"tieredlimit {VERSION}\n"
    assert checked.startswith("policy.toml: ")
    assert json.loads(schema)["$schema"]


def test_first_steps_of_the_readme_lead_to_a_denial(installed: Path, folder: Path) -> None:
    with served(installed, folder) as url, httpx.Client(base_url=url, trust_env=False) as client:
        images = [client.post("/v1/images") for _ in range(3)]
        video = client.post("/v1/videos")

    # The README's application has no routes: what is let through is not found, with its fields.
    assert [answer.status_code for answer in images] == [404, 404, 429]
    assert images[0].headers["ratelimit"].startswith('"image-minute";r=1;')
    assert images[2].json()["reason"] == "quota"
    assert 0 < int(images[2].headers["retry-after"]) <= 60
    assert (video.status_code, video.json()["reason"]) == (403, "zero")


def test_integration_without_its_extra_says_which_one_is_missing(
    installed: Path, folder: Path
) -> None:
    told: dict[str, str] = json.loads(run(installed / "python", "-c", IMPORT_ALL, cwd=folder))

    named = {module: re.findall(r"tieredlimit\[([a-z]+)\]", said) for module, said in told.items()}
    assert {"fastapi", "prometheus"} <= set(named)
    assert {module for module in named if not told[module]} == NO_EXTRA
    for module in named.keys() - NO_EXTRA:
        assert len(named[module]) == 1, f"{module}: {told[module]!r}"
        assert named[module][0] in PROJECT["optional-dependencies"]


@contextmanager
def served(scripts: Path, folder: Path) -> Iterator[str]:
    """Serve app.py of a folder with the environment's own server."""
    port = _free_port()
    command: list[Any] = [scripts / "uvicorn", "app:app", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            try:
                httpx.get(url, trust_env=False)
            except httpx.TransportError:
                continue
            break
        else:
            pytest.fail((folder / "log").read_text("utf-8"))
        yield url
    finally:
        process.terminate()
        process.wait()

"""Other Pythons, the oldest packages that we say we work with, and what is shipped.

    scripts/nox                   every session
    scripts/nox -s tests-3.13     one of them; what follows `--` goes to pytest or the checker

A Python that is not installed is skipped; in CI (`CI` set) that is a failure.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PYTHONS = ["3.11", "3.12", "3.13"]
# Served where somebody has it; not promised yet.
COMING = ["3.14"]

# What the packages that we require make a difference to: routing, Redis, rates, commands.
TELLING = [
    f"tests/test_{name}.py"
    for name in (
        *("cli_check", "cli_control", "cli_table", "cluster", "decision", "ending", "fastapi"),
        *("identity", "leases", "limiter", "middleware", "policy", "prometheus", "rate", "redis"),
        *("router_differential", "routes"),
    )
]
# FastAPI's oldest security classes answer 403 to a stranger, newer ones 401; what times failovers
# says nothing of packages.
NOT_TELLING = (
    "not test_example_denies_video_to_who_has_not_paid_and_asks_strangers_for_a_key"
    " and not TestLostNodes"
)

nox.needs_version = ">=2025.5.1"
nox.options.sessions = [*(f"tests-{python}" for python in PYTHONS), "lowest", "typing", "package"]
nox.options.error_on_missing_interpreters = False


@nox.session(python=[*PYTHONS, *COMING])
def tests(session: nox.Session) -> None:
    """Run the tests that are named, or all."""
    _install(session, "-e", ".", "--group", "test")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python=PYTHONS[0])
def lowest(session: nox.Session) -> None:
    """Run a telling part of the tests on the oldest packages that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = ["django", "fastapi", "jwt", "litestar", "prometheus", "quart"]
    lines = [*project["dependencies"], *(line for extra in asked for line in extras[extra])]
    oldest = [re.sub(r"^([\w-]+)(?:\[\w+\])?>=([\w.]+).*", r"\1==\2", line) for line in lines]
    if loose := [line for line in oldest if "==" not in line]:
        session.error(f"no lower bound: {', '.join(loose)}")
    constraints = Path(session.create_tmp()) / "lowest.txt"
    constraints.write_text("\n".join(oldest) + "\n", "utf-8")
    _install(session, "-e", f".[{','.join(asked)}]", "--group", "lowest", "-c", str(constraints))
    chosen = session.posargs or [*TELLING, "-k", NOT_TELLING]
    session.run("python", "-m", "pytest", *chosen)


@nox.session(python=PYTHONS)
def typing(session: nox.Session) -> None:
    """Check the types with both checkers, as each Python has them."""
    _install(session, "-e", ".", "--group", "check")
    session.run("mypy", "--python-version", str(session.python), *session.posargs)
    session.run("pyright", "--pythonversion", str(session.python))


@nox.session(python=PYTHONS[0])
def docs(session: nox.Session) -> None:
    """Build the site; a broken link fails."""
    if not (ROOT / "mkdocs.yml").exists():
        session.skip("there is no mkdocs.yml")
    _install(session, "-e", ".", "--group", "docs")
    session.run("mkdocs", "build", "--strict", "--site-dir", session.create_tmp())


@nox.session(python=PYTHONS)
def package(session: nox.Session) -> None:
    """Build the wheel, look into it, install it alone and take the README's first steps."""
    _install(session, "-e", ".", "--group", "test")
    session.run("python", "-m", "pytest", "tests/test_packaging.py", *session.posargs)


def _install(session: nox.Session, *what: str) -> None:
    session.install("pip>=25.1")  # the first with --group
    session.install(*what)
    if shutil.which("redis-server") is None and shutil.which("valkey-server") is None:
        session.warn("no Redis server on PATH: the tests that need one will fail")

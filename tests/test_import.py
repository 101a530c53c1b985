"""What `import tieredlimit` loads, and above all what it does not."""

from __future__ import annotations

import subprocess
import sys

import pytest

WANTED = "import starlette.applications, redis.asyncio"
"""What an application with limits in Redis needs anyway."""

OURS_UNASKED = {
    # Of the neighbours, the commands and a cluster: whoever wants them asks for them.
    "tieredlimit.backends.cluster",
    "tieredlimit.backends.fleet",
    "tieredlimit.backends.nodecalls",
    "tieredlimit.backends.redis_control",
    "tieredlimit.backends.redis_holds",
    "tieredlimit.cli",
    "tieredlimit.control",
    "tieredlimit.integrations",
    "tieredlimit.overrides",
}


def loaded(code: str) -> set[str]:
    """Return the modules that a new process has loaded after some code."""
    told = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules, sep='\\n')"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return set(told.split())


def test_importing_it_loads_no_package_but_itself_starlette_and_redis() -> None:
    added = loaded(f"{WANTED}\nimport tieredlimit") - loaded(WANTED)

    packages = {name.partition(".")[0] for name in added}
    assert packages - sys.stdlib_module_names == {"tieredlimit"}
    # Those that are needed in no request and take their time.
    assert packages.isdisjoint({"tomllib", "difflib", "fractions", "decimal"})


def test_importing_it_leaves_out_what_most_processes_never_use() -> None:
    assert loaded("import tieredlimit").isdisjoint(OURS_UNASKED)


def test_what_a_policy_needs_is_loaded_before_the_first_request() -> None:
    ready = "from tieredlimit import Limiter\nlimiter = Limiter({policy}, 'redis://x')".format(
        policy={"features": {"a": {}}, "tiers": {"all": {"quotas": {"a": "1/day"}}}}
    )

    at_once = loaded(ready)

    # Parsing rates, the scripts of leases and of revisions: none of it is left for a request.
    assert at_once > {"limits", "tieredlimit.backends.redis_holds"}
    assert "tieredlimit.backends.redis_control" in at_once
    assert "tieredlimit.backends.cluster" not in at_once


@pytest.mark.parametrize("module", ["fastapi", "prometheus"])
def test_an_integration_loads_its_neighbour_alone(module: str) -> None:
    others = {"fastapi", "prometheus_client", "litestar", "quart", "django", "jwt"}

    added = loaded(f"import tieredlimit.integrations.{module}") & others

    assert added == {{"prometheus": "prometheus_client"}.get(module, module)}


def test_a_name_that_the_backends_do_not_have_is_an_attribute_error() -> None:
    from tieredlimit import backends

    assert backends.ClusterBackend.__name__ == "ClusterBackend"
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        backends.Nothing  # type: ignore[attr-defined]  # noqa: B018 -- that is the test

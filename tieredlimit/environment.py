"""The arguments of a limiter, as the environment gives them."""

from __future__ import annotations

import os
from typing import Any

from tieredlimit._core.policy import Policy
from tieredlimit.errors import UsageError
from tieredlimit.inforce import stored

DEFAULT_NAMESPACE = "default"
STORED = "stored"
"""What stands in the place of policy files for the policy that was pushed."""

_SWITCH = {
    "1": True, "true": True, "yes": True, "on": True,
    "0": False, "false": False, "no": False, "off": False,
}  # fmt: skip


def from_environment() -> dict[str, Any]:
    """Return the arguments of `Limiter` that the environment gives; see `Limiter.from_env`.

    Raises:
        PolicyError: The policy has faults.
        UsageError: A variable is missing or cannot be used.
    """
    named = os.environ.get("TIEREDLIMIT_POLICY", "")
    paths = [] if named == STORED else [path for path in named.split(os.pathsep) if path]
    if not paths and named != STORED:
        raise UsageError("TIEREDLIMIT_POLICY must name a policy file, and is not set")
    switch = os.environ.get("TIEREDLIMIT_ENABLED") or "1"
    if switch.lower() not in _SWITCH:
        raise UsageError(f"TIEREDLIMIT_ENABLED must be 0 or 1, got {switch!r:.80}")
    return {
        "policy": Policy.load(*paths) if paths else stored(),
        "backend": os.environ.get("TIEREDLIMIT_REDIS") or None,
        "namespace": os.environ.get("TIEREDLIMIT_NAMESPACE") or DEFAULT_NAMESPACE,
        "enabled": _SWITCH[switch.lower()],
        "id_secret": os.environ.get("TIEREDLIMIT_ID_SECRET") or None,
    }

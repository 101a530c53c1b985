"""What is public, and that its types are written down and checked."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import tieredlimit
from tieredlimit import integrations

USES = Path(__file__).parent / "typing"
MODULES = [
    "tieredlimit",
    "tieredlimit.backends",
    "tieredlimit.identity",
    *(
        f"tieredlimit.integrations.{module.name}"
        for module in pkgutil.iter_modules(integrations.__path__)
        if not module.name.startswith("_")
    ),
    "tieredlimit.testing",
]


def imported_names() -> dict[str, set[str]]:
    """Return what the files that the type checkers read import, by module."""
    found: dict[str, set[str]] = {}
    for file in USES.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                found.setdefault(node.module or "", set()).update(name.name for name in node.names)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_types_of_every_public_name_are_checked(module: str) -> None:
    public = set(importlib.import_module(module).__all__)

    assert public <= imported_names().get(module, set()), (
        "add what is missing to a file in tests/typing"
    )


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_sorted_and_there(module: str) -> None:
    found = importlib.import_module(module)

    assert list(found.__all__) == sorted(found.__all__)
    assert all(getattr(found, name) is not None for name in found.__all__)


def test_package_says_that_it_is_typed() -> None:
    assert (Path(tieredlimit.__file__).parent / "py.typed").read_bytes() == b""

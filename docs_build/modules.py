"""The pages of the Python reference: one for each public module."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "tieredlimit"
PLACE = "reference/api"
FIRST = ("", "identity", "request", "control", "leases", "backends", "errors", "testing")
"""What stands at the top, below the package; a module that is not there is left out."""


def public_modules() -> list[str]:
    """Return the modules that users import from, the package itself first."""
    integrations = sorted(
        f"integrations.{path.stem}"
        for path in (PACKAGE / "integrations").iterdir()
        if not path.name.startswith("_") and (path.suffix == ".py" or path.is_dir())
    )
    names = [name for name in FIRST if _file_of(name).exists()]
    return [".".join(filter(None, ("tieredlimit", name))) for name in [*names, *integrations]]


def pages() -> dict[str, str]:
    """Return the pages by their place on the site."""
    return {place(name): _page(name) for name in public_modules()}


def title(page: str) -> str:
    """Return what navigation calls a module's page, "" for another page: the name without ours."""
    place_, _, name = page.removesuffix(".md").rpartition("/")
    return name if place_ == PLACE else ""


def public_names(module: str) -> list[str]:
    """Return what `__all__` of a module lists."""
    tree = ast.parse(_file_of(module.partition(".")[2]).read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


def place(module: str) -> str:
    """Return the place of a module's page on the site."""
    return f"{PLACE}/{module.partition('.')[2] or module}.md"


def _page(module: str) -> str:
    return f"# {module}\n\n::: {module}\n"


def _file_of(name: str) -> Path:
    path = PACKAGE / name.replace(".", "/") if name else PACKAGE
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

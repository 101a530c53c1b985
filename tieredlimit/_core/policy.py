"""A policy: features, tiers, and the cell each pair of them gets."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tieredlimit._core.document import read_document
from tieredlimit._core.overlay import overlay
from tieredlimit._core.tier import Cell, Feature, Tier
from tieredlimit.errors import Fault, PolicyError


@dataclass(frozen=True, slots=True)
class Policy:
    """Hold a checked policy: the features, and the tiers in the order in which they are tried.

    Build one with `Policy.load` or `Policy.from_dict`. `warnings` are what a careful operator
    should look at and what nevertheless works.
    """

    features: Mapping[str, Feature]
    tiers: tuple[Tier, ...]
    warnings: tuple[Fault, ...] = ()

    @classmethod
    def load(cls, *paths: str | Path) -> Policy:
        """Read a TOML file, and lay any further ones over it in turn.

        Raises:
            PolicyError: A file cannot be read, is no TOML, or the policy has faults: all of them.
        """
        if not paths:
            raise PolicyError([Fault("", "no file given")])
        document: dict[str, Any] = {}
        for path in paths:
            document = overlay(document, _read(Path(path)))
        return cls.from_dict(document, source=" + ".join(str(path) for path in paths))

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], *, source: str = "") -> Policy:
        """Read a policy from the mapping that its TOML would give.

        `source` names it in errors.

        Raises:
            PolicyError: The policy has faults: all of them.
        """
        return cls(*read_document(document, source))

    def cell(self, tier: str, feature: str) -> Cell:
        """Return what `tier` may do with `feature`; a name that is not there is a KeyError."""
        for row in self.tiers:
            if row.name == tier:
                return row.cells[feature]
        raise KeyError(tier)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as exc:
        raise PolicyError([Fault("", f"cannot be read: {exc.strerror or exc}")], str(path)) from exc
    except UnicodeDecodeError as exc:
        raise PolicyError([Fault("", f"is not UTF-8 at byte {exc.start}")], str(path)) from exc
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise PolicyError([Fault("", f"is not TOML: {exc}")], str(path)) from exc

"""A policy: features, tiers, and the cell each pair of them gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

        Tables merge; a cell, a message, a `when`, a feature's `routes`, its own `pool` and every
        list are replaced whole. With several files, each fault and warning ends with the one that
        its place comes from.

        Raises:
            PolicyError: A file cannot be read, is no TOML, or the policy has faults: all of them.
        """
        from tieredlimit._core.overlay import origin_of, overlay, places

        if not paths:
            raise PolicyError([Fault("", "no file given")])
        document: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for path in paths:
            above = _read(Path(path))
            document = overlay(document, above)
            origins.update(dict.fromkeys(places(above), str(path)))
        source = " + ".join(str(path) for path in paths)
        if len(paths) == 1:
            return cls.from_dict(document, source=source)
        return cls._read(document, source, lambda place: origin_of(place, origins))

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], *, source: str = "") -> Policy:
        """Read a policy from the mapping that its TOML would give.

        `source` names it in errors.

        Raises:
            PolicyError: The policy has faults: all of them.
        """
        return cls._read(document, source)

    @classmethod
    def _read(
        cls, document: Mapping[str, Any], source: str, origin: Callable[[str], str] | None = None
    ) -> Policy:
        # All that reads policies is loaded with the first one.
        from tieredlimit._core.document import read_document

        return cls(*read_document(document, source, origin))

    def cell(self, tier: str, feature: str) -> Cell:
        """Return what `tier` may do with `feature`; a name that is not there is a KeyError."""
        for row in self.tiers:
            if row.name == tier:
                return row.cells[feature]
        raise KeyError(tier)


def _read(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        # Some editors begin a file with a byte order mark, which TOML does not know.
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise PolicyError([Fault("", f"is not UTF-8 at byte {exc.start}")], str(path)) from exc
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise PolicyError([Fault("", f"cannot be read: {reason}")], str(path)) from exc
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as exc:
        # A number of more than 4,300 digits is a plain ValueError, and deep nesting ends the stack.
        raise PolicyError([Fault("", f"is not TOML: {exc}")], str(path)) from exc

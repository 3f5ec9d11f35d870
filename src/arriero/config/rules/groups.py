"""What every rule asks of the option groups of a command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from arriero.config.option import specs_of

Group = TypeVar("Group")


def find(groups: Sequence[Any], kind: type[Group]) -> Group | None:
    """The instance of a group (or of a subclass of it) among several, or None."""
    return next((group for group in groups if isinstance(group, kind)), None)


def changed(group: Any, name: str, given: frozenset[str]) -> bool:
    """Whether the user set an option to something else than its default (a file written by a run sets every option)."""
    spec = next(spec for spec in specs_of(type(group)) if spec.name == name)
    return name in given and getattr(group, name) != spec.default

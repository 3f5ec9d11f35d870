"""Names of a file that somebody else wrote, in one line of an error."""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN = 5
_NAME_SHOWN = 120  # characters


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name[:_NAME_SHOWN] for name in names[:_SHOWN]) + rest

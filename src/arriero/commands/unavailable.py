"""The answer of a verb whose options are settled but whose work is not in this version."""

from __future__ import annotations

from arriero import __version__
from arriero.errors import ArrieroError


class NotAvailableError(ArrieroError):
    """A command of a later version."""


def not_available(verb: str, instead: str) -> NotAvailableError:
    """The one line that says so and what can be used instead."""
    version = ".".join(__version__.split(".")[:2])
    return NotAvailableError(f"not available in this version ({version}) yet: arriero {verb}; {instead}")

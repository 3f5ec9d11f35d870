"""The names under which a server answers, so that no web page reaches it through a name of its own (DNS rebinding)."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection, Container

# Of domains that the public DNS does not have: nobody elsewhere can make a name in them point to this machine.
PRIVATE_DOMAINS = (".localhost", ".local", ".internal", ".home.arpa")


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class OwnNames:
    """Names that can only be meant for this machine: addresses, its host name, and names that no DNS server of a stranger can
    answer for, as those of containers (`arriero`, `arriero.default.svc.cluster.local`). A container of names."""

    def __init__(self, more: Collection[str]) -> None:
        """
        Args:
            more: names beside them.
        """
        self._names = frozenset({socket.gethostname().lower(), *(name.lower() for name in more)})

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str) or not name:
            return False
        name = name.lower().removesuffix(".")
        if ":" in name:
            return _is_address(name)
        return "." not in name or name in self._names or name.endswith(PRIVATE_DOMAINS) or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def hosts_for(host: str, more: Collection[str], *, keys: bool) -> Container[str] | None:
    """The names for `Doors`; None: any.

    Args:
        host: the address that is listened on.
        more: names that are given.
        keys: whether every request that makes work needs one, which no web page knows.
    """
    if is_loopback(host):
        return frozenset({"localhost", "127.0.0.1", "::1", host.lower(), *(name.lower() for name in more)})
    return OwnNames(more) if more or not keys else None

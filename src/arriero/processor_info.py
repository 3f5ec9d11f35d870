"""What the system says of this machine's processors (Linux)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
_ZEN_5 = 26  # its "cpu family"


def model_name() -> str:
    """As it calls itself; "" where the system does not tell."""
    return _field("model name")


def vendor() -> str:
    """As x86's processors tell it, "GenuineIntel" or "AuthenticAMD"; "" where the system does not."""
    return _field("vendor_id")


def is_intel() -> bool:
    return vendor() == "GenuineIntel"


def has_units_that_mkl_leaves() -> bool:
    """Whether this is AMD's Zen 5 or a later one, whose 512-bit units compute twice what MKL asks of AMD's processors."""
    return vendor() == "AuthenticAMD" and "avx512f" in features() and int(_field("cpu family") or 0) >= _ZEN_5


def features() -> frozenset[str]:
    """Linux' names of them; none where the system does not tell."""
    return frozenset(_field("flags", "Features").split())


def _field(*names: str) -> str:
    """Of the first processor."""
    return _found(_CPU_INFO, names)


@cache
def _found(path: Path, names: tuple[str, ...]) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    parts = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in parts if name.strip() in names), "")

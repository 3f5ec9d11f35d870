"""The C++ compiler that torch.compile makes loops with on a CPU."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from typing import Any

from arriero.errors import ConfigError


def check_compiler(wanted: str, instead: str) -> None:
    """
    Args:
        wanted: what needs one, as the user wrote it.
        instead: what can be done without, as a command.

    Raises:
        ConfigError: there is none, or it cannot be run.
    """
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (RuntimeError, OSError) as error:
        named = config.cpp.cxx if isinstance(config.cpp.cxx, list | tuple) else (config.cpp.cxx,)
        failure = _failure(name for name in named if isinstance(name, str))
        if failure is not None:
            raise ConfigError(
                f"{wanted} needs a C++ compiler, and {failure}: repair it, name another one in $CXX, or {instead}"
            ) from error
        raise ConfigError(
            f"{wanted} needs a C++ compiler, and there is none: install g++ (or name one in $CXX), or {instead}"
        ) from error


def _failure(names: Iterable[str]) -> str | None:
    """What the first of these compilers that is there says when it is asked for its version; None if none is."""
    for name in names:
        try:
            done = subprocess.run(
                [name, "--version"], stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=30
            )
        except FileNotFoundError:
            continue
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = getattr(error, "strerror", None) or "no answer within 30 s"
        else:
            told = (done.stderr.strip() or done.stdout.strip()).decode(errors="replace").splitlines()
            reason = told[0][:200] if told else f"exit code {done.returncode}"
        return f"{name} fails ({reason})"
    return None


def vector_isa() -> Any:
    """What the compiler uses of the processor's vectors, as torch found out by compiling; falsy if nothing.

    Raises:
        ConfigError: torch cannot write what it compiles.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    try:
        return pick_vec_isa()
    except OSError as error:
        raise ConfigError(
            f"torch cannot write what it compiles ({error}): set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"
        ) from error


def vector_lanes() -> int:
    """Numbers of 32 bits in a register of the processor, as the compiler uses it.

    Raises:
        ConfigError: see `vector_isa`.
    """
    isa = vector_isa()
    return isa.nelements() if isa else 8

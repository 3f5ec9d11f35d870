"""The C++ compiler that torch.compile makes loops with on a CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
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


def check_own_library(wanted: str, instead: str) -> None:
    """
    Args:
        wanted, instead: see `check_compiler`, which has passed.

    Raises:
        ConfigError: the compiler puts a C++ library of its own into what it makes (Linux). With two of them in a process the
            regular expressions by which a package of AOTInductor reads its device's name fail, or kill the process.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    if sys.platform != "linux":
        return
    name = get_cpp_compiler()
    with TemporaryDirectory(prefix="arriero-compiler-") as folder:
        source, made = Path(folder, "a.cpp"), Path(folder, "a.so")
        source.write_text(
            "#include <string>\nstd::string text(int n) { return std::to_string(n); }\n", encoding="ascii"
        )
        try:
            command = [name, "-shared", "-fPIC", "-o", str(made), str(source)]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return  # whatever it is, compiling will say so
        if done.returncode or not made.is_file() or b"libstdc++.so.6" in made.read_bytes():
            return
    raise ConfigError(
        f"{wanted} needs a C++ compiler that uses the system's libstdc++ as torch does, and {name} links its own into what it "
        f"makes: name another one, as by CXX=g++, or {instead}"
    )


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

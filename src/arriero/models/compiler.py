"""The C++ compiler that torch.compile makes loops with on a CPU."""

from __future__ import annotations

from arriero.errors import ConfigError


def check_compiler(wanted: str, instead: str) -> None:
    """
    Args:
        wanted: what needs one, as the user wrote it.
        instead: what can be done without, as a command.

    Raises:
        ConfigError: there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise ConfigError(
            f"{wanted} needs a C++ compiler, and there is none: install g++ (or name one in $CXX), or {instead}"
        ) from error


def vector_lanes() -> int:
    """Numbers of 32 bits in a register of the processor, as the compiler uses it."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    isa = pick_vec_isa()
    return isa.nelements() if isa else 8

"""What native code needs of a processor, as a manifest's `isa` says it: the machine, and features by Linux' names.

`x86_64 avx2 fma` is any x86 processor that has these two; `x86_64` alone is every one. A word like `sm_90` is a GPU's, and none
of the processor's business: see `torch_target`.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable

from arriero.processor_info import features

# https://en.wikipedia.org/wiki/X86-64#Microarchitecture_levels, level 3 (x86 processors since about 2013)
X86_64_V3 = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "abm")
# Where the compiler's name of a feature is not the kernel's without its dashes.
_KERNEL_NAMES = {
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "amx-tile": "amx_tile",
    "amx-bf16": "amx_bf16",
    "amx-int8": "amx_int8",
    "amx-fp16": "amx_fp16",
}


def needed_isa(flags: str, more: Iterable[str] = ()) -> str:
    """The `isa` of code that was compiled for this machine's base (x86-64-v3, on x86) with more flags.

    Args:
        flags: of the compiler, `-mavx512f -mfma` say; those that name no feature do not count.
        more: features by Linux' names.
    """
    machine, own = platform.machine(), features()
    if machine != "x86_64":
        return " ".join((machine, *sorted(own)))  # the compiler may use all of them
    named = (flag.removeprefix("-m") for flag in flags.split() if flag.startswith("-m") and "=" not in flag)
    return " ".join((machine, *sorted({*X86_64_V3, *more, *(_KERNEL_NAMES.get(name, name) for name in named)})))


def lacks(isa: str) -> str | None:
    """What this machine lacks of an `isa`: another kind of machine, or the first feature; None if nothing."""
    machine, *needed = [word for word in isa.split()[:1000] if not word.startswith("sm_")] or [""]
    if machine != platform.machine():
        return f"a machine of the kind {machine[:40]}"
    own = features()
    return next((name[:40] for name in needed if name not in own), None)

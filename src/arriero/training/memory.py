"""Host memory of a training process: how it is given back, and how much there is.

A training step allocates and frees the same large arrays over and over. glibc maps each one above 32 MiB afresh and
unmaps it at once, so that the kernel fills every page with zeros again in every step. Keeping freed memory in the process
made a step of SmolLM2-135M (4 x 256 tokens, fp32, 2 threads) about 8 % faster. It costs memory where the sizes vary: with
recomputation, whose users want memory and not speed, the process grew to twice what it held.
"""

from __future__ import annotations

import ctypes
import sys

# of mallopt(3): free memory kept at the top, the size from which a block is mapped on its own, how many such blocks there are
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_LARGEST = 2**31 - 1  # mallopt takes an int


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next step; has no effect with another C library.

    Returns:
        Whether the C library took it.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no such switch
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    # before 2.35 glibc refuses a threshold above 32 MiB; it can then be told to map nothing at all
    kept = mallopt(_M_MMAP_THRESHOLD, 1 << 30) == 1 or mallopt(_M_MMAP_MAX, 0) == 1
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, _LARGEST) == 1)

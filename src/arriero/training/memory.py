"""Host memory of a training process: how it is given back, and how much there is.

A training step allocates and frees the same large arrays over and over. glibc maps each one above 32 MiB afresh and
unmaps it at once, so that the kernel fills every page with zeros again in every step. Keeping freed memory in the process
made a step of SmolLM2-135M (4 x 256 tokens, fp32, 2 threads) about 8 % faster. It costs memory where the sizes vary: with
recomputation, whose users want memory and not speed, the process grew to twice what it held.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

# of mallopt(3): free memory kept at the top, the size from which a block is mapped on its own, how many such blocks there are
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_LARGEST = 2**31 - 1  # mallopt takes an int
# What glibc's own adaptation arrives at in a process with large arrays (malloc/malloc.c, DEFAULT_MMAP_THRESHOLD_MAX).
_USUAL = ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 64 << 20), (_M_MMAP_MAX, 65536))


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, glibc keeps freed memory for the next step; afterwards it gives all of it back. No effect elsewhere."""
    library = _glibc()
    if library is None:
        yield
        return
    # before 2.35 glibc refuses a threshold above 32 MiB; it can then be told to map nothing at all
    if library.mallopt(_M_MMAP_THRESHOLD, 1 << 30) != 1:
        library.mallopt(_M_MMAP_MAX, 0)
    library.mallopt(_M_TRIM_THRESHOLD, _LARGEST)
    try:
        yield
    finally:
        for name, value in _USUAL:
            library.mallopt(name, value)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallopt") and hasattr(library, "malloc_trim")):  # musl has neither
        return None
    library.mallopt.argtypes, library.mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    library.malloc_trim.argtypes, library.malloc_trim.restype = (ctypes.c_size_t,), ctypes.c_int
    return library

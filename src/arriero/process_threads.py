"""The threads that share out a thread's computations."""

from __future__ import annotations

import ctypes
import sys

_SOFT = 1  # OpenMP 5.0, section 3.2.44: what is released is made again when it is needed


def release_workers() -> None:
    """End the OpenMP threads that wait for this thread's next computation, as another one is to compute from now on.

    They are made anew if this one computes after all. While a process has more of them than cores, GCC's OpenMP puts those that
    wait at the end of a loop to sleep at once, in place of letting them spin: a step of a small model takes a third more time.
    """
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL(None).omp_pause_resource_all(_SOFT)
    except AttributeError:
        return  # no OpenMP here, or an older one

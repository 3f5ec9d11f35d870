"""`torch.compiler.disable` without importing the compiler, which takes a second, where nothing is compiled."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function, never compiled by torch.compile, nor what it calls."""
    # torch's own way to do this: it imports the compiler at the first call
    kept_out: Callable[P, R] = torch._disable_dynamo(function)  # type: ignore[attr-defined]

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" in sys.modules:  # without it nothing can be compiling
            return kept_out(*args, **kwargs)
        return function(*args, **kwargs)

    return called

"""Casts to a type of a smaller range, which must not turn numbers into infinities."""

from __future__ import annotations

import torch
from torch import Tensor

from arriero.errors import FormatError

_NUMBERS = 2**20  # looked at together: what is made of them needs memory


def _has_new_infinities(tensor: Tensor, made: Tensor) -> bool:
    if not made.numel() or all(bool(end.isfinite()) for end in torch.aminmax(made)):
        return False
    pairs = zip(torch.split(tensor.flatten(), _NUMBERS), torch.split(made.flatten(), _NUMBERS), strict=True)
    return any(bool((new.isinf() & old.isfinite()).any()) for old, new in pairs)


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor in another floating-point type.

    Args:
        name: of the tensor, for messages.

    Raises:
        FormatError: a finite value has no finite one there.
    """
    made = tensor.to(dtype)
    if tensor.dtype != dtype and dtype.is_floating_point and _has_new_infinities(tensor, made):
        kind = str(dtype).removeprefix("torch.")
        raise FormatError(
            f"{name} has values beyond {torch.finfo(dtype).max:g}, the largest of {kind}; take a type of a larger range, "
            "float32 say"
        )
    return made

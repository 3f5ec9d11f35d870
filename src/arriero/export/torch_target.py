"""What the programs of a torch or an aoti bundle are made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from arriero.errors import FormatError
from arriero.export.bundle import Bundle
from arriero.export.kinds import GPU_UNIT, row_room

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Target:
    """Where programs compute, and with what numbers.

    Attributes:
        device: of weights, keys and values, and logits.
        dtype: of products, keys and values; fp32, or that of the stored matrices.
        unit: lengths of `span`, and of the cache's rows, are multiples of it.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    unit: int = 1

    @classmethod
    def of(cls, device: str, matrices: torch.dtype) -> Target:
        """
        Args:
            device: cpu, cuda or cuda:N.
            matrices: the dtype that they are stored in; a CPU computes in fp32 all the same.
        """
        if device == "cpu":
            return CPU
        return cls(torch.device(device), matrices, GPU_UNIT)

    @property
    def kernels(self) -> list[Any]:
        """Of attention: those that take a mask, and on a GPU not cuDNN's, which plans each new shape for 0.6 s."""
        flash = SDPBackend.FLASH_ATTENTION if self.unit == 1 else SDPBackend.EFFICIENT_ATTENTION
        return [flash, SDPBackend.MATH]

    def length(self, tokens: int) -> int:
        """Of `span`, for so many tokens."""
        return -(-tokens // self.unit) * self.unit

    def room(self, context: int) -> int:
        """Of a row of the cache."""
        return row_room(context, self.unit)


CPU = Target(torch.device("cpu"))


def target_of(bundle: Bundle, matrices: torch.dtype, device: str | None = None) -> Target:
    """Where a bundle computes here.

    Args:
        matrices: see `Target.of`.
        device: cuda:N, where there are several; any other is the one of this process.

    Raises:
        FormatError: there is no such GPU here, or another one than native code was compiled for; or `matrices` is no type that
            a GPU computes with.
    """
    folder = bundle.folder
    if bundle.manifest.device == "cpu":
        return CPU
    check_gpus(bundle)
    name = device if device is not None and device.startswith("cuda:") else "cuda"
    if int(name.partition(":")[2] or 0) >= gpus():
        raise FormatError(f"{folder}: there is no {name} here, and {gpus()} GPUs are")
    own = capability(name)
    if bundle.manifest.kind == "aoti" and _compiled_for(bundle) != own:
        raise FormatError(
            f"{folder}: is compiled for GPUs of the kind {_compiled_for(bundle)[:20]}, and {name} is {own}: name another one"
        )
    if matrices not in _DTYPES:
        raise FormatError(f"{folder}: its matrices are {matrices}, which no GPU computes with; export the model again")
    return Target.of(name, matrices)


def check_gpus(bundle: Bundle) -> None:
    """
    Raises:
        FormatError: of a bundle for GPUs, that there is none here that it can run on.
    """
    count = gpus()
    if not count:
        raise FormatError(
            f"{bundle.folder}: is made for a GPU, and there is none here; export the model for --device cpu"
        )
    kinds = {capability(f"cuda:{number}") for number in range(count)}
    if bundle.manifest.kind == "aoti" and _compiled_for(bundle) not in kinds:
        raise FormatError(
            f"{bundle.folder}: is compiled for GPUs of the kind {_compiled_for(bundle)[:20] or 'none'}, and here is "
            f"{', '.join(sorted(kinds))}; export the model on a machine like this one"
        )


def _compiled_for(bundle: Bundle) -> str:
    return " ".join(word for word in bundle.manifest.isa.split() if word.startswith("sm_"))


def gpus() -> int:
    """How many there are here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def capability(device: str) -> str:
    """What a GPU's native code is named by: sm_90, say."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"

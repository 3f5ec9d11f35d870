"""What the programs of a torch or an aoti bundle are made for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from arriero.errors import FormatError
from arriero.export.bundle import Bundle

# Of keys, on a GPU: its kernels of attention want masks that are aligned.
_GPU_UNIT = 64


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
        return cls(torch.device(device), matrices, _GPU_UNIT)

    def length(self, tokens: int) -> int:
        """Of `span`, for so many tokens."""
        return -(-tokens // self.unit) * self.unit

    def room(self, context: int) -> int:
        """Of a row of the cache; a traced length has more than one size."""
        return max(self.length(context), 2 * self.unit)


CPU = Target(torch.device("cpu"))


def target_of(bundle: Bundle, matrices: torch.dtype, device: str | None = None) -> Target:
    """Where a bundle computes here.

    Args:
        matrices: see `Target.of`.
        device: see `check_gpu`.

    Raises:
        FormatError: see `check_gpu`.
    """
    if bundle.manifest.device == "cpu":
        return CPU
    return Target.of(check_gpu(bundle, device), matrices)


def check_gpu(bundle: Bundle, device: str | None = None) -> str:
    """The name of the GPU that a bundle for GPUs runs on.

    Args:
        device: cuda:N, where there are several; any other is the one of this process.

    Raises:
        FormatError: there is no such GPU here, or another one than native code was compiled for.
    """
    folder, manifest, count = bundle.folder, bundle.manifest, gpus()
    if not count:
        raise FormatError(f"{folder}: is made for a GPU, and there is none here; export the model for --device cpu")
    name = device if device is not None and device.startswith("cuda:") else "cuda"
    if int(name.partition(":")[2] or 0) >= count:
        raise FormatError(f"{folder}: there is no {name} here, and {count} GPUs are")
    compiled, own = " ".join(word for word in manifest.isa.split() if word.startswith("sm_")), capability(name)
    if manifest.kind == "aoti" and compiled != own:
        raise FormatError(
            f"{folder}: is compiled for GPUs of the kind {compiled[:20] or 'none'}, and {name} is {own}; export the model on a "
            "machine like this one"
        )
    return name


def gpus() -> int:
    """How many there are here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def capability(device: str) -> str:
    """What a GPU's native code is named by: sm_90, say."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"

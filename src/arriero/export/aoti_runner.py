"""What computes an engine's steps with an aoti bundle: compiled programs, and none of the model's code.

The bundle's manifest must be checked before: a package is native code, and loading it runs it.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.export.bundle import Bundle
from arriero.export.slot_runner import SlotRunner
from arriero.export.torch_session import on_device, open_weights, program_runner, stored_dtype
from arriero.export.torch_target import target_of

STEP = "step"
_DECODE = "decode_"
_NAME = re.compile(rf"[^/]+/data/aotinductor/{_DECODE}([1-9][0-9]{{0,3}})/[^/]+\.so")


def decode_name(rows: int) -> str:
    """Of the program that continues so many sequences by a token each."""
    return f"{_DECODE}{rows}"


class AotiProgram:
    """A compiled program of tensors with one result.

    Attributes:
        name: in its package.
    """

    def __init__(self, bundle: Bundle, name: str, device: torch.device) -> None:
        """
        Args:
            device: that it runs on, of the kind that it is compiled for.

        Raises:
            FormatError: when torch cannot load it.
        """
        self.name = name
        try:
            # one thread calls it, so it need not be locked
            number = -1 if device.index is None else device.index
            self._loader = torch._C._aoti.AOTIModelPackageLoader(str(bundle.graph), name, True, 1, number)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise FormatError(
                f"{bundle.graph}: torch cannot load its program {name} ({reason}); export it again"
            ) from error

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Compute; some inputs are written to."""
        return self._loader.run(list(inputs))[0]


def open_runner(
    bundle: Bundle, slots: int, threads: int | None = None, *, spinning: bool = True, device: str | None = None
) -> SlotRunner:
    """See `kinds.open_runner`; the number of threads, and how they wait, is that of torch in this process.

    Raises:
        FormatError: when torch cannot load the programs, or there is not the GPU that they are compiled for.
    """
    weights = open_weights(bundle)
    target = target_of(bundle, stored_dtype(weights), device)
    where = target.device
    decode = {rows: AotiProgram(bundle, decode_name(rows), where) for rows in _decode_rows(bundle.graph)}
    weights = on_device(bundle, weights, target)
    return program_runner(bundle, AotiProgram(bundle, STEP, where), decode, weights, slots, threads, target)


def _decode_rows(package: Path) -> list[int]:
    """Of the programs in a package that continue sequences by a token."""
    try:
        with zipfile.ZipFile(package) as archive:
            found = [_NAME.fullmatch(name) for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise FormatError(f"{package}: is no package of programs ({error}); export the model again") from error
    return sorted(int(match[1]) for match in found if match is not None)

"""What computes an engine's steps with an aoti bundle: compiled programs, and none of the model's code.

The bundle's manifest must be checked before: a package is native code, and loading it runs it.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.export.bundle import Bundle
from arriero.export.slot_runner import SlotRunner
from arriero.export.torch_session import model_shape, on_device, open_weights, program_runner, stored_dtype
from arriero.export.torch_target import Target, target_of

STEP, ROWS = "step", "rows"
# What a program says of itself: the context, and a digest of the shapes that it was compiled for.
_CONTEXT, _SHAPES = "arriero_context", "arriero_shapes"
_NAME = re.compile(r"[^/]+/data/aotinductor/([a-z0-9_]+)/[^/]+\.so")
_DECODE = "decode_"
_DECODE_NAME = re.compile(rf"{_DECODE}[1-9][0-9]{{0,3}}")


def decode_name(rows: int) -> str:
    """Of the program that continues so many sequences by a token each."""
    return f"{_DECODE}{rows}"


def program_notes(
    cache_shape: tuple[int, int, int], vocab_size: int, context: int, weights: Mapping[str, Any], target: Target
) -> dict[str, str]:
    """What a program is told to say of itself: it does not look at the shapes of its inputs, and dies of others.

    Args:
        cache_shape: layers, key-value heads and numbers of each.
        weights: its inputs, of which each has a shape and a dtype.
    """
    shapes = [(name, list(weights[name].shape), str(weights[name].dtype)) for name in sorted(weights)]
    told = json.dumps([list(cache_shape), vocab_size, target.room(context), str(target.dtype), shapes])
    return {_CONTEXT: str(context), _SHAPES: hashlib.sha256(told.encode()).hexdigest()}


class AotiProgram:
    """A compiled program of tensors with one result.

    Attributes:
        name: in its package.
        notes: what it says of itself, see `program_notes`.
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
        self.notes: dict[str, str] = self._loader.get_metadata()

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Compute; some inputs are written to."""
        return self._loader.run(list(inputs))[0]


def open_runner(
    bundle: Bundle, slots: int, threads: int | None = None, *, spinning: bool = True, device: str | None = None
) -> SlotRunner:
    """See `kinds.open_runner`; the number of threads, and how they wait, is that of torch in this process.

    Raises:
        FormatError: when torch cannot load the programs, there is not the GPU that they are compiled for, or they are compiled
            for another context or model than the manifest tells of.
    """
    weights = open_weights(bundle)
    target = target_of(bundle, stored_dtype(weights), device)
    notes = program_notes(*model_shape(bundle), bundle.manifest.context, weights, target)
    where = target.device
    step = AotiProgram(bundle, STEP, where)
    names = _names(bundle.graph)
    rows_of = {int(name.removeprefix(_DECODE)): name for name in names if _DECODE_NAME.fullmatch(name)}
    decode = {rows: AotiProgram(bundle, rows_of[rows], where) for rows in sorted(rows_of)}
    rows_program = AotiProgram(bundle, ROWS, where) if ROWS in names else None
    for program in (step, *decode.values(), rows_program):
        if program is not None:
            _check_notes(bundle.graph, program, notes)
    weights = on_device(bundle, weights, target)
    return program_runner(bundle, step, decode, weights, slots, threads, target, one_token=rows_program)


def _check_notes(path: Path, program: AotiProgram, wanted: Mapping[str, str]) -> None:
    """
    Raises:
        FormatError: a program is compiled for other inputs than it will be given.
    """
    found = {key: program.notes.get(key) for key in wanted}
    if None in found.values():
        raise FormatError(f"{path}: its program {program.name} does not say what it is compiled for; export it again")
    if found[_CONTEXT] != wanted[_CONTEXT]:
        raise FormatError(
            f"{path}: its program {program.name} is compiled for a context of {str(found[_CONTEXT])[:20]}, and the manifest "
            f"says {wanted[_CONTEXT]}; export it again"
        )
    if found != wanted:
        raise FormatError(
            f"{path}: its program {program.name} is compiled for another model than the manifest and the weights are of; "
            "export it again"
        )


def _names(package: Path) -> set[str]:
    """Of the programs in a package."""
    try:
        with zipfile.ZipFile(package) as archive:
            found = [_NAME.fullmatch(name) for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise FormatError(f"{package}: is no package of programs ({error}); export the model again") from error
    return {match[1] for match in found if match is not None}

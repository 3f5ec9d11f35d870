"""Sequences' keys and values, and the programs that compute with them: what a torch and an aoti bundle run in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from arriero.cuda_capture import Capture, CudaCapture
from arriero.errors import FormatError
from arriero.export.bundle import Bundle
from arriero.export.captured_steps import CapturedSteps
from arriero.export.prefix_file import read_prefix
from arriero.export.slot_runner import SlotRunner
from arriero.export.torch_target import CPU, Target
from arriero.export.untouched_memory import untouched_zeros
from arriero.formats.safe_tensors import read_tensors
from arriero.onednn import limit_kept_kernels, onednn_is_faster

WEIGHTS = "weights.safetensors"
Integers = npt.NDArray[np.int64]
# Of one session on a CPU, where the engine draws with NumPy as from other bundles, and of one on a GPU.
Logits = npt.NDArray[np.float32] | Tensor
# Of a GPU's free memory, what keys and values may take.
_GPU_SHARE = 0.8
# A program: its inputs in order -> logits (n, vocab_size); some inputs are written to.
Program = Callable[[Sequence[Tensor]], Tensor]


class TorchSession:
    """Computes tokens of neighbouring rows of its cache; the session of a `SlotRunner`.

    Attributes:
        rows: sequences that the cache has room for.
        context: tokens of each.
        vocab_size: of the logits.
        cache_shape: layers, key-value heads, and the numbers of each.
        library, device: of the logits.
    """

    def __init__(
        self,
        step: Program,
        decode: Mapping[int, Program],
        weights: Sequence[Tensor],
        cache_shape: tuple[int, int, int],
        context: int,
        vocab_size: int,
        rows: int,
        target: Target = CPU,
        capture: Capture | None = None,
        one_token: Program | None = None,
    ) -> None:
        """
        Args:
            step: see `torch_program.StepProgram`.
            decode: `DecodeProgram`s by their number of sequences, on a CPU; with none, `step` does it.
            weights: inputs of both, in order, on the target's device.
            capture: of steps of one token; None where they are computed as they are.
            one_token: a `RowsProgram`, on a CPU, which then does what `decode` would.
        """
        self.rows, self.context, self.vocab_size, self.cache_shape = rows, context, vocab_size, cache_shape
        self.library: Literal["torch", "numpy"] = "numpy" if target.device.type == "cpu" else "torch"
        self.device, self._target = target.device, target
        self._step, self._decode, self._one_token, self._weights = step, decode, one_token, list(weights)
        layers, heads, head_dim = cache_shape
        spare = bool(decode)  # for what is computed in a place that no sequence needs
        shape = (rows + spare, 2 * heads, target.room(context), head_dim)
        self._caches = [_zeros(shape, target) for _ in range(layers)]
        self._row_caches = [[cache[row] for cache in self._caches] for row in range(rows + spare)]
        self._span = torch.arange(target.room(context), device=target.device)
        steps = (step, self._weights, self._caches, self._span)
        self._captured = None if capture is None else CapturedSteps(*steps, capture)

    def run(self, first: int, ids: Integers, starts: Integers, counts: Integers, logits_at: Integers) -> Logits:
        """Compute tokens and store their keys and values.

        Args:
            first: the row of the cache that the first row of the batch is of; the next ones follow.
            ids: (B, S), filled up on the right with any ids; `starts` + S must not go beyond the context.
            starts: (B), tokens of each sequence that were computed before.
            counts: (B), the real ones of each row; that of one row is S.
            logits_at: (n), places in the flattened `ids`.

        Returns:
            (n, vocab_size).
        """
        with torch.inference_mode(), self._kernels():
            return self._run(first, ids, starts, counts, logits_at)

    def _kernels(self) -> AbstractContextManager[None]:
        """Of attention: on a CPU whatever torch takes."""
        return nullcontext() if self._target.unit == 1 else sdpa_kernel(self._target.kernels)

    def _run(self, first: int, ids: Integers, starts: Integers, counts: Integers, logits_at: Integers) -> Logits:
        if (self._decode or self._one_token) and ids.shape[1] == 1 and len(logits_at):
            logits = self._run_rows(first, ids[:, 0], starts)
            return logits if logits_at.tolist() == list(range(len(logits))) else logits[logits_at]
        if self._captured is not None and ids.shape[1] == 1 and len(logits_at):
            repeated = self._captured.run(first, ids[:, 0], starts)
            if repeated is not None:
                own = logits_at.tolist() == list(range(len(ids)))
                return self._arrays(repeated if own else repeated[torch.from_numpy(logits_at).to(self.device)])
        # a program computes one row of logits or more
        wanted = logits_at if len(logits_at) else np.zeros(1, np.int64)
        inputs = [
            torch.from_numpy(ids).to(self.device),
            torch.from_numpy(starts).to(self.device),
            self._span[: self._target.length(int((starts + counts).max()))],
            torch.from_numpy(wanted).to(self.device),
            *self._weights,
            *[cache[first : first + len(ids)] for cache in self._caches],
        ]
        return self._arrays(self._step(inputs)[: len(logits_at)])

    def _arrays(self, logits: Tensor) -> Logits:
        return logits if self.library == "torch" else logits.numpy()

    def joined(self, parts: Sequence[Any]) -> Logits:
        """Logits of several runs in one array; of none, too."""
        if self.library == "numpy":
            return np.concatenate([np.empty((0, self.vocab_size), np.float32), *parts])
        return torch.cat([torch.empty(0, self.vocab_size, device=self.device), *parts])

    def _run_rows(self, first: int, ids: Integers, starts: Integers) -> npt.NDArray[np.float32]:
        """One token of each of some rows: the logits of all, (B, vocab_size)."""
        if self._one_token is not None:
            inputs = [torch.from_numpy(np.ascontiguousarray(ids)), torch.from_numpy(starts), *self._weights]
            caches = [cache[first : first + len(ids)] for cache in self._caches]
            return self._one_token([*inputs, *caches]).numpy()
        found, done = [], 0
        while done < len(ids):
            left = len(ids) - done
            size = min((size for size in self._decode if size >= left), default=max(self._decode))
            own, filled = slice(done, done + size), max(0, size - left)
            begins = [*starts[own].tolist(), *[0] * filled]
            rows = [*range(first + done, first + done + size - filled), *[self.rows] * filled]
            inputs = [
                torch.tensor([*ids[own].tolist(), *[0] * filled]),
                torch.tensor(begins),
                *[self._span[: begin + 1] for begin in begins],
                *self._weights,
                *[cache for row in rows for cache in self._row_caches[row]],
            ]
            found.append(self._decode[size](inputs).numpy()[: size - filled])
            done += size
        return np.concatenate(found) if len(found) > 1 else found[0]

    def fill(self, row: int, start: int, values: npt.NDArray[np.float32]) -> None:
        """Store keys and values that were not computed here.

        Args:
            start: the position of the first.
            values: (layers, 2, KV, n, D), keys and values of each layer.
        """
        end = start + values.shape[3]
        for cache, given in zip(self._caches, values, strict=True):
            cache[row, :, start:end] = torch.from_numpy(given.reshape(-1, *given.shape[2:])).to(cache)

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Copy what one row has of these positions to another."""
        for cache in self._caches:
            cache[target, :, start:end] = cache[source, :, start:end]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first tokens of two rows of the cache."""
        for cache in self._caches:
            kept = cache[one, :, :length].clone()
            cache[one, :, :length] = cache[other, :, :length]
            cache[other, :, :length] = kept


def open_weights(bundle: Bundle) -> dict[str, Tensor]:
    """The weights of a bundle by name, mapped, in the order of a program's inputs.

    Raises:
        FormatError: when the file is not one of weights.
    """
    path = bundle.folder / WEIGHTS
    if WEIGHTS not in bundle.manifest.files:
        raise FormatError(f"{bundle.folder}: names no {WEIGHTS} among its files; export the model again")
    return dict(sorted(read_tensors(path)))


def on_device(bundle: Bundle, weights: Mapping[str, Tensor], target: Target) -> dict[str, Tensor]:
    """The weights where they are computed with.

    Raises:
        FormatError: when they do not fit.
    """
    try:
        return {name: value.to(target.device) for name, value in weights.items()}
    except torch.OutOfMemoryError as error:
        size = sum(value.nbytes for value in weights.values()) / 1e9
        raise FormatError(
            f"{bundle.folder}: its weights, {size:,.1f} GB, do not fit what is free of {target.device}'s memory"
        ) from error


def stored_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    """Of matrices."""
    return next((value.dtype for value in weights.values() if value.dim() == 2), torch.float32)


def model_shape(bundle: Bundle) -> tuple[tuple[int, int, int], int]:
    """Layers, key-value heads and numbers of each; and the vocabulary's size: as a manifest's configuration says.

    Raises:
        FormatError: when it does not.
    """
    keys = ("num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size")
    found = [bundle.manifest.config.get(key) for key in keys]
    for key, value in zip(keys, found, strict=True):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FormatError(f"{bundle.folder}: its configuration has no {key}; export the model again")
    layers, heads, head_dim, vocab_size = (int(value) for value in found if value is not None)
    return (layers, heads, head_dim), vocab_size


def _zeros(shape: tuple[int, ...], target: Target) -> Tensor:
    """Memory for keys and values."""
    if target.device.type == "cpu" and target.dtype == torch.float32:
        return torch.from_numpy(untouched_zeros(shape))
    return torch.zeros(shape, dtype=target.dtype, device=target.device)


def program_runner(
    bundle: Bundle,
    step: Program,
    decode: Mapping[int, Program],
    weights: Mapping[str, Tensor],
    slots: int,
    threads: int | None,
    target: Target = CPU,
    *,
    captured: bool = False,
    one_token: Program | None = None,
) -> SlotRunner:
    """An engine's `Runner` of a bundle's programs.

    Args:
        weights: on the target's device.
        slots: on a GPU fewer, if not so many fit its free memory.
        threads: of torch, in this whole process; None leaves them.
        captured: steps of one token are CUDA graphs, on a GPU.

    Raises:
        FormatError: when the bundle's prefix does not fit its model, or its context not into the address space.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if target.device.type == "cpu" and onednn_is_faster():
        limit_kept_kernels()
    (layers, heads, head_dim), vocab_size = model_shape(bundle)
    context, length = bundle.manifest.context, bundle.manifest.prefix_length
    shape = (layers, heads, head_dim)
    slot_bytes = 2 * target.dtype.itemsize * prod(shape) * target.room(context)
    if target.device.type == "cuda":
        slots = max(1, min(slots, int(torch.cuda.mem_get_info(target.device)[0] * _GPU_SHARE) // slot_bytes))
    capture = CudaCapture(target.device) if captured and target.device.type == "cuda" else None
    ordered = list(weights.values())
    try:
        session = TorchSession(
            step, decode, ordered, shape, context, vocab_size, slots, target, capture, one_token=one_token
        )
    except (OSError, OverflowError, ValueError, TypeError, RuntimeError) as error:
        size = slot_bytes * slots / 1e9
        raise FormatError(
            f"{bundle.folder}: {size:,.0f} GB for keys and values of {slots} sequences of {context} tokens cannot be had "
            f"({error}): compute fewer at once (--batch_size), or export with a smaller --context"
        ) from error
    prefix = read_prefix(bundle.folder, (layers, 2, heads, length, head_dim)) if length else None
    return SlotRunner(session, prefix)


def check_inputs(path: Path, found: Sequence[tuple[Any, ...]], wanted: Sequence[tuple[Any, ...]]) -> None:
    """Compare the shapes (None for an open size) and dtypes of a program's inputs with those that it will be given.

    Raises:
        FormatError: at the first that does not fit.
    """
    if len(found) != len(wanted):
        raise FormatError(f"{path}: takes {len(found)} inputs, and the model has {len(wanted)}; export the model again")
    for number, ((shape, dtype), (own, kind)) in enumerate(zip(found, wanted, strict=True)):
        fits = len(shape) == len(own) and all(size in (None, other) for size, other in zip(shape, own, strict=True))
        if not fits or dtype != kind:
            raise FormatError(
                f"{path}: input {number} is {dtype} {list(shape)}, and the model's is {kind} {list(own)}; export it again"
            )

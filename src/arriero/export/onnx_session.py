"""An ONNX Runtime session over a graph of `onnx_graph`, with the keys and values of several sequences in place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from arriero.errors import FormatError, require
from arriero.export.untouched_memory import untouched_zeros
from arriero.process_pages import drop_pages, enlarge_pages, large_pages

_BINDINGS = 64  # that are kept
Integers = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


class OnnxSession:
    """Computes tokens of neighbouring rows of its cache.

    Attributes:
        rows: sequences that the cache has room for.
        context: tokens of each.
        vocab_size: of the logits.
        library, device: of the logits.
    """

    library: Literal["numpy"] = "numpy"
    device = "cpu"

    def __init__(self, graph: Path, rows: int, threads: int | None = None, *, spinning: bool = False) -> None:
        """
        Args:
            graph: the .onnx file; its weights lie beside it.
            rows: room for sequences; memory is taken as they grow.
            threads: of a computation; default: what the process may use of the machine's cores.
            spinning: threads wait for each other without giving up their cores, which pays only where nothing else runs.

        Raises:
            FormatError: when ONNX Runtime cannot load it, or the keys and values do not fit into the address space.
            MissingExtraError: without ONNX Runtime.
        """
        runtime = require("onnxruntime", "export")
        self.rows, self._graph = rows, graph
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or _cores()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        known = large_pages()
        try:
            self._session = runtime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's exceptions have no common base
            reason = " ".join(str(error).split())[:300]
            raise FormatError(f"{graph}: ONNX Runtime cannot load it ({reason})") from error
        drop_pages(graph.parent)
        enlarge_pages(large_pages() - known)
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        cached = {name: shape for name, shape in shapes.items() if name.startswith("past_key_values.")}
        outputs = [value.shape for value in self._session.get_outputs()]
        fixed = all(len(shape) == 4 and all(isinstance(size, int) for size in shape[1:]) for shape in cached.values())
        if not cached or not fixed or len(outputs[0]) != 2 or not isinstance(outputs[0][1], int):
            raise FormatError(f"{graph}: is not a graph that arriero wrote; export the model again")
        self.vocab_size, self.context = outputs[0][1], int(next(iter(cached.values()))[2])
        try:
            self._cache = {name: untouched_zeros((rows, *shape[1:])) for name, shape in cached.items()}
        except (OSError, OverflowError, ValueError, MemoryError) as error:
            size = 4e-9 * rows * sum(prod(shape[1:]) for shape in cached.values())
            raise FormatError(
                f"{graph}: {size:,.0f} GB for keys and values of {rows} sequences of {self.context} tokens cannot be had "
                f"({error}): compute fewer at once (--batch_size), or export with a smaller --context"
            ) from error
        self._bindings: dict[tuple[int, int], _Binding] = {}

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
        batch = len(ids)
        bound = self._binding(first, batch)
        bound.put(ids, starts + counts, counts, logits_at)
        logits = np.empty((len(logits_at), self.vocab_size), np.float32)
        bound.binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        try:
            self._session.run_with_iobinding(bound.binding)
        except Exception as error:  # see above
            reason = " ".join(str(error).split())[:300]
            raise FormatError(f"{self._graph}: ONNX Runtime cannot compute it ({reason})") from error
        return logits

    def joined(self, parts: Sequence[Logits]) -> Logits:
        """Logits of several runs in one array; of none, too."""
        return np.concatenate(parts) if parts else np.empty((0, self.vocab_size), np.float32)

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, key-value heads, and the numbers of each."""
        first = next(iter(self._cache.values()))
        return len(self._cache) // 2, first.shape[1], first.shape[3]

    def fill(self, row: int, start: int, values: npt.NDArray[np.float32]) -> None:
        """Store keys and values that were not computed here.

        Args:
            start: the position of the first.
            values: (layers, 2, KV, n, D), keys and values of each layer.
        """
        for layer, (keys, others) in enumerate(values):
            for part, given in (("key", keys), ("value", others)):
                self._cache[f"past_key_values.{layer}.{part}"][row, :, start : start + given.shape[1]] = given

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Copy what one row has of these positions to another."""
        for values in self._cache.values():
            values[target, :, start:end] = values[source, :, start:end]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first tokens of two rows of the cache."""
        for values in self._cache.values():
            kept = values[one, :, :length].copy()
            values[one, :, :length] = values[other, :, :length]
            values[other, :, :length] = kept

    def _binding(self, first: int, batch: int) -> _Binding:
        """That of these rows of the cache."""
        found = self._bindings.get((first, batch))
        if found is None:
            if len(self._bindings) >= _BINDINGS:
                self._bindings.clear()
            cache = {name: values[first : first + batch] for name, values in self._cache.items()}
            found = self._bindings[first, batch] = _Binding(self._session.io_binding(), cache)
        return found


class _Binding:
    """What a batch of some rows of the cache reads, in arrays that stay bound: a step of one token is then a few assignments.

    Attributes:
        binding: ONNX Runtime's.
    """

    def __init__(self, binding: Any, cache: dict[str, npt.NDArray[np.float32]]) -> None:
        """
        Args:
            cache: the rows of each input for past keys or values, (B, KV, context, D).
        """
        self.binding = binding
        for name, rows in cache.items():
            place = ("cpu", 0, np.float32, rows.shape, rows.ctypes.data)
            binding.bind_input(name, *place)
            binding.bind_output(name.replace("past_key_values", "present"), *place)
        batch = len(next(iter(cache.values())))
        self._ids = self._logits_at = np.empty((), np.int64)  # of no shape that is asked for
        self._counts, self._last = np.empty(batch, np.int32), np.empty(batch, np.int32)
        self._longest = np.empty((), np.int32)
        self._bind("query_lengths", self._counts)
        self._bind("seqlens_k", self._last)
        self._bind("total_sequence_length", self._longest)

    def put(self, ids: Integers, totals: Integers, counts: Integers, logits_at: Integers) -> None:
        """Set the inputs.

        Args:
            ids, counts, logits_at: see `OnnxSession.run`.
            totals: (B), tokens of each sequence with these.
        """
        if ids.shape != self._ids.shape:
            self._ids = np.empty(ids.shape, np.int64)
            self._bind("input_ids", self._ids)
        if logits_at.shape != self._logits_at.shape:
            self._logits_at = np.empty(logits_at.shape, np.int64)
            self._bind("logits_at", self._logits_at)
        self._ids[...], self._logits_at[...], self._counts[...] = ids, logits_at, counts
        np.subtract(totals, 1, out=self._last, casting="same_kind")
        self._longest[...] = totals.max()

    def _bind(self, name: str, values: npt.NDArray[Any]) -> None:
        self.binding.bind_input(name, "cpu", 0, values.dtype.type, values.shape, values.ctypes.data)


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

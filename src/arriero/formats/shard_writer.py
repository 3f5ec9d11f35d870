"""Cutting a model folder into one weight file a process; see `arriero.formats.tensor_shards`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from arriero.formats.hf import copy_side_files, dtype_name, open_state, parse_dtype
from arriero.formats.hf_source import open_hf
from arriero.formats.narrowing import narrowed
from arriero.formats.safe_tensors import WEIGHT_FILES, LazyTensor
from arriero.formats.safetensors_header import build_header
from arriero.formats.shared_files import Peers, shared_folder
from arriero.formats.source import ModelSource
from arriero.formats.staging import staged_folder
from arriero.formats.tensor_shards import check_degree, piece_shape, shard_file, shard_metadata
from arriero.formats.tied_head import read_config
from arriero.models.config import LlamaConfig
from arriero.models.tensor_split import cut_of
from arriero.models.weight_shapes import weight_shapes


def write_shards(
    source: str | Path | ModelSource,
    folder: str | Path,
    tp: int,
    stages: Sequence[range] | None = None,
    dtype: str | torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a model as shards, as a whole or not at all; one tensor at a time is in memory.

    Args:
        source: a model folder, of shards or not, or an open model.
        tp: processes that share out each matrix.
        stages: the layers of each process of the pipeline; None: no pipeline.
        dtype: to cast to; None keeps each tensor's.
        progress: told bytes done and bytes in all, after each tensor.

    Raises:
        FormatError: when the model cannot be cut so, its folder is broken, or something cannot be written.
    """
    source = source if isinstance(source, ModelSource) else open_hf(source)
    config, wanted, state = source.config, parse_dtype(dtype), source.tensors
    check_degree(config, tp, source.path)
    stages = stages or [range(config.num_hidden_layers)]
    kinds = {name: wanted or state[name].dtype for name in weight_shapes(config)}
    config = dataclasses.replace(config, dtype=dtype_name(max(kinds.values(), key=lambda kind: kind.itemsize)))
    size, done = sum(prod(state[name].shape) * kind.itemsize for name, kind in kinds.items()), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, size)

    with staged_folder(folder, replaces=WEIGHT_FILES) as staging:
        for pp_rank in range(len(stages)):
            held = {name: kind for name, kind in kinds.items() if _stage_of(name, stages) == pp_rank}
            paths = {rank: staging / shard_file(rank, tp, pp_rank, len(stages)) for rank in range(tp)}
            _write_files(state, held, config, paths, tp, pp_rank, len(stages), advance)
        for name, content in {**source.files, **source.rounding}.items():
            (staging / name).write_bytes(content)
        _write_config(config, staging)


def write_own_shard(
    source: str | Path,
    folder: str | Path,
    names: Collection[str],
    degrees: tuple[int, int],
    at: tuple[int, int],
    peers: Peers,
    *,
    writes: bool = True,
) -> None:
    """Of a model folder that every process sees, let each process write its own file; all of them call this.

    Args:
        source: the model folder.
        names: tensors of which this process holds a part; those that `source` does not have are left out.
        degrees: of tensor parallelism and of the pipeline.
        at: where this process stands on both.
        writes: whether it is the one of those standing there that writes.

    Raises:
        FormatError: when the folder is broken or something cannot be written.
        PeerError: when that was so in another process.
    """
    (tp, pp), (tp_rank, pp_rank) = degrees, at
    with shared_folder(folder, peers, replaces=WEIGHT_FILES) as staging, peers.together():
        config = read_config(source)
        if writes:
            state = open_state(source, config)
            held = {name: state[name].dtype for name in weight_shapes(config) if name in names}
            path = staging / shard_file(tp_rank, tp, pp_rank, pp)
            _write_files(state, held, config, {tp_rank: path}, tp, pp_rank, pp)
        if peers.first:
            copy_side_files(source, staging)
            _write_config(config, staging)


def _write_files(
    state: Mapping[str, Tensor | LazyTensor],
    held: Mapping[str, torch.dtype],
    config: LlamaConfig,
    paths: Mapping[int, Path],
    tp: int,
    pp_rank: int,
    pp: int,
    advance: Callable[[int], None] | None = None,
) -> None:
    """The files of some processes of a pipeline stage, one tensor at a time.

    Args:
        held: the stage's tensors, with the type to write.
        paths: of each file, by its process's number in tensor parallelism.
        advance: told the bytes of each tensor when it is written.
    """
    with ExitStack() as stack:
        files = {}
        for rank, path in paths.items():
            entries = {
                name: (kind, piece_shape(name, tuple(state[name].shape), config, tp, rank))
                for name, kind in held.items()
            }
            header = build_header(entries, shard_metadata(rank, tp, pp_rank, pp))
            files[rank] = stack.enter_context(_ShardFile(path, *header))
        for name, kind in held.items():
            value = state[name]
            whole = value.load() if isinstance(value, LazyTensor) else value
            for rank, file in files.items():
                cut = cut_of(name, tuple(whole.shape), config, tp, rank)
                piece = whole if cut.dim is None else whole.narrow(cut.dim, cut.start, cut.size)
                file.write(name, narrowed(piece, kind, name))
            if advance is not None:
                advance(prod(whole.shape) * kind.itemsize)


def _write_config(config: LlamaConfig, folder: Path) -> None:
    text = json.dumps(config.to_dict(), indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _stage_of(name: str, stages: Sequence[range]) -> int:
    """Which process of the pipeline holds a tensor: the embedding is in the first, final norm and head in the last."""
    if name.startswith("model.layers."):
        layer = int(name.split(".")[2])
        return next(stage for stage, layers in enumerate(stages) if layer in layers)
    return 0 if name.startswith("model.embed_tokens.") else len(stages) - 1


class _ShardFile:
    """A file of announced tensors, each written when it comes."""

    def __init__(self, path: Path, header: bytes, starts: dict[str, int], size: int) -> None:
        self._starts = starts
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.ftruncate(self._descriptor, size)
            self._put(memoryview(header), 0)
        except OSError:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> _ShardFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def write(self, name: str, tensor: Tensor) -> None:
        if prod(tensor.shape):
            self._put(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, self._starts[name])

    def _put(self, content: memoryview, at: int) -> None:
        while content:
            done = os.pwrite(self._descriptor, content, at)
            content, at = content[done:], at + done

"""Writing PaddleNLP model folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.chunk_writer import ChunkWriter
from arriero.formats.paddle.checkpoint import MODEL_STEM
from arriero.formats.paddle.config import paddle_config
from arriero.formats.paddle.names import Place, places
from arriero.formats.paddle.pdparams_writer import write_pdparams
from arriero.formats.paddle.reader import SENTENCEPIECE, TOKENIZER_MODEL
from arriero.formats.rearranged import rearranged
from arriero.formats.safe_tensors import LazyTensor
from arriero.formats.source import ModelSource
from arriero.formats.staging import staged_folder

Progress = Callable[[int, int], None]
_REPLACED = (f"{MODEL_STEM}*.pdparams", f"{MODEL_STEM}*.pdparams.index.json")
_BYTES_PER_NAME = 512  # what a tensor costs besides its numbers, at most


def write_paddle(
    source: ModelSource,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
    tensor_parallel_degree: int = 1,
    pipeline_parallel_degree: int = 1,
    progress: Progress | None = None,
) -> None:
    """Write a model as PaddleNLP saves it: weights, config.json and tokenizer, as a whole or not at all.

    In memory is one tensor as its source makes it (of a mapped file nothing), and some rows while they are transposed; of a
    model larger than the kernel's cache, two tensors of at most 256 MiB together, or one.

    Args:
        dtype: to cast to; None keeps each tensor's.
        max_shard_size: of a file in bytes; beyond it the weights are cut into shards with an index. With a degree above 1
            there is one file a process, of whatever size, as PaddleNLP wants it.
        tensor_parallel_degree: processes that share out each matrix: one `model_state.tpNN.pdparams` each.
        pipeline_parallel_degree: stages that share out the layers, evenly: one `model_state.ppMM.pdparams` (or `tpNN_ppMM`)
            each.
        progress: called with the bytes of tensors written and in all, after each tensor.

    Raises:
        FormatError: for a model that PaddleNLP cannot compute or that cannot be cut so, or when something cannot be written.
    """
    tp, pp = tensor_parallel_degree, pipeline_parallel_degree
    if tp < 1 or pp < 1 or pp > source.config.num_hidden_layers:
        raise FormatError(
            f"tensor_parallel_degree {tp} and pipeline_parallel_degree {pp} must be at least 1, and the latter at most the "
            f"number of layers, {source.config.num_hidden_layers}"
        )
    kinds = {name: dtype or tensor.dtype for name, tensor in source.tensors.items()}
    widest = max(kinds.values(), key=lambda kind: kind.itemsize)
    config = paddle_config(source.config, str(widest).removeprefix("torch."), tp)
    found = places(source.config, tp)
    pieces = {
        file: {found[name].stored.name: _piece(source.tensors[name], found[name], tp, rank) for name in names}
        for file, names, rank in _files(found, kinds, max_shard_size, tp, pp)
    }
    total = sum(prod(t.shape) * (dtype or t.dtype).itemsize for file in pieces.values() for t in file.values())
    with staged_folder(folder, replaces=_REPLACED) as staging, ChunkWriter(total) as writer:
        done = 0
        for file, tensors in pieces.items():
            shifted = _shifted(progress, done, total)
            write_pdparams(staging / file, tensors, dtype=dtype, progress=shifted, writer=writer)
            done += sum(prod(t.shape) * (dtype or t.dtype).itemsize for t in tensors.values())
        if tp == pp == 1 and len(pieces) > 1:
            listed = {name: file for file, tensors in pieces.items() for name in tensors}
            index = {"metadata": {"total_size": total}, "weight_map": listed}
            _write_json(staging / f"{MODEL_STEM}.pdparams.index.json", index)
        for name, content in paddle_side_files(source.files).items():
            (staging / name).write_bytes(content)
        _write_json(staging / "config.json", config)


def paddle_side_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of an HF folder under the names that PaddleNLP loads: SentencePiece's model is `sentencepiece.bpe.model`;
    one of another kind (tiktoken's ranks, which are text) stays `tokenizer.model`.
    """
    model = files.get(TOKENIZER_MODEL)
    if model is None or not model.startswith(b"\n"):  # field 1 of a protobuf: SentencePiece's pieces come first
        return dict(files)
    return {SENTENCEPIECE if name == TOKENIZER_MODEL else name: content for name, content in files.items()}


def _files(
    found: Mapping[str, Place], kinds: Mapping[str, torch.dtype], max_shard_size: int, tp: int, pp: int
) -> list[tuple[str, list[str], int]]:
    """Each file's name, the HF names of its tensors and the process whose parts it holds."""
    if tp == pp == 1:
        shards = _shards(found, kinds, max_shard_size)
        names = [f"{MODEL_STEM}-{n:05d}-of-{len(shards):05d}.pdparams" for n in range(1, len(shards) + 1)]
        if len(shards) == 1:
            names = [f"{MODEL_STEM}.pdparams"]
        return [(name, shard, 0) for name, shard in zip(names, shards, strict=True)]
    layers = len({_layer(name) for name in found} - {None})
    result = []
    for stage in range(pp):
        first, last = stage * layers // pp, (stage + 1) * layers // pp
        held = [name for name in found if _stage_holds(name, first, last, stage, pp)]
        for rank in range(tp):
            parts = ([f"tp{rank:02d}"] if tp > 1 else []) + ([f"pp{stage:02d}"] if pp > 1 else [])
            result.append((f"{MODEL_STEM}.{'_'.join(parts)}.pdparams", held, rank))
    return result


def _shards(found: Mapping[str, Place], kinds: Mapping[str, torch.dtype], max_shard_size: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, place in found.items():
        size = prod(place.shape) * kinds[name].itemsize + _BYTES_PER_NAME
        if shards[-1] and used + size > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _layer(name: str) -> int | None:
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def _stage_holds(name: str, first: int, last: int, stage: int, pp: int) -> bool:
    """The embedding is in the first stage, the last norm and the head are in the last."""
    layer = _layer(name)
    if layer is not None:
        return first <= layer < last
    return stage == (0 if name.startswith("model.embed_tokens.") else pp - 1)


def _piece(tensor: Tensor | LazyTensor, place: Place, tp: int, rank: int) -> Tensor | LazyTensor:
    """A process's part of a tensor, in Paddle's layout."""
    shape = place.stored.piece_shape(tp)
    if not place.transposed and shape == tuple(tensor.shape):
        return tensor
    return rearranged(tensor, shape, partial(_cut, place=place, tp=tp, rank=rank))


def _cut(whole: Tensor, place: Place, tp: int, rank: int) -> Tensor:
    stored = whole.t() if place.transposed else whole
    if place.stored.axis is not None and tp > 1:
        (segment,) = (part for part in place.stored.segments(tp) if part.rank == rank)
        stored = stored.narrow(place.stored.axis, segment.whole_start, segment.size)
    return stored


def _shifted(progress: Progress | None, done: int, total: int) -> Progress | None:
    """The progress of one file as that of all."""
    return None if progress is None else lambda own, _: progress(done + own, total)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

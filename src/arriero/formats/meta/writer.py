"""A model as a folder of Meta's: `consolidated.NN.pth`, params.json and tokenizer.model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats.chunk_writer import ChunkWriter
from arriero.formats.meta import tokenizer
from arriero.formats.meta.names import EMBEDDING, HEAD, NameRow, to_meta
from arriero.formats.meta.params import PARAMS_FILE, params_of
from arriero.formats.quantized import plain
from arriero.formats.rearranged import rearranged
from arriero.formats.rope_layout import pairs_view
from arriero.formats.safe_tensors import LazyTensor
from arriero.formats.source import ModelSource
from arriero.formats.staging import staged_folder
from arriero.formats.torch_writer import TorchFileWriter
from arriero.models.config import LlamaConfig
from arriero.models.weight_shapes import weight_shapes

MAX_RANKS = 1000


def write_meta(
    source: ModelSource,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 0,
    model_parallel_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[str, ...]:
    """Write a folder that Meta's own code loads, and that `open_meta` reads back without a loss.

    A tied head stands in the file as Meta's code wants it, sharing the embedding's bytes. What Meta's format cannot hold (the
    context length, a tokenizer that is not Llama's) is in HF's config.json and tokenizer files beside. In memory is
    what `ChunkWriter` takes.

    Args:
        dtype: to cast to; None keeps each tensor's.
        max_shard_size: has no effect: Meta's code has one file a rank.
        model_parallel_size: how many ranks share the model, each with a file of its own.
        progress: told the bytes written and the bytes in all after each tensor.

    Returns:
        What a user should know about the folder, a line each.

    Raises:
        FormatError: naming what Meta's format has no word for, or what cannot be written; nothing half-written remains.
    """
    config, ranks = plain(source.config), model_parallel_size
    sentencepiece = tokenizer.TOKENIZER_FILE in source.files
    params = params_of(config, sentencepiece=sentencepiece)
    _check_ranks(config, ranks)
    # The code that goes with a SentencePiece tokenizer (LLaMA 1 and 2) cuts the embedding's columns.
    columns = sentencepiece and ranks > 1
    rows = {name: _row(name, columns) for name in weight_shapes(config)}
    origin: dict[str, Tensor | LazyTensor] = {name: source.tensors[name] for name in rows}
    shared = {}
    if config.tie_word_embeddings and columns:
        rows[HEAD.hf], origin[HEAD.hf] = (HEAD.meta, HEAD), origin[EMBEDDING.hf]
    elif config.tie_word_embeddings:
        shared = {HEAD.meta: EMBEDDING.meta}
    kinds = {name: dtype or value.dtype for name, value in origin.items()}
    layout = {
        meta_name: (kinds[name], _cut_shape(tuple(origin[name].shape), row, ranks))
        for name, (meta_name, row) in rows.items()
    }
    total, done = sum(prod(value.shape) * kinds[name].itemsize for name, value in origin.items()), 0
    own, notes = _tokenizer(source.files)
    replaced = ("consolidated.*.pth", *((tokenizer.TOKENIZER_FILE,) if "tokenizer.json" in source.files else ()))
    with staged_folder(folder, replaces=replaced) as staging:
        with ChunkWriter(total) as writer, writer.filling(), ExitStack() as stack:
            paths = [staging / f"consolidated.{rank:02d}.pth" for rank in range(ranks)]
            files = [stack.enter_context(TorchFileWriter(path, layout, writer, shared)) for path in paths]
            for name, (meta_name, row) in rows.items():
                for rank, file in enumerate(files):
                    file.write(meta_name, _part(origin[name], layout[meta_name][1], name, row, config, rank))
                done += prod(origin[name].shape) * kinds[name].itemsize
                if progress is not None:
                    progress(done, total)
        widest = str(max(kinds.values(), key=lambda kind: kind.itemsize)).removeprefix("torch.")
        written = replace(config, dtype=widest).to_dict()
        (staging / PARAMS_FILE).write_text(json.dumps(params) + "\n", encoding="utf-8")
        (staging / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        for file_name, content in {**source.files, **own}.items():
            (staging / file_name).write_bytes(content)
    return notes


def _row(name: str, columns: bool) -> tuple[str, NameRow]:
    meta_name, row = to_meta(name, "the weights to save")
    return meta_name, replace(row, cut=1) if columns and row is EMBEDDING else row


def _check_ranks(config: LlamaConfig, ranks: int) -> None:
    if not 1 <= ranks <= MAX_RANKS:
        raise FormatError(f"the model-parallel size must be from 1 to {MAX_RANKS}, got {ranks}")
    counts = {
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
    }
    for what, count in counts.items():
        if count % ranks:
            degrees = [n for n in range(1, MAX_RANKS + 1) if not any(size % n for size in counts.values())]
            raise FormatError(
                f"{what} is {count}, which {ranks} ranks of model parallelism cannot share evenly: possible with "
                f"--tensor_parallel_degree are {', '.join(map(str, degrees))}"
            )


def _cut_shape(shape: tuple[int, ...], row: NameRow, ranks: int) -> tuple[int, ...]:
    return tuple(size // ranks if dimension == row.cut else size for dimension, size in enumerate(shape))


def _part(
    value: Tensor | LazyTensor, shape: tuple[int, ...], name: str, row: NameRow, config: LlamaConfig, rank: int
) -> Tensor | LazyTensor:
    """A rank's part of a tensor, with its rows in Meta's order."""
    if not row.permuted and shape == tuple(value.shape):
        return value
    heads = (config.num_attention_heads if "q_proj" in name else config.num_key_value_heads) if row.permuted else 0
    return rearranged(value, shape, partial(_view, shape=shape, cut=row.cut, heads=heads, rank=rank))


def _view(whole: Tensor, shape: tuple[int, ...], cut: int | None, heads: int, rank: int) -> Tensor:
    part = whole if cut is None else whole.narrow(cut, rank * shape[cut], shape[cut])
    # a rank has whole heads
    return pairs_view(part, heads * shape[0] // whole.shape[0]) if heads else part


def _tokenizer(files: Mapping[str, bytes]) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The tokenizer in the way of Llama 3 if it can be said so, and if not, why."""
    if tokenizer.TOKENIZER_FILE in files or "tokenizer.json" not in files:
        return {}, ()
    content, reason = tokenizer.tiktoken_file(files["tokenizer.json"])
    if content:
        return {tokenizer.TOKENIZER_FILE: content}, ()
    note = f"no {tokenizer.TOKENIZER_FILE}, which Meta's own code needs: {reason}; tokenizer.json stands beside"
    return {}, (note,)

"""Writing a model of any format as a GGUF file, which llama.cpp and its kin load."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from arriero.formats.gguf.container import TensorToWrite, write_container
from arriero.formats.gguf.llama3_rope import rope_divisors
from arriero.formats.gguf.metadata import check_expressible, model_metadata, notes
from arriero.formats.gguf.names import ROPE_FREQUENCIES, gguf_name, heads_of
from arriero.formats.gguf.tensor_types import F32, PLAIN, Kind, choose_type, parse_kind
from arriero.formats.gguf.tokenizer_writer import tokenizer_metadata
from arriero.formats.hf import check_state
from arriero.formats.rearranged import rearranged
from arriero.formats.rope_layout import pairs_view
from arriero.formats.safe_tensors import LazyTensor
from arriero.formats.source import ModelSource
from arriero.models.config import LlamaConfig

_SHOWN = 3


def write_gguf(
    source: ModelSource, target: Path, *, kind: str, progress: Callable[[int, int], None] | None = None
) -> tuple[str, ...]:
    """Write a GGUF file with all metadata and the tokenizer, whole or not at all.

    A tensor at a time is in memory, quantised some rows at a time.

    Args:
        kind: of `arriero.formats.gguf.tensor_types.KINDS`, e.g. "f16", "q8_0", "q4_k_m". As in llama.cpp, one-dimensional
            tensors stay fp32, and embedding and head of a quantised file are more precise than the rest.
        progress: told (bytes written, bytes in all) after each tensor.

    Returns:
        Lines on what a user wants to know: tensors in another type than asked for, what llama.cpp does otherwise.

    Raises:
        FormatError: for another kind, a model or tokenizer that llama.cpp has no equal of, weights that do not fit the
            configuration, values that the type cannot hold, or a file that cannot be written.
    """
    chosen, config, name = parse_kind(kind), source.config, str(source.path)
    check_state(config, {key: tuple(tensor.shape) for key, tensor in source.tensors.items()}, name)
    check_expressible(config, name)
    tokenizer, lines = tokenizer_metadata(source.files, config, name)
    title = source.path.resolve().name.removesuffix(".gguf")
    metadata = model_metadata(config, title, source.files, chosen.file_type)
    tensors = [_prepared(key, tensor, chosen, config) for key, tensor in source.tensors.items()]
    divisors = rope_divisors(config)
    if divisors is not None:
        tensors.insert(0, TensorToWrite(ROPE_FREQUENCIES, tuple(divisors.shape), F32, divisors))
    write_container(Path(target), metadata | tokenizer, tensors, progress)
    return (*notes(config), *lines, *_replaced(tensors, chosen))


def _prepared(key: str, tensor: Tensor | LazyTensor, kind: Kind, config: LlamaConfig) -> TensorToWrite:
    name, shape = gguf_name(key), tuple(tensor.shape)
    heads = heads_of(name, config)
    value = tensor if heads is None else rearranged(tensor, shape, partial(pairs_view, heads=heads))
    return TensorToWrite(name, shape, choose_type(name, shape, kind, config), value)


def _replaced(tensors: list[TensorToWrite], kind: Kind) -> list[str]:
    """A line on the tensors whose rows the asked-for type's blocks do not divide."""
    if kind.base in PLAIN:
        return []
    odd = [tensor for tensor in tensors if len(tensor.shape) > 1 and tensor.shape[-1] % kind.base.block]
    if not odd:
        return []
    shown = ", ".join(f"{tensor.name} {tensor.type.name}" for tensor in odd[:_SHOWN])
    more = f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
    return [f"rows are no multiple of {kind.base.block}, so instead of {kind.base.name}: {shown}{more}"]

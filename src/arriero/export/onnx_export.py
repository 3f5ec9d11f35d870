"""From a model folder to a bundle that ONNX Runtime runs."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arriero.errors import ConfigError
from arriero.export.block_weights import BLOCK_SIZES, BlockFormat
from arriero.export.bundle import Bundle, Manifest, new_bundle, open_bundle, write_manifest
from arriero.export.data_file import DataFile
from arriero.export.gguf_bits import layer_bits, usual_bits
from arriero.export.model_files import generation_defaults, write_model_files
from arriero.export.onnx_graph import OnnxGraph, WeightForm, check_config
from arriero.export.prefix_file import PrefixArray, write_prefix
from arriero.export.self_check import check_graph
from arriero.export.weight_source import WeightSource, adapter_words, integer_source
from arriero.formats.hf_source import open_hf
from arriero.formats.source import ModelSource
from arriero.models.config import LlamaConfig

GRAPH, DATA = "model.onnx", "weights.bin"
WEIGHTS = ("fp32", "fp16", "int8", "int4")
# The largest block that offsets are worth it for, measured with SmolLM2 (docs/export.md).
OFFSET_BLOCK = 64
# Of int4 and int8 weights, unless told. Products in 8 bits are a third faster in blocks of 64 than of 32, and no further from
# the model; weights that are integers already have blocks of 32 (docs/export.md).
BLOCK, WIDE_BLOCK = 32, 64


@dataclass(frozen=True)
class OnnxOptions:
    """How a model is exported.

    Attributes:
        weights: fp32; fp16, which is stored in half the space and computed with in fp32; int8 or int4.
        block_size: consecutive inputs that share a scale (int8, int4); None: 32 of 4 bits and of integers that a model has
            already, else 64, which an 8-bit head has too.
        symmetric: without zero points, and of int4 without offsets (int8, int4); None: of int8, of large blocks, and of
            integers that a model has already.
        accuracy_level: 4 rounds the inputs of products to 8 bits, 0 and 1 compute in fp32 (int8, int4).
        head_bits: 8 or 4, of the output head and the embedding (int8, int4); None: 8.
        context: tokens of a sequence; None: all that the model has.

    Raises:
        ConfigError: for values that are not these.
    """

    weights: str = "fp32"
    block_size: int | None = None
    symmetric: bool | None = None
    accuracy_level: int = 4
    head_bits: int | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ConfigError(f"weights of the kind {self.weights!r} are not known: {', '.join(WEIGHTS)}")
        self.form()

    def context_of(self, config: LlamaConfig) -> int:
        """Tokens of a sequence of this model."""
        return config.max_position_embeddings if self.context is None else self.context

    def form(self, kept: bool = False, blocks_of_32: bool = False, group: int | None = None) -> WeightForm:
        """The form of the graph's weights.

        Args:
            kept: whether they are integers already, around 0.
            group: inputs that share a scale of those; None: all of an output.
            blocks_of_32: whether they are 8-bit integers of a GGUF file.
        """
        if self.weights in ("fp32", "fp16"):
            defaults = OnnxOptions.__dataclass_fields__
            for name in ("block_size", "symmetric", "accuracy_level", "head_bits"):
                if getattr(self, name) != defaults[name].default:
                    raise ConfigError(
                        f"{name} is for int8 and int4 weights, and these are {self.weights}: leave it out"
                    )
            return WeightForm(half=self.weights == "fp16")
        bits = int(self.weights.removeprefix("int"))
        head_bits = 8 if self.head_bits is None else self.head_bits
        wide = BLOCK if kept or blocks_of_32 else WIDE_BLOCK
        block, head_block = (
            (wide if count == 8 else BLOCK) if self.block_size is None else self.block_size
            for count in (bits, head_bits)
        )
        if kept and self.block_size is None and group is not None:
            block = max((size for size in BLOCK_SIZES if size <= block and group % size == 0), default=block)
        zeros = self.symmetric is False
        wanted = self.symmetric is None and not kept and block <= OFFSET_BLOCK
        offsets = bits == 4 and (zeros or wanted)
        layers = BlockFormat(bits, block, not (zeros or offsets), offsets)
        return WeightForm(
            layers=layers, head=BlockFormat(head_bits, head_block, not zeros), accuracy_level=self.accuracy_level
        )


def export_onnx(
    model: str | Path | ModelSource,
    target: str | Path,
    options: OnnxOptions = OnnxOptions(),
    *,
    prefix: PrefixArray | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Bundle:
    """Write the bundle of a model; a weight at a time is in memory.

    Args:
        model: an HF folder, plain or of `arriero quantize`, whose integers are kept; or a model of any other origin.
        prefix: keys and values that every sequence begins with.
        defaults: of answers, besides those of the model.

    Raises:
        ConfigError: what an ONNX graph cannot hold.
        FormatError: a broken folder, a target in use, or a graph that does not compute what the model computes.
    """
    with nullcontext(model) if isinstance(model, ModelSource) else open_hf(model) as opened:
        check_config(opened.config, options.context_of(opened.config))
        return _export(opened, integer_source(opened, model), target, options, prefix, defaults or {})


def _export(
    opened: ModelSource,
    source: WeightSource,
    target: str | Path,
    options: OnnxOptions,
    prefix: PrefixArray | None,
    defaults: Mapping[str, Any],
) -> Bundle:
    context, length = options.context_of(opened.config), 0
    if prefix is not None:
        length = prefix.shape[3]
        if length >= context:
            raise ConfigError(f"a prefix of {length} fills a context of {context}: make that larger")
    with new_bundle(target) as staging:
        wide = usual_bits(layer_bits(opened)) == 8
        form = options.form(kept=bool(source.layers), blocks_of_32=wide, group=source.group_size)
        with DataFile(staging / DATA) as data:
            graph = OnnxGraph(source, form, context, data).build()
        (staging / GRAPH).write_bytes(graph.SerializeToString())
        found = check_graph(staging / GRAPH, source, data, form, context)
        if prefix is not None:
            write_prefix(staging, prefix)
        config = write_model_files(staging, opened)
        manifest = Manifest(
            kind="onnx",
            graph=GRAPH,
            weights=_words(form, source.wider_count) + (adapter_words(source) if options.weights == "int4" else ""),
            context=context,
            config=config,
            generation=generation_defaults(opened) | dict(defaults),
            check=asdict(found),
            versions={name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime", "torch")},
            prefix_length=length,
        )
        write_manifest(staging, manifest)
    return open_bundle(target)


def _words(form: WeightForm, wider: int) -> str:
    """
    Args:
        wider: matrices that are stored in more than 4 bits.
    """
    if form.layers is None or form.head is None:
        return "fp16, computed with in fp32" if form.half else "fp32"
    more = f" ({wider} of its matrices {form.layers.wide})" if wider and form.layers.bits == 4 else ""
    return f"{form.layers}{more}; head and embedding {form.head}; accuracy level {form.accuracy_level}"

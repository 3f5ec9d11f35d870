"""From a model folder to a bundle that ONNX Runtime runs."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from arriero.errors import ConfigError, FormatError
from arriero.export.block_weights import BlockFormat
from arriero.export.bundle import Bundle, Manifest, new_bundle, open_bundle, write_manifest
from arriero.export.data_file import DataFile
from arriero.export.onnx_graph import OnnxGraph, WeightForm, check_config
from arriero.export.self_check import StoredModel, check_graph
from arriero.export.weight_source import WeightSource
from arriero.formats.hf_source import open_hf
from arriero.formats.quantized import QuantizedFolder, is_quantized
from arriero.models.config import LlamaConfig

GRAPH, DATA = "model.onnx", "weights.bin"
WEIGHTS = ("fp32", "fp16", "int8", "int4")


@dataclass(frozen=True)
class OnnxOptions:
    """How a model is exported.

    Attributes:
        weights: fp32; fp16, which is stored in half the space and computed with in fp32; int8 or int4.
        block_size: consecutive inputs that share a scale (int8, int4).
        symmetric: without zero points (int8, int4).
        accuracy_level: 4 rounds the inputs of products to 8 bits, 0 and 1 compute in fp32 (int8, int4).
        head_bits: 8 or 4, of the output head and the embedding (int8, int4); None: 8.
        context: tokens of a sequence; None: all that the model has.

    Raises:
        ConfigError: for values that are not these.
    """

    weights: str = "fp32"
    block_size: int = 32
    symmetric: bool = True
    accuracy_level: int = 4
    head_bits: int | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ConfigError(f"weights of the kind {self.weights!r} are not known: {', '.join(WEIGHTS)}")
        self.form()

    def form(self) -> WeightForm:
        """The form of the graph's weights."""
        if self.weights in ("fp32", "fp16"):
            return WeightForm(half=self.weights == "fp16")
        layers = BlockFormat(int(self.weights.removeprefix("int")), self.block_size, self.symmetric)
        head = BlockFormat(self.head_bits or 8, self.block_size, self.symmetric)
        return WeightForm(layers=layers, head=head, accuracy_level=self.accuracy_level)


def export_onnx(folder: str | Path, target: str | Path, options: OnnxOptions = OnnxOptions()) -> Bundle:
    """Write the bundle of an HF folder; a weight at a time is in memory.

    Args:
        folder: plain, or of `arriero quantize`, whose integers are kept.

    Raises:
        ConfigError: what an ONNX graph cannot hold.
        FormatError: a broken folder, a target in use, or a graph that does not compute what the model computes.
    """
    folder, form = Path(folder), options.form()
    stored = LlamaConfig.from_file(folder)
    context = options.context or stored.max_position_embeddings
    check_config(stored, context)
    quantized = QuantizedFolder(folder, stored) if is_quantized(stored) else None
    with open_hf(folder) as opened, new_bundle(target) as staging:
        source = WeightSource(opened, quantized)
        with DataFile(staging / DATA) as data:
            model = OnnxGraph(source, form, context, data).build()
        (staging / GRAPH).write_bytes(model.SerializeToString())
        found = check_graph(staging / GRAPH, StoredModel(data, source, form), opened.config, form, context)
        for name, content in opened.files.items():
            (staging / name).write_bytes(content)
        config = opened.config.to_dict()
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        manifest = Manifest(
            kind="onnx",
            graph=GRAPH,
            weights=_words(form),
            context=context,
            config=config,
            generation=_generation(opened.files.get("generation_config.json")),
            check=asdict(found),
            versions={name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime", "torch")},
        )
        write_manifest(staging, manifest)
    return open_bundle(target)


def _words(form: WeightForm) -> str:
    if form.layers is None or form.head is None:
        return "fp16, computed with in fp32" if form.half else "fp32"
    return f"{form.layers}; head and embedding {form.head}; accuracy level {form.accuracy_level}"


def _generation(content: bytes | None) -> dict[str, object]:
    """The defaults of answers that a folder has."""
    if content is None:
        return {}
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FormatError("generation_config.json is not valid JSON") from error
    return values if isinstance(values, dict) else {}

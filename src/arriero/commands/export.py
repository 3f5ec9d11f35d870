"""`arriero export`: a bundle that runs without the model's Python code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.config.adapter import AdapterPathOptions
from arriero.config.export import ExportOptions
from arriero.errors import ConfigError

if TYPE_CHECKING:
    from arriero.export.bundle import Bundle
    from arriero.formats.source import ModelSource

    Exporter = Callable[[ExportOptions, AdapterPathOptions, Path | ModelSource], Bundle]

HELP = "Write a model, with its adapter if it has one, as a bundle that runs without the model's Python code."

OPTIONS: tuple[type, ...] = (ExportOptions, AdapterPathOptions)


def run(export: ExportOptions, adapter: AdapterPathOptions) -> int:
    """Export, check the bundle against the model, and say where it is and what the check gave."""
    from arriero.config.model import ModelOptions
    from arriero.engine.export_source import export_source

    options = ModelOptions(model_name_or_path=export.model_name_or_path, device="cpu", cache_dir=export.cache_dir)
    with export_source(options, adapter) as model:
        bundle = EXPORTERS[export.format](export, adapter, model)
    size = sum(noted["size"] for noted in bundle.manifest.files.values())
    print(f"compared with the model: {_found(bundle)}")
    print(f"{bundle.folder}: {bundle.manifest.kind}, {bundle.manifest.weights}, {size / 1e6:.1f} MB")
    return 0


def _export_onnx(export: ExportOptions, adapter: AdapterPathOptions, model: Path | ModelSource) -> Bundle:
    from arriero.engine.export_source import prefix_array, stored_bits
    from arriero.export.onnx_export import OnnxOptions, export_onnx

    weights = export.weights
    if weights == "auto":
        bits = stored_bits(model)
        weights = "fp32" if bits is None else f"int{bits}"
    settings = OnnxOptions(
        weights=weights,
        block_size=export.block_size,
        symmetric=export.symmetric,
        accuracy_level=export.accuracy_level,
        head_bits=export.head_bits,
        context=export.context,
    )
    prefix = None
    if adapter.prefix_path:
        prefix = prefix_array(adapter.prefix_path, model, export.model_name_or_path)
    return export_onnx(model, export.output_path, settings, prefix=prefix, defaults=_defaults(export))


def _export_gguf(export: ExportOptions, adapter: AdapterPathOptions, model: Path | ModelSource) -> Bundle:
    from arriero.export.gguf_export import export_gguf
    from arriero.formats.detection import detect
    from arriero.formats.opening import open_model

    if adapter.prefix_path:
        raise ConfigError(f"--prefix_path {adapter.prefix_path}: a GGUF file holds no prefix; use --format onnx")
    weights = None if export.weights == "auto" else export.weights
    if not isinstance(model, Path):
        return export_gguf(model, export.output_path, weights, _defaults(export))
    with open_model(detect(model)) as source:
        return export_gguf(source, export.output_path, weights, _defaults(export))


def _export_torch(export: ExportOptions, adapter: AdapterPathOptions, model: Path | ModelSource) -> Bundle:
    from arriero.engine.export_source import prefix_array
    from arriero.export.torch_export import TorchOptions, export_torch

    write = export_torch
    if export.format == "aoti":
        from arriero.export.aoti_export import export_aoti as write
    settings = TorchOptions("fp32" if export.weights == "auto" else export.weights, export.context)
    prefix = None
    if adapter.prefix_path:
        prefix = prefix_array(adapter.prefix_path, model, export.model_name_or_path)
    return write(model, export.output_path, settings, prefix=prefix, defaults=_defaults(export))


# What writes each of `arriero.export.kinds.KINDS`.
EXPORTERS: dict[str, Exporter] = {
    "onnx": _export_onnx,
    "torch": _export_torch,
    "aoti": _export_torch,
    "gguf": _export_gguf,
}


def _defaults(export: ExportOptions) -> dict[str, Any]:
    return {"max_new_tokens": export.max_new_tokens}


def _found(bundle: Bundle) -> str:
    """What the comparison found, in words."""
    check = bundle.manifest.check
    if bundle.manifest.kind == "gguf":
        words = (
            f"{check['rounded']} of {check['tensors']} tensors rounded, by at most {check['largest']:.1e} of their norm"
        )
        return words + (f"; logits differ by at most {check['logits'][0]:.1e}" if check["logits"] else "")
    return (
        f"logits differ by at most {check['largest_difference']:.1e} (the largest is {check['largest_logit']:.1f}) with the "
        f"stored weights, by {check['original_difference']:.1e} of their norm with the original ones; of {check['tokens']} "
        f"likeliest tokens {check['original_agreement']:.1%} are the same"
    )

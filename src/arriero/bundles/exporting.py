"""Making a bundle of a model of any format, with its adapter."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from arriero.config.adapter import AdapterPathOptions
from arriero.config.export import ExportOptions
from arriero.config.model import ModelOptions
from arriero.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from arriero.export.bundle import Bundle
    from arriero.formats.source import ModelSource

    Exporter = Callable[[ExportOptions, AdapterPathOptions, Path | ModelSource], Bundle]

_INSTEAD = (
    "--weights int8 keeps it; so does int4 of the model before, with the adapter as --lora_path, and `arriero quantize "
    "--quant_method gptq` keeps most"
)
_KEPT = 0.7  # of an adapter: with less a bundle is warned of
_FILES = (".gguf", ".onnx", ".pt2")  # how names of files end, within bundles and elsewhere


def export_bundle(export: ExportOptions, adapter: AdapterPathOptions) -> Bundle:
    """Export and check the bundle against the model.

    Raises:
        ConfigError, FormatError: what cannot be exported, or a bundle that computes something else.
    """
    from arriero.engine.export_source import export_source

    _check_place(export)
    options = ModelOptions(model_name_or_path=export.model_name_or_path, device="cpu", cache_dir=export.cache_dir)
    with export_source(options, adapter) as model:
        _check_tokenizer(export, model)
        _warn_of_lost_changes(export, model)
        return EXPORTERS[export.format](export, adapter, model)


def _warn_of_lost_changes(export: ExportOptions, model: Path | ModelSource) -> None:
    """Tell before the work that 4 bits lose a training, where they do and no adapter stays beside them."""
    from arriero.engine.export_source import stored_bits
    from arriero.export.gguf_export import KINDS_OF
    from arriero.formats.hf_source import open_hf
    from arriero.formats.lost_changes import nearness_warning

    kind = KINDS_OF["int4"] if export.format == "gguf" else None
    if export.weights != "int4" or stored_bits(model) is not None:
        return
    if isinstance(model, Path):
        with open_hf(model) as source:
            warning = nearness_warning(source, _INSTEAD, kind)
    else:
        warning = None if model.updates else nearness_warning(model, _INSTEAD, kind)
    if warning is not None:
        print(f"arriero: warning: {warning}", file=sys.stderr)


def _check_place(export: ExportOptions) -> None:
    """Refuse the name of a file, of which a folder would be made."""
    place = Path(export.output_path)
    if place.suffix.lower() not in _FILES or place.is_dir():
        return
    alone = f"; the file alone is made by `arriero convert {export.model_name_or_path} {place} --to gguf`"
    raise ConfigError(
        f"--output_path {place}: a bundle is a folder, and this is the name of a file: name a folder, such as "
        f"{place.with_suffix('')}{alone if place.suffix.lower() == '.gguf' else ''}"
    )


def _check_tokenizer(export: ExportOptions, model: Path | ModelSource) -> None:
    """Refuse a model without a tokenizer, or with a broken one, before the work: nothing here would run its bundle."""
    from arriero.data.tokenizer import load_tokenizer
    from arriero.errors import TemplateError
    from arriero.formats.detection import TOKENIZER_FILES
    from arriero.formats.hf import check_vocabulary
    from arriero.models.config import LlamaConfig

    if not any((model / n).is_file() if isinstance(model, Path) else n in model.files for n in TOKENIZER_FILES):
        raise FormatError(
            f"--model_path {export.model_name_or_path}: has neither tokenizer.json nor tokenizer.model, and a bundle needs a "
            "tokenizer; copy that of the base model into the folder"
        )
    with TemporaryDirectory(prefix="arriero-export-") as name:
        folder = model if isinstance(model, Path) else Path(name)
        for file, content in {} if isinstance(model, Path) else model.files.items():
            (folder / file).write_bytes(content)
        try:
            tokenizer = load_tokenizer(folder)
            check_vocabulary(folder, LlamaConfig.from_file(folder) if isinstance(model, Path) else model.config)
            if tokenizer.has_chat_template():
                tokenizer.render_chat([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
        except TemplateError as error:
            print(
                f"warning: chat and serve will not work with this bundle: its chat template fails on a question ({error})"
            )
        except FormatError as error:
            raise FormatError(str(error).replace(name, export.model_name_or_path)) from error


def _export_onnx(export: ExportOptions, adapter: AdapterPathOptions, model: Path | ModelSource) -> Bundle:
    from arriero.engine.export_source import prefix_array
    from arriero.export.onnx_export import OnnxOptions, export_onnx

    settings = OnnxOptions(
        weights=_own_integers(model) if export.weights == "auto" else export.weights,
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


def _own_integers(model: Path | ModelSource) -> str:
    """In the words of `--weights` the integers that a model has already, or fp32."""
    from arriero.engine.export_source import stored_bits
    from arriero.export.gguf_bits import layer_bits, usual_bits

    bits = stored_bits(model) if isinstance(model, Path) else usual_bits(layer_bits(model))
    return "fp32" if bits is None else f"int{bits}"


def _export_gguf(export: ExportOptions, adapter: AdapterPathOptions, model: Path | ModelSource) -> Bundle:
    from arriero.export.gguf_export import export_gguf
    from arriero.formats.detection import detect
    from arriero.formats.opening import open_model

    if adapter.prefix_path:
        raise ConfigError(f"--prefix_path {adapter.prefix_path}: a GGUF file holds no prefix; use --format onnx")
    weights = None if export.weights == "auto" else export.weights
    if not isinstance(model, Path):
        bundle = export_gguf(model, export.output_path, weights, _defaults(export))
        kept = bundle.manifest.check.get("adapter_kept", 1.0)
        if kept < _KEPT:
            print(
                f"arriero: warning: {max(kept, 0.0):.0%} of the adapter is left in the file: its changes are smaller than the "
                "steps of 4 bits. Use --weights int8, or give llama.cpp the adapter itself, which "
                f"`arriero convert {adapter.lora_path} adapter.gguf` makes",
                file=sys.stderr,
            )
        return bundle
    with open_model(detect(model)) as source:
        return export_gguf(source, export.output_path, weights, _defaults(export))


def _export_torch(export: ExportOptions, adapter: AdapterPathOptions, model: Path | ModelSource) -> Bundle:
    from arriero.engine.export_source import prefix_array
    from arriero.export.torch_export import TorchOptions, export_torch

    write = export_torch
    if export.format == "aoti":
        from arriero.export.aoti_export import export_aoti as write
    device = "cpu" if export.device == "auto" else export.device
    weights = export.weights
    if weights == "auto":
        keeps = export.format == "aoti" and device == "cpu"
        weights = _own_integers(model) if keeps else "fp32" if device == "cpu" else "bf16"
    settings = TorchOptions(weights, export.context, device, export.head_bits)
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

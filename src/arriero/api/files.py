"""Models as files: downloaded, merged, quantized, converted, exported."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.api.adapters import adapter_options
from arriero.api.arguments import model_name, path_of
from arriero.api.groups import build
from arriero.api.words import in_python
from arriero.errors import ConfigError

if TYPE_CHECKING:
    from typing import Unpack

    from arriero.api.keywords import ConvertKeywords, ExportModelKeywords, MergeKeywords, QuantizeKeywords


def download(
    model: str,
    output_dir: str | PathLike[str] | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | PathLike[str] | None = None,
) -> Path:
    """Bring a named or Hub model onto this machine: the verb `download`.

    Args:
        output_dir: the folder to put it into; None: the cache.
        revision: a branch, tag or commit of a Hub model.

    Returns:
        Its folder.

    Raises:
        ConfigError, FormatError: a name that is not known, or a download that failed.
    """
    from arriero.formats.download import fetch_model

    folder = path_of("output_dir", output_dir) if output_dir is not None else None
    cache = path_of("cache_dir", cache_dir) if cache_dir is not None else None
    return fetch_model(model_name(model), folder=folder, cache_dir=cache, revision=revision)


@in_python("merge")
def merge(
    model: str | PathLike[str],
    output_path: str | PathLike[str],
    *,
    adapter: str | PathLike[str] | Sequence[str | PathLike[str]] | None = None,
    **options: Unpack[MergeKeywords],
) -> Path:
    """Join LoRA adapters and their base, or a model's shards, into one folder, and compare its logits: the verb `merge`.

    Args:
        adapter: the folder of an adapter, or several whose additions are summed; None: `model` is a folder of shards.

    Raises:
        ConfigError: nothing to merge, or an output that holds something.
        FormatError: parts that do not belong together, or logits that differ.
    """
    from arriero.training.merging import merge_model

    output, own = path_of("output_path", output_path), adapter_options(adapter)
    merge_model(*build("merge", options, model_name_or_path=model_name(model), output_path=output, **own))
    return output


@in_python("quantize")
def quantize(
    model: str | PathLike[str],
    output_path: str | PathLike[str] | None = None,
    *,
    output_dir: str | PathLike[str] | None = None,
    **options: Unpack[QuantizeKeywords],
) -> Path:
    """Write a model with its linear layers in few bits: the verb `quantize`, without its scores before and after.

    Args:
        output_path: the folder to write, which must be given; `output_dir` is another name of it.
        options: `quant_type` ("int8", "int4", "nf4", "fp8", "a8w8"), `quant_method` ("rtn", "gptq", "awq"), `data_file`, ...

    Raises:
        ConfigError, DataError, FormatError: before anything is written.
    """
    from arriero.training.quantize_inputs import check_inputs
    from arriero.training.quantizing import quantize_folder

    if output_path is not None and output_dir is not None:
        raise ConfigError("arriero.quantize: output_dir and output_path are the same option: give one")
    target = output_path if output_path is not None else output_dir
    if target is None:
        raise ConfigError("arriero.quantize: output_path must be given: the folder of the quantized model")
    output = path_of("output_path", target)
    model_options, quantization = build("quantize", options, model_name_or_path=model_name(model), output_path=output)
    check_inputs(quantization, model_options)
    quantize_folder(quantization, model_options)
    return output


@in_python("convert")
def convert(model: str | PathLike[str], output_dir: str | PathLike[str], **options: Unpack[ConvertKeywords]) -> Path:
    """Turn a model or adapter of any format into another format, type or shard size, and compare: the verb `convert`.

    Args:
        model: a folder or file of HF, GGUF, PaddleNLP or Meta, a named model or a Hub id.
        output_dir: a folder, or a file that ends in .gguf.

    Raises:
        ConfigError: options that contradict each other, or an output that is there already.
        FormatError: a source that is broken or that the format cannot hold, or a comparison that failed.
    """
    from arriero.engine.conversion import convert as write

    output = path_of("output_dir", output_dir, "a folder, or a file that ends in .gguf")
    (conversion,) = build("convert", options, model_name_or_path=model_name(model), output_dir=output)
    return write(conversion).output


@in_python("export_model")
def export_model(
    model: str | PathLike[str],
    output_path: str | PathLike[str],
    *,
    adapter: str | PathLike[str] | None = None,
    **options: Unpack[ExportModelKeywords],
) -> Path:
    """Write a bundle that runs without the model's code, and compare it with the model: the verb `export`.

    `load_bundle` runs it. (`arriero.export` is the package that holds the kinds of bundles.)

    Args:
        adapter: the folder of a LoRA adapter, which is merged into the weights, or of a prefix.
        options: `format` ("onnx", "torch", "aoti", "gguf"), `weights` ("fp32", "int8", "int4", ...), ...

    Raises:
        ConfigError, FormatError: what cannot be exported, or a bundle that computes something else.
    """
    from arriero.bundles.exporting import export_bundle

    output, own = path_of("output_path", output_path), adapter_options(adapter)
    groups = build("export_model", options, model_name_or_path=model_name(model), output_path=output, **own)
    return export_bundle(*groups).folder

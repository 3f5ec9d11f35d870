"""A model or adapter of any format into another one, as `arriero convert` and `arriero.convert` do it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from arriero.config.converting import MAX_SHARD_SIZE, ConvertOptions
from arriero.errors import ConfigError
from arriero.formats.conversion import Progress, convert_model, staged_output
from arriero.formats.detection import ADAPTERS, Found, detect
from arriero.formats.download import resolve_model
from arriero.formats.hf import parse_dtype
from arriero.formats.opening import MODEL_FILES, Writing, open_model
from arriero.formats.peft import is_adapter
from arriero.formats.safe_tensors import parse_size
from arriero.parallel.pipeline import split_layers


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        output: the new folder or file.
        notes: what it was made of, what changed and what the comparison found, a line each.
    """

    output: Path
    notes: tuple[str, ...]


def convert(options: ConvertOptions, progress: Progress | None = None) -> Converted:
    """Write the model or adapter that the options name as they ask for; the output appears whole or not at all.

    Options without effect are told on standard error.

    Args:
        progress: told what is done ("convert", "verify"), bytes done and bytes in all; of models only.

    Raises:
        ConfigError: options that contradict each other, or an output that is there already.
        FormatError: a source that is broken or that the format cannot hold, or a comparison that failed.
    """
    for name in ("model_name_or_path", "output_dir"):
        if not getattr(options, name).strip():
            raise ConfigError(f"--{name} is empty; . is the folder you are in")
    size = parse_size(options.max_shard_size)
    output = Path(options.output_dir).expanduser()
    to = {"model": "hf", "peft": "hf"}.get(options.to, options.to)
    if to == "auto":
        to = "gguf" if output.suffix.lower() == ".gguf" else "hf"
    _check_options(options, to)
    cache_dir = Path(options.cache_dir).expanduser() if options.cache_dir else None
    path = Path(os.path.expanduser(options.model_name_or_path))
    _check_output(path, output, to, overwrite=options.overwrite_output_dir)
    if not path.exists():
        path = resolve_model(options.model_name_or_path, cache_dir=cache_dir)
    if to == "quantized":
        _warn_without_effect(options, to, adapter=is_adapter(path))
        return _convert_trained(options, path, output, size, cache_dir)
    found = detect(path)
    _warn_without_effect(options, to, adapter=found.kind in ADAPTERS)
    if found.kind in ADAPTERS:
        return _convert_adapter(options, found, output, to, cache_dir)
    return _convert(options, found, output, _writing(options, to, size, found), progress)


def _check_options(options: ConvertOptions, to: str) -> None:
    degrees = options.tensor_parallel_degree * options.pipeline_parallel_degree
    if degrees > 1 and to == "gguf":
        raise ConfigError("a GGUF file has no shards: drop --tensor_parallel_degree and --pipeline_parallel_degree")
    if options.pipeline_parallel_degree > 1 and to == "meta":
        raise ConfigError("Meta's files are not cut by layers: drop --pipeline_parallel_degree")
    if degrees > 1 and to == "quantized":
        raise ConfigError(
            "--to quantized writes no shards: drop --tensor_parallel_degree and --pipeline_parallel_degree"
        )
    if options.gguf_type != "auto" and to != "gguf":
        raise ConfigError(
            f"--gguf_type {options.gguf_type} is for GGUF files: add --to gguf, or name a file that ends so"
        )
    if options.gguf_type != "auto" and options.dtype != "auto":
        raise ConfigError(
            f"--gguf_type {options.gguf_type} and --dtype {options.dtype} say two things: give one of them"
        )


def _warn_without_effect(options: ConvertOptions, to: str, *, adapter: bool) -> None:
    for name, why in _without_effect(options, to, adapter=adapter):
        print(f"arriero: warning: --{name} has no effect: {why}", file=sys.stderr)


def _without_effect(options: ConvertOptions, to: str, *, adapter: bool) -> Iterator[tuple[str, str]]:
    """Options that were set for nothing, and why."""
    if options.base_model is not None and not adapter:
        yield "base_model", "this is a model and no adapter"
    if to == "quantized":  # a model, also where it is made of an adapter
        return
    if options.max_shard_size != MAX_SHARD_SIZE and (adapter or to in ("gguf", "meta")):
        yield "max_shard_size", "an adapter is one file" if adapter else f"{to} files are not cut by size"
    if options.verify is not None and adapter:
        yield "verify", "adapters are always compared"
    if options.pipeline_parallel_degree > 1 and adapter:
        yield "pipeline_parallel_degree", "an adapter is not cut by layers"
    if adapter and to == "gguf" and (options.gguf_type, options.dtype) != ("auto", "auto"):
        yield "gguf_type" if options.gguf_type != "auto" else "dtype", "GGUF adapters are in fp32"


def _check_output(source: Path, output: Path, to: str, *, overwrite: bool) -> None:
    """Raises ConfigError for an output that is the input, holds a model already, or is not what the format needs."""
    if source.exists() and output.exists() and source.resolve() == output.resolve():
        raise ConfigError(f"--output_dir {output} is the input itself; choose another place")
    is_file = output.suffix.lower() == ".gguf"
    if is_file != (to == "gguf"):
        end = "needs a name that ends in .gguf" if to == "gguf" else f"is a file of GGUF, and {to} is a folder"
        raise ConfigError(f"--output_dir {output} {end}")
    if not overwrite and is_file and output.exists():
        raise ConfigError(f"--output_dir {output} is there already; add --overwrite_output_dir to replace it")
    if output.is_file() and not is_file:
        raise ConfigError(f"--output_dir {output} is a file, and {to} is a folder; choose another place")
    if overwrite or is_file or not output.is_dir():
        return
    files = (path for pattern in MODEL_FILES for path in sorted(output.glob(pattern)) if not path.is_dir())
    held = next((path.name for path in files), None)
    if held is not None:  # and would be replaced or deleted
        raise ConfigError(
            f"--output_dir {output} holds a model already, or a part of one ({held}); "
            "add --overwrite_output_dir to replace it"
        )


def _writing(options: ConvertOptions, to: str, size: int, found: Found) -> Writing:
    stages: tuple[range, ...] = ()
    if options.pipeline_parallel_degree > 1:
        with open_model(found) as source:
            stages = tuple(split_layers(source.config, options.pipeline_parallel_degree))
    return Writing(
        to,
        None if options.dtype == "auto" else parse_dtype(options.dtype),
        None if options.gguf_type == "auto" else options.gguf_type,
        size,
        options.tensor_parallel_degree,
        stages,
    )


def _convert(options: ConvertOptions, found: Found, output: Path, how: Writing, progress: Progress | None) -> Converted:
    done = convert_model(found, output, how, verify=options.verify, progress=progress)
    return Converted(
        output,
        (
            f"{found.path.name}: {found.name}, {done.config.num_parameters():,} parameters",
            *(f"  {note}" for note in done.notes),
            f"compared: {done.comparison if done.comparison is not None else 'no'}",
        ),
    )


def _convert_adapter(options: ConvertOptions, found: Found, output: Path, to: str, cache_dir: Path | None) -> Converted:
    from arriero.engine.adapter_conversion import convert_adapter  # the models, which a conversion of one does without

    done = convert_adapter(
        found,
        output,
        to,
        base_model=options.base_model,
        cache_dir=cache_dir,
        dtype=None if options.dtype == "auto" else parse_dtype(options.dtype),
        tensor_parallel_degree=options.tensor_parallel_degree,
    )
    return Converted(output, (f"{found.path.name}: {found.name}, {done}",))


def _convert_trained(
    options: ConvertOptions, source: Path, output: Path, size: int, cache_dir: Path | None
) -> Converted:
    """Round and pack the weights of a run with quantization-aware training."""
    from arriero.engine.qat import convert_trained

    if not source.is_dir():
        raise ConfigError(f"{source} is a file: --to quantized takes the folder of a run of finetune --qat")
    dtype = None if options.dtype == "auto" else options.dtype
    with staged_output(output, is_file=False) as place:
        settings, comparison = convert_trained(
            source,
            place,
            cache_dir=cache_dir,
            max_shard_size=size,
            dtype=dtype,
            base_model=options.base_model,
            verify=options.verify,
        )
    kept = "stay as they are" if dtype is None else f"are written in {dtype}"
    compared = f"compared: {comparison if comparison is not None else 'no'}"
    return Converted(output, (f"{settings}; embedding and output head {kept}", compared))

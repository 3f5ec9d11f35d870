"""`arriero convert`: a model or adapter of any format into another one, compared with the original before it is kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.config.option import REQUIRED, OptionGroup, option
from arriero.errors import ConfigError

if TYPE_CHECKING:
    from arriero.formats.detection import Found
    from arriero.formats.opening import Writing

HELP = "Turn a model or adapter into another format, type or shard size: HF, GGUF, Paddle, Meta."

GGUF_TYPES = (
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q6_k",
    "q5_k_m",
    "q5_k_s",
    "q5_1",
    "q5_0",
    "q4_k_m",
    "q4_k_s",
    "q4_1",
    "q4_0",
)
GGUF_ALIASES = ("q5_k", "q4_k")
MAX_SHARD_SIZE = "5GB"


@dataclass(kw_only=True)
class ConvertOptions(OptionGroup):
    """Conversion."""

    model_name_or_path: str = option(
        REQUIRED,
        "a model or adapter of any format (folder or .gguf file), a named model or a Hub id",
        aliases=("input",),
        positional=True,
    )
    output_dir: str = option(
        REQUIRED, "folder to write; a name that ends in .gguf: file to write", aliases=("output_path",), positional=True
    )
    to: str = option(
        "auto",
        "format written (model and peft mean hf); auto: gguf if the output's name ends so, else hf; quantized: the integers "
        "that a run of finetune --qat was trained for",
        ("auto", "hf", "gguf", "paddle", "meta", "quantized", "model", "peft"),
    )
    dtype: str = option(
        "auto",
        "type of the weights written; auto: as they are, float32 of a quantised model",
        ("auto", "float32", "bfloat16", "float16"),
    )
    gguf_type: str = option(
        "auto",
        f"number format of a GGUF file, as llama.cpp calls it: {', '.join((*GGUF_TYPES, *GGUF_ALIASES))} (q4_k is q4_k_m, "
        "q5_k is q5_k_m); auto: as --dtype says",
        ("auto", *GGUF_TYPES, *GGUF_ALIASES),
    )
    max_shard_size: str = option(MAX_SHARD_SIZE, "largest weight file, e.g. 500MB; a larger model is cut into several")
    tensor_parallel_degree: int = option(
        1, "above 1: write one weight file a process, cut as so many tensor-parallel processes hold it", minimum=1
    )
    pipeline_parallel_degree: int = option(1, "the same for the processes of a pipeline, by layers", minimum=1)
    base_model: str | None = option(
        None, "of an adapter: the model it is for (default: what the adapter says), whose config.json is read"
    )
    verify: bool | None = option(
        None,
        "compare every tensor with the original's, and the logits of a prompt (default: for models under 2e9 parameters)",
    )
    overwrite_output_dir: bool = option(False, "replace a model that is in the output folder")
    cache_dir: str | None = option(
        None, "where downloaded models are kept (default: $ARRIERO_HOME or ~/.cache/arriero)"
    )


OPTIONS: tuple[type, ...] = (ConvertOptions,)


def run(options: ConvertOptions) -> int:
    """Convert and print the new folder or file."""
    from arriero.formats.detection import ADAPTERS, detect
    from arriero.formats.download import resolve_model
    from arriero.formats.safe_tensors import parse_size

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
        return _convert_trained(options, path, output, size, cache_dir)
    found = detect(path)
    for name, why in _without_effect(options, to, adapter=found.kind in ADAPTERS):
        print(f"arriero: warning: --{name} has no effect: {why}", file=sys.stderr)
    if found.kind in ADAPTERS:
        return _convert_adapter(options, found, output, to, cache_dir)
    return _convert(options, found, output, _writing(options, to, size, found))


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


def _without_effect(options: ConvertOptions, to: str, *, adapter: bool) -> Iterator[tuple[str, str]]:
    """Options that were set for nothing, and why."""
    if options.max_shard_size != MAX_SHARD_SIZE and (adapter or to in ("gguf", "meta")):
        yield "max_shard_size", "an adapter is one file" if adapter else f"{to} files are not cut by size"
    if options.base_model is not None and not adapter:
        yield "base_model", "this is a model and no adapter"
    if options.verify is not None and adapter:
        yield "verify", "adapters are always compared"
    if options.pipeline_parallel_degree > 1 and adapter:
        yield "pipeline_parallel_degree", "an adapter is not cut by layers"
    if adapter and to == "gguf" and (options.gguf_type, options.dtype) != ("auto", "auto"):
        yield "gguf_type" if options.gguf_type != "auto" else "dtype", "GGUF adapters are in fp32"


def _check_output(source: Path, output: Path, to: str, *, overwrite: bool) -> None:
    """Raises ConfigError for an output that is the input, holds a model already, or is not what the format needs."""
    from arriero.formats.opening import MODEL_FILES

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
    from arriero.formats.hf import parse_dtype
    from arriero.formats.opening import Writing, open_model

    stages: tuple[range, ...] = ()
    if options.pipeline_parallel_degree > 1:
        from arriero.parallel.pipeline import split_layers

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


def _convert(options: ConvertOptions, found: Found, output: Path, how: Writing) -> int:
    from arriero.formats.conversion import convert_model

    with _bar() as progress:
        done = convert_model(found, output, how, verify=options.verify, progress=progress)
    print(f"{found.path.name}: {found.name}, {done.config.num_parameters():,} parameters", file=sys.stderr)
    for note in done.notes:
        print(f"  {note}", file=sys.stderr)
    print(f"compared: {done.comparison if done.comparison is not None else 'no'}", file=sys.stderr)
    print(output)
    return 0


def _convert_adapter(options: ConvertOptions, found: Found, output: Path, to: str, cache_dir: Path | None) -> int:
    from arriero.engine.adapter_conversion import convert_adapter
    from arriero.formats.hf import parse_dtype

    done = convert_adapter(
        found,
        output,
        to,
        base_model=options.base_model,
        cache_dir=cache_dir,
        dtype=None if options.dtype == "auto" else parse_dtype(options.dtype),
        tensor_parallel_degree=options.tensor_parallel_degree,
    )
    print(f"{found.path.name}: {found.name}, {done}", file=sys.stderr)
    print(output)
    return 0


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each thing that is done, in bytes; one appears when it takes longer than a second."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in bars:
            close()
            bars[what] = tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False, delay=1.0)
        bars[what].update(done - bars[what].n)

    def close() -> None:
        for bar in bars.values():
            bar.close()

    try:
        yield progress
    finally:
        close()


def _convert_trained(options: ConvertOptions, source: Path, output: Path, size: int, cache_dir: Path | None) -> int:
    """Round and pack the weights of a run with quantization-aware training."""
    from arriero.engine.qat import convert_trained
    from arriero.formats.conversion import staged_output

    if not source.is_dir():
        raise ConfigError(f"{source} is a file: --to quantized takes the folder of a run of finetune --qat")
    dtype = None if options.dtype == "auto" else options.dtype
    with staged_output(output, is_file=False) as place:
        settings = convert_trained(source, place, cache_dir=cache_dir, max_shard_size=size, dtype=dtype)
    print(f"{settings}; embedding and output head stay as they are", file=sys.stderr)
    print(output)
    return 0

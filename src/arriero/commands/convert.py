"""`arriero convert`: a GGUF file or a model folder into an HF folder of any dtype, in one file, several, or one a process."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from arriero.config.option import REQUIRED, OptionGroup, option

HELP = "Turn a GGUF file or a model into a safetensors model folder of another type or shard size."


@dataclass(kw_only=True)
class ConvertOptions(OptionGroup):
    """Conversion."""

    model_name_or_path: str = option(
        REQUIRED,
        "a .gguf file, a model folder, a named model or a Hub id",
        aliases=("input",),
        positional=True,
    )
    output_dir: str = option(REQUIRED, "folder to write", aliases=("output_path",), positional=True)
    dtype: str = option(
        "auto",
        "type of the weights written; auto: float32 for a GGUF file, else as they are",
        ("auto", "float32", "bfloat16", "float16"),
    )
    to: str = option(
        "model",
        "quantized: the integers that a run of finetune --qat was trained for; model: weights as they are",
        ("model", "quantized"),
    )
    max_shard_size: str = option("5GB", "largest weight file, e.g. 500MB; a larger model is cut into several")
    tensor_parallel_degree: int = option(
        1, "above 1: write one weight file a process, cut as so many tensor-parallel processes hold it", minimum=1
    )
    pipeline_parallel_degree: int = option(1, "the same for the processes of a pipeline, by layers", minimum=1)
    overwrite_output_dir: bool = option(False, "replace a model that is in the output folder")
    cache_dir: str | None = option(
        None, "where downloaded models are kept (default: $ARRIERO_HOME or ~/.cache/arriero)"
    )


OPTIONS: tuple[type, ...] = (ConvertOptions,)


def run(options: ConvertOptions) -> int:
    """Convert and print the new folder."""
    from arriero.errors import ConfigError
    from arriero.formats.download import resolve_model
    from arriero.formats.gguf.model import convert_gguf
    from arriero.formats.hf import open_state, save_model
    from arriero.formats.quantized import is_quantized, plain
    from arriero.formats.safe_tensors import parse_size
    from arriero.models.config import LlamaConfig

    output = Path(options.output_dir).expanduser()
    size = parse_size(options.max_shard_size)
    source = Path(os.path.expanduser(options.model_name_or_path))
    if (output / "config.json").exists():
        if source.is_dir() and source.resolve() == output.resolve():
            raise ConfigError(f"--output_dir {output} is the input itself; choose another folder")
        if not options.overwrite_output_dir:
            raise ConfigError(f"--output_dir {output} holds a model already; add --overwrite_output_dir to replace it")
    tp, pp = options.tensor_parallel_degree, options.pipeline_parallel_degree
    if source.is_file() and source.suffix.lower() == ".gguf":
        if tp * pp > 1:
            raise ConfigError(
                f"{source} is a GGUF file: convert it without --tensor_parallel_degree and --pipeline_parallel_degree "
                "first, then the folder with them"
            )
        if options.to == "quantized":
            raise ConfigError(f"{source} is a GGUF file: --to quantized takes the folder of a run of finetune --qat")
        result = convert_gguf(source, output, "float32" if options.dtype == "auto" else options.dtype, size)
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(result.tensor_types.items()))
        licence = f"; licence {result.licence}" if result.licence else ""
        print(
            f"{source.name}: {result.config.num_parameters():,} parameters, tensors {kinds}{licence}", file=sys.stderr
        )
    else:
        cache_dir = Path(options.cache_dir).expanduser() if options.cache_dir else None
        folder = resolve_model(options.model_name_or_path, cache_dir=cache_dir)
        dtype = None if options.dtype == "auto" else options.dtype
        if options.to == "quantized":
            from arriero.engine.qat import convert_trained

            if tp * pp > 1:
                raise ConfigError(
                    "--to quantized writes no shards: drop --tensor_parallel_degree and --pipeline_parallel_degree"
                )
            settings = convert_trained(folder, output, cache_dir=cache_dir, max_shard_size=size, dtype=dtype)
            print(f"{settings}; embedding and output head stay as they are", file=sys.stderr)
            print(output)
            return 0
        config = LlamaConfig.from_file(folder)
        if is_quantized(config):
            print(f"{folder}: its quantized weights are dequantized", file=sys.stderr)
            config = plain(config)
        if tp * pp > 1:
            from arriero.formats.shard_writer import write_shards
            from arriero.parallel.pipeline import split_layers

            write_shards(folder, output, tp, split_layers(config, pp), dtype)
        else:
            save_model(
                open_state(folder, config), config, output, max_shard_size=size, dtype=dtype, extra_files_from=folder
            )
    print(output)
    return 0

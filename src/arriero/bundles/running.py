"""Finding and opening a bundle, and the engine over it. Of a kind that needs no torch, nothing here imports it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from arriero.config.adapter import AdapterPathOptions
    from arriero.config.compilation import CompilationOptions
    from arriero.config.kv_cache import KVCacheOptions
    from arriero.config.model import ModelOptions
    from arriero.engine.engine import Engine
    from arriero.export.bundle import Bundle


def bundle_folder(model_dir: str, prefix: str) -> Path:
    """The bundle that the two name: `model_dir/prefix`, where `arriero export --output_path model_dir/prefix` puts it, or
    `model_dir` itself.

    Raises:
        FormatError: there is none.
    """
    from arriero.export.bundle import MANIFEST, refuse_model

    folder = Path(model_dir).expanduser()
    named = folder / prefix
    if named.is_dir():
        return named
    if (folder / MANIFEST).exists():
        return folder
    refuse_model(folder)
    raise FormatError(
        f"{folder}: holds no bundle, nor is there one in {named} (--model_prefix {prefix}); arriero export --output_path "
        f"{named} writes it"
    )


def open_as_model(
    model: ModelOptions, adapter: AdapterPathOptions, cache: KVCacheOptions, compilation: CompilationOptions
) -> Bundle:
    """The bundle that stands in the place of a checkpoint.

    Raises:
        ConfigError: an option that a bundle decides itself.
        FormatError: see `open_bundle`.
    """
    from arriero.export.bundle import open_bundle

    folder = Path(model.model_name_or_path).expanduser()
    for name, value in (("lora_path", adapter.lora_path), ("prefix_path", adapter.prefix_path)):
        if value:
            raise ConfigError(
                f"--{name} {value}: {folder} is a bundle, whose weights are fixed; export it again with it"
            )
    fixed = {
        "dtype": (model.dtype, "auto"),
        "tokenizer_name_or_path": (model.tokenizer_name_or_path, None),
        "use_flash_attention": (model.use_flash_attention, True),
        "use_fused_rms_norm": (model.use_fused_rms_norm, True),
        "kv_cache_dtype": (cache.kv_cache_dtype, "auto"),
    }
    for name, (given, usual) in fixed.items():
        if given != usual:
            shown = "no" if given is False else given
            raise ConfigError(f"--{name} {shown}: a bundle decides this itself; leave it out")
    if compilation.torch_compile:
        raise ConfigError(f"--torch_compile: {folder} is a bundle, which is what it was compiled to; leave it out")
    bundle = open_bundle(folder)
    check_device(bundle, model.device)
    return bundle


def check_device(bundle: Bundle, device: str) -> None:
    """
    Raises:
        ConfigError: a device that the bundle is not made for.
    """
    if device != "auto" and device.partition(":")[0] != bundle.manifest.device:
        raise ConfigError(f"--device {device}: {bundle.folder} is made for {bundle.manifest.device}; leave it out")


def default_length(bundle: Bundle) -> int:
    """The length of answers that a bundle asks for; a whole number from 1, whatever its manifest says."""
    length = bundle.manifest.generation.get("max_new_tokens")
    return length if isinstance(length, int) and not isinstance(length, bool) and length >= 1 else 100


def bundle_engine(
    bundle: Bundle,
    max_running: int,
    threads: int | None = None,
    *,
    max_step_tokens: int = 2048,
    spinning: bool = True,
    device: str = "auto",
) -> Engine:
    """An engine over an open bundle.

    Args:
        max_running: prompts that are answered at once; fewer, with a warning, if the keys and values of so many that fill
            the bundle's context are more than half of the free memory (80 % of a GPU's).
        threads: of a computation on a CPU; default: the cores that this process may use.
        max_step_tokens: of `Engine`.
        spinning: threads of ONNX Runtime wait for each other without giving up their cores: a third faster for one sequence,
            where nothing else needs them.
        device: cuda:N, of a bundle for a GPU where there are several.

    Raises:
        FormatError: its runtime cannot load it, or the engine does not run its kind.
        MissingExtraError: the runtime is not installed.
    """
    from arriero.data.tokenizer import load_tokenizer
    from arriero.engine.engine import Engine
    from arriero.engine.machine_memory import free_memory
    from arriero.export.kinds import open_runner, slot_bytes

    half = free_memory() // 2
    runner = open_runner(bundle, slots=max_running, threads=threads, memory=half, spinning=spinning, device=device)
    if runner.num_blocks < max_running:
        size = slot_bytes(bundle) / 1e6
        print(
            f"arriero: warning: {runner.num_blocks} prompts are answered at once and not {max_running}: keys and values of one "
            f"take up to {size:.0f} MB of {'memory' if bundle.manifest.device == 'cpu' else 'GPU memory'}; export the model "
            "with a smaller --context",
            file=sys.stderr,
        )
    tokenizer = load_tokenizer(bundle.folder)
    return Engine(runner, tokenizer, max_running=max_running, max_step_tokens=max_step_tokens)

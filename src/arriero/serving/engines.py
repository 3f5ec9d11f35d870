"""The engine of a server, over a checkpoint or a bundle. Torch is imported only where it is needed: bundles run without."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.config.adapter import AdapterPathOptions
from arriero.config.compilation import CompilationOptions
from arriero.config.kv_cache import KVCacheOptions
from arriero.config.model import ModelOptions
from arriero.config.serving import ServeOptions
from arriero.engine.engine import Engine
from arriero.errors import ConfigError
from arriero.export.bundle import is_bundle
from arriero.serving.service import ServedModel

if TYPE_CHECKING:
    from arriero.engine.drafts import Speculation
    from arriero.engine.loading import LoadedModel
    from arriero.engine.request_adapters import AdapterPool
    from arriero.engine.runner import TorchRunner
    from arriero.parallel.processes import Processes


def bundle_folder(model: ModelOptions) -> Path | None:
    """The folder of the options' model if it is a bundle."""
    folder = Path(model.model_name_or_path).expanduser()
    return folder if is_bundle(folder) else None


def model_name(model: ModelOptions, options: ServeOptions) -> str:
    """What clients call the base model."""
    if options.served_model_name:
        return options.served_model_name
    name = model.model_name_or_path
    return Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name


def bundle_engine(
    folder: Path,
    model: ModelOptions,
    adapter: AdapterPathOptions,
    cache: KVCacheOptions,
    compilation: CompilationOptions,
    options: ServeOptions,
) -> Engine:
    """The engine over a bundle.

    Raises:
        ConfigError: an option that a bundle decides itself.
        ArrieroError: the bundle or its runtime cannot be used.
    """
    from arriero.bundles import running

    if options.takes_adapters:
        raise ConfigError(
            f"{options.takes_adapters}: {folder} is a bundle, which takes none; serve the checkpoint it was made from"
        )
    if options.kv_cache_memory_share is not None:
        raise ConfigError(
            f"--kv_cache_memory_share {options.kv_cache_memory_share:g}: a bundle holds --max_batch_size whole contexts; leave "
            "it out, and lower that for less memory"
        )
    bundle = running.open_as_model(model, adapter, cache, compilation)
    # The event loop and others on the machine want the cores too.
    return running.bundle_engine(
        bundle,
        options.max_batch_size,
        max_step_tokens=options.max_step_tokens,
        spinning=False,
        device=model.device,
    )


def adapters_of(loaded: LoadedModel, base: str, options: ServeOptions) -> tuple[AdapterPool | None, list[ServedModel]]:
    """The adapters that clients can name, and all names.

    Raises:
        ArrieroError: an adapter that cannot be read, or whose name cannot be.
    """
    from arriero.engine.request_adapters import AdapterPool

    models = [ServedModel(base)]
    folders = options.adapter_folders()
    if base in folders:
        raise ConfigError(f"--adapters names {base!r}, which is the model's own name: choose another")
    if not options.takes_adapters:
        return None, models
    pool = AdapterPool(loaded.model, base, max_loaded=options.max_loaded_adapters)
    for name, folder in folders.items():
        pool.load(name, folder)
        models.append(ServedModel(name, name))
    return pool, models


def runner_over(
    loaded: LoadedModel,
    pool: AdapterPool | None,
    cache: KVCacheOptions,
    compilation: CompilationOptions,
    options: ServeOptions,
) -> TorchRunner:
    """What computes with a checkpoint, in each of the processes that hold it, when all is compiled."""
    from arriero.engine.runner import TorchRunner
    from arriero.parallel.generation import for_generation

    runner = TorchRunner(
        loaded.model if pool is not None else for_generation(loaded.model),
        # as much again for the beginnings that requests share
        useful_tokens=2 * options.max_batch_size * loaded.model.config.max_position_embeddings,
        memory_share=options.kv_cache_memory_share,
        kv_cache_dtype=cache.kv_cache_dtype,
        adapters=pool,
        compile=compilation.torch_compile,
    )
    runner.prepare()
    return runner


@contextlib.contextmanager
def checkpoint_engine(
    runner: TorchRunner,
    loaded: LoadedModel,
    options: ServeOptions,
    processes: Processes,
    speculation: Speculation | None = None,
) -> Iterator[Engine]:
    """The engine over a checkpoint; of several processes in the first one, which leads the others."""
    from arriero.engine.ranks import LeaderRunner

    with contextlib.ExitStack() as stack:
        leader = runner if processes.alone else stack.enter_context(LeaderRunner(runner, processes))
        yield Engine(
            leader,
            loaded.tokenizer,
            max_running=options.max_batch_size,
            max_step_tokens=options.max_step_tokens,
            speculation=speculation,
        )

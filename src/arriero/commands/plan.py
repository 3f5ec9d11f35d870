"""`arriero plan`: memory, work and time of a training run, before it, from the model's configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.config.adapter import AdapterOptions
from arriero.config.logging import LoggingOptions
from arriero.config.parallel import ParallelOptions
from arriero.config.planning import (
    PlanCheckpointOptions,
    PlanCorpusOptions,
    PlanModelOptions,
    PlanOptimizationOptions,
    PlanOptions,
)
from arriero.config.precision import PrecisionOptions

if TYPE_CHECKING:
    from arriero.training.planning.setup import TrainingSetup

HELP = (
    "Tell what a training run would need and what fits. Takes every option of pretrain, so that a run's file can be planned "
    "as it is (--config run.yaml); those that change neither memory nor time have no effect."
)

OPTIONS: tuple[type, ...] = (
    PlanOptions,
    PlanModelOptions,
    PlanCorpusOptions,
    PlanOptimizationOptions,
    PrecisionOptions,
    AdapterOptions,
    ParallelOptions,
    PlanCheckpointOptions,
    LoggingOptions,
)


def run(
    plan: PlanOptions,
    model: PlanModelOptions,
    corpus: PlanCorpusOptions,
    optimization: PlanOptimizationOptions,
    precision: PrecisionOptions,
    adapter: AdapterOptions,
    parallel: ParallelOptions,
    checkpoint: PlanCheckpointOptions,
    logging: LoggingOptions,
) -> int:
    """Print the plan; a run that does not fit is an error that says what helps."""
    _refuse(model, adapter, parallel, plan)
    from arriero.errors import ConfigError, FormatError
    from arriero.formats.download import model_config
    from arriero.formats.safe_tensors import parse_size
    from arriero.training.planning.machine import DEFAULT_UTILIZATION, find_machine
    from arriero.training.planning.report import as_dictionary, as_text, make_plan, too_much
    from arriero.training.planning.setup import model_facts

    try:
        memory = parse_size(plan.memory) if plan.memory is not None else None
    except FormatError as error:
        raise ConfigError(f"--memory: {error}") from error
    name = model.config_name or model.model_name_or_path
    config = model_config(name, Path(model.cache_dir).expanduser() if model.cache_dir else None)
    setup = _setup(plan, model, corpus, optimization, precision, parallel)
    targets = adapter.lora_target_modules if adapter.lora else []
    facts = model_facts(config, lora_rank=adapter.lora_rank if adapter.lora else 0, lora_targets=targets)
    machine = find_machine(setup.device, setup.compute_dtype, gpu=plan.gpu, memory=memory, flops=plan.flops)
    tokens = plan.num_tokens
    if tokens is None and optimization.max_steps > 0:
        tokens = float(optimization.max_steps * setup.tokens * setup.accumulation * setup.devices)
    made = make_plan(name, facts, setup, machine, plan.mfu or DEFAULT_UTILIZATION[setup.device], tokens)
    text = json.dumps(as_dictionary(made), indent=1) + "\n"
    print(text if plan.json else as_text(made), end="")
    if plan.output_file is not None:
        _write(Path(plan.output_file).expanduser(), text)
    if not made.fits:
        raise ConfigError(too_much(made))
    return 0


def _refuse(model: PlanModelOptions, adapter: AdapterOptions, parallel: ParallelOptions, plan: PlanOptions) -> None:
    """What is not planned in this version."""
    from arriero.errors import ConfigError

    if plan.gpu is not None and model.device == "cpu":
        raise ConfigError(f"--gpu {plan.gpu} and --device cpu ask for different machines: drop one of them")
    for name in ("use_flash_attention", "use_fused_rms_norm"):
        if not getattr(model, name):
            raise ConfigError(f"--{name} no is not planned for: it keeps more, to compare kernels; drop it")
    for name in ("tensor_parallel_degree", "pipeline_parallel_degree"):
        if getattr(parallel, name) > 1:
            raise ConfigError(
                f"--{name} {getattr(parallel, name)} is not planned for in this version: --num_devices and --sharding are"
            )
    if "offload" in parallel.sharding:
        raise ConfigError("--sharding offload is not planned for in this version: drop the word offload")
    for name in ("sharding_parallel_degree", "data_parallel_degree"):
        degree = getattr(parallel, name)
        if degree > 1 and (degree != plan.num_devices or (name.startswith("data") and parallel.sharding)):
            raise ConfigError(
                f"--{name} {degree} is not planned for with --num_devices {plan.num_devices}: in this version the model's "
                "state is shared by all devices or by none; leave it out"
            )
    if adapter.prefix_tuning:
        raise ConfigError("--prefix_tuning is not planned for in this version: --lora is")


def _setup(
    plan: PlanOptions,
    model: PlanModelOptions,
    corpus: PlanCorpusOptions,
    optimization: PlanOptimizationOptions,
    precision: PrecisionOptions,
    parallel: ParallelOptions,
) -> TrainingSetup:
    from arriero.training.planning.setup import TrainingSetup

    if plan.gpu is not None:
        device = "cuda"
    elif model.device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    else:
        device = model.device
    half = precision.compute_dtype != "float32"
    weight = precision.weight_dtype if model.dtype == "auto" else model.dtype
    return TrainingSetup(
        batch=optimization.per_device_train_batch_size,
        sequence=corpus.max_seq_length,
        accumulation=optimization.gradient_accumulation_steps,
        # without --bf16 or --fp16 nothing is cast: products are in the weights' own type
        compute_dtype=precision.compute_dtype if half else weight,
        weight_dtype=weight,
        recompute=precision.recompute_granularity if precision.recompute else "none",  # type: ignore[arg-type]
        optimizer=optimization.optim,
        device="cpu" if device == "cpu" else "cuda",
        devices=plan.num_devices,
        sharding=parallel.sharding_stage if plan.num_devices > 1 else 0,
    )


def _write(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    from arriero.errors import ConfigError

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"--output_file {path}: cannot be written ({error.strerror})") from error

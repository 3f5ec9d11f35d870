"""`arriero plan`: memory, work and time of a training run, before it, from the model's configuration alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.config.adapter import AdapterOptions
from arriero.config.hub import HubOptions
from arriero.config.logging import LoggingOptions
from arriero.config.option import specs_of
from arriero.config.parallel import DEGREES, ParallelOptions
from arriero.config.planning import (
    PlanCheckpointOptions,
    PlanCorpusOptions,
    PlanModelOptions,
    PlanOptimizationOptions,
    PlanOptions,
)
from arriero.config.precision import PrecisionOptions
from arriero.config.preference import PreferenceOptions
from arriero.config.quantization import QuantizationOptions
from arriero.output_file import write_file

if TYPE_CHECKING:
    from arriero.models.config import LlamaConfig
    from arriero.training.planning.machine import Links, Machine
    from arriero.training.planning.setup import ModelFacts, TrainingSetup

HELP = (
    "Tell what a training run would need and what fits. Takes every option of pretrain and finetune, and the file of a run as "
    "it is (--config run.yaml); options that change neither memory nor time have no effect."
)

OPTIONS: tuple[type, ...] = (
    PlanOptions,
    PlanModelOptions,
    PlanCorpusOptions,
    PlanOptimizationOptions,
    PrecisionOptions,
    AdapterOptions,
    QuantizationOptions,
    PreferenceOptions,
    ParallelOptions,
    PlanCheckpointOptions,
    LoggingOptions,
    HubOptions,
)


def run(
    plan: PlanOptions,
    model: PlanModelOptions,
    corpus: PlanCorpusOptions,
    optimization: PlanOptimizationOptions,
    precision: PrecisionOptions,
    adapter: AdapterOptions,
    quantization: QuantizationOptions,
    preference: PreferenceOptions,
    parallel: ParallelOptions,
    checkpoint: PlanCheckpointOptions,
    logging: LoggingOptions,
    hub: HubOptions,
) -> int:
    """Print the plan; a run that does not fit is an error that says what helps."""
    _refuse(model, adapter, quantization, plan)
    if plan.search:
        _refuse_degrees(parallel)
    from arriero.errors import ConfigError, FormatError
    from arriero.formats.download import model_config
    from arriero.formats.safe_tensors import parse_size
    from arriero.parallel.tensor import check_heads
    from arriero.training.planning.machine import (
        COMPUTING_UTILIZATION,
        DEFAULT_UTILIZATION,
        WITH_FP8,
        find_gpu,
        find_links,
        find_machine,
    )
    from arriero.training.planning.report import as_dictionary, as_text, fp32_text, make_plan, too_much
    from arriero.training.planning.setup import model_facts

    try:
        memory = parse_size(plan.memory) if plan.memory is not None else None
    except FormatError as error:
        raise ConfigError(f"--memory: {error}") from error
    name = model.config_name or model.model_name_or_path
    config = model_config(name, Path(model.cache_dir).expanduser() if model.cache_dir else None)
    setup = _setup(plan, model, corpus, optimization, precision, parallel, preference.preference)
    check_heads(config, setup.layout.tp)
    facts = model_facts(config, **_method(config, adapter, quantization))
    if plan.gpu is not None and precision.fp8_products and find_gpu(plan.gpu)[0] not in WITH_FP8:
        raise ConfigError(
            f"--fp8 needs an H100, an RTX 40 or a newer NVIDIA GPU (compute capability 8.9), and --gpu is {plan.gpu}: drop it"
        )
    machine = find_machine(setup.device, setup.compute_dtype, gpu=plan.gpu, memory=memory, flops=plan.flops)
    links = find_links(plan.gpu, plan.bandwidth_in_node, plan.bandwidth_between_nodes)
    utilization = plan.mfu or DEFAULT_UTILIZATION[setup.device]
    if plan.mfu is None and links is not None and setup.device == "cuda" and setup.layout.size > 1:
        utilization = COMPUTING_UTILIZATION
    if plan.search:
        return _search(plan, name, facts, setup, machine, utilization, links)
    tokens = plan.num_tokens
    if tokens is None and optimization.max_steps > 0:
        tokens = float(optimization.max_steps * setup.step_tokens)
    made = make_plan(name, facts, setup, machine, utilization, tokens, links)
    told, shown = as_dictionary(made), as_text(made)
    if plan.gpu is not None and setup.compute_dtype == "float32":
        half = replace(setup, compute_dtype="bfloat16")
        faster = find_machine(half.device, half.compute_dtype, gpu=plan.gpu, memory=memory, flops=plan.flops)
        shown += "\n" + fp32_text(make_plan(name, facts, half, faster, utilization, tokens, links))
    if plan.dry_run:
        from arriero.training.planning.dry_run import chosen_ranks, dry_run
        from arriero.training.planning.layout_report import program_dictionary, program_text

        programs = dry_run(facts, setup, chosen_ranks(setup.layout))
        told["programs"] = [program_dictionary(program) for program in programs]
        shown += "\n" + program_text(programs)
    _tell(plan, told, shown)
    if not made.fits:
        raise ConfigError(too_much(made))
    return 0


def _tell(plan: PlanOptions, told: dict[str, Any], shown: str) -> None:
    text = json.dumps(told, indent=1) + "\n"
    print(text if plan.json else shown, end="")
    if plan.output_file is not None:
        write_file(Path(plan.output_file).expanduser(), text, "--output_file")


def _search(
    plan: PlanOptions,
    name: str,
    facts: ModelFacts,
    setup: TrainingSetup,
    machine: Machine,
    utilization: float,
    links: Links | None,
) -> int:
    from arriero.errors import ConfigError
    from arriero.training.planning.layout_report import search_dictionary, search_text
    from arriero.training.planning.search import search

    if links is None or machine.flops is None:
        raise ConfigError(
            "--search needs the speed of devices and links: give --gpu NAME, or --memory, --flops, --bandwidth_in_node and "
            "--bandwidth_between_nodes"
        )
    found = search(facts, setup, memory=machine.memory, flops=machine.flops, utilization=utilization, links=links)
    _tell(
        plan,
        search_dictionary(name, setup, machine.flops, found),
        search_text(name, setup, machine, utilization, links, found),
    )
    if not found:
        raise ConfigError(
            f"no layout of {setup.layout.size} devices that divides {setup.step_tokens // setup.sequence} rows a step fits: "
            "give more devices, --optim adamw_8bit, shorter rows, or other rows a step (--gradient_accumulation_steps)"
        )
    return 0


def _refuse(
    model: PlanModelOptions, adapter: AdapterOptions, quantization: QuantizationOptions, plan: PlanOptions
) -> None:
    """What is not planned in this version."""
    from arriero.errors import ConfigError

    if plan.gpu is not None and model.device == "cpu":
        raise ConfigError(f"--gpu {plan.gpu} and --device cpu ask for different machines: drop one of them")
    for name in ("use_flash_attention", "use_fused_rms_norm"):
        if not getattr(model, name):
            raise ConfigError(f"--{name} no is not planned for: it keeps more, to compare kernels; drop it")
    if quantization.qat:
        raise ConfigError(
            "--qat is not planned for in this version: what is held in full precision is a lower bound, drop it"
        )
    for name in ("lora_path", "prefix_path"):
        if getattr(adapter, name):
            raise ConfigError(f"--{name} is not read by plan: describe it by the options that it was made with")


def _refuse_degrees(parallel: ParallelOptions) -> None:
    """What a search chooses itself."""
    from arriero.errors import ConfigError

    for name in DEGREES:
        degree, usual = (
            getattr(parallel, name),
            next(spec.default for spec in specs_of(type(parallel)) if spec.name == name),
        )
        if degree != usual:
            raise ConfigError(
                f"--{name} {degree} and --search: the search chooses the degrees itself; drop one of them (without --search "
                "that layout is planned)"
            )


def _method(config: LlamaConfig, adapter: AdapterOptions, quantization: QuantizationOptions) -> dict[str, Any]:
    """The fields of a `Method`."""
    found: dict[str, Any] = {"quantize_base": quantization.quantize_base}
    if adapter.lora:
        found |= {
            "lora_rank": adapter.lora_rank,
            "lora_targets": adapter.lora_target_modules,
            "dora": adapter.lora_dora,
        }
    if adapter.prefix_tuning:
        found["prefix_length"] = adapter.num_prefix_tokens
        if adapter.prefix_projection:
            found["prefix_network"] = adapter.prefix_projection_hidden_size or config.hidden_size
    return found


def _setup(
    plan: PlanOptions,
    model: PlanModelOptions,
    corpus: PlanCorpusOptions,
    optimization: PlanOptimizationOptions,
    precision: PrecisionOptions,
    parallel: ParallelOptions,
    preference: str | None,
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
        batch=optimization.per_device_train_batch_size * (1 if preference is None else 2),
        preference=preference,
        sequence=corpus.max_seq_length,
        accumulation=optimization.gradient_accumulation_steps,
        # without --bf16 or --fp16 nothing is cast: products are in the weights' own type
        compute_dtype=precision.compute_dtype if half else weight,
        weight_dtype=weight,
        recompute=precision.recompute_granularity if precision.recompute else "none",  # type: ignore[arg-type]
        optimizer="sgd with momentum"
        if optimization.optim == "sgd" and optimization.sgd_momentum
        else optimization.optim,
        device="cpu" if device == "cpu" else "cuda",
        layout=parallel.layout(plan.num_devices),
        reduce_dtype=parallel.gradient_reduce_dtype,
    )

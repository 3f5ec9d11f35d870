"""Rules about layouts of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arriero.config.adapter import AdapterOptions
from arriero.config.checkpoint import CheckpointOptions
from arriero.config.launched import launched_size
from arriero.config.optimization import OptimizationOptions
from arriero.config.parallel import ParallelOptions
from arriero.config.planning import PlanOptions
from arriero.config.precision import PrecisionOptions
from arriero.config.rules.groups import changed, find
from arriero.errors import ConfigError


def parallel_rule(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    """Options of a layout that this run does not have."""
    parallel, checkpoint = find(groups, ParallelOptions), find(groups, CheckpointOptions)
    if parallel is None:
        return
    tensor, stages = parallel.tensor_parallel_degree, parallel.pipeline_parallel_degree
    precision = find(groups, PrecisionOptions)
    if stages > 1 and parallel.pipeline_schedule in ("zero_bubble", "zbv") and precision and precision.torch_compile:
        raise ConfigError(
            f"--torch_compile and --pipeline_schedule {parallel.pipeline_schedule} do not go together: it runs backward passes "
            "in two parts, and compiled layers have one; choose 1f1b or interleaved, or drop the first"
        )
    plan = find(groups, PlanOptions)
    if plan is not None:  # what follows is about the processes that there are
        _planned(plan, groups, parallel, given, warnings)
        return
    if parallel.context_parallel_degree == 1 and changed(parallel, "context_parallel_method", given):
        warnings.append("--context_parallel_method has no effect without --context_parallel_degree above 1")
    if stages == 1:
        for name in ("pipeline_parallel_config", "pipeline_schedule"):
            if changed(parallel, name, given):
                warnings.append(f"--{name} has no effect without --pipeline_parallel_degree above 1")
    elif "enable_timer" in parallel.pipeline_parallel_config:
        warnings.append(
            "--pipeline_parallel_config enable_timer has no effect: --profile_steps shows where the time goes"
        )
    if tensor == 1 and changed(parallel, "sequence_parallel", given):
        warnings.append("--sequence_parallel has no effect without --tensor_parallel_degree above 1")
    if checkpoint is not None and checkpoint.save_sharded_model:
        adapter = find(groups, AdapterOptions)
        if adapter is not None and (adapter.lora or adapter.prefix_tuning):
            name = "lora" if adapter.lora else "prefix_tuning"
            warnings.append(f"--save_sharded_model has no effect with --{name}: an adapter is small and stays one file")
        elif tensor * stages == 1:
            warnings.append(
                "--save_sharded_model has no effect without --tensor_parallel_degree or --pipeline_parallel_degree above 1"
            )
    _data_parallel(parallel, given, warnings)


def _planned(
    plan: PlanOptions, groups: Sequence[Any], parallel: ParallelOptions, given: frozenset[str], warnings: list[str]
) -> None:
    if plan.num_devices == 1 and changed(parallel, "sharding", given):
        warnings.append("--sharding has no effect on one device: --num_devices says how many share")
    optimization = find(groups, OptimizationOptions)
    if optimization is not None and plan.num_tokens is not None and changed(optimization, "max_steps", given):
        warnings.append(
            f"--max_steps {optimization.max_steps} has no effect with --num_tokens, which tells the length too"
        )


def _data_parallel(parallel: ParallelOptions, given: frozenset[str], warnings: list[str]) -> None:
    try:
        processes = launched_size()
        layout = parallel.layout(processes)
    except ConfigError:  # refused when the run starts: a command line may be read for another machine
        return
    alone = "in one process: arriero launch starts several"
    if layout.stage == 0 and changed(parallel, "sharding", given):
        warnings.append(f"--sharding has no effect {alone if processes == 1 else f'with {layout}: nobody shares it'}")
    if processes == 1 and changed(parallel, "gradient_reduce_dtype", given):
        warnings.append(f"--gradient_reduce_dtype has no effect {alone}")

"""Combinations of options across groups: the impossible ones are refused, those without effect are told.

`parser.parse` calls `check` on every command line, before anything heavy is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from arriero.config.adapter import AdapterOptions, AdapterPathOptions
from arriero.config.checkpoint import CheckpointOptions
from arriero.config.data import DataOptions, dataset_parts
from arriero.config.evaluation import EvaluateOptions
from arriero.config.generation import GenerationOptions
from arriero.config.logging import LoggingOptions
from arriero.config.model import ModelOptions
from arriero.config.optimization import OptimizationOptions
from arriero.config.option import specs_of
from arriero.config.parallel import ParallelOptions
from arriero.config.planning import PlanOptions
from arriero.config.precision import PrecisionOptions
from arriero.config.preference import PreferenceOptions
from arriero.config.pretraining import CorpusOptions
from arriero.config.quantization import QuantizationOptions
from arriero.errors import ConfigError

Group = TypeVar("Group")


def find(groups: Sequence[Any], kind: type[Group]) -> Group | None:
    """The instance of a group (or of a subclass of it) among several, or None."""
    return next((group for group in groups if isinstance(group, kind)), None)


def check(groups: Sequence[Any], given: frozenset[str] = frozenset()) -> list[str]:
    """Refuse impossible combinations of options and settle defaults that depend on another group.

    Args:
        groups: the instances of one command.
        given: names of the options that the user set himself, on the command line or in a file.

    Returns:
        Warnings, one line each, about given options that have no effect here.

    Raises:
        ConfigError: naming both options and the way out.
    """
    warnings: list[str] = []
    for rule in _RULES:
        rule(groups, given, warnings)
    return warnings


def _changed(group: Any, name: str, given: frozenset[str]) -> bool:
    """Whether the user set an option to something else than its default (a file written by a run sets every option)."""
    spec = next(spec for spec in specs_of(type(group)) if spec.name == name)
    return name in given and getattr(group, name) != spec.default


def _without_effect(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    """A given option whose `only_with` options are all off."""
    values = {spec.name: getattr(group, spec.name) for group in groups for spec in specs_of(type(group))}
    for group in groups:
        for spec in specs_of(type(group)):
            switches = [name for name in spec.only_with if name in values]
            if switches and not any(values[name] for name in switches) and _changed(group, spec.name, given):
                warnings.append(f"--{spec.name} has no effect without --{' or --'.join(switches)}")


def _evaluation(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    """Settle when to evaluate: `--do_eval` and `--evaluation_strategy` each imply the other."""
    checkpoint, optimization = find(groups, CheckpointOptions), find(groups, OptimizationOptions)
    if checkpoint is None or optimization is None:
        return
    if checkpoint.evaluation_strategy is None:
        if not optimization.do_eval:
            checkpoint.evaluation_strategy = "no"
        elif checkpoint.eval_steps is not None:
            checkpoint.evaluation_strategy = "steps"
        else:
            checkpoint.evaluation_strategy = "epoch" if checkpoint.save_strategy == "no" else checkpoint.save_strategy
    if checkpoint.evaluation_strategy == "steps":
        checkpoint.eval_steps = checkpoint.eval_steps or checkpoint.save_steps
    elif _changed(checkpoint, "eval_steps", given):
        warnings.append(f"--eval_steps has no effect with --evaluation_strategy {checkpoint.evaluation_strategy}")
    if checkpoint.save_strategy != "steps" and _changed(checkpoint, "save_steps", given):
        warnings.append(f"--save_steps has no effect with --save_strategy {checkpoint.save_strategy}")
    if checkpoint.evaluation_strategy != "no":
        optimization.do_eval = True
    elif checkpoint.early_stopping_patience is not None:
        raise ConfigError(
            "--early_stopping_patience needs evaluations and there are none: add --do_eval or --evaluation_strategy steps"
        )
    corpus = find(groups, CorpusOptions)
    if not optimization.do_train and not optimization.do_eval and not (corpus is not None and corpus.do_predict):
        raise ConfigError("--do_train and --do_eval are both off, so there is nothing to do: switch one on")


def _schedule(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    optimization = find(groups, OptimizationOptions)
    if optimization is None:
        return
    schedule = optimization.lr_scheduler_type
    if optimization.max_steps > 0 and _changed(optimization, "num_train_epochs", given):
        warnings.append(f"--num_train_epochs has no effect with --max_steps {optimization.max_steps}")
    if optimization.warmup_steps > 0 and _changed(optimization, "warmup_ratio", given):
        warnings.append(f"--warmup_ratio has no effect with --warmup_steps {optimization.warmup_steps}")
    if schedule.startswith("constant"):
        idle = ["min_learning_rate", "decay_steps"] + (
            ["warmup_steps", "warmup_ratio"] if schedule == "constant" else []
        )
    else:
        idle = ["decay_steps"] if schedule == "inverse_sqrt" else []
    idle += [] if schedule == "wsd" else ["wsd_decay_ratio", "wsd_decay_shape"]
    idle += [] if schedule == "polynomial" else ["lr_power"]
    for name in idle:
        if _changed(optimization, name, given):
            instead = " (constant_with_warmup has a warm-up)" if name.startswith("warmup") else ""
            warnings.append(f"--{name} has no effect with --lr_scheduler_type {schedule}{instead}")
    if optimization.optim != "muon" and _changed(optimization, "muon_momentum", given):
        warnings.append(f"--muon_momentum has no effect with --optim {optimization.optim}")


def _regularized(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    """`--freeze` and `--neftune_noise_alpha` where they do not go."""
    optimization = find(groups, OptimizationOptions)
    if optimization is None:
        return
    if find(groups, PlanOptions) is not None:
        if optimization.freeze:
            warnings.append("--freeze has no effect on a plan, which counts every parameter as trained")
        return
    adapter, preference = find(groups, AdapterOptions), find(groups, PreferenceOptions)
    if optimization.freeze and adapter is not None and (adapter.lora or adapter.prefix_tuning):
        name = "lora" if adapter.lora else "prefix_tuning"
        raise ConfigError(
            f"--freeze and --{name} do not go together: all weights of the model are frozen already; drop the first"
            + (" (--lora_target_modules chooses what is adapted)" if adapter.lora else "")
        )
    if optimization.neftune_noise_alpha > 0:
        if preference is not None and preference.preference is not None:
            raise ConfigError(
                f"--neftune_noise_alpha and --preference {preference.preference} do not go together: the two answers of a pair "
                "would be compared under different noise; drop the first"
            )
        if find(groups, CorpusOptions) is not None:
            raise ConfigError("--neftune_noise_alpha is for fine-tuning, where a row has a length of its own: drop it")


def _watching(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    checkpoint, logging = find(groups, CheckpointOptions), find(groups, LoggingOptions)
    if logging is None:
        return
    if checkpoint is not None and checkpoint.evaluation_strategy == "no" and _changed(logging, "sample_prompts", given):
        warnings.append("--sample_prompts has no effect with --evaluation_strategy no: it is done when evaluating")
    if not {"wandb", "trackio"} & set(logging.report_to) and _changed(logging, "project", given):
        warnings.append(f"--project has no effect with --report_to {','.join(logging.report_to)}")


def _precision(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    model, precision = find(groups, ModelOptions), find(groups, PrecisionOptions)
    if model is None or precision is None or model.dtype == "auto":
        return
    wanted = precision.weight_dtype
    if find(groups, CheckpointOptions) is not None and model.dtype != wanted:  # a verb that trains
        how = "drop it" if wanted == "float32" and not (precision.fp16 or precision.bf16) else "drop one of them"
        raise ConfigError(
            f"--dtype {model.dtype}: the weights are trained in {wanted} here; half-precision weights need --bf16 (or --fp16) "
            f"with --fp16_opt_level O2: {how}"
        )
    if (precision.fp16 or precision.bf16) and model.dtype not in (wanted, precision.compute_dtype):
        flag = "fp16" if precision.fp16 else "bf16"
        raise ConfigError(f"--dtype {model.dtype} and --{flag} ask for different number formats: drop one of them")


def _stored_adapter(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    adapter = find(groups, AdapterOptions)
    if adapter is None or adapter.lora_path is None:
        return
    stored = ("rank", "alpha", "dropout", "target_modules", "bias", "rslora", "dora", "init")
    for name in (*(f"lora_{word}" for word in stored), "pissa"):
        if _changed(adapter, name, given):
            warnings.append(f"--{name} has no effect with --lora_path: the stored adapter's own is kept")


def _quantization(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    adapter, quantization = find(groups, AdapterOptions), find(groups, QuantizationOptions)
    if adapter is None or quantization is None:
        return
    if quantization.quantize_base is not None and not (adapter.lora or adapter.prefix_tuning):
        raise ConfigError(
            f"--quantize_base {quantization.quantize_base} (--qlora) is for a base model that is not trained: add --lora or "
            "--prefix_tuning"
        )
    if not quantization.qat:
        return
    if quantization.qat_type == "W4" and _changed(quantization, "qat_activation", given):
        warnings.append("--qat_activation has no effect with --qat_type W4, which rounds no activations")
    checkpoint = find(groups, CheckpointOptions)
    if checkpoint is not None and checkpoint.save_sharded_model and not adapter.lora:
        warnings.append("--save_sharded_model has no effect with --qat: `arriero convert` cuts the folder into shards")
    if adapter.prefix_tuning:
        raise ConfigError(
            "--qat and --prefix_tuning do not go together: a prefix has no weights to quantize; drop one of them"
        )
    if adapter.lora and (adapter.lora_dora or adapter.lora_init == "pissa"):
        kind = "--lora_dora" if adapter.lora_dora else "--lora_init pissa"
        raise ConfigError(f"--qat rounds the sum of the weight and a plain addition: drop {kind}")
    if adapter.lora and adapter.lora_dropout > 0:
        raise ConfigError(
            f"--qat with --lora needs --lora_dropout 0 (it is {adapter.lora_dropout:g}): "
            "the sum of both weights is quantized"
        )


def _prefix(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    adapter, parallel = find(groups, AdapterPathOptions), find(groups, ParallelOptions)
    if adapter is None or parallel is None:
        return
    tuned = isinstance(adapter, AdapterOptions) and adapter.prefix_tuning
    name = "prefix_path" if adapter.prefix_path else "prefix_tuning" if tuned else None
    if name is None:
        return
    if adapter.prefix_path:
        for stored in ("num_prefix_tokens", "prefix_projection", "prefix_projection_hidden_size"):
            if isinstance(adapter, AdapterOptions) and _changed(adapter, stored, given):
                warnings.append(f"--{stored} has no effect with --prefix_path: the stored prefix's own is kept")
    if parallel.context_parallel_degree > 1:
        raise ConfigError(
            f"--{name} and --context_parallel_degree {parallel.context_parallel_degree} do not go together: each document's "
            "prefix would stand in the middle of a shared-out row; use --sharding or --tensor_parallel_degree"
        )
    if isinstance(adapter, AdapterOptions) and adapter.prefix_projection:
        check_projection(parallel)


def check_projection(parallel: ParallelOptions) -> None:
    """Raises ConfigError for a pipeline that cannot train the network of a projected prefix."""
    schedule = parallel.pipeline_schedule
    if parallel.pipeline_parallel_degree > 1 and schedule in ("zero_bubble", "zbv"):
        raise ConfigError(
            f"--prefix_projection and --pipeline_schedule {schedule} do not go together: it runs backward passes in two parts, "
            "of which the second knows only parameters of one stage, and all share the network; choose 1f1b or interleaved"
        )


def _preference(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    """What does not go with pairs of answers, and options of another loss than the chosen one."""
    preference, data = find(groups, PreferenceOptions), find(groups, DataOptions)
    if preference is None or data is None or preference.preference is None:
        return
    name = f"--preference {preference.preference}"
    if data.dataset_path is None:
        raise ConfigError(
            f"{name} needs --dataset_path: a file or folder of rows with prompt, chosen and rejected"
            + (f" (download {data.data_name} first)" if data.data_name else "")
        )
    if any(part.weight is not None for part in dataset_parts(data.dataset_path, data.dataset_weights)):
        raise ConfigError(f"{name} takes every pair once an epoch: drop the weights of --dataset_path")
    parallel, optimization = find(groups, ParallelOptions), find(groups, OptimizationOptions)
    quantization = find(groups, QuantizationOptions)
    refused = {
        f"--task_name {data.task_name}": data.task_name is not None,
        "--eval_with_do_generation": data.eval_with_do_generation,
        "--packing no": not data.packing,
        f"--max_tokens_per_batch {data.max_tokens_per_batch}": data.max_tokens_per_batch is not None,
        "--context_parallel_degree": parallel is not None and parallel.context_parallel_degree > 1,
        # its ranges are not known before the first step, when the reference is scored
        "--qat": quantization is not None and quantization.qat,
    }
    for option, wanted in refused.items():
        if wanted:
            raise ConfigError(f"{name} and {option} do not go together: drop one of them")
    if optimization is not None and optimization.label_smoothing > 0:
        raise ConfigError(f"{name} and --label_smoothing do not go together: --dpo_label_smoothing is that of pairs")
    losses = {"dpo_beta": ("dpo", "ipo", "simpo"), "dpo_label_smoothing": ("dpo",)}
    losses |= {"simpo_gamma": ("simpo",), "orpo_lambda": ("orpo",)}
    idle = [option for option, having in losses.items() if preference.preference not in having]
    warnings += [f"--{option} has no effect with {name}" for option in idle if _changed(preference, option, given)]
    for option in ("data_format", "train_on"):
        if _changed(data, option, given):
            warnings.append(f"--{option} has no effect with {name}: rows are pairs, of which the last answers count")


def _sampling(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    generation = find(groups, GenerationOptions)
    if generation is None or generation.do_sample:
        return
    for name in ("temperature", "top_k", "top_p", "min_p"):
        if _changed(generation, name, given) and not (name == "top_k" and generation.top_k == 1):
            warnings.append(f"--{name} has no effect with --do_sample no")


def _padding(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    data = find(groups, DataOptions)
    if data is None or find(groups, OptimizationOptions) is None:
        return
    if data.packing and _changed(data, "group_by_length", given):
        warnings.append("--group_by_length has no effect without --packing no: packed rows have no padding to save")


def _data_loading(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    data = find(groups, DataOptions) or find(groups, CorpusOptions)
    if data is None or find(groups, OptimizationOptions) is None or find(groups, PlanOptions) is not None:
        return
    if _changed(data, "dataloader_num_workers", given):
        warnings.append("--dataloader_num_workers has no effect: batches are made in the main process")


def _parallel(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    """Options of a layout that this run does not have."""
    parallel, checkpoint = find(groups, ParallelOptions), find(groups, CheckpointOptions)
    if parallel is None or find(groups, PlanOptions) is not None:  # a plan may be of other machines
        return
    tensor, stages = parallel.tensor_parallel_degree, parallel.pipeline_parallel_degree
    precision = find(groups, PrecisionOptions)
    if stages > 1 and parallel.pipeline_schedule in ("zero_bubble", "zbv") and precision and precision.torch_compile:
        raise ConfigError(
            f"--torch_compile and --pipeline_schedule {parallel.pipeline_schedule} do not go together: it runs backward passes "
            "in two parts, and compiled layers have one; choose 1f1b or interleaved, or drop the first"
        )
    if parallel.context_parallel_degree == 1 and _changed(parallel, "context_parallel_method", given):
        warnings.append("--context_parallel_method has no effect without --context_parallel_degree above 1")
    if stages == 1:
        for name in ("pipeline_parallel_config", "pipeline_schedule"):
            if _changed(parallel, name, given):
                warnings.append(f"--{name} has no effect without --pipeline_parallel_degree above 1")
    elif "enable_timer" in parallel.pipeline_parallel_config:
        warnings.append(
            "--pipeline_parallel_config enable_timer has no effect: --profile_steps shows where the time goes"
        )
    if tensor == 1 and _changed(parallel, "sequence_parallel", given):
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


def _data_parallel(parallel: ParallelOptions, given: frozenset[str], warnings: list[str]) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # of the launcher
    try:
        layout = parallel.layout(processes)
    except ConfigError:  # refused when the run starts: a command line may be read for another machine
        return
    alone = "in one process: arriero launch starts several"
    if layout.stage == 0 and _changed(parallel, "sharding", given):
        warnings.append(f"--sharding has no effect {alone if processes == 1 else f'with {layout}: nobody shares it'}")
    if processes == 1 and _changed(parallel, "gradient_reduce_dtype", given):
        warnings.append(f"--gradient_reduce_dtype has no effect {alone}")


def _scoring(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    """`evaluate` shares the data options of `finetune`; those of training rows do nothing there."""
    data = find(groups, DataOptions)
    if data is None or find(groups, EvaluateOptions) is None:
        return
    idle = (
        "max_train_samples",
        "share_prefixes",
        "packing",
        "group_by_length",
        "max_tokens_per_batch",
        "dataset_weights",
    )
    for name in idle:
        if _changed(data, name, given):
            warnings.append(f"--{name} has no effect in evaluate, which reads the held-out rows only")
    evaluation = find(groups, EvaluateOptions)
    if evaluation is None or not evaluation.tasks:
        return
    for source in ("dataset_path", "data_name", "task_name"):
        if getattr(data, source) is not None:
            raise ConfigError(f"--tasks and --{source} both name what is scored: drop one of them")
    rows_only = ("src_length", "tgt_length", "max_seq_length", "max_eval_samples", "eval_with_do_generation")
    for group, names in ((data, (*rows_only, "data_format", "train_on")), (evaluation, ("max_new_tokens",))):
        for name in names:
            if _changed(group, name, given):
                instead = ": --limit is that of tasks" if name == "max_eval_samples" else ", whose files say it"
                warnings.append(f"--{name} has no effect with --tasks{instead}")


def _corpus(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    """Options of a corpus that nothing reads in this run."""
    corpus, optimization = find(groups, CorpusOptions), find(groups, OptimizationOptions)
    if corpus is None or optimization is None:
        return
    shape_only = "config_name" in given and not given & {"model_name_or_path", "tokenizer_name_or_path"}
    if shape_only and find(groups, PlanOptions) is None:
        raise ConfigError(
            "--config_name gives only the model's shape: name the tokenizer with --tokenizer_name_or_path"
        )
    if corpus.best_fit_packing and _changed(corpus, "document_order", given):
        warnings.append("--document_order has no effect with --best_fit_packing: whole packs are shuffled")
    if not optimization.do_eval and _changed(corpus, "eval_iters", given):
        warnings.append("--eval_iters has no effect without --do_eval")
    if not optimization.do_eval and not corpus.do_predict and _changed(corpus, "test_iters", given):
        warnings.append("--test_iters has no effect without --do_eval or --do_predict")


_RULES: tuple[Callable[[Sequence[Any], frozenset[str], list[str]], None], ...] = (
    _without_effect,
    _evaluation,
    _schedule,
    _regularized,
    _watching,
    _precision,
    _stored_adapter,
    _quantization,
    _preference,
    _prefix,
    _sampling,
    _padding,
    _data_loading,
    _corpus,
    _scoring,
    _parallel,
)

"""Combinations of options across groups: the impossible ones are refused, those without effect are told.

`parser.parse` calls `check` on every command line, before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from arriero.config.adapter import AdapterOptions, AdapterPathOptions
from arriero.config.checkpoint import CheckpointOptions
from arriero.config.data import DataOptions, RowOptions
from arriero.config.evaluation import EvaluateOptions, RowScoreOptions
from arriero.config.generation import GenerationOptions
from arriero.config.logging import LoggingOptions
from arriero.config.merging import MergeOptions
from arriero.config.model import ModelOptions
from arriero.config.optimization import OptimizationOptions
from arriero.config.option import specs_of
from arriero.config.planning import PlanOptions
from arriero.config.precision import PrecisionOptions
from arriero.config.preference import PreferenceOptions
from arriero.config.pretraining import CorpusOptions
from arriero.config.quantization import QuantizeOptions
from arriero.config.rules.benchmarks import bench_rule
from arriero.config.rules.chat import chat_rule
from arriero.config.rules.groups import changed, find
from arriero.config.rules.layouts import parallel_rule
from arriero.config.rules.methods import (
    preference_rule,
    prefix_rule,
    quantization_rule,
    stored_adapter_rule,
    vocabulary_rule,
)
from arriero.config.rules.naming import model_rule
from arriero.errors import ConfigError


def check(groups: Sequence[Any], given: frozenset[str] = frozenset(), typed: frozenset[str] = frozenset()) -> list[str]:
    """Refuse impossible combinations of options and settle defaults that depend on another group.

    Args:
        groups: the instances of one command.
        given: names of the options that the user set himself, on the command line or in a file.
        typed: those of them that stand on the command line, or in the call of a function.

    Returns:
        Warnings, one line each, about given options that have no effect here.

    Raises:
        ConfigError: naming both options and the way out.
    """
    warnings: list[str] = []
    _without_effect(groups, given, typed, warnings)
    for rule in _RULES:
        rule(groups, given, warnings)
    return warnings


def _without_effect(groups: Sequence[Any], given: frozenset[str], typed: frozenset[str], warnings: list[str]) -> None:
    """A given option whose `only_with` options are all off.

    Of a small trained part it is refused: the run would train all weights. What a file says is not told where the command
    line switches off what it is for.
    """
    values = {spec.name: getattr(group, spec.name) for group in groups for spec in specs_of(type(group))}
    for group in groups:
        for spec in specs_of(type(group)):
            switches = [name for name in spec.only_with if name in values]
            if not switches or any(values[name] for name in switches):
                continue
            on, off = spec.name in typed, any(name in typed for name in switches)
            if on and not off and values[spec.name] is not False and set(switches) <= {"lora", "prefix_tuning"}:
                wanted = " or --".join(switches)
                raise ConfigError(f"--{spec.name} is for --{wanted}: add it, or leave --{spec.name} out")
            if changed(group, spec.name, given) and (on or not off):
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
    elif changed(checkpoint, "eval_steps", given):
        warnings.append(f"--eval_steps has no effect with --evaluation_strategy {checkpoint.evaluation_strategy}")
    if checkpoint.save_strategy != "steps" and changed(checkpoint, "save_steps", given):
        warnings.append(f"--save_steps has no effect with --save_strategy {checkpoint.save_strategy}")
    if checkpoint.save_strategy == "no" and find(groups, PlanOptions) is None:
        for name in ("save_total_limit", "async_save"):
            if changed(checkpoint, name, given):
                warnings.append(f"--{name} has no effect with --save_strategy no")
    if checkpoint.evaluation_strategy != "no":
        optimization.do_eval = True
    elif checkpoint.early_stopping_patience is not None:
        raise ConfigError(
            "--early_stopping_patience needs evaluations and there are none: add --do_eval or --evaluation_strategy steps"
        )
    _not_evaluated(groups, given, warnings)
    corpus = find(groups, CorpusOptions)
    if not optimization.do_train and not optimization.do_eval and not (corpus is not None and corpus.do_predict):
        raise ConfigError("--do_train and --do_eval are both off, so there is nothing to do: switch one on")


def _not_evaluated(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    """Options of evaluations of which there are none."""
    optimization, data = find(groups, OptimizationOptions), find(groups, DataOptions)
    if optimization is None or optimization.do_eval or find(groups, PlanOptions) is not None:
        return
    corpus, preference = find(groups, CorpusOptions), find(groups, PreferenceOptions)
    # a reference scores its pairs in such batches, --do_predict the test part
    read = (preference is not None and preference.preference is not None) or (corpus is not None and corpus.do_predict)
    if not read and changed(optimization, "per_device_eval_batch_size", given):
        warnings.append("--per_device_eval_batch_size has no effect without --do_eval")
    for name in ("eval_with_do_generation", "max_eval_samples"):
        if data is not None and changed(data, name, given):
            warnings.append(f"--{name} has no effect without --do_eval")


def _schedule(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    optimization = find(groups, OptimizationOptions)
    if optimization is None:
        return
    schedule = optimization.lr_scheduler_type
    if optimization.max_steps > 0 and changed(optimization, "num_train_epochs", given):
        warnings.append(f"--num_train_epochs has no effect with --max_steps {optimization.max_steps}")
    if optimization.warmup_steps > 0 and changed(optimization, "warmup_ratio", given):
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
        if changed(optimization, name, given):
            instead = " (constant_with_warmup has a warm-up)" if name.startswith("warmup") else ""
            warnings.append(f"--{name} has no effect with --lr_scheduler_type {schedule}{instead}")
    adam = ("adamw", "adamw_8bit", "muon")
    settings = {
        "muon_momentum": ("muon",),
        "lion_beta1": ("lion",),
        "lion_beta2": ("lion",),
        "sgd_momentum": ("sgd",),
        "adam_beta1": adam,
        "adam_beta2": adam,
        "adam_epsilon": adam,
    }
    for name, having in settings.items():
        if optimization.optim not in having and changed(optimization, name, given):
            warnings.append(f"--{name} has no effect with --optim {optimization.optim}")


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
    if checkpoint is not None and checkpoint.evaluation_strategy == "no" and changed(logging, "sample_prompts", given):
        warnings.append("--sample_prompts has no effect with --evaluation_strategy no: it is done when evaluating")
    if not {"wandb", "trackio"} & set(logging.report_to) and changed(logging, "project", given):
        warnings.append(f"--project has no effect with --report_to {','.join(logging.report_to)}")
    if not {"tensorboard", "auto"} & set(logging.report_to) and changed(logging, "logging_dir", given):
        warnings.append(f"--logging_dir has no effect with --report_to {','.join(logging.report_to)}")
    if logging.report_to == ["none"] and changed(logging, "run_name", given):
        warnings.append("--run_name has no effect with --report_to none")


def _precision(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    model, precision = find(groups, ModelOptions), find(groups, PrecisionOptions)
    if precision is not None and precision.fp8_products and find(groups, PlanOptions) is not None:
        warnings.append("--fp8 has no effect on a plan, which counts memory and time of bf16")
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


def _sampling(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    generation = find(groups, GenerationOptions)
    if generation is None or generation.do_sample:
        return
    if generation.temperature == 0.0:
        why = "with --temperature 0"
    elif "do_sample" in given:
        why = "with --do_sample no"
    else:
        why = "where nothing is drawn: add --do_sample, --temperature, --top_k, --top_p or --min_p"
    meant = {
        "temperature": generation.temperature == 0.0,
        "top_k": generation.top_k == 1,
    }  # these say greedy themselves
    for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
        if changed(generation, name, given) and not meant.get(name):
            warnings.append(f"--{name} has no effect {why}")


def _row_lengths(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    data, evaluation = find(groups, DataOptions), find(groups, EvaluateOptions)
    if data is None or data.max_seq_length is None or (evaluation is not None and evaluation.tasks):
        return
    if data.lengths.row < data.max_seq_length and "max_seq_length" in given:
        warnings.append(
            f"--max_seq_length {data.max_seq_length} has no effect above --src_length {data.src_length} + "
            f"--tgt_length {data.tgt_length}: leave one of these out, which takes the rest then"
        )


def _padding(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    data = find(groups, DataOptions)
    if data is None or find(groups, OptimizationOptions) is None:
        return
    if data.packing and changed(data, "group_by_length", given):
        warnings.append("--group_by_length has no effect without --packing no: packed rows have no padding to save")


def _data_loading(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    data = find(groups, DataOptions) or find(groups, CorpusOptions)
    if data is None or find(groups, PlanOptions) is not None:  # a plan takes the command line that it plans
        return
    if changed(data, "dataloader_num_workers", given):
        warnings.append("--dataloader_num_workers has no effect: batches are made in the main process")
    if isinstance(data, CorpusOptions) and changed(data, "share_folder", given):
        warnings.append("--share_folder has no effect: a lock in the cache serves shared and separate file systems")


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
        if changed(data, name, given):
            warnings.append(f"--{name} has no effect in evaluate, which reads the held-out rows only")
    evaluation = find(groups, EvaluateOptions)
    if evaluation is None or not evaluation.tasks:
        return
    for source in ("dataset_path", "data_name", "task_name"):
        if getattr(data, source) is not None:
            raise ConfigError(f"--tasks and --{source} both name what is scored: drop one of them")
    rows_only = (
        "src_length",
        "tgt_length",
        "max_seq_length",
        "val_size",
        "max_eval_samples",
        "eval_with_do_generation",
    )
    for group, names in ((data, (*rows_only, "data_format", "train_on")), (evaluation, ("max_new_tokens",))):
        for name in names:
            if changed(group, name, given):
                instead = ": --limit is that of tasks" if name == "max_eval_samples" else ", whose files say it"
                warnings.append(f"--{name} has no effect with --tasks{instead}")


def _one_adapter(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    adapter = find(groups, AdapterPathOptions)
    if adapter is not None and find(groups, MergeOptions) is None:
        adapter.check_one()


def _quantize_scores(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    """`quantize` scores rows only where some are named."""
    rows, scoring = find(groups, RowOptions), find(groups, RowScoreOptions)
    if find(groups, QuantizeOptions) is None or rows is None or scoring is None:
        return
    if rows.dataset_path or rows.data_name or rows.task_name:
        return
    for group in (rows, scoring):
        for spec in specs_of(type(group)):
            if changed(group, spec.name, given):
                warnings.append(f"--{spec.name} has no effect without --dataset_path, whose rows are scored")


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
    if corpus.best_fit_packing and changed(corpus, "document_order", given):
        warnings.append("--document_order has no effect with --best_fit_packing: whole packs are shuffled")
    if not optimization.do_eval and changed(corpus, "eval_iters", given):
        warnings.append("--eval_iters has no effect without --do_eval")
    if not optimization.do_eval and not corpus.do_predict and changed(corpus, "test_iters", given):
        warnings.append("--test_iters has no effect without --do_eval or --do_predict")


_RULES: tuple[Callable[[Sequence[Any], frozenset[str], list[str]], None], ...] = (
    _evaluation,
    _schedule,
    _regularized,
    _watching,
    _precision,
    stored_adapter_rule,
    quantization_rule,
    preference_rule,
    prefix_rule,
    vocabulary_rule,
    _sampling,
    _row_lengths,
    _padding,
    _data_loading,
    _corpus,
    _scoring,
    _one_adapter,
    _quantize_scores,
    parallel_rule,
    bench_rule,
    chat_rule,
    model_rule,
)

"""Rules about methods of fine-tuning: adapters, few bits, prefixes, preferences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arriero.config.adapter import AdapterOptions, AdapterPathOptions
from arriero.config.checkpoint import CheckpointOptions
from arriero.config.data import DataOptions, dataset_parts
from arriero.config.optimization import OptimizationOptions
from arriero.config.parallel import ParallelOptions
from arriero.config.precision import PrecisionOptions
from arriero.config.preference import PreferenceOptions
from arriero.config.quantization import QuantizationOptions
from arriero.config.rules.groups import changed, find
from arriero.config.vocabulary import VocabularyOptions
from arriero.errors import ConfigError


def stored_adapter_rule(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    adapter = find(groups, AdapterOptions)
    if adapter is None or adapter.lora_path is None:
        return
    from arriero.config.adapter_base import FILE  # PyYAML, only where a file is read
    from arriero.config.files import read_config

    path = Path(adapter.lora_path).expanduser() / FILE
    stored = read_config(path) if path.is_file() else {}
    keys = {
        "lora_rank": "r",
        "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout",
        "lora_target_modules": "target_modules",
        "lora_bias": "bias",
        "lora_rslora": "use_rslora",
        "lora_dora": "use_dora",
        "lora_init": "init_lora_weights",
        "pissa": "",
    }
    for name, key in keys.items():
        wanted, found = getattr(adapter, name), stored.get(key)
        if name == "lora_target_modules" and isinstance(found, list):  # the order means nothing
            wanted, found = set(wanted), set(map(str, found))
        if wanted != found and changed(adapter, name, given):  # equal in the run's own config.yaml
            warnings.append(f"--{name} has no effect with --lora_path: the stored adapter's own is kept")


def quantization_rule(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    adapter, quantization = find(groups, AdapterOptions), find(groups, QuantizationOptions)
    if adapter is None or quantization is None:
        return
    if quantization.quantize_base is not None and not (adapter.lora or adapter.prefix_tuning):
        raise ConfigError(
            f"--quantize_base {quantization.quantize_base} (--qlora) is for a base model that is not trained: add --lora or "
            "--prefix_tuning"
        )
    precision = find(groups, PrecisionOptions)
    if precision is not None and precision.fp8_products:
        asked = "--qat" if quantization.qat else f"--quantize_base {quantization.quantize_base}"
        if quantization.qat or quantization.quantize_base is not None:
            raise ConfigError(f"{asked} and --fp8 do not go together: each rounds the weights in its own way; drop one")
    if not quantization.qat:
        return
    if quantization.qat_type == "W4" and changed(quantization, "qat_activation", given):
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


def vocabulary_rule(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    """New tokens need rows that are trained, which an adapter or a prefix leaves as they are and does not store."""
    vocabulary, adapter = find(groups, VocabularyOptions), find(groups, AdapterOptions)
    if vocabulary is None or adapter is None or not vocabulary.changes or not (adapter.lora or adapter.prefix_tuning):
        return
    asked = [name for name in vars(vocabulary) if getattr(vocabulary, name)]
    method = "lora" if adapter.lora else "prefix_tuning"
    raise ConfigError(
        f"--{asked[0]} and --{method} do not go together: an adapter does not hold the new rows; give the model its tokens in "
        f"a run without --{method} first (all weights, or the others held by --freeze 'model.layers.*'), and adapt its result"
    )


def prefix_rule(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
    adapter, parallel = find(groups, AdapterPathOptions), find(groups, ParallelOptions)
    if adapter is None or parallel is None:
        return
    tuned = isinstance(adapter, AdapterOptions) and adapter.prefix_tuning
    name = "prefix_path" if adapter.prefix_path else "prefix_tuning" if tuned else None
    if name is None:
        return
    if adapter.prefix_path:
        for stored in ("num_prefix_tokens", "prefix_projection", "prefix_projection_hidden_size"):
            if isinstance(adapter, AdapterOptions) and changed(adapter, stored, given):
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


def preference_rule(groups: Sequence[Any], given: frozenset[str], warnings: list[str]) -> None:
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
    warnings += [f"--{option} has no effect with {name}" for option in idle if changed(preference, option, given)]
    for option in ("data_format", "train_on"):
        if changed(data, option, given):
            warnings.append(f"--{option} has no effect with {name}: rows are pairs, of which the last answers count")

"""A fine-tuning run from its options: data, model, trainer, final model."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arriero.adapters.lora import LoRAConfig, apply_lora, load_adapter_state, merge_lora
from arriero.adapters.peft_config import from_peft
from arriero.config.adapter import AdapterOptions
from arriero.config.checkpoint import CheckpointOptions
from arriero.config.data import DataOptions
from arriero.config.files import write_config
from arriero.config.logging import LoggingOptions
from arriero.config.model import ModelOptions
from arriero.config.optimization import OptimizationOptions
from arriero.config.parallel import ParallelOptions
from arriero.config.precision import PrecisionOptions
from arriero.config.quantization import QuantizationOptions
from arriero.data.order import StepOrder, prefix_clusters
from arriero.data.sft import Example, encode_all
from arriero.data.sources import load_samples
from arriero.engine.loading import LoadedModel, load
from arriero.errors import ConfigError, FormatError, TrainingError
from arriero.formats import hf, peft
from arriero.parallel.activation_checkpointing import apply_activation_checkpointing
from arriero.training.callbacks.checkpointing import Checkpointing
from arriero.training.callbacks.evaluation import Evaluation
from arriero.training.callbacks.progress import Averages, Console, duration
from arriero.training.callbacks.records import JsonLines, LossPlot, TensorBoard, has_tensorboard
from arriero.training.checkpoint import WeightStore, list_checkpoints, verify
from arriero.training.evaluation import evaluate_loss
from arriero.training.generation_metrics import evaluate_generation
from arriero.training.optimizer import Optimizer
from arriero.training.precision import Precision
from arriero.training.schedule import Schedule
from arriero.training.trainer import Callback, Trainer
from arriero.training.weights import AdapterWeights, FullWeights


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """The option groups of a fine-tuning run."""

    model: ModelOptions
    data: DataOptions
    optimization: OptimizationOptions
    precision: PrecisionOptions
    adapter: AdapterOptions
    quantization: QuantizationOptions
    parallel: ParallelOptions
    checkpoint: CheckpointOptions
    logging: LoggingOptions

    @property
    def groups(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())


def check_supported(options: FinetuneOptions) -> None:
    """Refuse what this version cannot do, before anything is loaded.

    Raises:
        ConfigError: one line, naming the option and the way out.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("finetune runs in one process in this version: start it without torchrun or launch")
    parallel = options.parallel
    for name in ("tensor_parallel_degree", "pipeline_parallel_degree"):
        if getattr(parallel, name) > 1:
            raise ConfigError(
                f"--{name} {getattr(parallel, name)} needs several processes, which this version does not train on: drop it"
            )
    if options.adapter.prefix_tuning:
        raise ConfigError("--prefix_tuning is not in this version yet: --lora trains a small adapter too")
    if options.quantization.qat:
        raise ConfigError("--qat is not in this version yet: fine-tune without it")
    if not (options.data.dataset_path or options.data.data_name):
        task = options.data.task_name or "squad"
        raise ConfigError(
            f"no data: give --dataset_path (a folder with train.json and dev.json), e.g. SQuAD v1.1 with --task_name {task}"
        )


def prepare_run_folder(options: CheckpointOptions) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint to go on from if any.

    Raises:
        ConfigError: if the folder holds something and neither overwriting nor resuming was asked for.
    """
    folder = Path(options.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output_dir {folder} is a file: name a folder")
    resume = None
    if options.resume_from_checkpoint == "auto":
        resume = newest_checkpoint(folder)
    elif options.resume_from_checkpoint:
        resume = Path(options.resume_from_checkpoint)
        if not resume.is_dir():
            raise ConfigError(f"--resume_from_checkpoint {resume}: no such folder")
    used = folder.is_dir() and any(folder.iterdir())
    if used and not (resume or options.overwrite_output_dir or options.resume_from_checkpoint == "auto"):
        raise ConfigError(
            f"--output_dir {folder} is not empty: --overwrite_output_dir starts afresh, --resume_from_checkpoint auto goes on"
        )
    if used and options.overwrite_output_dir:
        for checkpoint in [*list_checkpoints(folder), *folder.glob(".checkpoint-*.partial")]:
            shutil.rmtree(checkpoint)
        (folder / "train_log.jsonl").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder, resume


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones are named and passed over."""
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            verify(checkpoint)
        except FormatError as error:
            print(f"warning: {error}")
            continue
        return checkpoint
    return None


def set_seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_precision(options: PrecisionOptions, device: torch.device) -> Precision:
    return Precision(getattr(torch, options.compute_dtype), options.fp16_opt_level, device, options.scale_loss)


def build_weights(loaded: LoadedModel, options: FinetuneOptions) -> WeightStore:
    """Make the model trainable as asked, and say how its trained weights are stored."""
    adapter = options.adapter
    if not adapter.lora:
        return FullWeights(loaded.model, loaded.folder, options.checkpoint.max_shard_size)
    state = None
    if adapter.lora_path:
        stored, state = peft.load_adapter(Path(adapter.lora_path))
        config = from_peft(stored)
    else:
        config = LoRAConfig(
            rank=adapter.lora_rank,
            alpha=adapter.lora_alpha or 2.0 * adapter.lora_rank,
            dropout=adapter.lora_dropout,
            target_modules=tuple(adapter.lora_target_modules),
            bias=adapter.lora_bias,  # type: ignore[arg-type]
        )
    names = apply_lora(loaded.model, config)
    if state is not None:
        load_adapter_state(loaded.model, state)
    trained = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    total = loaded.model.config.num_parameters()
    print(
        f"LoRA: rank {config.rank} on {len(names)} layers, {trained:,} trained parameters ({trained / total:.2%} of {total:,})"
    )
    return AdapterWeights(loaded.model, config, options.model.model_name_or_path)


def build_trainer(
    loaded: LoadedModel,
    weights: WeightStore,
    train: Sequence[Example],
    options: FinetuneOptions,
    folder: Path,
    callbacks: list[Callback],
) -> Trainer:
    """The trainer of a run."""
    optim = options.optimization
    # RoPE that depends on a row's length gives its beginning other angles than a longer row's
    share = options.data.share_prefixes and not loaded.model.model.rotary.is_dynamic
    micro_batch = optim.per_device_train_batch_size
    clusters = prefix_clusters(train, micro_batch) if share else None
    order = StepOrder(len(train), micro_batch, optim.gradient_accumulation_steps, optim.seed, clusters=clusters)
    total = optim.max_steps if optim.max_steps > 0 else math.ceil(optim.num_train_epochs * order.steps_per_epoch)
    warmup = optim.warmup_steps or math.ceil(optim.warmup_ratio * total)
    schedule = Schedule(
        optim.lr_scheduler_type, optim.learning_rate, optim.min_learning_rate, warmup, optim.decay_steps or total
    )
    if options.precision.recompute:
        apply_activation_checkpointing(loaded.model.model.layers, options.precision.recompute_granularity)
    optimizer = Optimizer(
        loaded.model,
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_epsilon,
        weight_decay=optim.weight_decay,
    )
    return Trainer(
        model=loaded.model,
        examples=train,
        order=order,
        optimizer=optimizer,
        schedule=schedule,
        precision=build_precision(options.precision, loaded.device),
        weights=weights,
        total_steps=total,
        run_folder=folder,
        device=loaded.device,
        max_grad_norm=optim.max_grad_norm,
        label_smoothing=optim.label_smoothing,
        share_prefixes=share,
        callbacks=callbacks,
    )


def build_callbacks(
    options: FinetuneOptions, folder: Path, evaluate: partial[dict[str, float]] | None
) -> list[Callback]:
    """Averages first (it makes the records), then who reads them; evaluation before the checkpoint that may be the best."""
    checkpoint, logging = options.checkpoint, options.logging
    callbacks: list[Callback] = [
        Averages(logging.logging_steps),
        Console(progress_bar=not logging.disable_tqdm),
        JsonLines(),
    ]
    if "tensorboard" in logging.report_to or ("auto" in logging.report_to and has_tensorboard()):
        callbacks.append(TensorBoard(Path(logging.logging_dir or folder / "runs") / (logging.run_name or "")))
    if evaluate is not None:
        callbacks.append(
            Evaluation(evaluate, checkpoint.evaluation_strategy or "no", checkpoint.eval_steps or checkpoint.save_steps)
        )
    callbacks.append(
        Checkpointing(
            checkpoint.save_strategy,
            checkpoint.save_steps,
            keep=checkpoint.save_total_limit,
            metric=checkpoint.metric_for_best_model if checkpoint.load_best_model_at_end else None,
            greater_is_better=bool(checkpoint.greater_is_better),
            load_best=checkpoint.load_best_model_at_end,
        )
    )
    return [*callbacks, LossPlot()]


def finetune(options: FinetuneOptions) -> dict[str, Any]:
    """Train, evaluate and write the final model into the run folder.

    Returns:
        What is written to `all_results.json`.
    """
    check_supported(options)
    optim, data = options.optimization, options.data
    folder, resume = prepare_run_folder(options.checkpoint)
    wanted = [split for split, do in (("train", optim.do_train), ("dev", optim.do_eval)) if do]
    samples = load_samples(data.dataset_path, data.data_name, data.task_name, wanted)
    limits = {"train": data.max_train_samples, "dev": data.max_eval_samples}
    samples = {split: rows[: limits[split]] for split, rows in samples.items()}
    loaded = load(options.model, dtype=options.precision.weight_dtype)
    set_seed(optim.seed)
    examples = {}
    src_length = data.sequence_length - data.tgt_length
    for split, rows in samples.items():
        examples[split], report = encode_all(rows, loaded.tokenizer, min(data.src_length, src_length), data.tgt_length)
        print(f"{split}: {report}")
    weights = build_weights(loaded, options)
    write_config(folder / "config.yaml", options.groups)
    precision = build_precision(options.precision, loaded.device)
    evaluate = None
    if "dev" in examples:
        if data.eval_with_do_generation:
            evaluate = partial(evaluate_generation, loaded, samples["dev"], data, optim.per_device_eval_batch_size)
        else:
            evaluate = partial(
                evaluate_loss, loaded.model, examples["dev"], precision, optim.per_device_eval_batch_size
            )
    results: dict[str, Any] = {}
    if optim.do_train:
        trainer = build_trainer(
            loaded, weights, examples["train"], options, folder, build_callbacks(options, folder, evaluate)
        )
        if resume:
            trainer.resume(resume)
            print(f"resumed from {resume} at step {trainer.state.step}")
        print(
            f"{trainer.total_steps} steps of {optim.per_device_train_batch_size} x {optim.gradient_accumulation_steps} rows, "
            f"{trainer.precision}, {loaded.device}, {torch.get_num_threads()} threads"
        )
        state = trainer.train()
        results |= {
            "train_steps": state.step,
            "train_seconds": state.seconds,
            "train_tokens": state.tokens,
            "train_tokens_per_second": state.tokens / max(state.seconds, 1e-9),
        }
        print(f"trained {state.step} steps in {duration(state.seconds)}, {state.tokens:,} tokens")
    if evaluate is not None:
        # the weights are those of the last evaluation, unless it was earlier or the best ones were loaded since
        known = (
            optim.do_train
            and trainer.metrics_step == trainer.state.step
            and not options.checkpoint.load_best_model_at_end
        )
        results |= trainer.metrics if known else {f"eval_{key}": value for key, value in evaluate().items()}
    save_final(loaded, weights, options, folder, results)
    return results


def save_final(
    loaded: LoadedModel, weights: WeightStore, options: FinetuneOptions, folder: Path, results: dict[str, Any]
) -> None:
    """The final weights, and with --merge_weights the merged model in `merged/`."""
    if options.optimization.do_train:
        try:
            weights.save(folder)
        except OSError as error:
            raise TrainingError(
                f"{folder}: the final model could not be written ({error.strerror}); the checkpoints are intact"
            ) from error
        if isinstance(weights, AdapterWeights):
            loaded.tokenizer.save(folder)
        if options.adapter.lora and options.adapter.merge_weights:
            merge_lora(loaded.model)
            hf.save_model(loaded.model, loaded.model.config, folder / "merged", extra_files_from=loaded.folder)
            print(f"merged model: {folder / 'merged'}")
    (folder / "all_results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{'adapter' if options.adapter.lora else 'model'} and log: {folder}")

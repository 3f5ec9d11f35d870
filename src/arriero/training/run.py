"""What every training run is built of, whatever it trains on: precision, trainer, callbacks, the end."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arriero.config.checkpoint import CheckpointOptions
from arriero.config.files import effective, write_config
from arriero.config.logging import LoggingOptions
from arriero.config.model import ModelOptions
from arriero.config.optimization import OptimizationOptions
from arriero.config.parallel import ParallelOptions
from arriero.config.precision import PrecisionOptions
from arriero.data.steps import StepSource
from arriero.data.tokenizer import Tokenizer
from arriero.engine.generation import Generator
from arriero.errors import ConfigError, RunStopped, TrainingError
from arriero.models.attention import document_kernel
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.activation_checkpointing import apply_activation_checkpointing
from arriero.parallel.compilation import apply_compile
from arriero.training.callbacks.anomalies import Anomalies
from arriero.training.callbacks.checkpointing import Checkpointing
from arriero.training.callbacks.evaluation import Evaluation
from arriero.training.callbacks.profiling import Profiling
from arriero.training.callbacks.progress import Averages, Console, duration
from arriero.training.callbacks.records import JsonLines, LossPlot
from arriero.training.callbacks.stop_signals import StopSignals
from arriero.training.callbacks.text_samples import TextSamples, read_prompts
from arriero.training.callbacks.trackers import build_trackers
from arriero.training.checkpoint import WeightStore
from arriero.training.memory import freed_memory_kept
from arriero.training.optimizer import Optimizer
from arriero.training.precision import Precision
from arriero.training.run_folder import RunFolder
from arriero.training.schedule import Schedule
from arriero.training.trainer import Callback, Trainer

Evaluate = Callable[[], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The option groups that every training run has."""

    model: ModelOptions
    optimization: OptimizationOptions
    precision: PrecisionOptions
    parallel: ParallelOptions
    checkpoint: CheckpointOptions
    logging: LoggingOptions

    @property
    def groups(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())


def check_run(verb: str, options: RunOptions, metrics: Sequence[str]) -> None:
    """Refuse what this version cannot do, before anything is loaded.

    Args:
        metrics: what an evaluation of this run computes.

    Raises:
        ConfigError: one line, naming the option and the way out.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"{verb} runs in one process in this version: start it without torchrun or launch")
    for name in ("tensor_parallel_degree", "pipeline_parallel_degree"):
        degree = getattr(options.parallel, name)
        if degree > 1:
            raise ConfigError(
                f"--{name} {degree} needs several processes, which this version does not train on: drop it"
            )
    best = options.checkpoint.metric_for_best_model
    if options.checkpoint.load_best_model_at_end and best is not None and best.removeprefix("eval_") not in metrics:
        raise ConfigError(f"--metric_for_best_model {best} is not computed here: choose one of {', '.join(metrics)}")
    if options.logging.sample_prompts:
        read_prompts(options.logging.sample_prompts)


def set_seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_precision(options: PrecisionOptions, device: torch.device) -> Precision:
    return Precision(getattr(torch, options.compute_dtype), options.fp16_opt_level, device, options.scale_loss)


def build_trainer(
    options: RunOptions,
    model: LlamaForCausalLM,
    data: StepSource,
    weights: WeightStore,
    folder: Path,
    device: torch.device,
    callbacks: list[Callback],
    skip_steps: frozenset[int] = frozenset(),
) -> Trainer:
    """The trainer of a run."""
    optim = options.optimization
    steps = optim.max_steps if optim.max_steps > 0 else data.steps_in(optim.num_train_epochs)
    if steps < 1:
        raise ConfigError(f"--num_train_epochs {optim.num_train_epochs:g} of this data is not one step: give more")
    if options.precision.recompute:
        apply_activation_checkpointing(model.model.layers, options.precision.recompute_granularity)
    if options.precision.torch_compile:
        apply_compile(model.model.layers)
    return Trainer(
        model=model,
        data=data,
        optimizer=Optimizer.from_options(model, optim),
        schedule=Schedule.from_options(optim, steps),
        precision=build_precision(options.precision, device),
        weights=weights,
        total_steps=steps,
        run_folder=folder,
        device=device,
        max_grad_norm=optim.max_grad_norm,
        label_smoothing=optim.label_smoothing,
        skip_steps=skip_steps,
        callbacks=callbacks,
    )


def build_callbacks(
    options: RunOptions,
    folder: Path,
    evaluate: Evaluate | None,
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    signals: StopSignals,
) -> list[Callback]:
    """Averages make the records, so they come before who reads them; evaluation before the checkpoint that may be the best."""
    checkpoint, logging = options.checkpoint, options.logging
    profiled = logging.profile_range()
    callbacks: list[Callback] = [Profiling(*profiled, memory=logging.profile_memory)] if profiled else []
    callbacks += [
        Averages(logging.logging_steps),
        Console(progress_bar=not logging.disable_tqdm),
        Anomalies(logging.grad_norm_spike, stop=logging.stop_on_spike),
        JsonLines(),
        *build_trackers(logging, folder, effective(options.groups)),
    ]
    strategy, every = checkpoint.evaluation_strategy or "no", checkpoint.eval_steps or checkpoint.save_steps
    if evaluate is not None:
        callbacks.append(Evaluation(evaluate, strategy, every))
    if logging.sample_prompts:
        callbacks.append(
            TextSamples(
                Generator(model, tokenizer),
                tokenizer,
                read_prompts(logging.sample_prompts),
                strategy,
                every,
                max_new_tokens=logging.sample_tokens,
                temperature=logging.sample_temperature,
                seed=options.optimization.seed,
            )
        )
    callbacks += [
        signals,
        Checkpointing(
            checkpoint.save_strategy,
            checkpoint.save_steps,
            keep=checkpoint.save_total_limit,
            metric=checkpoint.metric_for_best_model if checkpoint.load_best_model_at_end else None,
            greater_is_better=bool(checkpoint.greater_is_better),
            load_best=checkpoint.load_best_model_at_end,
            asynchronous=checkpoint.async_save,
        ),
    ]
    return [*callbacks, LossPlot()]


def train(trainer: Trainer, options: RunOptions, folder: RunFolder, signals: StopSignals) -> dict[str, Any]:
    """Run the trainer to its end.

    Returns:
        What `all_results.json` says of the training.

    Raises:
        RunStopped: if a signal ended it early.
    """
    optim = options.optimization
    if folder.resume:
        trainer.resume(folder.resume)
        print(f"resumed from {folder.resume} at step {trainer.state.step}")
        if folder.resume.parent.resolve() == folder.path.resolve():
            folder.drop_later(trainer.state.step)
    folder.clear()
    write_config(folder.path / "config.yaml", options.groups)
    kernel = document_kernel(trainer.device, trainer.precision.dtype, trainer.model.config.head_dim)
    if not options.model.use_flash_attention:
        kernel = "written out"
    print(f"kernels: attention {kernel}; RMSNorm {'torch' if options.model.use_fused_rms_norm else 'written out'}")
    print(
        f"{trainer.total_steps} steps of {optim.per_device_train_batch_size} x {optim.gradient_accumulation_steps} rows, "
        f"{trainer.precision}, {trainer.device}, {torch.get_num_threads()} threads"
    )
    on_cpu = trainer.device.type == "cpu"
    with freed_memory_kept() if on_cpu and not options.precision.recompute else contextlib.nullcontext():
        state = trainer.train()
    if signals.received and state.step < trainer.total_steps:
        raise RunStopped(
            f"{signals.received.name}: stopped after step {state.step} of {trainer.total_steps}, which is saved; "
            "--resume_from_checkpoint auto goes on",
            signals.exit_code,
        )
    print(f"trained {state.step} steps in {duration(state.seconds)}, {state.tokens:,} tokens")
    return {
        "train_steps": state.step,
        "train_seconds": state.seconds,
        "train_tokens": state.tokens,
        "train_tokens_per_second": state.tokens / max(state.seconds, 1e-9),
    }


def final_metrics(trainer: Trainer | None, options: RunOptions, evaluate: Evaluate | None) -> dict[str, float]:
    """The scores of the final weights; those of the last evaluation if they are of the same weights."""
    if evaluate is None:
        return {}
    if (
        trainer is not None
        and trainer.metrics_step == trainer.state.step
        and not options.checkpoint.load_best_model_at_end
    ):
        return trainer.metrics
    return {f"eval_{key}": value for key, value in evaluate().items()}


def save_weights(weights: WeightStore, folder: Path) -> None:
    """The final weights into the run folder.

    Raises:
        TrainingError: if they cannot be written.
    """
    try:
        weights.write(folder, weights.tensors())
    except OSError as error:
        raise TrainingError(
            f"{folder}: the final model could not be written ({error.strerror}); the checkpoints are intact"
        ) from error


def write_results(folder: Path, results: dict[str, Any], *, trained: bool) -> None:
    """Into `all_results.json`, or `eval_results.json` if the run only scored."""
    path = folder / f"{'all' if trained else 'eval'}_results.json"
    try:
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written ({error.strerror}); the final model is intact") from error

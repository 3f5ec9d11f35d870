"""What every training run is built of, whatever it trains on: precision, trainer, callbacks."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_type_hints

import numpy as np
import torch

from arriero.config.adapter import AdapterOptions
from arriero.config.checkpoint import CheckpointOptions
from arriero.config.files import effective, write_config
from arriero.config.logging import LoggingOptions
from arriero.config.model import ModelOptions
from arriero.config.optimization import OptimizationOptions
from arriero.config.parallel import ParallelOptions
from arriero.config.precision import PrecisionOptions
from arriero.config.pretraining import PretrainModelOptions
from arriero.config.rules.groups import find
from arriero.data.steps import StepSource
from arriero.data.tokenizer import Tokenizer
from arriero.early_signals import EarlySignals
from arriero.engine.loading import LoadedModel, pick_device
from arriero.errors import ConfigError, RunStopped
from arriero.formats.download import model_config
from arriero.models.attention import document_kernel
from arriero.models.fp8_linear import check_device
from arriero.models.llama import LlamaForCausalLM
from arriero.models.presets import match_preset
from arriero.models.products import fast_products
from arriero.parallel.eight_bits import describe_fp8
from arriero.parallel.launching.resuming import accumulate_for_absent_machines
from arriero.parallel.materialize import Values, materialize
from arriero.parallel.parallelize import check_layout, parallelize
from arriero.parallel.processes import Processes, launched_size, start, stop
from arriero.training.agreement import check_same, check_same_weights
from arriero.training.callbacks.anomalies import Anomalies
from arriero.training.callbacks.checkpointing import Checkpointing
from arriero.training.callbacks.early_stopping import EarlyStopping
from arriero.training.callbacks.evaluation import Evaluation
from arriero.training.callbacks.neftune import Neftune
from arriero.training.callbacks.profiling import Profiling
from arriero.training.callbacks.progress import Averages, Console, counted, duration
from arriero.training.callbacks.records import JsonLines, LossPlot
from arriero.training.callbacks.stop_signals import StopSignals
from arriero.training.callbacks.text_samples import TextSamples, read_prompts
from arriero.training.callbacks.trackers import build_trackers
from arriero.training.checkpoint import WeightStore
from arriero.training.memory import freed_memory_kept
from arriero.training.objectives.cross_entropy import CrossEntropy
from arriero.training.objectives.objective import Objective
from arriero.training.optimizer import Optimizer
from arriero.training.precision import Precision
from arriero.training.run_facts import facts_of
from arriero.training.run_folder import RunFolder
from arriero.training.schedule import Schedule
from arriero.training.trainer import Callback, Trainer

Evaluate = Callable[[], dict[str, float]]
OWN = frozenset({"device"})  # options in which processes may differ


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

    @classmethod
    def of(cls, groups: Sequence[Any]) -> Self:
        """From option groups in any order: each goes where its type belongs."""
        kinds = get_type_hints(cls)
        return cls(**{name: next(group for group in groups if isinstance(group, kinds[name])) for name in kinds})


def check_run(options: RunOptions, metrics: Sequence[str]) -> None:
    """Refuse what this version cannot do, before anything is loaded.

    Args:
        metrics: what an evaluation of this run computes.

    Raises:
        ConfigError: one line, naming the option and the way out.
    """
    _check_degrees(options)
    accumulate_for_absent_machines(options.optimization)
    best = options.checkpoint.metric_for_best_model
    judged = options.checkpoint.load_best_model_at_end or options.checkpoint.early_stopping_patience is not None
    if judged and best is not None and best.removeprefix("eval_") not in metrics:
        raise ConfigError(f"--metric_for_best_model {best} is not computed here: choose one of {', '.join(metrics)}")
    if options.logging.sample_prompts:
        read_prompts(options.logging.sample_prompts)
    if options.precision.fp8_products:
        check_device(pick_device(options.model.device))


def _check_degrees(options: RunOptions) -> None:
    """Refuse a layout that the processes or the model do not have: that of a folder or a named one, before data is read."""
    layout = options.parallel.layout(launched_size())
    given = options.model
    config = given.config_name if isinstance(given, PretrainModelOptions) and not given.continue_training else None
    name = config or given.model_name_or_path
    if layout.size > 1 and (Path(name).expanduser().is_dir() or match_preset(name)):
        check_layout(model_config(name), layout)


@contextlib.contextmanager
def heard_once(processes: Processes) -> Iterator[None]:
    """A block in which only the first of several processes writes to standard output."""
    with contextlib.ExitStack() as stack:
        if not processes.first:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield


@contextlib.contextmanager
def joined(options: RunOptions) -> Iterator[Processes]:
    """The processes of the run, from first to last word; all but the first are silent on standard output.

    Raises:
        ConfigError: if they cannot be reached, or were started with other options.
        RunStopped: if a signal came before the first step; the processes part without a word then.
    """
    with EarlySignals(), _joined(options) as processes:
        yield processes


@contextlib.contextmanager
def _joined(options: RunOptions) -> Iterator[Processes]:
    processes = start(options.parallel.layout(launched_size()), pick_device(options.model.device))
    with heard_once(processes):
        values = {name: str(value) for name, value in effective(options.groups).items() if name not in OWN}
        check_same(
            processes,
            values,
            lambda rank, name, own, first: (
                f"rank {rank} was started with --{name} {own} and rank 0 with {first}: give all processes the same options"
            ),
        )
        try:
            yield processes
        except RunStopped:  # in order, in all of them
            stop(processes)
            raise
        stop(processes)


def same_weights(loaded: LoadedModel, options: RunOptions, processes: Processes) -> None:
    """Refuse processes that read other files of the model, or of the adapter that is trained on.

    Raises:
        ConfigError, PeerError, FormatError: as `check_same_weights`.
    """
    adapter, given = find(options.groups, AdapterOptions), options.model
    fresh = isinstance(given, PretrainModelOptions) and not given.continue_training
    check_same_weights(
        processes, None if fresh else loaded.folder, (adapter.lora_path or adapter.prefix_path) if adapter else None
    )


def share_out(
    loaded: LoadedModel, options: RunOptions, processes: Processes, values: Values | None, tokens: int
) -> None:
    """Give each process its share of the model, with recomputation and compilation as asked for.

    Args:
        values: where the weights come from; None in a lone process, whose model has them.
        tokens: of a row.
    """
    precision = options.precision
    parallelize(
        loaded.model,
        processes,
        loaded.device,
        tokens=tokens,
        fp8=precision.fp8_products,
        recompute=precision.recompute_granularity if precision.recompute else None,
        compile_layers=precision.torch_compile,
        reduce_dtype=getattr(torch, options.parallel.gradient_reduce_dtype),
    )
    if values is not None:
        with processes.together():
            materialize(loaded.model, loaded.device, values)
        print(f"{processes.layout}: {processes.size} processes")
    if precision.fp8_products:
        print(describe_fp8(loaded.model))


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
    processes: Processes,
    skip_steps: frozenset[int] = frozenset(),
    objective: Objective | None = None,
    base: Path | None = None,
    quantize_base: str | None = None,
) -> Trainer:
    """The trainer of a run.

    Args:
        objective: by default cross-entropy with `--label_smoothing`.
        base, quantize_base: of `facts_of`.
    """
    optim = options.optimization
    steps = optim.max_steps if optim.max_steps > 0 else data.steps_in(optim.num_train_epochs)
    if steps < 1:
        raise ConfigError(f"--num_train_epochs {optim.num_train_epochs:g} of this data is not one step: give more")
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
        objective=objective or CrossEntropy(optim.label_smoothing),
        processes=processes,
        seed=optim.seed,
        skip_steps=skip_steps,
        facts=facts_of(optim.optim, base, quantize_base),
        accumulation=optim.gradient_accumulation_steps,
        callbacks=callbacks,
    )


def build_callbacks(
    options: RunOptions,
    folder: Path,
    evaluate: Evaluate | None,
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    signals: StopSignals,
    processes: Processes,
) -> list[Callback]:
    """Averages make the records, so they come before who reads them; evaluation before the checkpoint that may be the best.

    What computes runs in every process, what only records in the first.
    """
    checkpoint, logging = options.checkpoint, options.logging
    profiled = logging.profile_range()
    callbacks: list[Callback] = [Profiling(*profiled, memory=logging.profile_memory)] if profiled else []
    if options.optimization.neftune_noise_alpha > 0:
        callbacks.append(Neftune(options.optimization.neftune_noise_alpha, options.optimization.seed))
    if processes.first:
        callbacks += [Averages(logging.logging_steps), Console(progress_bar=not logging.disable_tqdm)]
    callbacks.append(Anomalies(logging.grad_norm_spike, stop=logging.stop_on_spike))
    if processes.first:
        callbacks += [JsonLines(), *build_trackers(logging, folder, effective(options.groups))]
    strategy, every = checkpoint.evaluation_strategy or "no", checkpoint.eval_steps or checkpoint.save_steps
    if evaluate is not None:
        callbacks.append(Evaluation(evaluate, strategy, every))
        if checkpoint.early_stopping_patience is not None:
            callbacks.append(
                EarlyStopping(
                    checkpoint.early_stopping_patience,
                    checkpoint.metric_for_best_model or "loss",
                    threshold=checkpoint.early_stopping_threshold,
                    greater_is_better=bool(checkpoint.greater_is_better),
                    save=checkpoint.save_strategy != "no",
                )
            )
    if logging.sample_prompts:
        callbacks.append(
            TextSamples(
                model,
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
    return [*callbacks, LossPlot()] if processes.first else callbacks


def train(trainer: Trainer, options: RunOptions, folder: RunFolder, signals: StopSignals) -> dict[str, Any]:
    """Run the trainer to its end.

    Returns:
        What `all_results.json` says of the training.

    Raises:
        RunStopped: if a signal ended it early.
    """
    if folder.resume:
        planned = trainer.resume(folder.resume)
        print(f"resumed from {folder.resume} at step {trainer.state.step}")
        if planned != trainer.total_steps and not trainer.schedule.kind.startswith("constant"):
            print(
                f"it was to end at step {planned} and ends at {trainer.total_steps} now; the learning rate follows that"
            )
        if folder.resume.parent.resolve() == folder.path.resolve():
            folder.drop_later(trainer.state.step)
    folder.clear()
    with trainer.processes.together():
        if trainer.processes.first:
            write_config(folder.path / "config.yaml", options.groups)
    begun_at = trainer.state.step
    if begun_at == trainer.total_steps:
        print(f"{folder.resume} is complete already: {begun_at} of {counted(trainer.total_steps, 'step')}")
    else:
        _tell_plan(trainer, options)
    on_cpu = trainer.device.type == "cpu"
    kept = freed_memory_kept() if on_cpu and not options.precision.recompute else contextlib.nullcontext()
    with kept, fast_products():
        state = trainer.train()
    if signals.received and state.step < trainer.total_steps and not trainer.stopped_early:
        raise RunStopped(
            f"{signals.received.name}: stopped after step {state.step} of {trainer.total_steps}, which is saved; "
            "--resume_from_checkpoint auto goes on",
            signals.exit_code,
        )
    if state.step > begun_at:
        print(f"trained {counted(state.step, 'step')} in {duration(state.seconds)}, {counted(state.tokens, 'token')}")
    return {
        "train_steps": state.step,
        "train_seconds": state.seconds,
        "train_tokens": state.tokens,
        "train_tokens_per_second": state.tokens / max(state.seconds, 1e-9),
    }


def _tell_plan(trainer: Trainer, options: RunOptions) -> None:
    """What is about to run: kernels, steps, precision, device."""
    optim = options.optimization
    kernel = document_kernel(trainer.device, trainer.precision.dtype, trainer.model.config.head_dim)
    if not options.model.use_flash_attention:
        kernel = "written out"
    print(f"kernels: attention {kernel}; RMSNorm {'torch' if options.model.use_fused_rms_norm else 'written out'}")
    data = trainer.processes.layout.data
    rows = f"{optim.per_device_train_batch_size} x {optim.gradient_accumulation_steps}" + (
        f" x {data}" if data > 1 else ""
    )
    print(
        f"{counted(trainer.total_steps, 'step')} of {rows} rows, "
        f"learning rate {trainer.schedule.peak:g}, {trainer.precision}, {trainer.device}, "
        f"{counted(torch.get_num_threads(), 'thread')}"
    )

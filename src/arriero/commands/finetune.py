"""`arriero finetune`: teach a model a task, by all its weights or by LoRA."""

from __future__ import annotations

from arriero.config.adapter import AdapterOptions
from arriero.config.checkpoint import CheckpointOptions
from arriero.config.data import DataOptions
from arriero.config.logging import LoggingOptions
from arriero.config.model import ModelOptions
from arriero.config.optimization import OptimizationOptions
from arriero.config.parallel import ParallelOptions
from arriero.config.precision import PrecisionOptions
from arriero.config.quantization import QuantizationOptions

HELP = "Fine-tune a model on questions and answers, instructions or conversations: all weights, or LoRA with --lora."

OPTIONS: tuple[type, ...] = (
    ModelOptions,
    DataOptions,
    OptimizationOptions,
    PrecisionOptions,
    AdapterOptions,
    QuantizationOptions,
    ParallelOptions,
    CheckpointOptions,
    LoggingOptions,
)


def run(
    model: ModelOptions,
    data: DataOptions,
    optimization: OptimizationOptions,
    precision: PrecisionOptions,
    adapter: AdapterOptions,
    quantization: QuantizationOptions,
    parallel: ParallelOptions,
    checkpoint: CheckpointOptions,
    logging: LoggingOptions,
) -> int:
    """Fine-tune."""
    from arriero.training.finetune_options import FinetuneOptions
    from arriero.training.finetuning import finetune

    finetune(
        FinetuneOptions(
            model=model,
            data=data,
            optimization=optimization,
            precision=precision,
            adapter=adapter,
            quantization=quantization,
            parallel=parallel,
            checkpoint=checkpoint,
            logging=logging,
        )
    )
    return 0

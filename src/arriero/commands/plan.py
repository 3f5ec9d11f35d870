"""`arriero plan`: memory, time and layout of a run, before it."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.commands.unavailable import not_available
from arriero.config.model import ModelOptions
from arriero.config.option import OptionGroup, option
from arriero.config.parallel import ParallelOptions
from arriero.config.precision import PrecisionOptions

HELP = "Tell what a training run would need, and what fits into given memory."


@dataclass(kw_only=True)
class PlanOptions(OptionGroup):
    """Planning."""

    per_device_train_batch_size: int = option(1, "rows of one micro-batch on each device", minimum=1)
    gradient_accumulation_steps: int = option(1, "micro-batches of one optimizer step", minimum=1)
    max_seq_length: int = option(2048, "tokens of one row", minimum=1)
    num_tokens: float | None = option(None, "tokens of the whole run, for its time", above=0.0)
    memory: str | None = option(None, "memory of one device, e.g. 80GB (default: that of this machine)")
    flops: float | None = option(
        None, "floating-point operations a second of one device (default: measured)", above=0.0
    )


OPTIONS: tuple[type, ...] = (
    ModelOptions,
    PlanOptions,
    PrecisionOptions,
    ParallelOptions,
)


def run(
    model: ModelOptions,
    plan: PlanOptions,
    precision: PrecisionOptions,
    parallel: ParallelOptions,
) -> int:
    """Answer that this comes in a later version."""
    raise not_available("plan", "the log line of arriero finetune tells its memory and speed")

"""What fits into a device's memory, and what would make it fit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from arriero.config.adapter import LINEAR_LAYERS
from arriero.errors import ConfigError
from arriero.training.planning.memory import training_memory
from arriero.training.planning.setup import ModelFacts, TrainingSetup, model_facts

SEQUENCE_LIMIT = 1 << 24
BATCH_LIMIT = 1 << 20
_LORA_RANK = 8


@dataclass(frozen=True)
class Lever:
    """A change of options and the peak memory with it."""

    options: str
    peak: int


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that fits, 0 if not even 1 does; what fits must fit for all smaller ones too."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, high * 2
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def longest_sequence(facts: ModelFacts, setup: TrainingSetup, memory: int) -> int:
    """Tokens of a row at the setup's batch; at most `SEQUENCE_LIMIT`."""
    return largest(lambda size: training_memory(facts, replace(setup, sequence=size)).peak <= memory, SEQUENCE_LIMIT)


def largest_batch(facts: ModelFacts, setup: TrainingSetup, memory: int) -> int:
    """Rows, or pairs, of a micro-batch at the setup's sequence length; at most `BATCH_LIMIT`."""
    each = setup.rows_each
    return largest(lambda count: training_memory(facts, replace(setup, batch=each * count)).peak <= memory, BATCH_LIMIT)


def levers(facts: ModelFacts, setup: TrainingSetup) -> list[Lever]:
    """Single changes that need less memory, and all of them together, the least memory last."""
    changes: list[tuple[str, TrainingSetup]] = []
    everything = setup
    if setup.batch > setup.rows_each:
        changes.append(("--per_device_train_batch_size 1", replace(setup, batch=setup.rows_each)))
        everything = replace(everything, batch=setup.rows_each)
    if setup.recompute != "full":
        changes.append(("--recompute", replace(setup, recompute="full")))
        everything = replace(everything, recompute="full")
    if setup.weight_bytes > 2:
        changes.append(("--bf16 --fp16_opt_level O2", setup.with_precision("bfloat16", "bfloat16")))
        everything = everything.with_precision("bfloat16", "bfloat16")
    layout = setup.layout
    if layout.data > 1 and (layout.stage < 3 or layout.dp_replicate > 1):
        # a pipeline sends gradients once a step and keeps weights gathered: no stage is smaller than the first
        stage = 3 if layout.pp == 1 else 1
        if layout.stage < stage or layout.dp_replicate > 1:
            shared = replace(layout, stage=stage, dp_shard=layout.data, dp_replicate=1)
            changes.append((f"--sharding stage{stage}", replace(setup, layout=shared)))
            everything = replace(everything, layout=shared)
    if setup.optimizer in ("adamw", "muon") and not facts.method.frozen:
        changes.append(("--optim adamw_8bit", replace(setup, optimizer="adamw_8bit")))
        everything = replace(everything, optimizer="adamw_8bit")
    now = training_memory(facts, setup).peak
    found = [Lever(options, training_memory(facts, changed).peak) for options, changed in changes]
    if len(changes) > 1:
        together = " ".join(options for options, _ in changes)
        found.append(Lever(together, training_memory(facts, everything).peak))
    if not facts.method.frozen:
        adapted = model_facts(facts.config, lora_rank=_LORA_RANK, lora_targets=LINEAR_LAYERS)
        found.append(Lever(f"--lora --lora_rank {_LORA_RANK} (fine-tuning)", training_memory(adapted, setup).peak))
    elif facts.method.quantize_base is None:
        with contextlib.suppress(ConfigError):  # a model whose layers no block of nf4 divides
            held = model_facts(facts.config, **asdict(facts.method) | {"quantize_base": "nf4"})
            found.append(Lever("--quantize_base nf4", training_memory(held, setup).peak))
    return sorted((lever for lever in found if lever.peak < now), key=lambda lever: -lever.peak)

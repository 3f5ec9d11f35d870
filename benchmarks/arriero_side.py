"""Our side of a comparison: a fine-tuning run on token ids, in the order that is given, every step timed."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import torch

from arriero.adapters.lora import LoRAConfig, apply_lora
from arriero.data.order import StepOrder
from arriero.data.sft import Example
from arriero.data.steps import FinetuningSteps
from arriero.formats import hf
from arriero.models.config import LlamaConfig
from arriero.models.products import fast_products
from arriero.parallel.parallelize import parallelize
from arriero.parallel.processes import Processes
from arriero.quantization.choice import scheme_for
from arriero.training.memory import freed_memory_kept
from arriero.training.optimizer import Optimizer
from arriero.training.precision import Precision
from arriero.training.schedule import Schedule
from arriero.training.trainer import StepRecord, Trainer
from arriero.training.weights import FullWeights

Row = dict[str, list[int]]


def train(
    folder: Path,
    rows: list[Row],
    order: StepOrder,
    *,
    steps: int,
    learning_rate: float,
    adapter: LoRAConfig | None = None,
    quantize_base: str | None = None,
    recompute: bool = False,
    compile_layers: bool = False,
    share_prefixes: bool = True,
) -> list[StepRecord]:
    """So many steps of a model, in fp32 on the CPU, at a constant learning rate."""
    torch.manual_seed(0)
    scheme = None if quantize_base is None else scheme_for(quantize_base, LlamaConfig.from_file(folder))
    network = hf.load_model(folder, dtype=torch.float32, scheme=scheme)
    if adapter is not None:
        apply_lora(network, adapter)
    cpu = torch.device("cpu")
    parallelize(network, Processes(), cpu, recompute="full" if recompute else None, compile_layers=compile_layers)
    trainer = Trainer(
        model=network,
        data=FinetuningSteps(
            [Example(row["input_ids"], row["labels"]) for row in rows], order, share_prefixes=share_prefixes
        ),
        optimizer=Optimizer(network),
        schedule=Schedule("constant", learning_rate, 0.0, 0, steps),
        precision=Precision(torch.float32, "O1", cpu),
        weights=FullWeights(network, folder),
        total_steps=steps,
        run_folder=Path(tempfile.gettempdir()),
        device=cpu,
    )
    network.train()
    kept = contextlib.nullcontext() if recompute else freed_memory_kept()
    with kept, fast_products():  # as every training run on a CPU does
        return [trainer.step() for _ in range(steps)]

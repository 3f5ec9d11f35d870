"""Small training runs on any layout of processes, for the programs beside this file.

Options, data source, trainer and the sharing out of the model are the product's own; a run on several processes and one
in a lone process differ in nothing but the flags of `LAYOUTS`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from arriero.adapters.lora import LoRAConfig, apply_lora
from arriero.config.checkpoint import CheckpointOptions
from arriero.config.layout import Layout
from arriero.config.logging import LoggingOptions
from arriero.config.model import ModelOptions
from arriero.config.optimization import OptimizationOptions
from arriero.config.parallel import ParallelOptions
from arriero.config.precision import PrecisionOptions
from arriero.data.batch import Batch, packed_batches
from arriero.data.corpus.dataset import CorpusSample
from arriero.data.order import StepOrder
from arriero.data.sft import IGNORE, Example
from arriero.data.steps import DataShare, FinetuningSteps, PretrainingSteps, StepSource, corpus_batch
from arriero.engine.loading import LoadedModel
from arriero.formats.parts import Placement
from arriero.models.config import LlamaConfig
from arriero.models.initialization import drawn
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel import parallelize
from arriero.parallel.compilation import apply_compile
from arriero.parallel.processes import Processes, start
from arriero.training.evaluation import evaluate_loss
from arriero.training.run import RunOptions, build_trainer, share_out
from arriero.training.trainer import Callback, StepRecord, Trainer
from arriero.training.weights import AdapterWeights, FullWeights

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from forked import run_processes

CPU = torch.device("cpu")
STEPS, MICRO_BATCH, VOCABULARY = 5, 2, 99  # no degree above 1 and below 9 divides the vocabulary but 3
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}

_TP2, _PP2, _CP2 = ({f"{axis}_parallel_degree": 2} for axis in ("tensor", "pipeline", "context"))
# name: processes, flags
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "stage1": (2, {"sharding": ["stage1"]}),
    "stage2": (2, {"sharding": ["stage2"]}),
    "stage3": (2, {"sharding": ["stage3"]}),
    "stage3 offload": (2, {"sharding": ["stage3", "offload"]}),
    "tp2": (2, _TP2),
    "tp2 whole sequences": (2, _TP2 | {"sequence_parallel": False}),
    "pp2 1f1b": (2, _PP2),
    "pp2 interleaved": (2, _PP2 | {"virtual_pp_degree": 2}),
    "pp2 zero-bubble": (2, _PP2 | {"virtual_pp_degree": 2, "pipeline_schedule": "zero_bubble"}),
    "pp2 zbv": (2, _PP2 | {"pipeline_schedule": "zbv"}),
    "cp2": (2, _CP2),
    "hsdp 2x2": (4, {"sharding": ["stage2"], "sharding_parallel_degree": 2, "data_parallel_degree": 2}),
    "tp4, 2 kv heads": (4, {"tensor_parallel_degree": 4}),
    "tp2 x pp2": (4, _TP2 | _PP2),
    "tp2 x fsdp2": (4, _TP2 | {"sharding": ["stage3"]}),
    "pp2 x fsdp2": (4, _PP2 | {"sharding": ["stage2"]}),
    "cp2 x tp2": (4, _CP2 | _TP2),
    "cp2 x pp2": (4, _CP2 | _PP2),
}


def layouts_of(world: int) -> list[str]:
    return [name for name, (size, _) in LAYOUTS.items() if size == world]


@dataclass(frozen=True)
class Run:
    """What is trained, whatever the layout.

    Attributes:
        accumulation: micro-batches of a process in a step.
        copies: data-parallel processes; a lone process that stands for so many accumulates as many times more.
        packed: rows of any lengths end to end; else matrices of rows of one length.
        model, precision, optimization: changes to the small model and its options.
        rows: of the training set; by default half a step's worth too few, so that the last step is a smaller one.
        prefixes: rows that begin alike hold their beginning once.
        compiled: every layer compiled, without a C++ compiler.
    """

    lora: bool = False
    accumulation: int = 1
    copies: int = 1
    packed: bool = True
    model: Mapping[str, Any] = field(default_factory=dict)
    precision: Mapping[str, Any] = field(default_factory=dict)
    optimization: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None
    prefixes: bool = False
    compiled: bool = False
    steps: int = STEPS

    @property
    def key(self) -> str:
        """A name of its own for what a lone process computes."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig.from_dict(MODEL | dict(self.model))

    def options(self, flags: Mapping[str, Any], folder: Path, *, alone: bool) -> RunOptions:
        accumulation = self.accumulation * (self.copies if alone else 1)
        optimization = {
            "max_steps": self.steps,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "lr_scheduler_type": "cosine",
            "max_grad_norm": 1.0,  # the norms are above
            "weight_decay": 0.1,
            "per_device_train_batch_size": MICRO_BATCH,
            "gradient_accumulation_steps": accumulation,
        }
        return RunOptions(
            model=ModelOptions(model_name_or_path="none", device="cpu"),
            optimization=OptimizationOptions(**optimization | dict(self.optimization)),
            precision=PrecisionOptions(**self.precision, torch_compile=self.compiled),
            parallel=ParallelOptions(**flags),
            checkpoint=CheckpointOptions(output_dir=str(folder)),
            logging=LoggingOptions(),
        )


# The data


def examples(count: int, seed: int, *, shared: int = 0) -> list[Example]:
    """Rows of 3 to 30 tokens, the first third of each not learned; every three begin with the same `shared` tokens."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        ids = generator.integers(1, VOCABULARY, int(generator.integers(3, 31))).tolist()
        if shared:
            ids = np.random.default_rng((seed, number // 3)).integers(1, VOCABULARY, shared).tolist() + ids
        prompt = shared + max(1, (len(ids) - shared) // 3)
        rows.append(Example(ids, [IGNORE] * (prompt - 1) + ids[prompt:] + [IGNORE]))
    return rows


@dataclass(frozen=True)
class Corpus:
    """Samples of one length, of which every third label is left out."""

    samples_per_epoch: int
    seed: int
    length: int = 16

    def __len__(self) -> int:
        return self.samples_per_epoch

    def __getitem__(self, index: int) -> CorpusSample:
        ids = np.random.default_rng((self.seed, index)).integers(1, VOCABULARY, self.length + 1)
        labels = np.where(np.arange(self.length) % 3 == index % 3, IGNORE, ids[1:])
        return CorpusSample(ids[:-1], labels, (self.length,))

    def fingerprint(self) -> dict[str, Any]:
        return {"samples": self.samples_per_epoch}


def steps_of(run: Run, share: DataShare, *, alone: bool) -> StepSource:
    accumulation = run.accumulation * (run.copies if alone else 1)
    rows = run.rows or int((run.steps - 0.5) * MICRO_BATCH * run.accumulation * run.copies)
    if not run.packed:
        return PretrainingSteps(Corpus(rows, 5), MICRO_BATCH, accumulation, share=share)  # type: ignore[arg-type]
    order = StepOrder(rows, MICRO_BATCH, accumulation, 3, processes=share.size, shuffle=not run.prefixes)
    made = examples(rows, 7, shared=20 if run.prefixes else 0)
    return FinetuningSteps(made, order, share_prefixes=run.prefixes, share=share)


def evaluation_batches(run: Run) -> Sequence[Batch]:
    """Nine rows: no number of processes has as many batches each."""
    if run.packed:
        made = examples(9, 8, shared=20 if run.prefixes else 0)
        return list(packed_batches(made, MICRO_BATCH, share_prefixes=run.prefixes))
    corpus = Corpus(9, 6)
    return [corpus_batch([corpus[i] for i in range(at, min(at + MICRO_BATCH, 9))], False) for at in range(0, 9, 2)]


# The model


def initial(name: str, where: Placement, config: LlamaConfig) -> Tensor:
    """Random values for every parameter: biases and norms apart from 0 and 1, adapters apart from the base."""
    if len(where.shape) < 2:
        whole = torch.sin(torch.arange(where.shape[0]) * 1.7 + len(name)) * 0.2
        return (whole + (0.0 if name.endswith(".bias") else 1.0))[where.box]
    deviation = 0.1 if ".lora_" in name else config.initializer_range
    return drawn(
        name, where.box, where.shape, 7, lambda values, generator: values.normal_(0.0, deviation, generator=generator)
    )


class Recorder(Callback):
    """Keeps the record of every step, and ends the run after one of them if asked."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.records: list[StepRecord] = []
        self.stop_after = stop_after

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self.records.append(record)
        trainer.should_stop = record.step == self.stop_after


@contextlib.contextmanager
def compiler(run: Run) -> Iterator[None]:
    """The backend that needs no C++ compiler, where layers are compiled."""
    if not run.compiled:
        yield
        return
    torch._dynamo.reset()
    with mock.patch.object(parallelize, "apply_compile", partial(apply_compile, backend="aot_eager")):
        yield


def make_trainer(
    run: Run, layout: str | None, processes: Processes, folder: Path, callbacks: list[Callback] | None = None
) -> tuple[Trainer, Recorder]:
    """The trainer of a run on a layout; None: in a lone process."""
    flags = LAYOUTS[layout][1] if layout else {}
    options, config = run.options(flags, folder, alone=layout is None), run.config
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to(getattr(torch, options.precision.weight_dtype))
    weights: Any = FullWeights(model, folder)
    if run.lora:
        adapter = LoRAConfig(rank=3, alpha=6.0)
        apply_lora(model, adapter)
        weights = AdapterWeights(model, adapter, "base")
    loaded = LoadedModel(model, None, folder, CPU)  # type: ignore[arg-type]  # no text here
    with contextlib.redirect_stdout(None):
        share_out(loaded, options, processes, lambda name, where: initial(name, where, config), 64)
    recorder = Recorder()
    share = DataShare(processes.data_rank, processes.layout.data)
    trainer = build_trainer(
        options,
        model,
        steps_of(run, share, alone=layout is None),
        weights,
        folder,
        CPU,
        [recorder, *(callbacks or [])],
        processes,
    )
    return trainer, recorder


def keep_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Where the gradients of the first step will be: whole sums, before clipping."""
    kept: dict[str, Tensor] = {}
    clip = trainer.optimizer.clip

    def look(max_norm: float, norm: float) -> None:
        if not kept:
            kept.update({name: gradient.clone() for name, gradient in trainer.optimizer.gradients().items()})
        clip(max_norm, norm)

    trainer.optimizer.clip = look  # type: ignore[method-assign]
    return kept


def score(trainer: Trainer, run: Run) -> dict[str, float]:
    return evaluate_loss(trainer.execution, evaluation_batches(run))


# Processes


def join(layouts: Sequence[str]) -> Iterator[tuple[str, Processes]]:
    """Each layout with the processes that the launcher started, in it."""
    world = int(os.environ["WORLD_SIZE"])
    for name in layouts:
        layout: Layout = ParallelOptions(**LAYOUTS[name][1]).layout(world)
        yield name, start(layout, CPU)


def run_ranks(world: int, program: Path, *arguments: str, timeout: float = 300) -> float:
    """Start a program in so many processes and wait for all of them; gives the seconds it took.

    Raises:
        RuntimeError: with the output of each process, if one failed or the time is up.
    """
    began = time.monotonic()
    ended = run_processes(world, program, *arguments, timeout=timeout)
    if any(code != 0 for code, _ in ended):
        raise RuntimeError(
            "\n".join(f"rank {i}: exit code {code}: {told[-3000:]}" for i, (code, told) in enumerate(ended))
        )
    return time.monotonic() - began


def append(path: Path, record: Mapping[str, Any]) -> None:
    """One more line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

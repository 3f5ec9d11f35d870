"""The one training loop.

A method (full, LoRA, ...) is a set of trainable parameters and a way to store them; what surrounds the loop (logging,
evaluation, checkpoints, plots) is callbacks. Every loss is a sum over labelled tokens, or over the pairs of a preference,
divided by their number in the whole step, so that accumulation and packing change nothing but rounding.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from arriero.data.batch import Batch
from arriero.data.steps import StepSource
from arriero.errors import TrainingError
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.processes import Processes
from arriero.training.checkpoint import TrainState, WeightStore, load_checkpoint, restore_random_state
from arriero.training.execution import build_execution
from arriero.training.flops import step_cost
from arriero.training.objectives.cross_entropy import CrossEntropy
from arriero.training.objectives.objective import Objective
from arriero.training.optimizer import Optimizer
from arriero.training.precision import NOTHING, Precision, first_non_finite
from arriero.training.run_facts import check_facts
from arriero.training.schedule import Schedule


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did.

    Attributes:
        loss: the mean over its labelled tokens, in nats, or over what else the objective counts.
        count: what the loss is the mean over.
        metrics: what the objective tells besides the loss.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    label_tokens: int
    rows: int
    flops: float
    seconds: float
    skipped: bool = False
    count: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


class Callback:
    """Something that watches a run. The hooks are called in the order of the trainer's list."""

    def on_train_begin(self, trainer: Trainer) -> None:
        """Before the first step, after a resume."""

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        """After each optimizer step."""

    def on_log(self, trainer: Trainer, record: dict[str, float]) -> None:
        """When there is something to write down: training averages or evaluation metrics."""

    def on_train_end(self, trainer: Trainer) -> None:
        """After the last step, also when training is interrupted."""


CONTENT = "content"  # what the rows are known by, in the fingerprint of data
DIGESTS = {CONTENT, "clusters"}  # in it, and of no use to a reader


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    """The values inside nested dicts and lists, by their path: `parts.0.seed`."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {
        key: leaf for at, inner in items for key, leaf in _leaves(inner, f"{name}.{at}" if name else str(at)).items()
    }


@dataclass
class Trainer:
    """Trains `model` on what `data` gives for each step.

    Args:
        total_steps: optimizer steps of the whole run.
        data: this process's micro-batches.
        objective: what is made smaller.
        processes: all that train together; every one of them runs this loop in step with the others.
        skip_steps: numbers (from 0) of steps that pass without training on their data.
        accumulation: micro-batches of each process in a step.
        facts: what a checkpoint that is resumed must have in common with this run, of `run_facts`.
        max_grad_norm: gradient norm above which gradients are scaled down; 0 turns clipping off.
        run_folder: where callbacks write.
    """

    model: LlamaForCausalLM
    data: StepSource
    optimizer: Optimizer
    schedule: Schedule
    precision: Precision
    weights: WeightStore
    total_steps: int
    run_folder: Path
    device: torch.device
    seed: int = 0
    max_grad_norm: float = 1.0
    objective: Objective = field(default_factory=CrossEntropy)
    processes: Processes = field(default_factory=Processes)
    skip_steps: frozenset[int] = frozenset()
    facts: dict[str, str] = field(default_factory=dict)
    accumulation: int = 1
    callbacks: list[Callback] = field(default_factory=list)
    state: TrainState = field(default_factory=TrainState)
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation, and the step it was made at
    metrics_step: int = -1
    should_stop: bool = False  # end after this step
    stopped_early: bool = False  # it ends as if this step were the last, because training on would not help
    failed: bool = False  # an error ended the run: other processes may not come along any more
    save_now: bool = False  # a checkpoint is due at this step, whatever the strategy says

    def __post_init__(self) -> None:
        self.cost = step_cost(self.model)
        self.execution = build_execution(self.model, self.precision, self.device, self.objective)
        self.state.total_steps = self.total_steps
        self.state.data, self.state.facts = self.data.fingerprint(), self.facts

    @property
    def epoch(self) -> float:
        """Passes over the data done so far."""
        return self.state.step / self.data.steps_per_epoch

    def resume(self, checkpoint: Path) -> int:
        """Go on from a checkpoint as if the run had never stopped.

        Returns:
            The step at which that run was to end.

        Raises:
            FormatError: if the checkpoint is damaged or of another run.
            TrainingError: if the data would come in another order, the optimizer or the base model is another, or the run
                would have ended before.
        """
        optimizer, generators, state = load_checkpoint(
            checkpoint, self.weights, self.optimizer.placements, self.processes
        )
        check_facts(checkpoint, state.facts, self.facts)
        other = self._other_data(_leaves(state.data), _leaves(self.state.data))
        if other:
            raise TrainingError(f"{checkpoint} was trained on {other}, or start anew in another --output_dir")
        if state.step > self.total_steps:
            raise TrainingError(
                f"{checkpoint} is {state.step} steps into its run and this one would end after {self.total_steps}: "
                "raise --max_steps or --num_train_epochs, or resume from an earlier checkpoint"
            )
        if checkpoint.parent.resolve() != self.run_folder.resolve():  # its best checkpoint is not here
            state.best_metric = state.best_checkpoint = None
        planned = state.total_steps
        self.optimizer.load(optimizer)
        self.precision.load(state.scaler)
        state.total_steps, state.facts, state.data = self.total_steps, self.facts, self.state.data
        self.state = state
        restore_random_state(generators)
        return planned

    def _other_data(self, then: dict[str, Any], here: dict[str, Any]) -> str:
        """What of the data is not as it was, and what to give; "" where all is. Checkpoints made before the rows' content was
        kept do not know it."""
        changed = {key for key in then | here if then.get(key) != here.get(key) and (key in then or key != CONTENT)}
        told = [f"{key} was {then.get(key)} and is {here.get(key)}" for key in then | here if key in changed - DIGESTS]
        if told:
            same = f"batch{self._accumulation_of(then, here)}, seed and length of the run"
            return f"other data: {', '.join(told)[:500]}: give the same data, {same}"
        if CONTENT in changed:
            limits = "--src_length, --tgt_length, --max_seq_length, --max_train_samples, --train_on"
            return f"other rows: give the same data and limits ({limits})"
        if changed:
            same = "--per_device_train_batch_size and --share_prefixes"
            return f"rows in other micro-batches: give the same {same}" + (
                "" if CONTENT in then else ", and the same data"
            )
        return ""

    def _accumulation_of(self, then: dict[str, Any], here: dict[str, Any]) -> str:
        """The option that makes the steps of this run as large as a checkpoint's, where other processes share them out."""
        rows, own = then.get("rows_per_step"), here.get("rows_per_step")
        if not isinstance(rows, int) or not isinstance(own, int) or rows == own or rows * self.accumulation % own:
            return ""
        return f" (--gradient_accumulation_steps {rows * self.accumulation // own})"

    def train(self) -> TrainState:
        """Run to the last step."""
        self.model.train()
        for callback in self.callbacks:
            callback.on_train_begin(self)
        try:
            while self.state.step < self.total_steps and not self.should_stop:
                record = self.step()
                for callback in self.callbacks:
                    callback.on_step_end(self, record)
        except BaseException:
            # what ended the run is what the user must hear of, not what closing up meets after it
            self.failed = True
            with contextlib.suppress(Exception):
                self._end()
            raise
        self._end()
        return self.state

    def _end(self) -> None:
        """Let every callback close up, also when one of them fails; the first failure is raised at the end."""
        failure: Exception | None = None
        for callback in self.callbacks:
            try:
                callback.on_train_end(self)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def step(self) -> StepRecord:
        """One optimizer step: all its micro-batches, one clipping, one update."""
        start = time.perf_counter()
        left_out = self.state.step in self.skip_steps
        if not self.processes.alone:  # dropout as a function of the step, so that no generator's state need be kept
            torch.manual_seed(self.seed + self.state.step * self.processes.size + self.processes.independent_rank)
        batches = [] if left_out else list(self.data(self.state.step))
        count, label_tokens, tokens, rows, flops = self._totals(batches)
        learning_rate = self.schedule(self.state.step)
        loss, norm, skipped = 0.0, 0.0, False
        metrics: dict[str, float] = {}
        if count:
            share = self.execution.train(batches, count, self.optimizer)
            parallel = self.execution.layers.parallel
            if parallel is not None:
                parallel.finish_gradients(self.optimizer.gradients())
            self.precision.unscale(self.optimizer)
            own = [share.loss / count, self.optimizer.squared_norm(), *share.statistics]
            loss, squared_norm, *statistics = self.processes.sum(own)
            metrics = self.objective.training(statistics, count)
            norm = math.sqrt(squared_norm) if squared_norm == squared_norm else math.nan
            self.optimizer.clip(self.max_grad_norm, norm)
            skipped = self._check_finite(loss, norm)
            if not skipped:
                self.optimizer.step(learning_rate)
            self.precision.update()
            self.optimizer.zero_grad()
        seconds = time.perf_counter() - start
        self.state.step += 1
        self.state.tokens += tokens
        self.state.label_tokens += label_tokens
        self.state.seconds += seconds
        return StepRecord(
            step=self.state.step,
            loss=loss,
            grad_norm=norm,
            learning_rate=learning_rate,
            tokens=tokens,
            label_tokens=label_tokens,
            rows=rows,
            flops=flops,
            seconds=seconds,
            skipped=skipped,
            count=count,
            metrics=metrics,
        )

    def _totals(self, batches: list[Batch]) -> tuple[int, int, int, int, float]:
        """What the objective counts, label tokens, tokens, rows and FLOPs of the step, in all processes."""
        own = [
            sum(map(self.objective.count, batches)),
            sum(batch.label_tokens for batch in batches),
            sum(batch.row_tokens for batch in batches),
            sum(batch.rows for batch in batches),
            sum(self.cost(batch.parts, batch.label_tokens) for batch in batches if batch.rows),
        ]
        layout = self.processes.layout
        # several processes see the same rows
        count, label_tokens, tokens, rows, flops = (
            total / (layout.pp * layout.cp * layout.tp) for total in self.processes.sum(own)
        )
        return round(count), round(label_tokens), round(tokens), round(rows), flops

    def _check_finite(self, loss: float, norm: float) -> bool:
        """Whether the step must be skipped (an fp16 overflow); raises if the numbers are really broken."""
        if all(abs(value) != float("inf") and value == value for value in (loss, norm)):
            return False
        if self.precision.forgives_overflow and loss == loss and abs(loss) != float("inf"):
            return True
        culprit = first_non_finite(self.optimizer, self.model)
        told = self.processes.exchange([culprit, self.data.describe(self.state.step)])
        culprit, data = next((found for found in told if found[0] != NOTHING), told[0])
        raise TrainingError(
            f"step {self.state.step + 1}: loss {loss}, gradient norm {norm}; the first bad tensor is {culprit}; "
            f"{data}: lower --learning_rate, use bf16 or fp32 in place of fp16, "
            "or leave this data out"
        )

    def log(self, record: dict[str, float]) -> None:
        """Hand a record to every callback."""
        for callback in self.callbacks:
            callback.on_log(self, record)

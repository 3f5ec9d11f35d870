"""The log line, and the progress bar on a terminal."""

from __future__ import annotations

import sys
from typing import Any

import psutil
import torch
from tqdm import tqdm

from arriero.training.flops import peak_flops
from arriero.training.trainer import Callback, StepRecord, Trainer


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(peak * (1 if sys.platform == "darwin" else 1024), psutil.Process().memory_info().rss) / 2**30


class Averages(Callback):
    """Averages the steps between two log points and hands the record to every callback.

    `tokens_per_second` counts every token of the rows, padding of whole-document packing among them. `mfu` is the share of
    the peak that the model's own arithmetic took (see `arriero.training.flops`).
    """

    def __init__(self, every: int) -> None:
        self.every = max(1, every)
        self.pending: list[StepRecord] = []
        self.peak = 0.0

    def on_train_begin(self, trainer: Trainer) -> None:
        if trainer.state.step >= trainer.total_steps:  # nothing will be measured
            return
        one, source = peak_flops(trainer.device, trainer.precision.dtype)
        size = trainer.processes.size
        self.peak = one * size
        each = f"{size} x " if size > 1 else ""
        print(f"MFU is of {each}{one / 1e12:,.3g} TFLOP/s ({source})", flush=True)

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self.pending.append(record)
        if record.step % self.every == 0 or record.step == trainer.total_steps or record.step == 1:
            self._log(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        if self.pending and not trainer.failed:  # a run that a signal or early stopping ended between two log points
            self._log(trainer)

    def _log(self, trainer: Trainer) -> None:
        record = self._record(trainer)
        self.pending.clear()
        trainer.log(record)

    def _record(self, trainer: Trainer) -> dict[str, float]:
        steps = self.pending
        seconds = sum(step.seconds for step in steps)
        count = sum(step.count for step in steps)
        speed = trainer.state.seconds / max(1, trainer.state.step)
        learned = [step for step in steps if step.count]
        measured = {  # nothing of it if the data of all steps were left out
            "loss": sum(step.loss * step.count for step in learned) / max(1, count),
            "grad_norm": learned[-1].grad_norm if learned else 0.0,
        }
        for name in learned[-1].metrics if learned else {}:
            measured[name] = sum(step.metrics[name] * step.count for step in learned) / count
        return {
            "step": steps[-1].step,
            "epoch": round(trainer.epoch, 4),
            **(measured if learned else {}),
            "learning_rate": steps[-1].learning_rate,
            "tokens_per_second": sum(step.tokens for step in steps) / seconds,
            "rows_per_second": sum(step.rows for step in steps) / seconds,
            "mfu": sum(step.flops for step in steps) / seconds / self.peak,
            "memory_gib": memory_gib(trainer.device),
            "eta_seconds": speed * (trainer.total_steps - trainer.state.step),
            "skipped_steps": sum(step.skipped for step in steps),
            "tokens": trainer.state.tokens,
            "seconds": trainer.state.seconds,
        }


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def counted(number: int, noun: str) -> str:
    """1 -> "1 step", 1000 -> "1,000 steps"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def format_scores(scores: dict[str, float]) -> str:
    """The metrics of an evaluation, as every line about one shows them."""
    return " | ".join(f"{key} {value:.4f}" for key, value in scores.items() if key.startswith("eval_"))


def format_record(record: dict[str, float], total_steps: int) -> str:
    """The log line of a training or evaluation record."""
    if "learning_rate" in record and "loss" not in record:
        return f"step {int(record['step'])}/{total_steps} | data left out"
    if "loss" in record:
        width = len(str(total_steps))
        line = (
            f"step {int(record['step']):>{width}}/{total_steps} | loss {record['loss']:.4f} | grad {record['grad_norm']:.2f} | "
            f"lr {record['learning_rate']:.2e} | {record['tokens_per_second']:,.0f} tok/s | MFU {record['mfu']:.0%} | "
            f"{record['memory_gib']:.2f} GiB | ETA {duration(record['eta_seconds'])}"
        )
        if "reward_accuracy" in record:
            line += f" | reward accuracy {record['reward_accuracy']:.2f}, margin {record['reward_margin']:+.3f}"
        return line + (f" | {int(record['skipped_steps'])} skipped (fp16 overflow)" if record["skipped_steps"] else "")
    return f"step {int(record['step'])} | {format_scores(record)}"


class Console(Callback):
    """One line a log point; on a terminal a progress bar stands below the lines."""

    def __init__(self, *, progress_bar: bool) -> None:
        self.progress_bar = progress_bar and sys.stderr.isatty()
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, trainer: Trainer) -> None:
        if self.progress_bar:
            self.bar = tqdm(
                total=trainer.total_steps, initial=trainer.state.step, unit="step", leave=False, file=sys.stderr
            )

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if self.bar is not None:
            self.bar.update(1)
            self.bar.set_postfix_str(f"loss {record.loss:.3f}", refresh=False)

    def on_log(self, trainer: Trainer, record: dict[str, float]) -> None:
        line = format_record(record, trainer.total_steps)
        if self.bar is not None:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        else:
            print(line, flush=True)

    def on_train_end(self, trainer: Trainer) -> None:
        if self.bar is not None:
            self.bar.close()

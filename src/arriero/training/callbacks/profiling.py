"""A profile of some steps: where the time goes, operator by operator."""

from __future__ import annotations

from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from arriero.training.trainer import Callback, StepRecord, Trainer

ROWS = 60  # of the table of operators


class Profiling(Callback):
    """Profiles the steps `first` to `last` (counted from 1) and writes into `profile/` of the run folder.

    `trace-steps-5-8.json` is for https://ui.perfetto.dev or chrome://tracing, `operators-steps-5-8.txt` is a table of operators
    by their own time. It belongs first among the callbacks: what they do between two steps is then in the trace, what they do
    after the last one is not. Profiled steps are slower than others.

    Args:
        memory: also record what each operator allocates.
    """

    def __init__(self, first: int, last: int, *, memory: bool = False) -> None:
        self.first, self.last, self.memory = first, last, memory
        self.profiler: profile | None = None

    def on_train_begin(self, trainer: Trainer) -> None:
        ahead = self.first - 1 - trainer.state.step
        if ahead < 0 or self.first > trainer.total_steps:
            print(
                f"warning: nothing is profiled: --profile_steps begins at step {self.first}, "
                f"this run does steps {trainer.state.step + 1} to {trainer.total_steps}",
                flush=True,
            )
            return
        activities = [ProfilerActivity.CPU]
        if trainer.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # the step before is run under the profiler too and not kept: it takes the profiler's own start
        phases = schedule(wait=ahead - 1, warmup=1, active=self.last - self.first + 1, repeat=1) if ahead else None
        self.profiler = profile(
            activities=activities,
            schedule=phases,
            profile_memory=self.memory,
            acc_events=True,
        )
        self.profiler.start()

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if self.profiler is None:
            return
        if record.step < self.last:
            self.profiler.step()
        else:
            self._finish(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        if self.profiler is not None:
            self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        """Stop, and write what was recorded; a full disk costs the profile, not the run."""
        profiler, self.profiler = self.profiler, None
        last = min(self.last, trainer.state.step)
        if profiler is None:
            return
        profiler.stop()
        if last < self.first:  # the run was stopped before
            return
        folder, name = trainer.run_folder / "profile", f"steps-{self.first}-{last}"
        order: Any = "self_device_time_total" if trainer.device.type == "cuda" else "self_cpu_time_total"
        try:
            folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(folder / f"trace-{name}.json"))
            table = profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
            (folder / f"operators-{name}.txt").write_text(table + "\n", encoding="utf-8")
        except (OSError, RuntimeError) as error:
            print(f"warning: {folder}: the profile could not be written ({error})", flush=True)
            return
        print(f"profile of steps {self.first} to {last}: {folder}", flush=True)

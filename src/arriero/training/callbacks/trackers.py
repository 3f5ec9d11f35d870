"""Trackers: the records of a run as curves in TensorBoard, Weights & Biases or Trackio."""

from __future__ import annotations

import importlib.util
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from arriero.config.logging import LoggingOptions
from arriero.errors import require
from arriero.training.trainer import Callback, Trainer


class Tracker(Protocol):
    """Takes numbers by name and step. What its calls raise is `Tracking`'s to handle."""

    name: str

    def start(self, step: int) -> None:
        """Begin; `step` steps were done by an earlier sitting."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Numbers under names such as train/loss."""

    def finish(self) -> None:
        """Send and close."""


class Tracking(Callback):
    """Hands every record to a tracker. One that fails is told of once and then left alone: training goes on."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.failed = False

    def on_train_begin(self, trainer: Trainer) -> None:
        self._try(lambda: self.tracker.start(trainer.state.step))

    def on_log(self, trainer: Trainer, record: dict[str, float]) -> None:
        group = "eval" if any(key.startswith("eval_") for key in record) else "train"
        metrics = {f"{group}/{key.removeprefix('eval_')}": value for key, value in record.items() if key != "step"}
        self._try(lambda: self.tracker.log(metrics, int(record["step"])))

    def on_train_end(self, trainer: Trainer) -> None:
        self._try(self.tracker.finish)

    def _try(self, action: Callable[[], object]) -> None:
        if self.failed:
            return
        try:
            action()
        except Exception as error:  # whatever a library, a server or a network may raise: hours of training weigh more
            self.failed = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(
                f"warning: {self.tracker.name} failed and gets no more records, training goes on ({reason})", flush=True
            )


class TensorBoard:
    """Files for `tensorboard --logdir`; a resumed run hides the steps after its checkpoint."""

    name = "TensorBoard"

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.module = require("torch.utils.tensorboard", "track")
        self.folder, self.config = folder, config

    def start(self, step: int) -> None:
        self.writer = self.module.SummaryWriter(str(self.folder), purge_step=step + 1)
        listing = json.dumps(self.config, indent=1, ensure_ascii=False)
        self.writer.add_text("config", "".join(f"    {line}\n" for line in listing.splitlines()), step)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """W&B, with or without network (WANDB_MODE=offline); a resumed run goes on under the id that the folder keeps."""

    name = "W&B"

    def __init__(self, run_folder: Path, project: str, run_name: str, config: dict[str, Any]) -> None:
        self.module = require("wandb", "track")
        self.run_folder, self.project, self.run_name, self.config = run_folder, project, run_name, config

    def start(self, step: int) -> None:
        kept = self.run_folder / "wandb_run_id.txt"
        if step == 0 or not kept.is_file():
            kept.write_text(uuid.uuid4().hex[:8] + "\n", encoding="ascii")
        self.run = self.module.init(
            project=self.project,
            name=self.run_name,
            config=self.config,
            dir=str(self.run_folder),
            id=kept.read_text(encoding="ascii").strip(),
            resume="allow",
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(metrics, step=step)

    def finish(self) -> None:
        self.run.finish()


class Trackio:
    """Trackio's local database (TRACKIO_DIR); `trackio show` draws it. A resumed run goes on under its name."""

    name = "Trackio"

    def __init__(self, project: str, run_name: str, config: dict[str, Any]) -> None:
        self.module = require("trackio", "track")
        self.project, self.run_name, self.config = project, run_name, config

    def start(self, step: int) -> None:
        self.run = self.module.init(
            project=self.project,
            name=self.run_name,
            config=self.config,
            resume="allow" if step else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(metrics, step=step)

    def finish(self) -> None:
        self.run.finish()


def build_trackers(options: LoggingOptions, run_folder: Path, config: dict[str, Any]) -> list[Callback]:
    """A callback for each tracker of `--report_to`.

    Args:
        config: the effective options, which the trackers show beside the curves.

    Raises:
        MissingExtraError: a tracker that was named is not installed.
    """
    names = options.report_to
    run_name = options.run_name or run_folder.resolve().name
    trackers: list[Tracker] = []
    installed = importlib.util.find_spec("tensorboard") is not None
    if "tensorboard" in names or ("auto" in names and installed):
        folder = Path(options.logging_dir or run_folder / "runs") / (options.run_name or "")
        trackers.append(TensorBoard(folder, config))
    if "wandb" in names:
        trackers.append(WeightsAndBiases(run_folder, options.project, run_name, config))
    if "trackio" in names:
        trackers.append(Trackio(options.project, run_name, config))
    return [Tracking(tracker) for tracker in trackers]

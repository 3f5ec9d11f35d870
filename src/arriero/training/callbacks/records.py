"""Records kept on disk: JSON lines, and a plot of the loss."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arriero.errors import TrainingError, require
from arriero.training.trainer import Callback, Trainer

LOG = "train_log.jsonl"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a `train_log.jsonl`; a last line cut short by a kill is left out."""
    records = []
    # not splitlines: a text that a model wrote may hold other line ends, such as U+2028; bytes: a cut may be in a character
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            records.append(json.loads(line.decode("utf-8")))
        except (ValueError, RecursionError):
            break
    return records


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around writing a record: a failure (a full disk, say) is one line for the user.

    Raises:
        TrainingError: naming the file.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written ({error.strerror}); the checkpoints are intact") from error


def drop_later(path: Path, step: int) -> None:
    """Leave out of a file of records those after `step`; a kill in between does not cost the others."""
    if not path.is_file():
        return
    kept = [record for record in read_log(path) if record["step"] <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        temporary.write_text(
            "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept), encoding="utf-8"
        )
        temporary.replace(path)


class JsonLines(Callback):
    """Every record as a line of `train_log.jsonl`; a resumed run drops the lines after its checkpoint."""

    def on_train_begin(self, trainer: Trainer) -> None:
        self.path = trainer.run_folder / LOG
        drop_later(self.path, trainer.state.step)

    def on_log(self, trainer: Trainer, record: dict[str, float]) -> None:
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            # NaN (a gradient norm of an fp16 overflow) is no JSON
            finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
            file.write(json.dumps(finite) + "\n")


class LossPlot(Callback):
    """`loss.png`: training and evaluation loss over the steps, and the learning rate."""

    def on_train_end(self, trainer: Trainer) -> None:
        records = read_log(trainer.run_folder / LOG)
        train = [(r["step"], r["loss"], r["learning_rate"]) for r in records if "loss" in r]
        if len(train) < 2:
            return
        if importlib.util.find_spec("matplotlib") is None:  # a missing extra must not cost a finished run its model
            print("loss.png is not drawn: pip install 'arriero[plot]' brings matplotlib", flush=True)
            return
        figure_module = require("matplotlib.figure", "plot")
        figure = figure_module.Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        steps, losses, rates = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", label="training loss")
        evaluated = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
        if evaluated:
            axes.plot(*zip(*evaluated, strict=True), "o-", color="tab:red", label="evaluation loss")
        axes.set(xlabel="optimizer step", ylabel="cross-entropy (nats / token)", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right")
        twin = axes.twinx()
        twin.plot(steps, rates, color="tab:gray", alpha=0.5, linewidth=1)
        twin.set(ylabel="learning rate", ylim=(0, None))
        try:
            figure.savefig(trainer.run_folder / "loss.png", dpi=120)
        except OSError as error:
            print(f"warning: {trainer.run_folder / 'loss.png'}: not drawn ({error.strerror})", flush=True)

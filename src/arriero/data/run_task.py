"""Whether a trained model is asked as it was trained: its run folder keeps the options of the training."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from arriero.config.adapter import AdapterPathOptions
from arriero.config.files import read_config
from arriero.data.rows.questions import SQUAD_TASKS
from arriero.data.samples import Sample
from arriero.errors import ConfigError

CONFIG = "config.yaml"


def warn_of_other_task(
    model: str, adapter: AdapterPathOptions, task: str | None, samples: Sequence[Sample], *, add: str = "--task_name"
) -> None:
    """A line on the standard error where the run that an adapter or model came from says another task than these rows have.

    Args:
        model: name or folder; it counts where there is no adapter.
        task: `--task_name`.
        samples: the rows as they were read.
        add: the option that names the task, with what it needs.
    """
    folder = adapter.lora_path or adapter.prefix_path or model
    # None is question generation, where the rows' keys make it so; other rows say themselves what is asked.
    used = task or ("squad" if any(sample.ends_prompt for sample in samples) else None)
    trained = task_of_run(folder)
    if used is not None and trained is not None and used != trained:
        print(
            f"arriero: warning: {folder} was trained with --task_name {trained} and is asked with the prompts of {used}: "
            f"add {add} {trained}",
            file=sys.stderr,
            flush=True,
        )


def task_of_run(folder: str) -> str | None:
    """The `--task_name` of the run whose folder, or checkpoint, this is; None where nothing readable tells one."""
    path = Path(folder).expanduser()
    places = [path / CONFIG]
    if re.fullmatch(r"checkpoint-\d+", path.name):
        places.append(path.parent / CONFIG)
    for place in places:
        try:
            task = read_config(place).get("task_name")
        except (ConfigError, OSError, ValueError):
            continue
        return task if isinstance(task, str) and task in SQUAD_TASKS else None
    return None

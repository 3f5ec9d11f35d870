"""What a run does with its options because of the launcher: once started again it goes on from its last checkpoint, and its
steps are the same on any number of machines.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from arriero.config.checkpoint import CheckpointOptions
from arriero.config.launched import launched_size
from arriero.config.optimization import OptimizationOptions
from arriero.errors import ConfigError

RESTART = "ARRIERO_RESTART"  # how many times all processes have been started again; 0 at first
LAUNCHED = "ARRIERO_LAUNCHED"  # when the first were started, in seconds since 1970
MOST = "ARRIERO_MOST_PROCESSES"  # of a run whose machines may come and go: the processes if all are there


def resume_if_restarted(options: CheckpointOptions) -> None:
    """After a restart, turn the options into `--resume_from_checkpoint auto`, without `--overwrite_output_dir`.

    As long as this launch has written no checkpoint, `--overwrite_output_dir` and a checkpoint named by the user stay: an
    old run that was to be replaced is not gone on with, and the named start is not lost.
    """
    if os.environ.get(RESTART, "0") == "0":
        return
    launched = float(os.environ.get(LAUNCHED, "0"))
    folders = Path(options.output_dir).glob("checkpoint-*")
    saved = any(folder.stat().st_mtime >= launched for folder in folders)
    plain = options.resume_from_checkpoint is None and not options.overwrite_output_dir
    if saved or plain:
        options.resume_from_checkpoint, options.overwrite_output_dir = "auto", False


def accumulate_for_absent_machines(options: OptimizationOptions) -> None:
    """Where machines may come and go, let each process accumulate as much more as processes are absent.

    A step has the rows of all machines then, however many are there, so that a checkpoint of some is gone on from by others.

    Raises:
        ConfigError: it cannot be shared out evenly.
    """
    size = launched_size()
    most = int(os.environ.get(MOST, size))
    if most == size:
        return
    steps, rest = divmod(options.gradient_accumulation_steps * most, size)
    if rest:
        raise ConfigError(
            f"--gradient_accumulation_steps {options.gradient_accumulation_steps}: a step of {most} processes is not shared "
            f"out evenly by the {size} that are here: give a multiple of {size // math.gcd(most, size)}"
        )
    print(f"{size} of {most} processes are here: each accumulates {steps} micro-batches a step")
    options.gradient_accumulation_steps = steps

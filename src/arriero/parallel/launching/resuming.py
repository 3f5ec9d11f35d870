"""What a run that the launcher started again does with its options: it goes on from its last checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from arriero.config.checkpoint import CheckpointOptions

RESTART = "ARRIERO_RESTART"  # how many times all processes have been started again; 0 at first
LAUNCHED = "ARRIERO_LAUNCHED"  # when the first were started, in seconds since 1970


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

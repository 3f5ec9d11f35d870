"""The upload at the end of a training run."""

from __future__ import annotations

import os
from pathlib import Path

from arriero.config.checkpoint import CheckpointOptions
from arriero.config.hub import HubOptions
from arriero.errors import ArrieroError, ConfigError, TrainingError


def check_push(hub: HubOptions, checkpoint: CheckpointOptions, *, do_train: bool) -> None:
    """Refuse, before the run, an upload that could not work after it; of several processes the first asks the Hub.

    Raises:
        ConfigError, FormatError: there will be nothing to upload, or the token cannot.
    """
    if not hub.push_to_hub or hub.hub_model_id is None:
        return
    if not do_train:
        raise ConfigError("--push_to_hub uploads what a run has trained: leave it out with --do_train no")
    if checkpoint.save_sharded_model:
        raise ConfigError("--push_to_hub uploads a whole model: leave out --save_sharded_model")
    if os.environ.get("RANK", "0") == "0":
        from arriero.formats.upload import check_upload

        check_upload(hub.hub_model_id, private=hub.hub_private_repo)


def push(hub: HubOptions, folder: Path) -> None:
    """Upload the folder of a finished run.

    Raises:
        TrainingError: it failed; the model is on this machine.
    """
    if not hub.push_to_hub or hub.hub_model_id is None or os.environ.get("RANK", "0") != "0":
        return
    from arriero.formats.upload import upload

    try:
        print(upload(folder, hub.hub_model_id, private=hub.hub_private_repo, report=print))
    except ArrieroError as error:
        raise TrainingError(
            f"{error} (the run is whole in {folder}; to try again: arriero upload {folder} {hub.hub_model_id})"
        ) from error

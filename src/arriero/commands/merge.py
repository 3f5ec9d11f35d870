"""`arriero merge`: join an adapter and its base, or the shards of a model, and prove that the result computes the same."""

from __future__ import annotations

import os
from pathlib import Path

from arriero.api.groups import MERGE
from arriero.commands.next_command import tell_next
from arriero.config.adapter import AdapterPathOptions
from arriero.config.merging import MergeOptions
from arriero.config.model import ModelOptions

HELP = (
    "Join LoRA adapters and their base, or a model's tensor-parallel shards, into one model folder; the result is checked "
    "numerically."
)

OPTIONS: tuple[type, ...] = MERGE


def run(model: ModelOptions, adapter: AdapterPathOptions, merge: MergeOptions) -> int:
    """Merge an adapter where one is named, else shards; of several processes the first does it."""
    from arriero.parallel.processes import launched_size

    if launched_size() > 1 and int(os.environ["RANK"]) > 0:
        return 0
    merge_and_say(model, adapter, merge)
    tell_next("chat", *(["--lora_path"] if merge.output_kind == "adapter" else []), merge.output_path)
    return 0


def merge_and_say(model: ModelOptions, adapter: AdapterPathOptions, merge: MergeOptions) -> None:
    """Merge with a progress bar, and the lines that say what was done."""
    from tqdm import tqdm

    from arriero.training.merging import merge_model

    with tqdm(unit="tensor", desc="merge", leave=False, delay=1.0, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        notes = merge_model(model, adapter, merge, progress)
    for note in notes:
        print(note)


def merge_with_progress(folder: Path, target: str) -> None:
    """Join a folder of shards, with a progress bar, and say what the comparison gave."""
    merge_and_say(ModelOptions(model_name_or_path=str(folder)), AdapterPathOptions(), MergeOptions(output_path=target))

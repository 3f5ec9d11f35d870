"""Joining a model's shards into one model folder, and proving that it computes the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from arriero.errors import FormatError
from arriero.formats import hf
from arriero.formats.safe_tensors import LazyTensor
from arriero.formats.shard_forward import sharded_logits, whole_logits
from arriero.formats.staging import staged_folder
from arriero.formats.tensor_shards import ShardedState
from arriero.models.config import LlamaConfig

PROMPT_TOKENS = 64
TOLERANCE = 1e-4  # of the largest logit; fp32 sums in another order differ by about 1e-6


@dataclass(frozen=True)
class Comparison:
    """Logits of the shards and of the joined model on one prompt.

    Attributes:
        difference: the largest one.
        largest: logit, in size.
    """

    difference: float
    largest: float

    def __str__(self) -> str:
        return f"logits differ from the shards' by at most {self.difference:.1e}, largest logit {self.largest:.1f}"


def merge_shards(
    source: str | Path,
    folder: str | Path,
    *,
    max_shard_size: str | int = "5GB",
    dtype: str | torch.dtype | None = None,
    verify: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison | None:
    """Write the whole model of a folder of shards; one tensor at a time is in memory.

    The new folder appears when it is complete and, with `verify`, when its logits are those of the shards.

    Args:
        dtype: to cast to; None keeps each tensor's.
        progress: told the tensors joined so far and all of them, before each is joined.

    Raises:
        FormatError: when the shards are broken or differ where they should not, the logits differ, or something cannot be
            written.
    """
    config, wanted = LlamaConfig.from_file(source), hf.parse_dtype(dtype)
    shards = ShardedState(source, config)

    def told(lazy: LazyTensor, number: int) -> LazyTensor:
        def load() -> torch.Tensor:
            progress(number, len(shards.shapes))
            return lazy.load()

        return replace(lazy, load=load)

    state = {name: told(lazy, number) for number, (name, lazy) in enumerate(shards.lazy().items())}
    with staged_folder(folder) as staging:
        hf.save_model(state, config, staging, max_shard_size, wanted, extra_files_from=source)
        return _compare(shards, staging, wanted, str(folder)) if verify else None


@torch.inference_mode()
def _compare(shards: ShardedState, merged: Path, dtype: torch.dtype | None, target: str) -> Comparison:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(shards.config.vocab_size, (1, PROMPT_TOKENS), generator=generator)
    expected = sharded_logits(shards, prompt, dtype)
    found = whole_logits(hf.load_model(merged), prompt)
    largest = float(expected.abs().max())
    comparison = Comparison(float(found.sub_(expected).abs_().max()), largest)
    if not comparison.difference <= TOLERANCE * comparison.largest:  # also where one is not a number
        raise FormatError(f"{target}: not written, for the merged model is another one: {comparison}")
    return comparison

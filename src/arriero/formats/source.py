"""A model of any format, open for reading: what every conversion goes through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

from torch import Tensor

from arriero.formats.low_rank import LowRank
from arriero.formats.safe_tensors import LazyTensor
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM

Format = Literal["hf", "gguf", "paddle", "meta"]


def _nothing() -> None:
    return


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint whose tensors have the names and the layout of an HF folder, none of them in memory yet.

    A context manager: leaving it closes the files that it maps.

    Attributes:
        path: the file or folder.
        format: whose it is.
        config: of the model.
        tensors: by name, in the model's order, whole (shards are joined when one is loaded); a tied head is left out.
        files: what an HF folder has beside config.json and the weights (tokenizer, chat template, generation defaults,
            licence), by name.
        about: lines that a user wants to know, such as the number formats in the file and its licence.
        rounding: of an HF folder, the files that say how the model computes with rounded weights, by name.
        updates: what an adapter added to some of the weights, by name; it is in `tensors` already.
        computing: of one whose layers round their inputs, the model that does so: its plain weights alone compute
            other numbers.
    """

    path: Path
    format: Format
    config: LlamaConfig
    tensors: Mapping[str, Tensor | LazyTensor]
    files: Mapping[str, bytes] = field(default_factory=dict)
    about: tuple[str, ...] = ()
    close: Callable[[], None] = _nothing
    rounding: Mapping[str, bytes] = field(default_factory=dict)
    updates: Mapping[str, LowRank] = field(default_factory=dict)
    computing: Callable[[], LlamaForCausalLM] | None = None

    def __enter__(self) -> ModelSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

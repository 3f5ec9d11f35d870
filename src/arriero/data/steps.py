"""What each optimizer step trains on: micro-batches as a pure function of the step number, so that a run resumes exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from arriero.data.batch import Batch, pack
from arriero.data.corpus.dataset import CorpusDataset, CorpusSample
from arriero.data.order import StepOrder
from arriero.data.sft import IGNORE, Example


class StepSource(Protocol):
    """The data of a run.

    Attributes:
        steps_per_epoch: optimizer steps of one pass over the data.
    """

    @property
    def steps_per_epoch(self) -> int: ...

    def steps_in(self, epochs: float) -> int:
        """Optimizer steps of so many passes over the data."""
        ...

    def __call__(self, step: int) -> list[Batch]:
        """The micro-batches of optimizer step number `step`, counted from 0."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides which data each step sees, as JSON: a checkpoint is only resumed if it is the same."""
        ...

    def describe(self, step: int) -> str:
        """Which data a step sees, for a message."""
        ...


@dataclass(frozen=True)
class FinetuningSteps:
    """Rows of prompts and answers, packed without padding.

    Attributes:
        share_prefixes: compute the common beginning of a micro-batch's rows once (see `arriero.data.batch`).
    """

    examples: Sequence[Example]
    order: StepOrder
    share_prefixes: bool = False

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def steps_in(self, epochs: float) -> int:
        return math.ceil(epochs * self.steps_per_epoch)

    def __call__(self, step: int) -> list[Batch]:
        return [
            pack([self.examples[row] for row in rows], share_prefixes=self.share_prefixes) for rows in self.order(step)
        ]

    def fingerprint(self) -> dict[str, Any]:
        return {
            "rows": self.order.rows,
            "rows_per_step": self.order.rows_per_step,
            "seed": self.order.seed,
            "clusters": len(self.order.clusters or ()),
        }

    def describe(self, step: int) -> str:
        rows = [row for micro_batch in self.order(step) for row in micro_batch]
        shown = ", ".join(map(str, rows[:16])) + (", ..." if len(rows) > 16 else "")
        return f"training rows {shown} (counted from 0)"


@dataclass(frozen=True)
class PretrainingSteps:
    """Samples of a corpus, in the corpus's own order.

    Attributes:
        reset_attention_mask: tokens neither attend to other documents nor count their positions on from them.
    """

    dataset: CorpusDataset
    micro_batch_size: int
    accumulation: int
    reset_attention_mask: bool = False

    @property
    def rows_per_step(self) -> int:
        return self.micro_batch_size * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        return max(1, math.ceil(self.dataset.samples_per_epoch / self.rows_per_step))

    def steps_in(self, epochs: float) -> int:
        wanted = min(len(self.dataset), math.ceil(epochs * self.dataset.samples_per_epoch))
        return math.ceil(wanted / self.rows_per_step)

    def _range(self, step: int) -> range:
        start = step * self.rows_per_step
        return range(start, min(start + self.rows_per_step, len(self.dataset)))

    def __call__(self, step: int) -> list[Batch]:
        rows, size = self._range(step), self.micro_batch_size
        return [
            corpus_batch([self.dataset[i] for i in rows[at : at + size]], self.reset_attention_mask)
            for at in range(0, len(rows), size)
        ]

    def fingerprint(self) -> dict[str, Any]:
        return {
            **self.dataset.fingerprint(),
            "rows_per_step": self.rows_per_step,
            "reset_attention_mask": self.reset_attention_mask,
        }

    def describe(self, step: int) -> str:
        rows = self._range(step)
        return f"corpus samples {rows.start} to {rows.stop - 1} (--skip_data_intervals {step + 1}-{step + 1} leaves them out)"


def corpus_batch(samples: Sequence[CorpusSample], reset_attention_mask: bool) -> Batch:
    """Samples of one length as a batch: a matrix, or with `reset_attention_mask` their documents end to end."""
    ids = torch.from_numpy(np.stack([sample.input_ids for sample in samples]))
    labels = torch.from_numpy(np.stack([sample.labels for sample in samples]))
    count, length = ids.shape
    parts: tuple[tuple[int, ...], ...] = ((length,),) * count
    if reset_attention_mask:
        parts = tuple((part,) for sample in samples for part in sample.document_lengths)
        ids, labels = ids.view(1, -1), labels.view(1, -1)
    return Batch(ids, labels, parts, count, count * length, int((labels != IGNORE).sum()))

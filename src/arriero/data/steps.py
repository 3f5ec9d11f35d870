"""What each optimizer step trains on: micro-batches as a pure function of the step number, so that a run resumes exactly.

Several processes share out the micro-batches of a step: together they are those of one process that accumulates as many.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from arriero.data.batch import Batch, LazyBatches, pack, pad
from arriero.data.corpus.dataset import CorpusDataset, CorpusSample
from arriero.data.order import StepOrder
from arriero.data.sft import IGNORE, Example


@dataclass(frozen=True)
class DataShare:
    """Which batches a process makes: every `size`-th, from number `rank` on."""

    rank: int = 0
    size: int = 1

    def of(self, total: int) -> range:
        """The numbers of its batches out of `total`."""
        return range(self.rank, total, self.size)


def share_out(batches: LazyBatches | Sequence[Batch], share: DataShare) -> Iterator[Batch]:
    """The batches of one process, then empty ones until it has as many as any other.

    Processes that share out weights compute together: each must run the model equally often.
    """
    own = share.of(len(batches))
    yield from (batches[number] for number in own)
    for _ in range(math.ceil(len(batches) / share.size) - len(own)):
        yield Batch.empty()


class StepSource(Protocol):
    """One process's share of the data of a run.

    Attributes:
        steps_per_epoch: optimizer steps of one pass over the data.
    """

    @property
    def steps_per_epoch(self) -> int: ...

    def steps_in(self, epochs: float) -> int:
        """Optimizer steps of so many passes over the data."""
        ...

    def __call__(self, step: int) -> list[Batch]:
        """This process's micro-batches of optimizer step number `step`, counted from 0: as many as every other's."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides which data each step sees, as JSON: a checkpoint is only resumed if it is the same.

        How many processes share a step out is not among it.
        """
        ...

    def describe(self, step: int) -> str:
        """Which data this process sees in a step, for a message."""
        ...


class OrderedSteps(ABC):
    """What sources have in common whose rows a `StepOrder` gives."""

    order: StepOrder
    share: DataShare

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def steps_in(self, epochs: float) -> int:
        return math.ceil(epochs * self.steps_per_epoch)

    def __call__(self, step: int) -> list[Batch]:
        rows = self.order(step)
        return list(share_out(LazyBatches(len(rows), lambda number: self.batch_of(rows[number])), self.share))

    @abstractmethod
    def batch_of(self, rows: Sequence[int]) -> Batch:
        """One micro-batch."""


def digest_of(examples: Iterable[Example]) -> str:
    """SHA-256 of the token ids and labels of all rows, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.array([example.length, *example.input_ids, *example.labels], dtype=np.int64).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class FinetuningSteps(OrderedSteps):
    """Rows of prompts and answers, packed without padding unless `padded` is asked for.

    Attributes:
        order: the rows of every step, of all processes.
        share_prefixes: compute the common beginning of a micro-batch's rows once (see `arriero.data.batch`).
        padded: rows as a matrix, each padded to the longest of its micro-batch; nothing is shared then.
        content: what the rows are known by, of `digest_of`.
    """

    examples: Sequence[Example]
    order: StepOrder
    share_prefixes: bool = False
    share: DataShare = DataShare()
    padded: bool = False
    content: str = ""

    def batch_of(self, rows: Sequence[int]) -> Batch:
        chosen = [self.examples[row] for row in rows]
        return pad(chosen) if self.padded else pack(chosen, share_prefixes=self.share_prefixes)

    def fingerprint(self) -> dict[str, Any]:
        clusters = self.order.clusters
        return {
            "rows": self.order.rows,
            "rows_per_step": self.order.rows_per_step,
            "seed": self.order.seed,
            # they follow from the rows a micro-batch has, and the order of the rows from them
            "clusters": hashlib.sha256(json.dumps(clusters).encode()).hexdigest()[:16] if clusters else "",
            "content": self.content,
            **self.order.variation(),
        }

    def describe(self, step: int) -> str:
        micro_batches = self.order(step)
        rows = [row for number in self.share.of(len(micro_batches)) for row in micro_batches[number]]
        if not rows:
            return "no training rows"
        shown = ", ".join(map(str, rows[:16])) + (", ..." if len(rows) > 16 else "")
        return f"training rows {shown} (counted from 0)"


@dataclass(frozen=True)
class PretrainingSteps:
    """Samples of a corpus, in the corpus's own order.

    Attributes:
        accumulation: micro-batches of each process in a step.
        reset_attention_mask: tokens neither attend to other documents nor count their positions on from them.
    """

    dataset: CorpusDataset
    micro_batch_size: int
    accumulation: int
    reset_attention_mask: bool = False
    share: DataShare = DataShare()

    @property
    def rows_per_step(self) -> int:
        """Samples of all processes."""
        return self.micro_batch_size * self.accumulation * self.share.size

    @property
    def steps_per_epoch(self) -> int:
        return max(1, math.ceil(self.dataset.samples_per_epoch / self.rows_per_step))

    def steps_in(self, epochs: float) -> int:
        wanted = min(len(self.dataset), math.ceil(epochs * self.dataset.samples_per_epoch))
        return math.ceil(wanted / self.rows_per_step)

    def _micro_batches(self, step: int) -> list[range]:
        """The samples of each micro-batch of a step, of all processes."""
        start, size = step * self.rows_per_step, self.micro_batch_size
        stop = min(start + self.rows_per_step, len(self.dataset))
        return [range(at, min(at + size, stop)) for at in range(start, stop, size)]

    def __call__(self, step: int) -> list[Batch]:
        micro_batches = self._micro_batches(step)

        def make(number: int) -> Batch:
            return corpus_batch([self.dataset[i] for i in micro_batches[number]], self.reset_attention_mask)

        return list(share_out(LazyBatches(len(micro_batches), make), self.share))

    def fingerprint(self) -> dict[str, Any]:
        return {
            **self.dataset.fingerprint(),
            "rows_per_step": self.rows_per_step,
            "reset_attention_mask": self.reset_attention_mask,
        }

    def describe(self, step: int) -> str:
        micro_batches = self._micro_batches(step)
        own = [micro_batches[number] for number in self.share.of(len(micro_batches))]
        if not own:
            return "no corpus samples"
        runs = [own] if self.share.size == 1 else [[micro_batch] for micro_batch in own]
        samples = ", ".join(f"{run[0].start} to {run[-1].stop - 1}" for run in runs)
        return f"corpus samples {samples} (--skip_data_intervals {step + 1}-{step + 1} leaves the step out)"


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

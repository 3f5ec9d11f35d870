"""Data for several processes: together they do what one process would that accumulates as many micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arriero.data.batch import Batch, LazyBatches, packed_batches
from arriero.data.corpus.dataset import CorpusSample
from arriero.data.order import StepOrder, prefix_clusters
from arriero.data.sft import IGNORE, Example
from arriero.data.steps import DataShare, FinetuningSteps, PretrainingSteps, StepSource, share_out
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.training.loss import linear_cross_entropy

LENGTH = 6


def example(number: int) -> Example:
    """A row that is recognised by its first token."""
    ids = [number, *range(1, 2 + number % 4)]
    return Example(ids, [*ids[1:], IGNORE])


@dataclass
class Corpus:
    """Samples that are recognised by their first token; notes which were read."""

    size: int
    read: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> CorpusSample:
        assert 0 <= index < self.size
        self.read.append(index)
        ids = np.arange(index, index + LENGTH)
        return CorpusSample(ids, ids + 1, (2, LENGTH - 2))

    @property
    def samples_per_epoch(self) -> float:
        return self.size / 2

    def fingerprint(self) -> dict[str, Any]:
        return {"samples": self.size}


def finetuning(rows: int, micro: int, accumulation: int, share: DataShare) -> FinetuningSteps:
    order = StepOrder(rows, micro, accumulation, seed=7, processes=share.size)
    return FinetuningSteps([example(i) for i in range(rows)], order, share=share)


def pretraining(rows: int, micro: int, accumulation: int, share: DataShare) -> PretrainingSteps:
    dataset: Any = Corpus(rows)
    return PretrainingSteps(dataset, micro, accumulation, share=share)


def tensors(batches: list[Batch]) -> list[tuple[Any, ...]]:
    return [
        (batch.input_ids.tolist(), batch.labels.tolist(), batch.parts, batch.rows, batch.row_tokens, batch.label_tokens)
        for batch in batches
    ]


@pytest.mark.parametrize("make", [finetuning, pretraining])
@given(
    rows=st.integers(1, 40),
    micro=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    processes=st.integers(1, 5),
)
def test_processes_share_the_micro_batches_of_one(
    make: Any, rows: int, micro: int, accumulation: int, processes: int
) -> None:
    one: StepSource = make(rows, micro, accumulation * processes, DataShare())
    several: list[StepSource] = [make(rows, micro, accumulation, DataShare(r, processes)) for r in range(processes)]
    for source in several:
        assert source.steps_per_epoch == one.steps_per_epoch
        assert source.steps_in(1.5) == one.steps_in(1.5)
        assert source.fingerprint() == one.fingerprint()
    for step in range(one.steps_in(1.5)):
        whole, shares = one(step), [source(step) for source in several]
        counts = {len(share) for share in shares}
        assert counts == {math.ceil(len(whole) / processes)}, "all compute equally often"
        dealt = list(chain.from_iterable(zip(*shares, strict=True)))
        assert tensors(dealt[: len(whole)]) == tensors(whole)
        for batch in dealt[len(whole) :]:
            assert (batch.rows, batch.row_tokens, batch.label_tokens) == (0, 0, 0)
            assert batch.labels.tolist() == [[IGNORE]]


def test_a_process_reads_its_own_samples_only() -> None:
    for rank in range(3):
        source = pretraining(24, 2, 2, DataShare(rank, 3))
        source(1)
        own = [12 + 2 * rank, 13 + 2 * rank, 18 + 2 * rank, 19 + 2 * rank]
        assert source.dataset.read == own  # type: ignore[attr-defined]
        shown = f"corpus samples {own[0]} to {own[1]}, {own[2]} to {own[3]} (--skip_data_intervals 2-2"
        assert source.describe(1).startswith(shown)
    assert pretraining(24, 2, 2, DataShare()).describe(1).startswith("corpus samples 4 to 7 (--skip_data_intervals 2-2")


def test_more_processes_than_rows() -> None:
    for make, word in ((finetuning, "training rows"), (pretraining, "corpus samples")):
        sources: list[StepSource] = [make(3, 2, 1, DataShare(rank, 4)) for rank in range(4)]
        assert [[batch.rows for batch in source(0)] for source in sources] == [[2], [1], [0], [0]]
        assert [source.describe(0) for source in sources][2:] == [f"no {word}"] * 2
        assert sources[0].steps_per_epoch == 1


def test_a_description_names_the_own_rows() -> None:
    order = StepOrder(12, 2, 2, seed=7, processes=2)
    source = FinetuningSteps([example(i) for i in range(12)], order, share=DataShare(1, 2))
    rows = order(0)[1] + order(0)[3]
    assert source.describe(0) == f"training rows {', '.join(map(str, rows))} (counted from 0)"


def test_the_fingerprint_follows_what_decides_the_rows() -> None:
    beginnings = [list(range(start, start + 20)) for start in range(100, 900, 100)]
    alike = [Example([*some, i, 1], [IGNORE] * 20 + [1, IGNORE]) for some in beginnings for i in range(6)]

    def fingerprint(micro: int, accumulation: int, processes: int, *, shared: bool) -> dict[str, Any]:
        clusters = prefix_clusters(alike, micro) if shared else None
        order = StepOrder(48, micro, accumulation, seed=1, processes=processes, clusters=clusters)
        return FinetuningSteps(alike, order, share=DataShare(0, processes)).fingerprint()

    same = [fingerprint(*split, shared=False) for split in ((1, 12, 1), (3, 2, 2), (4, 1, 3), (12, 1, 1))]
    assert same == same[:1] * 4
    assert fingerprint(3, 4, 1, shared=True) == fingerprint(3, 1, 4, shared=True)
    # 3 + 3 and 4 + 2 rows that stay together: as many runs, another order
    assert fingerprint(3, 4, 1, shared=True) != fingerprint(4, 3, 1, shared=True)
    assert fingerprint(3, 4, 1, shared=True) != fingerprint(3, 4, 1, shared=False)


@given(batches=st.integers(0, 12), processes=st.integers(1, 5))
def test_an_evaluation_is_shared_out_and_nothing_of_others_is_made(batches: int, processes: int) -> None:
    made: list[list[int]] = []
    counts = set()
    for rank in range(processes):
        own: list[int] = []

        def make(number: int, own: list[int] = own) -> Batch:
            own.append(number)
            return Batch(torch.zeros(1, 1), torch.zeros(1, 1), ((1,),), rows=1, row_tokens=1, label_tokens=1)

        given_out = list(share_out(LazyBatches(batches, make), DataShare(rank, processes)))
        assert sum(batch.rows for batch in given_out) == len(own)
        counts.add(len(given_out))
        made.append(own)
    assert counts == {math.ceil(batches / processes)}
    assert sorted(chain.from_iterable(made)) == list(range(batches))


def test_evaluation_batches_are_a_sequence_of_all_rows() -> None:
    batches = packed_batches([example(i) for i in range(7)], 3, share_prefixes=False)
    assert [batch.rows for batch in batches] == [3, 3, 1]
    assert [batches[number].rows for number in range(len(batches))] == [3, 3, 1]
    with pytest.raises(IndexError, match="batch 3 of 3"):
        batches[3]


def test_gradients_of_all_processes_add_up_to_those_of_one() -> None:
    model = LlamaForCausalLM(
        LlamaConfig.from_dict(
            {
                "model_type": "llama",
                "vocab_size": 64,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            }
        )
    )
    model.init_weights(0)

    def gradients(batches: list[Batch]) -> list[Tensor]:
        model.zero_grad()
        for batch in batches:
            hidden = model.hidden_states(batch.input_ids, attention=batch.attention())
            linear_cross_entropy(hidden, model.lm_head.weight, batch.labels).loss.backward()
        found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        assert len(found) == len(list(model.parameters())), "an empty batch too gives every parameter a gradient"
        return found

    expected = gradients(finetuning(11, 2, 8, DataShare())(0))
    shares = [gradients(finetuning(11, 2, 2, DataShare(rank, 4))(0)) for rank in range(4)]
    only_empty = gradients([Batch.empty()])
    assert not any(gradient.any() for gradient in only_empty)
    for whole, *parts in zip(expected, *shares, strict=True):
        torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-5, atol=1e-6)

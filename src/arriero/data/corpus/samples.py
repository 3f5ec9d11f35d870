"""The two ways to make samples of a corpus: its documents as a stream that is cut, or packed whole."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from arriero.data.corpus import best_fit, index_bounds, sample_index
from arriero.data.corpus.index_cache import Arrays, IndexCache
from arriero.data.corpus.token_files import TokenCorpus
from arriero.errors import DataError

Pieces = tuple[NDArray[Any], NDArray[Any]]


class Samples(Protocol):
    """Samples of one corpus in the order in which they are visited."""

    corpus: TokenCorpus

    def __len__(self) -> int: ...

    def pieces(self, index: int) -> Pieces:
        """Of each piece of a document in sample `index`: the place of its first token in the corpus, and its tokens."""

    def description(self) -> dict[str, Any]:
        """Everything that decides which tokens each sample holds, as JSON values."""


class StreamSamples:
    """Documents end to end, cut every `sequence_length` tokens: see `sample_index`."""

    def __init__(self, corpus: TokenCorpus, arrays: Arrays, description: dict[str, Any]) -> None:
        self.corpus, self.arrays, self._description = corpus, arrays, description

    def __len__(self) -> int:
        return len(self.arrays["shuffle_idx"])

    def pieces(self, index: int) -> Pieces:
        sample = int(self.arrays["shuffle_idx"][index])
        (first, begin), (last, end) = self.arrays["sample_idx"][sample : sample + 2].tolist()
        documents = self.arrays["doc_idx"][first : last + 1]
        starts, lengths = self.corpus.offsets[documents], self.corpus.lengths[documents]
        lengths[-1] = end + 1  # the last token is the first of the next sample
        starts[0] += begin
        lengths[0] -= begin
        return starts, lengths

    def description(self) -> dict[str, Any]:
        return self._description


class PackedSamples:
    """Whole documents, packed: see `best_fit`."""

    def __init__(self, corpus: TokenCorpus, packs: Arrays, order: Arrays, description: dict[str, Any]) -> None:
        self.corpus, self.packs, self.order, self._description = corpus, packs, order, description

    def __len__(self) -> int:
        return len(self.order["shuffle_idx"])

    def pieces(self, index: int) -> Pieces:
        sample = int(self.order["shuffle_idx"][index])
        first, stop = self.packs["sample_pieces"][sample : sample + 2].tolist()
        return self.packs["piece_start"][first:stop], self.packs["piece_length"][first:stop]

    def description(self) -> dict[str, Any]:
        return self._description


def stream_samples(
    corpus: TokenCorpus,
    documents: range,
    sequence_length: int,
    samples: int,
    seed: int,
    document_order: str,
    cache: IndexCache,
    where: str,
) -> StreamSamples:
    """At least `samples` samples of sequence_length + 1 tokens.

    Raises:
        DataError: if the documents do not fill one.
    """
    tokens = corpus.tokens_in(documents)
    plan = sample_index.plan_epochs(tokens, sequence_length, samples, where)
    description = {
        "kind": "samples of a stream",
        "algorithm": sample_index.ALGORITHM,
        "corpus": corpus.fingerprint,
        "documents": [documents.start, documents.stop],
        "sequence_length": sequence_length,
        "seed": seed,
        "document_order": document_order,
        "epochs": plan.epochs,
        "separate_last_epoch": plan.separate_last_epoch,
    }

    def build() -> Arrays:
        cache.report(
            f"{where}: indexing {plan.samples:,} samples of {sequence_length:,} tokens "
            f"({len(documents):,} documents, {tokens:,} tokens, {plan.epochs:,} epochs)"
        )
        return sample_index.build_sample_indexes(corpus.lengths, documents, sequence_length, plan, seed, document_order)

    def check(arrays: Arrays) -> None:
        index_bounds.check_stream(arrays, documents, corpus.lengths, plan.epochs, plan.samples)

    return StreamSamples(corpus, cache.get(description, build, where, check), description)


def best_fit_packs(
    corpus: TokenCorpus, documents: range, sequence_length: int, cache: IndexCache, where: str
) -> tuple[Arrays, dict[str, Any]]:
    """The packs of `best_fit.pack_best_fit` with room for sequence_length + 1 tokens, and what decides them.

    Raises:
        DataError: if there are fewer than two tokens: nothing to predict.
    """
    tokens = corpus.tokens_in(documents)
    if tokens < 2:
        raise DataError(f"{where}: {tokens} tokens leave nothing to predict: use more documents")
    description = {
        "kind": "best-fit packs",
        "algorithm": best_fit.ALGORITHM,
        "corpus": corpus.fingerprint,
        "documents": [documents.start, documents.stop],
        "sequence_length": sequence_length,
    }

    def build() -> Arrays:
        part = slice(documents.start, documents.stop)
        packs = best_fit.pack_best_fit(corpus.lengths[part], corpus.offsets[part], sequence_length + 1)
        room = (len(packs["sample_pieces"]) - 1) * (sequence_length + 1)
        cache.report(
            f"{where}: packed {len(documents):,} documents into {room // (sequence_length + 1):,} samples of "
            f"{sequence_length:,} tokens, {1 - tokens / room:.2%} padding"
        )
        return packs

    def check(arrays: Arrays) -> None:
        index_bounds.check_packs(arrays, len(corpus.tokens), sequence_length + 1)

    return cache.get(description, build, where, check), description


def packed_samples(
    corpus: TokenCorpus,
    packs: Arrays,
    description: dict[str, Any],
    samples: int,
    seed: int,
    cache: IndexCache,
    where: str,
) -> PackedSamples:
    """At least `samples` samples: the packs in a new shuffled order every epoch, drawn from `RandomState(seed)`."""
    count = len(packs["sample_pieces"]) - 1
    epochs = max(1, -(-samples // count))
    order = {"kind": "order of packs", "packs": count, "epochs": epochs, "seed": seed}

    def build() -> Arrays:
        rng = np.random.RandomState(seed)
        shuffled = np.tile(np.arange(count, dtype=sample_index.shuffle_dtype(count)), epochs)
        for epoch in range(epochs):
            rng.shuffle(shuffled[epoch * count : (epoch + 1) * count])
        return {"shuffle_idx": shuffled}

    def check(arrays: Arrays) -> None:
        index_bounds.check_order(arrays, count, count * epochs)

    # the order of more epochs begins with that of fewer: their number decides no sample
    return PackedSamples(corpus, packs, cache.get(order, build, where, check), {**description, "seed": seed})

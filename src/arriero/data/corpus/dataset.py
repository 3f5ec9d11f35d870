"""A corpus as samples for pre-training: sample i is a pure function of what `CorpusDataset.fingerprint` lists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.config.pretraining import CorpusOptions
from arriero.data.corpus.blend import blend_schedule, samples_per_corpus
from arriero.data.corpus.found import find_corpora
from arriero.data.corpus.index_bounds import check_blend
from arriero.data.corpus.index_cache import Arrays, IndexCache, Report, to_stderr
from arriero.data.corpus.sample_index import DOCUMENT_ORDERS, samples_in_epochs
from arriero.data.corpus.samples import Samples, best_fit_packs, packed_samples, stream_samples
from arriero.data.corpus.split import SPLITS, check_not_empty, split_documents
from arriero.data.corpus.token_files import TokenCorpus, open_corpus
from arriero.data.corpus.token_ids import check_token_ids, foreign_id
from arriero.data.sft import IGNORE
from arriero.errors import ConfigError, DataError

PADDING_ID = 0  # in every vocabulary; nothing is learned from it
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Epochs:
    """A number of samples given as passes over the documents, also a fraction of one."""

    number: float


@dataclass(frozen=True)
class CorpusSample:
    """One row.

    Attributes:
        input_ids: (S,) int64.
        labels: (S,) int64, the token to predict at each position (already shifted), -100 at padding. The last token of
            a document predicts the first one of the next, as in the seed: after an end-of-text token that is how a
            document begins. It is so with `--reset_attention_mask` too (and in Megatron-LM unless `--eod-mask-loss`).
        document_lengths: tokens of each document's part among the inputs; they sum to S. Padding is a part of its own.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    document_lengths: tuple[int, ...]


class CorpusDataset:
    """Samples of one corpus, or of several blended by weight, at random access.

    Everything large is mapped from files, also in the processes of a data loader.

    Args:
        parts: the samples of each corpus.
        weights: its share, normalised.
        schedule: `blend_schedule` of them; None for a single corpus.
        samples: how many samples there are.
        samples_per_epoch: how many there would be in one pass over all documents.
        sequence_length: tokens of a sample, S.
        vocab_size: every id of a sample is below it.
    """

    def __init__(
        self,
        parts: Sequence[Samples],
        weights: Sequence[float],
        schedule: Arrays | None,
        samples: int,
        samples_per_epoch: int,
        sequence_length: int,
        vocab_size: int,
    ) -> None:
        self.parts, self.weights, self.schedule = list(parts), list(weights), schedule
        self.samples, self.samples_per_epoch, self.sequence_length = samples, samples_per_epoch, sequence_length
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> CorpusSample:
        if not 0 <= index < self.samples:
            raise IndexError(f"sample {index} of {self.samples}")
        part, position = 0, index
        if self.schedule is not None:
            part = int(self.schedule["dataset_index"][index])
            position = int(self.schedule["dataset_sample_index"][index])
        samples = self.parts[part]
        starts, lengths = (array.tolist() for array in samples.pieces(position))
        tokens = samples.corpus.tokens
        pieces = [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        ids = np.concatenate(pieces).astype(np.int64)
        # That all ids are in the vocabulary, and what a sample is of, may have been read from a cache that lies.
        if not 0 < len(ids) == sum(lengths) <= self.sequence_length + 1:
            raise DataError(f"{samples.corpus.prefix}: sample {index} is not of its length; delete its index-cache")
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            raise foreign_id(samples.corpus, self.vocab_size)
        return _to_sample(ids, lengths, self.sequence_length)

    def fingerprint(self) -> dict[str, Any]:
        """All that decides which tokens sample i holds, as JSON values: equal fingerprints, equal order.

        Neither paths nor the number of samples are in it: a longer run that needs no more epochs begins alike.
        """
        parts = [
            {"weight": weight, **samples.description()}
            for weight, samples in zip(self.weights, self.parts, strict=True)
        ]
        return {"parts": parts}


def _to_sample(ids: NDArray[np.int64], lengths: list[int], sequence_length: int) -> CorpusSample:
    """A row of up to sequence_length + 1 ids, padded; `lengths` are those of its documents."""
    missing = sequence_length + 1 - len(ids)
    labels = ids[1:].copy()  # a change of one of the two must not reach the other
    if missing:
        labels = np.concatenate((labels, np.full(missing, IGNORE, np.int64)))
        ids = np.concatenate((ids, np.full(missing, PADDING_ID, np.int64)))
        lengths = [*lengths, missing]
    # the last id is a label only
    parts = [*lengths[:-1], lengths[-1] - 1]
    return CorpusSample(ids[:-1], labels, tuple(part for part in parts if part))


def has_documents(options: CorpusOptions, name: str) -> bool:
    """Whether the split leaves the part `name` ("train", "valid", "test") enough of every corpus for one sample.

    Raises:
        ConfigError, DataError: for a corpus that is missing or damaged.
    """
    least = 2 if options.best_fit_packing else options.max_seq_length + 1
    for _, prefix in find_corpora(options.input_dir):
        corpus = open_corpus(prefix, options.data_impl)
        part = split_documents(corpus.documents, options.split_parts())[SPLITS.index(name)]
        if corpus.tokens_in(part) < least:
            return False
    return True


def build_datasets(
    options: CorpusOptions,
    *,
    samples: tuple[int | Epochs | None, int | Epochs | None, int | Epochs | None],
    seed: int,
    vocab_size: int,
    document_order: str = "file",
    report: Report = to_stderr,
) -> dict[str, CorpusDataset]:
    """The data sets "train", "valid" and "test" of the corpora that `--input_dir` names.

    Every process calls this; on one file system, one of them computes the indexes and the others wait for it.

    Args:
        options: corpora, split, sequence length, packing, cache.
        samples: how many of each part, also as `Epochs`; None for a part that is not asked for.
        seed: of all shuffles, 0 .. 2^32 - 1 (`numpy.random.RandomState`).
        vocab_size: every token id must be below it.
        document_order: "file": the documents of a pass follow one another as in the file, and the samples are shuffled
            (the seed); "shuffled": the documents are shuffled as well (later PaddleNLP, Megatron-LM).
        report: called with each line for the user.

    Raises:
        ConfigError: for options that cannot be.
        DataError: for a corpus that is missing, damaged, of another vocabulary, too short, or of too few documents.
    """
    if document_order not in DOCUMENT_ORDERS:
        raise ConfigError(f"document order {document_order!r}: choose one of {', '.join(DOCUMENT_ORDERS)}")
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"--seed is {seed}: the order of a corpus takes seeds from 0 to {MAX_SEED:,}")
    found = find_corpora(options.input_dir)
    corpora = [open_corpus(prefix, options.data_impl) for _, prefix in found]
    weights = [weight for weight, _ in found]
    caches = [IndexCache.beside(corpus.prefix, options.data_cache, report) for corpus in corpora]
    wanted = {name: count for name, count in zip(SPLITS, samples, strict=True) if count is not None}
    ranges = []
    for corpus in corpora:
        ranges.append(split_documents(corpus.documents, options.split_parts()))
        check_not_empty(ranges[-1], list(wanted), options.split, str(corpus.prefix))
    for corpus, cache in zip(corpora, caches, strict=True):
        check_token_ids(corpus, vocab_size, cache)
    builder = _Builder(corpora, weights, caches, options, seed, document_order, vocab_size)
    return {name: builder.build(name, [r[SPLITS.index(name)] for r in ranges], count) for name, count in wanted.items()}


@dataclass(frozen=True)
class _Builder:
    corpora: list[TokenCorpus]
    weights: list[float]
    caches: list[IndexCache]
    options: CorpusOptions
    seed: int
    document_order: str
    vocab_size: int

    def build(self, name: str, documents: list[range], wanted: int | Epochs) -> CorpusDataset:
        """One part of the split from those documents of every corpus."""
        length = self.options.max_seq_length
        where = [f"{corpus.prefix} ({name})" for corpus in self.corpora]
        packs = []
        if self.options.best_fit_packing:
            each = zip(self.corpora, documents, self.caches, where, strict=True)
            packs = [best_fit_packs(corpus, part, length, cache, place) for corpus, part, cache, place in each]
        tokens = [corpus.tokens_in(part) for corpus, part in zip(self.corpora, documents, strict=True)]

        def samples_in(epochs: float) -> int:
            if packs:
                return sum(math.ceil(epochs * (len(pack["sample_pieces"]) - 1)) for pack, _ in packs)
            return sum(samples_in_epochs(count, length, epochs) for count in tokens)

        total = samples_in(wanted.number) if isinstance(wanted, Epochs) else wanted
        shares, schedule = [total], None
        if len(self.corpora) > 1:
            description = {"kind": "blend", "weights": self.weights, "samples": total}
            schedule = self.caches[0].get(
                description,
                lambda: blend_schedule(np.array(self.weights), total),
                f"the blend ({name})",
                lambda arrays: check_blend(arrays, len(self.corpora), total),
            )
            given = np.bincount(schedule["dataset_index"], minlength=len(self.weights)).tolist()
            shares = [max(samples_per_corpus(total, w), used) for w, used in zip(self.weights, given, strict=True)]
        parts: list[Samples] = []
        for i, (corpus, cache, share) in enumerate(zip(self.corpora, self.caches, shares, strict=True)):
            if packs:
                parts.append(packed_samples(corpus, *packs[i], share, self.seed, cache, where[i]))
            else:
                part = documents[i]
                parts.append(
                    stream_samples(corpus, part, length, share, self.seed, self.document_order, cache, where[i])
                )
        return CorpusDataset(parts, self.weights, schedule, total, samples_in(1), length, self.vocab_size)

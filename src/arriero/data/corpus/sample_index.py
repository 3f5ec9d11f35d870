"""Documents end to end as a stream, cut into samples that are visited in a shuffled order.

Three arrays decide it, as in Megatron-LM's GPT data set and PaddleNLP after it:

- `doc_idx`: the documents in the order of the stream, once an epoch.
- `sample_idx`: where each sample begins, as (position in `doc_idx`, token within that document). A sample is
  sequence_length + 1 tokens and shares its last token with the next one: inputs and labels.
- `shuffle_idx`: the order in which samples are visited.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.errors import DataError

# what the arrays hold for the same description; raise it with any change, so that old caches are not used
ALGORITHM = 1
DOCUMENT_ORDERS = ("file", "shuffled")

# documents, and samples, taken at once: the temporary memory stays below about 100 MB
CHUNK = 1 << 20


@dataclass(frozen=True)
class EpochPlan:
    """How often the documents are read for a number of samples.

    Attributes:
        epochs: passes over the documents.
        separate_last_epoch: the last pass is shuffled on its own, because less than 80 % of it will be used: else a sample
            of the earlier passes would wait behind many of the last one and might never be seen.
        tokens: tokens of one pass.
        samples: samples in all passes; the first ones in shuffled order are those asked for.
        separated: first sample of the last pass if it is separate, else `samples`.
    """

    epochs: int
    separate_last_epoch: bool
    tokens: int
    samples: int
    separated: int


def samples_in_epochs(tokens: int, sequence_length: int, epochs: float) -> int:
    """Samples of sequence_length + 1 tokens in `epochs` passes over `tokens` tokens (neighbours share one token)."""
    return max(0, (int(epochs * tokens) - 1) // sequence_length)


def plan_epochs(tokens: int, sequence_length: int, samples: int, where: str = "the corpus") -> EpochPlan:
    """The least number of passes over `tokens` tokens that gives `samples` samples, and how they are shuffled.

    Raises:
        DataError: if one pass does not fill a single sample.
    """
    if tokens < sequence_length + 1:
        raise DataError(
            f"{where}: {tokens:,} tokens do not fill one sample of {sequence_length:,} + 1: "
            f"lower --max_seq_length to at most {max(tokens - 1, 0):,} or use more documents"
        )
    # the least e with (e * tokens - 1) // sequence_length >= samples
    epochs = max(1, -(-(samples * sequence_length + 1) // tokens))
    total = (epochs * tokens - 1) // sequence_length
    before_last = ((epochs - 1) * tokens - 1) // sequence_length
    per_epoch = (tokens - 1) // sequence_length
    separate = epochs > 1 and samples - before_last < int(0.80 * per_epoch)
    return EpochPlan(epochs, separate, tokens, total, before_last if separate else total)


def position_dtype(count: int) -> np.dtype[Any]:
    """int32 where every number below `count` fits, else int64 (the seed has int32 only and would overflow)."""
    return np.dtype(np.int32 if count <= np.iinfo(np.int32).max else np.int64)


def shuffle_dtype(samples: int) -> np.dtype[Any]:
    """uint32, and int64 from 2^32 - 2 samples on."""
    return np.dtype(np.int64 if samples >= np.iinfo(np.uint32).max - 1 else np.uint32)


def build_document_index(
    documents: range, plan: EpochPlan, rng: np.random.RandomState, document_order: str
) -> NDArray[Any]:
    """(epochs * documents,) document numbers: the passes one after the other, or shuffled (the last apart if separate)."""
    dtype = position_dtype(documents.stop)
    once = np.arange(documents.start, documents.stop, dtype=dtype)
    index = np.tile(once, plan.epochs)
    if document_order == "shuffled":
        last = len(index) - len(once) if plan.separate_last_epoch else len(index)
        rng.shuffle(index[:last])
        if plan.separate_last_epoch:
            rng.shuffle(index[last:])
    return index


def build_sample_index(
    lengths: NDArray[Any], document_index: NDArray[Any], sequence_length: int, samples: int, chunk: int = CHUNK
) -> NDArray[Any]:
    """(samples + 1, 2): position in `document_index` and token within that document at which each sample begins.

    Sample k begins at token k * sequence_length of the stream, in the document whose end is the first beyond that token:
    a binary search in the cumulative lengths. Both sides are taken in chunks.

    Args:
        lengths: tokens of every document of the corpus, by document number.
        document_index: document numbers in the order of the stream.
        samples: how many samples; samples * sequence_length must be less than the tokens of the stream.
        chunk: documents and samples taken at once.
    """
    index = np.empty((samples + 1, 2), position_dtype(len(document_index)))
    done, before = 0, 0
    for start in range(0, len(document_index), chunk):
        tokens = lengths[document_index[start : start + chunk]].astype(np.int64)
        ends = before + np.cumsum(tokens)
        before = int(ends[-1])
        stop = min(samples + 1, -(-before // sequence_length))
        while done < stop:
            upto = min(stop, done + chunk)
            wanted = np.arange(done, upto, dtype=np.int64) * sequence_length
            at = np.searchsorted(ends, wanted, side="right")
            index[done:upto, 0] = at + start
            index[done:upto, 1] = wanted - (ends[at] - tokens[at])
            done = upto
    # empty documents at the very beginning are skipped by the search, not by the written algorithm
    index[0] = 0
    return index


def build_shuffle_index(separated: int, samples: int, rng: np.random.RandomState) -> NDArray[Any]:
    """(samples,) sample numbers: those below `separated` shuffled, then the others shuffled."""
    index = np.arange(samples, dtype=shuffle_dtype(samples))
    rng.shuffle(index[:separated])
    if separated != samples:
        rng.shuffle(index[separated:])
    return index


def build_sample_indexes(
    lengths: NDArray[Any], documents: range, sequence_length: int, plan: EpochPlan, seed: int, document_order: str
) -> dict[str, NDArray[Any]]:
    """The three arrays; `RandomState(seed)` is drawn from in the order doc_idx (once or twice), shuffle_idx (likewise)."""
    rng = np.random.RandomState(seed)
    document_index = build_document_index(documents, plan, rng, document_order)
    sample_index = build_sample_index(lengths, document_index, sequence_length, plan.samples)
    shuffle_index = build_shuffle_index(plan.separated, plan.samples, rng)
    return {"doc_idx": document_index, "sample_idx": sample_index, "shuffle_idx": shuffle_index}

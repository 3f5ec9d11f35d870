"""The order of samples against plain loops written from the published algorithms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arriero.data.corpus import blend
from arriero.data.corpus.best_fit import assign_best_fit, pack_best_fit
from arriero.data.corpus.blend import blend_schedule
from arriero.data.corpus.sample_index import (
    build_sample_index,
    build_sample_indexes,
    plan_epochs,
    position_dtype,
    samples_in_epochs,
    shuffle_dtype,
)
from arriero.data.corpus.split import split_documents

# The written algorithm of the sample index (../shared/reference/paddlenlp.md, 2.5), one step at a time.


def written_order(lengths, documents, sequence, samples, seed, shuffled):
    """(doc_idx, sample_idx, shuffle_idx) as lists."""
    tokens = sum(lengths[d] for d in documents)
    epochs = 1
    while (epochs * tokens - 1) // sequence < samples:
        epochs += 1
    separate = False
    before_last = ((epochs - 1) * tokens - 1) // sequence
    if epochs > 1:
        separate = samples - before_last < int(0.80 * ((tokens - 1) // sequence))
    rng = np.random.RandomState(seed)
    doc_idx = []
    for passes in [epochs - 1, 1] if separate else [epochs]:
        part = np.array(list(documents) * passes, np.int32)
        if shuffled:
            rng.shuffle(part)
        doc_idx += part.tolist()
    stream = [(place, token) for place, d in enumerate(doc_idx) for token in range(lengths[d])]
    total = (epochs * tokens - 1) // sequence
    sample_idx = [(0, 0)] + [stream[k * sequence] for k in range(1, total + 1)]
    shuffle_idx = []
    for part in [range(before_last), range(before_last, total)] if separate else [range(total)]:
        numbers = np.array(part, np.uint32)
        rng.shuffle(numbers)
        shuffle_idx += numbers.tolist()
    return doc_idx, sample_idx, shuffle_idx


corpora = st.lists(st.integers(0, 12), min_size=1, max_size=25).filter(lambda lengths: sum(lengths) >= 2)


@pytest.mark.parametrize("shuffled", [False, True])
@settings(max_examples=150)
@given(
    lengths=corpora,
    first=st.integers(0, 24),
    sequence=st.integers(1, 30),
    samples=st.integers(0, 80),
    seed=st.just(42) | st.integers(0, 2**32 - 1),
    chunk=st.integers(1, 7),
)
@example(lengths=[5, 5], first=0, sequence=5, samples=9, seed=42, chunk=1)  # tokens a multiple of the sequence
@example(lengths=[0, 0, 3, 0, 9], first=0, sequence=2, samples=7, seed=42, chunk=2)  # empty documents first
@example(lengths=[1] * 20, first=0, sequence=3, samples=40, seed=42, chunk=3)
def test_as_the_written_algorithm(shuffled, lengths, first, sequence, samples, seed, chunk):
    documents = range(min(first, len(lengths) - 1), len(lengths))
    tokens = sum(lengths[d] for d in documents)
    if tokens < 2:
        documents, tokens = range(len(lengths)), sum(lengths)
    sequence = min(sequence, tokens - 1)
    expected = written_order(lengths, documents, sequence, samples, seed, shuffled)
    plan = plan_epochs(tokens, sequence, samples)
    found = build_sample_indexes(
        np.array(lengths, np.int32), documents, sequence, plan, seed, "shuffled" if shuffled else "file"
    )
    assert found["doc_idx"].tolist() == expected[0]
    assert [tuple(row) for row in found["sample_idx"].tolist()] == expected[1]
    assert found["shuffle_idx"].tolist() == expected[2]
    assert [found[name].dtype for name in ("doc_idx", "sample_idx", "shuffle_idx")] == [np.int32, np.int32, np.uint32]
    again = build_sample_index(np.array(lengths, np.int32), found["doc_idx"], sequence, plan.samples, chunk)
    assert again.tolist() == found["sample_idx"].tolist()
    assert plan.samples >= samples


@pytest.mark.parametrize("samples", [30, 47, 48, 49, 50, 61, 62, 63, 95])
def test_last_epoch_apart_below_80_percent(samples):
    """16 samples an epoch: the last epoch is apart while fewer than int(0.8 * 15) = 12 of it are used."""
    tokens, sequence = 160, 10
    plan = plan_epochs(tokens, sequence, samples)
    assert plan.epochs == math.ceil((samples * 10 + 1) / 160)
    used = samples - ((plan.epochs - 1) * 160 - 1) // 10
    assert plan.separate_last_epoch == (used < 12)


@given(tokens=st.integers(2, 50), sequence=st.integers(1, 49), epochs=st.integers(1, 9))
def test_samples_of_epochs_need_no_more_epochs(tokens, sequence, epochs):
    sequence = min(sequence, tokens - 1)
    samples = samples_in_epochs(tokens, sequence, epochs)
    plan = plan_epochs(tokens, sequence, samples)
    assert (plan.samples, plan.epochs) == (samples, epochs) or samples_in_epochs(
        tokens, sequence, epochs - 1
    ) == samples


def test_types_at_their_limits():
    assert shuffle_dtype(2**32 - 3) == np.uint32
    assert shuffle_dtype(2**32 - 2) == np.int64
    assert position_dtype(2**31 - 1) == np.int32
    assert position_dtype(2**31) == np.int64


def test_offsets_beyond_32_bits_are_exact():
    """Three documents of 2^31 - 1 tokens: the cumulative lengths do not fit into int32."""
    length = 2**31 - 1
    sequence = 2**30
    index = build_sample_index(np.full(3, length, np.int32), np.arange(3, dtype=np.int32), sequence, 5)
    assert index.tolist() == [list(divmod(k * sequence, length)) for k in range(6)]


# Splitting


@given(documents=st.integers(0, 5000), parts=st.tuples(*[st.integers(0, 1000)] * 3).filter(any))
@example(documents=3, parts=(0, 1, 1))
@example(documents=1, parts=(949, 50, 1))
@example(documents=1000, parts=(949, 50, 1))
def test_split_as_the_written_rule(documents, parts):
    shares = [part / sum(parts) for part in parts]
    index = [0]
    for share in shares:
        index.append(index[-1] + round(share * float(documents)))
    difference = index[-1] - documents
    for i in (1, 2, 3):
        index[i] -= difference
    found = split_documents(documents, parts)
    assert [r.stop for r in found] == [max(0, end) for end in index[1:]]
    assert list(itertools.chain(*found)) == list(range(documents))


def test_split_of_the_seed():
    assert split_documents(1000, (949, 50, 1)) == (range(949), range(949, 999), range(999, 1000))
    # 9.49, 0.5, 0.01 of 10 documents round to 9, 0, 0: what is missing goes to the first part
    assert split_documents(10, (949, 50, 1)) == (range(10), range(10, 10), range(10, 10))


# Blending


def written_blend(weights, samples):
    counts = [0] * len(weights)
    chosen, positions = [], []
    for step in range(samples):
        errors = [weight * float(max(step, 1)) - float(count) for weight, count in zip(weights, counts, strict=True)]
        best = 0
        for corpus in range(1, len(weights)):
            if errors[corpus] > errors[best]:
                best = corpus
        chosen.append(best)
        positions.append(counts[best])
        counts[best] += 1
    return chosen, positions


def normalised(weights):
    total = math.fsum(weights)
    return [weight / total for weight in weights]


@settings(max_examples=40)
@given(
    weights=st.lists(st.floats(1e-4, 1) | st.integers(1, 9).map(float), min_size=1, max_size=8),
    samples=st.integers(0, 3000),
)
def test_blend_as_the_plain_loop(weights, samples):
    weights = normalised(weights)
    found = blend_schedule(np.array(weights), samples)
    assert (found["dataset_index"].tolist(), found["dataset_sample_index"].tolist()) == written_blend(weights, samples)
    assert (found["dataset_index"].dtype, found["dataset_sample_index"].dtype) == (np.int16, np.int64)


@pytest.mark.parametrize(
    "weights",
    [[0.7, 0.3], [0.5, 0.3, 0.2], [1.0] * 10, [0.999998, 1e-6, 1e-6], [1 / k**2 for k in range(1, 31)]],
    ids=["two", "three", "equal", "tiny", "zipf"],
)
def test_long_blend_as_the_plain_loop(weights):
    weights = normalised(weights)
    found = blend_schedule(np.array(weights), 100_000)
    assert found["dataset_index"].tolist() == written_blend(weights, 100_000)[0]


def test_blend_is_right_when_every_guess_is_wrong(monkeypatch):
    """What the chunks begin with is a guess: with none that is any good, the result is the same."""
    monkeypatch.setattr(blend, "WARM_UP", 0)
    monkeypatch.setattr(blend, "_likely_counts", lambda weights, steps: np.zeros((len(weights), len(steps))))
    weights = normalised([0.41, 0.33, 0.17, 0.09])
    assert blend_schedule(np.array(weights), 2000)["dataset_index"].tolist() == written_blend(weights, 2000)[0]


# Packing


def best_fit_one_by_one(sizes, capacity):
    """How full the bins of best-fit decreasing are, sorted: which of equally full ones is taken does not change it."""
    bins = []
    for size in sorted(sizes, reverse=True):
        fitting = [content for content in bins if capacity - sum(content) >= size]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            bins.append([size])
    return sorted(sum(content) for content in bins)


def first_fit_count(sizes, capacity):
    bins = []
    for size in sizes:
        for i, content in enumerate(bins):
            if content + size <= capacity:
                bins[i] += size
                break
        else:
            bins.append(size)
    return len(bins)


@settings(max_examples=500)
@given(capacity=st.integers(2, 40), sizes=st.lists(st.integers(1, 40), max_size=60))
@example(capacity=36, sizes=[1, 1, 2, 4, 4, 5, 6, 27, 28, 29])  # two equally full bins of different content
def test_packing_is_best_fit_decreasing(capacity, sizes):
    sizes = [min(size, capacity) for size in sizes]
    samples = assign_best_fit(np.array(sizes, np.int64), capacity)
    assert sorted(np.bincount(samples, weights=sizes).tolist()) == best_fit_one_by_one(sizes, capacity)


@settings(max_examples=200)
@given(capacity=st.integers(2, 20), lengths=st.lists(st.integers(0, 70), max_size=40), begin=st.integers(0, 1000))
def test_every_token_once_and_no_document_cut_that_fits(capacity, lengths, begin):
    offsets = begin + np.cumsum([0, *lengths])[:-1]
    packs = pack_best_fit(np.array(lengths, np.int32), offsets, capacity)
    starts, sizes, pointers = packs["piece_start"], packs["piece_length"], packs["sample_pieces"]
    tokens = sorted(t for s, n in zip(starts.tolist(), sizes.tolist(), strict=True) for t in range(s, s + n))
    assert tokens == list(range(begin, begin + sum(lengths)))
    assert pointers[0] == 0
    assert pointers[-1] == len(starts)
    for first, stop in itertools.pairwise(pointers.tolist()):
        assert first < stop
        assert sizes[first:stop].sum() <= capacity
    ends = {start + size for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)}
    for offset, length in zip(offsets.tolist(), lengths, strict=True):
        if 0 < length <= capacity:
            assert offset in starts
            assert offset + length in ends
    assert len(starts) == sum(-(-length // capacity) for length in lengths)


@pytest.mark.parametrize("seed", range(4))
def test_packing_wastes_no_more_than_first_fit(seed):
    sizes = np.minimum(np.random.default_rng(seed).lognormal(4, 1, 600).astype(np.int64) + 1, 512)
    packed = int(assign_best_fit(sizes, 512).max()) + 1
    assert packed <= first_fit_count(sizes.tolist(), 512)
    assert packed <= math.ceil(sizes.sum() / 512) * 1.02

"""Corpora as rows: the tokens, labels and document lengths that the written order gives, and what is refused."""

from __future__ import annotations

import gc
import json
import math
import pickle
import shutil
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from arriero.config.pretraining import CorpusOptions
from arriero.data.corpus import token_ids
from arriero.data.corpus.dataset import Epochs, build_datasets, has_documents
from arriero.errors import ArrieroError, ConfigError, DataError

VOCABULARY = 60_000


def write_pair(prefix: Path, documents, dtype=np.uint16) -> Path:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    np.save(f"{prefix}_ids.npy", np.array([i for d in documents for i in d], dtype))
    lens = np.array([len(d) for d in documents], np.int32)
    np.savez(f"{prefix}_idx.npz", lens=lens, docs=np.arange(len(documents) + 1))
    return prefix


def distinct(lengths, first=0):
    """Documents in which every token id occurs once."""
    ends = np.cumsum([first, *lengths])
    return [list(range(a, b)) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]


def random_lengths(count, seed=0, low=1, high=60):
    return np.random.default_rng(seed).integers(low, high, count).tolist()


def build(
    *prefixes, samples=(10, None, None), seed=42, sequence=16, split="949,50,1", vocab=VOCABULARY, order="file", **o
):
    options = CorpusOptions(input_dir=[str(prefix) for prefix in prefixes], max_seq_length=sequence, split=split, **o)
    return build_datasets(
        options, samples=samples, seed=seed, vocab_size=vocab, document_order=order, report=lambda line: None
    )


def written_samples(documents, sequence, samples, seed, shuffled):
    """(tokens, document of each token) of the samples in order, by the written algorithm of the seed."""
    tokens = sum(map(len, documents))
    epochs = math.ceil((samples * sequence + 1) / tokens)
    before_last = ((epochs - 1) * tokens - 1) // sequence
    total = (epochs * tokens - 1) // sequence
    separate = epochs > 1 and samples - before_last < int(0.80 * ((tokens - 1) // sequence))
    rng = np.random.RandomState(seed)
    order = []
    for passes in (epochs - 1, 1) if separate else (epochs,):
        part = np.array(list(range(len(documents))) * passes, np.int32)
        if shuffled:
            rng.shuffle(part)
        order += part.tolist()
    stream = [(place, token) for place, d in enumerate(order) for token in documents[d]]
    visits = []
    for part in (range(before_last), range(before_last, total)) if separate else (range(total),):
        numbers = np.array(part, np.uint32)
        rng.shuffle(numbers)
        visits += numbers.tolist()
    return [stream[k * sequence : (k + 1) * sequence + 1] for k in visits]


def runs(places):
    """Lengths of the runs of equal values."""
    lengths, last = [], object()
    for place in places:
        if place == last:
            lengths[-1] += 1
        else:
            lengths.append(1)
        last = place
    return tuple(lengths)


@pytest.mark.parametrize("order", ["file", "shuffled"])
@pytest.mark.parametrize("samples", [5, 80, 300])
@pytest.mark.parametrize("seed", [42, 7])
def test_rows_of_the_written_order(tmp_path, order, samples, seed):
    documents = distinct(random_lengths(50))
    write_pair(tmp_path / "a", documents)
    found = build(tmp_path / "a", samples=(samples, None, None), seed=seed, split="1", order=order)["train"]
    expected = written_samples(documents, 16, samples, seed, order == "shuffled")
    assert len(found) == samples <= len(expected)
    for row, sample in zip(found, expected, strict=False):
        assert row.input_ids.tolist() == [token for _, token in sample[:-1]]
        assert row.labels.tolist() == [token for _, token in sample[1:]]
        assert row.document_lengths == runs(place for place, _ in sample[:-1])
        assert (row.input_ids.dtype, row.labels.dtype) == (np.int64, np.int64)


def test_parts_hold_their_own_documents(tmp_path):
    documents = distinct(random_lengths(100, low=30))
    write_pair(tmp_path / "a", documents)
    sets = build(tmp_path / "a", samples=(Epochs(1), Epochs(1), 3), split="80,15,5")
    owner = {token: i for i, document in enumerate(documents) for token in document}
    for name, allowed in (("train", range(80)), ("valid", range(80, 95)), ("test", range(95, 100))):
        assert {owner[token] for row in sets[name] for token in row.input_ids.tolist()} <= set(allowed)
    tokens = sum(map(len, documents[:80]))
    assert len(sets["train"]) == (tokens - 1) // 16
    seen = Counter(token for row in sets["train"] for token in row.input_ids.tolist())
    assert set(seen.values()) == {1}
    assert len(seen) == (tokens - 1) // 16 * 16
    assert len(sets["test"]) == 3
    assert set(build(tmp_path / "a", samples=(None, 4, None))) == {"valid"}


def test_epochs_with_fractions(tmp_path):
    write_pair(tmp_path / "a", distinct([100] * 10))
    for epochs, expected in ((1, 62), (2, 124), (2.5, 156), (0.5, 31)):
        assert len(build(tmp_path / "a", samples=(Epochs(epochs), None, None), split="1")["train"]) == expected


def test_samples_per_epoch(tmp_path):
    write_pair(tmp_path / "a", distinct([100] * 10, first=1))
    write_pair(tmp_path / "b", distinct([50] * 10, first=2000))
    for packing in (False, True):
        for prefixes in ([tmp_path / "a"], [tmp_path / "a", tmp_path / "b"]):
            options = {"split": "1", "best_fit_packing": packing}
            asked = build(*prefixes, samples=(7, None, None), **options)["train"]
            whole = build(*prefixes, samples=(Epochs(1), None, None), **options)["train"]
            assert (len(asked), asked.samples_per_epoch) == (7, len(whole))
            assert whole.samples_per_epoch == len(whole)


def test_has_documents(tmp_path):
    """True exactly where a data set of one sample can be built."""
    write_pair(tmp_path / "a", distinct([10] * 40))
    write_pair(tmp_path / "b", distinct([10] * 30))
    for split in ("949,50,1", "10,1,1", "1"):
        for sequence in (5, 35, 1000):
            for packing in (False, True):
                for name, at in (("train", 0), ("valid", 1), ("test", 2)):
                    options = {"split": split, "best_fit_packing": packing}
                    samples = tuple(1 if i == at else None for i in range(3))
                    inputs = [str(tmp_path / "a"), str(tmp_path / "b")]
                    try:
                        built = len(build(*inputs, samples=samples, sequence=sequence, **options)[name]) == 1
                    except DataError:
                        built = False
                    assert (
                        has_documents(CorpusOptions(input_dir=inputs, max_seq_length=sequence, **options), name)
                        == built
                    )


def test_one_token_documents_and_empty_ones(tmp_path):
    write_pair(tmp_path / "a", [[], *([i] for i in range(40)), [], [], [90, 91]])
    row = build(tmp_path / "a", samples=(1, None, None), sequence=41, split="1")["train"][0]
    assert row.input_ids.tolist() == [*range(40), 90]
    assert row.labels.tolist() == [*range(1, 40), 90, 91]
    assert row.document_lengths == (1,) * 41


def test_rows_share_no_memory(tmp_path):
    write_pair(tmp_path / "a", distinct([50] * 10))
    data = build(tmp_path / "a")["train"]
    row = data[0]
    row.labels[:] = -100
    assert (row.input_ids >= 0).all()
    row.input_ids[:] = -1
    assert (data[0].input_ids >= 0).all()
    for index in (-1, 10):
        with pytest.raises(IndexError):
            data[index]


def test_same_rows_from_the_cache_and_in_another_process(tmp_path, monkeypatch):
    write_pair(tmp_path / "a", distinct(random_lengths(60)))
    first = build(tmp_path / "a")["train"]
    monkeypatch.setattr("arriero.data.corpus.sample_index.build_sample_indexes", None)
    monkeypatch.setattr("arriero.data.corpus.token_ids.id_range", None)
    again = build(tmp_path / "a")["train"]
    sent = pickle.loads(pickle.dumps(again))  # noqa: S301
    assert len(pickle.dumps(again)) < 3000
    for other in (again, sent):
        assert other.fingerprint() == first.fingerprint()
        for mine, theirs in zip(first, other, strict=True):
            assert mine.input_ids.tolist() == theirs.input_ids.tolist()


def test_fingerprint(tmp_path):
    documents = distinct(random_lengths(60))
    write_pair(tmp_path / "a", documents)
    base = json.dumps(build(tmp_path / "a")["train"].fingerprint())
    write_pair(tmp_path / "moved" / "b", documents)
    assert json.dumps(build(tmp_path / "moved" / "b")["train"].fingerprint()) == base
    # a longer run without another epoch begins alike
    longer = build(tmp_path / "a", samples=(12, None, None))["train"]
    assert json.dumps(longer.fingerprint()) == base
    write_pair(tmp_path / "c", [*documents[:-1], documents[-1][::-1]])
    others = [
        build(tmp_path / "a", seed=43),
        build(tmp_path / "a", sequence=17),
        build(tmp_path / "a", split="8,1,1"),
        build(tmp_path / "a", samples=(1000, None, None)),
        build(tmp_path / "a", order="shuffled"),
        build(tmp_path / "a", best_fit_packing=True),
        build(tmp_path / "c", split="949,50,1"),
    ]
    assert len({json.dumps(other["train"].fingerprint()) for other in others} | {base}) == 8


def test_a_changed_corpus_is_indexed_anew(tmp_path):
    """The seed reuses the index of the old corpus, since it is named by sample count and length only."""
    write_pair(tmp_path / "a", distinct([40] * 20))
    old = build(tmp_path / "a")["train"][0].input_ids.tolist()
    write_pair(tmp_path / "a", distinct([40] * 20, first=1000))
    new = build(tmp_path / "a")["train"][0].input_ids.tolist()
    assert new == [token + 1000 for token in old]


# Blending


def test_blend_by_weight(tmp_path):
    write_pair(tmp_path / "a", distinct([50] * 40))
    write_pair(tmp_path / "b", distinct([50] * 40, first=10_000))
    write_pair(tmp_path / "c", distinct([50] * 40, first=20_000))
    mixed = build("5", tmp_path / "a", "3", tmp_path / "b", "2", tmp_path / "c", samples=(200, None, None), split="1")
    sources = [int(row.input_ids[0]) // 10_000 for row in mixed["train"]]
    for upto in range(1, 201):
        counts = Counter(sources[:upto])
        assert all(abs(counts[i] - upto * share) <= 1.01 for i, share in enumerate((0.5, 0.3, 0.2)))
    # each corpus gives its own samples in the order it has alone, for the number of samples of the seed's rule
    alone = build(tmp_path / "b", samples=(math.ceil(200 * 0.3 * 1.005) + 20, None, None), split="1")["train"]
    given = [row.input_ids.tolist() for row, source in zip(mixed["train"], sources, strict=True) if source == 1]
    assert given == [alone[i].input_ids.tolist() for i in range(60)]


def test_blend_of_a_folder_and_epochs(tmp_path):
    write_pair(tmp_path / "f" / "a", distinct([33] * 10))
    write_pair(tmp_path / "f" / "b", distinct([33] * 10, first=10_000))
    mixed = build(tmp_path / "f", samples=(Epochs(1), None, None), split="1", sequence=33)["train"]
    assert len(mixed) == 2 * 9
    assert Counter(int(row.input_ids[0]) // 10_000 for row in mixed) == {0: 9, 1: 9}


# Packing


def test_packed_rows(tmp_path):
    lengths = [*random_lengths(80, low=1, high=30), 17, 18, 100]
    documents = distinct(lengths, first=1)
    write_pair(tmp_path / "a", documents)
    data = build(tmp_path / "a", samples=(Epochs(1), None, None), split="1", best_fit_packing=True)["train"]
    pieces = Counter()
    for document in documents:
        for start in range(0, len(document), 17):
            pieces[tuple(document[start : start + 17])] += 1
    tokens = 0
    for row in data:
        real = int((row.input_ids != 0).sum())
        assert (row.input_ids[real:] == 0).all()
        assert sum(row.document_lengths) == len(row.input_ids) == len(row.labels) == 16
        learned = int((row.labels != -100).sum())
        assert (row.labels[:learned] >= 0).all()
        assert (row.labels[learned:] == -100).all()
        ids = [*row.input_ids[:real].tolist(), *row.labels[real - 1 : learned].tolist()]
        assert row.labels[:learned].tolist() == ids[1:]
        tokens += len(ids)
        lengths_here = list(row.document_lengths)
        if real < 16:
            assert lengths_here.pop() == 16 - real
        # the last token of a full row is a label only, of the last document or a document of one token
        if len(ids) == 17 and sum(lengths_here) == 16 and tuple(ids[16:]) in pieces:
            lengths_here.append(1)
        elif len(ids) == 17:
            lengths_here[-1] += 1
        place = 0
        for length in lengths_here:
            piece = tuple(ids[place : place + length])
            assert pieces[piece] > 0, piece
            pieces[piece] -= 1
            place += length
    assert tokens == sum(lengths)
    assert not +pieces
    assert len(data) <= math.ceil(sum(lengths) / 17) * 1.05


def test_packed_epochs_are_shuffled_each_for_itself(tmp_path):
    write_pair(tmp_path / "a", distinct(random_lengths(80), first=1))
    options = {"split": "1", "best_fit_packing": True}
    one = build(tmp_path / "a", samples=(Epochs(1), None, None), **options)["train"]
    three = build(tmp_path / "a", samples=(Epochs(3), None, None), **options)["train"]
    rows = [tuple(row.input_ids.tolist()) for row in three]
    count = len(one)
    assert len(three) == 3 * count
    assert rows[:count] == [tuple(row.input_ids.tolist()) for row in one]
    passes = [rows[i : i + count] for i in (0, count, 2 * count)]
    assert set(passes[0]) == set(passes[1]) == set(passes[2])
    assert passes[0] != passes[1] != passes[2]
    other = build(tmp_path / "a", samples=(Epochs(1), None, None), seed=1, **options)["train"]
    assert [tuple(row.input_ids.tolist()) for row in other] != passes[0]


# Bad input


def refused(*prefixes, kind: type[ArrieroError] = DataError, **options) -> str:
    with pytest.raises(kind) as error:
        build(*prefixes, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_part_without_documents(tmp_path):
    write_pair(tmp_path / "a", distinct([40] * 10))
    message = refused(tmp_path / "a", samples=(5, 5, None))
    assert "--split 949,50,1 leaves no document for the valid part (train 10, valid 0, test 0" in message
    assert str(tmp_path / "a") in message
    assert len(build(tmp_path / "a", samples=(5, None, None))["train"]) == 5


@pytest.mark.parametrize("order", ["file", "shuffled"])
def test_a_sequence_longer_than_the_corpus(tmp_path, order):
    write_pair(tmp_path / "a", distinct([10] * 10))
    message = refused(tmp_path / "a", sequence=100, split="1", order=order)
    assert "100 tokens do not fill one sample of 100 + 1" in message
    assert "lower --max_seq_length to at most 99" in message
    assert len(build(tmp_path / "a", sequence=99, split="1")["train"]) == 10
    packed = build(tmp_path / "a", sequence=1000, split="1", best_fit_packing=True, samples=(1, None, None))["train"][0]
    assert packed.document_lengths == (*[10] * 10, 900)


def test_a_single_token(tmp_path):
    write_pair(tmp_path / "a", [[5]])
    assert "1 tokens do not fill" in refused(tmp_path / "a", split="1")
    assert "nothing to predict" in refused(tmp_path / "a", split="1", best_fit_packing=True)


def test_ids_beyond_the_vocabulary(tmp_path):
    write_pair(tmp_path / "a", distinct([40] * 10))
    for _ in range(2):  # also when the range of the ids is remembered
        assert "token id 300 in document 7 (its token 20)" in refused(tmp_path / "a", vocab=300)
    build(tmp_path / "a", vocab=400)


def test_the_vocabulary_is_checked_once(tmp_path, monkeypatch):
    write_pair(tmp_path / "a", distinct([40] * 10))
    calls = []
    real = token_ids.id_range
    monkeypatch.setattr(token_ids, "id_range", lambda corpus: calls.append(1) or real(corpus))
    for vocab in (400, 500, 400):
        build(tmp_path / "a", vocab=vocab)
    assert calls == [1]


def test_other_refusals(tmp_path):
    write_pair(tmp_path / "a", distinct([40] * 10))
    assert "--seed" in refused(tmp_path / "a", seed=2**32, kind=ConfigError)
    assert "document order" in refused(tmp_path / "a", order="random", kind=ConfigError)
    assert "no corpus there" in refused(tmp_path / "b")
    assert "is empty" in refused(write_pair(tmp_path / "e", []))


def test_read_only_corpus_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ARRIERO_HOME", str(tmp_path / "home"))
    write_pair(tmp_path / "data" / "a", distinct([40] * 10))
    (tmp_path / "data" / "index-cache").write_text("not a folder")
    lines: list[str] = []
    options = CorpusOptions(input_dir=[str(tmp_path / "data" / "a")], max_seq_length=16, split="1")
    data = build_datasets(options, samples=(3, None, None), seed=1, vocab_size=500, report=lines.append)["train"]
    assert len(data) == 3
    assert any("sample indexes are kept in" in line for line in lines)
    assert list((tmp_path / "home" / "index-cache").iterdir())
    shutil.rmtree(tmp_path / "home")
    build(tmp_path / "data" / "a", data_cache=str(tmp_path / "mine"))
    assert list((tmp_path / "mine").iterdir())
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("packing", [False, True])
def test_random_access_holds_no_memory(tmp_path, packing):
    lengths = np.full(2000, 50, np.int32)
    np.save(tmp_path / "a_ids.npy", np.arange(100_000, dtype=np.uint16) % 50_000)
    np.savez(tmp_path / "a_idx.npz", lens=lengths)
    data = build(tmp_path / "a", samples=(Epochs(1), None, None), split="1", sequence=64, best_fit_packing=packing)[
        "train"
    ]
    order = np.random.default_rng(0).integers(0, len(data), 10_000).tolist()
    tracemalloc.start()
    for index in order:  # what Python itself keeps ready for reuse is there after this
        data[index]
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    for index in order:
        data[index]
    gc.collect()
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 10_000  # one byte a row
    assert peak - before < 1_000_000  # the rows together are 10 MB

"""Index caches that somebody changed, with their hashes: nothing of them reaches a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arriero.config.pretraining import CorpusOptions
from arriero.data.corpus.dataset import CorpusDataset, Epochs, build_datasets
from arriero.errors import DataError

Change = Callable[[Any], None]


def distinct(lengths: list[int], first: int = 0) -> list[list[int]]:
    """Documents in which every token id occurs once."""
    ends = np.cumsum([first, *lengths])
    return [list(range(a, b)) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]


def write_pair(prefix: Path, documents: list[list[int]]) -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    np.save(f"{prefix}_ids.npy", np.array([i for d in documents for i in d], np.uint16))
    lens = np.array([len(d) for d in documents], np.int32)
    np.savez(f"{prefix}_idx.npz", lens=lens, docs=np.arange(len(documents) + 1))


def build(prefix: Path, vocab_size: int) -> CorpusDataset:
    options = CorpusOptions(input_dir=[str(prefix)], max_seq_length=16, split="1")
    samples = (Epochs(1), None, None)
    return build_datasets(options, samples=samples, seed=1, vocab_size=vocab_size, report=lambda line: None)["train"]


def forge(folder: Path, name: str, change: Change) -> None:
    """Change an array of the one entry that has it, and its hash with it."""
    (path,) = folder.glob(f"index-cache/*/{name}.npy")
    array = np.load(path)
    change(array)
    np.save(path, array)
    description = path.parent / "description.json"
    stored = json.loads(description.read_text())
    stored["arrays"][name]["sha256"] = hashlib.sha256(array.tobytes()).hexdigest()
    description.write_text(json.dumps(stored))


def put(place: int, value: int) -> Change:
    return lambda array: array.__setitem__(place, value)


FORGERIES: dict[str, list[Change]] = {
    "doc_idx": [put(3, 10**6), put(0, -1), put(0, 20)],  # 20: a document of another part
    "sample_idx": [put(3, -1), put(2, 10**6), put(5, 10**6), put(6, 0)],
    "shuffle_idx": [put(0, 10**6)],
    "dataset_index": [put(0, -1), put(0, 2)],
    "dataset_sample_index": [put(1, -1), put(0, 10**6)],
    "piece_start": [put(0, -1), put(-1, 10**6), put(0, 799)],
    "piece_length": [put(0, 0), put(0, 18)],
    "sample_pieces": [put(0, 1), put(1, 0), put(-1, 10**6)],
    "range": [lambda array: array.__setitem__(slice(None), array[::-1].copy())],
}


@pytest.mark.parametrize(("name", "number"), [(name, i) for name in FORGERIES for i in range(len(FORGERIES[name]))])
def test_an_index_that_does_not_fit_is_built_again(tmp_path: Path, name: str, number: int) -> None:
    names = [tmp_path / "a"]
    if name.startswith("dataset"):
        names.append(tmp_path / "other" / "b")
    for path in names:
        write_pair(path, distinct([40] * 20, first=1))
    packing = name in ("piece_start", "piece_length", "sample_pieces")
    options = CorpusOptions(input_dir=list(map(str, names)), max_seq_length=16, split="9,1", best_fit_packing=packing)

    def rows(report: Callable[[str], Any]) -> list[list[int]]:
        found = build_datasets(options, samples=(40, None, None), seed=1, vocab_size=1000, report=report)
        return [row.input_ids.tolist() for row in found["train"]]

    before = rows(lambda line: None)
    forge(tmp_path, name, FORGERIES[name][number])
    lines: list[str] = []
    assert rows(lines.append) == before
    assert sum("cannot be used" in line and "it is built again" in line for line in lines) == 1
    assert rows(pytest.fail) == before


def refusals(data: CorpusDataset) -> list[str]:
    """What is said of the samples that cannot be had."""
    said = []
    for number in range(len(data)):
        try:
            row = data[number]
        except DataError as error:
            said.append(str(error))
        else:
            assert max(row.input_ids.max(), row.labels.max()) < data.vocab_size
    return said


def test_ids_that_a_forged_range_hid_are_refused_when_they_come(tmp_path: Path) -> None:
    documents = distinct([40] * 20)
    documents[7][3] = 60_000
    write_pair(tmp_path / "a", documents)
    build(tmp_path / "a", 60_001)
    forge(tmp_path, "range", put(1, 800))
    data = build(tmp_path / "a", 1000)
    (said,) = refusals(data)
    assert "token id 60000 in document 7 (its token 3) is outside the vocabulary of 1,000" in said


def test_a_sample_of_another_length_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path / "a", distinct([40] * 20))
    build(tmp_path / "a", 1000)
    forge(tmp_path, "sample_idx", put(9, 23))  # the fifth sample begins a token early: within all bounds
    data = build(tmp_path / "a", 1000)
    (said,) = refusals(data)
    assert "is not of its length; delete its index-cache" in said

"""The final files against NumPy's own writer and Megatron's written layout; the lines a user sees."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest

from arriero.data.corpus import progress, writers
from arriero.data.corpus.admission import CorpusTotals
from arriero.data.corpus.progress import Progress, format_totals
from arriero.data.corpus.sources import Source
from arriero.data.corpus.units import done_bytes


@pytest.fixture(params=[0, 1, 3, 7, 8])
def sizes(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], list[int]]:
    """(tokens of each sentence, sentences of each document), also in files; read four at a time."""
    monkeypatch.setattr(writers, "_CHUNK", 4)
    counts = [1 + number % 3 for number in range(request.param)]
    lens = [3 * number % 11 + 1 for number in range(sum(counts))]
    np.array(lens, "<i4").tofile(tmp_path / "lens")
    np.array(counts, "<i4").tofile(tmp_path / "counts")
    return lens, counts


def test_the_npz_is_what_numpy_writes(sizes: tuple[list[int], list[int]], tmp_path: Path) -> None:
    lens, counts = sizes
    writers.write_index(tmp_path / "ours.npz", "npy", np.dtype("<u2"), tmp_path / "lens", tmp_path / "counts")
    docs = np.array([0, *itertools.accumulate(counts)], np.int64)
    np.savez(tmp_path / "numpy.npz", lens=np.array(lens, np.int32), docs=docs)
    assert (tmp_path / "ours.npz").read_bytes() == (tmp_path / "numpy.npz").read_bytes()


@pytest.mark.parametrize(("dtype", "code"), [("<u2", 8), ("<i4", 4)])
def test_the_idx_has_megatrons_layout(
    dtype: str, code: int, sizes: tuple[list[int], list[int]], tmp_path: Path
) -> None:
    lens, counts = sizes
    writers.write_index(tmp_path / "x.idx", "mmap", np.dtype(dtype), tmp_path / "lens", tmp_path / "counts")
    # As Megatron-LM's _IndexWriter and _sequence_pointers are written: a running address, documents from 0.
    address, pointers = 0, []
    for length in lens:
        pointers.append(address)
        address += length * np.dtype(dtype).itemsize
    docs = [0, *itertools.accumulate(counts)]
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lens), len(docs))
    expected += struct.pack(f"<{len(lens)}i{len(lens)}q{len(docs)}q", *lens, *pointers, *docs)
    assert (tmp_path / "x.idx").read_bytes() == expected


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
@pytest.mark.parametrize("length", [0, 1, 12345, 10**15])
def test_the_header_of_the_ids_leaves_room_for_any_number(dtype: str, length: int, tmp_path: Path) -> None:
    assert len(writers.npy_header(np.dtype(dtype), length)) == writers.NPY_HEADER_BYTES
    if length > 10**6:
        return
    ids = np.arange(length).astype(dtype)
    (tmp_path / "x.npy").write_bytes(bytes(writers.NPY_HEADER_BYTES) + ids.tobytes())
    writers.complete_ids(tmp_path / "x.npy", "npy", np.dtype(dtype), length)
    np.save(tmp_path / "numpy.npy", ids)
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()


def test_lines_come_after_the_interval_and_at_most_one_a_second(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    bar = Progress(1000, 0, log_interval=50, totals=CorpusTotals(read=10, tokens=500, text_bytes=1_000_000))
    for read, seconds in ((30, 2.0), (70, 0.5), (90, 0.5), (200, 0.3), (210, 0.8)):
        now += seconds
        bar.update(10, CorpusTotals(read=read, tokens=500 + read * 10, text_bytes=1_000_000 + read * 10**5))
    bar.close()
    # 30 and 90 are too few documents on, 200 is too soon after the last line.
    assert capsys.readouterr().err.splitlines() == [
        "70 documents | 1,200 tokens | 2.80 MB/s | 280 tokens/s",
        "210 documents | 2,600 tokens | 5.12 MB/s | 512 tokens/s",
    ]


def test_totals_name_the_rules() -> None:
    totals = CorpusTotals(
        documents=4, sentences=8, tokens=100, read=11, empty=1, too_short=2, too_long=3, duplicates=1, shortened=2,
        replaced=1, text_bytes=2_500_000,
    )  # fmt: skip
    assert format_totals(totals) == [
        "4 documents, 8 sentences, 100 tokens out of 2.50 MB of text",
        "on average 25.0 tokens a document, 12.5 a sentence, 2.0 sentences a document",
        "left out of 11 documents read: 1 empty, 2 below --min_doc_length, 3 above --max_doc_length, 1 duplicates",
        "2 documents had runs of one character cut to --max_repeated_len",
        "1 documents had bytes that are no UTF-8 replaced by U+FFFD",
    ]


def test_the_size_of_what_is_done() -> None:
    sources = [Source(Path(), name, "jsonl", pack, 3 * 2**20, 0) for name, pack in (("a", ""), ("b", "gz"), ("c", ""))]
    assert done_bytes(sources, None) == 0
    assert done_bytes(sources, (0, 1)) == 2 * 2**20
    assert done_bytes(sources, (1, 2)) == 3 * 2**20
    assert done_bytes(sources, (2, 9)) == 9 * 2**20

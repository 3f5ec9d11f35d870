"""Corpora written by the formats' own rules are read equal; damaged ones are refused in one line."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from arriero.data.corpus.found import find_corpora
from arriero.data.corpus.token_files import open_corpus
from arriero.data.corpus.token_ids import check_token_ids
from arriero.errors import ArrieroError, ConfigError, DataError

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]]


def write_pair(prefix: Path, documents=DOCUMENTS, dtype=np.uint16, docs=True, save=np.savez) -> Path:
    """PaddleNLP's pair, as its create_pretraining_data.py writes it."""
    np.save(f"{prefix}_ids.npy", np.array([i for d in documents for i in d], dtype))
    arrays = {"lens": np.array([len(d) for d in documents], np.int32)}
    if docs:
        arrays["docs"] = np.arange(len(documents) + 1, dtype=np.int64)
    save(f"{prefix}_idx.npz", **arrays)
    return prefix


def write_megatron(prefix: Path, sentences=DOCUMENTS, ends=None, code=8, modes=b"") -> Path:
    """Megatron-LM's pair from the layout of its _IndexWriter."""
    letter = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 6: "d", 8: "H", 9: "I", 10: "Q"}[code]
    ids = [i for sentence in sentences for i in sentence]
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{len(ids)}{letter}", *ids))
    lengths = [len(sentence) for sentence in sentences]
    pointers, place = [], 0
    for length in lengths:
        pointers.append(place)
        place += length * struct.calcsize(letter)
    ends = list(range(len(sentences) + 1)) if ends is None else ends
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<QQ", len(lengths), len(ends))
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(pointers)}q", *pointers)
    Path(f"{prefix}.idx").write_bytes(index + struct.pack(f"<{len(ends)}q", *ends) + modes)
    return prefix


def documents_of(corpus):
    return [
        corpus.tokens[start : start + length].tolist()
        for start, length in zip(corpus.offsets.tolist(), corpus.lengths.tolist(), strict=True)
    ]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint8, ">u2"])
@pytest.mark.parametrize("docs", [True, False])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npy_pair(tmp_path, dtype, docs, save):
    corpus = open_corpus(write_pair(tmp_path / "a", dtype=dtype, docs=docs, save=save))
    assert documents_of(corpus) == DOCUMENTS
    assert (corpus.data_impl, corpus.documents, corpus.lengths.dtype) == ("npy", 4, np.int32)
    assert corpus.offsets.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        corpus.tokens[0] = 1


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8, 9, 10])
@pytest.mark.parametrize("modes", [b"", bytes(4)])
def test_megatron_pair(tmp_path, code, modes):
    corpus = open_corpus(write_megatron(tmp_path / "a", code=code, modes=modes))
    assert documents_of(corpus) == DOCUMENTS
    assert corpus.data_impl == "mmap"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_older_single_file(tmp_path, save):
    save(
        tmp_path / "a_ids.npz",
        ids=np.array([i for d in DOCUMENTS for i in d], np.uint16),
        lens=np.array([len(d) for d in DOCUMENTS], np.int64),
    )
    assert documents_of(open_corpus(tmp_path / "a")) == DOCUMENTS


@pytest.mark.parametrize("kind", ["npy", "mmap"])
def test_sentences_are_joined_into_documents(tmp_path, kind):
    if kind == "npy":
        write_pair(tmp_path / "a", docs=False)
        lens = np.array([len(d) for d in DOCUMENTS], np.int32)
        np.savez(tmp_path / "a_idx.npz", lens=lens, docs=np.array([0, 2, 2, 4], np.int64))
    else:
        write_megatron(tmp_path / "a", ends=[0, 2, 2, 4])
    assert documents_of(open_corpus(tmp_path / "a")) == [[5, 6, 7, 8], [], [9, 10, 11, 12, 13, 14]]


def test_fingerprint_is_of_the_content(tmp_path):
    first = open_corpus(write_pair(tmp_path / "a")).fingerprint
    assert open_corpus(write_megatron(tmp_path / "b")).fingerprint == first
    changed = [[5, 6, 7], [8], [9, 10, 11, 99], [13, 14]]
    moved = [[5, 6, 7], [8, 9], [10, 11, 12], [13, 14]]
    others = {open_corpus(write_pair(tmp_path / "c", documents)).fingerprint for documents in (changed, moved)}
    assert len(others | {first}) == 3


def test_sent_to_another_process_it_is_mapped_again(tmp_path):
    corpus = open_corpus(write_pair(tmp_path / "a", [[1] * 100_000]))
    sent = pickle.dumps(corpus)
    assert len(sent) < 1000
    assert documents_of(pickle.loads(sent)) == documents_of(corpus)  # noqa: S301


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle ran')",))


def npy_bytes(header: str, content: bytes = b"") -> bytes:
    text = header.encode() + b" " * (118 - len(header) - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


def zip_with(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def damage_npy(prefix: Path, how: str) -> None:
    ids, index = Path(f"{prefix}_ids.npy"), Path(f"{prefix}_idx.npz")
    lens = np.array([3, 1, 4, 2], np.int32)
    match how:
        case "no ids":
            ids.unlink()
        case "no index":
            index.unlink()
        case "sum":
            np.savez(index, lens=lens + 1)
        case "negative":
            np.savez(index, lens=np.array([3, -1, 6, 2], np.int32))
        case "no lens":
            np.savez(index, sizes=lens)
        case "floats":
            np.savez(index, lens=lens.astype(np.float32))
        case "two dimensions":
            np.save(ids, np.zeros((2, 5), np.uint16))
        case "float ids":
            np.save(ids, np.zeros(10, np.float32))
        case "truncated ids":
            ids.write_bytes(ids.read_bytes()[:-3])
        case "not an array":
            ids.write_bytes(b"hello")
        case "empty file":
            ids.write_bytes(b"")
        case "not a zip":
            index.write_bytes(b"PK hello")
        case "truncated zip":
            index.write_bytes(index.read_bytes()[:-40])
        case "pickled ids":
            np.save(ids, np.array([Bomb()] * 10, object), allow_pickle=True)
        case "pickled lens":
            np.savez(index, lens=np.array([Bomb()] * 4, object))
        case "ids header bomb":
            ids.write_bytes(npy_bytes("{'descr': '<u2', 'fortran_order': False, 'shape': (1000000000000,)}"))
        case "lens header bomb":
            zip_with(index, lens=npy_bytes("{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000,)}"))
        case "lens zip bomb":
            header = npy_bytes("{'descr': '<i4', 'fortran_order': False, 'shape': (5000000,)}")
            zip_with(index, lens=header + bytes(20_000_000))
        case "header is code":
            ids.write_bytes(npy_bytes("{'descr': __import__('os').abort(), 'fortran_order': False, 'shape': (1,)}"))
        case "docs beyond":
            np.savez(index, lens=lens, docs=np.array([0, 2, 9]))
        case "docs fall":
            np.savez(index, lens=lens, docs=np.array([0, 3, 1, 4]))
        case "docs empty":
            np.savez(index, lens=lens, docs=np.array([], np.int64))


NPY_DAMAGE = {
    "no ids": "_ids.npy: is missing, half of the pair with a_idx.npz",
    "no index": "_idx.npz: is missing, half of the pair with a_ids.npy",
    "sum": "sum to 14 tokens but a_ids.npy holds 10",
    "negative": "sentence 1 has the length -1",
    "no lens": "holds no array named lens",
    "floats": "integers in one dimension",
    "two dimensions": "integers in one dimension",
    "float ids": "integers in one dimension",
    "truncated ids": "truncated",
    "not an array": "not an array of numpy",
    "empty file": "not an array of numpy",
    "not a zip": "cannot be read",
    "truncated zip": "cannot be read",
    "pickled ids": "pickled objects",
    "pickled lens": "pickled objects",
    "ids header bomb": "is 128 bytes where 1,000,000,000,000 ids need",
    "lens header bomb": "its header promises 1,000,000,000,000 numbers",
    "lens zip bomb": "more than its ids can have",
    "header is code": "not an array of numpy",
    "docs beyond": "do not rise from 0 to its 4 sentences",
    "docs fall": "do not rise from 0 to its 4 sentences",
    "docs empty": "do not rise from 0 to its 4 sentences",
}


def one_line(error: pytest.ExceptionInfo[ArrieroError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("how", NPY_DAMAGE)
def test_damaged_npy_pair(tmp_path, how):
    damage_npy(write_pair(tmp_path / "a"), how)
    with pytest.raises(DataError) as error:
        open_corpus(tmp_path / "a")
    assert NPY_DAMAGE[how] in one_line(error)
    assert str(tmp_path / "a") in str(error.value)


def damage_megatron(prefix: Path, how: str) -> None:
    ids, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    content = bytearray(index.read_bytes())
    match how:
        case "no bin":
            ids.unlink()
        case "no idx":
            index.unlink()
        case "magic":
            content[0] = 0
        case "lazy":
            content[:8] = b"TNTIDX\x00\x00"
        case "version":
            content[9:17] = struct.pack("<Q", 2)
        case "floats":
            content[17] = 6
        case "type":
            content[17] = 99
        case "bomb":
            content[18:26] = struct.pack("<Q", 2**60)
        case "documents bomb":
            content[26:34] = struct.pack("<Q", 2**61)
        case "short header":
            del content[20:]
        case "truncated idx":
            del content[-5:]
        case "negative":
            content[34:42] = struct.pack("<ii", -3, 7)
        case "pointers":
            content[34 + 16 + 8 : 34 + 16 + 16] = struct.pack("<q", 7)
        case "truncated bin":
            ids.write_bytes(ids.read_bytes()[:-4])
        case "half an id":
            ids.write_bytes(ids.read_bytes()[:-1])
        case "longer bin":
            ids.write_bytes(ids.read_bytes() + b"\0\0")
    if index.exists():
        index.write_bytes(bytes(content))


MEGATRON_DAMAGE = {
    "no bin": ".bin: is missing, half of the pair with a.idx",
    "no idx": ".idx: is missing, half of the pair with a.bin",
    "magic": "does not begin with MMIDIDX",
    "lazy": "--data_impl mmap",
    "version": "version 2 is not known",
    "floats": "of type 6",
    "type": "of type 99",
    "bomb": "truncated or damaged",
    "documents bomb": "truncated or damaged",
    "short header": "not the index of a Megatron corpus",
    "truncated idx": "truncated or damaged",
    "negative": "sentence 0 has the length -3",
    "pointers": "the places of the sentences disagree",
    "truncated bin": "sum to 10 tokens but a.bin holds 8",
    "half an id": "more than whole ids",
    "longer bin": "sum to 10 tokens but a.bin holds 11",
}


@pytest.mark.parametrize("how", MEGATRON_DAMAGE)
def test_damaged_megatron_pair(tmp_path, how):
    damage_megatron(write_megatron(tmp_path / "a"), how)
    with pytest.raises(DataError) as error:
        open_corpus(tmp_path / "a")
    assert MEGATRON_DAMAGE[how] in one_line(error)


def test_nothing_there_both_there_empty(tmp_path):
    with pytest.raises(DataError, match="no corpus there"):
        open_corpus(tmp_path / "a")
    write_pair(tmp_path / "a")
    write_megatron(tmp_path / "a")
    with pytest.raises(DataError, match="--data_impl"):
        open_corpus(tmp_path / "a")
    assert open_corpus(tmp_path / "a", "npy").data_impl == "npy"
    assert open_corpus(tmp_path / "a", "mmap").data_impl == "mmap"
    for empty in (write_pair(tmp_path / "e", []), write_megatron(tmp_path / "f", [])):
        with pytest.raises(DataError, match="holds no token"):
            open_corpus(empty)


def test_random_bytes_never_crash(tmp_path):
    """Any change of any byte of an index gives a corpus or a DataError, nothing else."""
    rng = np.random.default_rng(0)
    for write, name in ((write_pair, "a_idx.npz"), (write_pair, "a_ids.npy"), (write_megatron, "a.idx")):
        folder = tmp_path / name
        folder.mkdir()
        write(folder / "a")
        content = (folder / name).read_bytes()
        for _ in range(300):
            changed = bytearray(content)
            changed[rng.integers(len(content))] = rng.integers(256)
            (folder / name).write_bytes(changed)
            with contextlib.suppress(DataError):
                corpus = open_corpus(folder / "a")
                assert int(corpus.lengths.sum()) == len(corpus.tokens) > 0


# Token ids and the vocabulary


@pytest.mark.parametrize(
    ("documents", "dtype", "problem"),
    [
        ([[1, 2], [3, 99, 100]], np.uint16, "token id 99 in document 1 (its token 1)"),
        ([[1, 2], [3], [-1, 4]], np.int32, "token id -1 in document 2 (its token 0)"),
        ([[1], [], [2**40]], np.int64, f"token id {2**40} in document 2"),
    ],
)
def test_foreign_token_ids(tmp_path, documents, dtype, problem):
    corpus = open_corpus(write_pair(tmp_path / "a", documents, dtype))
    with pytest.raises(DataError) as error:
        check_token_ids(corpus, 99)
    assert problem in one_line(error)
    if dtype == np.uint16:
        check_token_ids(corpus, 101)


# What --input_dir names


def names(found):
    return [(round(weight, 12), prefix.name) for weight, prefix in found]


def test_find_corpora(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b", "a", "with blank"):
        write_pair(tmp_path / name)
    folder = tmp_path / "more"
    folder.mkdir()
    write_megatron(folder / "d")
    write_pair(folder / "c")
    (folder / "notes.txt").write_text("not a corpus")
    assert names(find_corpora(["a"])) == [(1, "a")]
    assert names(find_corpora(["a_ids.npy"])) == [(1, "a")]
    assert names(find_corpora(["more"])) == [(0.5, "c"), (0.5, "d")]
    assert names(find_corpora(["a", "b"])) == [(0.5, "a"), (0.5, "b")]
    assert names(find_corpora(["7 a 3 b"])) == [(0.7, "a"), (0.3, "b")]
    assert names(find_corpora(["7", "a", "3", "b"])) == names(find_corpora(["7 a", "3 b"])) == [(0.7, "a"), (0.3, "b")]
    monkeypatch.chdir(folder)
    assert names(find_corpora(["."])) == [(0.5, "c"), (0.5, "d")]
    monkeypatch.chdir(tmp_path)
    assert names(find_corpora(["with blank"])) == [(1, "with blank")]
    assert names(find_corpora(["1 with blank", "3 a"])) == [(0.25, "with blank"), (0.75, "a")]
    assert names(find_corpora(["0.5 a 0.5 more"])) == [(0.5, "a"), (0.25, "c"), (0.25, "d")]


def test_a_corpus_may_be_called_as_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pair(tmp_path / "2024")
    write_pair(tmp_path / "a")
    assert names(find_corpora(["2024"])) == [(1, "2024")]
    assert names(find_corpora(["1 2024 3 a"])) == [(0.25, "2024"), (0.75, "a")]


@pytest.mark.parametrize(
    ("items", "kind", "problem"),
    [
        ([], ConfigError, "is empty"),
        (["0 a 1 b"], ConfigError, "the weight 0 must be a number above 0"),
        (["-1 a 1 b"], ConfigError, "the weight -1 must"),
        (["nan a 1 b"], ConfigError, "the weight nan must"),
        (["inf a 1 b"], ConfigError, "the weight inf must"),
        (["0.7 0.3 b"], ConfigError, "the weight 0.7 has no corpus after it"),
        (["0.7 a 0.3"], ConfigError, "the weight 0.3 has no corpus after it"),
        (["0.7 a b"], ConfigError, "b has no weight"),
        (["a nowhere"], DataError, "nowhere: no corpus there"),
        (["0.5 a 0.5 ./a"], DataError, "twice"),
        (["empty"], DataError, "holds no corpus"),
        (["/nowhere/"], DataError, "no corpus there"),
        (["", " "], ConfigError, "is empty"),
    ],
)
def test_find_corpora_refuses(tmp_path, monkeypatch, items, kind, problem):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_pair(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(kind) as error:
        find_corpora(items)
    assert problem in one_line(error)


def test_header_bomb_takes_no_memory(tmp_path):
    """The promise of 10^12 numbers is checked against the file before anything is allocated for it."""
    import tracemalloc

    for how in ("ids header bomb", "lens header bomb", "lens zip bomb"):
        damage_npy(write_pair(tmp_path / "a"), how)
        tracemalloc.start()
        with pytest.raises(DataError):
            open_corpus(tmp_path / "a")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2_000_000


def test_member_of_a_stored_zip_with_an_extra_field(tmp_path):
    """Ids mapped out of an uncompressed npz begin where its local header says, whatever extra field is there."""
    content = io.BytesIO()
    np.lib.format.write_array(content, np.arange(10, dtype=np.uint16))
    lens = io.BytesIO()
    np.lib.format.write_array(lens, np.array([10], np.int32))
    with zipfile.ZipFile(tmp_path / "a_ids.npz", "w") as archive:
        info = zipfile.ZipInfo("ids.npy")
        info.extra = struct.pack("<HH5s", 0x9999, 5, b"extra")
        archive.writestr(info, content.getvalue())
        archive.writestr("lens.npy", lens.getvalue())
    assert open_corpus(tmp_path / "a").tokens.tolist() == list(range(10))

"""Input files: which are found, and that their units hold every document once."""

from __future__ import annotations

import gzip
import json
import random
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from arriero.data.corpus import units
from arriero.data.corpus.documents import documents_of
from arriero.data.corpus.sources import find_sources
from arriero.data.corpus.units import Share, Unit, line_at, read_units
from arriero.errors import ConfigError, DataError


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 200)
    monkeypatch.setattr(units, "PARQUET_ROWS", 3)


def some_texts(count: int, blank_lines: bool, seed: int = 1) -> list[str]:
    """Texts from 1 character to five units of length."""
    source = random.Random(seed)
    texts = []
    for number in range(count):
        lines = [
            "".join(source.choice("abc é。") for _ in range(source.choice([1, 5, 30, 150, 400]))).strip() or "x"
            for _ in range(source.randint(1, 4))
        ]
        texts.append((f"{number}\n" + ("\n\n" if blank_lines else "\n").join(lines)).strip())
    return texts


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".gz"):
        # Two members: what `cat a.gz b.gz` makes.
        path.write_bytes(gzip.compress(content[:100]) + gzip.compress(content[100:]))
    elif path.name.endswith(".zst"):
        packer = zstandard.ZstdCompressor()
        path.write_bytes(packer.compress(content[:100]) + packer.compress(content[100:]))
    else:
        path.write_bytes(content)


def texts_in(found: list[Unit]) -> list[str]:
    return [text for unit in found for text in documents_of(unit.kind, unit.payload, "text", False)[0]]


def test_a_folder_is_read_by_name_and_to_its_ground(tmp_path: Path) -> None:
    for name in (
        "b.jsonl",
        "a/z.txt",
        "a/c.JSONL.GZ",
        "c.json.gz",
        "d.zst",
        "e.parquet",
        "f.csv",
        "g.tar.gz",
        "README",
    ):
        write(tmp_path / name, b"")
    for name in (".hidden.jsonl", ".cache/x.jsonl"):
        write(tmp_path / name, b"")
    found, others = find_sources(str(tmp_path))
    assert [(source.name, source.kind, source.packing) for source in found] == [
        ("a/c.JSONL.GZ", "jsonl", "gz"),
        ("a/z.txt", "text", ""),
        ("b.jsonl", "jsonl", ""),
        ("c.json.gz", "jsonl", "gz"),
        ("d.zst", "jsonl", "zst"),
        ("e.parquet", "parquet", ""),
    ]
    assert others == ["README", "f.csv", "g.tar.gz"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "no such file or folder"), ("empty", "holds no file of a known kind"), ("x.csv", "of no known kind")],
)
def test_no_input_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.csv").touch()
    with pytest.raises(ConfigError, match=message):
        find_sources(str(tmp_path / name))


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_units_hold_every_document_once_and_in_order(tmp_path: Path, kind: str, end: str, newline: str) -> None:
    texts = some_texts(60, blank_lines=kind == "jsonl")
    if kind == "jsonl":
        content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    else:
        content = "\n \n\n".join(texts)
    write(tmp_path / f"x.{kind}{end}", b"\xef\xbb\xbf" + content.replace("\n", newline).encode())
    sources, _ = find_sources(str(tmp_path))
    found = list(read_units(sources, Share(), "text", "blank_line"))
    assert texts_in(found) == texts
    assert [unit.key for unit in found] == [(0, number) for number in range(len(found))]
    assert len(found) > 20
    # Every unit can be read alone, and shards deal out all units.
    for start in range(len(found)):
        rest = list(read_units(sources, Share(done=(0, start)), "text", "blank_line"))
        assert [(unit.key, unit.payload) for unit in rest] == [(u.key, u.payload) for u in found[start + 1 :]]
    dealt = [list(read_units(sources, Share(3, number), "text", "blank_line")) for number in range(3)]
    assert sorted((unit.key, unit.payload) for part in dealt for unit in part) == [(u.key, u.payload) for u in found]
    if not end:
        assert min(map(len, dealt)) > len(found) // 4
        assert sum(unit.consumed for unit in found) == sources[0].size
    for unit in found:
        before = b"".join(u.payload for u in found[: unit.key[1]] if isinstance(u.payload, bytes))
        assert line_at(sources[0].path, sources[0].packing, unit.offset) == before.count(b"\n") + 1


@pytest.mark.usefixtures("small_units")
def test_parquet_rows(tmp_path: Path) -> None:
    texts = some_texts(20, blank_lines=True)
    columns = {
        "plain": pa.array(texts),
        "large": pa.array(texts, pa.large_string()),
        "coded": pa.array(texts).dictionary_encode(),
        "number": pa.array(range(20)),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=7)
    sources, _ = find_sources(str(tmp_path))
    for column in ("plain", "large", "coded"):
        found = list(read_units(sources, Share(), column, "blank_line"))
        assert texts_in(found) == texts
        assert len(found) >= 7
        rest = list(read_units(sources, Share(done=(0, 1)), column, "blank_line"))
        assert [unit.payload for unit in rest] == [unit.payload for unit in found[2:]]
    with pytest.raises(DataError, match=r"x\.parquet: column 'number' holds int64, not text"):
        list(read_units(sources, Share(), "number", "blank_line"))
    with pytest.raises(DataError, match=r"has no column 'text', only plain, large, coded, number"):
        list(read_units(sources, Share(), "text", "blank_line"))


def test_a_null_in_parquet_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b", None, "c"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: row 2: column 'text' is empty"):
        list(read_units(find_sources(str(tmp_path))[0], Share(), "text", "blank_line"))


def test_bytes_in_parquet_that_are_no_text_are_named(tmp_path: Path) -> None:
    texts = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(struct.pack("<3i", 0, 1, 3)), pa.py_buffer(b"a\xffb")]
    )
    pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: column 'text' holds bytes that are no UTF-8"):
        list(read_units(find_sources(str(tmp_path))[0], Share(), "text", "blank_line"))


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.txt.gz", "x.txt.zst", "x.parquet"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_a_broken_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    content = random.Random(2).randbytes(3000).hex().encode()
    if name.endswith("parquet"):
        table = pa.table({"text": [content.decode()] * 3})
        pq.write_table(table, path, compression="snappy", use_dictionary=False, write_page_checksum=True)
    elif name.endswith("gz"):
        path.write_bytes(gzip.compress(content))
    else:
        path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(content))
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "foreign":
        path.write_bytes(b"These are no packed bytes at all.")
    else:
        path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :])
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        list(read_units(find_sources(str(path))[0], Share(), "text", "blank_line"))


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("name", ["x.jsonl", "x.txt", "x.jsonl.gz", "x.txt.zst"])
def test_a_document_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "DOCUMENT_LIMIT", 3000)
    write(tmp_path / name, b"x" * 20_000)
    with pytest.raises(DataError, match="a document of more than"):
        list(read_units(find_sources(str(tmp_path))[0], Share(), "text", "blank_line"))


def test_a_text_file_can_be_one_unit(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.txt", b"a\n\nb" * number)
    sources, _ = find_sources(str(tmp_path))
    found = list(read_units(sources, Share(), "text", "file"))
    assert [unit.payload for unit in found] == [b"", b"a\n\nb", b"a\n\nba\n\nb"]
    assert {unit.kind for unit in found} == {"file"}

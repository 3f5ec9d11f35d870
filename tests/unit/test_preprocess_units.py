"""Input files: which are found, and that their units hold every document once."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import struct
from pathlib import Path
from typing import Any

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


def test_links_to_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for place in (data / "z" / "in.txt", elsewhere / "deep" / "out.jsonl", elsewhere / ".hidden.txt"):
        write(place, b"")
    (data / "a").symlink_to(data / "z")  # read once, under its own name
    (data / "b").symlink_to(elsewhere)
    (elsewhere / "deep" / "up").symlink_to(data)
    (elsewhere / "deep" / "self").symlink_to(elsewhere / "deep")
    (data / ".c").symlink_to(elsewhere)
    found, others = find_sources(str(data))
    assert [source.name for source in found] == ["b/deep/out.jsonl", "z/in.txt"]
    assert others == []
    (tmp_path / "link").symlink_to(data)
    assert [source.name for source in find_sources(str(tmp_path / "link"))[0]] == ["b/deep/out.jsonl", "z/in.txt"]


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    write(tmp_path / "x.txt", b"a")
    for name in ("pipe.txt", "pipe.json"):
        os.mkfifo(tmp_path / name)
    found, others = find_sources(str(tmp_path))
    assert [source.name for source in found] == ["x.txt"]
    assert others == ["pipe.json (no regular file)", "pipe.txt (no regular file)"]
    with pytest.raises(ConfigError, match="is no regular file"):
        find_sources(str(tmp_path / "pipe.txt"))


JSON_FILES = {
    "lines": ('\n{"text": "a"}\n{"text": "b"}', ""),
    "one": ('{"text": "a"}', ""),
    "marked": ('\ufeff{"text": "a", "n": ' + "7" * 5000 + "}\n", ""),
    "long": (json.dumps({"text": "a" * 3_000_000}), ""),
    "empty": ("", ""),
    "array": (json.dumps([{"text": "a"}]), "one JSON array and not JSON lines"),
    "indented": (json.dumps({"text": "a"}, indent=1), "not JSON lines"),
    "string": ('"text"', "not JSON lines"),
    "foreign": ('{"version": 2}', "JSON without 'text'"),
}


def test_json_files_are_read_if_they_are_json_lines(tmp_path: Path) -> None:
    for name, (content, _) in JSON_FILES.items():
        (tmp_path / f"{name}.json").write_text(content, encoding="utf-8")
    found, others = find_sources(str(tmp_path))
    assert [source.name for source in found] == sorted(
        f"{name}.json" for name, (_, why) in JSON_FILES.items() if not why
    )
    assert others == sorted(f"{name}.json ({why})" for name, (_, why) in JSON_FILES.items() if why)
    rows = [json.loads(line) for line in JSON_FILES["lines"][0].split("\n") if line]
    for path in (tmp_path / "lines.json", tmp_path / "lines.json.gz"):
        write(path, JSON_FILES["lines"][0].encode())
        sources, _ = find_sources(str(path))
        assert texts_in(list(read_units(sources, Share(), "text", "blank_line"))) == [row["text"] for row in rows]
    with pytest.raises(ConfigError, match=r"array\.json: one JSON array and not JSON lines; write one object a line"):
        find_sources(str(tmp_path / "array.json"))
    assert find_sources(str(tmp_path / "foreign.json"))[0]  # given by its name: what it lacks is told when it is read


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


class CountedFile(io.FileIO):
    """Counts the bytes that are read, of all files of its class."""

    read_bytes = 0

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        CountedFile.read_bytes += count
        return count


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_long_document_is_read_twice_and_not_once_a_unit(
    tmp_path: Path, name: str, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"first\n\n" + b"line\n" * 20_000 if name == "x.txt" else b"x" * 100_000
    write(tmp_path / name, content)
    sources, _ = find_sources(str(tmp_path))
    monkeypatch.setattr(Path, "open", lambda path, mode: io.BufferedReader(CountedFile(path), 16))
    monkeypatch.setattr(CountedFile, "read_bytes", 0)
    dealt = [list(read_units(sources, Share(shards, number), "text", "blank_line")) for number in range(shards)]
    found = sorted((unit.key, unit.payload) for part in dealt for unit in part)
    assert b"".join(payload for _, payload in found if isinstance(payload, bytes)) == content
    assert len(found) == -(-len(content) // 200)
    # to find its end, and to take it
    assert CountedFile.read_bytes < (shards + 1.1) * len(content)


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("seed", range(5))
def test_cuts_do_not_depend_on_which_were_sought_before(tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    pieces = [b"x" * source.choice([0, 1, 50, 150, 199, 200, 201, 450]) + source.choice([b"\n", b"\n", b" \n"])]
    pieces += [source.choice([b"\n", b" " * 250 + b"\n", b"y" * source.randint(1, 199) + b"\n"]) for _ in range(200)]
    for name in ("x.txt", "x.jsonl"):
        write(tmp_path / name, b"".join(pieces))
        (found, *_), _ = find_sources(str(tmp_path / name))
        whole = [unit.payload for unit in read_units([found], Share(), "text", "blank_line")]
        alone = [
            next(read_units([found], Share(len(whole), n), "text", "blank_line")).payload for n in range(len(whole))
        ]
        assert alone == whole
        assert b"".join(whole) == b"".join(pieces)


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
@pytest.mark.parametrize("name", ["x.jsonl", "x.txt", "x.jsonl.gz", "x.txt.zst", "x.parquet"])
def test_a_document_without_end_is_refused_before_it_fills_the_memory(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "DOCUMENT_LIMIT", 3000)
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": ["a", "x" * 20_000]}), tmp_path / name)
    else:
        write(tmp_path / name, b"x" * 20_000)
    with pytest.raises(DataError, match="a document of more than"):
        list(read_units(find_sources(str(tmp_path))[0], Share(), "text", "blank_line"))


def test_the_limit_is_the_documented_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "corpus.md").read_text(encoding="utf-8")
    (limit,) = re.findall(r"have up\s+to (\d+) MiB", text)
    assert int(limit) * 2**20 == units.DOCUMENT_LIMIT


def test_a_text_file_can_be_one_unit(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.txt", b"a\n\nb" * number)
    sources, _ = find_sources(str(tmp_path))
    found = list(read_units(sources, Share(), "text", "file"))
    assert [unit.payload for unit in found] == [b"", b"a\n\nb", b"a\n\nba\n\nb"]
    assert {unit.kind for unit in found} == {"file"}

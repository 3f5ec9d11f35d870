"""The GGUF header reader: all value types, and every kind of broken file in one line."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from arriero.errors import FormatError  # noqa: E402
from arriero.formats.gguf.file import GGUFFile  # noqa: E402


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def number(value: int) -> bytes:
    return struct.pack("<I", value)


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + number(kind) + value


def place(name: str, shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0, dims: int | None = None) -> bytes:
    head = text(name) + number(len(shape) if dims is None else dims)
    return head + b"".join(struct.pack("<Q", n) for n in shape) + number(kind) + struct.pack("<Q", offset)


def build(
    entries: list[bytes] | None = None,
    places: list[bytes] | None = None,
    data: bytes = b"\0" * 64,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    magic: bytes = b"GGUF",
) -> bytes:
    entries, places = entries or [], places or []
    tensors, values = counts or (len(places), len(entries))
    head = magic + number(version) + struct.pack("<QQ", tensors, values) + b"".join(entries) + b"".join(places)
    return head + b"\0" * (-len(head) % 32) + data


def test_every_value_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -30000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**62))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "naïve 漢字 🚀")
    writer.add_array("ints", [1, 2, 3])
    writer.add_array("texts", ["a", "", "漢"])
    writer.add_array("flags", [True, False])
    writer.add_array("floats", [0.5, -1.5])
    writer.add_tensor("a.weight", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(tmp_path / "x.gguf") as file:
        assert file.metadata == {
            "general.architecture": "llama",
            "u8": 200,
            "i8": -100,
            "u16": 60000,
            "i16": -30000,
            "u32": 4_000_000_000,
            "i32": -2_000_000_000,
            "u64": 2**63,
            "i64": -(2**62),
            "f32": 0.5,
            "f64": 0.1,
            "yes": True,
            "text": "naïve 漢字 🚀",
            "ints": [1, 2, 3],
            "texts": ["a", "", "漢"],
            "flags": [True, False],
            "floats": [0.5, -1.5],
        }
        assert file.tensors["a.weight"].shape == (2, 3)
        assert file.dequantize("a.weight").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_other_alignment(tmp_path: Path) -> None:
    content = build([entry("general.alignment", 4, number(64))], [place("a"), place("b", offset=64)], b"")
    content += b"\0" * (-len(content) % 64) + struct.pack("<8f", *range(8)) + b"\0" * 32 + struct.pack("<8f", *[7] * 8)
    (tmp_path / "x.gguf").write_bytes(content)
    with GGUFFile(tmp_path / "x.gguf") as file:
        assert file.dequantize("a").tolist() == list(range(8))
        assert file.dequantize("b").tolist() == [7] * 8


def test_version_2(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(build(places=[place("a")], version=2))
    with GGUFFile(tmp_path / "x.gguf") as file:
        assert list(file.tensors) == ["a"]


HUGE = struct.pack("<Q", 2**63 - 1)
ARRAY_OF_STRINGS = number(8) + struct.pack("<Q", 3) + text("a") + text("b")
BROKEN = {
    "empty": (b"", "empty"),
    "one byte": (b"G", "not a GGUF file"),
    "bad magic": (build(magic=b"GGML"), "not a GGUF file"),
    "a safetensors file": (struct.pack("<Q", 2) + b"{}", "not a GGUF file"),
    "only magic": (b"GGUF", "ends after 4"),
    "version 1": (build(version=1), "version 1"),
    "version 99": (build(version=99), "version 99"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + b"\0" * 16, "big-endian"),
    "huge tensor count": (build(counts=(2**62, 0)), "tensors announced"),
    "huge entry count": (build(counts=(0, 2**62)), "metadata entries announced"),
    "more entries than there are": (build([entry("a", 4, number(1))], counts=(0, 50), data=b""), "at byte"),
    "more tensors than there are": (build(places=[place("a")], counts=(50, 0), data=b""), "at byte"),
    "huge key": (build([HUGE + b"abc"]), "a string of"),
    "huge string": (build([entry("a", 8, HUGE)]), "a string of"),
    "string over the end": (build([entry("a", 8, struct.pack("<Q", 5000) + b"xyz")]), "ends after"),
    "key not utf-8": (build([text(b"\xff\xfe") + number(4) + number(1)]), "not UTF-8"),
    "string not utf-8": (build([entry("a", 8, text(b"\xc3"))]), "not UTF-8"),
    "unknown value type": (build([entry("a", 77, b"")]), "unknown value type 77"),
    "boolean of 2": (build([entry("a", 7, b"\2")]), "boolean"),
    "array of booleans of 2": (build([entry("a", 9, number(7) + struct.pack("<Q", 2) + b"\1\2")]), "booleans"),
    "huge array": (build([entry("a", 9, number(4) + HUGE)]), "an array of"),
    "huge array of strings": (build([entry("a", 9, number(8) + struct.pack("<Q", 2**23))]), "ends after"),
    "array over the end": (build([entry("a", 9, number(4) + struct.pack("<Q", 9999))]), "ends after"),
    "array of arrays": (build([entry("a", 9, number(9) + struct.pack("<Q", 1))]), "array of arrays"),
    "array of unknown": (build([entry("a", 9, number(55) + struct.pack("<Q", 1))]), "unknown type 55"),
    "duplicate key": (build([entry("a", 4, number(1)), entry("a", 4, number(2))]), "'a' appears twice"),
    "alignment 0": (build([entry("general.alignment", 4, number(0))]), "general.alignment is 0"),
    "alignment 7": (build([entry("general.alignment", 4, number(7))]), "general.alignment is 7"),
    "alignment 2^31": (build([entry("general.alignment", 4, number(2**31))]), "general.alignment"),
    "alignment a text": (build([entry("general.alignment", 8, text("32"))]), "general.alignment"),
    "0 dimensions": (build(places=[place("a", ())]), "0 dimensions"),
    "5 dimensions": (build(places=[place("a", (1,) * 5)]), "5 dimensions"),
    "absurd dimensions": (build(places=[place("a", (8,), dims=2**31)]), "dimensions"),
    "empty shape": (build(places=[place("a", (0, 8))]), "impossible shape"),
    "huge shape": (build(places=[place("a", (2**63, 2**63, 2**63, 8))]), "lies at"),
    "row no multiple of the block": (build(places=[place("a", (31,), kind=8)]), "impossible shape"),
    "unknown tensor type": (build(places=[place("a", kind=999)]), "unknown type 999"),
    "removed tensor type": (build(places=[place("a", kind=4)]), "unknown type 4"),
    "tensor over the end": (build(places=[place("a", (17,))]), "lies at"),
    "offset over the end": (build(places=[place("a", offset=2**40)]), "lies at"),
    "offset wraps around": (build(places=[place("a", offset=2**64 - 32)]), "lies at"),
    "offset not aligned": (build(places=[place("a", (4,), offset=4)]), "not aligned"),
    "tensors overlap": (build(places=[place("a", (16,)), place("b", offset=32)]), "overlap"),
    "duplicate tensor": (build(places=[place("a"), place("a", offset=32)]), "'a' appears twice"),
    "huge tensor name": (build(places=[place("a" * 600)]), "a string of 600"),
}


@pytest.mark.parametrize(("content", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_file_is_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        GGUFFile(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert words in message
    assert "\n" not in message
    assert len(message) < 400


def test_truncated_anywhere(tmp_path: Path) -> None:
    entries = [entry("general.architecture", 8, text("llama")), entry("a", 9, ARRAY_OF_STRINGS + text("c"))]
    content = build(entries, [place("t", (4, 4))])
    path = tmp_path / "x.gguf"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(FormatError):
            GGUFFile(path)
    path.write_bytes(content)
    GGUFFile(path).close()


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.gguf", tmp_path):
        with pytest.raises(FormatError, match="cannot be read"):
            GGUFFile(path)

"""Reading and writing safetensors: sharding, and every kind of broken file."""

from __future__ import annotations

import json
import struct
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from arriero.errors import FormatError
from arriero.formats.safe_tensors import (
    LazyTensor,
    parse_size,
    read_shapes,
    read_tensors,
    weight_files,
)
from arriero.formats.shared_files import write_tensors


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("5GiB", 5 * 2**30), ("500MB", 5 * 10**8), ("1.5kb", 1500), ("17", 17), ("2 TB", 2 * 10**12)],
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5XB", "0", "1e9", "5GB5", "nan"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(FormatError, match="size"):
        parse_size(text)


def test_write_shards_no_file_over_the_limit(tmp_path: Path) -> None:
    state = {f"layer.{number}.weight": torch.randn(10, number + 1) for number in range(30)}
    files = write_tensors(state, tmp_path, max_shard_size=2000)
    written = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(written) > 5
    assert all(path.stat().st_size <= 2000 for path in written)
    assert all(path.name.endswith(f"-of-{len(written):05d}.safetensors") for path in written)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == files
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in state.values())
    found: dict[str, torch.Tensor] = {}
    for path in written:
        found |= load_file(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_tensor_larger_than_the_limit_gets_its_own_file(tmp_path: Path) -> None:
    state = {"a": torch.zeros(2), "big": torch.zeros(1000), "c": torch.zeros(2)}
    files = write_tensors(state, tmp_path, max_shard_size=1000)
    assert [name for name, file in files.items() if file == files["big"]] == ["big"]


def test_lazy_tensors_are_made_one_at_a_time(tmp_path: Path) -> None:
    made: list[weakref.ref[Any]] = []

    def load() -> torch.Tensor:
        assert all(memory() is None for memory in made)
        array = np.full(100, 2.5, dtype=np.float32)
        made.append(weakref.ref(array))
        return torch.from_numpy(array)

    write_tensors(
        {name: LazyTensor((100,), torch.float32, load) for name in "abc"},
        tmp_path,
        max_shard_size=900,
        dtype=torch.bfloat16,
    )
    assert len(made) == 3
    tensor = load_file(tmp_path / "model-00002-of-00002.safetensors")["c"]
    assert tensor.dtype is torch.bfloat16
    assert torch.equal(tensor, torch.full((100,), 2.5, dtype=torch.bfloat16))


def test_views_and_transposes_are_written_right(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    write_tensors({"row": base[1], "turned": base.t(), "half": base[:, ::2]}, tmp_path, max_shard_size=10**6)
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["row"], base[1])
    assert torch.equal(found["turned"], base.t())
    assert torch.equal(found["half"], base[:, ::2])


def test_tensors_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(5000), "b": torch.randn(7, 9)}, path)
    for _, tensor in read_tensors(path):
        address = tensor.data_ptr()
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
        ranges = [tuple(int(part, 16) for part in line[0].split("-")) for line in lines]
        assert any(low <= address < high for low, high in ranges)


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape if shape is not None else [(end - begin) // 4], "data_offsets": [begin, end]}


BROKEN = {
    "empty": b"",
    "three bytes": b"abc",
    "no header": struct.pack("<Q", 0),
    "header length absurd": struct.pack("<Q", 2**63) + b"{}",
    "header length over the file": struct.pack("<Q", 1000) + b"{}",
    "header length over the cap": struct.pack("<Q", 200 * 2**20) + b"{}",
    "not json": raw(b"\xff\xfe garbage"),
    "json list": raw([1, 2]),
    "truncated data": raw({"a": entry(0, 16)}, b"\0" * 8),
    "surplus data": raw({"a": entry(0, 16)}, b"\0" * 99),
    "shape disagrees": raw({"a": entry(0, 16, [5])}, b"\0" * 16),
    "negative shape": raw({"a": entry(0, 16, [-4])}, b"\0" * 16),
    "huge shape": raw({"a": entry(0, 16, [2**62, 2**62])}, b"\0" * 16),
    "overlap": raw({"a": entry(0, 16), "b": entry(8, 24)}, b"\0" * 24),
    "hole": raw({"a": entry(0, 16), "b": entry(32, 48)}, b"\0" * 48),
    "offsets reversed": raw({"a": entry(16, 0, [4])}, b"\0" * 16),
    "unknown dtype": raw({"a": entry(0, 16, [4], "X99")}, b"\0" * 16),
    "dtype missing": raw({"a": {"shape": [4], "data_offsets": [0, 16]}}, b"\0" * 16),
    "a pickle": b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_broken_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for read in (lambda: list(read_tensors(path)), lambda: read_shapes(path)):
        with pytest.raises(FormatError) as caught:
            read()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"nowhere\.safetensors"):
        list(read_tensors(tmp_path / "nowhere.safetensors"))
    with pytest.raises(FormatError, match="not a model folder"):
        weight_files(tmp_path)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin.*arriero convert"):
        weight_files(tmp_path)


INDEXES = {
    "traversal": {"weight_map": {"a": "../secret.safetensors"}},
    "absolute": {"weight_map": {"a": "/etc/passwd"}},
    "backslash": {"weight_map": {"a": "..\\secret.safetensors"}},
    "subfolder": {"weight_map": {"a": "sub/x.safetensors"}},
    "pickle": {"weight_map": {"a": "pytorch_model.bin"}},
    "absent shard": {"weight_map": {"a": "model-00001-of-00009.safetensors"}},
    "a number": {"weight_map": {"a": 7}},
    "no map": {"metadata": {}},
    "empty map": {"weight_map": {}},
    "map is a list": {"weight_map": ["x.safetensors"]},
    "a list": [1],
}


@pytest.mark.parametrize("index", INDEXES.values(), ids=INDEXES.keys())
def test_bad_index_is_refused(tmp_path: Path, index: Any) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path / "secret.safetensors", folder / "sub" / "x.safetensors", folder / "pytorch_model.bin"):
        save_file({"a": torch.zeros(1)}, place)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"index\.json"):
        weight_files(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xff", b"[" * 100_000], ids=["empty", "cut", "binary", "deep"])
def test_index_that_is_not_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(FormatError, match="not valid JSON"):
        weight_files(tmp_path)

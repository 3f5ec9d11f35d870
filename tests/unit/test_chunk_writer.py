"""Tensors written into files by several threads: the bytes are those of torch, and nothing beside them changes."""

from __future__ import annotations

import errno
import os
import threading
import weakref
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arriero.errors import FormatError
from arriero.formats import chunk_writer, file_chunks
from arriero.formats.checksum import checksum
from arriero.formats.chunk_writer import ChunkWriter, Piece
from arriero.formats.file_chunks import BLOCK
from arriero.formats.gguf.container import TensorToWrite, write_container
from arriero.formats.gguf.tensor_types import F32
from arriero.formats.growing_file import GrowingFile
from arriero.formats.paddle.pdparams_writer import write_pdparams
from arriero.formats.rearranged import in_order, rearranged
from arriero.formats.rope_layout import halves_to_pairs, pairs_view
from arriero.formats.safe_tensors import FileTensor, LazyTensor
from arriero.formats.staging import staged_folder
from arriero.formats.torch_writer import write_torch_file

HUGE = 2**60  # bytes, too many for any page cache
LARGE = 2**20
SHAPE = (192, 200)


def numbers(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)


def of_file(path: Path, tensor: Tensor, start: int) -> FileTensor:
    """A tensor that lies in a file from a byte on."""
    path.write_bytes(os.urandom(start) + raw(tensor) + os.urandom(99))

    def load() -> Tensor:
        content = bytearray(path.read_bytes()[start : start + tensor.nbytes])
        return torch.frombuffer(content, dtype=tensor.dtype).view(tensor.shape)

    return FileTensor(tuple(tensor.shape), tensor.dtype, load, path, start)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def written(path: Path, at: int, value: Any, bytes_in_all: int, nbytes: int, **how: Any) -> tuple[bytes, list[Piece]]:
    """What the file holds where the tensor belongs; all around it must be what was there before."""
    before = os.urandom(at + nbytes + 3 * BLOCK)
    path.write_bytes(before)
    descriptor = os.open(path, os.O_WRONLY)
    try:
        with ChunkWriter(bytes_in_all) as writer:
            pieces = writer.put(descriptor, at, "w", value, nbytes, **how)
            writer.settle()
    finally:
        os.close(descriptor)
    found = path.read_bytes()
    assert found[:at] == before[:at]
    assert found[at + nbytes :] == before[at + nbytes :]
    return found[at : at + nbytes], [piece.result() for piece in pieces]


VIEWS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    # what is given, and what torch makes of it
    "transposed": (lambda t: t.t(), lambda t: t.t()),
    "rows in pairs": (partial(pairs_view, heads=3), partial(halves_to_pairs, heads=3)),
    "part of the columns": (lambda t: t[:, 30:97], lambda t: t[:, 30:97]),
    "part of the transposed": (lambda t: t.t()[50:130], lambda t: t.t()[50:130]),
}


@pytest.mark.parametrize("bytes_in_all", [0, HUGE], ids=["through the cache", "past the cache"])
@pytest.mark.parametrize(("start", "at"), [(0, 0), (136, 77), (BLOCK, 2 * BLOCK), (4098, 12), (7, 4095)])
def test_the_bytes_are_those_of_torch(
    tmp_path: Path, bytes_in_all: int, start: int, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_writer, "_CHUNK", 2 * BLOCK)
    tensor = numbers()
    stored = of_file(tmp_path / "source", tensor, start)
    target = tmp_path / "target"
    for value in (stored, tensor, LazyTensor(SHAPE, tensor.dtype, lambda: tensor)):
        found, _ = written(target, at, value, bytes_in_all, tensor.nbytes)
        assert found == raw(tensor)
        found, _ = written(target, at, value, bytes_in_all, 2 * tensor.nbytes, dtype=torch.float32)
        assert found == raw(tensor.float())
    for view, make in VIEWS.values():
        wanted = make(tensor).contiguous()
        for base in (stored, tensor):
            value = rearranged(base, tuple(wanted.shape), view)
            assert torch.equal(value.load(), wanted)
            assert written(target, at, value, bytes_in_all, wanted.nbytes)[0] == raw(wanted)
            found, pieces = written(
                target, at, value, bytes_in_all, 2 * wanted.nbytes, dtype=torch.float32, checksum=True
            )
            assert found == raw(wanted.float())
            assert checksum(pieces) == zlib.crc32(found)
    found, pieces = written(target, at, stored, bytes_in_all, tensor.nbytes, checksum=True)
    assert found == raw(tensor)
    assert len(pieces) > 3
    assert checksum(pieces) == zlib.crc32(found)
    packed, _ = written(target, at, stored, bytes_in_all, 192, pack=lambda rows: np.full(len(rows), 7, np.uint8))
    assert packed == b"\7" * 192


@pytest.mark.parametrize("bytes_in_all", [0, HUGE])
def test_many_tensors_in_turn(tmp_path: Path, bytes_in_all: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than may be in the writing at once, of several files, some of them twice; memory is used again."""
    monkeypatch.setattr(chunk_writer, "_IN_WORK", 200_000)
    monkeypatch.setattr(chunk_writer, "_CHUNK", 4 * BLOCK)
    values, wanted = [], []
    for number in range(12):
        tensor = torch.randn(SHAPE[0], 100 + 50 * (number % 3)).half()
        stored = of_file(tmp_path / f"s{number}", tensor, 8 * number)
        for value in (stored, rearranged(stored, tuple(tensor.t().shape), Tensor.t), tensor):
            values.append(value)
            wanted.append(raw(value.load() if isinstance(value, LazyTensor) else value))
    with (tmp_path / "target").open("wb", buffering=0) as file, ChunkWriter(bytes_in_all) as writer:
        growing = GrowingFile(file.fileno(), writer)
        with writer.filling():
            for value, content in zip(values, wanted, strict=True):
                growing.write(b"between")
                growing.put("w", value, len(content))
    assert (tmp_path / "target").read_bytes() == b"".join(b"between" + content for content in wanted)


@pytest.mark.parametrize("refused", ["direct", "direct target", "copy_file_range", "posix_fallocate"])
def test_what_a_file_system_cannot_is_done_otherwise(
    tmp_path: Path, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, asked = os.open, []

    def refuse(path: Any, flags: int = 0, *rest: Any, **more: Any) -> int:
        if refused.startswith("direct") and not (
            flags & os.O_DIRECT and ("target" not in refused or flags & os.O_WRONLY)
        ):
            return opened(path, flags, *rest, **more)
        asked.append(path)
        raise OSError(errno.EINVAL, "not here")

    monkeypatch.setattr(os, "open" if refused.startswith("direct") else refused, refuse)
    tensor = numbers()
    stored = of_file(tmp_path / "source", tensor, 64)
    for value in (stored, rearranged(stored, (200, 192), Tensor.t)):
        bytes_in_all = HUGE if refused.startswith("direct") else 0
        assert written(tmp_path / "target", 100, value, bytes_in_all, tensor.nbytes)[0] == raw(value.load())
    assert asked


@pytest.mark.parametrize("bytes_in_all", [0, HUGE])
def test_a_source_that_is_too_short_is_an_error(tmp_path: Path, bytes_in_all: int) -> None:
    stored = of_file(tmp_path / "source", numbers(), 8)
    os.truncate(tmp_path / "source", 50_000)
    for checked in (False, True):
        with pytest.raises(OSError, match="became shorter"):
            written(tmp_path / "target", 0, stored, bytes_in_all, numbers().nbytes, checksum=checked)


@pytest.mark.parametrize("bytes_in_all", [0, HUGE])
@pytest.mark.parametrize("function", ["pwrite", "posix_fallocate"])
def test_a_full_disk_is_an_error(
    tmp_path: Path, bytes_in_all: int, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, function, full)
    with pytest.raises(OSError, match="full"):
        written(tmp_path / "target", 0, numbers(), bytes_in_all, numbers().nbytes)


def test_nothing_is_kept_of_what_was_written(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb", buffering=0) as file, ChunkWriter(0) as writer:
        tensor = torch.zeros(LARGE)
        gone = weakref.ref(tensor)
        writer.put(file.fileno(), 0, "w", tensor)
        del tensor
        writer.settle()
        assert gone() is None


def test_one_computed_tensor_is_in_memory(tmp_path: Path) -> None:
    made: list[weakref.ref[Tensor]] = []

    def make() -> Tensor:
        assert all(one() is None for one in made)
        tensor = torch.ones(LARGE)
        made.append(weakref.ref(tensor))
        return tensor

    with (tmp_path / "x").open("wb", buffering=0) as file, ChunkWriter(0) as writer:
        for number in range(3):
            value = LazyTensor((LARGE,), torch.float32, make)
            writer.put(file.fileno(), number * 4 * LARGE, "w", value)
    assert len(made) == 3


def test_after_an_error_nothing_is_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller closes the file then, whose descriptor another one may get."""
    go, at_work = threading.Event(), []

    def slow(descriptor: int, content: memoryview, at: int) -> None:
        at_work.append(at)
        go.wait(10)
        at_work.remove(at)

    monkeypatch.setattr(file_chunks, "write_at", slow)
    monkeypatch.setattr(chunk_writer, "_CHUNK", BLOCK)
    before = threading.active_count()

    def interrupted(descriptor: int, writer: ChunkWriter) -> None:
        with writer.filling():
            writer.put(descriptor, 0, "w", torch.zeros(LARGE))
            threading.Timer(0.1, go.set).start()
            raise KeyboardInterrupt

    with (tmp_path / "x").open("wb", buffering=0) as file, ChunkWriter(0) as writer:
        with pytest.raises(KeyboardInterrupt):
            interrupted(file.fileno(), writer)
        assert at_work == []
    assert threading.active_count() <= before + 1  # the timer's


def torch_file(path: Path, tensors: dict[str, LazyTensor]) -> None:
    with staged_folder(path) as staging:
        write_torch_file(staging / "x.pth", tensors)


def paddle_file(path: Path, tensors: dict[str, LazyTensor]) -> None:
    with staged_folder(path) as staging:
        write_pdparams(staging / "x.pdparams", tensors)


def gguf_file(path: Path, tensors: dict[str, LazyTensor]) -> None:
    write_container(path, {}, [TensorToWrite(name, value.shape, F32, value) for name, value in tensors.items()])


@pytest.mark.parametrize("write", [torch_file, paddle_file, gguf_file])
@pytest.mark.parametrize("kind", ["full", "interrupt"])
def test_a_failed_conversion_leaves_nothing(
    tmp_path: Path, write: Callable[[Path, dict[str, LazyTensor]], None], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up under the threads, or the user interrupts while a tensor is made."""
    expected, message = (FormatError, "the disk is full") if kind == "full" else (KeyboardInterrupt, None)
    original = file_chunks.write_at

    def write_at(to: int, content: memoryview, at: int) -> None:
        if kind == "full" and at > LARGE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(to, content, at)

    def second() -> torch.Tensor:
        if kind == "interrupt":
            raise KeyboardInterrupt
        return torch.ones(1024, 1024)

    monkeypatch.setattr(file_chunks, "write_at", write_at)
    before = threading.active_count()
    tensors = {"a": LazyTensor((1024, 1024), torch.float32, lambda: torch.ones(1024, 1024))}
    tensors["b"] = LazyTensor((1024, 1024), torch.float32, second)
    with pytest.raises(expected, match=message):
        write(tmp_path / "new", tensors)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() <= before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.int8])
def test_numbers_in_order(dtype: torch.dtype) -> None:
    tensor = torch.randint(-100, 100, (70, 6, 130), generator=torch.Generator().manual_seed(0)).to(dtype)
    for view in (tensor, tensor[:, 2].t(), tensor[:, 1:3].transpose(0, 2), tensor[3, 2, ::3], tensor[:, 0, :0].t()):
        made = in_order(view)
        assert made.is_contiguous()
        assert made.dtype == dtype
        assert torch.equal(made, view)


@given(st.lists(st.binary(max_size=300), max_size=6))
def test_checksums_of_runs_make_that_of_all(runs: list[bytes]) -> None:
    assert checksum(Piece(len(run), zlib.crc32(run)) for run in runs) == zlib.crc32(b"".join(runs))

"""A file that is written by a thread while what comes next in it is made."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from arriero.errors import FormatError
from arriero.formats import file_copy, write_behind
from arriero.formats.gguf.container import TensorToWrite, write_container
from arriero.formats.gguf.tensor_types import F32
from arriero.formats.paddle.pdparams_writer import write_pdparams
from arriero.formats.safe_tensors import FileTensor, LazyTensor
from arriero.formats.staging import staged_folder
from arriero.formats.torch_writer import write_torch_file
from arriero.formats.write_behind import WriteBehind, read_ahead

LARGE = 2**20


@pytest.fixture
def descriptor(tmp_path: Path) -> int:
    return os.open(tmp_path / "x", os.O_WRONLY | os.O_CREAT, 0o666)


@pytest.mark.parametrize("piece", [100_000, 2**23])
def test_the_bytes_are_those_of_an_ordinary_file(
    tmp_path: Path, descriptor: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small and large ones in turn, and a place that is written again, as the zip module does."""
    monkeypatch.setattr(write_behind, "_PIECE", piece)
    monkeypatch.setattr(write_behind, "_WRITE_BACK", 300_000)
    random = np.random.default_rng(0)
    with (tmp_path / "expected").open("wb") as ordinary, WriteBehind(descriptor) as file:
        for size in (3, 70_000, 0, 1_000_000, 65_536, 65_537, 20, 2_000_000):
            content = random.integers(0, 256, size, np.uint8).tobytes()
            assert file.write(content) == ordinary.write(content) == size
            assert file.tell() == ordinary.tell()
        for sought in (file, ordinary):
            end = sought.tell()
            assert sought.seek(70_000) == 70_000
            sought.write(b"again")
            sought.seek(end)
            sought.write(b"end")
    os.close(descriptor)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "expected").read_bytes()


def test_it_writes_while_the_caller_goes_on_and_then_makes_it_wait(
    descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One piece is in the writing and one waits; the third has to wait outside."""
    monkeypatch.setattr(write_behind, "_PIECE", LARGE)
    monkeypatch.setattr(write_behind, "_WAITING", 2 * LARGE)
    go, written = threading.Semaphore(0), []

    def slow(to: int, content: memoryview, at: int) -> None:
        go.acquire()
        written.append((threading.current_thread(), at))

    monkeypatch.setattr(write_behind, "write_at", slow)
    file = WriteBehind(descriptor)
    file.write(bytes(LARGE))
    file.write(bytes(LARGE))  # both return although nothing is written
    assert written == []
    third = threading.Thread(target=file.write, args=(bytes(LARGE),))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    go.release()
    third.join(10)
    assert not third.is_alive()
    go.release(2)
    file.settle()
    assert [at for _, at in written] == [0, LARGE, 2 * LARGE]
    assert threading.current_thread() not in [thread for thread, _ in written]
    file.close()
    assert not written[0][0].is_alive()
    os.close(descriptor)


def test_nothing_is_kept_of_what_was_written(descriptor: int) -> None:
    with WriteBehind(descriptor) as file:
        array = np.zeros(LARGE, np.uint8)
        gone = weakref.ref(array)
        file.write(array.data)
        del array
        file.settle()
        assert gone() is None
    os.close(descriptor)


def test_an_error_of_the_thread_is_the_callers(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(to: int, content: memoryview, at: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(write_behind, "write_at", full)
    file = WriteBehind(descriptor)
    file.write(bytes(LARGE))  # returns before it is known
    with pytest.raises(OSError, match="full"):
        file.settle()
    with pytest.raises(OSError, match="full"):
        file.write(bytes(LARGE))
    with pytest.raises(OSError, match="full"):
        file.close()
    os.close(descriptor)


def test_what_is_discarded_is_not_written(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    go, written = threading.Event(), []

    def slow(to: int, content: memoryview, at: int) -> None:
        go.wait(10)
        written.append(at)

    monkeypatch.setattr(write_behind, "write_at", slow)
    monkeypatch.setattr(write_behind, "_PIECE", LARGE)
    before = threading.active_count()
    file = WriteBehind(descriptor)
    file.write(bytes(2 * LARGE))
    threading.Timer(0.1, go.set).start()
    file.discard()
    assert len(written) <= 1
    assert threading.active_count() <= before + 1  # the timer's
    os.close(descriptor)


def torch_file(path: Path, tensors: dict[str, LazyTensor]) -> None:
    with staged_folder(path) as staging:
        write_torch_file(staging / "x.pth", tensors)


def paddle_file(path: Path, tensors: dict[str, LazyTensor]) -> None:
    with staged_folder(path) as staging:
        write_pdparams(staging / "x.pdparams", tensors)


def gguf_file(path: Path, tensors: dict[str, LazyTensor]) -> None:
    write_container(path, {}, [TensorToWrite(name, value.shape, F32, value.load) for name, value in tensors.items()])


@pytest.mark.parametrize("write", [torch_file, paddle_file, gguf_file])
@pytest.mark.parametrize("kind", ["full", "interrupt"])
def test_a_failed_conversion_leaves_nothing(
    tmp_path: Path, write: Callable[[Path, dict[str, LazyTensor]], None], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up under the thread, or the user interrupts while a tensor is made."""
    expected, message = (FormatError, "the disk is full") if kind == "full" else (KeyboardInterrupt, None)
    original = file_copy.write_at

    def write_at(to: int, content: memoryview, at: int) -> None:
        if kind == "full" and at > LARGE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(to, content, at)

    def second() -> torch.Tensor:
        if kind == "interrupt":
            raise KeyboardInterrupt
        return torch.ones(1024, 1024)

    monkeypatch.setattr(write_behind, "write_at", write_at)
    before = threading.active_count()
    tensors = {"a": LazyTensor((1024, 1024), torch.float32, lambda: torch.ones(1024, 1024))}
    tensors["b"] = LazyTensor((1024, 1024), torch.float32, second)
    with pytest.raises(expected, match=message):
        write(tmp_path / "new", tensors)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() <= before


def test_reading_ahead_asks_for_the_tensors_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = tmp_path / "x", []
    path.write_bytes(bytes(1000))
    monkeypatch.setattr(write_behind, "_ADVISE", lambda _, *what: asked.append(what))
    monkeypatch.setattr(write_behind, "_AHEAD", 40)
    tensor = FileTensor((10, 5), torch.bfloat16, lambda: torch.zeros(10, 5), path, 64)
    read_ahead(tensor)
    assert asked == [
        (64, 40, os.POSIX_FADV_WILLNEED),
        (104, 40, os.POSIX_FADV_WILLNEED),
        (144, 20, os.POSIX_FADV_WILLNEED),
    ]
    read_ahead(None)
    read_ahead(torch.zeros(3))
    path.unlink()
    read_ahead(tensor)  # whoever reads it will say so
    assert len(asked) == 3

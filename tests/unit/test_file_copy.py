"""Runs of bytes copied from file to file: what the target holds then is what Python's slices say, and nothing beside moved."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from arriero.formats import file_copy
from arriero.formats.file_copy import FileCopier

HUGE = 2**60  # bytes, too many for any page cache
SIZE = 3 * 2**20
RUNS = [
    (0, 0, SIZE),
    (8, 0, SIZE - 8),
    (0, 4096, SIZE),
    (5000, 136, 2**20 + 1),
    (4095, 8191, 2 * 2**20 + 77),
    (SIZE - 2**20, 1, 2**20),  # to the last byte of the source
    (17, 4096 * 5 + 3, 3000),
    (17, 40, 0),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(os.urandom(SIZE))
    return path


def copied(source: Path, run: tuple[int, int, int], nbytes: int) -> tuple[bool, bytes, bytes]:
    """Whether it was copied, the target as it is, and as it should be."""
    start, at, length = run
    before = os.urandom(at + length + 10_000)
    target = source.with_name("target")
    target.write_bytes(before)
    descriptor = os.open(target, os.O_WRONLY)
    try:
        with FileCopier(nbytes) as copier:
            done = copier.copy(source, start, descriptor, at, length)
    finally:
        os.close(descriptor)
    return done, target.read_bytes(), before[:at] + source.read_bytes()[start : start + length] + before[at + length :]


@pytest.mark.parametrize("chunk", [2**16, file_copy._CHUNK])
@pytest.mark.parametrize("nbytes", [0, HUGE], ids=["through the cache", "past the cache"])
@pytest.mark.parametrize("run", RUNS)
def test_a_run_is_copied(
    source: Path, run: tuple[int, int, int], nbytes: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_copy, "_CHUNK", chunk)
    done, found, wanted = copied(source, run, nbytes)
    assert done
    assert found == wanted


def test_what_cannot_pass_the_cache_goes_through_it(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, refused = os.open, []

    def refuse(path: Any, flags: int, *rest: int, **more: Any) -> int:
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, "not here")
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    done, found, wanted = copied(source, RUNS[3], HUGE)
    assert done
    assert refused
    assert found == wanted


def test_what_the_kernel_cannot_copy_is_left_to_the_caller(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> int:
        raise OSError(errno.EXDEV, "two file systems")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    assert not copied(source, RUNS[3], 0)[0]
    assert not copied(source, RUNS[3], HUGE)[0]


def test_a_source_that_is_too_short_is_left_to_the_caller(source: Path) -> None:
    for nbytes in (0, HUGE):
        assert not copied(source, (SIZE - 2**20, 0, 2 * 2**20), nbytes)[0]


@pytest.mark.parametrize("nbytes", [0, HUGE])
def test_a_full_disk_is_an_error(source: Path, nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite" if nbytes else "copy_file_range", full)
    with pytest.raises(OSError, match="full"):
        copied(source, RUNS[0], nbytes)

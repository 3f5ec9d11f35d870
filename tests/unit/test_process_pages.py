"""The memory of a runtime's session, against what the kernel says of this process."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from arriero.process_pages import drop_pages, enlarge_pages, large_pages, mappings

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel of Linux")
SIZE = 8 << 20


def _smaps(address: int, word: str) -> int:
    """KiB of a kind of the mapping with this address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            start, end = (int(word, 16) for word in first.split("-"))
            inside = start <= address < end
        elif inside and first == f"{word}:":
            return int(line.split()[1])
    raise AssertionError("no such mapping")


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[mmap.mmap, np.ndarray, Path]:
    """A file of ones in a mapping as ONNX Runtime makes it: private, and open for writing."""
    (tmp_path / "model").mkdir()
    file = tmp_path / "model/weights.bin"
    file.write_bytes(b"\1" * SIZE)
    with file.open("rb") as opened:
        memory = mmap.mmap(opened.fileno(), SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return memory, np.frombuffer(memory, np.uint8), file


def test_a_file_that_was_read_takes_no_memory_and_is_read_again(mapped: tuple[mmap.mmap, np.ndarray, Path]) -> None:
    _, values, file = mapped
    assert values.sum() == SIZE
    assert _smaps(values.ctypes.data, "Rss") > SIZE // 2048
    drop_pages(file.parent)
    assert _smaps(values.ctypes.data, "Rss") == 0
    assert values.sum() == SIZE


def test_what_was_written_to_a_mapping_stays(mapped: tuple[mmap.mmap, np.ndarray, Path]) -> None:
    memory, values, file = mapped
    memory[5] = 7
    drop_pages(file.parent)
    assert values[5] == 7
    (own,) = [one.own for one in mappings(counted=True) if one.file == str(file)]
    assert own == _smaps(values.ctypes.data, "Anonymous") << 10 > 0


def test_other_folders_files_stay(mapped: tuple[mmap.mmap, np.ndarray, Path]) -> None:
    _, values, file = mapped
    assert values.sum() == SIZE
    drop_pages(file.parents[1] / "mod")
    assert _smaps(values.ctypes.data, "Rss") > 0


def test_memory_since_keeps_its_numbers_and_takes_no_more() -> None:
    known = large_pages()
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    values = np.frombuffer(memory, np.uint8)
    memory[: SIZE // 2] = b"\3" * (SIZE // 2)
    before = _smaps(values.ctypes.data, "Rss")
    enlarge_pages(large_pages() - known)
    assert int(values.sum()) == 3 * (SIZE // 2)
    assert _smaps(values.ctypes.data, "Rss") <= before + 2048  # the one page that is half full


def test_memory_since_lies_in_huge_pages_where_the_kernel_makes_them() -> None:
    memory, other = (mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2))
    addresses = [np.frombuffer(one, np.uint8).ctypes.data for one in (memory, other)]
    memory[:] = other[:] = b"\3" * SIZE
    try:
        other.madvise(25)  # MADV_COLLAPSE
    except OSError:
        pytest.skip("this kernel does not make huge pages of pages that are there")
    enlarge_pages({page for page in large_pages() if addresses[0] <= page < addresses[0] + SIZE})
    assert _smaps(addresses[0], "AnonHugePages") >= SIZE // 1024 - 4096

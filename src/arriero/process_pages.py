"""The pages of memory that a model's weights lie in: large ones, and none that nobody reads (Linux).

To answer, a model reads all of its weights for each token. The processor looks their addresses up a page at a time, which in
pages of 4 KiB, and a virtual machine above all, costs a tenth of a step; yet memory that programs ask for in the ordinary way
comes in such pages. And of a file whose contents a runtime copied into an order of its own some stays in memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

_MAPPINGS, _COUNTED = Path("/proc/self/maps"), Path("/proc/self/smaps")
HUGE_PAGE = 2 << 20
# Of madvise(2): drop the pages of a range, of which a file's are read again at need; make huge pages of it now (Linux 6.1).
_DONTNEED, _COLLAPSE = 4, 25


@dataclass(frozen=True)
class Mapping:
    """A range of this process's addresses.

    Attributes:
        start, end: addresses.
        access: as "rw-p": read, write, execute, private or shared.
        file: that it shows, or a word in brackets; "" for memory without a name.
        own: bytes of it that are this process's own, as written-to pages of a private file mapping are; 0 if not counted.
    """

    start: int
    end: int
    access: str
    file: str
    own: int


def mappings(counted: bool = False) -> list[Mapping]:
    """Those of this process; none where the system does not tell.

    Args:
        counted: find out `own`, which takes the kernel a look at every page.
    """
    try:
        lines = (_COUNTED if counted else _MAPPINGS).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    found: list[Mapping] = []
    for line in lines:
        first, *words = line.split(maxsplit=5)
        if first == "Anonymous:":
            latest = found.pop()
            found.append(Mapping(latest.start, latest.end, latest.access, latest.file, int(words[0]) << 10))
        elif not first.endswith(":"):
            start, end = (int(word, 16) for word in first.split("-"))
            found.append(Mapping(start, end, words[0], words[4] if len(words) > 4 else "", 0))
    return found


def drop_pages(folder: Path) -> None:
    """Give back what was read of a folder's mapped files; it is read again where it is used again."""
    start = f"{folder.resolve()}/"
    for mapping in mappings(counted=True):
        if mapping.file.startswith(start) and not mapping.own:
            _advise(mapping.start, mapping.end, _DONTNEED)


def enlarge_pages(pages: Set[int]) -> None:
    """Move what lies in these `large_pages` to huge pages; no effect where the system refuses it.

    Of 500 MB that takes half a second to a second.
    """
    start = end = 0
    for page in sorted(pages):
        if page != end:
            _advise(start, end, _COLLAPSE)
            start = page
        end = page + HUGE_PAGE
    _advise(start, end, _COLLAPSE)


def large_pages() -> frozenset[int]:
    """Addresses of the huge pages that there is room for in this process's private memory."""
    found: set[int] = set()
    for mapping in mappings():
        if mapping.access == "rw-p" and mapping.file in ("", "[heap]"):
            found.update(range(-(-mapping.start // HUGE_PAGE) * HUGE_PAGE, mapping.end - HUGE_PAGE + 1, HUGE_PAGE))
    return frozenset(found)


def _advise(start: int, end: int, advice: int) -> None:
    """madvise(2), which may say no: it is advice. A call for many pages costs little more than for one."""
    if start == end:
        return
    call = ctypes.CDLL(None).madvise
    call.argtypes, call.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    call(start, end - start, advice)

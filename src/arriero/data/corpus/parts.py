"""The working folder of a corpus under construction: what is finished survives a kill.

`tokens`, `lens`, `counts`, `marks` and `hashes` only grow. After a unit's bytes a line with their sizes and their CRC-32
goes into `journal`; so the journal never tells of more than there is, also after a kill at any moment. What a lost
power supply took is found by the CRC when the folder is opened again, and everything from there on is made anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from arriero.data.corpus.encoding import HASH, EncodedUnit
from arriero.data.corpus.units import Key
from arriero.errors import ConfigError, DataError
from arriero.formats.staging import write_error

JOURNAL, LOCK = "journal", "lock"
COLUMNS = ("tokens", "lens", "counts", "marks", "hashes")
LINE_LIMIT = 2**20
_END = b'{"end":true}\n'


@dataclass(frozen=True)
class JournalLine:
    """One finished unit: its key, the items in each column, the size of its text, and a CRC-32 of its bytes."""

    key: Key
    tokens: int
    lens: int
    counts: int
    marks: int
    hashes: int
    text_bytes: int
    crc: int

    @staticmethod
    def parse(line: bytes) -> JournalLine | None:
        """A line of the journal, None if it is torn or foreign."""
        try:
            values = json.loads(line)
            values["key"] = tuple(values["key"])
            parsed = JournalLine(**values)
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        numbers = [*parsed.key, *(getattr(parsed, name) for name in (*COLUMNS, "text_bytes", "crc"))]
        valid = len(parsed.key) == 2 and all(type(number) is int and number >= 0 for number in numbers)
        return parsed if valid and line.endswith(b"\n") else None


def column_types(dtype: np.dtype[np.integer]) -> dict[str, np.dtype[Any]]:
    """The types of the columns, for a corpus whose ids are of `dtype`."""
    types = (dtype, np.dtype("<i4"), np.dtype("<i4"), np.dtype("u1"), HASH)
    return dict(zip(COLUMNS, types, strict=True))


def _columns_of(unit: EncodedUnit) -> dict[str, bytes]:
    return {name: getattr(unit, name).tobytes() for name in COLUMNS}


def _crc(columns: dict[str, bytes]) -> int:
    crc = 0
    for name in COLUMNS:
        crc = zlib.crc32(columns[name], crc)
    return crc


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write all of it to an unbuffered file, however many calls that takes."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def read_header(folder: Path) -> dict[str, Any] | None:
    """The first line of a folder's journal, None if there is none that can be read."""
    try:
        with (folder / JOURNAL).open("rb") as journal:
            header = json.loads(journal.readline(LINE_LIMIT))
    except (OSError, ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) else None


def changes(header: dict[str, Any], found: dict[str, Any]) -> str:
    """What is other in a header than it should be, in words."""
    return "other " + (" and ".join(name for name in header if found.get(name) != header[name]) or "contents")


def is_finished(folder: Path) -> bool:
    """Whether the journal ends with the line that says that all units are there."""
    try:
        with (folder / JOURNAL).open("rb") as journal:
            journal.seek(max(0, journal.seek(0, os.SEEK_END) - len(_END)))
            return journal.read() == _END
    except OSError:
        return False


class PartsReader:
    """Reads the units of a folder back, in order, one at a time.

    Attributes:
        places: after each unit, the size of each file up to it; "journal" among them.
        is_at_end: whether `units` came to the line that says that all units are there.
    """

    def __init__(self, folder: Path, dtype: np.dtype[np.integer], reserved: int) -> None:
        self._folder = folder
        self._types = column_types(dtype)
        self.places = {name: reserved if name == "tokens" else 0 for name in COLUMNS}
        self.places[JOURNAL] = 0
        self.is_at_end = False

    def units(self) -> Iterator[tuple[Key, EncodedUnit]]:
        """The units whose bytes are whole; ends at the first that is not."""
        with (self._folder / JOURNAL).open("rb") as journal:
            self.places[JOURNAL] += len(journal.readline(LINE_LIMIT))
            files: dict[str, BinaryIO] = {name: (self._folder / name).open("rb") for name in COLUMNS}
            try:
                sizes = {name: os.fstat(file.fileno()).st_size for name, file in files.items()}
                while (line := JournalLine.parse(text := journal.readline(LINE_LIMIT))) is not None:
                    unit = self._read(line, files, sizes)
                    if unit is None:
                        return
                    self.places[JOURNAL] += len(text)
                    yield line.key, unit
                self.is_at_end = text == _END
            finally:
                for file in files.values():
                    file.close()

    def _read(self, line: JournalLine, files: dict[str, BinaryIO], sizes: dict[str, int]) -> EncodedUnit | None:
        columns: dict[str, bytes] = {}
        for name in COLUMNS:
            size = getattr(line, name) * self._types[name].itemsize
            if self.places[name] + size > sizes[name]:
                return None
            files[name].seek(self.places[name])
            columns[name] = files[name].read(size)
        if _crc(columns) != line.crc:
            return None
        for name, content in columns.items():
            self.places[name] += len(content)
        arrays: dict[str, npt.NDArray[Any]] = {
            name: np.frombuffer(content, self._types[name]) for name, content in columns.items()
        }
        return EncodedUnit(**arrays, text_bytes=line.text_bytes)


class PartsWriter:
    """Adds units to a folder, of which one process at a time may be the writer: `open` first, `close` in the end.

    Attributes:
        last_key: of the last unit that is there; None if there is none.

    Raises:
        ConfigError: another process writes there.
        FormatError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last_key: Key | None = None
        self._files: dict[str, BinaryIO] = {}
        self._made = [parent for parent in folder.parents if not parent.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder)
        except OSError as error:
            raise write_error(folder, error) from error

    def open(
        self,
        header: dict[str, Any],
        dtype: np.dtype[np.integer],
        reserved: int,
        report: Callable[[str], None],
        replay: Callable[[EncodedUnit], None],
    ) -> None:
        """Go on with what is there, or begin.

        Args:
            header: what the units depend on. A folder begun with another header is emptied.
            dtype: of the token ids.
            reserved: bytes left free at the beginning of `tokens`.
            report: told what becomes of left-overs, a line each.
            replay: called with each unit that is there already.

        Raises:
            FormatError: the folder cannot be written.
        """
        try:
            places = self._places(header, dtype, reserved, report, replay)
            for name, place in places.items():
                file = self._files[name] = (self.folder / name).open("r+b" if place else "w+b", buffering=0)
                file.truncate(place)
                file.seek(place)
            if not places[JOURNAL]:
                write_all(self._files["tokens"], bytes(reserved))
                write_all(self._files[JOURNAL], json.dumps(header).encode() + b"\n")
        except OSError as error:
            raise write_error(self.folder, error) from error

    def _places(
        self,
        header: dict[str, Any],
        dtype: np.dtype[np.integer],
        reserved: int,
        report: Callable[[str], None],
        replay: Callable[[EncodedUnit], None],
    ) -> dict[str, int]:
        """Where to go on in each file."""
        found = read_header(self.folder)
        if found != header or not (self.folder / "tokens").is_file():
            if found is not None:
                report(f"{self.folder}: left-overs of a run with {changes(header, found)} are thrown away")
            self.clear()
            return dict.fromkeys((*COLUMNS, JOURNAL), 0)
        for name in COLUMNS:
            (self.folder / name).touch()
        reader = PartsReader(self.folder, dtype, reserved)
        for key, unit in reader.units():
            self.last_key = key
            replay(unit)
        return reader.places

    def append(self, key: Key, unit: EncodedUnit) -> None:
        """Add a unit.

        Raises:
            DataError: it cannot be written; what was added before stays and the next run goes on there.
        """
        columns = _columns_of(unit)
        line = JournalLine(
            key=key,
            **{name: len(getattr(unit, name)) for name in COLUMNS},
            text_bytes=unit.text_bytes,
            crc=_crc(columns),
        )
        try:
            for name, content in columns.items():
                write_all(self._files[name], content)
            write_all(self._files[JOURNAL], json.dumps(asdict(line), separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            raise DataError(
                f"{self.folder}: cannot be written ({error.strerror or error}); when that is mended (space on the "
                "disk, say), the same command goes on from here"
            ) from error
        self.last_key = key

    def finish(self) -> None:
        """Note that all units are there, and have it all on the disk."""
        try:
            write_all(self._files[JOURNAL], _END)
            for file in self._files.values():
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(self.folder, error) from error

    def clear(self) -> None:
        """Empty the folder."""
        for path in self.folder.iterdir():
            if path.name == LOCK:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def remove(self) -> None:
        """Delete the folder."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def discard(self) -> None:
        """Delete the folder, and the folders above it that were made for it and hold nothing else."""
        self.remove()
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()

    def close(self) -> None:
        """Close the files and let others write."""
        for file in self._files.values():
            file.close()
        self._lock.close()


def _lock(folder: Path) -> BinaryIO:
    lock = (folder / LOCK).open("ab", buffering=0)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The run before may have removed the folder between the opening and the lock.
        mine = os.fstat(lock.fileno()).st_ino == os.stat(folder / LOCK).st_ino
    except (BlockingIOError, FileNotFoundError):
        mine = False
    if not mine:
        lock.close()
        raise ConfigError(f"{folder}: another process writes this corpus; wait for it, or choose another output_prefix")
    return lock

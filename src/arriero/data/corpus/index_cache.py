"""Arrays that are computed once and kept on disk: each under a hash of all that decides it.

    index-cache/KEY/description.json   what the arrays are of; type, shape and hash of each
    index-cache/KEY/NAME.npy           an array
    index-cache/KEY.lock               held by the process that builds it

An entry is a folder that appears by one rename when its files are on disk, so a killed process leaves no half entry. One
process builds while others wait for the kernel's lock on the lock file, which ends with the process that holds it, however
that ends; a waiting process takes part in no collective call that could time out. Where the file system has no locks, each
builds for itself and the first rename wins.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from arriero.data.corpus.npz_member import map_npy
from arriero.errors import DataError
from arriero.formats.staging import sync_file

FOLDER = "index-cache"
FORMAT = 1
DESCRIPTION = "description.json"
MAX_DESCRIPTION_BYTES = 1 << 20
# how much of an array is hashed: all of it up to 64 MiB, else so many blocks spread over it
CHECKED_BLOCKS = 64
CHECKED_BLOCK_BYTES = 1 << 20

Arrays = dict[str, NDArray[Any]]
Report = Callable[[str], None]
# raises ValueError where arrays cannot be what was described: see `index_bounds`
Check = Callable[[Arrays], None]


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class MappedArrays(dict[str, NDArray[Any]]):
    """The arrays of an entry. Sent to another process, it is mapped there again instead of being copied."""

    def __init__(self, entry: Path, arrays: Arrays) -> None:
        super().__init__(arrays)
        self.entry = entry

    def __reduce__(self) -> tuple[Any, ...]:
        return read_entry, (self.entry,)


def read_entry(entry: Path, description: Any = None) -> MappedArrays:
    """Map the arrays of an entry.

    Args:
        entry: its folder.
        description: what it must be of; None for whatever it is.

    Raises:
        DataError: if it is damaged or of something else.
    """
    try:
        with (entry / DESCRIPTION).open("rb") as file:
            stored = json.loads(file.read(MAX_DESCRIPTION_BYTES))
        if stored["format"] != FORMAT or description not in (None, stored["description"]):
            raise ValueError("it is of something else")
        arrays = {}
        for name, facts in stored["arrays"].items():
            if os.path.basename(name) != name:
                raise ValueError("it names a file elsewhere")
            array = map_npy(entry / f"{name}.npy").reshape(facts["shape"])
            if array.dtype.str != facts["dtype"] or _content_hash(array) != facts["sha256"]:
                raise ValueError(f"{name}.npy has other content")
            arrays[name] = array
    except (DataError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{entry} cannot be used: {' '.join(str(error).split())[:200]}") from error
    return MappedArrays(entry, arrays)


def _checked(entry: Path, arrays: Arrays, check: Check) -> None:
    try:
        check(arrays)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"{entry} cannot be used: {' '.join(str(error).split())[:200]}") from error


class IndexCache:
    """A cache of arrays in the first of some folders that holds an entry, or else that can be written.

    Args:
        folders: candidates, in order.
        report: called with each line for the user.
        notice_seconds: how often a waiting process says for whom it waits.
    """

    def __init__(self, folders: list[Path], report: Report = to_stderr, notice_seconds: float = 30.0) -> None:
        self.folders, self.report, self.notice_seconds = folders, report, notice_seconds
        self._writable: Path | None = None

    @classmethod
    def beside(cls, prefix: Path, data_cache: str | None = None, report: Report = to_stderr) -> IndexCache:
        """The cache of a corpus: `data_cache` if given, else `index-cache` beside it, else in the user's cache."""
        if data_cache is not None:
            return cls([Path(data_cache).expanduser()], report)
        from arriero.formats.download import default_cache_dir  # imports torch, which nothing else here needs

        return cls([prefix.parent / FOLDER, default_cache_dir() / FOLDER], report)

    def get(
        self, description: dict[str, Any], build: Callable[[], Arrays], name: str, check: Check | None = None
    ) -> MappedArrays:
        """The arrays of a description, mapped and read-only; built and kept when they are not there yet.

        Args:
            description: everything that decides the arrays, as JSON values.
            build: computes them.
            name: of the corpus, for the lines to the user.
            check: refuses arrays that are read; they are then built again.

        Raises:
            DataError: if no folder can be written, or the disk is full.
        """
        text = json.dumps(description, sort_keys=True)
        key = hashlib.sha256(f"{FORMAT} {text}".encode()).hexdigest()[:32]
        expected = json.loads(text)
        for folder in self.folders:
            arrays = self._load(folder / key, expected, check, tell=False)
            if arrays is not None:
                return arrays
        folder = self._writable_folder()
        with self._lock(folder / f"{key}.lock", name) as exclusive:
            arrays = self._load(folder / key, expected, check)
            if arrays is None:
                try:
                    self._write(folder / key, expected, build(), exclusive, check)
                except OSError as error:
                    raise _write_error(folder, error) from error
                arrays = self._load(folder / key, expected, check)
        if arrays is None:
            raise DataError(f"{folder / key}: what was written there reads differently: check the disk")
        return arrays

    def _writable_folder(self) -> Path:
        if self._writable is None:
            problems = []
            for folder in self.folders:
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    with tempfile.TemporaryFile(dir=folder):
                        pass
                except OSError as error:
                    if error.errno in (errno.ENOSPC, errno.EDQUOT):
                        raise _write_error(folder, error) from error
                    problems.append(f"{folder} ({error.strerror})")
                    continue
                if problems:
                    self.report(f"sample indexes are kept in {folder}: cannot write {', '.join(problems)}")
                self._writable = folder
                break
            else:
                raise DataError(
                    f"the sample indexes cannot be kept in {' or '.join(problems)}: name a folder by --data_cache"
                )
        return self._writable

    def _load(self, entry: Path, description: Any, check: Check | None, *, tell: bool = True) -> MappedArrays | None:
        """The arrays of an entry; None if it is not there, is damaged, does not fit, or is of something else."""
        if not entry.exists():
            return None
        try:
            arrays = read_entry(entry, description)
            if check is not None:
                _checked(entry, arrays, check)
        except DataError as error:
            if tell:
                self.report(f"{error}; it is built again")
            return None
        return arrays

    def _write(self, entry: Path, description: Any, arrays: Arrays, exclusive: bool, check: Check | None) -> None:
        if exclusive:  # nobody else builds this entry: what a killed process left behind is waste
            for leftover in entry.parent.glob(f".{entry.name}.*"):
                shutil.rmtree(leftover, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
        try:
            facts = {}
            for name, array in arrays.items():
                # flat on disk: a mapped file of any shape is then read by the same checks
                with (staging / f"{name}.npy").open("wb") as file:
                    np.lib.format.write_array(file, array.reshape(-1), allow_pickle=False)
                    _flush(file)
                facts[name] = {"dtype": array.dtype.str, "shape": list(array.shape), "sha256": _content_hash(array)}
            with (staging / DESCRIPTION).open("wb") as file:
                stored = {"format": FORMAT, "description": description, "arrays": facts}
                file.write(json.dumps(stored, indent=1, sort_keys=True).encode() + b"\n")
                _flush(file)
            mask = os.umask(0)
            os.umask(mask)
            staging.chmod(0o777 & ~mask)  # mkdtemp makes private folders; a shared cache is for all its users
            sync_file(staging)
            self._publish(staging, entry, description, check)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _publish(self, staging: Path, entry: Path, description: Any, check: Check | None) -> None:
        for _ in range(8):
            try:
                os.rename(staging, entry)
                sync_file(entry.parent)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
            if self._load(entry, description, check, tell=False) is not None:
                return  # another process without a lock was first
            # out of the way by a rename, so that nobody finds half of it
            damaged = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
            with contextlib.suppress(FileNotFoundError):
                os.rename(entry, damaged / entry.name)
            shutil.rmtree(damaged, ignore_errors=True)
        raise OSError(errno.EBUSY, "another process keeps replacing it")

    @contextlib.contextmanager
    def _lock(self, path: Path, name: str) -> Iterator[bool]:
        """Hold the lock file; yields False where the file system knows no locks."""
        try:
            file = path.open("a+b")
        except OSError as error:
            raise _write_error(path, error) from error
        with file:
            exclusive = self._acquire(file, path, name)
            if exclusive:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
                file.flush()
            yield exclusive  # closing the file gives the lock back

    def _acquire(self, file: IO[bytes], path: Path, name: str) -> bool:
        began = time.monotonic()
        said, pause = began, 0.02
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                now = time.monotonic()
                if now - said >= self.notice_seconds:
                    said = now
                    holder = path.read_bytes()[:200].decode(errors="replace") or "another process"
                    self.report(f"waiting for the indexes of {name}: {holder} builds them ({now - began:.0f} s so far)")
                time.sleep(pause)
                pause = min(1.0, pause * 1.5)
            except OSError as error:
                self.report(f"{path}: no file lock there ({error.strerror}): every process builds the indexes itself")
                return False


def _content_hash(array: NDArray[Any]) -> str:
    """SHA-256 of the bytes; of a large array, of blocks spread over it."""
    flat = array.reshape(-1)
    block = max(1, CHECKED_BLOCK_BYTES // max(1, flat.itemsize))
    starts = np.linspace(0, max(0, len(flat) - block), CHECKED_BLOCKS).astype(np.int64)
    if len(flat) <= CHECKED_BLOCKS * block:
        starts = np.arange(0, max(1, len(flat)), block)
    digest = hashlib.sha256()
    for start in starts:
        digest.update(np.ascontiguousarray(flat[start : start + block]).data)
    return digest.hexdigest()


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_error(path: Path, error: OSError) -> DataError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"{path}: the disk is full; free some space or name another folder by --data_cache")
    return DataError(
        f"{path}: the sample indexes cannot be written ({error.strerror or error}); name a folder by --data_cache"
    )

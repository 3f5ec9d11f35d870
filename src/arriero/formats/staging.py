"""A folder that is written as a whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from arriero.errors import ConfigError, FormatError

# Without one of them a folder is no model and no adapter.
_ENTRIES = ("config.json", "params.json", "adapter_config.json", "lora_config.json", "prefix_config.json")
_SECONDS = 5  # that a temporary folder may be without the lock of its owner


def check_target(path: str | Path, option: str) -> None:
    """Refuse a folder that holds something, or where nothing can be written, before the work that is to fill it.

    Raises:
        ConfigError: naming the option.
    """
    folder = Path(path)
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"{option} {path} is not empty: name a new folder")
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{option} {path} is a file: name a folder")
        place = _home(Path(os.path.realpath(folder)))
        while not place.exists() and place != place.parent:
            place = place.parent
        Path(tempfile.mkdtemp(prefix=".arriero.", suffix=".tmp", dir=place)).rmdir()
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written ({error.strerror or error})") from error


def _home(target: Path) -> Path:
    """Where a folder is made before it gets its name."""
    return target if target.is_mount() else target.parent


@contextlib.contextmanager
def staged_folder(folder: str | Path, *, replaces: tuple[str, ...] = ()) -> Iterator[Path]:
    """A temporary folder beside `folder`; what is in it moves there when the block ends without an error.

    Every file is synced to disk first. A folder that does not exist yet (or is empty) appears by one rename. In an
    existing one first the old `config.json` (or the like) is deleted, then the other old files; the new ones move there one by
    one, `config.json` last. So what a process that is killed leaves is no model at all and never a mixture of two. Nothing
    can be renamed to a mount point, nor moved there from beside it: into one they move so from a folder within it.

    What a process that was killed left there for the same destination is removed.

    Args:
        folder: the destination; its other files stay. Of a symbolic link the folder that it leads to.
        replaces: glob patterns of files of the destination that the new ones stand for; the others of them are deleted.

    Raises:
        FormatError: when a file cannot be written, with the reason (a full disk, say). Nothing half-written remains.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FormatError(f"{folder}: is a file, and a folder is to be written; choose another place")
    target = Path(os.path.realpath(folder))  # "." has no name, and nothing can be renamed to a link
    try:
        with _temporary(target) as staging:
            yield staging
            _publish(staging, target, replaces)
    except OSError as error:
        raise write_error(folder, error) from error


@contextlib.contextmanager
def staged_file(path: str | Path) -> Iterator[Path]:
    """A place of the same name in a temporary folder beside a file; what is written there takes the file's place, synced, when
    the block ends without an error.

    What a process that was killed left there for the same file is removed.

    Args:
        path: the destination. Of a symbolic link the file that it leads to.

    Raises:
        FormatError: when it is a folder or cannot be written, with the reason. Nothing half-written remains.
    """
    path = Path(path)
    if path.is_dir():
        raise FormatError(f"{path}: is a folder, and a file is to be written; name a file in it")
    target = Path(os.path.realpath(path))
    try:
        with _temporary(target) as staging:
            place = staging / path.name
            yield place
            place.chmod(0o666 & ~_mask())
            sync_file(place)
            os.replace(place, target)
            sync_file(target.parent)
    except OSError as error:
        raise write_error(path, error) from error


def beside(path: Path) -> str:
    """The regular expression of the temporary folders' names of a destination."""
    return rf"\.{re.escape(path.name)}\.\w{{8}}\.tmp"


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A folder beside a destination, locked, that is gone when the block ends."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(target)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=_home(target)))
    lock: int | None = None
    try:
        lock = _lock(staging)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _mask() -> int:
    """Of the permissions of new files: mkdtemp and the safetensors library make private ones, a model has the usual."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _lock(staging: Path) -> int | None:
    """Say that a folder has an owner, which the kernel forgets with the process, however that ends.

    None: it has one already, or the file system knows no locks.
    """
    lock = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _remove_left(target: Path) -> None:
    """Delete temporary folders of a destination whose owners are gone; those that are new may not be locked yet."""
    name = re.compile(beside(target))
    with contextlib.suppress(OSError):  # the folder around it need not be readable
        for entry in [entry for entry in _home(target).iterdir() if name.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                if entry.is_symlink() or not entry.is_dir() or time.time() - entry.stat().st_mtime < _SECONDS:
                    continue
                lock = _lock(entry)
                if lock is not None:
                    shutil.rmtree(entry, ignore_errors=True)
                    os.close(lock)


def write_error(path: Path, error: OSError) -> FormatError:
    """The one line for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FormatError(f"{path}: the disk is full; free some space or choose another place (nothing was written)")
    if error.errno == errno.EFBIG:
        return FormatError(f"{path}: a file would exceed the limit on file sizes; use a smaller max_shard_size")
    return FormatError(f"{path}: cannot be written ({error.strerror or error})")


def sync_file(path: Path) -> None:
    """Flush a file's (or folder's) content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(staging: Path, folder: Path, replaces: tuple[str, ...]) -> None:
    files = sorted(
        (path for path in staging.rglob("*") if not path.is_dir()), key=lambda path: (path.suffix == ".json", path.name)
    )
    folders = [path for path in staging.iterdir() if path.is_dir()]  # of chat templates; they hold none
    mask = _mask()
    staging.chmod(0o777 & ~mask)
    for path in files:
        path.chmod(0o666 & ~mask)
        sync_file(path)
    for path in folders:
        path.chmod(0o777 & ~mask)
        sync_file(path)
    sync_file(staging)
    if not _rename_whole(staging, folder):
        written = {path.name for path in files}
        _remove_old(folder, written, replaces)
        entries = [staging / name for name in _ENTRIES if name in written]
        for path in [path for path in files if path not in entries] + entries:
            place = folder / path.relative_to(staging)
            place.parent.mkdir(exist_ok=True)
            if path in entries:
                sync_file(folder)
            os.replace(path, place)
        for path in folders:
            sync_file(folder / path.name)
        sync_file(folder)
    sync_file(folder.parent)


def _remove_old(folder: Path, written: set[str], replaces: tuple[str, ...]) -> None:
    """Delete what makes a folder a model or adapter, if it is to be replaced, and then what new files do not overwrite."""
    old = {path for pattern in replaces for path in folder.glob(pattern) if not path.is_dir()}
    entries = {folder / name for name in _ENTRIES if name in written or folder / name in old}
    for path in entries:
        path.unlink(missing_ok=True)
    sync_file(folder)
    for path in old - entries:
        if path.name not in written:
            path.unlink()


def _rename_whole(staging: Path, folder: Path) -> bool:
    """Put the staged folder in the place of one that is absent or empty; False if it holds something, or it is within it.

    Also if it is the working folder: the user's shell would be left in the one that is gone.
    """
    if staging.parent == folder:
        return False
    with contextlib.suppress(OSError):  # there may be no working folder any more
        if folder.samefile(os.curdir):
            return False
    try:
        os.replace(staging, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # also when another process was first
            return False
        raise
    return True

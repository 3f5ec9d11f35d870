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

    Every file is synced to disk first. A folder that does not exist yet (or is empty) appears by one rename. Into an
    existing one the files move one by one, each by an atomic replacement: weights before indexes, `config.json` last. Nothing
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
    staging: Path | None = None
    lock: int | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(target)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=_home(target)))
        lock = _lock(staging)
        yield staging
        _publish(staging, target, replaces)
    except OSError as error:
        raise write_error(folder, error) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


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
    name = re.compile(rf"\.{re.escape(target.name)}\.\w{{8}}\.tmp")
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
    # mkdtemp and the safetensors library make private files; a model folder has the usual permissions.
    mask = os.umask(0)
    os.umask(mask)
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
        config = [path for path in files if path.name == "config.json"]
        for path in [path for path in files if path.name != "config.json"] + config:
            place = folder / path.relative_to(staging)
            place.parent.mkdir(exist_ok=True)
            os.replace(path, place)
        for pattern in replaces:
            for stale in folder.glob(pattern):
                if stale.name not in written and not stale.is_dir():
                    stale.unlink()
        for path in folders:
            sync_file(folder / path.name)
        sync_file(folder)
    sync_file(folder.parent)


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

"""The note that a downloaded or made model folder is complete: where it came from and a hash of every file."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from arriero.errors import FormatError
from arriero.formats.staging import write_error

RECEIPT = ".arriero.json"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_receipt(folder: Path, source: str) -> None:
    """Note every file of a finished folder.

    Args:
        source: what the folder was made from; another source (a new version, say) makes the folder stale.

    Raises:
        FormatError: when the note cannot be written.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != RECEIPT:
            stat = path.stat()
            files[path.name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_of(path)}
    temporary = folder / f"{RECEIPT}.{os.getpid()}.tmp"
    try:
        temporary.write_text(json.dumps({"source": source, "files": files}, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, folder / RECEIPT)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(folder / RECEIPT, error) from error


def is_complete(folder: Path, source: str) -> bool:
    """Whether a folder was finished from this source and its files are still what they were.

    A file that was touched since is hashed; an untouched one (same size and time) is taken as it is.
    """
    try:
        values: Any = json.loads((folder / RECEIPT).read_bytes())
        if values["source"] != source or not values["files"]:
            return False
        for name, noted in values["files"].items():
            path = folder / Path(name).name
            stat = path.stat()
            if stat.st_size != noted["size"]:
                return False
            if stat.st_mtime_ns != noted["mtime_ns"] and sha256_of(path) != noted["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def whole_files(folder: Path, source: str) -> list[Path]:
    """The files of a folder that was finished from this source, each hashed, to be copied; none if one is not as noted."""
    if not is_complete(folder, source):
        return []
    noted: dict[str, Any] = json.loads((folder / RECEIPT).read_bytes())["files"]
    files = {folder / Path(name).name: values["sha256"] for name, values in noted.items()}
    return list(files) if all(sha256_of(path) == expected for path, expected in files.items()) else []


def check_sha256(path: Path, expected: str) -> None:
    """Compare a downloaded file with its known hash.

    Raises:
        FormatError: when it differs.
    """
    found = sha256_of(path)
    if found != expected:
        raise FormatError(f"{path.name}: the download has the SHA-256 {found}, expected {expected}; try again")

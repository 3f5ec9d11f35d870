"""Files that a verb writes besides what it prints: `--output_file`, `--predict_file`, those in `--output_dir`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arriero.errors import ConfigError


def check_place(path: Path, option: str, *, reads: Sequence[str | Path] = (), makes_folder: bool = False) -> None:
    """Refuse a place that no file can have, before the work that it is for.

    Args:
        reads: files of the same run, which it must not replace.
        makes_folder: make the folder if it is missing.

    Raises:
        ConfigError: its folder is missing or nothing can be written there, it is a folder itself, or one of `reads`.
    """
    if path.is_dir():
        raise ConfigError(f"{option} {path}: is a folder; name a file")
    if any(path.exists() and Path(other).exists() and path.samefile(other) for other in reads):
        raise ConfigError(f"{option} {path}: this run reads that file; name another")
    if not makes_folder and not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.parent}; make it first")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if _can_be_replaced(path):
            _try(path.resolve())
    except OSError as error:
        raise _cannot(path, option, error) from error


def check_folder(folder: Path, option: str) -> None:
    """Make a folder for files, before the work that they are for.

    Raises:
        ConfigError: it is a file, or nothing can be written there.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{option} {folder} is a file: name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _try(folder / "file")
    except OSError as error:
        raise _cannot(folder, option, error) from error


def write_file(path: Path, text: str, option: str) -> None:
    """Write the file of an option whole or not at all; through a link, and into a pipe or a device as it is.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        if not _can_be_replaced(path):
            with path.open("w", encoding="utf-8") as file:
                file.write(text)
            return
        replace_file(path.resolve(), text.encode())
    except OSError as error:
        raise _cannot(path, option, error) from error


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a link is replaced.

    Raises:
        OSError: it cannot be written.
    """
    temporary = _beside(path)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def json_text(value: Any) -> str:
    """Results as JSON, whose numbers are all finite: null stands for one that is not. What JSON has no kind for is its text."""
    return json.dumps(_finite(value), indent=1, allow_nan=False, default=str, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _can_be_replaced(path: Path) -> bool:
    """Whether it is, or will be, a file as any other; /dev/stdout is none even where it leads to one."""
    if not path.exists():
        return True
    return path.is_file() and path.absolute().parts[1:2] not in (("dev",), ("proc",))


def _try(path: Path) -> None:
    probe = _beside(path)
    probe.touch()
    probe.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")


def _cannot(path: Path, option: str, error: OSError) -> ConfigError:
    return ConfigError(f"{option} {path}: cannot be written ({error.strerror})")

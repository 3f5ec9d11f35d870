"""A small file that a verb writes besides what it prints: `--output_file`."""

from __future__ import annotations

from pathlib import Path

from arriero.errors import ConfigError


def check_place(path: Path, option: str) -> None:
    """Refuse a place that no file can have, before the work that it is for.

    Raises:
        ConfigError: its folder is missing, or it is a folder itself.
    """
    if path.is_dir():
        raise ConfigError(f"{option} {path}: is a folder; name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.parent}; make it first")


def write_output_file(path: Path, text: str) -> None:
    """Write the file of `--output_file` whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"--output_file {path}: cannot be written ({error.strerror})") from error

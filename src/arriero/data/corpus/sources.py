"""The files that a corpus is made of."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from arriero.errors import ConfigError, DataError

# A name's end -> (what is in it, how it is packed). A bare .gz or .zst holds JSON lines, as PaddleNLP's do.
KINDS: dict[str, tuple[str, str]] = {
    ".txt": ("text", ""),
    ".txt.gz": ("text", "gz"),
    ".txt.zst": ("text", "zst"),
    ".jsonl": ("jsonl", ""),
    ".jsonl.gz": ("jsonl", "gz"),
    ".jsonl.zst": ("jsonl", "zst"),
    ".json": ("jsonl", ""),
    ".gz": ("jsonl", "gz"),
    ".zst": ("jsonl", "zst"),
    ".parquet": ("parquet", ""),
}
FIRST_BYTES = 2**20  # of a .json file, which tell whether it is JSON lines
NO_TEXT = (".tar", ".csv", ".tsv", ".xml", ".warc", ".wet", ".html", ".md", ".parquet")


@dataclass(frozen=True)
class Source:
    """One input file.

    Attributes:
        name: its path below the input folder, with `/`: the same on every machine.
        kind: "text", "jsonl" or "parquet".
        packing: "", "gz" or "zst".
        size: in bytes, as it lies on the disk.
    """

    path: Path
    name: str
    kind: str
    packing: str
    size: int
    mtime_ns: int

    @property
    def is_plain(self) -> bool:
        """Whether any place of it can be read without what stands before."""
        return self.kind != "parquet" and not self.packing


def kind_of(name: str) -> tuple[str, str] | None:
    """(kind, packing) of a file by its name's end, None if it is of no known kind."""
    lower = name.lower()
    return next((kind for end, kind in KINDS.items() if lower.endswith(end) and _fits(lower, end)), None)


def _fits(lower: str, end: str) -> bool:
    """Whether what a bare `.gz` or `.zst` packs can be JSON lines: c4.json.gz and 00.zst can, x.tar.gz cannot."""
    return end not in (".gz", ".zst") or not lower[: -len(end)].endswith(NO_TEXT)


def find_sources(input_path: str, json_key: str = "text") -> tuple[list[Source], list[str]]:
    """The input files in the order in which they are read, and the names of the others, with the reason where it is not
    the name's end.

    A folder is searched to its ground, also through links to folders, by name; what begins with a dot is left alone. A
    `.json` file in it is read if its first line is an object with `json_key`: such folders hold other JSON files too.

    Raises:
        ConfigError: there is nothing to read, or the one file given is of no known kind.
        DataError: a file or folder cannot be looked at.
    """
    root = Path(os.path.expanduser(input_path))
    if not root.exists():
        raise ConfigError(f"--input_path {root}: no such file or folder")
    if not root.is_dir():
        if not root.is_file():
            raise ConfigError(f"--input_path {root}: is no regular file; write what comes from there into a file first")
        if kind_of(root.name) is None:
            raise ConfigError(f"--input_path {root}: of no known kind; give {', '.join(KINDS)} or a folder of them")
        if is_json(root.name) and (reason := _why_no_json_lines(root, None)):
            raise ConfigError(
                f"--input_path {root}: {reason}; write one object a line (`jq -c '.[]'` makes them of an array)"
            )
        return [_source(root, root.name, root.stat())], []
    found: list[Source] = []
    others: list[str] = []
    for name in sorted(_names_below(root)):
        if kind_of(name) is None:
            others.append(name)
            continue
        try:
            status = (root / name).stat()
        except OSError as error:
            raise _unreadable(root / name, error) from error
        if not stat.S_ISREG(status.st_mode):
            others.append(f"{name} (no regular file)")
        elif is_json(name) and (reason := _why_no_json_lines(root / name, json_key)):
            others.append(f"{name} ({reason})")
        else:
            found.append(_source(root / name, name, status))
    if not found:
        seen = f": {', '.join(others[:3])}" if others else ""
        raise ConfigError(f"--input_path {root}: holds no file of a known kind ({', '.join(KINDS)}){seen}")
    return found, others


def is_json(name: str) -> bool:
    """Whether only a look into the file tells what it is: JSON lines, or JSON of another form."""
    return name.lower().endswith(".json")


def _names_below(root: Path) -> Iterator[str]:
    """The files below a folder, each folder once. Links to folders come last, so that a folder goes by its own name."""
    visited: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise _unreadable(Path(error.filename), error) from error

    waiting = [str(root)]
    for top in waiting:
        for folder, folders, files in os.walk(top, onerror=refuse):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in visited:
                folders.clear()
                continue
            visited.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            waiting += [path for name in folders if os.path.islink(path := os.path.join(folder, name))]
            yield from (
                (Path(folder) / name).relative_to(root).as_posix() for name in files if not name.startswith(".")
            )


def _why_no_json_lines(path: Path, json_key: str | None) -> str:
    """Why a `.json` file does not hold JSON lines, by its first ones; nothing if it does, or if it is empty.

    Args:
        json_key: what the first object must hold; None for anything.
    """
    try:
        with path.open("rb") as file:
            first = file.read(FIRST_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from error
    line, newline, _ = first.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    if line.startswith(b"["):
        return "one JSON array and not JSON lines"
    if not newline and len(first) == FIRST_BYTES:
        return ""  # a long line: when it is read it is seen whether it is an object
    try:
        row = json.loads(line.decode("utf-8", "replace"), parse_int=float) if line else None
    except (ValueError, RecursionError):
        return "not JSON lines"
    if row is not None and not isinstance(row, dict):
        return "not JSON lines"
    return "" if json_key is None or row is None or json_key in row else f"JSON without {json_key!r}"


def _source(path: Path, name: str, status: os.stat_result) -> Source:
    kind = kind_of(name)
    assert kind is not None
    return Source(path, name, kind[0], kind[1], status.st_size, status.st_mtime_ns)


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror or error})")

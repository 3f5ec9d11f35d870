"""The files that a corpus is made of."""

from __future__ import annotations

import os
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
    ".gz": ("jsonl", "gz"),
    ".zst": ("jsonl", "zst"),
    ".parquet": ("parquet", ""),
}
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


def find_sources(input_path: str) -> tuple[list[Source], list[str]]:
    """The input files in the order in which they are read, and the names of those of other kinds.

    A folder is searched to its ground, by name; what begins with a dot is left alone.

    Raises:
        ConfigError: there is nothing to read, or the one file given is of no known kind.
        DataError: a file cannot be looked at.
    """
    root = Path(os.path.expanduser(input_path))
    if root.is_file():
        if kind_of(root.name) is None:
            raise ConfigError(f"--input_path {root}: of no known kind; give {', '.join(KINDS)} or a folder of them")
        return [_source(root, root.name)], []
    if not root.is_dir():
        raise ConfigError(f"--input_path {root}: no such file or folder")
    names: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in files if not name.startswith(".")]
    names.sort()
    known = [name for name in names if kind_of(name) is not None]
    if not known:
        raise ConfigError(f"--input_path {root}: holds no file of a known kind ({', '.join(KINDS)})")
    return [_source(root / name, name) for name in known], [name for name in names if kind_of(name) is None]


def _source(path: Path, name: str) -> Source:
    kind = kind_of(name)
    assert kind is not None
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    return Source(path=path, name=name, kind=kind[0], packing=kind[1], size=stat.st_size, mtime_ns=stat.st_mtime_ns)

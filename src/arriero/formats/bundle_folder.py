"""How a bundle of `arriero export` is told from a model folder, by those that only want to know that much."""

from __future__ import annotations

from pathlib import Path

from arriero.errors import FormatError
from arriero.formats.json_file import read_json_object

MANIFEST = "manifest.json"


def is_bundle(folder: str | Path) -> bool:
    """Whether a folder says that it is a bundle, of any kind and version; not whether it can be used."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return False
    try:
        values = read_json_object(path, "")
    except FormatError:
        return False
    return {"kind", "graph", "files"} <= values.keys()

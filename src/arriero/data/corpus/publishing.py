"""From the finished working folder to the files under their final names."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from arriero.data.corpus.writers import complete_ids, ids_name, index_name, meta_name, write_index
from arriero.errors import ConfigError
from arriero.formats.receipt import sha256_of
from arriero.formats.staging import sync_file, write_error

# Files are made ready in one folder, which then gets its second name: from there on only renames are left to do.
MAKING, READY = "making", "ready"
META_LIMIT = 2**24


class Publisher:
    """The final files of one corpus.

    Args:
        prefix: path and first part of their names.
        parts: the working folder.
        data_impl: "npy" or "mmap".
    """

    def __init__(self, prefix: Path, parts: Path, data_impl: str) -> None:
        self.prefix = prefix
        self.parts = parts
        self.data_impl = data_impl

    def names(self) -> list[str]:
        """The names of the final files, in the order in which they appear; the last one says that all are there."""
        name = self.prefix.name
        return [ids_name(self.data_impl, name), index_name(self.data_impl, name), meta_name(name)]

    def finished(self) -> dict[str, Any] | None:
        """The meta data of a corpus that stands under the final names, None if there is none of this kind."""
        folder = self.prefix.parent
        if not all((folder / name).is_file() for name in self.names()):
            return None
        try:
            with (folder / meta_name(self.prefix.name)).open("rb") as file:
                meta = json.loads(file.read(META_LIMIT))
        except (OSError, ValueError, RecursionError):
            return None
        return meta if isinstance(meta, dict) else None

    def refuse_existing(self) -> None:
        """Make sure that nothing would be overwritten.

        Raises:
            ConfigError: a file has one of the final names.
        """
        for path in self._final_paths():
            if path.exists():
                raise ConfigError(f"{path}: exists already; add --overwrite, or choose another --output_prefix")

    def _final_paths(self) -> list[Path]:
        name = self.prefix.name
        names = [meta_name(name)]
        for data_impl in ("npy", "mmap"):
            names += [ids_name(data_impl, name), index_name(data_impl, name)]
        return [self.prefix.parent / name for name in names]

    def is_ready(self) -> bool:
        """Whether a run made everything ready and was stopped before the last rename."""
        return (self.parts / READY).is_dir()

    def recover(self) -> None:
        """Undo a preparation that was stopped."""
        making = self.parts / MAKING
        tokens = making / self.names()[0]
        if tokens.is_file():
            os.replace(tokens, self.parts / "tokens")
        if making.is_dir():
            shutil.rmtree(making)

    def prepare(self, dtype: np.dtype[np.integer], tokens: int, meta: dict[str, Any]) -> None:
        """Make the final files ready in the working folder.

        Raises:
            FormatError: they cannot be written; the working folder stays for the next run.
        """
        making = self.parts / MAKING
        ids, index, meta_file = (making / name for name in self.names())
        try:
            making.mkdir()
            write_index(index, self.data_impl, dtype, self.parts / "lens", self.parts / "counts")
            complete_ids(self.parts / "tokens", self.data_impl, dtype, tokens)
            files = {
                ids.name: {"size": (self.parts / "tokens").stat().st_size},
                index.name: {"size": index.stat().st_size, "sha256": sha256_of(index)},
            }
            meta_file.write_text(json.dumps(meta | {"files": files}, indent=2) + "\n", encoding="utf-8")
            os.replace(self.parts / "tokens", ids)
            for path in (ids, index, meta_file, making):
                sync_file(path)
            os.replace(making, self.parts / READY)
            sync_file(self.parts)
        except OSError as error:
            raise write_error(self.prefix, error) from error

    def publish(self) -> None:
        """Move what is ready to the final names, and delete the working folder.

        Raises:
            FormatError: it cannot be moved there.
        """
        folder = self.prefix.parent
        ready = self.parts / READY
        try:
            if (ready / self.names()[0]).exists():  # an older corpus goes before the first file of the new one comes
                for path in self._final_paths():
                    path.unlink(missing_ok=True)
            for name in self.names():
                if (ready / name).exists():
                    os.replace(ready / name, folder / name)
            sync_file(folder)
            shutil.rmtree(self.parts)
        except OSError as error:
            raise write_error(self.prefix, error) from error

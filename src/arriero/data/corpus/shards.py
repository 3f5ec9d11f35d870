"""The parts that the jobs of an array job leave, and their units in the order of the input."""

from __future__ import annotations

import glob
import heapq
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from arriero.data.corpus.encoding import EncodedUnit
from arriero.data.corpus.parts import PartsReader, changes, is_finished, read_header
from arriero.data.corpus.units import Key
from arriero.errors import ConfigError, DataError


def shard_folder(prefix: Path, shard_id: int, num_shards: int) -> Path:
    """The folder of one shard."""
    return prefix.with_name(f"{prefix.name}.shard-{shard_id:05d}-of-{num_shards:05d}")


def shard_header(description: dict[str, Any], shard_id: int, num_shards: int) -> dict[str, Any]:
    """The header of a shard's folder: what the corpus depends on, and which part this is."""
    return description | {"shard": [shard_id, num_shards]}


@dataclass(frozen=True)
class Shards:
    """The finished shards of a corpus."""

    prefix: Path
    num_shards: int

    def folders(self) -> list[Path]:
        """Their folders, in order."""
        return [shard_folder(self.prefix, shard_id, self.num_shards) for shard_id in range(self.num_shards)]

    def check(self, description: dict[str, Any]) -> None:
        """Make sure that all are there, finished, and made from the same inputs by the same options.

        Raises:
            ConfigError: naming those that are not.
        """
        folders = self.folders()
        missing = [number for number, folder in enumerate(folders) if not folder.is_dir()]
        begun = [n for n, folder in enumerate(folders) if n not in missing and not is_finished(folder)]
        if missing or begun:
            parts = [("missing", missing), ("not finished", begun)]
            told = "; ".join(f"{word}: {_numbers(which)}" for word, which in parts if which)
            hint = self._other_number()
            raise ConfigError(
                f"--merge_shards: of the {self.num_shards} shards of {self.prefix}, {told}{hint}; run the same command "
                "without --merge_shards and with --shard_id N for each"
            )
        for number, folder in enumerate(folders):
            expected = shard_header(description, number, self.num_shards)
            found = read_header(folder) or {}
            if found != expected:
                raise ConfigError(
                    f"{folder}: was made with {changes(expected, found)}; run this shard again with the same options"
                )

    def _other_number(self) -> str:
        """A word on shards that were made with another --num_shards."""
        found = self.prefix.parent.glob(f"{glob.escape(self.prefix.name)}.shard-*-of-*")
        numbers = sorted({path.name.rpartition("-")[2] for path in found} - {f"{self.num_shards:05d}"})
        return f" (there are shards of --num_shards {numbers[0].lstrip('0')})" if numbers else ""

    def units(self, dtype: np.dtype[np.integer], done: Key | None) -> Iterator[tuple[Key, EncodedUnit]]:
        """The units of all shards in the order of the input, from after `done`; one of each shard is in memory.

        Raises:
            DataError: a shard is damaged.
        """
        merged = heapq.merge(*(self._units_of(folder, dtype) for folder in self.folders()), key=itemgetter(0))
        return (item for item in merged if done is None or item[0] > done)

    def _units_of(self, folder: Path, dtype: np.dtype[np.integer]) -> Iterator[tuple[Key, EncodedUnit]]:
        reader = PartsReader(folder, dtype, reserved=0)
        yield from reader.units()
        if not reader.is_at_end:
            raise DataError(f"{folder}: is damaged; delete it and run this shard again")

    def remove(self) -> None:
        """Delete the folders."""
        for folder in self.folders():
            shutil.rmtree(folder, ignore_errors=True)


def _numbers(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:20]))
    return shown + (f" and {len(numbers) - 20} more" if len(numbers) > 20 else "")

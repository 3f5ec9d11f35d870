"""The documents of a corpus so far, by 16-byte hashes, to leave out what was there before."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from arriero.data.corpus.encoding import HASH

Hashes = npt.NDArray[np.bytes_]


class SeenDocuments:
    """A set of hashes that takes 16 bytes each.

    They lie in sorted runs; two runs of like length are merged into one, so that there are about log2(n) of them (a
    log-structured merge tree, https://doi.org/10.1007/s002360050048, in memory).
    """

    def __init__(self) -> None:
        self._runs: list[Hashes] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def add(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Add hashes.

        Returns:
            [number of hashes] bool: whether each was new; of equal ones the first.
        """
        new = np.zeros(len(hashes), bool)
        fresh, first = np.unique(hashes, return_index=True)
        unknown = np.ones(len(fresh), bool)
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, fresh), len(run) - 1)
            unknown &= run[places] != fresh
        new[first[unknown]] = True
        if unknown.any():
            self._insert(fresh[unknown].astype(HASH))
        return new

    def _insert(self, run: Hashes) -> None:
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")
        self._runs.append(run)

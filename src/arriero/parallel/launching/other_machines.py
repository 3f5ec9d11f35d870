"""What the launchers of a run's machines know of each other while the processes run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch.distributed import Store  # type: ignore[attr-defined]

BEAT_SECONDS = 1.0
_SILENT_SECONDS = 3.0  # without a beat, after which a launcher counts as gone; signals of one stop may be so far apart
_ENDED = "ended"


@dataclass(frozen=True)
class _End:
    """Who ended the run, with a word or, as machine 0 can, without."""

    machine: str
    gone: bool = False


@dataclass
class OtherMachines:
    """The other launchers of a round, through the round's store, which machine 0 holds.

    Attributes:
        machine: the number of this one.
        count: of all.
        address: of machine 0.
    """

    store: Store
    machine: int
    count: int
    address: str
    _heard: float = field(default=0.0, repr=False)
    _since: float | None = field(default=None, repr=False)  # when it was heard that another has ended the run
    _by: _End | None = field(default=None, repr=False)

    def has_ended(self, patience: float, patience_if_gone: float) -> str | None:
        """Which machine has ended the run, `patience` seconds ago or more; None: none has.

        To be called often: it also says that this one lives.

        Args:
            patience_if_gone: for machine 0 that is gone without a word: its processes may be saving a checkpoint with ours.
        """
        now = time.monotonic()
        if self._since is None:
            if now - self._heard < BEAT_SECONDS:
                return None
            self._heard = now
            found = self._ended()
            if found is None:
                return None
            self._by, self._since = found, now
        assert self._by is not None
        return self._by.machine if now - self._since >= (patience_if_gone if self._by.gone else patience) else None

    def tell_end(self) -> None:
        """Say that this machine ends the run."""
        try:
            self.store.set(_ENDED, str(self.machine))
            if self.machine == 0:
                time.sleep(1.5 * BEAT_SECONDS)  # the store ends with this process: the others are to hear of it first
        except RuntimeError:
            return  # machine 0 is gone: nobody is left to be told

    def missing(self, told: Callable[[], bool]) -> str | None:
        """Who ended the run or has gone silent; None where this machine is told to stop meanwhile."""
        numbers = [number for number in range(self.count) if number != self.machine]
        ends = time.monotonic() + _SILENT_SECONDS
        found, beats = self._ended(), self._beats(numbers)
        while time.monotonic() < ends:
            if told():
                return None
            time.sleep(BEAT_SECONDS / 10)
            found = found or self._ended()
        if found is not None:
            return found.machine
        silent = [str(n) for n, before, now in zip(numbers, beats, self._beats(numbers), strict=True) if before == now]
        return f"machine {' and '.join(silent)}" if silent else "another process"

    def _ended(self) -> _End | None:
        try:
            self.store.add(f"beat {self.machine}", 1)
            if self.store.check([_ENDED]):
                return _End(f"machine {int(self.store.get(_ENDED))}")
        except RuntimeError:
            return _End(f"machine 0 ({self.address})", gone=True)
        return None

    def _beats(self, numbers: list[int]) -> list[int]:
        try:
            return [self.store.add(f"beat {number}", 0) for number in numbers]
        except RuntimeError:
            return [0] * len(numbers)

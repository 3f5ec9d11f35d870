"""The launched processes of one machine: they start together and end together. Imports no torch."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass

from arriero.errors import ArrieroError
from arriero.parallel.launching.rank_process import RankProcess
from arriero.parallel.launching.report import Report

POLL_SECONDS = 0.1
GRACE_SECONDS = 120.0  # after a signal: the step is finished and a checkpoint is written
_SETTLE_SECONDS = 0.5  # after a failure: one that came earlier may not have been reported yet
_PEER_SECONDS = 5.0  # after failures that blame another process: that one may be slow to end
_DISMISS_SECONDS = 5.0  # between SIGTERM and SIGKILL for those that are left


@dataclass(frozen=True)
class Ending:
    """How all of them ended.

    Attributes:
        rank: whose report it is; None if all went well and none has anything to say.
        report: of the process that failed first; of the first rank if they were told to end.
    """

    rank: int | None = None
    report: Report | None = None

    @property
    def exit_code(self) -> int:
        return 0 if self.report is None else self.report.exit_code

    @property
    def worth_another_try(self) -> bool:
        """Whether starting again may help: not after an error that the user has to mend, nor after a stop."""
        report = self.report
        if report is None or report.stopped:
            return False
        return report.of_peer or report.exit_code != ArrieroError.exit_code


@dataclass
class RankGroup:
    """Processes that need each other.

    Attributes:
        ranks: in the order of their numbers.
        alone: whether the run is this one process: it is not named by its rank then.
        ending: how they ended; None while they run.
    """

    ranks: list[RankProcess]
    alone: bool = False
    _told: float | None = None  # when a signal was passed on
    _failed: float | None = None  # when the first failure was seen
    ending: Ending | None = None

    def prefix(self, rank: int | None) -> str:
        """What an error's line begins with."""
        return "arriero: " if rank is None or self.alone else f"arriero [rank {rank}]: "

    def start(self) -> None:
        """Start all; a signal that arrives meanwhile reaches the later ones too."""
        for rank in self.ranks:
            rank.start()
        number = next((number for rank in self.ranks for number in rank.signals), None)
        if number is not None:
            self.send(number, [rank for rank in self.ranks if not rank.signals])

    def send(self, number: int, ranks: list[RankProcess] | None = None) -> None:
        """Pass a signal on to each process once; they have `GRACE_SECONDS` to end."""
        self._told = self._told or time.monotonic()
        for rank in self.ranks if ranks is None else ranks:
            rank.send(number)

    def poll(self) -> Ending | None:
        """How they ended; None while they run. The first failure ends the others."""
        if self.ending is not None:
            return self.ending
        if any(rank.running for rank in self.ranks):
            now = time.monotonic()
            failed = self._failure_deadline(now)
            if now < min(failed, self._signal_deadline()):
                return None
            self.ending = self._overdue() if now < failed else None
            self._dismiss()
        self.ending = self.ending or self._find_ending()
        self._close()
        return self.ending

    @property
    def told(self) -> bool:
        """Whether a signal was passed on."""
        return self._told is not None

    def cut_short(self) -> Ending:
        """End all that run because the run has ended elsewhere."""
        if self.ending is None:
            self._dismiss()
            self.ending = self._find_ending()
            self._close()
        return self.ending

    def stop(self, patience: float = _DISMISS_SECONDS) -> None:
        """End all that run; to be called however things went. After `patience` seconds they are killed."""
        if self.ending is None:
            self._dismiss(patience)
            self._close()
            self.ending = Ending()

    def _signal_deadline(self) -> float:
        return float("inf") if self._told is None else self._told + GRACE_SECONDS

    def _failure_deadline(self, now: float) -> float:
        """When those that still run are ended because another failed. One that stopped as told has not."""
        found = [report for rank in self.ranks if (report := rank.report()) is not None and not report.stopped]
        if not found:
            return float("inf")
        self._failed = self._failed or now
        return self._failed + (_SETTLE_SECONDS if any(report.failed for report in found) else _PEER_SECONDS)

    def _overdue(self) -> Ending:
        """That the first of those that still run did not obey."""
        rank = next((rank for rank in self.ranks if rank.running), self.ranks[0])
        message = f"did not end within {GRACE_SECONDS:.0f} s of the signal and was killed"
        return Ending(rank.rank, Report(time=time.time(), message=message, exit_code=128 + signal.SIGKILL))

    def _dismiss(self, patience: float = _DISMISS_SECONDS) -> None:
        for rank in self.ranks:
            rank.dismiss()
        limit = time.monotonic() + patience
        while any(rank.running for rank in self.ranks) and time.monotonic() < limit:
            time.sleep(POLL_SECONDS / 2)
        for rank in self.ranks:
            rank.kill()

    def _find_ending(self) -> Ending:
        found = [(rank.rank, report) for rank in self.ranks if (report := rank.report()) is not None]
        failures = [(rank, report) for rank, report in found if report.failed]
        if failures:
            return Ending(*min(failures, key=lambda item: item[1].time))
        stopped = [(rank, report) for rank, report in found if report.stopped]
        if stopped:
            return Ending(*stopped[0])
        return Ending(*min(found, key=lambda item: item[1].time)) if found else Ending()

    def _close(self) -> None:
        for rank in self.ranks:
            rank.close(self.prefix(rank.rank))

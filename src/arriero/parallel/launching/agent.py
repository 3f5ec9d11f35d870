"""The launcher of several processes: torchrun's agent with arriero's own way to start, watch and end them."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError

from arriero.errors import ConfigError, PeerError
from arriero.parallel.launching.other_machines import OtherMachines
from arriero.parallel.launching.rank_group import GRACE_SECONDS, POLL_SECONDS, Ending, RankGroup
from arriero.parallel.launching.rank_process import RankProcess
from arriero.parallel.launching.rendezvous import QUIET_SECONDS, Meeting, NumberedMachines, say
from arriero.parallel.launching.report import Report
from arriero.parallel.launching.resuming import LAUNCHED, MOST, RESTART

_EXIT_BY_SIGNAL = 128
_ELSEWHERE_SECONDS = (
    5.0  # after another machine has ended the run: the processes here may end by themselves and say more
)
# What the launcher passes on, as what.
_SIGNALS = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,  # the terminal is gone
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to start on this machine.

    Attributes:
        command: of every process.
        environment: of every process, besides its place in the run.
        processes: how many on this machine.
        meeting: with the launchers of the other machines.
        max_restarts: times all are started again after a failure.
        log_dir: folder of a log for each process.
    """

    command: list[str]
    environment: dict[str, str]
    processes: int
    meeting: Meeting = field(default_factory=Meeting)
    max_restarts: int = 0
    log_dir: Path | None = None


def launch(job: Job) -> int:
    """Start the processes, wait for them, show the error of the one that failed first, and return its exit code.

    Raises:
        ConfigError: the machines of the run cannot meet.
    """
    with tempfile.TemporaryDirectory(prefix="arriero-launch-") as scratch:
        agent = Agent(job, Path(scratch))
        with agent.passing_on_signals():
            try:
                agent.run()
            except RendezvousError as error:
                if agent.ending is None or not isinstance(error, RendezvousClosedError):
                    raise _no_meeting(job.meeting, error) from error
            finally:
                agent.leave()
    ending = agent.ending or Ending()
    if ending.report is not None and ending.report.message:
        rank = None if ending.report.stopped else ending.rank
        sys.stdout.flush()
        sys.stderr.write(f"{ending.report.traceback}{agent.prefix(rank)}{ending.report.message}\n")
        sys.stderr.flush()
    return ending.exit_code


class Agent(SimpleElasticAgent):
    """Keeps the processes of one machine, as torchrun's agent: it meets the other machines', numbers, watches, restarts.

    Attributes:
        ending: how the processes ended, the last time they did.
    """

    def __init__(self, job: Job, scratch: Path) -> None:
        self.job = job
        self.handler = job.meeting.handler()
        super().__init__(
            WorkerSpec(
                role="arriero",
                local_world_size=job.processes,
                rdzv_handler=self.handler,
                entrypoint=job.command[0],
                max_restarts=job.max_restarts,
                monitor_interval=POLL_SECONDS,
            )
        )
        self.scratch = scratch
        self.ending: Ending | None = None
        self.group: RankGroup | None = None
        self.others: OtherMachines | None = None
        self.told = False  # by a signal
        self.judging = False  # whether a signal that comes now still counts
        self.starts = 0
        self.launched = time.time()

    def prefix(self, rank: int | None) -> str:
        return self.group.prefix(rank) if self.group is not None else "arriero: "

    @contextmanager
    def passing_on_signals(self) -> Iterator[None]:
        """A block in which a signal to the launcher reaches every process once, and ends the launcher with them."""
        before: dict[signal.Signals, Any] = {}
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                before[number] = signal.signal(number, self._pass_on)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.told = True
        if self.group is not None and self.group.ending is None:
            self.group.send(_SIGNALS[signal.Signals(number)])
        elif number == signal.SIGINT and not self.judging:
            raise KeyboardInterrupt
        elif not self.judging:
            os.write(2, f"arriero: asked to end ({signal.Signals(number).name})\n".encode())
            raise SystemExit(_EXIT_BY_SIGNAL + number)

    def leave(self) -> None:
        """Close the meeting, and let the other machines know if this one ends the run before its time."""
        if self.others is not None and (self.ending is None or self.ending.report is not None):
            self.others.tell_end()
        self.handler.shutdown()

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        self.others = None
        meeting = self.job.meeting
        timer = threading.Timer(QUIET_SECONDS, say, [f"waiting for the other machines at {meeting.place}"])
        timer.daemon = True
        if not isinstance(self.handler, NumberedMachines):  # those tell it themselves
            timer.start()
        try:
            super()._rendezvous(worker_group)
        finally:
            timer.cancel()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.starts += 1
        restart = self._agreed_restart(worker_group)
        ranks = []
        for worker in worker_group.workers:
            variables = {
                **self.job.environment,
                "RANK": str(worker.global_rank),
                "LOCAL_RANK": str(worker.local_rank),
                "GROUP_RANK": str(worker_group.group_rank),
                "WORLD_SIZE": str(worker.world_size),
                "LOCAL_WORLD_SIZE": str(self.job.processes),
                "GROUP_WORLD_SIZE": str(worker_group.group_world_size),
                "MASTER_ADDR": str(worker_group.master_addr),
                "MASTER_PORT": str(worker_group.master_port),
                "TORCHELASTIC_RESTART_COUNT": str(restart),
                "TORCHELASTIC_MAX_RESTARTS": str(self.job.max_restarts),
                "TORCHELASTIC_RUN_ID": self.handler.get_run_id(),
                "TORCHELASTIC_USE_AGENT_STORE": str(self.handler.use_agent_store),
                RESTART: str(restart),
                LAUNCHED: str(self.launched),
            }
            if self.job.meeting.fewest < self.job.meeting.most:
                variables[MOST] = str(self.job.processes * self.job.meeting.most)
            if self.job.meeting.on_loopback:
                for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                    variables.setdefault(name, _loopback_interface())
            log = None if self.job.log_dir is None else self.job.log_dir / f"workerlog.{worker.global_rank}"
            ranks.append(
                RankProcess(
                    rank=worker.global_rank,
                    command=self.job.command,
                    environment=variables,
                    scratch=self.scratch,
                    log=log,
                    append=self.starts > 1,
                    shown=worker.global_rank == 0,
                )
            )
        machines = worker_group.group_world_size or 1
        if machines > 1:
            self.others = OtherMachines(
                worker_group.store,  # type: ignore[arg-type]
                worker_group.group_rank or 0,
                machines,
                str(worker_group.master_addr),
            )
        alone = worker_group.workers[0].world_size == 1
        self.group = RankGroup(ranks, alone)
        self.group.start()
        return {worker.local_rank: rank.pid for worker, rank in zip(worker_group.workers, ranks, strict=True)}

    def _agreed_restart(self, worker_group: WorkerGroup) -> int:
        """How often the processes have been started again: a machine that joined later follows the others."""
        store: Any = worker_group.store
        store.set(f"starts {worker_group.group_rank}", str(self.starts))
        return max(int(store.get(f"starts {machine}")) for machine in range(worker_group.group_world_size or 1)) - 1

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        assert self.group is not None
        ending = self.group.poll()
        if self.others is not None and ending is None:
            ending = self._ended_elsewhere(self.group, self.others)
        elif self.others is not None and ending is not None:
            ending = self._judged(ending, self.others)
        if ending is None:
            return RunResult(state=WorkerState.HEALTHY)
        self.ending = ending
        if ending.exit_code == 0:
            done = {worker.global_rank: None for worker in worker_group.workers}
            return RunResult(state=WorkerState.SUCCEEDED, return_values=done)
        if not ending.worth_another_try:
            self._remaining_restarts = 0
        elif self._remaining_restarts > 0 and ending.report is not None:
            count = self.job.max_restarts - self._remaining_restarts + 1
            print(
                f"{self.prefix(ending.rank)}{ending.report.message}; all processes are started again "
                f"({count} of {self.job.max_restarts})",
                file=sys.stderr,
                flush=True,
            )
        return RunResult(state=WorkerState.FAILED)

    def _ended_elsewhere(self, group: RankGroup, others: OtherMachines) -> Ending | None:
        """How the processes here ended because another machine has ended the run; None if none has."""
        by = others.has_ended(_ELSEWHERE_SECONDS, GRACE_SECONDS)
        if by is None or group.told:
            return None
        self._remaining_restarts = 0
        ending = group.cut_short()
        if ending.report is not None and ending.report.failed:
            return ending
        return _because_of(f"{by} has ended this run: its launcher says why")

    def _judged(self, ending: Ending, others: OtherMachines) -> Ending:
        """An ending; no good one if the processes stopped in order because another machine was lost, or told to stop."""
        if ending.report is None or not ending.report.stopped or self.told:
            return ending
        self.judging = True
        try:
            missing = others.missing(lambda: self.told)
        finally:
            self.judging = False
        if missing is None:
            return ending
        if self.job.meeting.fewest == self.job.meeting.most:
            self._remaining_restarts = 0
        return _because_of(f"{missing} is gone or was told to end ({ending.report.message})")

    def _exit_barrier(self) -> None:
        """Wait for the other machines, which may need what this one holds; not after a stop: one may be gone at once."""
        store: Any = self._worker_group.store
        if self.ending is None or self.ending.report is not None:
            return
        deadline = time.monotonic() + self._exit_barrier_timeout
        try:
            done = store.add("done", 1)
            while done < (self._worker_group.group_world_size or 1) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                done = store.add("done", 0)
        except RuntimeError:
            return  # the machine that holds the store has left: it was through

    # torch has added arguments to these two from version to version; none is of use here.
    def _stop_workers(self, worker_group: WorkerGroup, *_: object, **__: object) -> None:
        if self.group is not None and self.job.meeting.fewest < self.job.meeting.most:
            self.group.stop(GRACE_SECONDS)  # a machine came or went: a checkpoint is written first
        elif self.group is not None:
            self.group.stop()

    def _shutdown(self, *_: object, **__: object) -> None:
        if self.group is not None:
            self.group.stop()


def _because_of(message: str) -> Ending:
    return Ending(None, Report(time=time.time(), message=message, exit_code=PeerError.exit_code, of_peer=True))


def _no_meeting(meeting: Meeting, error: RendezvousError) -> ConfigError:
    if isinstance(error, RendezvousClosedError):
        return ConfigError("another machine has ended this run: its launcher says why")
    detail = " ".join(str(error).split())[:200]
    return ConfigError(
        f"the {meeting.most} machines of this run cannot meet at {meeting.place} ({detail}): check --master or "
        "--rdzv_endpoint, and that the launcher of every machine is started"
    )


def _loopback_interface() -> str:
    """The name of the network interface that reaches only this machine, e.g. lo."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses):
            return name
    return "lo"

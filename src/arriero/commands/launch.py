"""`arriero launch --gpus "0,1" --log_dir DIR VERB ...`: a verb on several processes, by torchrun's agent."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from arriero.commands.table import ONE_PROCESS, VERBS, Verb, load_verb
from arriero.config.optimization import OptimizationOptions
from arriero.config.option import REQUIRED, OptionGroup, option, option_table
from arriero.config.parallel import ParallelOptions
from arriero.config.parser import HelpRequested, parse
from arriero.errors import ConfigError

HELP = (
    "Start a command on several processes, one for each GPU, here or on several machines. With --log_dir, every process "
    "writes its output to a file there: workerlog.0, workerlog.1, ... The error of the process that failed first is shown."
)

_DEVICE = re.compile(r"(GPU|MIG)-[\w/-]+")  # what CUDA_VISIBLE_DEVICES takes besides numbers


@dataclass(kw_only=True)
class LaunchOptions(OptionGroup):
    """Launching."""

    command: list[str] = option(REQUIRED, "the command to start, with its options", positional=True, remainder=True)
    gpus: str | None = option(
        None,
        'the GPUs to use, e.g. "0,1": sets CUDA_VISIBLE_DEVICES and starts one process for each',
        aliases=("devices",),
    )
    log_dir: str | None = option(None, "folder of the processes' output; rank 0 also writes to the terminal")
    nproc_per_node: int | None = option(None, "processes on this machine (default: one for each of --gpus)", minimum=1)
    nnodes: str | None = option(None, "number of machines, or MIN:MAX")
    node_rank: int | None = option(
        None, "which machine this is, from 0 (default: as they come)", aliases=("rank",), minimum=0
    )
    master_addr: str | None = option(None, "address of machine 0")
    master_port: int | None = option(None, "port on machine 0", minimum=0, maximum=65535)
    master: str | None = option(None, "both at once, ADDRESS:PORT (as Paddle's launcher)")
    rdzv_backend: str | None = option(None, "torchrun's rendezvous backend, e.g. c10d")
    rdzv_endpoint: str | None = option(None, "its HOST:PORT")
    rdzv_id: str | None = option(None, "the job's id", aliases=("job_id",))
    max_restarts: int = option(
        0, "times all processes are started again after a failure; training goes on from the last checkpoint", minimum=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus is not None:
            words = self.gpus.replace(" ", "").split(",")
            if not all(words) or len(set(words)) < len(words):
                raise ConfigError(f'--gpus is {self.gpus!r}: list each GPU once, e.g. --gpus "0,1"')
            if not all(word.isdecimal() or _DEVICE.fullmatch(word) for word in words):
                raise ConfigError(
                    f'--gpus is {self.gpus!r}: give numbers from 0 on, e.g. --gpus "0,1", or names (GPU-..., MIG-...)'
                )
            if self.nproc_per_node is not None and self.nproc_per_node != len(words):
                raise ConfigError(
                    f"--nproc_per_node {self.nproc_per_node} and --gpus {self.gpus} ({len(words)} GPUs) disagree: "
                    "drop one of them"
                )
            self.gpus = ",".join(words)
        if self.master is not None:
            address, colon, port = self.master.rpartition(":")
            if not colon or not address or not port.isdecimal() or int(port) > 65535:
                raise ConfigError(f"--master is {self.master!r}: give ADDRESS:PORT")
            if self.master_addr is not None or self.master_port is not None:
                raise ConfigError("--master and --master_addr/--master_port say the same: give one of the two forms")
            self.master_addr, self.master_port = address, int(port)
        self._check_machines()

    def _check_machines(self) -> None:
        fewest, most = self.machines
        if self.node_rank is not None and fewest < most:
            raise ConfigError(f"--node_rank needs a fixed number of machines and --nnodes is {self.nnodes}: drop it")
        if self.node_rank is not None and self.node_rank >= most:
            raise ConfigError(f"--node_rank is {self.node_rank} of {most} machines: number them from 0 to {most - 1}")
        if most > 1 and self.master_addr is None and self.rdzv_endpoint is None:
            raise ConfigError(
                f"--nnodes {self.nnodes}: name where the machines meet: --master ADDRESS:PORT of machine 0"
            )
        if most > 1 and self.rdzv_backend == "static" and self.node_rank is None:
            raise ConfigError("--rdzv_backend static needs the number of this machine: --node_rank")

    @property
    def machines(self) -> tuple[int, int]:
        """The fewest and the most."""
        words = (self.nnodes or "1").split(":")
        if len(words) > 2 or not all(word.isdecimal() for word in words):
            raise ConfigError(f"--nnodes is {self.nnodes!r}: give a number, or MIN:MAX")
        fewest, most = int(words[0]), int(words[-1])
        if not 1 <= fewest <= most:
            raise ConfigError(f"--nnodes is {self.nnodes!r}: give 1 or more, or MIN:MAX with MIN first")
        return fewest, most

    @property
    def processes(self) -> int:
        """Processes on this machine."""
        return self.nproc_per_node or (len(self.gpus.split(",")) if self.gpus else 1)

    @property
    def single(self) -> bool:
        """Whether the whole run is one process."""
        return self.processes == 1 and self.machines == (1, 1)


OPTIONS: tuple[type, ...] = (LaunchOptions,)


def command_line(launch: LaunchOptions) -> list[str]:
    """What every process runs: arriero itself; no Python file of the current folder takes part (-P)."""
    return [sys.executable, "-P", "-m", "arriero", *launch.command]


def environment(launch: LaunchOptions) -> dict[str, str]:
    """This process's environment with the GPUs chosen, and the cores shared out unless OMP_NUM_THREADS is set."""
    variables = dict(os.environ)
    if launch.gpus is not None:
        variables["CUDA_VISIBLE_DEVICES"] = launch.gpus
    if not launch.single:
        variables.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // launch.processes, 1)))
        # The C++ side warns of every connection that a process which ends leaves behind.
        variables.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return variables


def check_command(launch: LaunchOptions) -> None:
    """Find here, once, what every process would find for itself.

    Raises:
        ConfigError: a slip in the verb's options, a verb that cannot run in several processes, or degrees of
            parallelism that do not fit their number.
        HelpRequested: the command is `VERB --help`.
    """
    name, *arguments = launch.command
    if name == "launch":
        raise ConfigError("launch cannot start itself: name another command")
    if name not in VERBS:
        raise ConfigError(f"unknown command {name[:60]!r} after launch: arriero --help lists them")
    verb = load_verb(name)
    _check_order(verb, arguments)
    groups = parse(verb.options, [word for word in arguments if word != "--debug"], verb.prog, warn=False)
    if name in ONE_PROCESS and not launch.single:
        asked = f"--gpus {launch.gpus}" if launch.gpus is not None else "launch"
        raise ConfigError(f"{name} runs in one process and {asked} asks for several: name one GPU, e.g. --gpus 0")
    fewest, most = launch.machines
    for group in groups:
        for machines in range(fewest, most + 1):
            if isinstance(group, ParallelOptions):
                group.layout(launch.processes * machines)
        if isinstance(group, OptimizationOptions) and fewest < most:
            _check_accumulation(launch, group.gradient_accumulation_steps)


def _check_accumulation(launch: LaunchOptions, given: int) -> None:
    """Raises ConfigError where a step of all machines is not shared out evenly by fewer."""
    fewest, most = launch.machines
    needed = math.lcm(*(count // math.gcd(most, count) for count in range(fewest, most + 1)))
    if given % needed:
        raise ConfigError(
            f"--nnodes {launch.nnodes}: a step of {most} machines is not shared out evenly by every number of them from "
            f"{fewest} on: make --gradient_accumulation_steps a multiple of {needed} (it is {given})"
        )


def _check_order(verb: Verb, arguments: list[str]) -> None:
    """Raises ConfigError for an option of launch behind the verb, which has none of that name."""
    own, verbs = option_table(OPTIONS), option_table(verb.options)
    for word in itertools.takewhile(lambda word: word != "--", arguments):
        name = word[2:].partition("=")[0].replace("-", "_")
        if word.startswith("--") and name in own and name != "command" and name not in verbs:
            place = f"arriero launch --{name} ... {verb.prog.removeprefix('arriero ')} ..."
            raise ConfigError(f"--{name} is an option of launch, and those come before the command: {place}")


def check_gpus(launch: LaunchOptions) -> None:
    """Refuse GPUs that this machine does not have, if it has any: without one, all processes run on the CPU.

    Raises:
        ConfigError: naming those there are.
    """
    if launch.gpus is None or "CUDA_VISIBLE_DEVICES" in os.environ:  # which counts only some of them
        return
    import torch

    count = torch.cuda.device_count()
    missing = [word for word in launch.gpus.split(",") if word.isdecimal() and int(word) >= count > 0]
    if missing:
        raise ConfigError(f"--gpus names {missing[0]} and this machine has {count} GPUs: number them from 0")


def run(launch: LaunchOptions) -> int:
    """Start the processes, wait for them, and return the exit code of the one that failed first."""
    variables = environment(launch)
    try:
        check_command(launch)
    except HelpRequested:
        _become(command_line(launch), variables)
    if launch.single and launch.log_dir is None and launch.max_restarts == 0:
        _become(command_line(launch), variables)
    log_dir = None if launch.log_dir is None else Path(launch.log_dir)
    if log_dir is not None:
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--log_dir {log_dir}: {error.strerror}: name a folder that can be written") from error
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of the launcher too, before it imports torch
    with _one_line_at_sigterm():
        return _start(launch, variables, log_dir)


def _start(launch: LaunchOptions, variables: dict[str, str], log_dir: Path | None) -> int:
    check_gpus(launch)
    from arriero.parallel.launching import agent
    from arriero.parallel.launching.rendezvous import Meeting

    fewest, most = launch.machines
    return agent.launch(
        agent.Job(
            command=command_line(launch),
            environment=variables,
            processes=launch.processes,
            meeting=Meeting(
                fewest=fewest,
                most=most,
                machine=launch.node_rank,
                address=launch.master_addr,
                port=launch.master_port,
                backend=launch.rdzv_backend,
                endpoint=launch.rdzv_endpoint,
                job=launch.rdzv_id or "arriero",
            ),
            max_restarts=launch.max_restarts,
            log_dir=log_dir,
        )
    )


@contextlib.contextmanager
def _one_line_at_sigterm() -> Iterator[None]:
    """A block that ends with a line at SIGTERM: importing torch takes seconds, and then the agent listens."""

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, b"arriero: asked to end (SIGTERM)\n")
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _become(line: list[str], variables: dict[str, str]) -> NoReturn:
    """Turn this process into the command: the terminal, signals and the exit code are the command's."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(line[0], line, variables)

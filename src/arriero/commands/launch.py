"""`arriero launch --gpus "0,1" --log_dir DIR VERB ...`: a thin wrapper of torchrun (`torch.distributed.run`)."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from arriero.commands.table import LATER, ONE_PROCESS, VERBS, load_verb
from arriero.config.option import REQUIRED, OptionGroup, option
from arriero.config.parser import HelpRequested, parse
from arriero.errors import ConfigError

HELP = (
    "Start a command on several processes, one for each GPU. A single process is started without torchrun. "
    "With --log_dir, every process writes its output there (one: workerlog.0; several: torchrun's folders, one a rank)."
)


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
    nproc_per_node: int | None = option(None, "processes on this machine (default: one for each GPU)", minimum=1)
    nnodes: str | None = option(None, "number of machines, or MIN:MAX")
    node_rank: int | None = option(None, "which machine this is, from 0", aliases=("rank",), minimum=0)
    master_addr: str | None = option(None, "address of machine 0")
    master_port: int | None = option(None, "port on machine 0", minimum=0, maximum=65535)
    master: str | None = option(None, "both at once, ADDRESS:PORT (as Paddle's launcher)")
    rdzv_backend: str | None = option(None, "torchrun's rendezvous backend, e.g. c10d")
    rdzv_endpoint: str | None = option(None, "its HOST:PORT")
    rdzv_id: str | None = option(None, "the job's id", aliases=("job_id",))
    max_restarts: int | None = option(None, "times a failed group of processes is started again", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus is not None:
            words = self.gpus.replace(" ", "").split(",")
            if not all(words) or len(set(words)) < len(words):
                raise ConfigError(f'--gpus is {self.gpus!r}: list each GPU once, e.g. --gpus "0,1"')
            if self.nproc_per_node is not None and self.nproc_per_node != len(words):
                raise ConfigError(
                    f"--nproc_per_node {self.nproc_per_node} and --gpus {self.gpus} ({len(words)} GPUs) disagree: "
                    "drop one of them"
                )
            self.gpus = ",".join(words)
        if self.master is not None:
            address, colon, port = self.master.rpartition(":")
            if not colon or not address or not port.isdecimal():
                raise ConfigError(f"--master is {self.master!r}: give ADDRESS:PORT")
            if self.master_addr is not None or self.master_port is not None:
                raise ConfigError("--master and --master_addr/--master_port say the same: give one of the two forms")
            self.master_addr, self.master_port = address, int(port)

    @property
    def processes(self) -> int:
        """Processes on this machine."""
        return self.nproc_per_node or (len(self.gpus.split(",")) if self.gpus else 1)

    @property
    def single(self) -> bool:
        """Whether the whole run is one process."""
        return self.processes == 1 and self.nnodes in (None, "1", "1:1")


OPTIONS: tuple[type, ...] = (LaunchOptions,)


def command_line(launch: LaunchOptions) -> list[str]:
    """The process to start: arriero itself, or torchrun with arriero in it."""
    target = ["-m", "arriero", *launch.command]
    if launch.single:
        return [sys.executable, *target]
    line = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={launch.processes}"]
    for name in ("nnodes", "node_rank", "rdzv_backend", "rdzv_endpoint", "rdzv_id", "max_restarts"):
        value = getattr(launch, name)
        if value is not None:
            line.append(f"--{name}={value}")
    if launch.master_addr is not None:
        line += [f"--master_addr={launch.master_addr}"]
    if launch.master_port is not None:
        line += [f"--master_port={launch.master_port}"]
    elif launch.nnodes in (None, "1", "1:1") and launch.rdzv_endpoint is None:
        line.append("--standalone")  # a free port is chosen, so that two runs on one machine do not collide
    if launch.log_dir is not None:
        line += [f"--log-dir={launch.log_dir}", "--redirects=3", "--tee=0:3"]
    return [*line, *target]


def environment(launch: LaunchOptions) -> dict[str, str]:
    """This process's environment with the GPUs chosen, and the cores shared out unless OMP_NUM_THREADS is set."""
    variables = dict(os.environ)
    if launch.gpus is not None:
        variables["CUDA_VISIBLE_DEVICES"] = launch.gpus
    if not launch.single:
        variables.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // launch.processes, 1)))
    return variables


def check_command(launch: LaunchOptions) -> None:
    """Find here, once, what every process would find for itself.

    Raises:
        ConfigError: a slip in the verb's options, or a verb that cannot run in several processes.
        ArrieroError: the verb's own answer, if it comes in a later version.
        HelpRequested: the command is `VERB --help`.
    """
    name, *arguments = launch.command
    if name == "launch":
        raise ConfigError("launch cannot start itself: name another command")
    if name not in VERBS:
        raise ConfigError(f"unknown command {name[:60]!r} after launch: arriero --help lists them")
    verb = load_verb(name)
    groups = parse(verb.options, [word for word in arguments if word != "--debug"], verb.prog, warn=False)
    if name in LATER:
        verb.run(*groups)
    if name in ONE_PROCESS and not launch.single:
        asked = f"--gpus {launch.gpus}" if launch.gpus is not None else "launch"
        raise ConfigError(
            f"{name} runs in one process in this version and {asked} asks for several: name one GPU, e.g. --gpus 0"
        )


def run(launch: LaunchOptions) -> int:
    """Start the processes, wait for them, and return their exit code."""
    try:
        check_command(launch)
    except HelpRequested:
        return subprocess.call([sys.executable, "-m", "arriero", *launch.command])
    if launch.log_dir is not None:
        Path(launch.log_dir).mkdir(parents=True, exist_ok=True)
    line, variables = command_line(launch), environment(launch)
    if launch.single and launch.log_dir is not None:
        return _call_with_log(line, variables, Path(launch.log_dir) / "workerlog.0")
    return subprocess.call(line, env=variables)


def _call_with_log(line: list[str], variables: dict[str, str], log: Path) -> int:
    """Run a process with its output on the terminal and in a file."""
    with (
        log.open("wb") as file,
        subprocess.Popen(line, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0) as process,
    ):
        assert process.stdout is not None
        while chunk := process.stdout.read(4096):
            file.write(chunk)
            file.flush()
            sys.stdout.write(chunk.decode("utf-8", errors="replace"))
            sys.stdout.flush()
        return process.wait()

"""A verb without a model for the tests of `launch`: `python launched_probe.py WHAT` does WHAT in every process.

`python launched_probe.py --launch '{"processes": 2, ...}' WHAT` starts it through the launcher.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
import types
from datetime import timedelta
from pathlib import Path

RANK = int(os.environ.get("RANK", "0"))


def join() -> None:
    """Start the process group and let everybody arrive."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    dist.all_reduce(torch.zeros(1))


def wait_for_all() -> None:
    """A collective that needs every process."""
    import torch
    import torch.distributed as dist

    total = torch.ones(1)
    dist.all_reduce(total)
    print(f"sum {total.item():.0f}")
    dist.barrier()
    dist.destroy_process_group()


def listeners() -> list[str]:
    """The addresses this process and its launcher listen on."""
    import psutil

    found = []
    for pid in (os.getpid(), os.getppid()):
        found += [c.laddr.ip for c in psutil.Process(pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    return found


def probe(what: str) -> int:
    from arriero.errors import ConfigError, PeerError, RunStopped

    print(f"rank {RANK} of {os.environ.get('WORLD_SIZE')} restart {os.environ.get('ARRIERO_RESTART')}")
    print(f"a warning of rank {RANK}", file=sys.stderr)
    if what == "meet":
        join()
        print("listens on", *sorted(set(listeners())))
        wait_for_all()
    elif what == "user_error":
        join()
        if RANK == 1:
            time.sleep(0.5)
            raise ConfigError("row 7 has no text:\n mend it")
        wait_for_all()
    elif what == "peer_first":  # the one that is to blame ends last
        if RANK == 0:
            raise PeerError("rank 1 failed (no rows)")
        time.sleep(1.5)
        raise ConfigError("no rows")
    elif what == "defect":
        join()
        if RANK == 1:
            raise RuntimeError("a bug")
        wait_for_all()
    elif what == "killed":
        join()
        if RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for_all()
    elif what == "deaf":  # does not notice that the other is gone, and ignores SIGTERM
        if RANK == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(100)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "silent_exit":
        if RANK == 1:
            print("the disk is on fire", file=sys.stderr)
            sys.stderr.flush()
            os._exit(7)
        time.sleep(100)
    elif what == "once":  # fails the first time only
        join()
        if RANK == 1 and os.environ["ARRIERO_RESTART"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for_all()
    elif what == "stop":
        caught: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: caught.append(number))
        Path(f"ready.{RANK}").touch()
        while not caught:
            time.sleep(0.05)
        time.sleep(1)  # writing a checkpoint: a second signal would be noticed here
        Path(f"caught.{RANK}").write_text(json.dumps(caught))
        raise RunStopped("stopped after step 3", 130 if caught[0] == signal.SIGINT else 0)
    elif what == "fails_at_start":  # before it has met the others
        if RANK == 1:
            raise ConfigError("no such model")
        join()
    elif what == "stop_together":  # as training does: a signal to one of them stops all, in order
        caught = []
        signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
        Path(f"ready.{RANK}").touch()
        while not caught and not Path("caught").exists():
            time.sleep(0.05)
        Path("caught").touch()
        raise RunStopped("stopped after step 3", 0)
    elif what == "sleep":
        Path(f"ready.{RANK}").write_text(str(os.getpid()))
        time.sleep(100)
    return 0


def start(job: dict[str, object], command: list[str]) -> int:
    from arriero.parallel.launching import agent
    from arriero.parallel.launching.rendezvous import Meeting

    meeting = Meeting(**job.pop("meeting", {}))  # type: ignore[arg-type]
    if "log_dir" in job:
        job["log_dir"] = Path(str(job["log_dir"]))
    return agent.launch(agent.Job(command=command, environment=dict(os.environ), meeting=meeting, **job))  # type: ignore[arg-type]


def main() -> int:
    from arriero import cli
    from arriero.config.option import REQUIRED, OptionGroup, option

    if sys.argv[1] == "--launch":
        # As the command line does it: errors of the launcher itself are one line too.
        job, what = json.loads(sys.argv[2]), sys.argv[3:]
        module = types.ModuleType("launch_probe")
        module.__dict__.update(HELP="", OPTIONS=(), run=lambda: start(job, [sys.executable, __file__, *what]))
        arguments = ["probe"]
    else:
        options = dataclasses.make_dataclass(
            "ProbeOptions",
            [("what", str, option(REQUIRED, "what to do", positional=True))],
            bases=(OptionGroup,),
            kw_only=True,
        )
        module = types.ModuleType("launch_probe")
        module.__dict__.update(HELP="", OPTIONS=(options,), run=lambda given: probe(given.what))
        arguments = ["probe", *sys.argv[1:]]
    sys.modules["launch_probe"] = module
    cli.VERBS["probe"] = ("launch_probe", "")
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())

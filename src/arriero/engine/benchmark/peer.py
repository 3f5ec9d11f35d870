"""Another program on the same work: a process that answers one job a line, so that runs of both can take turns."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arriero.engine.benchmark.measured import Job
from arriero.errors import ConfigError, GenerationError

# Program -> (the module that it needs, the module that runs it).
PEERS = {"transformers": ("transformers", "arriero.engine.benchmark.transformers_side")}


@dataclass(frozen=True)
class PeerRun:
    """What became of a job.

    Attributes:
        seconds: of all of it.
        answers: token ids.
    """

    seconds: float
    answers: list[list[int]]


class Peer:
    """A program that runs beside this one. Closing its input ends it.

    Attributes:
        name: as in `PEERS`.
        version: of the program.
    """

    def __init__(self, name: str, process: subprocess.Popen[str], settings: dict[str, Any]) -> None:
        self.name, self._process = name, process
        self.version = str(self._ask(settings)["version"])

    def run(self, job: Job) -> PeerRun:
        """Do a job in batches of its `max_running` prompts.

        Raises:
            GenerationError: the program failed; with its own words.
        """
        found = self._ask(
            {
                "prompts": [list(prompt) for prompt in job.prompts],
                "new_tokens": list(job.new_tokens),
                "batch": job.max_running,
            }
        )
        return PeerRun(found["seconds"], found["answers"])

    def _ask(self, values: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # then it ended, and there is no answer
            self._process.stdin.write(json.dumps(values) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise GenerationError(
                f"{self.name} ended with exit code {code} in place of an answer: is there memory for both?"
            )
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise GenerationError(f"{self.name} failed: {found['error']}")
        return found


def check_installed(name: str) -> None:
    """Raises ConfigError if a program is not there."""
    module = PEERS[name][0]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"--against {name}: it is not installed here; pip install {module}")


@contextlib.contextmanager
def peer(name: str, folder: Path, dtype: torch.dtype, device: torch.device, threads: int) -> Iterator[Peer]:
    """A program with a model loaded, ended afterwards.

    Args:
        folder: the model's.
        threads: that it computes with.

    Raises:
        GenerationError: it cannot load the model.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", PEERS[name][1]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env=environment,
        start_new_session=True,  # Ctrl-C is for this process, which ends it
    )
    try:
        settings = {"folder": str(folder), "dtype": str(dtype).removeprefix("torch."), "device": str(device)}
        yield Peer(name, process, {**settings, "threads": threads})
    finally:
        process.kill()
        process.communicate()

"""The program of a large run, built on one machine: what single ranks of it really hold.

torch's fake process group answers every collective at once and sends nothing, and parameters on the meta device have shapes
and no memory, so that any number of ranks can be played one after the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from arriero.config.layout import AXES, Coordinates, Layout
from arriero.errors import ConfigError
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.parallelize import parallelize
from arriero.parallel.placement import local_tensors, placements
from arriero.parallel.processes import Processes
from arriero.training.planning.setup import Method, ModelFacts, TrainingSetup


@dataclass(frozen=True)
class LocalTensor:
    """One parameter in one rank: its whole shape, the box of it that is held, and bytes."""

    name: str
    shape: tuple[int, ...]
    size: tuple[int, ...]
    offset: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class RankProgram:
    """What one rank holds of the model."""

    rank: int
    at: Coordinates
    tensors: tuple[LocalTensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def chosen_ranks(layout: Layout) -> list[int]:
    """The first rank of the first, the middle and the last place of the pipeline, and the last rank of all."""
    places = sorted({0, layout.pp // 2, layout.pp - 1})
    return sorted({*(layout.rank(Coordinates(pp=pp)) for pp in places), layout.size - 1})


def dry_run(facts: ModelFacts, setup: TrainingSetup, ranks: list[int]) -> list[RankProgram]:
    """Build the program of each of some ranks, in a process of its own: torch keeps the groups of the first one it plays.

    Raises:
        ConfigError: the program cannot be built.
    """
    asked = {
        "config": facts.config.to_dict(),
        "method": asdict(facts.method),
        "layout": asdict(setup.layout),
        "dtype": setup.weight_dtype,
        "sequence": setup.sequence,
    }
    command = [sys.executable, "-P", "-m", __name__]  # not with the Python files of the current folder
    players = []
    for rank in ranks:
        player = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        assert player.stdin is not None
        with player.stdin:
            player.stdin.write(json.dumps(asked | {"rank": rank}))
        player.stdin = None  # `communicate` would write to it
        players.append((rank, player))
    answers = [(rank, player, *player.communicate()) for rank, player in players]
    programs = []
    for rank, player, said, errors in answers:
        if player.returncode:
            reason = errors.strip().splitlines()[-1] if errors.strip() else f"exit code {player.returncode}"
            raise ConfigError(f"--dry_run: the program of rank {rank} cannot be built ({reason})")
        tensors = tuple(
            LocalTensor(name, tuple(shape), tuple(size), tuple(offset), nbytes)
            for name, shape, size, offset, nbytes in json.loads(said)
        )
        programs.append(RankProgram(rank, setup.layout.coordinates(rank), tensors))
    return programs


def _environment() -> dict[str, str]:
    """This process's, so that the same package is imported, and without what a launcher set."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def play(asked: dict[str, Any]) -> list[LocalTensor]:
    """Build the program of one rank in this process, which must have no process group yet."""
    layout, rank = Layout(**asked["layout"]), int(asked["rank"])
    mesh = None
    if layout.size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.size)
        mesh = init_device_mesh("cpu", layout.degrees, mesh_dim_names=AXES)
    method = Method(**asked["method"] | {"lora_targets": tuple(asked["method"]["lora_targets"])})
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_dict(asked["config"])).to(getattr(torch, asked["dtype"]))
        method.apply(model)
    parallelize(model, Processes(layout, rank, mesh), torch.device("cpu"), tokens=asked["sequence"])
    places = placements(model)
    return [
        LocalTensor(name, places[name].shape, tuple(tensor.shape), places[name].offset, tensor.nbytes)
        for name, tensor in local_tensors(model).items()
    ]


if __name__ == "__main__":
    found = play(json.load(sys.stdin))
    json.dump([[one.name, one.shape, one.size, one.offset, one.nbytes] for one in found], sys.stdout)

"""What a process holds falls with the number of processes: weights, gradients and optimizer, and its memory while loading.

Run as a program, this file is one of the processes.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from arriero.config.layout import Layout
from arriero.config.parallel import ParallelOptions
from arriero.formats import hf
from arriero.formats.parts import Placement
from arriero.formats.shard_writer import write_shards
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.materialize import materialize
from arriero.parallel.parallelize import parallelize
from arriero.parallel.placement import local_tensors
from arriero.parallel.processes import Processes, start, stop

sys.path.insert(0, str(Path(__file__).parent))
from layout_runs import CPU, LAYOUTS, Run, append, make_trainer, read_lines, run_ranks

# every dimension is a multiple of 3 and 4, so that the shares are exact
HIDDEN, INTERMEDIATE, LAYERS, WORDS, HEADS = 48, 96, 12, 96, 12
SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "vocab_size": WORDS + 12,  # above the ids of the data
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": HIDDEN // HEADS,
}
FLAGS: dict[str, dict[str, Any]] = {
    "fsdp": {"sharding": ["stage3"]},
    "tp": {"tensor_parallel_degree": -1},
    "pp": {"pipeline_parallel_degree": -1},
}
BIG = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128,
}


def flags_of(axis: str, world: int) -> dict[str, Any]:
    return {name: world if value == -1 else value for name, value in FLAGS[axis].items()}


def layout_of(axis: str, world: int) -> Layout:
    return ParallelOptions(**flags_of(axis, world)).layout(world)


# What each process does


def training_bytes(folder: Path, axis: str, world: int) -> None:
    processes = start(layout_of(axis, world), CPU) if world > 1 else Processes()
    LAYOUTS[axis] = (world, flags_of(axis, world))
    run = Run(model=SHAPE, steps=2, copies=processes.layout.data)
    trainer, _ = make_trainer(run, axis if world > 1 else None, processes, folder)
    gradients: list[int] = []
    clip = trainer.optimizer.clip

    def look(max_norm: float, norm: float) -> None:
        gradients.append(sum(tensor.nbytes for tensor in trainer.optimizer.gradients().values()))
        clip(max_norm, norm)

    trainer.optimizer.clip = look  # type: ignore[method-assign]
    trainer.train()
    state = trainer.optimizer.parts()
    layers = {name.split(".")[2] for name in local_tensors(trainer.model) if ".layers." in name}
    append(
        folder / f"bytes-{axis}-{world}-{processes.rank}.jsonl",
        {
            "layers": len(layers),
            "weights": sum(tensor.untyped_storage().nbytes() for tensor in local_tensors(trainer.model).values()),
            "moments": sum(part.tensor.nbytes for name, part in state.items() if not name.endswith(".step")),
            "gradients": gradients[-1],
        },
    )


def own_memory() -> int:
    """Bytes of this process that belong to no file."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


class Peak:
    """The most memory of this process in a block, above that at its start."""

    def __enter__(self) -> Peak:
        self.before, self.most, self.over = own_memory(), 0, False
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def look(self) -> None:
        self.most = max(self.most, own_memory() - self.before)

    def _watch(self) -> None:
        while not self.over:
            self.look()
            time.sleep(0.0005)

    def __exit__(self, *_: object) -> None:
        self.look()
        self.over = True
        self.thread.join()


def read_bytes(folder: Path) -> dict[str, int]:
    """Of each file below a folder that this process maps: the bytes of it that it has looked at."""
    found: dict[str, int] = {}
    name = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            name = Path(words[-1]).name if str(folder) in line else ""
        elif words[0] == "Rss:" and name:
            found[name] = found.get(name, 0) + int(words[1]) * 1024
    return found


def loading(folder: Path, axis: str, world: int) -> None:
    processes = start(layout_of(axis, world), CPU)
    processes.exchange(torch.ones(1 << 20).add(1.0)[0].item())  # what torch and gloo take the first time
    with Peak() as peak:
        model, _ = hf.empty_model(folder / "model", None)
        reader = hf.open_parts(folder / "model", model.config)

        def values(name: str, where: Placement) -> torch.Tensor:
            found = reader.read_part(name, where)
            peak.look()
            return found

        parallelize(model, processes, CPU)
        materialize(model, CPU, values)
    share = sum(tensor.nbytes for tensor in local_tensors(model).values())
    told = {"peak": peak.most, "share": share, "read": read_bytes(folder / "model")}
    append(folder / f"load-{axis}-{processes.rank}.jsonl", told)


def main(what: str, folder: Path) -> None:
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    if what.startswith("load "):
        loading(folder, what.removeprefix("load "), world)
        return
    for axis in FLAGS:
        training_bytes(folder, axis, world)
    if world > 1:
        stop(start(layout_of("pp", world), CPU))


# What they found

LAYER = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN)  # bytes of a layer in fp32
EMBEDDING = 4 * (WORDS + 12) * HIDDEN
NORM = 4 * HIDDEN
WHOLE = LAYERS * LAYER + 2 * EMBEDDING + NORM
NORMS = (2 * LAYERS + 1) * NORM


@pytest.mark.timeout(300)
@pytest.mark.parametrize("worlds", [(1, 4), pytest.param((2, 3), marks=pytest.mark.peers)], ids=str)
def test_weights_gradients_and_optimizer_are_shared_out(worlds: tuple[int, ...], tmp_path: Path) -> None:
    for world in worlds:
        run_ranks(world, Path(__file__), "bytes", str(tmp_path))
    for axis in FLAGS:
        for world in worlds:
            ranks = [read_lines(tmp_path / f"bytes-{axis}-{world}-{rank}.jsonl")[0] for rank in range(world)]
            if axis == "fsdp":
                expected = [WHOLE // world] * world
            elif axis == "tp":  # norms are whole everywhere
                expected = [(WHOLE - NORMS) // world + NORMS] * world
            else:
                layers = [rank["layers"] for rank in ranks]
                assert sum(layers) == LAYERS
                assert max(layers) <= -(-LAYERS // world) + 1  # the head counts as part of a layer
                expected = [count * LAYER for count in layers]
                expected[0] += EMBEDDING
                expected[-1] += EMBEDDING + NORM
            assert [rank["weights"] for rank in ranks] == expected, (axis, world)
            assert [rank["gradients"] for rank in ranks] == expected, (axis, world)
            assert [rank["moments"] for rank in ranks] == [2 * share for share in expected], (axis, world)


def write_big(folder: Path) -> tuple[int, int]:
    """A folder of 140 MB; the bytes of its weights, and of the largest."""
    model = LlamaForCausalLM(LlamaConfig.from_dict(BIG))
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BIG | {"architectures": ["LlamaForCausalLM"]}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sizes = [tensor.nbytes for tensor in tensors.values()]
    assert sum(sizes) > 100e6
    return sum(sizes), max(sizes)


def load_in_four(folder: Path, axis: str, whole: int, largest: int) -> list[dict[str, Any]]:
    run_ranks(4, Path(__file__), f"load {axis}", str(folder))
    found = [read_lines(folder / f"load-{axis}-{rank}.jsonl")[0] for rank in range(4)]
    assert sum(rank["share"] for rank in found) <= whole * 1.001
    for rank in found:
        # the heap's free space takes a part of it; a probe that saw less than half would be blind
        assert 0.5 * rank["share"] < rank["peak"] <= rank["share"] + largest, found
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("axis", ["fsdp", *(pytest.param(a, marks=pytest.mark.peers) for a in ("tp", "pp"))])
def test_loading_takes_the_memory_of_the_share(axis: str, tmp_path: Path) -> None:
    """The peak of each of 4 processes is its share and one tensor."""
    load_in_four(tmp_path, axis, *write_big(tmp_path / "model"))


@pytest.mark.timeout(300)
def test_of_files_of_tensor_parallel_processes_each_reads_its_own(tmp_path: Path) -> None:
    """Nothing is joined, and of the other files only what all hold is looked at: the norms, to compare them."""
    whole, _ = write_big(tmp_path / "whole")
    write_shards(tmp_path / "whole", tmp_path / "model", 4)
    largest = 4 * BIG["intermediate_size"] * BIG["hidden_size"]
    found = load_in_four(tmp_path, "tp", whole, largest)
    for rank, told in enumerate(found):
        own = told["read"].pop(f"model-tp0{rank}-of-04.safetensors")
        assert own > 0.95 * told["share"]
        assert len(told["read"]) == 3
        # the system maps 64 KiB around what is read
        assert all(size < (2 * BIG["num_hidden_layers"] + 3) * 65536 < 0.04 * own for size in told["read"].values()), (
            found
        )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

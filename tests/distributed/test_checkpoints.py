"""Files written by 2 and 4 processes against those of one, and what happens when one of the processes fails or dies.

Run as a program, this file is one of the processes.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from forked import run_processes

from arriero.adapters.lora import LoRAConfig, apply_lora
from arriero.config.checkpoint import CheckpointOptions
from arriero.config.layout import Layout
from arriero.errors import ArrieroError, ConfigError, FormatError, PeerError, TrainingError
from arriero.formats.parts import Part, Placement
from arriero.formats.shared_files import PartReader, agree, write_tensors
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.processes import Processes, start, stop
from arriero.training.checkpoint import TrainState, load_checkpoint, take_snapshot, verify, write_checkpoint
from arriero.training.checkpoint_writer import CheckpointWriter
from arriero.training.run_folder import RunFolder
from arriero.training.weights import AdapterWeights, FullWeights

CPU = torch.device("cpu")
CONFIG = LlamaConfig.from_dict(
    {
        "model_type": "llama",
        "vocab_size": 37,
        "hidden_size": 16,
        "intermediate_size": 22,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
)
SHAPES: dict[str, tuple[int, ...]] = {
    "embed": (13, 8),
    "layers.10.weight": (7, 5),
    "layers.9.weight": (4, 6, 5),
    "layers.9.bias": (3,),
    "step": (),
    "codes": (9, 2),
    "nothing": (0, 3),
    "one row": (1, 21),
}
DTYPES = {"layers.10.weight": torch.bfloat16, "layers.9.weight": torch.float16, "codes": torch.uint8}
SHARD_SIZES = (10**6, 700)


def whole_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: (torch.randn(shape, generator=generator) * 40).to(DTYPES.get(name, torch.float32))
        for name, shape in SHAPES.items()
    }


# Where each rank's box lies.


def run_of(length: int, count: int, index: int) -> tuple[int, int]:
    step = -(-length // count)
    first = min(index * step, length)
    return first, min(step, length - first)


def by_dims(shape: tuple[int, ...], counts: tuple[int, ...], indices: tuple[int, ...]) -> Placement:
    runs = [
        run_of(length, counts[dim], indices[dim]) if dim < len(counts) else (0, length)
        for dim, length in enumerate(shape)
    ]
    # where a tensor has fewer dimensions than are cut, some processes hold the same box
    writes = not any(indices[len(shape) :])
    return Placement(shape, tuple(first for first, _ in runs), tuple(size for _, size in runs), writes=writes)


Cut = Callable[[str, tuple[int, ...], int, int], Placement | None]
CUTS: dict[str, Cut] = {
    "rows": lambda name, shape, size, rank: by_dims(shape, (size,), (rank,)),
    "columns": lambda name, shape, size, rank: by_dims(shape, (1, size), (0, rank)),
    "boxes": lambda name, shape, size, rank: by_dims(
        shape, (1,) * (len(shape) - 2) + (2, size // 2), (0,) * (len(shape) - 2) + (rank % 2, rank // 2)
    ),
    "copies": lambda name, shape, size, rank: Placement(
        shape, (0,) * len(shape), shape, size, writes=rank == len(name) % size
    ),
    # a process knows nothing of what others hold, as in a pipeline
    "pipeline": lambda name, shape, size, rank: Placement.whole(shape) if len(name) % size == rank else None,
}


def cut(tensors: Mapping[str, Tensor], how: str, processes: Processes) -> dict[str, Part]:
    parts = {}
    for name, tensor in tensors.items():
        where = CUTS[how](name, tuple(tensor.shape), processes.size, processes.rank)
        if where is not None:
            parts[name] = Part(tensor[where.box].clone(), where)
    return parts


@dataclass
class CutWeights(FullWeights):
    """The weights of a model of which this process holds a part."""

    how: str = "rows"
    processes: Processes | None = None
    held: dict[str, Part] | None = None

    def parts(self) -> dict[str, Part]:
        if self.held is None:
            assert self.processes is not None
            self.held = cut({n: p.detach() for n, p in self.model.named_parameters()}, self.how, self.processes)
        return self.held


@dataclass
class CutAdapter(AdapterWeights):
    how: str = "rows"
    processes: Processes | None = None
    held: dict[str, Part] | None = None

    def parts(self) -> dict[str, Part]:
        if self.held is None:
            assert self.processes is not None
            whole = {name: part.tensor for name, part in super().parts().items()}
            self.held = cut(whole, self.how, self.processes)
        return self.held


def make_model() -> LlamaForCausalLM:
    model = LlamaForCausalLM(CONFIG)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


def make_adapter(bias: Any = "all") -> tuple[LlamaForCausalLM, LoRAConfig]:
    model, config = make_model(), LoRAConfig(rank=3, bias=bias)
    apply_lora(model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model, config


def optimizer_of(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """AdamW's tensors: two moments of each parameter's shape and a count."""
    tensors = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        tensors[f"{name}.exp_avg"] = parameter.detach() * 2
        tensors[f"{name}.exp_avg_sq"] = parameter.detach() ** 2
        tensors[f"{name}.step"] = torch.tensor(float(number))
    return tensors


def optimizer_parts(model: LlamaForCausalLM, how: str, processes: Processes) -> dict[str, Part]:
    parts = {}
    where = {
        name: CUTS[how](name, tuple(parameter.shape), processes.size, processes.rank)
        for name, parameter in model.named_parameters()
    }
    for name, tensor in optimizer_of(model).items():
        place = where[name.rpartition(".")[0]]
        if place is None or not all(place.size):
            continue  # the optimizer leaves out what it holds nothing of
        if tensor.dim() == 0:
            writes = place.writes and not any(place.offset)
            parts[name] = Part(tensor, Placement((), (), (), writes=writes))
        else:
            parts[name] = Part(tensor[place.box].clone(), place)
    return parts


# What each process does


def write_sets(folder: Path, processes: Processes) -> None:
    for how in CUTS:
        for limit in SHARD_SIZES:
            target = folder / f"{how} {limit}"
            processes.by_first(lambda target=target: target.mkdir())  # type: ignore[misc]
            parts = cut(whole_tensors(), how, processes)
            write_tensors(parts, target, max_shard_size=limit, peers=processes)
            # every process reads boxes that it did not write
            reader, other = PartReader(target), "columns" if how == "rows" else "rows"
            for name, part in cut(whole_tensors(), other, processes).items():
                assert torch.equal(reader.read_part(name, part.placement), part.tensor), (how, name)


def write_checkpoints(folder: Path, processes: Processes) -> None:
    for how, asynchronous in (("rows", False), ("boxes", True), ("copies", False), ("pipeline", True)):
        run, model = folder / f"run {how}", make_model()
        store = CutWeights(model, folder, how=how, processes=processes, max_shard_size="6KB")
        optimizer, state = optimizer_parts(model, how, processes), TrainState(step=7, tokens=70)
        writer, told = CheckpointWriter(processes, asynchronous=asynchronous), list[int]()
        generators = torch.manual_seed(77 + processes.rank).get_state()
        writer.save(run, store, optimizer, state, lambda written, told=told: told.append(written.step))  # type: ignore[misc]
        if asynchronous:  # what training changes while it is written, and its own messages meanwhile
            for part in (*store.parts().values(), *optimizer.values()):
                part.tensor.mul_(0)
            state.step = 8
            for number in range(20):
                assert processes.sum([number]) == [number * processes.size]
        writer.wait()
        assert told == [7]
        read_back(run / "checkpoint-7", "boxes" if how == "rows" else "columns", processes)
        if processes.first:
            assert torch.equal(load_file(run / "checkpoint-7" / "random.safetensors")["torch"], generators)


def read_back(checkpoint: Path, how: str, processes: Processes) -> None:
    """As another layout than the one that wrote it."""
    empty, truth = make_model(), make_model()
    store = CutWeights(empty, checkpoint, how=how, processes=processes)
    placements = {name: part.placement for name, part in store.parts().items()}
    for part in store.parts().values():
        part.tensor.fill_(torch.nan)
    optimizer, _, state = load_checkpoint(checkpoint, store, placements, processes)
    assert (state.step, state.tokens) == (7, 70)
    for name, parameter in truth.named_parameters():
        if name in placements:
            assert torch.equal(store.parts()[name].tensor, parameter[placements[name].box]), name
    expected = {
        name: tensor[placements[owner].box] if tensor.dim() else tensor
        for name, tensor in optimizer_of(truth).items()
        if (owner := name.rpartition(".")[0]) in placements
    }
    assert optimizer.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(optimizer[name], tensor), name


def write_adapter(folder: Path, processes: Processes) -> None:
    model, config = make_adapter()
    for how in ("rows", "pipeline"):
        store = CutAdapter(model, config, "base", how=how, processes=processes)
        store.write(folder / f"adapter {how}", store.parts(), processes)
    back = CutAdapter(make_adapter()[0], config, "base", how="columns", processes=processes)
    for part in back.parts().values():
        part.tensor.fill_(torch.nan)
    back.load(folder / "adapter rows")
    whole = AdapterWeights(model, config, "base").parts()
    for name, part in back.parts().items():
        assert torch.equal(part.tensor, whole[name].tensor[part.placement.box]), name


def refused(kind: type[ArrieroError], processes: Processes, at: int, work: Callable[[], object]) -> str:
    """The error of rank `at`; the others must be told that it was this one."""
    with pytest.raises(kind if processes.rank == at else PeerError) as error:
        work()
    assert (type(error.value) is PeerError) == (processes.rank != at)
    if processes.rank != at:
        assert f"rank {at} failed" in str(error.value)
    return str(error.value)


def fail_in_one(folder: Path, processes: Processes) -> None:
    """The disk is full for one process only, wherever it writes; then there is room again."""
    run, model = folder / "failing", make_model()
    store = CutWeights(model, folder, how="rows", processes=processes)
    optimizer = optimizer_parts(model, "rows", processes)
    write_checkpoint(run, take_snapshot(store, optimizer, TrainState(step=1), copy=False), processes)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    last = processes.size - 1
    for at, name in ((last, "pwrite"), (0, "pwrite"), (0, "posix_fallocate"), (0, "rename")):
        for asynchronous in (False, True):
            writer = CheckpointWriter(processes, asynchronous=asynchronous)

            def save(writer: CheckpointWriter = writer) -> None:
                writer.save(run, store, optimizer, TrainState(step=2), lambda _: pytest.fail("it is not written"))
                writer.wait()

            with pytest.MonkeyPatch.context() as patch:
                if processes.rank == at:
                    patch.setattr(Path if name == "rename" else os, name, full)
                said = refused(TrainingError, processes, at, save)
            assert "checkpoint-2: the checkpoint could not be written" in said
            assert "No space left on device" in said or "the disk is full" in said
            processes.barrier()
            assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before, name
            processes.barrier()
    with pytest.MonkeyPatch.context() as patch:
        if processes.rank == last:
            patch.setattr(os, "pwrite", full)
        refused(FormatError, processes, last, lambda: store.write(folder / "final", store.parts(), processes))
    processes.barrier()
    assert not list(folder.glob("*final*"))
    processes.barrier()
    write_checkpoint(run, take_snapshot(store, optimizer, TrainState(step=2), copy=False), processes)
    verify(run / "checkpoint-2", processes)
    # a file that is gone or changed: one says which, before anything is read
    target = run / "checkpoint-2" / "optimizer" / "model.safetensors"
    processes.barrier()
    placements = {name: part.placement for name, part in store.parts().items()}
    for content in (None, bytes(target.stat().st_size)):
        processes.barrier()
        if processes.first:
            target.unlink() if content is None else target.write_bytes(content)
        processes.barrier()
        said = refused(
            FormatError, processes, 0, lambda: load_checkpoint(run / "checkpoint-2", store, placements, processes)
        )
        assert "optimizer/model.safetensors" in said
        assert ("missing" if content is None else "damaged") in said


def disagree(processes: Processes) -> None:
    tensor = torch.zeros(4)
    parts = cut({"a": tensor.half() if processes.rank else tensor}, "rows", processes)
    with pytest.raises(FormatError, match=r"^a is F(16|32) \[4\] in one process and F(16|32) \[4\] in another"):
        agree(parts, processes)
    parts = {"a": Part(tensor[:1], Placement((4 * processes.size,), (processes.rank,), (1,)))}
    with pytest.raises(FormatError, match=rf"hold {processes.size} of the {4 * processes.size} numbers of a"):
        agree(parts, processes)
    # what one alone cannot store, the others are told of
    kind = torch.complex128 if processes.first else torch.float32
    parts = {"b": Part(torch.zeros(2, dtype=kind), Placement.whole((2,)))}
    assert "complex128" in refused(FormatError, processes, 0, lambda: agree(parts, processes))


def share_a_run_folder(folder: Path, processes: Processes) -> None:
    def options(name: str, **given: Any) -> CheckpointOptions:
        return CheckpointOptions(output_dir=str(folder / name), **given)

    with RunFolder(options("fresh"), processes) as run:
        assert run.resume is None
        assert (folder / "fresh" / ".lock").exists()
        said = refused(ConfigError, processes, 0, lambda: RunFolder(options("fresh"), processes))
        assert "in use by another run" in said
    processes.barrier()
    assert not (folder / "fresh" / ".lock").exists()
    processes.barrier()
    said = refused(ConfigError, processes, 0, lambda: RunFolder(options("run rows"), processes))
    assert "is not empty" in said
    with RunFolder(options("run rows", resume_from_checkpoint="auto"), processes) as run:
        assert run.resume == folder / "run rows" / "checkpoint-7"
        run.check_inputs("somewhere")
    with RunFolder(options("failing", overwrite_output_dir=True), processes) as run:
        inside = str(folder / "failing" / "checkpoint-1")
        assert "which this run needs" in refused(ConfigError, processes, 0, lambda: run.check_inputs(inside))
        run.drop_later(1)
        assert sorted(path.name for path in (folder / "failing").glob("checkpoint-*")) == ["checkpoint-1"]
        processes.barrier()  # all have looked
        run.clear()
        assert not list((folder / "failing").glob("checkpoint-*"))


def die_while_saving(folder: Path, processes: Processes) -> None:
    run, model = folder / "run", make_model()
    store = CutWeights(model, folder, how="rows", processes=processes)
    optimizer = optimizer_parts(model, "rows", processes)
    write_checkpoint(run, take_snapshot(store, optimizer, TrainState(step=1), copy=False), processes)
    if processes.rank == 1:
        write = os.pwrite

        def die(descriptor: int, content: Any, at: int) -> int:
            write(descriptor, content[: len(content) // 2], at)
            os.kill(os.getpid(), signal.SIGKILL)
            return 0

        os.pwrite = die
    write_checkpoint(run, take_snapshot(store, optimizer, TrainState(step=2), copy=False), processes)


def main(what: str, folder: Path) -> None:
    processes = start(Layout(dp_replicate=int(os.environ["WORLD_SIZE"])), CPU)
    if what == "die":
        die_while_saving(folder, processes)
        return
    write_sets(folder, processes)
    write_checkpoints(folder, processes)
    write_adapter(folder, processes)
    fail_in_one(folder, processes)
    disagree(processes)
    share_a_run_folder(folder, processes)
    stop(processes)


# What the files then hold


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.peers), 4])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    ended = run_processes(request.param, Path(__file__), "write", str(folder), timeout=120)
    for rank, (code, output) in enumerate(ended):
        assert code == 0, f"rank {rank}: {output}"
    return folder


@pytest.mark.parametrize("limit", SHARD_SIZES)
@pytest.mark.parametrize("how", CUTS)
def test_files_are_those_of_the_library(written: Path, how: str, limit: int, tmp_path: Path) -> None:
    """Byte for byte; which tensor is in which file is taken from the index, and the files must keep the limit."""
    folder, tensors = written / f"{how} {limit}", whole_tensors()
    files = sorted(folder.glob("*.safetensors"))
    if limit == max(SHARD_SIZES):
        assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
        save_file(tensors, tmp_path / "truth", metadata={"format": "pt"})
        assert files[0].read_bytes() == (tmp_path / "truth").read_bytes()
        return
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert index["weight_map"].keys() == tensors.keys()
    for path in files:
        names = [name for name, file in index["weight_map"].items() if file == path.name]
        save_file({name: tensors[name] for name in names}, tmp_path / "truth", metadata={"format": "pt"})
        assert path.read_bytes() == (tmp_path / "truth").read_bytes()
        assert path.stat().st_size <= limit
    assert index == json.loads((written / f"rows {limit}" / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize("how", ["rows", "boxes", "copies", "pipeline"])
def test_a_checkpoint_is_that_of_one_process(written: Path, how: str, tmp_path: Path) -> None:
    """Every file of weights and optimizer; of the generators' states the first process's (checked in the ranks)."""
    model = make_model()
    optimizer = {n: Part(t, Placement.whole(tuple(t.shape))) for n, t in optimizer_of(model).items()}
    store = FullWeights(model, tmp_path, max_shard_size="6KB")
    write_checkpoint(tmp_path, take_snapshot(store, optimizer, TrainState(step=7, tokens=70), copy=False))
    found, truth = written / f"run {how}" / "checkpoint-7", tmp_path / "checkpoint-7"
    names = sorted(path.relative_to(truth) for path in truth.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(found) for path in found.rglob("*") if path.is_file())
    assert sum(name.suffix == ".safetensors" for name in names) >= 5
    for name in names:
        if name.name not in ("random.safetensors", "manifest.json"):
            assert (found / name).read_bytes() == (truth / name).read_bytes(), name
    verify(found)


@pytest.mark.parametrize("how", ["rows", "pipeline"])
def test_an_adapter_is_that_of_one_process(written: Path, how: str, tmp_path: Path) -> None:
    model, config = make_adapter()
    store = AdapterWeights(model, config, "base")
    store.write(tmp_path / "truth", store.parts(), Processes())
    names = sorted(path.name for path in (tmp_path / "truth").iterdir())
    assert names == sorted(path.name for path in (written / f"adapter {how}").iterdir())
    for name in names:
        assert (written / f"adapter {how}" / name).read_bytes() == (tmp_path / "truth" / name).read_bytes()


def test_a_rank_killed_while_saving(tmp_path: Path) -> None:
    """The others end in time, the checkpoint before is whole, and the next start clears up."""
    (first, output), (second, _) = run_processes(2, Path(__file__), "die", str(tmp_path), timeout=120)
    assert second == -signal.SIGKILL
    assert first == 1, output
    run = tmp_path / "run"
    assert sorted(path.name for path in run.iterdir() if path.name.startswith("checkpoint")) == ["checkpoint-1"]
    with RunFolder(CheckpointOptions(output_dir=str(run), resume_from_checkpoint="auto")) as again:
        assert again.resume == run / "checkpoint-1"
        assert sorted(path.name for path in run.iterdir()) == [".lock", "checkpoint-1"]


READ = """
import sys, torch
from pathlib import Path
from arriero.formats.parts import Placement
from arriero.formats.shared_files import PartReader
def own():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
reader, columns = PartReader(sys.argv[1]), sys.argv[3] == "columns"
torch.empty(2**20).copy_(torch.ones(2**20))
before, peak, held = own(), 0, []
for name, shape in reader.shapes.items():
    rank, size = 1, 4
    cut = shape[1 if columns else 0] // size
    where = Placement(shape, (0, rank * cut) if columns else (rank * cut, 0), (shape[0], cut) if columns else (cut, shape[1]))
    part = reader.read_part(name, where)
    held.append(torch.empty(where.size, dtype=part.dtype).copy_(part))
    peak = max(peak, own() - before)
print(peak, sum(tensor.nbytes for tensor in held))
"""


@pytest.mark.parametrize("how", ["rows", "columns"])
def test_reading_a_share_takes_the_memory_of_the_share(how: str, tmp_path: Path) -> None:
    """12 tensors of 8 MiB, of which a process reads a quarter: its peak is below the share and one tensor."""
    tensors = {f"t{number}": torch.ones(1024, 2048) for number in range(12)}
    save_file(tensors, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", READ, str(tmp_path), "-", how]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    peak, share = map(int, result.stdout.split())
    assert share == 12 * 8 * 2**20 // 4
    assert share * 0.9 < peak <= share + 8 * 2**20


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

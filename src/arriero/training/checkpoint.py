"""Checkpoints: written whole or not at all, verified before they are read.

`checkpoint-N/` holds the weights as any tool reads them (an HF folder, or an adapter in PEFT's format), the optimizer's
tensors and the random-number states as safetensors, everything else as JSON, and `manifest.json` with the size and SHA-256
of each file. It is written under a temporary name, flushed to disk and renamed. Every process of a run writes its own parts
into these files and reads its own parts of them: they are the same for every layout.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from arriero.errors import ArrieroError, FormatError, PeerError, TrainingError
from arriero.formats.parts import Part, Placement
from arriero.formats.receipt import sha256_of
from arriero.formats.shared_files import PartReader, natural_order, write_tensors
from arriero.formats.staging import sync_file
from arriero.parallel.processes import Processes

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
OPTIMIZER = "optimizer"  # a folder
RANDOM = "random.safetensors"
NAME = re.compile(r"checkpoint-(\d+)")


OPTIMIZER_FILE_BYTES = 5 * 10**9  # as large as the weights' files


class WeightStore(Protocol):
    """How the trained weights of one method are written and read back."""

    def parts(self) -> dict[str, Part]:
        """What this process holds of the weights themselves, not copies, by name."""
        ...

    def write(self, folder: Path, parts: Mapping[str, Part], processes: Processes) -> None:
        """Write weights under the names of `parts`, with what belongs beside them.

        Every process calls it, with its own parts; if it fails in one it fails in all.
        """
        ...

    def load(self, folder: Path) -> None:
        """Read this process's parts back in place."""
        ...


@dataclass
class TrainState:
    """What a run knows about itself besides its tensors.

    Attributes:
        step: optimizer steps done.
        tokens: tokens of the rows seen.
        seconds: wall-clock seconds of training, over all sittings.
        total_steps: steps of the whole run.
        data: fingerprint of what decides the order of the data: rows, batch, accumulation, seed.
        facts: of `run_facts`.
        best_watched: the best evaluation that early stopping has seen; `evaluations_without_gain`: how many came since.
    """

    step: int = 0
    tokens: int = 0
    label_tokens: int = 0
    seconds: float = 0.0
    total_steps: int = 0
    best_metric: float | None = None
    best_checkpoint: str | None = None
    best_watched: float | None = None
    evaluations_without_gain: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


def random_state() -> dict[str, Tensor]:
    """The states of Python's, NumPy's and torch's generators as tensors."""
    kind, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)["state"]
    tensors = {
        "python": torch.tensor([kind, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(numpy_state["key"].astype(np.int64)),
        "numpy_position": torch.tensor(numpy_state["pos"], dtype=torch.int64),
        "torch": torch.get_rng_state(),
    }
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        tensors[f"cuda_{index}"] = torch.cuda.get_rng_state(index)
    return tensors


def restore_random_state(tensors: dict[str, Tensor]) -> None:
    """Set the generators to a state written by `random_state`."""
    kind, *words = tensors["python"].tolist()
    gauss = tensors["python_gauss"].tolist()
    random.setstate((kind, tuple(words), gauss[0] if gauss else None))
    key = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state({"bit_generator": "MT19937", "state": {"key": key, "pos": int(tensors["numpy_position"])}})
    torch.set_rng_state(tensors["torch"])
    for name, state in tensors.items():
        if name.startswith("cuda_") and torch.cuda.is_available() and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name[5:]))


def list_checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [p for p in run_folder.glob("checkpoint-*") if NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(folder: Path) -> int:
    match = NAME.fullmatch(folder.name)
    if match is None:
        raise FormatError(f"{folder}: a folder named checkpoint-N is expected")
    return int(match[1])


@dataclass(frozen=True)
class Snapshot:
    """A run at the end of one step: all that this process puts into a checkpoint."""

    store: WeightStore
    weights: dict[str, Part]
    optimizer: dict[str, Part]
    generators: dict[str, Tensor]
    state: TrainState


def take_snapshot(store: WeightStore, optimizer: dict[str, Part], state: TrainState, *, copy: bool) -> Snapshot:
    """The run as it stands.

    Args:
        copy: into host memory of its own, so that training can go on while it is written.
    """
    weights = store.parts()
    if copy:  # other processes write what is not written here
        weights, optimizer = (
            {
                name: Part(part.tensor.detach().to("cpu", copy=True), part.placement)
                for name, part in parts.items()
                if part.placement.writes
            }
            for parts in (weights, optimizer)
        )
    return Snapshot(store, weights, optimizer, random_state(), deepcopy(state))


def write_checkpoint(run_folder: Path, snapshot: Snapshot, processes: Processes | None = None) -> Path:
    """Write `checkpoint-{step}`; every process calls it, with its own snapshot. Generators and state are the first one's.

    Raises:
        TrainingError: if it cannot be written (the disk is full, say); nothing of it is left then and the earlier
            checkpoints are untouched.
        PeerError: if that was so in another process.
    """
    processes = processes or Processes()
    target = run_folder / f"checkpoint-{snapshot.state.step}"
    temporary = run_folder / f".{target.name}.partial"
    try:
        with processes.together():
            if processes.first:
                shutil.rmtree(temporary, ignore_errors=True)
                (temporary / OPTIMIZER).mkdir(parents=True)
        snapshot.store.write(temporary, snapshot.weights, processes)
        if any(processes.exchange(bool(snapshot.optimizer))):
            _write_optimizer(snapshot.optimizer, temporary / OPTIMIZER, processes)
        with processes.together():
            if processes.first:
                generators = {name: tensor.contiguous() for name, tensor in snapshot.generators.items()}
                save_file(generators, temporary / RANDOM)
                text = json.dumps(asdict(snapshot.state), indent=1) + "\n"
                (temporary / STATE).write_text(text, encoding="utf-8")
        _seal(temporary, processes)
        with processes.together():
            if processes.first:
                if target.exists():  # the same step of an earlier sitting
                    shutil.rmtree(target)
                temporary.rename(target)
                sync_file(run_folder)
    except (OSError, SafetensorError, ArrieroError) as error:
        if processes.first:
            shutil.rmtree(temporary, ignore_errors=True)
        kind = PeerError if isinstance(error, PeerError) else TrainingError
        raise kind(
            f"{target}: the checkpoint could not be written ({_reason(error)}); earlier checkpoints are intact"
        ) from error
    return target


def _reason(error: BaseException) -> str:
    """What went wrong, in the words of the system where there are any."""
    return str(error.strerror) if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())[:300]


def _write_optimizer(parts: dict[str, Part], folder: Path, processes: Processes) -> None:
    # the same order of names, and so the same files, whatever process holds which
    ordered = {name: parts[name] for name in sorted(parts, key=natural_order)}
    write_tensors(ordered, folder, max_shard_size=OPTIMIZER_FILE_BYTES, peers=processes)


def _read_optimizer(folder: Path, placements: Mapping[str, Placement] | None) -> dict[str, Tensor]:
    """Views of the mapped files.

    Args:
        placements: of the parameters in this process; None for every whole tensor.
    """
    if not any(folder.iterdir()):
        return {}
    reader = PartReader(folder)
    if placements is None:
        return {name: reader.read(name) for name in reader.shapes}
    kinds: dict[str, list[str]] = {}
    for name in reader.shapes:
        parameter, _, kind = name.rpartition(".")
        kinds.setdefault(parameter, []).append(kind)
    tensors = {}
    for name, where in placements.items():
        stored = where.stored_as or name
        for kind in kinds.get(stored, []):
            # what has another shape than its parameter (the count of steps) goes with it as a whole
            whole = reader.shapes[f"{stored}.{kind}"] != where.shape
            tensors[f"{name}.{kind}"] = reader.read(f"{stored}.{kind}", None if whole else where.box)
    return tensors


def _hashes(folder: Path, names: Iterable[str], processes: Processes) -> dict[str, str]:
    """SHA-256 of each file; the processes share out the work."""
    own = {}
    with processes.together():
        for number, name in enumerate(names):
            if number % processes.size == processes.rank:
                own[name] = sha256_of(folder / name)
    return {name: digest for told in processes.exchange(own) for name, digest in told.items()}


def _seal(folder: Path, processes: Processes) -> None:
    """Flush every file and write the manifest last."""
    names = []
    with processes.together():
        if processes.first:
            names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
            for name in names:
                sync_file(folder / name)
    names = processes.exchange(names)[0]
    hashes = _hashes(folder, names, processes)
    with processes.together():
        if processes.first:
            files = {n: {"bytes": (folder / n).stat().st_size, "sha256": hashes[n]} for n in names}
            (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
            sync_file(folder / MANIFEST)
            sync_file(folder)


def verify(folder: Path, processes: Processes | None = None) -> None:
    """Check every file against the manifest.

    Raises:
        FormatError: naming the first file that is missing, of another size or changed.
        PeerError: in the other processes then.
    """
    processes = processes or Processes()
    files = processes.by_first(lambda: _listed_files(folder))
    hashes = _hashes(folder, files, processes)
    with processes.together():
        changed = [name for name, entry in files.items() if hashes[name] != entry["sha256"]]
        if processes.first and changed:
            raise _damaged(folder / changed[0])


def _listed_files(folder: Path) -> dict[str, Any]:
    """The files of the manifest, each there and of its size."""
    try:
        files = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{folder}: {MANIFEST} is missing or unreadable: the checkpoint is not complete") from error
    if STATE not in files:
        raise FormatError(f"{folder}: {MANIFEST} does not list {STATE}: the checkpoint is not complete")
    for name, entry in files.items():
        path = folder / name
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise FormatError(f"{folder}: {MANIFEST} has no size and SHA-256 of {name}: the checkpoint is damaged")
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            raise FormatError(f"{path}: listed in {MANIFEST} but missing: use an earlier checkpoint")
        if path.stat().st_size != entry["bytes"]:
            raise _damaged(path)
    return files


def _damaged(path: Path) -> FormatError:
    return FormatError(
        f"{path}: differs from {MANIFEST} (size or SHA-256): the checkpoint is damaged, use an earlier one"
    )


def load_checkpoint(
    folder: Path,
    weights: WeightStore,
    placements: Mapping[str, Placement] | None = None,
    processes: Processes | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], TrainState]:
    """Verify a checkpoint, load this process's weights in place, and return optimizer tensors, generator and train states.

    Args:
        placements: of the parameters in this process; None in a lone one. Of an optimizer tensor of its parameter's shape,
            the same box is read.

    Returns:
        Optimizer tensors as views of the mapped files: copy them.

    Raises:
        FormatError: if it is damaged, or of another model.
        PeerError: if that was so in another process.
    """
    processes = processes or Processes()
    verify(folder, processes)
    with processes.together():
        try:
            state = TrainState(**json.loads((folder / STATE).read_text(encoding="utf-8")))
            optimizer, generators = _read_optimizer(folder / OPTIMIZER, placements), load_file(folder / RANDOM)
        except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
            raise FormatError(f"{folder}: not a training checkpoint ({_reason(error)})") from error
        if placements is not None:
            _check_precision(folder, optimizer, weights)
        weights.load(folder)
    return optimizer, generators, state


def _check_precision(folder: Path, optimizer: Mapping[str, Tensor], weights: WeightStore) -> None:
    """fp32 weights that are read from rounded ones would leave out what their fp32 masters hold."""
    for name, part in weights.parts().items():
        if f"{name}.master" in optimizer and part.tensor.dtype.itemsize >= 4:
            raise FormatError(
                f"{folder}: {name} was trained in half precision, and here it is "
                f"{str(part.tensor.dtype).removeprefix('torch.')}: resume with the precision of the checkpoint"
            )


def prune(run_folder: Path, keep: int | None, best: str | None, step: int) -> None:
    """Delete all checkpoints up to `step` but the newest `keep` of them; the best one is never deleted.

    Later ones are of an earlier sitting, and damaged unless the user went back by name: they do not count as newest.
    """
    if keep is None or keep < 1:
        return
    for path in [p for p in list_checkpoints(run_folder) if checkpoint_step(p) <= step][:-keep]:
        if path.name != best:
            shutil.rmtree(path, ignore_errors=True)  # a file that stays costs space, not the run

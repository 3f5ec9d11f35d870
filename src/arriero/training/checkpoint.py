"""Checkpoints: written whole or not at all, verified before they are read.

`checkpoint-N/` holds the weights as any tool reads them (an HF folder, or an adapter in PEFT's format), the optimizer in
torch's distributed checkpoint format with safetensors files, the random-number states as safetensors, everything else as
JSON, and `manifest.json` with the size and SHA-256 of each file. It is written under a temporary name, flushed to disk
and renamed.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from arriero.errors import ArrieroError, FormatError, TrainingError
from arriero.formats.receipt import sha256_of
from arriero.formats.staging import sync_file

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
OPTIMIZER = "optimizer"  # a folder
RANDOM = "random.safetensors"
NAME = re.compile(r"checkpoint-(\d+)")


# DCP serialises a whole file in memory before it writes it
OPTIMIZER_FILE_BYTES = 256 * 2**20


class WeightStore(Protocol):
    """How the trained weights of one method are written and read back."""

    def tensors(self) -> dict[str, Tensor]:
        """The weights themselves, not copies, by name."""
        ...

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write weights under the names of `tensors`, with what belongs beside them."""
        ...

    def load(self, folder: Path) -> None:
        """Read the weights back in place."""
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
    """

    step: int = 0
    tokens: int = 0
    label_tokens: int = 0
    seconds: float = 0.0
    total_steps: int = 0
    best_metric: float | None = None
    best_checkpoint: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
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
    """A run at the end of one step: all that a checkpoint holds."""

    store: WeightStore
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    generators: dict[str, Tensor]
    state: TrainState


def take_snapshot(store: WeightStore, optimizer: dict[str, Tensor], state: TrainState, *, copy: bool) -> Snapshot:
    """The run as it stands.

    Args:
        copy: into host memory of its own, so that training can go on while it is written.
    """
    weights = store.tensors()
    if copy:
        weights, optimizer = (
            {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for tensors in (weights, optimizer)
        )
    return Snapshot(store, weights, optimizer, random_state(), deepcopy(state))


def write_checkpoint(run_folder: Path, snapshot: Snapshot) -> Path:
    """Write `checkpoint-{step}`.

    Raises:
        TrainingError: if it cannot be written (the disk is full, say); nothing of it is left then and the earlier
            checkpoints are untouched.
    """
    target = run_folder / f"checkpoint-{snapshot.state.step}"
    temporary = run_folder / f".{target.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        snapshot.store.write(temporary, snapshot.weights)
        _save_optimizer(snapshot.optimizer, temporary / OPTIMIZER)
        save_file({name: tensor.contiguous() for name, tensor in snapshot.generators.items()}, temporary / RANDOM)
        (temporary / STATE).write_text(json.dumps(asdict(snapshot.state), indent=1) + "\n", encoding="utf-8")
        _seal(temporary)
        if target.exists():  # the same step of an earlier sitting
            shutil.rmtree(target)
        temporary.rename(target)
        sync_file(run_folder)
    except (OSError, SafetensorError, ArrieroError, CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise TrainingError(
            f"{target}: the checkpoint could not be written ({_reason(error)}); earlier checkpoints are intact"
        ) from error
    return target


def _reason(error: BaseException) -> str:
    """What went wrong, in the words of the system where there are any."""
    if isinstance(error, CheckpointException):  # one failure a rank, each an exception with its traceback
        error = next(iter(error.failures.values()))[0]
    return str(error.strerror) if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())[:300]


def _save_optimizer(tensors: dict[str, Tensor], folder: Path) -> None:
    """As DCP's safetensors storage, which any layout of processes reads its share from."""
    folder.mkdir()
    files, used = {}, 0
    for name, tensor in tensors.items():
        files[name] = 1 + used // OPTIMIZER_FILE_BYTES
        used += tensor.nbytes
    if not tensors:
        return
    with _one_process():
        save_distributed(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), files), no_dist=True)


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """One process is meant: there is nothing to warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _load_optimizer(folder: Path) -> dict[str, Tensor]:
    if not any(folder.iterdir()):
        return {}
    reader = HuggingFaceStorageReader(str(folder))
    tensors: dict[str, Tensor] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise FormatError(f"{folder}: {name} is no tensor")
        tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with _one_process():
        load_distributed(tensors, storage_reader=reader, no_dist=True)
    return tensors


def _seal(folder: Path) -> None:
    """Flush every file and write the manifest last."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sync_file(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    sync_file(folder / MANIFEST)
    sync_file(folder)


def verify(folder: Path) -> None:
    """Check every file against the manifest.

    Raises:
        FormatError: naming the first file that is missing, of another size or changed.
    """
    try:
        files = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{folder}: {MANIFEST} is missing or unreadable: the checkpoint is not complete") from error
    if STATE not in files:
        raise FormatError(f"{folder}: {MANIFEST} does not list {STATE}: the checkpoint is not complete")
    for name, entry in files.items():
        path = folder / name
        if not isinstance(entry, dict):
            raise FormatError(f"{folder}: {MANIFEST} has no size and SHA-256 of {name}: the checkpoint is damaged")
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            raise FormatError(f"{path}: listed in {MANIFEST} but missing: use an earlier checkpoint")
        if path.stat().st_size != entry.get("bytes") or sha256_of(path) != entry.get("sha256"):
            raise FormatError(
                f"{path}: differs from {MANIFEST} (size or SHA-256): the checkpoint is damaged, use an earlier one"
            )


def load_checkpoint(folder: Path, weights: WeightStore) -> tuple[dict[str, Tensor], dict[str, Tensor], TrainState]:
    """Verify a checkpoint, load its weights in place, and return optimizer tensors, generator states and train state."""
    verify(folder)
    try:
        state = TrainState(**json.loads((folder / STATE).read_text(encoding="utf-8")))
        optimizer, generators = _load_optimizer(folder / OPTIMIZER), load_file(folder / RANDOM)
    except (OSError, ValueError, TypeError, SafetensorError, CheckpointException) as error:
        raise FormatError(f"{folder}: not a training checkpoint ({_reason(error)})") from error
    weights.load(folder)
    return optimizer, generators, state


def prune(run_folder: Path, keep: int | None, best: str | None, step: int) -> None:
    """Delete all checkpoints up to `step` but the newest `keep` of them; the best one is never deleted.

    Later ones are of an earlier sitting, and damaged unless the user went back by name: they do not count as newest.
    """
    if keep is None or keep < 1:
        return
    for path in [p for p in list_checkpoints(run_folder) if checkpoint_step(p) <= step][:-keep]:
        if path.name != best:
            shutil.rmtree(path, ignore_errors=True)  # a file that stays costs space, not the run

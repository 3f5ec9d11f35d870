"""Checkpoints: written whole or not at all, verified before they are read.

`checkpoint-N/` holds the weights as any tool reads them (an HF folder, or an adapter in PEFT's format), the optimizer and
random-number states as safetensors, everything else as JSON, and `manifest.json` with the size and SHA-256 of each file.
It is written under a temporary name, flushed to disk and renamed.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from arriero.errors import ArrieroError, FormatError, TrainingError
from arriero.formats.receipt import sha256_of
from arriero.formats.staging import sync_file

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"
RANDOM = "random.safetensors"
NAME = re.compile(r"checkpoint-(\d+)")


class WeightStore(Protocol):
    """How the trained weights of one method are written and read back."""

    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


@dataclass
class TrainState:
    """What a run knows about itself besides its tensors.

    Attributes:
        step: optimizer steps done.
        tokens: tokens seen (there is no padding among them).
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


def save_checkpoint(run_folder: Path, weights: WeightStore, optimizer: dict[str, Tensor], state: TrainState) -> Path:
    """Write `checkpoint-{state.step}`.

    Raises:
        TrainingError: if it cannot be written (the disk is full, say); nothing of it is left then and the earlier
            checkpoints are untouched.
    """
    target = run_folder / f"checkpoint-{state.step}"
    temporary = run_folder / f".{target.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        weights.save(temporary)
        _save_tensors(optimizer, temporary / OPTIMIZER)
        _save_tensors(random_state(), temporary / RANDOM)
        (temporary / STATE).write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")
        _seal(temporary)
        if target.exists():  # the same step of an earlier sitting
            shutil.rmtree(target)
        temporary.rename(target)
        sync_file(run_folder)
    except (OSError, SafetensorError, ArrieroError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise TrainingError(
            f"{target}: the checkpoint could not be written ({reason}); earlier checkpoints are intact"
        ) from error
    return target


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


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
        optimizer, generators = load_file(folder / OPTIMIZER), load_file(folder / RANDOM)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise FormatError(f"{folder}: not a training checkpoint ({error})") from error
    weights.load(folder)
    return optimizer, generators, state


def prune(run_folder: Path, keep: int | None, best: str | None) -> None:
    """Delete all checkpoints but the newest `keep`; the best one is never deleted."""
    if keep is None or keep < 1:
        return
    for path in list_checkpoints(run_folder)[:-keep]:
        if path.name != best:
            shutil.rmtree(path)

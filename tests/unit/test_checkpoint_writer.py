"""Who writes checkpoints: failures in the background are told, and a snapshot is of one moment."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save

from arriero.adapters.lora import LoRAConfig, apply_lora
from arriero.data.order import StepOrder
from arriero.data.sft import Example
from arriero.data.steps import FinetuningSteps
from arriero.errors import FormatError, TrainingError
from arriero.formats.parts import Part, Placement
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.processes import Processes
from arriero.training.callbacks.checkpointing import Checkpointing
from arriero.training.callbacks.records import LossPlot
from arriero.training.checkpoint import TrainState, load_checkpoint, verify
from arriero.training.checkpoint_writer import CheckpointWriter
from arriero.training.optimizer import Optimizer
from arriero.training.precision import Precision
from arriero.training.run import set_seed
from arriero.training.run_folder import newest_checkpoint
from arriero.training.schedule import Schedule
from arriero.training.trainer import Callback, StepRecord, Trainer
from arriero.training.weights import AdapterWeights, FullWeights

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Part]:
    return {name: Part(tensor, Placement.whole(tuple(tensor.shape))) for name, tensor in tensors.items()}


@dataclass
class Store:
    """Two tensors as one file; a write can be held up, and can fail."""

    held: dict[str, Tensor] = field(default_factory=lambda: {"a": torch.zeros(5), "b": torch.zeros(3, 2)})
    gate: threading.Event | None = None
    failure: Exception | None = None

    def parts(self) -> dict[str, Part]:
        return whole(self.held)

    def write(self, folder: Path, parts: Mapping[str, Part], processes: Processes) -> None:
        if self.gate is not None:
            assert self.gate.wait(30)
        save_file({name: part.tensor for name, part in parts.items()}, folder / "model.safetensors")
        if self.failure is not None:
            raise self.failure

    def load(self, folder: Path) -> None:
        self.held = load_file(folder / "model.safetensors")


def steps_of(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def bytes_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def nothing(state: TrainState) -> None:
    pass


def test_a_snapshot_is_of_one_moment(tmp_path: Path) -> None:
    """Everything that training changes while the writer has not even begun."""
    store, writer, optimizer = Store(gate=threading.Event()), CheckpointWriter(asynchronous=True), {"m": torch.ones(4)}
    state, told = TrainState(step=3, tokens=30, data={"seed": 1}, scaler={"scale": 8.0}), []
    torch.manual_seed(11)
    generator = torch.get_rng_state()
    writer.save(tmp_path, store, whole(optimizer), state, lambda written: told.append(written.step))
    store.held["a"].add_(7)
    store.held["b"].fill_(torch.nan)
    optimizer["m"].mul_(-2)
    state.step, state.tokens, state.best_checkpoint = 4, 40, "checkpoint-4"
    state.data["seed"], state.scaler["scale"] = 2, 4.0
    torch.rand(9)
    assert store.gate is not None
    assert not told
    store.gate.set()
    writer.wait()
    assert told == [3]
    assert steps_of(tmp_path) == ["checkpoint-3"]
    read = Store()
    tensors, generators, restored = load_checkpoint(tmp_path / "checkpoint-3", read)
    assert torch.equal(read.held["a"], torch.zeros(5))
    assert torch.equal(read.held["b"], torch.zeros(3, 2))
    assert torch.equal(tensors["m"], torch.ones(4))
    assert torch.equal(generators["torch"], generator)
    assert restored == TrainState(step=3, tokens=30, data={"seed": 1}, scaler={"scale": 8.0})


def test_one_write_at_a_time_in_order(tmp_path: Path) -> None:
    """A checkpoint that is due while one is being written waits; none is dropped."""
    store, writer = Store(gate=threading.Event()), CheckpointWriter(asynchronous=True)
    order: list[int] = []
    writer.save(tmp_path, store, {}, TrainState(step=1), lambda written: order.append(written.step))
    assert store.gate is not None
    threading.Timer(0.1, store.gate.set).start()
    writer.save(tmp_path, store, {}, TrainState(step=2), lambda written: order.append(written.step))
    assert order[:1] == [1], "the second began only after the first was on disk"
    writer.wait()
    assert order == [1, 2]
    writer.wait()  # nothing is under way


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_write_is_told_once_and_the_earlier_ones_stay(asynchronous: bool, tmp_path: Path) -> None:
    store, writer = Store(), CheckpointWriter(asynchronous=asynchronous)
    writer.save(tmp_path, store, whole({"m": torch.ones(4)}), TrainState(step=1), nothing)
    writer.wait()
    before = bytes_of(tmp_path)
    told: list[int] = []
    store.failure = NO_SPACE
    failed = TrainState(step=2)
    if asynchronous:  # told at the next save, which is not made then
        writer.save(tmp_path, store, {}, failed, lambda written: told.append(written.step))
        failed = TrainState(step=3)
    with pytest.raises(TrainingError) as error:
        writer.save(tmp_path, store, {}, failed, lambda written: told.append(written.step))
    expected = (
        "checkpoint-2: the checkpoint could not be written (No space left on device); earlier checkpoints are intact"
    )
    assert str(error.value) == f"{tmp_path}/{expected}"
    assert not told, "nothing may be pruned for a checkpoint that is not there"
    assert bytes_of(tmp_path) == before
    store.failure = None
    writer.save(tmp_path, store, {}, TrainState(step=4), nothing)
    writer.wait()
    assert steps_of(tmp_path) == ["checkpoint-1", "checkpoint-4"]
    verify(tmp_path / "checkpoint-4")


def test_a_defect_in_the_background_is_not_lost(tmp_path: Path) -> None:
    store, writer = Store(failure=ZeroDivisionError("a defect")), CheckpointWriter(asynchronous=True)
    writer.save(tmp_path, store, {}, TrainState(step=1), nothing)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        writer.wait()


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    store, writer = Store(), CheckpointWriter()
    writer.save(tmp_path, store, whole({"m": torch.ones(4)}), TrainState(step=1), nothing)
    store.held = {"a": torch.ones(2)}
    writer.save(tmp_path, store, {}, TrainState(step=1, tokens=5), nothing)
    read = Store()
    tensors, _, state = load_checkpoint(tmp_path / "checkpoint-1", read)
    assert (tensors, state.tokens, list(read.held)) == ({}, 5, ["a"])


def test_files_nested_without_end_are_one_line(tmp_path: Path) -> None:
    CheckpointWriter().save(tmp_path, Store(), {}, TrainState(step=1), nothing)
    folder, deep = tmp_path / "checkpoint-1", b"[" * 100_000
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "trainer_state.json").write_bytes(deep)
    manifest["files"]["trainer_state.json"] = {"bytes": len(deep), "sha256": hashlib.sha256(deep).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match="not a training checkpoint"):
        load_checkpoint(folder, Store())
    (folder / "manifest.json").write_bytes(deep)
    with pytest.raises(FormatError, match=r"manifest\.json is missing or unreadable"):
        verify(folder)


def make_trainer(folder: Path, *callbacks: Callback, steps: int = 6) -> Trainer:
    set_seed(3)
    shape = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    model = LlamaForCausalLM(LlamaConfig.from_dict({"model_type": "llama", **shape, **heads}))
    model.init_weights(0)
    rows = [Example([1, 5 + i, 7, 9 + i], [-100, 7, 9 + i, 2]) for i in range(8)]
    return Trainer(
        model=model,
        data=FinetuningSteps(rows, StepOrder(len(rows), 2, 1, seed=4)),
        optimizer=Optimizer(model),
        schedule=Schedule("constant", 1e-2, 0.0, 0, steps),
        precision=Precision(torch.float32, "O1", torch.device("cpu")),
        weights=FullWeights(model, folder),
        total_steps=steps,
        run_folder=folder,
        device=torch.device("cpu"),
        callbacks=list(callbacks),
    )


class Scripted(Callback):
    """Does something after a step, before the checkpoint."""

    def __init__(self, actions: dict[int, Callable[[Trainer], None]]) -> None:
        self.actions = actions

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self.actions.get(record.step, lambda _: None)(trainer)


def test_training_overtakes_the_writer_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files as those of a run that waits for each, though the optimizer is steps ahead when they are written."""
    make_trainer(tmp_path / "waiting", Checkpointing("steps", 3)).train()
    here: list[int] = []
    trainer = make_trainer(tmp_path / "overtaking", Checkpointing("steps", 3, asynchronous=True))
    write = FullWeights.write

    def slowly(self: FullWeights, folder: Path, parts: Mapping[str, Part], processes: Processes) -> None:
        deadline = time.monotonic() + 30
        while trainer.state.step < 5 and time.monotonic() < deadline:
            time.sleep(0.005)
        here.append(trainer.state.step)
        write(self, folder, parts, processes)

    monkeypatch.setattr(FullWeights, "write", slowly)
    trainer.train()
    assert here[0] >= 5, "checkpoint-3 is written after step 5"
    for part in ("model.safetensors", "optimizer/model.safetensors", "random.safetensors"):
        one, other = (load_file(tmp_path / run / "checkpoint-3" / part) for run in ("waiting", "overtaking"))
        assert one.keys() == other.keys()
        assert len(one) > 3
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name
    states = [
        json.loads((tmp_path / run / "checkpoint-3" / "trainer_state.json").read_text())
        for run in ("waiting", "overtaking")
    ]
    for state in states:
        del state["seconds"]
    assert states[0] == states[1]
    verify(tmp_path / "overtaking" / "checkpoint-3")


def fail_in_background(
    monkeypatch: pytest.MonkeyPatch, *steps: int, held: Callable[[], bool] = lambda: False, always: bool = False
) -> None:
    """Let the checkpoints of these steps not be written, the first time or always.

    Args:
        held: whether the first of them is to wait with its failure.
    """
    write, failed = FullWeights.write, set[int]()

    def full(self: FullWeights, folder: Path, parts: Mapping[str, Part], processes: Processes) -> None:
        write(self, folder, parts, processes)
        for step in steps:
            if f"checkpoint-{step}." in folder.name and (always or step not in failed):
                failed.add(step)
                deadline = time.monotonic() + 30
                while held() and time.monotonic() < deadline:
                    time.sleep(0.005)
                raise NO_SPACE

    monkeypatch.setattr(FullWeights, "write", full)


def await_write(saving: Checkpointing) -> Callable[[Trainer], None]:
    """Until what is written in the background is done with."""

    def wait(_: Trainer) -> None:
        deadline = time.monotonic() + 30
        while (pending := saving.writer._pending) is not None and not pending.done() and time.monotonic() < deadline:
            time.sleep(0.005)

    return wait


def test_a_failure_in_the_background_is_told_at_the_next_step_which_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_in_background(monkeypatch, 3)
    saving = Checkpointing("steps", 3, asynchronous=True)
    trainer = make_trainer(tmp_path, Scripted({4: await_write(saving)}), saving)
    assert trainer.train().step == 6
    assert steps_of(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    told = capsys.readouterr().out
    assert "warning: " in told
    assert "checkpoint-3: the checkpoint could not be written (No space left on device); earlier" in told
    assert told.endswith("intact; step 4 is saved now\n")
    verify(tmp_path / "checkpoint-4")


def test_a_failure_that_shows_at_a_due_save_does_not_hinder_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = Checkpointing("steps", 3, asynchronous=True)
    trainer = make_trainer(tmp_path, saving)
    fail_in_background(monkeypatch, 3, held=lambda: trainer.state.step < 6)
    assert trainer.train().step == 6
    assert steps_of(tmp_path) == ["checkpoint-6"]


def test_a_disk_that_stays_full_ends_the_run_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a whole interval later; the checkpoint before stays."""
    fail_in_background(monkeypatch, 4, 5, always=True)
    saving = Checkpointing("steps", 2, keep=1, asynchronous=True)
    trainer = make_trainer(tmp_path, Scripted({5: await_write(saving)}), saving, LossPlot())
    with pytest.raises(TrainingError, match=r"checkpoint-5: .*No space left on device.*intact"):
        trainer.train()
    assert steps_of(tmp_path) == ["checkpoint-2"]
    again = make_trainer(tmp_path)
    again.resume(tmp_path / "checkpoint-2")


def test_the_last_checkpoint_is_tried_again_and_a_lost_one_is_not_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def better(trainer: Trainer) -> None:
        trainer.metrics, trainer.metrics_step = {"eval_loss": 1.0 / trainer.state.step}, trainer.state.step

    def worse(trainer: Trainer) -> None:
        trainer.metrics, trainer.metrics_step = {"eval_loss": 9.0}, trainer.state.step

    fail_in_background(monkeypatch, 4, 6)
    saving = Checkpointing("steps", 2, metric="loss", load_best=True, asynchronous=True)
    trainer = make_trainer(tmp_path, Scripted({2: better, 4: better, 5: await_write(saving), 6: worse}), saving)
    trainer.train()
    assert steps_of(tmp_path) == ["checkpoint-2", "checkpoint-5", "checkpoint-6"]
    assert (trainer.state.best_checkpoint, trainer.state.best_metric) == ("checkpoint-2", 0.5)
    for name, tensor in load_file(tmp_path / "checkpoint-2" / "model.safetensors").items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), name


def test_a_failure_in_another_process_counts(tmp_path: Path) -> None:
    told: list[list[float]] = []

    class Two(Processes):
        def max(self, values: Sequence[float]) -> list[float]:
            told.append(list(values))
            return [0.0, 1.0]

        def any(self, flag: bool) -> bool:
            return True

    store, writer = Store(), CheckpointWriter(Two(), asynchronous=True)
    assert not writer.has_failed()
    assert not told, "no message without a write"
    writer.save(tmp_path, store, {}, TrainState(step=1), nothing)
    assert writer.has_failed()
    assert writer.settle() == "another process failed"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_at_the_last_checkpoint_is_the_error_that_is_told(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that the best checkpoint, which would have been this one, is missing."""
    write = FullWeights.write

    def full(self: FullWeights, folder: Path, parts: Mapping[str, Part], processes: Processes) -> None:
        if "checkpoint-6." in folder.name:
            raise NO_SPACE
        write(self, folder, parts, processes)

    def better(trainer: Trainer) -> None:
        trainer.metrics = {"eval_loss": 1.0 / trainer.state.step}

    monkeypatch.setattr(FullWeights, "write", full)
    saving = Checkpointing("steps", 3, metric="loss", load_best=True, asynchronous=asynchronous)
    trainer = make_trainer(tmp_path, Scripted({3: better, 6: better}), saving)
    with pytest.raises(TrainingError, match=r"checkpoint-6: .*No space left on device"):
        trainer.train()
    assert steps_of(tmp_path) == ["checkpoint-3"]


def test_damaged_later_checkpoints_are_not_the_newest(tmp_path: Path) -> None:
    """A run that went back behind damaged checkpoints must not keep those and delete its own."""
    make_trainer(tmp_path, Checkpointing("steps", 1)).train()
    for step in (5, 6):
        (tmp_path / f"checkpoint-{step}" / "manifest.json").unlink()
    stop = Scripted({5: lambda trainer: setattr(trainer, "should_stop", True)})
    trainer = make_trainer(tmp_path, stop, Checkpointing("steps", 1, keep=1))
    trainer.resume(tmp_path / "checkpoint-4")
    trainer.train()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert steps_of(tmp_path) == ["checkpoint-5", "checkpoint-6"]
    final = make_trainer(tmp_path, Checkpointing("steps", 1, keep=1))
    final.resume(tmp_path / "checkpoint-5")
    final.train()
    assert steps_of(tmp_path) == ["checkpoint-6"]
    verify(tmp_path / "checkpoint-6")


def test_optimizer_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """Those of torch's distributed checkpoint: several files, with its own notes in their headers."""
    store, tensors = Store(), {"a.exp_avg": torch.randn(4, 3), "a.step": torch.tensor(3.0), "b.master": torch.randn(7)}
    CheckpointWriter().save(tmp_path, store, {}, TrainState(step=1), nothing)
    checkpoint = tmp_path / "checkpoint-1"
    files = {"a.exp_avg": 1, "a.step": 1, "b.master": 2}
    with pytest.warns(UserWarning, match="single process"):
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(checkpoint / "optimizer"), files), no_dist=True)
    found, _, _ = load_checkpoint(checkpoint, store)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_rounded_weights_do_not_pass_for_exact_ones(tmp_path: Path) -> None:
    store = Store({"a": torch.zeros(5, dtype=torch.bfloat16)})
    optimizer = whole({"a.master": torch.randn(5)})
    CheckpointWriter().save(tmp_path, store, optimizer, TrainState(step=1), nothing)
    placements = {"a": Placement.whole((5,))}
    found, _, _ = load_checkpoint(tmp_path / "checkpoint-1", store, placements)
    assert torch.equal(found["a.master"], optimizer["a.master"].tensor)
    with pytest.raises(FormatError, match="a was trained in half precision, and here it is float32: resume with"):
        load_checkpoint(tmp_path / "checkpoint-1", Store({"a": torch.zeros(5)}), placements)


def test_weights_of_another_model_or_number_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    state = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    norm = "model.norm.weight"
    for change, words in (
        ({norm: torch.zeros(15)}, r"model.norm.weight has the shape \[15\], config.json asks for \[16\]"),
        ({norm: torch.zeros(16, dtype=torch.int32)}, "model.norm.weight is int32, a floating-point tensor is needed"),
        ({"model.layers.1.mlp.up_proj.weight": torch.zeros(2)}, "unexpected model.layers.1.mlp.up_proj.weight"),
    ):
        save_file({**state, **change}, tmp_path / "model.safetensors")
        with pytest.raises(FormatError, match=words):
            trainer.weights.load(tmp_path)
    save_file({name: tensor for name, tensor in state.items() if name != norm}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"missing model\.norm\.weight"):
        trainer.weights.load(tmp_path)


def test_an_adapter_with_other_options_is_refused(tmp_path: Path) -> None:
    def adapter(**options: Any) -> AdapterWeights:
        model, config = make_trainer(tmp_path).model, LoRAConfig(**options)
        apply_lora(model, config)
        return AdapterWeights(model, config, "base")

    store = adapter(rank=2, target_modules=("q_proj", "up_proj"))
    store.write(tmp_path / "adapter", store.parts(), Processes())
    adapter(rank=2, target_modules=("up_proj", "q_proj")).load(tmp_path / "adapter")
    for options, words in (
        ({"rank": 3}, "with r 2, this run has 3"),
        ({"rank": 2, "alpha": 4.0}, "with lora_alpha 16.0, this run has 4.0"),
        ({"rank": 2, "target_modules": ("q_proj",)}, r"with target_modules \['q_proj', 'up_proj'\], this run has"),
    ):
        with pytest.raises(FormatError, match=words):
            adapter(**{"target_modules": ("q_proj", "up_proj"), **options}).load(tmp_path / "adapter")

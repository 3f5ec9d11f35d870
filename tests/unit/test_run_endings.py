"""How runs end and go on in ways that lose nothing: signals late in a run, best checkpoints, failing callbacks, fp16."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from arriero.data.batch import Batch, LazyBatches, pack
from arriero.data.order import StepOrder
from arriero.data.sft import Example
from arriero.data.steps import FinetuningSteps
from arriero.early_signals import EarlySignals
from arriero.errors import RunStopped, TrainingError
from arriero.models.config import LlamaConfig
from arriero.models.llama import LlamaForCausalLM
from arriero.parallel.processes import Processes
from arriero.training.callbacks.checkpointing import Checkpointing
from arriero.training.callbacks.evaluation import Evaluation
from arriero.training.callbacks.progress import Averages, format_record
from arriero.training.callbacks.records import JsonLines, read_log
from arriero.training.callbacks.stop_signals import StopSignals
from arriero.training.evaluation import EvaluationStopped, evaluate_loss
from arriero.training.execution import build_execution
from arriero.training.loss import linear_cross_entropy
from arriero.training.optimizer import Optimizer
from arriero.training.precision import Precision
from arriero.training.schedule import Schedule
from arriero.training.trainer import Callback, StepRecord, Trainer
from arriero.training.weights import FullWeights

CPU = torch.device("cpu")


def make_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig.from_dict(
        {"model_type": "llama", "vocab_size": 40, "max_position_embeddings": 32, "initializer_range": 0.2, **shape}
    )
    model = LlamaForCausalLM(config)
    model.init_weights(0)
    return model.to(dtype)


def make_trainer(folder: Path, *callbacks: Callback, steps: int = 6, accumulation: int = 1, **changes: Any) -> Trainer:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 40, (9,), generator=generator).tolist() for _ in range(16)]
    precision = changes.pop("precision", Precision(torch.float32, "O1", CPU))
    model = changes.pop("model", None) or make_model(precision.parameter_dtype)
    torch.manual_seed(2)
    return Trainer(
        model=model,
        data=FinetuningSteps(
            [Example(row, [*row[1:], -100]) for row in rows], StepOrder(16, 4 // accumulation, accumulation, 3)
        ),
        optimizer=Optimizer(model),
        schedule=Schedule("constant", 1e-2, 0.0, 0, steps),
        precision=precision,
        weights=FullWeights(model, folder),
        total_steps=steps,
        run_folder=folder,
        device=CPU,
        callbacks=list(callbacks),
        **changes,
    )


class At(Callback):
    """Does something after a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step == self.step:
            self.action()


def scores(*values: float) -> Any:
    left = iter(values)
    return lambda: {"loss": next(left)}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_signal_after_the_last_step_does_not_kill_what_is_saved(asynchronous: bool, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        late = At(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        trainer = make_trainer(tmp_path, late, signals, Checkpointing("steps", 3, asynchronous=asynchronous))
        assert trainer.train().step == 6
        assert signals.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGUSR1) == signals._note, "the final model is still to be saved"
    assert signal.getsignal(signal.SIGTERM) == before
    assert (tmp_path / "checkpoint-6" / "manifest.json").is_file()


def test_a_signal_that_comes_twice_at_once_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel tells a launcher's death; one that comes later ends the process, here by the handler that was before."""
    clock = [100.0]
    monkeypatch.setattr("arriero.training.callbacks.stop_signals.time.monotonic", lambda: clock[0])
    ended: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    try:
        with StopSignals() as signals:
            signals.on_train_begin(make_trainer(tmp_path))
            for seconds, expected in ((0.0, []), (0.9, []), (1.1, [signal.SIGTERM])):
                clock[0] = 100.0 + seconds
                signal.raise_signal(signal.SIGTERM)
                assert (signals.received, ended) == (signal.SIGTERM, expected)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_weights_that_were_not_scored_are_not_the_best(tmp_path: Path) -> None:
    with StopSignals() as signals:
        stop = At(3, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        saving = Checkpointing("steps", 2, metric="loss", load_best=True)
        trainer = make_trainer(tmp_path, stop, Evaluation(scores(1.0), "steps", 2), signals, saving)
        trainer.train()
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert (state["step"], state["best_checkpoint"], state["best_metric"]) == (3, "checkpoint-2", 1.0)


def test_what_is_no_number_is_not_the_best(tmp_path: Path) -> None:
    saving = Checkpointing("steps", 2, metric="loss", load_best=True)
    trainer = make_trainer(tmp_path, Evaluation(scores(math.nan, 2.0, 3.0), "steps", 2), saving)
    trainer.train()
    assert (trainer.state.best_checkpoint, trainer.state.best_metric) == ("checkpoint-4", 2.0)


def test_a_signal_in_an_evaluation_abandons_it_and_saves(tmp_path: Path) -> None:
    made: list[int] = []
    model = make_model()

    def batch(number: int) -> Batch:
        made.append(number)
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return pack([Example([3, 4, 5], [4, 5, -100])])

    execution = build_execution(model, Precision(torch.float32, "O1", CPU), CPU)
    with StopSignals() as signals:
        evaluation = Evaluation(lambda: evaluate_loss(execution, LazyBatches(9, batch)), "steps", 2)
        trainer = make_trainer(tmp_path, evaluation, signals, Checkpointing("steps", 4), model=model)
        assert trainer.train().step == 2
        with pytest.raises(EvaluationStopped):  # as that of the final weights
            evaluate_loss(execution, LazyBatches(9, batch))
    assert made == [0, 1, 2, 0], "it asks before each batch is scored"
    assert (trainer.metrics, trainer.metrics_step) == ({}, -1)
    assert model.training
    assert (tmp_path / "checkpoint-2" / "manifest.json").is_file()
    assert evaluate_loss(execution, LazyBatches(2, batch)).keys() >= {"loss"}, "nobody asks outside of a run"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_ends_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def load() -> None:
        with EarlySignals(), EarlySignals():
            try:
                os.kill(os.getpid(), number)
                time.sleep(5)
            except Exception:  # what loads a model may go on after errors
                pytest.fail("taken for an error")
            finally:
                os.kill(os.getpid(), number)  # the same signal once more

    with pytest.raises(RunStopped, match=f"{number.name}: ended before the first step: nothing to save") as ended:
        load()
    assert ended.value.exit_code == 0
    assert signal.getsignal(number) == before


def test_from_the_first_step_on_signals_are_noted(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with EarlySignals():
        with StopSignals() as signals:
            stop = At(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert make_trainer(tmp_path, stop, signals, Checkpointing("no", 1)).train().step == 3
        assert signal.getsignal(signal.SIGTERM) == before, "after the run it is no early signal"


def test_a_signal_that_only_another_process_heard_before_the_first_step_ends_all(tmp_path: Path) -> None:
    class Two(Processes):
        def max(self, values: Sequence[float]) -> list[float]:
            return [float(signal.SIGTERM)]

    class Gone(Processes):
        def max(self, values: Sequence[float]) -> list[float]:
            signal.raise_signal(signal.SIGTERM)
            raise RuntimeError("Connection closed by peer")

    for processes in (Two(), Gone()):
        with pytest.raises(RunStopped, match="before the first step"), EarlySignals(), StopSignals() as signals:
            signals.on_train_begin(make_trainer(tmp_path, processes=processes))


def test_the_best_of_another_folder_is_forgotten(tmp_path: Path) -> None:
    saving = Checkpointing("steps", 2, metric="loss", load_best=True)
    make_trainer(tmp_path / "a", Evaluation(scores(0.1, 0.2, 0.3), "steps", 2), saving).train()
    again = Checkpointing("steps", 2, metric="loss", load_best=True)
    second = make_trainer(tmp_path / "b", Evaluation(scores(0.5), "steps", 2), again)
    second.resume(tmp_path / "a" / "checkpoint-4")
    second.train()
    assert second.state.best_checkpoint == "checkpoint-6"


def test_steps_of_another_size_are_refused_with_the_option_that_mends_it(tmp_path: Path) -> None:
    make_trainer(tmp_path, Checkpointing("steps", 2), steps=2).train()
    for rows, hint in ((2, "batch (--gradient_accumulation_steps 2), seed"), (3, "batch, seed")):
        fewer = make_trainer(tmp_path)
        fewer.state.data = FinetuningSteps([], StepOrder(16, rows, 1, 3)).fingerprint()
        with pytest.raises(TrainingError) as caught:
            fewer.resume(tmp_path / "checkpoint-2")
        assert f"rows_per_step was 4 and is {rows}" in str(caught.value)
        assert hint in str(caught.value)


def test_a_lost_best_checkpoint_costs_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lose() -> None:
        (tmp_path / "checkpoint-2" / "manifest.json").unlink()

    saving = Checkpointing("steps", 2, metric="loss", load_best=True)
    make_trainer(tmp_path, Evaluation(scores(0.1, 0.2, 0.3), "steps", 2), saving, At(6, lose)).train()
    assert "warning: the best checkpoint is lost, the last weights are kept" in capsys.readouterr().out


def test_one_failing_callback_does_not_keep_the_others_from_closing(tmp_path: Path) -> None:
    closed = []

    class Failing(Callback):
        def on_train_end(self, trainer: Trainer) -> None:
            raise TrainingError("the disk is gone")

    class Closing(Callback):
        def on_train_end(self, trainer: Trainer) -> None:
            closed.append(trainer.state.step)

    with pytest.raises(TrainingError, match="the disk is gone"):
        make_trainer(tmp_path, Failing(), Closing(), steps=2).train()
    assert closed == [2]

    def broken() -> None:
        raise TrainingError("the loss is not finite")

    with pytest.raises(TrainingError, match="the loss is not finite"):
        make_trainer(tmp_path, At(1, broken), Failing(), Closing(), steps=2).train()
    assert closed == [2, 1]


def test_the_steps_since_the_last_log_point_of_a_run_that_stops_are_logged(tmp_path: Path) -> None:
    """Once: a run that goes on from there begins a new window, and the last step of a whole run is a log point itself."""

    def logged() -> list[int]:
        return [record["step"] for record in read_log(tmp_path / "train_log.jsonl")]

    with StopSignals() as signals:
        stop = At(3, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        make_trainer(tmp_path, Averages(2), JsonLines(), stop, signals, Checkpointing("no", 1)).train()
    assert logged() == [1, 2, 3]
    second = make_trainer(tmp_path, Averages(5), JsonLines())
    second.resume(tmp_path / "checkpoint-3")
    second.train()
    assert logged() == [1, 2, 3, 5, 6]


def test_a_run_that_fails_logs_no_window(tmp_path: Path) -> None:
    def broken() -> None:
        raise TrainingError("the loss is not finite")

    with pytest.raises(TrainingError, match="the loss is not finite"):
        make_trainer(tmp_path, Averages(2), JsonLines(), At(3, broken)).train()
    assert [record["step"] for record in read_log(tmp_path / "train_log.jsonl")] == [1, 2]


def test_left_out_data_is_not_shown_as_loss_zero(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, Averages(1), JsonLines(), skip_steps=frozenset({1, 2}))
    trainer.train()
    records = read_log(tmp_path / "train_log.jsonl")
    assert [("loss" in record, "grad_norm" in record) for record in records[:4]] == [
        (True, True), (False, False), (False, False), (True, True)
    ]  # fmt: skip
    assert format_record(records[1], 6) == "step 2/6 | data left out"


def test_an_overflow_is_valid_json(tmp_path: Path) -> None:
    precision = Precision(torch.float16, "O1", CPU, 2.0**40)
    make_trainer(tmp_path, Averages(1), JsonLines(), precision=precision, steps=2).train()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    for line in (tmp_path / "train_log.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["skipped_steps"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_accumulation_adds_up_in_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    """The gradients of the micro-batches, each rounded once, are not rounded again by their sum."""
    gradients = {}
    for accumulation in (1, 4):
        trainer = make_trainer(tmp_path, precision=Precision(dtype, "O2", CPU, 1024.0), accumulation=accumulation)
        for batch in trainer.data(0):
            (linear := trainer.model).zero_grad()
            hidden = linear.hidden_states(batch.input_ids, attention=batch.attention())
            (linear_cross_entropy(hidden, linear.lm_head.weight, batch.labels).loss / 32).backward()
            expected = {name: p.grad.float() for name, p in linear.named_parameters()}
            gradients.setdefault(accumulation, []).append(expected)
            trainer.optimizer.collect_gradients()
        collected = trainer.optimizer.gradients()
        for name, total in collected.items():
            assert total.dtype == torch.float32
            torch.testing.assert_close(total, sum(part[name] for part in gradients[accumulation]), rtol=0, atol=0)


def test_the_head_of_fp16_does_not_overflow_by_the_number_of_rows() -> None:
    """16,384 rows with one label: their sum is far above 65,504 / |h|, and finite in fp32."""
    hidden = torch.full((16384, 8), 3.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(128, 8, dtype=torch.float16, requires_grad=True)
    labels = torch.full((16384,), 7)
    (linear_cross_entropy(hidden, weight, labels).loss / 16384).backward()
    assert weight.grad is not None
    wanted = torch.full((128, 8), 3.0 / 128)
    wanted[7] -= 3.0
    torch.testing.assert_close(weight.grad.float(), wanted, rtol=2e-3, atol=1e-5)
